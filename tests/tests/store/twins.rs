//! Two hosts with one public address, one host with two addresses after each other, and hosts that were away for longer than
//! their leases. Only etcd can tell them apart.

use std::time::{Duration, Instant};

use flannel_core::run::store::sign::{ASK, NodeMark};
use flannel_core::run::store::{EtcdSettings, NetworkStore, Store};
use flannel_core::run::tenure::Offer;
use flannel_core::words::code::Code;
use flannel_core::words::name::NetworkName;
use tokio::time::sleep;

use crate::fixture::{Etcd, HOUR, PREFIX, claim, keys, subnets, text, until, value};
use crate::gate::Gate;
use crate::tenure::{Node, WIDE, eventually, offer};

fn signed(settings: &EtcdSettings, mark: u32) -> NetworkStore {
    let store = Store::etcd(settings).unwrap().network(&NetworkName::default_network());
    store.signed_by(NodeMark(mark))
}

fn node(settings: &EtcdSettings, mark: u32, ip: &str) -> Node {
    Node::at(&signed(settings, mark), offer(WIDE, value(ip)), Duration::from_secs(60), HOUR)
}

#[tokio::test]
async fn a_second_host_with_an_address_gets_nothing_while_the_first_lives() {
    let Some(etcd) = Etcd::start() else { return };
    let settings = etcd.settings();
    let mut first = node(&settings, 1, "192.0.2.1");
    let own = first.holds().await;
    let key = format!("{PREFIX}/subnets/{}", own.subnets.key());
    let before = etcd.entry(&key).unwrap();
    // Peers are shown nothing of it.
    let mut peer = signed(&settings, 9).watch();
    let seen = until(&mut peer, "the lease", |snapshot| snapshot.leases.leases.len() == 1).await;

    let mut second = node(&settings, 2, "192.0.2.1");
    second.waits_for(Code::PUBLIC_IP_SHARED).await;
    let said = second.state.borrow().waiting.clone().unwrap().text;
    for part in [&own.subnets.to_string(), "192.0.2.1", "asked"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    // It was asked and answered, it holds what it held, and nothing is left of the question.
    let after = etcd.entry(&key).unwrap();
    assert!(after["version"].as_i64() >= before["version"].as_i64().map(|version| version + 2), "{after}");
    assert_eq!(after["value"], before["value"]);
    assert_eq!(first.state.borrow().own.as_ref(), Some(&own));
    assert_eq!(keys(&peer.borrow()), [own.subnets.key()]);
    assert_eq!(peer.borrow().leases, seen.leases);
    eventually("one grant", || etcd.grants() == 1).await;
    drop(second);

    // The first is gone for good, its lease is not yet: the second is a host that was installed anew, and gets it.
    drop(first);
    let start = Instant::now();
    let mut again = node(&settings, 2, "192.0.2.1");
    assert_eq!(again.holds().await.subnets, own.subnets);
    assert!(start.elapsed() >= ASK, "{:?}", start.elapsed());
    drop(again);
    // A host that only starts again knows itself, and asks nobody.
    let start = Instant::now();
    assert_eq!(node(&settings, 2, "192.0.2.1").holds().await.subnets, own.subnets);
    assert!(start.elapsed() < ASK, "{:?}", start.elapsed());
}

#[tokio::test]
async fn what_go_flanneld_left_is_taken_over_at_once() {
    let Some(etcd) = Etcd::start() else { return };
    let settings = etcd.settings();
    // Unsigned, as Go flanneld's.
    let go = Store::etcd(&settings).unwrap().network(&NetworkName::default_network());
    claim(&go, "10.5.29.0-24", "192.0.2.1", HOUR).await;
    let start = Instant::now();
    assert_eq!(node(&settings, 1, "192.0.2.1").holds().await.subnets, subnets("10.5.29.0-24"));
    assert!(start.elapsed() < ASK, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_host_whose_address_changed_while_it_was_down_keeps_its_subnet() {
    let Some(etcd) = Etcd::start() else { return };
    let settings = etcd.settings();
    let mut before = node(&settings, 1, "192.0.2.1");
    let own = before.holds().await;
    // A copy of it, with another address, gets another subnet: the first lives.
    let mut copy = node(&settings, 1, "192.0.2.3");
    let copied = copy.holds().await;
    assert_ne!(copied.subnets, own.subnets);
    drop((before, copy));
    let mut after = node(&settings, 1, "192.0.2.2");
    assert!([own.subnets, copied.subnets].contains(&after.holds().await.subnets));
    let key = format!("{PREFIX}/subnets/{}", after.holds().await.subnets.key());
    assert_eq!(etcd.ctl(&["get", &key, "--print-value-only"]).trim(), text("192.0.2.2"));
}

#[tokio::test]
async fn a_host_that_was_cut_off_for_longer_than_its_lease_fights_nobody() {
    let Some(etcd) = Etcd::start() else { return };
    let gate = Gate::to(&etcd);
    let ttl = Duration::from_secs(2);
    let mut away = Node::at(&signed(&gate.settings(), 1), offer(WIDE, value("192.0.2.1")), ttl / 2, ttl);
    let own = away.holds().await;
    let key = format!("{PREFIX}/subnets/{}", own.subnets.key());

    // Cut off until its lease has ended; nobody takes the subnet: it gets the same again.
    gate.shut();
    let deadline = Instant::now() + 10 * ttl;
    while etcd.entry(&key).is_some() {
        assert!(Instant::now() < deadline, "the lease does not end");
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(away.state.borrow().own.as_ref(), Some(&own), "what is in the kernel stays");
    gate.reopen();
    eventually("its key", || etcd.entry(&key).is_some()).await;
    assert_eq!(away.holds().await, own);

    // Once more, and now another host takes it: that one keeps it.
    gate.shut();
    let deadline = Instant::now() + 10 * ttl;
    while etcd.entry(&key).is_some() {
        assert!(Instant::now() < deadline, "the lease does not end");
        sleep(Duration::from_millis(50)).await;
    }
    let wish = Offer { previous: Some(own.subnets), ..offer(WIDE, value("192.0.2.2")) };
    let mut other = Node::at(&signed(&etcd.settings(), 2), wish, Duration::from_secs(60), HOUR);
    let theirs = other.holds().await;
    assert_eq!(theirs.subnets, own.subnets);
    let record = away.record();
    gate.reopen();
    let said = record.await.unwrap();
    let lost = said.iter().find_map(|state| state.waiting.clone()).unwrap();
    assert_eq!(lost.code, Code::LEASE_LOST);
    assert!(lost.text.contains("192.0.2.2"), "{lost}");
    assert_ne!(away.holds().await.subnets, own.subnets);
    assert_eq!(etcd.ctl(&["get", &key, "--print-value-only"]).trim(), text("192.0.2.2"));
    assert_eq!(etcd.entry(&key).unwrap()["version"], 1, "nobody wrote to it");
    assert_eq!(other.state.borrow().own.as_ref(), Some(&theirs));
}
