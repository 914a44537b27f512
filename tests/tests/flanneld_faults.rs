//! What goes wrong on real hosts: in the config, in etcd, on the host, in the kernel. Each trouble is said once and clearly,
//! leaves nothing half done, and what can be healed heals without a restart.

use std::collections::BTreeMap;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::flanneld::{
    Flanneld, PREFIX, Pod, SUBNET_FILE, SubnetEnv, leases, put_config, time_to_live,
};
use flannel_tests::{
    Host, Lab, PingStream, Signal, binaries, eventually, in_lab, ping_within, secs, unchanged,
};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// How long until a change in etcd is in the kernel of every host.
const FOLLOW: Duration = Duration::from_secs(5);

/// What the kernel lost is back by then.
const REPAIR: Duration = Duration::from_secs(1);

/// Long enough for a second line of a trouble that is told in a loop.
const REPEAT: Duration = Duration::from_millis(2500);

// ---- the config ----

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
        thread::sleep(Duration::from_millis(500));
        unchanged("the kernel", &works, &host.network_state()?)?;
        put_config(lab, VXLAN)?;
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
fn a_lease_that_is_lost_is_acquired_again() {
    in_lab(Lab::new("lost").etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let daemons = Flanneld::start_all(lab)?;
        let (env, peer) = (SubnetEnv::read(lab.host(1))?, SubnetEnv::read(lab.host(2))?);
        let pods = [Pod::new(lab.host(1), &env, 2)?, Pod::new(lab.host(2), &peer, 2)?];
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        // Deleted by hand, as when an operator tidies up too much: the same subnet again.
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{}", env.key())])?;
        eventually("the key is back", FOLLOW, || {
            leases(lab).is_ok_and(|leases| leases.contains_key(&env.key()))
        })?;
        ensure!(daemons[0].said("ERROR E109").len() == 1, "{:#?}", daemons[0].said("E109"));
        ensure!(leases(lab)?.len() == 2 && daemons[0].daemon().alive());
        ensure!(time_to_live(lab, &env.key())?.is_some_and(|(left, _)| left > 86_000));
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        ensure!(SubnetEnv::read(lab.host(1))? == env);

        // Somebody else has written himself into it: this host must not use it any more.
        let thief = r#"{"PublicIP":"10.77.0.99","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}"#;
        lab.etcdctl(&["put", &format!("{PREFIX}/subnets/{}", env.key()), thief])?;
        eventually("another subnet", FOLLOW, || {
            let now = SubnetEnv::read(lab.host(1))?;
            ensure!(now.subnet() != env.subnet(), "{}", now.text);
            ensure!(leases(lab)?.contains_key(&now.key()), "{:?}", leases(lab)?);
            Ok(())
        })?;
        ensure!(
            leases(lab)?.get(&env.key()).is_some_and(|value| value == thief),
            "the other's lease was touched"
        );
        Ok(())
    });
}

#[test]
fn the_host_for_whom_no_subnet_is_left_gets_one_once_there_is() {
    const THREE: &str = r#"{"Network":"10.100.0.0/16","SubnetLen":25,"SubnetMin":"10.100.0.0","SubnetMax":"10.100.1.0","Backend":{"Type":"vxlan"}}"#;
    const FOUR: &str = r#"{"Network":"10.100.0.0/16","SubnetLen":25,"SubnetMin":"10.100.0.0","SubnetMax":"10.100.1.128","Backend":{"Type":"vxlan"}}"#;
    in_lab(Lab::new("full").hosts(4).etcd(), |lab| {
        put_config(lab, THREE)?;
        // All at once: they race for three subnets.
        let daemons =
            lab.hosts().iter().map(|host| Flanneld::start(lab, host)).collect::<Result<Vec<_>>>()?;
        let without = eventually("three have a lease, and one says why not", secs(15), || {
            let without: Vec<_> = daemons.iter().filter(|d| !d.host().exists(SUBNET_FILE)).collect();
            let [only] = without[..] else { bail!("{} hosts have no subnet", without.len()) };
            ensure!(only.said("E106").len() == 1, "{}", only.daemon().tail());
            Ok(only)
        })?;
        let keys: Vec<_> = leases(lab)?.into_keys().collect();
        ensure!(keys == ["10.100.0.0-25", "10.100.0.128-25", "10.100.1.0-25"], "{keys:?}");
        let links = without.host().out(&["ip", "-br", "link"])?;
        ensure!(!links.contains("flannel"), "half applied: {links}");
        ensure!(without.health("/readyz")?.0 == 503);
        thread::sleep(REPEAT);
        ensure!(without.said("E106").len() == 1, "{:#?}", without.said("E106"));
        ensure!(without.daemon().alive());

        let pid = without.daemon().pid();
        put_config(lab, FOUR)?;
        let start = Instant::now();
        let env = without.ready()?;
        ensure!(env.subnet() == "10.100.1.128/25" && without.daemon().pid() == pid, "{}", env.text);
        ensure!(start.elapsed() < secs(5), "it took {:?}", start.elapsed());
        for daemon in &daemons {
            daemon.ready()?;
            eventually("routes to all the others", FOLLOW, || {
                let routes = daemon.host().out(&["ip", "route", "show", "dev", "flannel.1"])?;
                ensure!(routes.lines().count() == 3, "{routes}");
                Ok(())
            })?;
        }
        ensure!(leases(lab)?.len() == 4);
        Ok(())
    });
}

