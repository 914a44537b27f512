//! What only a directory can get wrong: several processes, files made by hand, a lock that nobody gives back.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flannel_core::run::store::{Claim, Store};
use flannel_core::words::lease::Subnets;
use flannel_core::words::name::NetworkName;
use nix::fcntl::{Flock, FlockArg};

use crate::fixture::{Fixture, HOUR, SOON, claim, keys, subnets, text, until, value};

/// Where a process that we started finds its store.
const DIR: &str = "FLANNEL_TEST_STORE";

#[tokio::test]
async fn processes_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let mut watch = Store::embedded(dir.path()).unwrap().network(&NetworkName::default_network()).watch();
    let children: Vec<_> = (1..=4)
        .map(|node| {
            Command::new(env::current_exe().unwrap())
                .args(["--exact", "directory::one_of_several_processes", "--ignored", "--nocapture"])
                .env(DIR, dir.path())
                .env("FLANNEL_TEST_NODE", node.to_string())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut made = Vec::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        made.extend(text.lines().filter_map(|line| Some(subnets(line.strip_prefix("made ")?))));
    }
    let all: BTreeSet<Subnets> = made.iter().copied().collect();
    assert_eq!((made.len(), all.len()), (40, 40), "each subnet once");
    let seen = until(&mut watch, "their leases", |snapshot| snapshot.leases.leases.len() == 40).await;
    assert_eq!(seen.leases.findings, []);
}

#[tokio::test]
#[ignore = "a part of processes_share_a_directory"]
async fn one_of_several_processes() {
    let Some(dir) = env::var_os(DIR) else { return };
    let ip = format!("192.0.2.{}", env::var("FLANNEL_TEST_NODE").unwrap());
    let store = Store::embedded(dir).unwrap().network(&NetworkName::default_network());
    for third in 1..=40 {
        let key = format!("10.5.{third}.0-24");
        if let Claim::Made(held) = store.claim(&subnets(&key), &value(&ip), HOUR).await.unwrap() {
            println!("made {}", held.own.subnets.key());
        }
    }
}

#[tokio::test]
async fn a_file_made_by_hand_costs_nobody_else_its_lease() {
    let fixture = Fixture::directory();
    let Fixture::Directory(dir) = &fixture else { unreachable!() };
    let network = dir.path().join("store/default");
    let store = fixture.network();
    let mut watch = store.watch();
    claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    fs::create_dir_all(network.join("subnets/10.5.2.0-24")).unwrap();
    fs::create_dir_all(network.join("expires/10.5.3.0-24")).unwrap();
    fs::write(network.join("subnets/10.5.4.0-24"), b"\xff\xfe").unwrap();
    claim(&store, "10.5.6.0-24", "192.0.2.1", HOUR).await;
    let seen = until(&mut watch, "findings and leases", |snapshot| {
        snapshot.leases.findings.len() == 2 && keys(snapshot) == ["10.5.1.0-24", "10.5.6.0-24"]
    })
    .await;
    assert_eq!(seen.down, None);
    assert!(seen.leases.findings[0].text.contains(r#""10.5.2.0-24" cannot be read"#), "{seen:?}");
}

#[tokio::test]
async fn the_end_of_a_lease_is_not_the_end_of_the_next_one() {
    let fixture = Fixture::directory();
    let store = fixture.network();
    claim(&store, "10.5.1.0-24", "192.0.2.1", Duration::from_secs(1)).await;
    fixture.delete("subnets/10.5.1.0-24");
    // Whoever comes next tidies up.
    assert!(store.create_config("{}").await.is_ok());
    fixture.put("subnets/10.5.1.0-24", &text("192.0.2.1"));
    tokio::time::sleep(Duration::from_millis(1200)).await;
    claim(&store, "10.5.2.0-24", "192.0.2.1", HOUR).await;
    assert!(fixture.is_reservation("subnets/10.5.1.0-24"));
}

#[tokio::test]
async fn a_lock_that_nobody_gives_back_is_an_error_that_says_so() {
    let fixture = Fixture::directory();
    let Fixture::Directory(dir) = &fixture else { unreachable!() };
    let store = fixture.network();
    let mut watch = store.watch();
    claim(&store, "10.5.1.0-24", "192.0.2.1", HOUR).await;
    until(&mut watch, "a lease", |snapshot| snapshot.leases.leases.len() == 1).await;
    let lock = File::open(dir.path().join("store/.lock")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    let start = Instant::now();
    let error = store.claim(&subnets("10.5.2.0-24"), &value("192.0.2.1"), HOUR).await.unwrap_err();
    assert!(start.elapsed() < Duration::from_millis(3200), "{:?}", start.elapsed());
    let error = error.to_string();
    assert!(error.contains("store/.lock: another process has held it"), "{error}");
    // The directory is looked at every two seconds, and what was read last stays.
    let seen = until(&mut watch, "that", |snapshot| snapshot.down.is_some()).await;
    assert_eq!(seen.leases.leases.len(), 1);
    drop(lock);
    claim(&store, "10.5.2.0-24", "192.0.2.1", HOUR).await;
    until(&mut watch, "all is well", |snapshot| snapshot.down.is_none()).await;
}

#[tokio::test]
async fn a_notice_comes_without_waiting_for_a_look() {
    let fixture = Fixture::directory();
    let mut watch = fixture.network().watch();
    until(&mut watch, "anything", |snapshot| snapshot.known).await;
    let store = fixture.network();
    // Looks come every two seconds: five changes within that are notices.
    let start = Instant::now();
    for third in 1..=5 {
        claim(&store, &format!("10.5.{third}.0-24"), "192.0.2.1", HOUR).await;
        until(&mut watch, "it", |snapshot| snapshot.leases.leases.len() == third).await;
    }
    assert!(start.elapsed() < SOON / 2, "{:?}", start.elapsed());
}
