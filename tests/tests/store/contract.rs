//! What both kinds of store promise.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use flannel_core::run::store::{Claim, Created, Renewal, StoreError};
use flannel_core::words::code::Code;
use flannel_core::words::lease::Subnets;
use flannel_core::words::name::NetworkName;

use crate::fixture::{Fixture, HOUR, claim, done, keys, subnets, text, until, value};

macro_rules! both {
    ($($name:ident),* $(,)?) => {
        mod etcd {
            use crate::fixture::Fixture;
            $(#[tokio::test]
            async fn $name() {
                if let Some(fixture) = Fixture::etcd() {
                    super::$name(fixture).await;
                }
            })*
        }
        mod directory {
            use crate::fixture::Fixture;
            $(#[tokio::test]
            async fn $name() {
                super::$name(Fixture::directory()).await;
            })*
        }
    };
}
pub(crate) use both;

both!(
    of_twenty_that_race_for_ten_subnets_ten_get_one,
    a_subnet_is_taken_in_either_family,
    a_lease_is_flannels_byte_for_byte,
    a_lease_is_adopted_by_its_public_address_only,
    a_renewal_writes_only_what_is_still_ours,
    a_reservation_stays_one,
    rubbish_costs_nobody_else_its_lease,
    a_watch_tells_whole_sets,
    a_burst_of_changes_ends_in_one_whole_set,
    a_lease_that_is_not_renewed_ends,
    of_eight_that_create_the_config_one_does,
    networks_are_found_by_their_configs,
    only_our_own_lease_is_released,
    a_network_with_leases_is_not_removed,
);

async fn of_twenty_that_race_for_ten_subnets_ten_get_one(fixture: Fixture) {
    let mut tasks = tokio::task::JoinSet::new();
    for node in 0..20 {
        let store = fixture.network();
        let subnets = subnets(&format!("10.5.{}.0-24", node / 2 + 1));
        tasks.spawn(async move { store.claim(&subnets, &value(&format!("192.0.2.{node}")), HOUR).await });
    }
    let mut made = BTreeSet::new();
    let mut taken = 0;
    while let Some(claim) = tasks.join_next().await {
        match claim.unwrap().unwrap() {
            Claim::Made(held) => assert!(made.insert(held.own.subnets), "twice: {held:?}"),
            Claim::Taken => taken += 1,
        }
    }
    assert_eq!((made.len(), taken), (10, 10));
    let mut watch = fixture.network().watch();
    let snapshot = until(&mut watch, "the leases", |snapshot| snapshot.known).await;
    assert_eq!(snapshot.leases.leases.keys().copied().collect::<BTreeSet<Subnets>>(), made);
}

async fn a_subnet_is_taken_in_either_family(fixture: Fixture) {
    let store = fixture.network();
    claim(&store, "10.5.1.0-24&fd42:cafe:0:1::-64", "192.0.2.1", HOUR).await;
    for key in ["10.5.1.0-24", "10.5.1.0-24&fd42:cafe:0:9::-64", "10.5.2.0-24&fd42:cafe:0:1::-64"] {
        let claim = store.claim(&subnets(key), &value("192.0.2.2"), HOUR).await.unwrap();
        assert_eq!(claim, Claim::Taken, "{key}");
    }
    claim(&store, "10.5.2.0-24&fd42:cafe:0:2::-64", "192.0.2.2", HOUR).await;
    claim(&store, "10.5.3.0-24", "192.0.2.3", HOUR).await;
}

async fn a_lease_is_flannels_byte_for_byte(fixture: Fixture) {
    let held = claim(&fixture.network(), "10.5.29.0-24", "192.0.2.1", HOUR).await;
    assert_eq!(fixture.get("subnets/10.5.29.0-24").unwrap(), text("192.0.2.1"));
    assert!(!fixture.is_reservation("subnets/10.5.29.0-24"));
    let left = held.expires.unwrap().into_std() - Instant::now();
    assert!(left > HOUR - Duration::from_secs(5) && left <= HOUR, "{left:?}");
    // A named network has its own leases.
    let web = fixture.store().network(&NetworkName::new("web").unwrap());
    claim(&web, "10.5.29.0-24", "192.0.2.2", HOUR).await;
    assert_eq!(fixture.get("web/subnets/10.5.29.0-24").unwrap(), text("192.0.2.2"));
    assert_eq!(fixture.get("subnets/10.5.29.0-24").unwrap(), text("192.0.2.1"));
}

