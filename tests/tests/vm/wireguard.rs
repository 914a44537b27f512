//! Backend wireguard with the kernel's, and with a host among them whose kernel has none.

use anyhow::{Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SubnetEnv, put_config};
use flannel_tests::{Host, Lab, PingStream, eventually, in_lab, largest_packet, ping_within, secs};

const CONFIG: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"wireguard","PSK":"UFNLUFNLUFNLUFNLUFNLUFNLUFNLUFNLUFNLUFNLUFM="}}"#;

/// What loads every module but one, in the virtual machine's own layer over the root.
const REFUSES: &str = "/tmp/modprobe-but-wireguard";

/// Where the kernel looks for what loads modules.
const MODPROBE: &str = "/proc/sys/kernel/modprobe";

fn reach_each_other(pods: &[Pod]) -> Result<()> {
    for from in pods {
        for to in pods.iter().filter(|to| to.ip() != from.ip()) {
            ping_within(secs(60), from, to.ip())?;
        }
    }
    Ok(())
}

/// Both processors are emulated: a start takes longer than anywhere else.
fn ready(daemon: &Flanneld) -> Result<()> {
    eventually("flanneld is ready", secs(120), || {
        let (status, said) = daemon.health("/readyz")?;
        ensure!(status == 200, "{status} {said}");
        Ok(())
    })
}

/// What `wg` shows of a host's peers, one a line.
fn peers(host: &Host, what: &str) -> Result<Vec<String>> {
    Ok(host.out(&["wg", "show", "flannel-wg", what])?.lines().map(str::to_owned).collect())
}

#[test]
#[ignore = "inside the virtual machine"]
fn hosts_with_and_without_the_module() {
    in_lab(Lab::new("wg").hosts(3).etcd().needs(&["wg"]), |lab| {
        put_config(lab, CONFIG)?;
        let (one, third) = (lab.host(1), lab.host(3));
        // The third one asks for the module while nobody loads that one.
        third.sh("modprobe tun; modprobe -r wireguard || true")?;
        let loads = third.read(MODPROBE)?;
        let program =
            format!("#!/bin/sh\ncase \"$*\" in *wireguard*) exit 1 ;; esac\nexec {} \"$@\"\n", loads.trim());
        std::fs::write(REFUSES, program)?;
        third.sh(&format!("chmod 755 {REFUSES}; echo {REFUSES} > {MODPROBE}"))?;
        let without = Flanneld::start(lab, third)?;
        ready(&without)?;
        ensure!(without.said("this kernel has no WireGuard").len() == 1, "{}", without.daemon().tail());
        third.sh(&format!("echo {} > {MODPROBE}", loads.trim()))?;
        let mut with = Flanneld::start(lab, one)?;
        let second = Flanneld::start(lab, lab.host(2))?;
        for daemon in [&with, &second] {
            ready(daemon)?;
            ensure!(daemon.said("this kernel has no WireGuard").is_empty(), "{}", daemon.daemon().tail());
            let link = daemon.host().out(&["ip", "-d", "link", "show", "flannel-wg"])?;
            ensure!(link.contains("wireguard") && link.contains(" mtu 1420 "), "{link}");
        }
        let pod = |host: &Host| Pod::new(host, &SubnetEnv::read(host)?, 2);
        let pods = lab.hosts().iter().map(pod).collect::<Result<Vec<_>>>()?;
        reach_each_other(&pods)?;
        let met = peers(one, "latest-handshakes")?;
        ensure!(met.len() == 2 && met.iter().all(|peer| !peer.ends_with("\t0")), "{met:?}");
        ensure!(peers(one, "preshared-keys")?.iter().all(|peer| !peer.ends_with("(none)")));
        eventually("1420 bytes pass, and no more", secs(60), || {
            let largest = largest_packet(&pods[0], pods[1].ip())?;
            ensure!(largest == 1420, "{largest} bytes");
            Ok(())
        })?;

        // A restart takes the device over: nothing is lost, and nobody shakes hands anew.
        let (met, index) = (peers(one, "latest-handshakes")?, one.read("/sys/class/net/flannel-wg/ifindex")?);
        let stream = PingStream::start(&pods[1], pods[0].ip(), secs(1) / 5)?;
        with.daemon().crash()?;
        with = Flanneld::start(lab, one)?;
        ready(&with)?;
        let seen = stream.stop_after(10)?;
        ensure!(seen.lost() == 0, "{seen:?}");
        ensure!(one.read("/sys/class/net/flannel-wg/ifindex")? == index, "the device was made anew");
        ensure!(peers(one, "latest-handshakes")? == met, "the sessions were");
        ensure!(with.said("restored").is_empty(), "{:?}", with.said("restored"));

        // By hand.
        let key = peers(one, "peers")?.remove(0);
        for harm in [
            format!("wg set flannel-wg peer {key} remove"),
            format!(
                "wg set flannel-wg peer {key} endpoint 192.0.2.9:9 persistent-keepalive 9 allowed-ips ''"
            ),
            "wg set flannel-wg listen-port 4500".to_owned(),
            "ip route flush dev flannel-wg".to_owned(),
            "ip link del flannel-wg".to_owned(),
        ] {
            one.sh(&harm)?;
            eventually(&harm, secs(60), || {
                let (ports, allowed) =
                    (one.out(&["wg", "show", "flannel-wg", "listen-port"])?, peers(one, "allowed-ips")?);
                ensure!(ports.trim() == "51820" && allowed.len() == 2, "{ports} {allowed:?}");
                ensure!(allowed.iter().all(|peer| peer.contains("/24")), "{allowed:?}");
                Ok(())
            })?;
            reach_each_other(&pods)?;
        }

        // Who leaves is nobody's peer any more.
        let key = SubnetEnv::read(third)?.key();
        without.daemon().crash()?;
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")])?;
        eventually("one peer is left", secs(60), || peers(one, "peers").is_ok_and(|peers| peers.len() == 1))?;
        ensure!(with.said(" ERROR ").is_empty(), "{}", with.daemon().tail());

        // Another backend takes the device away.
        put_config(lab, r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#)?;
        eventually("flannel.1 in the place of flannel-wg", secs(60), || {
            ensure!(!one.exists("/sys/class/net/flannel-wg"), "flannel-wg is there");
            ensure!(one.exists("/sys/class/net/flannel.1"), "no flannel.1");
            Ok(())
        })?;
        drop(second);
        Ok(())
    });
}
