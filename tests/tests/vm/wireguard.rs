//! Backend wireguard with the kernel's, and with a host among them whose kernel has none.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SubnetEnv, put_config};
use flannel_tests::needs::{self, WIREGUARD};
use flannel_tests::{Host, Lab, PingStream, eventually, in_lab, largest_packet, ping_within, secs, vm};

const CONFIG: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"wireguard","PersistentKeepaliveInterval":25,"PSK":"UFNLUFNLUFNLUFNLUFNLUFNLUFNLUFNLUFNLUFNLUFM="}}"#;

/// How long until a change is everywhere.
const FOLLOW: Duration = secs(15);

/// What loads every module but one, in the virtual machine's own layer over the root.
const REFUSES: &str = "/tmp/modprobe-but-wireguard";

/// Where the kernel looks for what loads modules.
const MODPROBE: &str = "/proc/sys/kernel/modprobe";

/// A key that an operator keeps elsewhere, and Go flanneld's.
const OWN_KEY: &str = "/etc/own.key";
const GO_KEY: &str = "/run/flannel/wgkey";

fn reach_each_other(pods: &[Pod]) -> Result<()> {
    for from in pods {
        for to in pods.iter().filter(|to| to.ip() != from.ip()) {
            ping_within(FOLLOW, from, to.ip())?;
        }
    }
    Ok(())
}

/// What `wg` shows of a host's peers, one a line.
fn peers(host: &Host, what: &str) -> Result<Vec<String>> {
    Ok(host.out(&["wg", "show", "flannel-wg", what])?.lines().map(str::to_owned).collect())
}

/// When the first two hosts, whose kernels encrypt, shook hands last: in seconds. The third may do so whenever it was too slow to answer.
fn session(lab: &Lab) -> Result<u64> {
    let key = peers(lab.host(2), "public-key")?.remove(0);
    let all = peers(lab.host(1), "latest-handshakes")?;
    let seconds = all.iter().find_map(|line| line.strip_prefix(&key)).context("the second host's session")?;
    Ok(seconds.trim().parse()?)
}

fn index(host: &Host) -> Result<String> {
    host.out(&["cat", "/sys/class/net/flannel-wg/ifindex"])
}

fn start_with_own_key(lab: &Lab, host: &Host) -> Result<Flanneld> {
    Flanneld::start_in(lab, host, &["--iface", "eth0", "--ip-masq"], &[("WIREGUARD_KEY_FILE", OWN_KEY)])
}

/// A host that asks for the module while nobody loads that one.
fn start_without_the_module(lab: &Lab, host: &Host) -> Result<Flanneld> {
    host.sh("modprobe tun; modprobe -r wireguard")?;
    let loads = host.read(MODPROBE)?;
    let program =
        format!("#!/bin/sh\ncase \"$*\" in *wireguard*) exit 1 ;; esac\nexec {} \"$@\"\n", loads.trim());
    std::fs::write(REFUSES, program)?;
    host.sh(&format!("chmod 755 {REFUSES}; echo {REFUSES} > {MODPROBE}"))?;
    let daemon = Flanneld::start(lab, host)?;
    daemon.ready()?;
    ensure!(daemon.said("this kernel has no WireGuard").len() == 1, "{}", daemon.daemon().tail());
    host.sh(&format!("echo {} > {MODPROBE}", loads.trim()))?;
    Ok(daemon)
}

