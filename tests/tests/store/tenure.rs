//! Holding a lease: to get one, keep it, lose it, and get one again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::run::store::{NetworkStore, Snapshot};
use flannel_core::run::tenure::{Offer, Tenure, TenureState};
use flannel_core::words::code::Code;
use flannel_core::words::config::NetworkConfig;
use flannel_core::words::lease::{LeaseValue, OwnLease, Subnets};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::contract::both;
use crate::fixture::{Fixture, HOUR, SOON, claim, subnets, text, until, value};

both!(
    a_node_gets_a_subnet_and_gets_it_again_after_a_restart,
    the_previous_subnet_is_asked_for_first,
    a_host_that_is_reached_at_another_address_keeps_its_subnet,
    a_node_without_a_subnet_gets_one_when_there_are_more,
    a_node_without_a_subnet_gets_one_when_another_goes,
    a_lease_is_renewed_before_it_ends,
    a_lease_that_was_deleted_is_lost_and_taken_again,
    a_lease_that_was_overwritten_is_lost_and_left_alone,
    what_we_publish_is_written_once,
    a_reservation_is_used_as_it_is,
    rubbish_in_our_key_is_written_over,
    two_that_claim_one_address_do_not_wear_the_store_out,
    a_config_that_does_not_fit_moves_us,
    an_offer_that_is_withdrawn_gives_the_lease_back,
    eight_race_for_six_subnets,
    a_subnet_of_a_broken_key_is_nobodys,
);

pub(crate) const WIDE: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// /25 from 10.100.0.0 up to and with the one that is put in.
const NARROW: &str = r#"{"Network":"10.100.0.0/16","SubnetLen":25,"SubnetMin":"10.100.0.0","SubnetMax":"LAST","Backend":{"Type":"vxlan"}}"#;

fn narrow(last: &str) -> String {
    NARROW.replace("LAST", last)
}

pub(crate) fn offer(config: &str, value: LeaseValue) -> Offer {
    let config = Arc::new(NetworkConfig::parse(config).unwrap().config);
    Offer { config, value, previous: None, former: None, avoid: Vec::new() }
}

/// A node that wants a lease. It stops, and leaves its lease, when it is dropped.
pub(crate) struct Node {
    pub(crate) offers: watch::Sender<Option<Offer>>,
    pub(crate) state: watch::Receiver<TenureState>,
}

impl Node {
    /// One that reaches the store in its own way, or signs.
    pub(crate) fn at(store: &NetworkStore, offer: Offer, margin: Duration, ttl: Duration) -> Self {
        Self::watching(store, store.watch(), offer, margin, ttl)
    }

    pub(crate) fn watching(
        store: &NetworkStore,
        snapshots: watch::Receiver<Snapshot>,
        offer: Offer,
        margin: Duration,
        ttl: Duration,
    ) -> Self {
        let (offers, offered) = watch::channel(Some(offer));
        let state = Tenure::spawn_with(store.clone(), snapshots, offered, margin, ttl);
        Self { offers, state }
    }

    fn with(fixture: &Fixture, offer: Offer, margin: Duration, ttl: Duration) -> Self {
        Self::at(&fixture.network(), offer, margin, ttl)
    }

    fn new(fixture: &Fixture, config: &str, ip: &str) -> Self {
        Self::with(fixture, offer(config, value(ip)), Duration::from_secs(60), HOUR)
    }

    /// Waits until it holds something.
    pub(crate) async fn holds(&mut self) -> OwnLease {
        until(&mut self.state, "a lease", |state| state.own.is_some()).await.own.unwrap()
    }

    pub(crate) async fn waits_for(&mut self, code: Code) {
        until(&mut self.state, "that it waits", |state| {
            state.own.is_none() && state.waiting.as_ref().is_some_and(|finding| finding.code == code)
        })
        .await;
    }

    /// Everything it says from now on.
    pub(crate) fn record(&self) -> tokio::task::JoinHandle<Vec<TenureState>> {
        let mut state = self.state.clone();
        state.mark_unchanged();
        tokio::spawn(async move {
            let mut seen = Vec::new();
            while timeout(SOON, state.changed()).await.is_ok_and(|changed| changed.is_ok()) {
                seen.push(state.borrow_and_update().clone());
                if seen.last().is_some_and(|state| state.own.is_some()) {
                    break;
                }
            }
            seen
        })
    }
}

