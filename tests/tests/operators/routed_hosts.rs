//! Three hosts with host-gw: no config yet, a second LAN, another prefix, one host after the other, routes by hand.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, Pod, SubnetEnv};
use flannel_tests::{Host, Lab, Signal, eventually, in_lab, ping, ping_within, secs};

const KEY: &str = "/docker-test/network";
const HOST_GW: &str = r#"{"Network":"10.2.0.0/16","SubnetLen":24,"Backend":{"Type":"host-gw"}}"#;
const VXLAN: &str = r#"{"Network":"10.2.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;

/// How long until a change in etcd is in the kernel of every host, on a machine that does many other things.
const FOLLOW: Duration = Duration::from_secs(30);

#[test]
fn the_second_guide() {
    in_lab(Lab::new("routed").hosts(3).behind_router(&[3]).second_lan().etcd(), |lab| {
        let first = waits_for_a_config(lab)?;
        let others = [start(lab, 2, "eth0")?, start(lab, 3, "eth0")?];
        let before = [first.ready()?, others[0].ready()?, others[1].ready()?];
        // On two LANs: who is not reached is named once, and the others are.
        let named = format!("E120 host-gw cannot reach a peer without a gateway: {} ", before[2].subnet());
        eventually("the third host is named", FOLLOW, || {
            ensure!(first.said(&named).len() == 1, "{}", first.daemon().tail());
            let routes = lab.host(1).out(&["ip", "route", "show", "proto", "70"])?;
            ensure!(routes.trim() == route(&before[1], "10.77.0.12", "eth0"), "{routes}");
            Ok(())
        })?;
        for daemon in others.iter().chain([&first]) {
            daemon.daemon().stop(secs(10))?;
        }
        let mut daemons = by_the_second_lan(lab, &before)?;
        let pods = lab.hosts().iter().zip(&before).map(|(host, env)| Pod::new(host, env, 2));
        let pods = pods.collect::<Result<Vec<_>>>()?;
        all_reach_all(&pods)?;
        one_after_the_other(lab, &mut daemons, &before, &pods)?;
        routes_by_hand(lab, &mut daemons, &before, &pods)
    });
}

/// As the unit of the guide has it: one dash, an address and a prefix of its own.
fn start(lab: &Lab, number: usize, iface: &str) -> Result<Flanneld> {
    Flanneld::start_with(
        lab,
        lab.host(number),
        &["-etcd-prefix=/docker-test/network", &format!("-iface={iface}")],
    )
}

fn put(lab: &Lab, config: &str) -> Result<()> {
    lab.etcdctl(&["put", &format!("{KEY}/config"), config]).map(drop)
}

fn route(peer: &SubnetEnv, via: &str, link: &str) -> String {
    format!("{} via {via} dev {link}", peer.subnet())
}

fn all_reach_all(pods: &[Pod]) -> Result<()> {
    for from in pods {
        for to in pods.iter().filter(|to| to.ip() != from.ip()) {
            ping_within(FOLLOW, from, to.ip())?;
        }
    }
    Ok(())
}

/// systemd is told what is waited for, and READY only when it has come.
fn waits_for_a_config(lab: &Lab) -> Result<Flanneld> {
    const SOCKET: &str = "/run/notify";
    let socket = UnixDatagram::bind(lab.host(1).path(SOCKET))?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut told = String::new();
    let mut hears = |wanted: &str| {
        eventually(format!("{wanted:?} to systemd"), FOLLOW, || {
            let mut bytes = [0; 4096];
            while let Ok(length) = socket.recv(&mut bytes) {
                told.push_str(&String::from_utf8_lossy(&bytes[..length]));
                told.push('\n');
            }
            ensure!(told.contains(wanted), "{told}");
            Ok(told.clone())
        })
    };
    let flags = [&format!("-etcd-prefix={KEY}"), "-iface=eth0"];
    let daemon = Flanneld::start_in(lab, lab.host(1), &flags, &[("NOTIFY_SOCKET", SOCKET)])?;
    let told = hears("STATUS=waiting: E101")?;
    ensure!(!told.contains("READY=1"), "{told}");
    let line = daemon.said("E101").join("\n");
    ensure!(line.lines().count() == 1 && line.contains("etcdctl put"), "{line}");
    put(lab, HOST_GW)?;
    let told = hears("READY=1")?;
    ensure!(told.matches("READY=1").count() == 1, "{told}");
    let env = daemon.ready()?;
    hears(&format!("STATUS=serving subnet {}", env.subnet()))?;
    ensure!(env.mtu == 1500 && env.text.starts_with("FLANNEL_NETWORK=10.2.0.0/16\n"), "{}", env.text);
    Ok(daemon)
}