// ---- etcd ----

#[test]
fn malformed_keys_cost_no_peer() {
    const KEYS: &[(&str, &str)] = &[
        ("nonsense", "{}"),
        ("10.100.300.0-24", r#"{"PublicIP":"10.77.0.55","PublicIPv6":null}"#),
        ("10.100.200.0-24", "no JSON"),
        ("10.100.201.0-24", r#"{"PublicIP":7}"#),
    ];
    in_lab(Lab::new("malformed").etcd(), |lab| {
        put_config(lab, VXLAN)?;
        lab.etcdctl(&["put", &format!("{PREFIX}/subnets/{}", KEYS[0].0), KEYS[0].1])?;
        let daemons = Flanneld::start_all(lab)?;
        let envs = lab.hosts().iter().map(SubnetEnv::read).collect::<Result<Vec<_>>>()?;
        let pods = [Pod::new(lab.host(1), &envs[0], 2)?, Pod::new(lab.host(2), &envs[1], 2)?];
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        let before = lab.host(1).network_state()?;
        let stream = PingStream::start(&pods[0], pods[1].ip(), Duration::from_millis(50))?;
        for (key, value) in &KEYS[1..] {
            lab.etcdctl(&["put", &format!("{PREFIX}/subnets/{key}"), value])?;
        }
        for (key, _) in KEYS {
            for daemon in &daemons {
                let lines =
                    || -> Vec<_> { daemon.said("E107").into_iter().filter(|l| l.contains(key)).collect() };
                eventually(format!("{key} is named"), FOLLOW, || !lines().is_empty())?;
                ensure!(lines().len() == 1, "{:#?}", lines());
            }
        }
        unchanged("the kernel", &before, &lab.host(1).network_state()?)?;
        for (key, _) in KEYS {
            lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")])?;
        }
        thread::sleep(Duration::from_millis(500));
        unchanged("the kernel", &before, &lab.host(1).network_state()?)?;
        let seen = stream.stop_after(11)?;
        ensure!(seen.sent > 10 && seen.lost() == 0, "{seen:?}");
        Ok(())
    });
}

#[test]
fn etcd_may_come_after_flanneld() {
    in_lab(Lab::new("etcd-late").hosts(1).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        lab.etcd_stop()?;
        let daemon = Flanneld::start(lab, lab.host(1))?;
        daemon.daemon().wait_log("E112", secs(10))?;
        let line = daemon.said("E112").remove(0);
        ensure!(line.contains(&lab.etcd_endpoint()), "the endpoint is not named: {line}");
        ensure!(daemon.health("/healthz")?.0 == 200 && daemon.health("/readyz")?.0 == 503);
        thread::sleep(secs(5));
        ensure!(daemon.said("E112").len() == 1, "{:#?}", daemon.said("E112"));
        lab.etcd_start()?;
        daemon.ready()?;
        Ok(())
    });
}

#[test]
fn without_etcd_everything_stays_and_afterwards_it_goes_on() {
    in_lab(Lab::new("etcd-away").hosts(3).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let (h1, h2, h3) = (lab.host(1), lab.host(2), lab.host(3));
        let (first, second) = (Flanneld::start(lab, h1)?, Flanneld::start(lab, h2)?);
        let (env1, env2) = (first.ready()?, second.ready()?);
        let pods = [Pod::new(h1, &env1, 2)?, Pod::new(h2, &env2, 2)?];
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        let before = h1.network_state()?;
        let stream = PingStream::start(&pods[0], pods[1].ip(), Duration::from_millis(50))?;

        lab.etcd_stop()?;
        first.daemon().wait_log("E112", secs(10))?;
        thread::sleep(secs(10));
        unchanged("the kernel", &before, &h1.network_state()?)?;
        ensure!(first.said("E112").len() == 1, "{:#?}", first.said("E112"));
        ensure!(first.health("/readyz")?.0 == 200, "a store that is away makes no host unready");
        // A start without the store goes on from what is on disk.
        first.daemon().crash()?;
        let first = Flanneld::start(lab, h1)?;
        ensure!(first.ready()? == env1);
        unchanged("the kernel", &before, &h1.network_state()?)?;
        // And repairs what is broken, without the store.
        h1.sh("ip route flush dev flannel.1")?;
        eventually("the route is back", REPAIR, || unchanged("the kernel", &before, &h1.network_state()?))?;

        lab.etcd_start()?;
        // Who comes now is seen by both: they listen again.
        let third = Flanneld::start(lab, h3)?;
        let env3 = third.ready()?;
        for host in [h1, h2] {
            eventually(format!("{} knows the new host", host.name()), secs(15), || {
                let routes = host.out(&["ip", "route", "show", "dev", "flannel.1"])?;
                ensure!(routes.contains(&env3.subnet()), "{routes}");
                Ok(())
            })?;
        }
        // One packet may be in the moment between the flush and the repair.
        let seen = stream.stop_after(201)?;
        ensure!(seen.sent > 200 && seen.longest_gap < REPAIR, "{seen:?}");
        Ok(())
    });
}