async fn a_lease_is_adopted_by_its_public_address_only(fixture: Fixture) {
    let key = "10.5.1.0-24";
    claim(&fixture.network(), key, "192.0.2.1", HOUR).await;
    let store = fixture.network();
    let held = done(store.adopt(&subnets(key), &value("192.0.2.1"), HOUR).await.unwrap());
    assert_eq!((held.own.subnets, held.expires.is_some()), (subnets(key), true));
    let renewal = store.adopt(&subnets(key), &value("192.0.2.2"), HOUR).await.unwrap();
    assert_eq!(renewal, Renewal::Lost(Some(value("192.0.2.1"))));
    assert_eq!(fixture.get("subnets/10.5.1.0-24").unwrap(), text("192.0.2.1"));
    let renewal = store.adopt(&subnets("10.5.2.0-24"), &value("192.0.2.1"), HOUR).await.unwrap();
    assert_eq!(renewal, Renewal::Lost(None));
    assert_eq!(fixture.get("subnets/10.5.2.0-24"), None);
}

async fn a_renewal_writes_only_what_is_still_ours(fixture: Fixture) {
    let store = fixture.network();
    let key = "subnets/10.5.1.0-24";
    let held = claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    // Another backend, another address: what we publish changes, and whose it is does not.
    let held = done(store.renew(&held, &value("192.0.2.7"), HOUR).await.unwrap());
    assert_eq!(fixture.get(key).unwrap(), text("192.0.2.7"));
    // Our own address, written by somebody else: still ours, and no end any more.
    fixture.put(key, r#"{"PublicIP":"192.0.2.7"}"#);
    let held = done(store.renew(&held, &value("192.0.2.7"), HOUR).await.unwrap());
    assert_eq!(fixture.get(key).unwrap(), text("192.0.2.7"));
    // Rubbish makes it nobody else's.
    fixture.put(key, "{");
    let held = done(store.renew(&held, &value("192.0.2.7"), HOUR).await.unwrap());
    assert_eq!(fixture.get(key).unwrap(), text("192.0.2.7"));
    // Another holder has it.
    fixture.put(key, &text("192.0.2.66"));
    let renewal = store.renew(&held, &value("192.0.2.7"), HOUR).await.unwrap();
    assert_eq!(renewal, Renewal::Lost(Some(value("192.0.2.66"))));
    assert_eq!(fixture.get(key).unwrap(), text("192.0.2.66"));
    // It is gone, and is not made again.
    fixture.delete(key);
    assert_eq!(store.renew(&held, &value("192.0.2.7"), HOUR).await.unwrap(), Renewal::Lost(None));
    assert_eq!(fixture.get(key), None);
}

async fn a_reservation_stays_one(fixture: Fixture) {
    let store = fixture.network();
    let key = "subnets/10.5.1.0-24";
    fixture.put(key, r#"{"PublicIP":"192.0.2.1"}"#);
    let held = done(store.adopt(&subnets("10.5.1.0-24"), &value("192.0.2.1"), HOUR).await.unwrap());
    assert_eq!(held.expires, None);
    assert_eq!(fixture.get(key).unwrap(), text("192.0.2.1"));
    assert!(fixture.is_reservation(key));
    let writes = fixture.writes(key);
    let held = done(store.renew(&held, &value("192.0.2.1"), HOUR).await.unwrap());
    assert_eq!((held.expires, fixture.writes(key)), (None, writes), "nothing to say, nothing written");
    let held = done(store.renew(&held, &value("192.0.2.2"), HOUR).await.unwrap());
    assert_eq!(held.expires, None);
    assert_eq!(fixture.get(key).unwrap(), text("192.0.2.2"));
    assert!(fixture.is_reservation(key));
    store.release(&subnets("10.5.1.0-24"), &value("192.0.2.2")).await.unwrap();
    assert!(fixture.get(key).is_some(), "it is the operator's");
}

async fn rubbish_costs_nobody_else_its_lease(fixture: Fixture) {
    let store = fixture.network();
    let mut watch = store.watch();
    claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    until(&mut watch, "a lease", |snapshot| snapshot.leases.leases.len() == 1).await;
    let rubbish = [
        ("subnets/garbage", text("192.0.2.9")),
        ("subnets/10.5.300.0-24", text("192.0.2.9")),
        ("subnets/10.5.3.0-24", "{".to_owned()),
        ("subnets/10.5.4.0-24", r#"{"PublicIP":7}"#.to_owned()),
        ("subnets/10.5.5.0-24", String::new()),
    ];
    for (key, value) in &rubbish {
        fixture.put(key, value);
    }
    let snapshot = until(&mut watch, "five findings", |snapshot| snapshot.leases.findings.len() == 5).await;
    assert_eq!(keys(&snapshot), ["10.5.1.0-24"]);
    for (finding, name) in
        snapshot.leases.findings.iter().zip(["10.5.3", "10.5.300", "10.5.4", "10.5.5", "garb"])
    {
        assert_eq!(finding.code, Code::LEASE_MALFORMED);
        assert!(finding.text.contains(name), "{finding} {name}");
    }
    assert_eq!(snapshot.leases.blocked.len(), 3, "{:?}", snapshot.leases.blocked);
    // Whoever starts now sees the same, and a subnet with a broken value is not given to him.
    let mut second = fixture.network().watch();
    let other = until(&mut second, "the leases", |snapshot| snapshot.known).await;
    assert_eq!(*other.leases, *snapshot.leases);
    let broken = store.claim(&subnets("10.5.3.0-24"), &value("192.0.2.2"), HOUR).await.unwrap();
    assert_eq!(broken, Claim::Taken);
    for (key, _) in &rubbish {
        fixture.delete(key);
    }
    let snapshot = until(&mut watch, "no findings", |snapshot| snapshot.leases.findings.is_empty()).await;
    assert_eq!((keys(&snapshot), snapshot.leases.blocked.len()), (vec!["10.5.1.0-24".to_owned()], 0));
    // A config that is none is told as it stands: the only parser is the agent's.
    fixture.put("config", "{\"Network\":");
    until(&mut watch, "the config", |snapshot| snapshot.config.as_deref() == Some("{\"Network\":")).await;
}

async fn a_watch_tells_whole_sets(fixture: Fixture) {
    let store = fixture.network();
    store.create_config("one").await.unwrap();
    claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    let mut watch = fixture.network().watch();
    assert!(!watch.borrow().known);
    let first = until(&mut watch, "anything", |snapshot| snapshot.known).await;
    assert_eq!((first.config.as_deref(), keys(&first)), (Some("one"), vec!["10.5.1.0-24".to_owned()]));
    let held = claim(&store, "10.5.2.0-24", "192.0.2.2", HOUR).await;
    let second = until(&mut watch, "two leases", |snapshot| snapshot.leases.leases.len() == 2).await;
    assert!(second.revision > first.revision && second.revision >= held.revision);
    fixture.put("config", "two");
    let third = until(&mut watch, "the config", |snapshot| snapshot.config.as_deref() == Some("two")).await;
    assert_eq!(keys(&third).len(), 2);
    // What a holder says changes, too.
    store.renew(&held, &value("192.0.2.7"), HOUR).await.unwrap();
    until(&mut watch, "another address", |snapshot| {
        snapshot.leases.leases.get(&subnets("10.5.2.0-24")).is_some_and(|lease| **lease == value("192.0.2.7"))
    })
    .await;
    // A network whose name begins like ours is not ours.
    fixture.put("web/subnets/10.5.9.0-24", &text("192.0.2.9"));
    fixture.delete("subnets/10.5.1.0-24");
    let last = until(&mut watch, "one lease less", |snapshot| snapshot.leases.leases.len() < 2).await;
    assert_eq!((last.config.as_deref(), keys(&last)), (Some("two"), vec!["10.5.2.0-24".to_owned()]));
    // Down to nothing.
    fixture.delete("subnets/10.5.2.0-24");
    fixture.delete("config");
    until(&mut watch, "nothing", |snapshot| snapshot.config.is_none() && snapshot.leases.leases.is_empty())
        .await;
}

async fn a_burst_of_changes_ends_in_one_whole_set(fixture: Fixture) {
    let mut watch = fixture.network().watch();
    until(&mut watch, "anything", |snapshot| snapshot.known).await;
    let mut tasks = tokio::task::JoinSet::new();
    for node in 0..60 {
        let store = fixture.network();
        tasks.spawn(async move { claim(&store, &format!("10.6.{node}.0-24"), "192.0.2.1", HOUR).await });
    }
    let mut last = 0;
    while let Some(held) = tasks.join_next().await {
        last = last.max(held.unwrap().revision);
    }
    let seen = until(&mut watch, "all of them", |snapshot| snapshot.leases.leases.len() == 60).await;
    assert!(seen.revision >= last, "{} < {last}", seen.revision);
}

async fn a_lease_that_is_not_renewed_ends(fixture: Fixture) {
    let store = fixture.network();
    let short = Duration::from_secs(2);
    let start = Instant::now();
    claim(&store, "10.5.1.0-24", "192.0.2.1", short).await;
    claim(&store, "10.5.2.0-24", "192.0.2.2", HOUR).await;
    let longer = claim(&store, "10.5.3.0-24", "192.0.2.3", short).await;
    done(store.renew(&longer, &value("192.0.2.3"), HOUR).await.unwrap());
    let mut watch = fixture.network().watch();
    until(&mut watch, "three leases", |snapshot| snapshot.leases.leases.len() == 3).await;
    let seen = until(&mut watch, "one less", |snapshot| snapshot.leases.leases.len() < 3).await;
    assert!(start.elapsed() >= short, "{:?}", start.elapsed());
    assert_eq!(keys(&seen), ["10.5.2.0-24", "10.5.3.0-24"]);
    claim(&store, "10.5.1.0-24", "192.0.2.9", HOUR).await;
}

async fn of_eight_that_create_the_config_one_does(fixture: Fixture) {
    let mut tasks = tokio::task::JoinSet::new();
    for node in 0..8 {
        let store = fixture.network();
        tasks.spawn(async move { store.create_config(&format!("config {node}")).await });
    }
    let (mut made, mut told) = (0, BTreeSet::new());
    while let Some(created) = tasks.join_next().await {
        match created.unwrap().unwrap() {
            Created::Made => made += 1,
            Created::Exists(text) => drop(told.insert(text)),
        }
    }
    let there = fixture.network().config().await.unwrap().unwrap();
    assert_eq!((made, told), (1, BTreeSet::from([there.clone()])));
    assert_eq!(fixture.get("config"), Some(there));
}

async fn networks_are_found_by_their_configs(fixture: Fixture) {
    let store = fixture.store();
    assert_eq!(store.networks().await.unwrap(), []);
    for name in ["web", "db", "default"] {
        let network = store.network(&NetworkName::new(name).unwrap());
        network.create_config(&format!("config of {name}")).await.unwrap();
        claim(&network, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    }
    // Leases alone make no network, and neither does a name that is none.
    claim(&store.network(&NetworkName::new("ghost").unwrap()), "10.5.1.0-24", "192.0.2.1", HOUR).await;
    fixture.put("Not A Name/config", "x");
    let found = store.networks().await.unwrap();
    let found: Vec<_> = found.iter().map(|(name, document)| (name.as_str(), document.as_str())).collect();
    assert_eq!(found, [("db", "config of db"), ("default", "config of default"), ("web", "config of web")]);
}

async fn only_our_own_lease_is_released(fixture: Fixture) {
    let store = fixture.network();
    claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    store.release(&subnets("10.5.1.0-24"), &value("192.0.2.2")).await.unwrap();
    assert!(fixture.get("subnets/10.5.1.0-24").is_some());
    store.release(&subnets("10.5.1.0-24"), &value("192.0.2.1")).await.unwrap();
    assert_eq!(fixture.get("subnets/10.5.1.0-24"), None);
    store.release(&subnets("10.5.1.0-24"), &value("192.0.2.1")).await.unwrap();
    if let Fixture::Etcd(etcd) = &fixture {
        assert_eq!(etcd.grants(), 0);
    }
}

async fn a_network_with_leases_is_not_removed(fixture: Fixture) {
    let store = fixture.network();
    store.create_config("{}").await.unwrap();
    claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    let mut watch = fixture.network().watch();
    let error = store.remove().await.unwrap_err();
    assert!(matches!(error, StoreError::InUse { leases: 1, .. }), "{error}");
    assert_eq!(fixture.get("config").unwrap(), "{}");
    until(&mut watch, "all", |snapshot| snapshot.config.is_some() && snapshot.leases.leases.len() == 1).await;
    store.release(&subnets("10.5.1.0-24"), &value("192.0.2.1")).await.unwrap();
    store.remove().await.unwrap();
    store.remove().await.unwrap();
    assert_eq!(fixture.get("config"), None);
    until(&mut watch, "nothing", |snapshot| snapshot.config.is_none() && snapshot.leases.leases.is_empty())
        .await;
    // And it can come back under the eyes of the same watch.
    store.create_config("again").await.unwrap();
    until(&mut watch, "another one", |snapshot| snapshot.config.as_deref() == Some("again")).await;
}
