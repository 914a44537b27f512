//! A config that is late, wrong, or in the way of what the host has.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SUBNET_FILE, SubnetEnv, leases, put_config};
use flannel_tests::{Lab, eventually, in_lab, ping_within, secs, unchanged};

use crate::{FOLLOW, REPEAT, VXLAN};

#[test]
fn a_config_that_comes_late_is_waited_for() {
    in_lab(Lab::new("late").hosts(1).etcd(), |lab| {
        let host = lab.host(1);
        let before = host.network_state()?;
        let daemon = Flanneld::start(lab, host)?;
        daemon.daemon().wait_log("E101", secs(5))?;
        let line = daemon.said("E101").remove(0);
        ensure!(line.contains("/coreos.com/network/config") && line.contains("etcdctl put"), "{line}");
        ensure!(daemon.health("/healthz")? == (200, "flanneld is running".into()));
        ensure!(daemon.health("/readyz")? == (503, "flanneld is not ready yet".into()));
        ensure!(daemon.health("/other")?.0 == 404);
        thread::sleep(REPEAT);
        ensure!(daemon.said("E101").len() == 1, "said more than once: {:#?}", daemon.said("E101"));
        unchanged("the kernel", &before, &host.network_state()?)?;
        ensure!(!host.exists(SUBNET_FILE));

        put_config(lab, VXLAN)?;
        let start = Instant::now();
        daemon.ready()?;
        ensure!(start.elapsed() < secs(2), "it took {:?}", start.elapsed());
        ensure!(daemon.health("/readyz")? == (200, "flanneld is ready".into()));
        Ok(())
    });
}

