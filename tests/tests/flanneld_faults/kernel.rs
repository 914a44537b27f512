//! What somebody takes away from the kernel.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use flannel_tests::flanneld::{Flanneld, Pod, SubnetEnv, put_config};
use flannel_tests::{Lab, eventually, in_lab, ping_within, secs, unchanged};

use crate::{FOLLOW, HOST_GW, REPAIR};

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
        broken(daemon, "nft flush ruleset", &[("chain", 2)])?;
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
        broken(daemon, "nft flush ruleset", &[("chain", 2)])?;
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
