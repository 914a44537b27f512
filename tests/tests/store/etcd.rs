//! What only a server can do: go away, forget, keep grants, ask for a password.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use flannel_core::run::store::{Claim, EtcdSettings, LEASE_TTL, NetworkStore, Store};
use flannel_core::words::code::Code;
use flannel_core::words::name::NetworkName;
use flannel_core::words::secret::Secret;

use crate::fixture::{Etcd, HOUR, PREFIX, claim, done, keys, subnets, text, until, value};
use crate::tenure::{Node, WIDE, eventually, offer};

fn network(settings: &EtcdSettings) -> NetworkStore {
    Store::etcd(settings).unwrap().network(&NetworkName::default_network())
}

#[tokio::test]
async fn key_value_and_lease_are_as_flannel_writes_them() {
    let Some(etcd) = Etcd::start() else { return };
    claim(&network(&etcd.settings()), "10.5.29.0-24", "1.2.3.4", LEASE_TTL).await;
    let all = etcd.ctl(&["get", "", "--from-key"]);
    let value = r#"{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"76:e6:39:1b:26:de"}}"#;
    assert_eq!(all, format!("/coreos.com/network/subnets/10.5.29.0-24\n{value}\n"));
    let grant = etcd.ctl(&["lease", "list"]).lines().last().unwrap().to_owned();
    let told = etcd.ctl(&["lease", "timetolive", &grant, "--keys"]);
    assert!(told.contains("granted with TTL(86400s)"), "{told}");
    assert!(told.contains("attached keys([/coreos.com/network/subnets/10.5.29.0-24])"), "{told}");
}

#[tokio::test]
async fn every_grant_is_used_or_given_back() {
    let Some(etcd) = Etcd::start() else { return };
    let store = network(&etcd.settings());
    let key = format!("{PREFIX}/subnets/10.5.1.0-24");
    let held = claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    assert_eq!(etcd.grants(), 1);
    let lost = store.claim(&subnets("10.5.1.0-24"), &value("192.0.2.2"), HOUR).await.unwrap();
    assert_eq!((lost, etcd.grants()), (Claim::Taken, 1));
    let before = etcd.entry(&key).unwrap()["lease"].clone();
    let held = done(store.renew(&held, &value("192.0.2.1"), HOUR).await.unwrap());
    assert_eq!(etcd.grants(), 1);
    assert_ne!(etcd.entry(&key).unwrap()["lease"], before);
    done(network(&etcd.settings()).adopt(&subnets("10.5.1.0-24"), &value("192.0.2.1"), HOUR).await.unwrap());
    assert_eq!(etcd.grants(), 1);
    // Made a reservation by hand: the grant that we held is of no use any more.
    etcd.ctl(&["put", &key, "--", &text("192.0.2.1")]);
    let held = done(store.renew(&held, &value("192.0.2.1"), HOUR).await.unwrap());
    assert_eq!((held.expires, etcd.entry(&key).unwrap().get("lease")), (None, None));
    // The second store's grant is its own to give back.
    assert_eq!(etcd.grants(), 1);
}

#[tokio::test]
async fn compaction_is_survived_while_connected() {
    let Some(etcd) = Etcd::start() else { return };
    let store = network(&etcd.settings());
    let mut watch = store.watch();
    until(&mut watch, "anything", |snapshot| snapshot.known).await;
    for third in 1..=3 {
        claim(&store, &format!("10.5.{third}.0-24"), "192.0.2.1", HOUR).await;
        etcd.compact();
        until(&mut watch, "it", |snapshot| snapshot.leases.leases.len() == third).await;
    }
}

