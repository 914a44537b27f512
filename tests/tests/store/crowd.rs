//! Two hundred hosts that start at once. Each is a tenure with a connection of its own, as in two hundred daemons, and they look at
//! one watch: two hundred in one process would only wait for each other. `FLANNEL_TESTS_LONG=1` starts two hundred daemons
//! (flanneld_faults).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use flannel_core::run::store::sign::NodeMark;
use flannel_core::run::store::{Snapshot, Store};
use flannel_core::run::tenure::TenureState;
use flannel_core::words::code::Code;
use flannel_core::words::name::NetworkName;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::fixture::{Etcd, HOUR, PREFIX, value};
use crate::tenure::{Node, offer};

const HOSTS: usize = 200;

/// For a machine that does many other things.
const SETTLED: Duration = Duration::from_secs(60);

/// So many subnets.
fn config(subnets: usize) -> String {
    format!(
        r#"{{"Network":"10.100.0.0/16","SubnetMin":"10.100.1.0","SubnetMax":"10.100.{subnets}.0","Backend":{{"Type":"vxlan"}}}}"#
    )
}

fn ip(host: usize) -> String {
    format!("192.0.2.{}", host + 1)
}

/// The hosts without a subnet, once every other has one.
async fn settled(nodes: &[Node], without: usize) -> Vec<usize> {
    let deadline = Instant::now() + SETTLED;
    loop {
        let waiting: Vec<_> =
            (0..nodes.len()).filter(|host| nodes[*host].state.borrow().own.is_none()).collect();
        let told = |host: &usize| {
            nodes[*host]
                .state
                .borrow()
                .waiting
                .as_ref()
                .is_some_and(|finding| finding.code == Code::OUT_OF_SUBNETS)
        };
        if waiting.len() == without && waiting.iter().all(told) {
            return waiting;
        }
        assert!(Instant::now() < deadline, "{} wait, for {:?}", waiting.len(), reasons(nodes));
        sleep(Duration::from_millis(20)).await;
    }
}

fn reasons(nodes: &[Node]) -> BTreeMap<String, usize> {
    let mut reasons = BTreeMap::new();
    for state in nodes.iter().map(|node| node.state.borrow().clone()) {
        let reason = match state {
            TenureState { own: Some(_), .. } => "nothing".to_owned(),
            TenureState { waiting, .. } => {
                waiting.map_or_else(|| "no reason".to_owned(), |finding| finding.to_string())
            }
        };
        *reasons.entry(reason).or_default() += 1;
    }
    reasons
}

/// Fails on a set of leases that is smaller than one before, or has two owners of one address.
async fn watched(mut snapshots: watch::Receiver<Snapshot>, fewest: watch::Receiver<usize>) {
    let mut most = 0;
    while snapshots.changed().await.is_ok() {
        let leases = snapshots.borrow_and_update().leases.clone();
        assert!(leases.findings.is_empty(), "{:?}", leases.findings);
        // A host whose claim was not answered may have two for a moment.
        let holders: BTreeSet<_> = leases.leases.values().map(|lease| lease.public_ip).collect();
        most = holders.len().max(most);
        assert!(holders.len() >= most.min(*fewest.borrow()), "{} after {most}", holders.len());
    }
}

#[tokio::test]
async fn of_two_hundred_hosts_that_start_at_once_each_gets_a_subnet_or_is_told() {
    let Some(etcd) = Etcd::start() else { return };
    let store = |host: usize| {
        let store = Store::etcd(&etcd.settings()).unwrap().network(&NetworkName::default_network());
        store.signed_by(NodeMark(u32::try_from(host).unwrap()))
    };
    let (allowed, fewest) = watch::channel(190);
    let snapshots = store(999).watch();
    let watcher = tokio::spawn(watched(snapshots.clone(), fewest));
    let start = Instant::now();
    let begin = |subnets: usize| -> Vec<Node> {
        let node = |host| {
            let offer = offer(&config(subnets), value(&ip(host)));
            Node::watching(&store(host), snapshots.clone(), offer, HOUR / 60, HOUR)
        };
        (0..HOSTS).map(node).collect()
    };
    let nodes = begin(190);
    let waiting = settled(&nodes, 10).await;
    eprintln!("190 subnets: {:?}", start.elapsed());
    let held: BTreeSet<_> =
        nodes.iter().filter_map(|node| Some(node.state.borrow().own.as_ref()?.subnets)).collect();
    assert_eq!(held.len(), 190, "two have one");

    // One is freed: exactly one of the ten gets it.
    allowed.send_replace(189);
    let leaves = (0..HOSTS).find(|host| !waiting.contains(host)).unwrap();
    nodes[leaves].offers.send_replace(None);
    let deadline = Instant::now() + SETTLED;
    while waiting.iter().all(|host| nodes[*host].state.borrow().own.is_none()) {
        assert!(Instant::now() < deadline, "nobody gets it");
        sleep(Duration::from_millis(20)).await;
    }
    sleep(Duration::from_millis(300)).await;
    let served = waiting.iter().filter(|host| nodes[**host].state.borrow().own.is_some()).count();
    assert_eq!(served, 1);
    allowed.send_replace(0);
    drop(nodes);

    // The same with more subnets than hosts: nobody is left over.
    etcd.ctl(&["del", "--prefix", PREFIX]);
    let start = Instant::now();
    let nodes = begin(210);
    settled(&nodes, 0).await;
    eprintln!("210 subnets: {:?}", start.elapsed());
    let held: BTreeSet<_> =
        nodes.iter().filter_map(|node| Some(node.state.borrow().own.as_ref()?.subnets)).collect();
    assert_eq!(held.len(), HOSTS);
    assert!(!watcher.is_finished(), "{:?}", watcher.await);
}