/// Nothing has to be leased anew because the hosts talk over another link.
fn by_the_second_lan(lab: &Lab, before: &[SubnetEnv; 3]) -> Result<Vec<Flanneld>> {
    let daemons = (1..=3).map(|n| start(lab, n, "eth1")).collect::<Result<Vec<_>>>()?;
    for (daemon, before) in daemons.iter().zip(before) {
        let env = daemon.ready()?;
        ensure!(env.subnet() == before.subnet(), "{} became {}", before.text, env.text);
    }
    let leases = lab.etcdctl(&["get", "--prefix", &format!("{KEY}/subnets/")])?;
    for n in 1..=3 {
        ensure!(leases.contains(&format!(r#""PublicIP":"10.11.12.1{n}""#)), "{leases}");
    }
    ensure!(leases.matches("PublicIP\"").count() == 3, "{leases}");
    by_routes(lab.host(1), before)?;
    Ok(daemons)
}

/// The first host has a route to each of the others, by the second LAN.
fn by_routes(first: &Host, envs: &[SubnetEnv; 3]) -> Result<()> {
    eventually("routes by eth1", FOLLOW, || {
        let routes = first.out(&["ip", "route", "show", "proto", "70"])?;
        for (n, env) in envs.iter().enumerate().skip(1) {
            ensure!(routes.contains(&route(env, &format!("10.11.12.1{}", n + 1), "eth1")), "{routes}");
        }
        ensure!(routes.lines().count() == 2, "{routes}");
        Ok(())
    })
}

/// From vxlan to host-gw, while one host does not follow: it is a finding until it does.
fn one_after_the_other(
    lab: &Lab,
    daemons: &mut [Flanneld],
    envs: &[SubnetEnv; 3],
    pods: &[Pod],
) -> Result<()> {
    put(lab, VXLAN)?;
    for host in lab.hosts() {
        eventually(format!("vxlan on {}", host.name()), FOLLOW, || {
            let routes = host.out(&["ip", "route", "show", "dev", "flannel.1"])?;
            ensure!(routes.lines().count() == 2 && SubnetEnv::read(host)?.mtu == 1450, "{routes}");
            Ok(())
        })?;
    }
    all_reach_all(pods)?;

    daemons[1].daemon().kill(Signal::SIGSTOP)?;
    put(lab, HOST_GW)?;
    let named = format!("{} of 10.11.12.12 uses backend vxlan, this host host-gw", envs[1].subnet());
    eventually("who has not changed yet is named", FOLLOW, || {
        ensure!(said(&daemons[0], &named) == 1, "{}", daemons[0].daemon().tail());
        let routes = lab.host(1).out(&["ip", "route"])?;
        ensure!(!routes.contains(&envs[1].subnet()) && !routes.contains("flannel.1"), "{routes}");
        Ok(())
    })?;
    // The one who has is reached meanwhile.
    ping_within(FOLLOW, &pods[0], pods[2].ip())?;
    daemons[1].daemon().kill(Signal::SIGCONT)?;
    by_routes(lab.host(1), envs)?;
    all_reach_all(pods)?;
    for (host, before) in lab.hosts().iter().zip(envs) {
        eventually(format!("nothing of vxlan on {}", host.name()), FOLLOW, || {
            ensure!(!host.exists("/sys/class/net/flannel.1"), "flannel.1 is still there");
            ensure!(SubnetEnv::read(host)? == *before, "{}", SubnetEnv::read(host)?.text);
            Ok(())
        })?;
    }
    ensure!(said(&daemons[0], &named) == 1, "{}", daemons[0].daemon().tail());

    let routes = lab.host(2).out(&["ip", "route"])?;
    daemons[1].daemon().crash()?;
    daemons[1] = start(lab, 2, "eth1")?;
    ensure!(daemons[1].ready()? == envs[1], "a crash costs no subnet");
    ensure!(lab.host(2).out(&["ip", "route"])? == routes, "{routes}");
    Ok(())
}

/// Warnings that a peer uses another backend; that it does no more is said, too.
fn said(daemon: &Flanneld, named: &str) -> usize {
    daemon.said(named).iter().filter(|line| line.contains("WARN E110")).count()
}

/// What an operator added stays, and what he added in our place becomes ours.
fn routes_by_hand(lab: &Lab, daemons: &mut [Flanneld], envs: &[SubnetEnv; 3], pods: &[Pod]) -> Result<()> {
    let host = lab.host(1);
    // One elsewhere, and one inside the network, of a subnet that nobody has.
    let free = (1..=255)
        .map(|n| format!("10.2.{n}.0/24"))
        .find(|subnet| envs.iter().all(|env| env.subnet() != *subnet));
    let own = ["172.7.22.0/24".to_owned(), free.context("no subnet is free")?]
        .map(|subnet| format!("{subnet} via 10.77.0.12 dev eth0"));
    for route in &own {
        host.sh(&format!("ip route add {route}"))?;
    }
    let still_there = || {
        let routes = host.out(&["ip", "route"])?;
        ensure!(own.iter().all(|route| routes.contains(route)), "{routes}");
        Ok(())
    };
    // A pass that had something to do.
    host.sh(&format!("ip route del {}", envs[1].subnet()))?;
    by_routes(host, envs)?;
    still_there()?;

    // Without flanneld a route by hand does, too.
    daemons[0].daemon().stop(secs(10))?;
    host.sh(&format!("ip route flush proto 70; ip route add {}", route(&envs[1], "10.11.12.12", "eth1")))?;
    ping(&pods[0], pods[1].ip())?;
    daemons[0] = start(lab, 1, "eth1")?;
    daemons[0].ready()?;
    by_routes(host, envs)?;
    let routes = host.out(&["ip", "route", "show", &envs[1].subnet()])?;
    ensure!(routes.lines().count() == 1, "{routes}");
    all_reach_all(pods)?;
    still_there()?;
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    daemons[0].daemon().stop(secs(10))?;
    host.out(&["flanneld", &endpoints, &format!("--etcd-prefix={KEY}"), "--cleanup"])?;
    still_there()
}
