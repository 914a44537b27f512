//! What happens to etcd and to what is in it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SubnetEnv, leases, put_config};
use flannel_tests::{Lab, PingStream, Signal, eventually, in_lab, ping_within, secs, unchanged};

use crate::{FOLLOW, REPAIR, VXLAN, is_long};

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
        // What only begins like the place of the leases is not looked at.
        lab.etcdctl(&["put", &format!("{PREFIX}/subnetsfoo"), "{}"])?;
        lab.etcdctl(&["put", &format!("{PREFIX}/subnets-old/10.100.7.0-24"), "{}"])?;
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
        for daemon in &daemons {
            // One line for each key, and one for its end.
            for verb in ["WARN E107", "over: E107"] {
                let lines = daemon.said(verb);
                ensure!(lines.len() == KEYS.len(), "{lines:#?}");
            }
            ensure!(daemon.said("subnetsfoo").is_empty() && daemon.said("subnets-old").is_empty());
        }
        let seen = stream.stop_after(11)?;
        ensure!(seen.sent > 10 && seen.lost() == 0, "{seen:?}");

        // Many at once are told in part, and how many are not.
        for n in 0..45 {
            lab.etcdctl(&["put", &format!("{PREFIX}/subnets/nonsense{n}"), "{}"])?;
        }
        daemons[1].daemon().crash()?;
        let again = Flanneld::start(lab, lab.host(2))?;
        again.ready()?;
        let more = "of what follows only 40 are told, and 5 more are not";
        eventually("it is said", FOLLOW, || {
            ensure!(
                again.said(more).len() == 1 && again.said("E107").len() == 40,
                "{}",
                again.daemon().tail()
            );
            Ok(())
        })
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

        lab.etcd_crash()?;
        first.daemon().wait_log("E112", secs(10))?;
        let long = is_long();
        thread::sleep(if long { secs(75) } else { secs(5) });
        unchanged("the kernel", &before, &h1.network_state()?)?;
        let said = first.said("E112");
        ensure!(said.len() == if long { 2 } else { 1 }, "once, and again after a minute: {said:#?}");
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

#[test]
fn sigterm_is_heard_whatever_the_store_does() {
    const AT_ONCE: Duration = Duration::from_secs(1);
    in_lab(Lab::new("sigterm").hosts(1).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let host = lab.host(1);
        let stops = |daemon: &Flanneld, when: &str| -> Result<()> {
            let took = daemon.daemon().stop(secs(20))?;
            ensure!(took < AT_ONCE, "{when}: it took {took:?}\n{}", daemon.daemon().tail());
            ensure!(!daemon.said("Exiting cleanly").is_empty(), "{}", daemon.daemon().tail());
            Ok(())
        };
        // With connections on which nothing is said any more.
        let daemon = Flanneld::start(lab, host)?;
        daemon.ready()?;
        lab.etcd_signal(Signal::SIGSTOP)?;
        stops(&daemon, "with a mute etcd")?;
        // Before anything was ever said, and after it was said that nothing is.
        for wait in [false, true] {
            let daemon = Flanneld::start(lab, host)?;
            match wait {
                true => drop(daemon.daemon().wait_log("E112", secs(10))?),
                false => drop(daemon.daemon().wait_log("starting from the last known state", secs(10))?),
            }
            stops(&daemon, "with an etcd that has always been mute")?;
        }
        lab.etcd_signal(Signal::SIGCONT)?;
        // While a name is looked up at a server that does not answer.
        host.write("/etc/resolv.conf", "nameserver 10.77.0.250\n")?;
        let daemon = Flanneld::start_at("http://etcd.example.org:2379", host, &["--iface", "eth0"])?;
        daemon.daemon().wait_log("E112", secs(10))?;
        ensure!(daemon.said("E112")[0].contains("http://etcd.example.org:2379"), "{:?}", daemon.said("E112"));
        stops(&daemon, "while a name is looked up")?;
        // With nobody there at all.
        lab.etcd_crash()?;
        let daemon = Flanneld::start(lab, host)?;
        daemon.daemon().wait_log("E112", secs(10))?;
        stops(&daemon, "without etcd")
    });
}

