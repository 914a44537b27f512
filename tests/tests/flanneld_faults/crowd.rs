//! Two hundred daemons that start at once (`FLANNEL_TESTS_LONG=1`). The ordinary run has their tenures in one process (store).
//!
//! They need little memory (14 MB each) and much of the processor while they start: on two cores a minute in all if they are built for
//! release (`FLANNEL_BIN_DIR=target/release`); debug ones may be too slow for the ten seconds that the lab gives each to start.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{PREFIX, put_config};
use flannel_tests::{Daemon, Host, Lab, eventually, in_lab, secs};

use crate::is_long;

const DAEMONS: usize = 200;

fn config(subnets: usize) -> String {
    format!(
        r#"{{"Network":"10.100.0.0/16","SubnetMin":"10.100.1.0","SubnetMax":"10.100.{subnets}.0","Backend":{{"Type":"alloc"}}}}"#
    )
}

/// A network namespace with a cable to the host's bridge for each.
const NAMESPACES: &str = r#"
    ip link add lan type bridge; ip addr add 10.78.0.1/16 dev lan; ip link set lan up
    for n in $(seq 1 200); do
      ip netns add n$n
      ip link add v$n type veth peer name eth0 netns n$n
      ip link set v$n master lan up
      ip -n n$n addr add 10.78.1.$n/16 dev eth0; ip -n n$n link set eth0 up; ip -n n$n link set lo up
      ip -n n$n route add default via 10.78.0.1
    done"#;

fn start(lab: &Lab, host: &Host) -> Result<Vec<Daemon>> {
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let one = |n: usize| {
        let (net, dir) = (format!("--net=/run/netns/n{n}"), format!("/run/n{n}"));
        let (file, state) = (format!("--subnet-file={dir}/subnet.env"), format!("--state-dir={dir}/state"));
        host.spawn(
            &format!("n{n}"),
            &["nsenter", &net, "flanneld", &endpoints, &file, &state, "--iface=eth0"],
            &[],
        )
    };
    (1..=DAEMONS).map(one).collect()
}

/// The leases in etcd, by their keys.
fn held(lab: &Lab) -> Result<BTreeSet<String>> {
    let keys = lab.etcdctl(&["get", "--prefix", "--keys-only", &format!("{PREFIX}/subnets/")])?;
    Ok(keys
        .lines()
        .filter(|key| !key.is_empty())
        .map(|key| key.rsplit('/').next().unwrap_or(key).to_owned())
        .collect())
}

/// Who has which subnet, by the subnet files.
fn owners(host: &Host) -> Result<BTreeMap<String, String>> {
    let said = host.sh("grep -H FLANNEL_SUBNET /run/n*/subnet.env 2>/dev/null || true")?;
    let mut owners = BTreeMap::new();
    for line in said.lines() {
        let (file, subnet) = line.split_once(':').context("no file name")?;
        let before = owners.insert(subnet.to_owned(), file.to_owned());
        ensure!(before.is_none(), "{subnet} is {file}'s and {before:?}'s");
    }
    Ok(owners)
}

fn settled(lab: &Lab, host: &Host, daemons: &[Daemon], with: usize) -> Result<()> {
    eventually(format!("{with} have a subnet"), secs(240), || {
        let owners = owners(host)?.len();
        ensure!(owners == with, "{owners} have one");
        Ok(())
    })?;
    ensure!(held(lab)?.len() == with);
    let longest = daemons.iter().map(|daemon| daemon.log().lines().count()).max();
    eprintln!("{with} subnets; the longest log has {longest:?} lines");
    ensure!(longest.is_some_and(|lines| lines < 60), "{longest:?}");
    for daemon in daemons {
        ensure!(daemon.alive(), "{}", daemon.tail());
    }
    Ok(())
}

#[test]
fn two_hundred_daemons_start_at_once() {
    if !is_long() {
        return;
    }
    in_lab(Lab::new("crowd").hosts(1).etcd(), |lab| {
        let host = lab.host(1);
        host.sh(NAMESPACES)?;
        lab.etcd_host().sh("ip route add 10.78.0.0/16 via 10.77.0.11")?;
        put_config(lab, &config(190))?;
        let daemons = start(lab, host)?;
        settled(lab, host, &daemons, 190)?;
        let waiting: Vec<_> = daemons.iter().filter(|daemon| daemon.log().contains("E106")).collect();
        let without: Vec<_> =
            (1..=DAEMONS).filter(|n| !host.exists(&format!("/run/n{n}/subnet.env"))).collect();
        eprintln!("{} were told that none is free, {} wait: {without:?}", waiting.len(), without.len());
        ensure!(without.len() == 10);
        // One leaves for good: one of the ten has its subnet within seconds.
        let leaves = (1..=DAEMONS).find(|n| !without.contains(n)).context("nobody has one")?;
        daemons[leaves - 1].stop(secs(10))?;
        let key = held(lab)?;
        let env = host.read(&format!("/run/n{leaves}/subnet.env"))?;
        let subnet =
            env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).context("no subnet")?;
        let subnet = subnet.replace(".1/", ".0-");
        ensure!(key.contains(&subnet), "{subnet}");
        host.sh(&format!("rm /run/n{leaves}/subnet.env"))?;
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{subnet}")])?;
        eventually("one of the ten has it", secs(20), || {
            let owners = owners(host)?.len();
            ensure!(owners == 190, "{owners}");
            Ok(())
        })?;
        // And all have one when there are more.
        put_config(lab, &config(210))?;
        let rest: Vec<_> =
            daemons.into_iter().enumerate().filter(|(n, _)| n + 1 != leaves).map(|(_, d)| d).collect();
        settled(lab, host, &rest, 199)?;
        for daemon in &rest {
            daemon.crash()?;
        }
        // All at once with enough for all.
        lab.etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/")])?;
        host.sh("rm -rf /run/n[0-9]*")?;
        let daemons = start(lab, host)?;
        settled(lab, host, &daemons, DAEMONS)
    });
}