#[test]
fn what_a_compaction_swallowed_is_looked_up() {
    const PEERS: [&str; 2] = ["10.100.200.0-24", "10.100.201.0-24"];
    in_lab(Lab::new("compaction").hosts(1).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let host = lab.host(1);
        let key = |peer: &str| format!("{PREFIX}/subnets/{peer}");
        let value = |n: u8| {
            format!(
                r#"{{"PublicIP":"10.77.0.{n}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{n}"}}}}"#
            )
        };
        lab.etcdctl(&["put", &key(PEERS[0]), &value(50)])?;
        let daemon = Flanneld::start(lab, host)?;
        daemon.ready()?;
        let routes = |peer: &str| -> Result<bool> {
            let subnet = peer.replace('-', "/");
            Ok(host.out(&["ip", "route", "show", "dev", "flannel.1"])?.contains(&subnet))
        };
        eventually("the first peer", FOLLOW, || routes(PEERS[0]).is_ok_and(|there| there))?;

        // It hears nothing while one peer goes, another comes, and the history of both is dropped.
        daemon.daemon().kill(Signal::SIGSTOP)?;
        lab.etcdctl(&["del", &key(PEERS[0])])?;
        lab.etcdctl(&["put", &key(PEERS[1]), &value(51)])?;
        let said = lab.etcdctl(&["put", "/unrelated", "x", "-w", "json"])?;
        let said: serde_json::Value = serde_json::from_str(&said)?;
        let revision = said["header"]["revision"].as_u64().context("no revision")?;
        lab.etcdctl(&["compact", &revision.to_string(), "--physical"])?;
        lab.etcd_stop()?; // its watch dies with it
        lab.etcd_start()?;
        daemon.daemon().kill(Signal::SIGCONT)?;
        eventually("the second peer instead of the first", secs(15), || {
            ensure!(routes(PEERS[1])?, "the second is not there");
            ensure!(!routes(PEERS[0])?, "the first is still there");
            Ok(())
        })?;
        // And it listens again.
        lab.etcdctl(&["del", &key(PEERS[1])])?;
        eventually("the second peer is gone too", FOLLOW, || routes(PEERS[1]).is_ok_and(|there| !there))
    });
}