/// Somebody's slip, a new disk, an old backup: hosts write their leases again, and until then peers stay what they were.
#[test]
fn an_emptied_etcd_cuts_nobody_off() {
    in_lab(Lab::new("etcd-empty").hosts(3).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let mut daemons = Flanneld::start_all(lab)?;
        let envs = [SubnetEnv::read(h1)?, SubnetEnv::read(h2)?];
        let pods = [Pod::new(h1, &envs[0], 2)?, Pod::new(h2, &envs[1], 2)?];
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        a_silent_path_is_told(lab, &daemons[0])?;
        let (before, held) = (h1.network_state()?, leases(lab)?);
        ensure!(held.len() == 3);
        let stream = PingStream::start(&pods[0], pods[1].ip(), Duration::from_millis(10))?;
        let all_back = || {
            eventually("every lease is written again", secs(30), || {
                let now = leases(lab)?;
                ensure!(now == held, "{now:#?}");
                Ok(())
            })
        };

        lab.etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/")])?;
        all_back()?;
        unchanged("the kernel", &before, &h1.network_state()?)?;

        // The third host is gone when etcd comes back with nothing in it; it is missed only after a minute.
        daemons.remove(2).daemon().stop(secs(10))?;
        lab.etcd_stop()?;
        lab.etcd_host().sh("rm -rf /run/etcd")?;
        lab.etcd_start()?;
        put_config(lab, VXLAN)?;
        eventually("both leases are written again", secs(30), || {
            let now = leases(lab)?;
            let both: Vec<_> =
                held.iter().filter(|(key, _)| envs.iter().any(|env| env.key() == **key)).collect();
            ensure!(now.iter().collect::<Vec<_>>() == both, "{now:#?}");
            Ok(())
        })?;
        unchanged("the kernel", &before, &h1.network_state()?)?;
        for daemon in &daemons {
            eventually("it was told", FOLLOW, || daemon.said("E138").len() >= 2)?;
            let gone = daemon.said("route removed");
            ensure!(gone.is_empty(), "{gone:#?}");
        }
        let seen = stream.stop_after(101)?;
        ensure!(seen.sent > 100 && seen.lost() == 0, "{seen:?}");
        // A peer whose lease alone is gone goes at once.
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{}", envs[1].key())])?;
        eventually("the route was gone", FOLLOW, || daemons[0].said("route removed").len() == 1)?;
        if is_long() {
            daemons[0].daemon().wait_log("have not written them again", secs(75))?;
            let third = held.keys().find(|key| envs.iter().all(|env| env.key() != **key));
            let third = third.context("the third host's lease")?.replace('-', "/");
            eventually("the third host's route is gone, and it is a stranger", FOLLOW, || {
                let (routes, guard) =
                    (h1.out(&["ip", "route"])?, h1.sh("nft list set inet flannel_tunnel hosts")?);
                ensure!(!routes.contains(&third) && !guard.contains("10.77.0.13"), "{routes}{guard}");
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// Packets that vanish break no connection: it is told all the same, and that it is over.
fn a_silent_path_is_told(lab: &Lab, daemon: &Flanneld) -> Result<()> {
    let (host, etcd) = (daemon.host(), lab.etcd_host().ip());
    let rule = format!("INPUT -s {etcd} -j DROP");
    let lines = daemon.said("E112").len();
    host.sh(&format!("iptables -w -I {rule}"))?;
    let start = Instant::now();
    // 5 s are promised; the rest is for a machine that does many other things.
    eventually("that etcd is silent is told", secs(10), || daemon.said("E112").len() == lines + 1)?;
    eprintln!("a silent path to etcd was told after {:?}", start.elapsed());
    host.sh(&format!("iptables -w -D {rule}"))?;
    daemon.daemon().wait_log("etcd is reachable again", secs(30)).map(|_| ())
}