#[test]
fn hosts_with_and_without_the_module() {
    if !vm::is_inside() {
        return needs::left_out("it takes a module from the kernel; `make vm` runs it");
    }
    in_lab(Lab::new("wg").hosts(3).etcd().needs(&["wg"]).needs_kernel(WIREGUARD), |lab| {
        put_config(lab, CONFIG)?;
        let (one, two, third) = (lab.host(1), lab.host(2), lab.host(3));
        let without = start_without_the_module(lab, third)?;
        one.sh(&format!("umask 077; wg genkey > {OWN_KEY}"))?;
        // What Go flanneld leaves.
        two.sh(&format!(
            "umask 077; mkdir -p /run/flannel; wg genkey > {GO_KEY}; ip link add flannel-wg type wireguard; \
             wg set flannel-wg private-key {GO_KEY} listen-port 51820; ip link set flannel-wg up"
        ))?;
        let left = index(two)?;
        let with = start_with_own_key(lab, one)?;
        let second = Flanneld::start(lab, two)?;
        for (daemon, key) in [(&with, OWN_KEY), (&second, GO_KEY)] {
            let host = daemon.host();
            daemon.ready()?;
            ensure!(daemon.said("this kernel has no WireGuard").is_empty(), "{}", daemon.daemon().tail());
            let link = host.out(&["ip", "-d", "link", "show", "flannel-wg"])?;
            ensure!(link.contains("wireguard") && link.contains(" mtu 1420 "), "{link}");
            ensure!(peers(host, "private-key")? == [host.read(key)?.trim()], "{key} is not used");
        }
        ensure!(index(two)? == left, "Go's device was made anew");
        let pods = lab
            .hosts()
            .iter()
            .map(|host| Pod::new(host, &SubnetEnv::read(host)?, 2))
            .collect::<Result<Vec<_>>>()?;
        reach_each_other(&pods)?;
        let met = peers(one, "latest-handshakes")?;
        ensure!(met.len() == 2 && met.iter().all(|peer| !peer.ends_with("\t0")), "{met:?}");
        ensure!(peers(one, "preshared-keys")?.iter().all(|peer| !peer.ends_with("(none)")));
        ensure!(peers(one, "persistent-keepalive")?.iter().all(|peer| peer.ends_with("\t25")));
        for (from, to) in [(0, 1), (2, 0)] {
            eventually("1420 bytes pass, and no more", FOLLOW, || {
                let largest = largest_packet(&pods[from], pods[to].ip())?;
                ensure!(largest == 1420, "{largest} bytes");
                Ok(())
            })?;
        }
        let with = restarts(lab, with, &pods)?;
        is_repaired(one, &pods)?;

        // Who leaves is nobody's peer any more.
        let key = SubnetEnv::read(third)?.key();
        without.daemon().crash()?;
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")])?;
        eventually("one peer is left", FOLLOW, || peers(one, "peers").is_ok_and(|peers| peers.len() == 1))?;
        ensure!(with.said(" ERROR ").is_empty(), "{:#?}", with.said(" ERROR "));

        // Another backend takes the device away.
        put_config(lab, r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#)?;
        for host in [one, two] {
            eventually("flannel.1 in the place of flannel-wg", FOLLOW, || {
                ensure!(!host.exists("/sys/class/net/flannel-wg"), "flannel-wg is there");
                ensure!(host.exists("/sys/class/net/flannel.1"), "no flannel.1");
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// A restart takes the device over: nothing is lost, and nobody shakes hands anew.
fn restarts(lab: &Lab, mut daemon: Flanneld, pods: &[Pod]) -> Result<Flanneld> {
    let host = lab.host(1);
    for crash in [true, false] {
        let (met, before) = (session(lab)?, index(host)?);
        let stream = PingStream::start(&pods[1], pods[0].ip(), secs(1) / 5)?;
        stream.more(3)?;
        match crash {
            true => daemon.daemon().crash()?,
            false => daemon.daemon().stop(secs(20)).map(drop)?,
        }
        daemon = start_with_own_key(lab, host)?;
        daemon.ready()?;
        stream.more(3)?;
        let seen = stream.stop()?;
        ensure!(seen.lost() == 0, "{seen:?}");
        ensure!(index(host)? == before, "the device was made anew");
        let now = session(lab)?;
        // Its keys are renewed two minutes after the last time (wireguard's `REKEY_AFTER_TIME`), which an emulated processor may take.
        ensure!(now == met || now - met >= 120, "the session was: {met}, then {now}");
        ensure!(daemon.said("restored").is_empty(), "{:?}", daemon.said("restored"));
    }
    Ok(daemon)
}

/// What is done with `wg` and `ip` by hand.
fn is_repaired(host: &Host, pods: &[Pod]) -> Result<()> {
    let key = peers(host, "peers")?.remove(0);
    for harm in [
        format!("wg set flannel-wg peer {key} remove"),
        format!("wg set flannel-wg peer {key} endpoint 192.0.2.9:9 persistent-keepalive 9 allowed-ips ''"),
        "wg set flannel-wg listen-port 4500".to_owned(),
        "ip route flush dev flannel-wg".to_owned(),
        "ip link set flannel-wg down".to_owned(),
        "ip link del flannel-wg".to_owned(),
    ] {
        host.sh(&harm)?;
        eventually(&harm, FOLLOW, || {
            let ports = host.out(&["wg", "show", "flannel-wg", "listen-port"])?;
            let allowed = peers(host, "allowed-ips")?;
            ensure!(ports.trim() == "51820" && allowed.len() == 2, "{ports} {allowed:?}");
            ensure!(allowed.iter().all(|peer| peer.contains("/24")), "{allowed:?}");
            ensure!(peers(host, "persistent-keepalive")?.iter().all(|peer| peer.ends_with("\t25")));
            Ok(())
        })?;
        reach_each_other(pods).context(harm)?;
    }
    Ok(())
}