// ---- the kernel ----

#[test]
fn what_is_broken_under_vxlan_is_repaired_within_a_second() {
    in_lab(Lab::new("repair-vxlan").hosts(3).behind_router(&[3]).etcd(), |lab| {
        put_config(lab, r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#)?;
        let daemons = Flanneld::start_all(lab)?;
        let envs = lab.hosts().iter().map(SubnetEnv::read).collect::<Result<Vec<_>>>()?;
        let pod = |n: usize| Pod::new(lab.host(n), &envs[n - 1], 2);
        let (near, middle, far) = (pod(1)?, pod(2)?, pod(3)?);
        ping_within(FOLLOW, &near, far.ip())?;
        ping_within(FOLLOW, &near, middle.ip())?;
        let daemon = &daemons[0];
        let mac = lab.host(3).read("/sys/class/net/flannel.1/address")?;
        let (mac, base) = (mac.trim(), envs[2].base());

        broken(daemon, "ip route flush dev flannel.1", &[("route", 1)])?;
        broken(daemon, "ip route flush proto 70", &[("route", 1)])?;
        broken(daemon, &format!("bridge fdb del {mac} dev flannel.1"), &[("forward", 1)])?;
        broken(daemon, &format!("ip neigh del {base} dev flannel.1"), &[("neighbor", 1)])?;
        broken(daemon, "ip -4 addr flush dev flannel.1", &[("address", 1)])?;
        broken(daemon, "ip link set flannel.1 mtu 1400", &[("link", 1)])?;
        // The kernel takes the routes away with it; neighbours that are permanent stay.
        broken(daemon, "ip link set flannel.1 down", &[("link", 1), ("route", 1)])?;
        broken(
            daemon,
            "ip link del flannel.1",
            &[("link", 1), ("address", 1), ("neighbor", 1), ("forward", 1), ("route", 1)],
        )?;
        broken(daemon, "nft flush ruleset", &[("table", 1)])?;
        // A route of somebody else's stands in the way.
        let subnet = envs[2].subnet();
        broken(daemon, &format!("ip route replace {subnet} via 10.77.0.1 dev eth0"), &[("route", 1)])?;
        // As a network script does it. The direct route goes with the interface; while nothing is on a link of this host its
        // peer gets a tunnel, and then the direct route again.
        let down_up = "ip link set eth0 down; sleep 1; ip link set eth0 up; \
            ip route add default via 10.77.0.1; ip addr replace fd77::b/64 dev eth0 nodad; \
            ip -6 route replace default via fd77::1";
        broken(daemon, down_up, &[("route", 2)])?;
        ping_within(secs(2), &near, far.ip())?;
        ping_within(secs(2), &near, middle.ip())
    });
}

#[test]
fn what_is_broken_under_host_gw_is_repaired_within_a_second() {
    in_lab(Lab::new("repair-gw").hosts(3).etcd(), |lab| {
        put_config(lab, HOST_GW)?;
        let daemons = Flanneld::start_all(lab)?;
        let envs = lab.hosts().iter().map(SubnetEnv::read).collect::<Result<Vec<_>>>()?;
        let (near, far) = (Pod::new(lab.host(1), &envs[0], 2)?, Pod::new(lab.host(2), &envs[1], 2)?);
        ping_within(FOLLOW, &near, far.ip())?;
        let daemon = &daemons[0];
        eventually("both peers", FOLLOW, || {
            daemon.host().out(&["ip", "route", "show", "proto", "70"]).is_ok_and(|r| r.lines().count() == 2)
        })?;

        broken(daemon, "ip route flush proto 70", &[("route", 2)])?;
        broken(daemon, "nft flush ruleset", &[("table", 1)])?;
        let down_up = "ip link set eth0 down; sleep 2; ip link set eth0 up; \
            ip route add default via 10.77.0.1; ip addr replace fd77::b/64 dev eth0 nodad; \
            ip -6 route replace default via fd77::1";
        broken(daemon, down_up, &[("route", 2)])?;
        ping_within(secs(2), &near, far.ip())?;

        // The cable out and in again: nothing is lost, and nothing has to be repaired.
        let before = daemon.host().network_state()?;
        let lines = daemon.daemon().log().lines().count();
        lab.link(daemon.host(), false)?;
        eventually("no carrier", secs(2), || {
            daemon.host().out(&["ip", "link", "show", "eth0"]).is_ok_and(|said| said.contains("NO-CARRIER"))
        })?;
        lab.link(daemon.host(), true)?;
        ping_within(secs(3), &near, far.ip())?;
        unchanged("the kernel", &before, &daemon.host().network_state()?)?;
        let new: Vec<_> = daemon.daemon().log().lines().skip(lines).map(str::to_owned).collect();
        ensure!(!new.iter().any(|line| line.contains("restored:")), "{new:#?}");
        Ok(())
    });
}

/// Runs `script` on the daemon's host, and expects the kernel to be as before within [`REPAIR`], one line in the log for each
/// repair, as many as `expected` says by kind of fact, and the same in the counters.
fn broken(daemon: &Flanneld, script: &str, expected: &[(&str, u64)]) -> Result<()> {
    let host = daemon.host();
    // What shows the repair; cheap, since it is asked for again and again.
    let quick = "ip -4 route; ip -4 neigh show nud permanent; bridge fdb show | grep -v 33:33; ip -br -4 addr; \
        ip link show type vxlan | sed 's/^[0-9]*: //'; nft -s list ruleset";
    let (before, whole) = (host.sh(quick)?, host.network_state()?);
    let (counted, lines) = (daemon.repaired()?, daemon.daemon().log().lines().count());
    host.sh(script)?;
    let start = Instant::now();
    eventually(format!("repaired: {script}"), REPAIR, || unchanged("the kernel", &before, &host.sh(quick)?))?;
    eprintln!("repaired after at most {:4} ms: {script}", start.elapsed().as_millis());
    thread::sleep(Duration::from_millis(1200)); // a second repair of the same would come now
    unchanged(script, &whole, &host.network_state()?)?;

    let log = daemon.daemon().log();
    let new: Vec<&str> = log.lines().skip(lines).collect();
    let repairs = |kind: &str| {
        let verbs = [format!("{kind} restored:"), format!("{kind} corrected:")];
        new.iter().filter(|line| verbs.iter().any(|verb| line.contains(verb))).count() as u64
    };
    let now = daemon.repaired()?;
    for (kind, count) in expected {
        ensure!(
            repairs(kind) == *count,
            "{script}: {} lines of {kind}, expected {count}:\n{}",
            repairs(kind),
            new.join("\n")
        );
        let more = now.get(*kind).unwrap_or(&0) - counted.get(*kind).unwrap_or(&0);
        ensure!(more == *count, "{script}: counted {more} {kind}, expected {count}: {now:?}");
    }
    Ok(())
}

// ---- leaving ----

#[test]
fn cleanup_leaves_nothing() {
    in_lab(Lab::new("cleanup").etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        for host in [h1, h2] {
            // A firewall of the host's own, which must be as before as well.
            host.sh("iptables -N MINE; iptables -A FORWARD -j MINE; iptables -P FORWARD DROP; \
                nft add table inet mine; nft add chain inet mine c")?;
        }
        let before = [everything(h1)?, everything(h2)?];
        let daemons = Flanneld::start_all(lab)?;
        let env = SubnetEnv::read(h1)?;
        let pods = [Pod::new(h1, &env, 2)?, Pod::new(h2, &SubnetEnv::read(h2)?, 2)?];
        // Through a FORWARD chain that drops.
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        for pod in pods {
            pod.remove()?;
        }
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let cleanup = ["flanneld", &endpoints, "--cleanup"];

        let said = h1.run(&cleanup)?;
        ensure!(!said.ok() && said.all().contains("stop it first"), "beside a running flanneld: {said}");
        eventually("still ready", secs(2), || daemons[0].health("/readyz").is_ok_and(|said| said.0 == 200))?;

        daemons[0].daemon().stop(secs(5))?;
        h1.out(&cleanup)?;
        unchanged("h1", &before[0], &everything(h1)?)?;
        ensure!(!leases(lab)?.contains_key(&env.key()), "{:?}", leases(lab)?);
        ensure!(leases(lab)?.len() == 1);
        eventually("h2 forgets h1", FOLLOW, || {
            let routes = h2.out(&["ip", "route"])?;
            ensure!(!routes.contains("flannel"), "{routes}");
            Ok(())
        })?;
        // Twice is once.
        h1.out(&cleanup)?;
        unchanged("h1", &before[0], &everything(h1)?)?;

        // After a crash, and without etcd.
        daemons[1].daemon().crash()?;
        lab.etcd_stop()?;
        let said = h2.run(&cleanup)?;
        ensure!(said.ok() && said.all().contains("lease"), "{said}");
        unchanged("h2", &before[1], &everything(h2)?)?;

        // Coming back is as coming for the first time.
        lab.etcd_start()?;
        Flanneld::start(lab, h1)?.ready()?;
        Ok(())
    });
}