/// Waits until something in the store is as wanted.
pub(crate) async fn eventually(what: &str, mut wanted: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !wanted() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn a_node_gets_a_subnet_and_gets_it_again_after_a_restart(fixture: Fixture) {
    let mut node = Node::new(&fixture, WIDE, "192.0.2.1");
    let first = node.holds().await;
    let key = format!("subnets/{}", first.subnets.key());
    assert_eq!(fixture.get(&key).unwrap(), text("192.0.2.1"));
    drop(node);
    let mut node = Node::new(&fixture, WIDE, "192.0.2.1");
    assert_eq!(node.holds().await, first);
    let mut other = Node::new(&fixture, WIDE, "192.0.2.2");
    assert_ne!(other.holds().await.subnets, first.subnets);
    if let Fixture::Etcd(etcd) = &fixture {
        eventually("the grant of before to be gone", || etcd.grants() == 2).await;
    }
}

async fn the_previous_subnet_is_asked_for_first(fixture: Fixture) {
    claim(&fixture.network(), "10.5.78.0-24", "192.0.2.9", HOUR).await;
    for (previous, gets_it) in [("10.5.77.0-24", true), ("10.5.78.0-24", false), ("10.9.1.0-24", false)] {
        let ip = format!("192.0.2.{}", previous.split('.').nth(2).unwrap());
        let offer = Offer { previous: Some(subnets(previous)), ..offer(WIDE, value(&ip)) };
        let mut node = Node::with(&fixture, offer, Duration::ZERO, HOUR);
        assert_eq!(node.holds().await.subnets == subnets(previous), gets_it, "{previous}");
    }
}

async fn a_host_that_is_reached_at_another_address_keeps_its_subnet(fixture: Fixture) {
    let mut node = Node::new(&fixture, WIDE, "192.0.2.1");
    let first = node.holds().await;
    drop(node);
    let again = |ip: &str, former: Option<&str>| Offer {
        previous: Some(first.subnets),
        former: former.map(value),
        ..offer(WIDE, value(ip))
    };
    // Nothing says that it is the same host; somebody else has the address that this one had.
    for (ip, former) in [("192.0.2.2", None), ("192.0.2.3", Some("192.0.2.9"))] {
        let mut other = Node::with(&fixture, again(ip, former), Duration::ZERO, HOUR);
        assert_ne!(other.holds().await.subnets, first.subnets, "{ip}");
    }
    let mut node = Node::with(&fixture, again("192.0.2.4", Some("192.0.2.1")), Duration::ZERO, HOUR);
    assert_eq!(node.holds().await.subnets, first.subnets);
    let key = format!("subnets/{}", first.subnets.key());
    assert_eq!(fixture.get(&key).unwrap(), text("192.0.2.4"));
}

async fn a_node_without_a_subnet_gets_one_when_there_are_more(fixture: Fixture) {
    let full = narrow("10.100.1.0");
    let mut nodes: Vec<_> = (1..=4).map(|n| Node::new(&fixture, &full, &format!("192.0.2.{n}"))).collect();
    let mut waiting = Vec::new();
    for (index, node) in nodes.iter_mut().enumerate() {
        let state =
            until(&mut node.state, "lease or reason", |state| state.own.is_some() || state.waiting.is_some())
                .await;
        if state.own.is_none() {
            waiting.push(index);
        }
    }
    let [fourth] = waiting[..] else { panic!("{waiting:?} wait") };
    nodes[fourth].waits_for(Code::OUT_OF_SUBNETS).await;
    let text = nodes[fourth].state.borrow().waiting.clone().unwrap().text;
    assert!(text.contains("all 3 subnets in range 10.100.0.0 ... 10.100.1.0 (/25)"), "{text}");
    let wider = offer(&narrow("10.100.1.128"), value(&format!("192.0.2.{}", fourth + 1)));
    nodes[fourth].offers.send_replace(Some(wider));
    assert_eq!(nodes[fourth].holds().await.subnets, subnets("10.100.1.128-25"));
}

async fn a_node_without_a_subnet_gets_one_when_another_goes(fixture: Fixture) {
    let one = narrow("10.100.0.0");
    claim(&fixture.network(), "10.100.0.0-25", "192.0.2.1", HOUR).await;
    let mut node = Node::new(&fixture, &one, "192.0.2.2");
    node.waits_for(Code::OUT_OF_SUBNETS).await;
    fixture.delete("subnets/10.100.0.0-25");
    assert_eq!(node.holds().await.subnets, subnets("10.100.0.0-25"));
}

async fn a_lease_is_renewed_before_it_ends(fixture: Fixture) {
    let (ttl, margin) = (Duration::from_secs(2), Duration::from_secs(1));
    let mut node = Node::with(&fixture, offer(WIDE, value("192.0.2.1")), margin, ttl);
    let own = node.holds().await;
    let key = format!("subnets/{}", own.subnets.key());
    let before = fixture.writes(&key);
    node.state.mark_unchanged();
    // Two lives long: it never goes away, and it was written again.
    let end = Instant::now() + 2 * ttl;
    while Instant::now() < end {
        assert!(fixture.get(&key).is_some());
        sleep(Duration::from_millis(100)).await;
    }
    let renewals = fixture.writes(&key) - before;
    assert!((2..=8).contains(&renewals), "{renewals} renewals");
    if let Fixture::Etcd(etcd) = &fixture {
        eventually("only one grant", || etcd.grants() == 1).await;
    }
    assert!(!node.state.has_changed().unwrap(), "{:?}", node.state.borrow());
}

async fn a_lease_that_was_deleted_is_lost_and_taken_again(fixture: Fixture) {
    let mut node = Node::new(&fixture, WIDE, "192.0.2.1");
    let own = node.holds().await;
    let key = format!("subnets/{}", own.subnets.key());
    let record = node.record();
    fixture.delete(&key);
    let said = record.await.unwrap();
    let lost = said.first().and_then(|state| state.waiting.clone()).unwrap();
    assert_eq!(lost.code, Code::LEASE_LOST);
    assert!(lost.text.contains(&own.subnets.to_string()) && lost.text.contains("gone"), "{lost}");
    assert_eq!(said.last().unwrap().own.as_ref(), Some(&own));
    assert_eq!(fixture.get(&key).unwrap(), text("192.0.2.1"));
}

async fn a_lease_that_was_overwritten_is_lost_and_left_alone(fixture: Fixture) {
    let mut node = Node::new(&fixture, WIDE, "192.0.2.1");
    let own = node.holds().await;
    let key = format!("subnets/{}", own.subnets.key());
    let record = node.record();
    fixture.put(&key, &text("192.0.2.66"));
    let said = record.await.unwrap();
    let lost = said.first().and_then(|state| state.waiting.clone()).unwrap();
    assert_eq!(lost.code, Code::LEASE_LOST);
    assert!(lost.text.contains("192.0.2.66"), "{lost}");
    let now = said.last().unwrap().own.clone().unwrap();
    assert_ne!(now.subnets, own.subnets);
    assert_eq!(fixture.get(&format!("subnets/{}", now.subnets.key())).unwrap(), text("192.0.2.1"));
    assert_eq!(fixture.get(&key).unwrap(), text("192.0.2.66"));
}

async fn what_we_publish_is_written_once(fixture: Fixture) {
    let mut node = Node::new(&fixture, WIDE, "192.0.2.1");
    let own = node.holds().await;
    let key = format!("subnets/{}", own.subnets.key());
    let before = fixture.writes(&key);
    // The host got another address.
    node.offers.send_replace(Some(offer(WIDE, value("192.0.2.5"))));
    let state = until(&mut node.state, "the new value", |state| {
        state.own.as_ref().is_some_and(|own| own.value == value("192.0.2.5"))
    })
    .await;
    assert_eq!(state.own.unwrap().subnets, own.subnets);
    assert_eq!(fixture.get(&key).unwrap(), text("192.0.2.5"));
    // The same offer again, and the store's own echo, are no news.
    node.offers.send_replace(Some(offer(WIDE, value("192.0.2.5"))));
    sleep(Duration::from_millis(300)).await;
    assert_eq!(fixture.writes(&key), before + 1);
    if let Fixture::Etcd(etcd) = &fixture {
        assert_eq!(etcd.grants(), 1);
    }
}

async fn a_reservation_is_used_as_it_is(fixture: Fixture) {
    fixture.put("subnets/10.5.200.0-24", &text("192.0.2.1"));
    // Nobody's, and so not to be given away.
    fixture.put("subnets/10.5.1.0-24", "{}");
    let ttl = Duration::from_secs(1);
    let mut node = Node::with(&fixture, offer(WIDE, value("192.0.2.1")), ttl / 2, ttl);
    assert_eq!(node.holds().await.subnets, subnets("10.5.200.0-24"));
    let mut other = Node::new(&fixture, WIDE, "192.0.2.2");
    let held = other.holds().await.subnets;
    assert!(![subnets("10.5.200.0-24"), subnets("10.5.1.0-24")].contains(&held));
    sleep(2 * ttl).await;
    assert!(fixture.is_reservation("subnets/10.5.200.0-24"));
    assert!(node.state.borrow().own.is_some());
}

async fn rubbish_in_our_key_is_written_over(fixture: Fixture) {
    let mut node = Node::new(&fixture, WIDE, "192.0.2.1");
    let own = node.holds().await;
    let key = format!("subnets/{}", own.subnets.key());
    for rubbish in ["{", r#"{"PublicIP":"192.0.2.1","BackendType":"udp"}"#] {
        fixture.put(&key, rubbish);
        eventually("our value", || fixture.get(&key).as_deref() == Some(&text("192.0.2.1"))).await;
        assert_eq!(*node.state.borrow(), TenureState { own: Some(own.clone()), waiting: None });
    }
}

async fn two_that_claim_one_address_do_not_wear_the_store_out(fixture: Fixture) {
    let one = offer(WIDE, value("192.0.2.1"));
    let two =
        offer(WIDE, LeaseValue::from_json(r#"{"PublicIP":"192.0.2.1","BackendType":"host-gw"}"#).unwrap());
    let mut first = Node::with(&fixture, one, Duration::ZERO, HOUR);
    let own = first.holds().await;
    let mut second = Node::with(&fixture, two, Duration::ZERO, HOUR);
    assert_eq!(second.holds().await.subnets, own.subnets, "as upstream has it");
    let key = format!("subnets/{}", own.subnets.key());
    let before = fixture.writes(&key);
    sleep(Duration::from_millis(1500)).await;
    let writes = fixture.writes(&key) - before;
    assert!((1..=16).contains(&writes), "{writes} writes");
}

async fn a_config_that_does_not_fit_moves_us(fixture: Fixture) {
    let mut node = Node::new(&fixture, WIDE, "192.0.2.1");
    let own = node.holds().await;
    node.offers.send_replace(Some(offer(&narrow("10.100.1.0"), value("192.0.2.1"))));
    let now = until(&mut node.state, "another subnet", |state| {
        state.own.as_ref().is_some_and(|now| now.subnets != own.subnets)
    })
    .await;
    assert_eq!(now.own.unwrap().subnets.v4().unwrap().len(), 25);
    assert_eq!(fixture.get(&format!("subnets/{}", own.subnets.key())), None);
    // The same at a start: a lease of ours that does not fit goes, one of somebody else's stays.
    drop(node);
    claim(&fixture.network(), "10.5.3.0-24", "192.0.2.3", HOUR).await;
    claim(&fixture.network(), "10.5.4.0-24", "192.0.2.4", HOUR).await;
    Node::new(&fixture, &narrow("10.100.1.0"), "192.0.2.3").holds().await;
    assert_eq!(fixture.get("subnets/10.5.3.0-24"), None);
    assert!(fixture.get("subnets/10.5.4.0-24").is_some());
}

async fn an_offer_that_is_withdrawn_gives_the_lease_back(fixture: Fixture) {
    let mut node = Node::new(&fixture, WIDE, "192.0.2.1");
    let own = node.holds().await;
    node.offers.send_replace(None);
    until(&mut node.state, "that it holds nothing", |state| *state == TenureState::default()).await;
    let key = format!("subnets/{}", own.subnets.key());
    assert_eq!(fixture.get(&key), None);
    sleep(Duration::from_millis(200)).await;
    assert_eq!(fixture.get(&key), None, "and does not come back");
}

async fn eight_race_for_six_subnets(fixture: Fixture) {
    // Six of /25: 10.100.0.0 to 10.100.2.128.
    let config = narrow("10.100.2.128");
    let mut nodes: Vec<_> = (1..=8).map(|n| Node::new(&fixture, &config, &format!("192.0.2.{n}"))).collect();
    let (mut held, mut waiting) = (BTreeSet::<Subnets>::new(), Vec::new());
    for (index, node) in nodes.iter_mut().enumerate() {
        let state =
            until(&mut node.state, "lease or reason", |state| state.own.is_some() || state.waiting.is_some())
                .await;
        match state.own {
            Some(own) => assert!(held.insert(own.subnets), "{} twice", own.subnets),
            None => waiting.push(index),
        }
    }
    assert_eq!((held.len(), waiting.len()), (6, 2));
    for (index, subnets) in held.iter().enumerate() {
        assert!(held.iter().skip(index + 1).all(|other| !other.overlap(subnets)));
    }
    // One goes: exactly one of the two gets its subnet.
    let holder = (0..nodes.len()).find(|index| !waiting.contains(index)).unwrap();
    nodes[holder].offers.send_replace(None);
    eventually("one more", || waiting.iter().any(|index| nodes[*index].state.borrow().own.is_some())).await;
    sleep(Duration::from_millis(200)).await;
    let still = waiting.iter().filter(|index| nodes[**index].state.borrow().own.is_none()).count();
    assert_eq!(still, 1);
}

async fn a_subnet_of_a_broken_key_is_nobodys(fixture: Fixture) {
    fixture.put("subnets/10.100.0.0-25", "{");
    // A key that we would not write, with our own address: nobody could renew it.
    fixture.put("subnets/10.100.0.129-25", &text("192.0.2.1"));
    let mut node = Node::new(&fixture, &narrow("10.100.0.128"), "192.0.2.1");
    node.waits_for(Code::OUT_OF_SUBNETS).await;
    node.offers.send_replace(Some(offer(&narrow("10.100.1.0"), value("192.0.2.1"))));
    assert_eq!(node.holds().await.subnets, subnets("10.100.1.0-25"));
    fixture.delete("subnets/10.100.0.0-25");
}