#[test]
fn a_wrong_config_is_refused_with_place_and_reason() {
    /// The document, and what the line about it must contain.
    const WRONG: &[(&str, &[&str])] = &[
        ("{\"Network\":\"10.100.0.0/16\",\n \"Backend\" {\"Type\":\"vxlan\"}}", &["line 2", "column 12"]),
        ("", &["line 1"]),
        (
            r#"{"Network":"fd00:100::/56","Backend":{"Type":"vxlan"}}"#,
            &["Network", "column 12", "IPv6Network"],
        ),
        (
            r#"{"Network":"10.100.0.0/16","SubnetLen":31,"Backend":{"Type":"vxlan"}}"#,
            &["SubnetLen", "31", "less than /31", "column 40"],
        ),
        (r#"{"Network":"10.100.0.0/16","SubnetLen":17}"#, &["SubnetLen", "at least four subnets"]),
        (r#"{"Network":"10.100.0.0/16","SubnetMin":"10.101.0.0"}"#, &["SubnetMin", "10.101.0.0", "range"]),
        (r#"{"Network":"10.100.0.0/16","SubnetMax":"10.100.9.128"}"#, &["SubnetMax", "boundary"]),
        (r#"{"Network":"10.100.0.0/16","Backend":{"Type":"wlan"}}"#, &["Type", "wlan", "vxlan"]),
        (
            r#"{"Network":"10.100.0.0/16","Backend":{"Type":"tencent-vpc"}}"#,
            &["tencent-vpc", "not built yet"],
        ),
        (r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#, &["VNI", "16777216"]),
    ];
    in_lab(Lab::new("wrong").hosts(1).etcd(), |lab| {
        let host = lab.host(1);
        let before = host.network_state()?;
        let mut daemon = None;
        for (i, (document, parts)) in WRONG.iter().enumerate() {
            put_config(lab, document)?;
            if daemon.is_none() {
                daemon = Some(Flanneld::start(lab, host)?);
            }
            let daemon = daemon.as_ref().context("was just started")?;
            let line = eventually(format!("a line about {document}"), FOLLOW, || {
                daemon.said("E102").get(i).cloned()
            })?;
            for part in *parts {
                ensure!(line.contains(part), "{document}\n{part:?} is not in: {line}");
            }
        }
        let daemon = daemon.context("was started")?;
        thread::sleep(REPEAT);
        let said = daemon.said("E102");
        ensure!(said.len() == WRONG.len(), "said more than once: {said:#?}");
        ensure!(leases(lab)?.is_empty(), "{:?}", leases(lab)?);
        ensure!(!host.exists(SUBNET_FILE));
        unchanged("the kernel", &before, &host.network_state()?)?;

        // Heals without a restart, and a good one that is spoiled later costs nothing that works.
        put_config(lab, VXLAN)?;
        let env = daemon.ready()?;
        let works = host.network_state()?;
        put_config(lab, WRONG[0].0)?;
        eventually("it is said", FOLLOW, || daemon.said("E102").len() == WRONG.len() + 1)?;
        thread::sleep(Duration::from_millis(500));
        unchanged("the kernel", &works, &host.network_state()?)?;
        ensure!(SubnetEnv::read(host)? == env && leases(lab)?.contains_key(&env.key()));
        ensure!(daemon.health("/readyz")?.0 == 200, "{:?}", daemon.health("/readyz"));
        // A restart meanwhile goes on from the last config that was good.
        daemon.daemon().crash()?;
        let daemon = Flanneld::start(lab, host)?;
        daemon.daemon().wait_log("E102", secs(5))?;
        // Its lease is looked after meanwhile, or the peers would drop this host when that ends.
        daemon.daemon().wait_log("Found lease", FOLLOW)?;
        thread::sleep(Duration::from_millis(500));
        unchanged("the kernel", &works, &host.network_state()?)?;

        // One that is removed is missed, and nothing else; what was wrong with it is past.
        lab.etcdctl(&["del", &format!("{PREFIX}/config")])?;
        daemon.daemon().wait_log("E101", FOLLOW)?;
        let missed = daemon.said("E101").join("\n");
        ensure!(missed.contains("was removed; this host goes on with the last one"), "{missed}");
        ensure!(daemon.health("/readyz")?.0 == 200);
        unchanged("the kernel", &works, &host.network_state()?)?;
        put_config(lab, VXLAN)?;
        daemon.daemon().wait_log("not waiting any more", FOLLOW)?;
        ensure!(daemon.ready()? == env);
        Ok(())
    });
}

#[test]
fn a_network_that_overlaps_a_route_of_the_host_is_refused() {
    in_lab(Lab::new("overlap").hosts(1).etcd(), |lab| {
        let host = lab.host(1);
        put_config(lab, VXLAN)?;
        host.sh("ip route add 10.100.32.0/20 via 10.77.0.1 dev eth0")?;
        let before = host.network_state()?;
        let daemon = Flanneld::start(lab, host)?;
        daemon.daemon().wait_log("E105", secs(5))?;
        let line = daemon.said("E105").remove(0);
        for part in ["10.100.0.0/16", "10.100.32.0/20 via 10.77.0.1 dev eth0"] {
            ensure!(line.contains(part), "{part:?} is not in: {line}");
        }
        thread::sleep(REPEAT);
        ensure!(daemon.said("E105").len() == 1, "{:#?}", daemon.said("E105"));
        ensure!(leases(lab)?.is_empty(), "{:?}", leases(lab)?);
        ensure!(!host.exists(SUBNET_FILE));
        unchanged("the kernel", &before, &host.network_state()?)?;

        host.sh("ip route del 10.100.32.0/20")?;
        daemon.ready()?;
        ensure!(leases(lab)?.len() == 1);
        Ok(())
    });
}

#[test]
fn a_change_to_a_network_that_overlaps_is_refused_and_changes_nothing() {
    const OTHER: &str = r#"{"Network":"10.200.0.0/16","Backend":{"Type":"vxlan"}}"#;
    in_lab(Lab::new("overlap-later").etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let daemons = Flanneld::start_all(lab)?;
        let host = lab.host(1);
        eventually("the peer", FOLLOW, || host.out(&["ip", "route"]).is_ok_and(|r| r.contains(" onlink")))?;
        host.sh("ip route add 10.200.32.0/20 via 10.77.0.1 dev eth0")?;
        let (before, env) = (host.network_state()?, SubnetEnv::read(host)?);

        put_config(lab, OTHER)?;
        daemons[0].daemon().wait_log("E105", FOLLOW)?;
        // The other host has nothing in the way and goes ahead.
        eventually("the other host moves", FOLLOW, || {
            starts(&SubnetEnv::read(lab.host(2))?.subnet(), "10.200.")
        })?;
        thread::sleep(Duration::from_millis(500));
        ensure!(SubnetEnv::read(host)? == env && leases(lab)?.contains_key(&env.key()));
        let now = host.out(&["ip", "-br", "addr", "show", "flannel.1"])?;
        ensure!(now.contains(&format!("{}/32", env.base())), "{now}");
        let routes = host.out(&["ip", "route", "show", "10.200.32.0/20"])?;
        ensure!(!routes.is_empty(), "a route of the host's own is gone");
        let lines = |text: &str| {
            text.lines().filter(|line| line.contains("10.200.")).map(str::to_owned).collect::<Vec<_>>()
        };
        ensure!(lines(&before) == lines(&host.network_state()?), "{}", host.network_state()?);

        host.sh("ip route del 10.200.32.0/20")?;
        eventually("this host moves too", FOLLOW, || starts(&SubnetEnv::read(host)?.subnet(), "10.200."))?;
        for host in lab.hosts() {
            eventually(format!("only the new network on {}", host.name()), FOLLOW, || {
                let state = host.network_state()?;
                ensure!(!state.contains("10.100.") && state.contains(" onlink"), "{state}");
                Ok(())
            })?;
        }
        ensure!(leases(lab)?.keys().all(|key| key.starts_with("10.200.")), "{:?}", leases(lab)?);
        let envs = lab.hosts().iter().map(SubnetEnv::read).collect::<Result<Vec<_>>>()?;
        let pods = [Pod::new(lab.host(1), &envs[0], 2)?, Pod::new(lab.host(2), &envs[1], 2)?];
        ping_within(FOLLOW, &pods[0], pods[1].ip())
    });
}

fn starts(text: &str, start: &str) -> Result<()> {
    ensure!(text.starts_with(start), "{text}");
    Ok(())
}

#[test]
fn subnets_of_another_size_and_another_port_replace_what_was_there() {
    const OTHER: &str = r#"{"Network":"10.200.0.0/16","SubnetLen":26,"SubnetMin":"10.200.1.0","Backend":{"Type":"vxlan","Port":4789}}"#;
    in_lab(Lab::new("resized").etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let daemons = Flanneld::start_all(lab)?;
        let before = lab.hosts().iter().map(SubnetEnv::read).collect::<Result<Vec<_>>>()?;
        put_config(lab, OTHER)?;
        for (daemon, before) in daemons.iter().zip(&before) {
            let host = daemon.host();
            let env = eventually(format!("{} moves", host.name()), FOLLOW, || {
                let env = SubnetEnv::read(host)?;
                starts(&env.subnet(), "10.200.")?;
                ensure!(daemon.health("/readyz")?.0 == 200);
                Ok(env)
            })?;
            ensure!(env.len == 26 && env.base() >= std::net::Ipv4Addr::new(10, 200, 1, 0), "{}", env.text);
            eventually(format!("nothing of before is left on {}", host.name()), FOLLOW, || {
                let state = host.network_state()?;
                ensure!(!state.contains("10.100.") && state.contains(" onlink"), "{state}");
                let device = host.out(&["ip", "-d", "link", "show", "flannel.1"])?;
                ensure!(device.contains("dstport 4789"), "{device}");
                Ok(())
            })?;
            let said = daemon.said("the network config has changed: ");
            let [line] = &said[..] else { bail!("{said:#?}") };
            for part in
                ["Network 10.100.0.0/16 -> 10.200.0.0/16", "SubnetLen 24 -> 26", "options of backend vxlan"]
            {
                ensure!(line.contains(part), "{part:?} is not in: {line}");
            }
            ensure!(!leases(lab)?.contains_key(&before.key()), "{:?}", leases(lab)?);
            ensure!(leases(lab)?.contains_key(&env.key()), "{:?}", leases(lab)?);
        }
        ensure!(leases(lab)?.len() == 2, "{:?}", leases(lab)?);
        let envs = lab.hosts().iter().map(SubnetEnv::read).collect::<Result<Vec<_>>>()?;
        let pods = [Pod::new(lab.host(1), &envs[0], 2)?, Pod::new(lab.host(2), &envs[1], 2)?];
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;

        // Smaller ones, while the bridges still have theirs: nobody gets a part of what is on its own one.
        put_config(lab, &OTHER.replace("26", "27"))?;
        for (daemon, before) in daemons.iter().zip(&envs) {
            eventually(format!("{} has a smaller one", daemon.host().name()), FOLLOW, || {
                let env = SubnetEnv::read(daemon.host())?;
                ensure!(env.len == 27 && daemon.health("/readyz")?.0 == 200, "{}", env.text);
                let (old, new) = (u32::from(before.base()), u32::from(env.base()));
                ensure!(new >> 6 != old >> 6, "{} is on the bridge with {}", env.subnet(), before.subnet());
                Ok(())
            })?;
        }
        Ok(())
    });
}