#[tokio::test]
async fn a_server_that_dies_and_comes_back_costs_nothing_but_freshness() {
    let Some(mut etcd) = Etcd::start() else { return };
    let store = network(&etcd.settings());
    let mut watch = store.watch();
    store.create_config("{}").await.unwrap();
    claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    claim(&store, "10.5.2.0-24", "192.0.2.2", HOUR).await;
    // Each has a watch of its own.
    until(&mut watch, "two, and the config", |snapshot| {
        snapshot.leases.leases.len() == 2 && snapshot.config.is_some()
    })
    .await;
    etcd.kill();
    let down = until(&mut watch, "that it is away", |snapshot| snapshot.down.is_some()).await;
    assert_eq!(down.down.as_ref().unwrap().code, Code::STORE_DOWN);
    assert!(down.down.unwrap().text.contains(&etcd.url()));
    assert!(down.known);
    assert_eq!((down.config.as_deref(), down.leases.leases.len()), (Some("{}"), 2));
    let error = store.config().await.unwrap_err().to_string();
    assert!(error.contains("Connection refused"), "{error}");
    // Meanwhile, with us not looking: a lease goes, one comes, and the history is compacted.
    let forget = |etcd: &Etcd| {
        etcd.ctl(&["del", &format!("{PREFIX}/subnets/10.5.1.0-24")]);
        etcd.ctl(&["put", &format!("{PREFIX}/subnets/10.5.3.0-24"), "--", &text("192.0.2.3")]);
        etcd.compact();
    };
    etcd.restart();
    forget(&etcd);
    let seen = until(&mut watch, "that it is back, whole", |snapshot| {
        snapshot.down.is_none() && keys(snapshot) == ["10.5.2.0-24", "10.5.3.0-24"]
    })
    .await;
    assert_eq!(seen.config.as_deref(), Some("{}"));
    // The same store value goes on working, and so does the watch.
    claim(&store, "10.5.4.0-24", "192.0.2.4", HOUR).await;
    until(&mut watch, "the next one", |snapshot| snapshot.leases.leases.len() == 3).await;
    // Wiped: it counts from the start again, and what it has now counts.
    etcd.restart_empty();
    until(&mut watch, "nothing", |snapshot| snapshot.down.is_none() && snapshot.leases.leases.is_empty())
        .await;
    let held = claim(&store, "10.5.5.0-24", "192.0.2.5", HOUR).await;
    let seen = until(&mut watch, "one", |snapshot| snapshot.leases.leases.len() == 1).await;
    assert_eq!((seen.config, seen.revision), (None, held.revision));
}

/// A new disk: the store counts from the start again, and nobody's lease is in it.
#[tokio::test]
async fn a_lease_is_written_again_into_a_store_that_was_begun_anew() {
    let Some(mut etcd) = Etcd::start() else { return };
    // As old as a cluster is that has run for a while.
    (0..20).for_each(|_| drop(etcd.ctl(&["put", "/unrelated", "x"])));
    let store = network(&etcd.settings());
    let mut node = Node::at(&store, offer(WIDE, value("192.0.2.1")), HOUR, HOUR * 24);
    let own = node.holds().await;
    let key = format!("{PREFIX}/subnets/{}", own.subnets.key());
    etcd.restart_empty();
    assert_eq!(etcd.entry(&key), None);
    eventually("the same lease", || etcd.entry(&key).is_some()).await;
    assert_eq!(node.holds().await, own);
}

#[tokio::test]
async fn servers_that_cannot_be_reached_are_named_with_the_cause_in_less_than_three_seconds() {
    // One refuses, one takes the connection and says nothing, one has no name.
    let refusing = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_url = format!("http://{}", silent.local_addr().unwrap());
    let endpoints =
        vec![format!("http://{refusing}"), silent_url.clone(), "http://nowhere.invalid:2379".to_owned()];
    let store = network(&EtcdSettings { endpoints: endpoints.clone(), ..EtcdSettings::default() });
    let start = Instant::now();
    let error = store.config().await.unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(error.finding().code, Code::STORE_DOWN);
    let error = error.to_string();
    assert!(error.starts_with("could not read the network config: etcd cannot be reached: "), "{error}");
    for endpoint in endpoints {
        assert!(error.contains(&format!("{endpoint}: ")), "{error}");
    }
    assert!(error.contains("Connection refused") && error.contains("no answer within"), "{error}");
    // One that works is found behind the ones that do not.
    let Some(etcd) = Etcd::start() else { return };
    let settings = EtcdSettings {
        endpoints: vec![format!("http://{refusing}"), silent_url, etcd.url()],
        ..etcd.settings()
    };
    let start = Instant::now();
    let store = network(&settings);
    assert_eq!(store.config().await.unwrap(), None);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    // And remembered.
    let start = Instant::now();
    assert_eq!(store.config().await.unwrap(), None);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_password_is_asked_for_used_and_never_shown() {
    let Some(etcd) = Etcd::start() else { return };
    for args in
        [&["user", "add", "root:hunter2"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]]
    {
        etcd.ctl(args);
    }
    let with = |user: Option<(&str, &str)>| {
        let user = user.map(|(name, password)| (name.to_owned(), Secret::new(password.to_owned())));
        network(&EtcdSettings { user, ..etcd.settings() })
    };
    let store = with(Some(("root", "hunter2")));
    claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    let mut watch = store.watch();
    until(&mut watch, "the lease", |snapshot| snapshot.leases.leases.len() == 1).await;
    assert!(!format!("{store:?}").contains("hunter2"));
    let wrong = with(Some(("root", "hunter3"))).config().await.unwrap_err();
    assert!(wrong.to_string().contains(&etcd.url()), "{wrong}");
    assert!(wrong.to_string().contains("authentication failed"), "{wrong}");
    assert!(!format!("{wrong} {wrong:?}").contains("hunter3"));
    let none = with(None).config().await.unwrap_err().to_string();
    assert!(none.contains("refused") && none.contains("user name is empty"), "{none}");
}