/// The kernel's state and the files that anything of flannel may have left.
fn everything(host: &Host) -> Result<String> {
    let files = host.sh(
        "for d in /run/flannel /var/lib/flannel /var/lib/cni /run/docker/plugins /etc/cni; do find $d 2>/dev/null || true; done; \
         cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/all/rp_filter /proc/sys/net/ipv4/conf/default/rp_filter",
    )?;
    Ok(format!("{}\n{files}", host.network_state()?))
}

// ---- the command line ----

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let Ok(flanneld) = binaries::path("flanneld") else { panic!("flanneld is not built") };
    let run = |arguments: &[&str], env: &[(&str, &str)]| {
        let envs: BTreeMap<_, _> = env.iter().copied().collect();
        let output =
            Command::new(&flanneld).args(arguments).env_clear().envs(envs).output().expect("flanneld runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), said)
    };
    for (arguments, env, named) in [
        (&["--kube-subnet-mgr"][..], &[][..], "--kube-subnet-mgr belongs to the Kubernetes store"),
        (&["-ip-masq", "--kubeconfig-file=/x"], &[], "--kubeconfig-file belongs to the Kubernetes store"),
        (&[], &[("FLANNELD_VMODULE", "main=3")], "FLANNELD_VMODULE names source files"),
        (&["-remote=10.0.0.1:8888"], &[], "--remote belongs to the client and server of flannel up to 0.7"),
        (&["-networks=blue"], &[], "--networks served several networks"),
        (&["-logtostderr=true"], &[], "--logtostderr says where the Go program logs"),
        (&["-iface-regex=eth("], &[], "--iface-regex"),
        (&[], &[("FLANNELD_IFACE_CAN_REACH", "eth0")], "FLANNELD_IFACE_CAN_REACH"),
        (&["--iptables-resync=0"], &[], "--iptables-resync"),
        (&["--ip-masq", "false"], &[], "'false'"),
        (&["--etcd-username=root"], &[], "--etcd-password"),
        (&["completions", "tcsh"], &[], "tcsh"),
        (&["--no-such-flag"], &[], "--no-such-flag"),
        (&["--subnet-lease-renew-margin=0"], &[], "--subnet-lease-renew-margin"),
        (&[], &[("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1440")], "FLANNELD_SUBNET_LEASE_RENEW_MARGIN"),
        (&["--public-ip=somewhere"], &[], "--public-ip"),
        (&["--public-ipv6=fe80::1"], &[], "--public-ipv6"),
    ] {
        let (code, stdout, stderr) = run(arguments, env);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?} {env:?}: {stderr}");
        assert!(stderr.contains(named), "{arguments:?} {env:?}: {named:?} is not in: {stderr}");
    }
    let (code, stdout, _) = run(&["-version"], &[]);
    assert!(code == Some(0) && stdout.contains(env!("CARGO_PKG_VERSION")), "{code:?} {stdout}");
    let (code, stdout, _) = run(&["completions", "bash"], &[]);
    assert!(code == Some(0) && stdout.contains("complete -F _flanneld"), "{stdout}");
    let (code, stdout, _) = run(&["--help"], &[]);
    assert!(
        code == Some(0) && stdout.contains("--etcd-endpoints") && stdout.contains("--cleanup"),
        "{stdout}"
    );
}
