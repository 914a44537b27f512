//! Two flanneld on each host, as upstream's own tests have it: another prefix, another subnet file, another backend or VNI. Neither
//! takes anything from the other, and what cannot be shared is told.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::PREFIX;
use flannel_tests::{Daemon, Host, Lab, eventually, in_lab, ping, ping_within, secs, unchanged};

const FOLLOW: Duration = Duration::from_secs(30);

/// A flanneld: its prefix, its subnet file, its config, and the device that leads to the other host.
struct One {
    prefix: &'static str,
    file: &'static str,
    config: &'static str,
    device: &'static str,
}

const VXLAN: One = One {
    prefix: PREFIX,
    file: "/run/flannel/subnet.env",
    config: r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#,
    device: "flannel.1",
};
const HOST_GW: One = One {
    prefix: "/hostgw/network",
    file: "/run/flannel/hostgw.env",
    config: r#"{"Network":"10.2.0.0/16","Backend":{"Type":"host-gw"}}"#,
    device: "eth0",
};
const VNI_2: One = One {
    prefix: "/second/network",
    file: "/run/second/subnet.env",
    config: r#"{"Network":"10.3.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan","VNI":2,"Port":4789}}"#,
    device: "flannel.2",
};
const ALL: [One; 3] = [VXLAN, HOST_GW, VNI_2];

/// A network that somebody began with the VNI of another.
const SAME_VNI: One = One {
    prefix: "/same/network",
    file: "/run/flannel/same.env",
    config: r#"{"Network":"10.4.0.0/16","Backend":{"Type":"vxlan"}}"#,
    device: "flannel.1",
};

/// Tunnels of flanneld itself: the first has upstream's name for the device, the second one of its own.
const UDP: One = One {
    prefix: PREFIX,
    file: "/run/flannel/subnet.env",
    config: r#"{"Network":"10.100.0.0/16","Backend":{"Type":"udp"}}"#,
    device: "flannel0",
};
const UDP_2: One = One {
    prefix: "/second/network",
    file: "/run/flannel/second.env",
    config: r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":8286}}"#,
    device: "flannel-",
};
/// Another network of the same backend, with the port of the first.
const SAME_PORT: One = One {
    prefix: "/same/network",
    file: "/run/flannel/same.env",
    config: r#"{"Network":"10.4.0.0/16","Backend":{"Type":"udp"}}"#,
    device: "flannel-",
};

impl One {
    fn flags(&self, lab: &Lab) -> [String; 3] {
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        [endpoints, format!("--etcd-prefix={}", self.prefix), format!("--subnet-file={}", self.file)]
    }

    fn configure(&self, lab: &Lab) -> Result<()> {
        lab.etcdctl(&["put", &format!("{}/config", self.prefix), self.config]).map(|_| ())
    }

    fn start(&self, lab: &Lab, host: &Host, turn: &str) -> Result<Daemon> {
        let [endpoints, prefix, file] = self.flags(lab);
        let name = format!("{turn}{}", self.prefix.replace('/', "-"));
        // The guard of a tunnel goes when its flanneld is stopped; everything else stays.
        let flags = ["--iface=eth0", "--ip-masq", "--tunnel-guard=false"];
        host.spawn(&name, &[&["flanneld", &endpoints, &prefix, &file], &flags[..]].concat(), &[])
    }

    fn cleanup(&self, lab: &Lab, host: &Host) -> Result<()> {
        let [endpoints, prefix, file] = self.flags(lab);
        host.out(&["flanneld", &endpoints, &prefix, &file, "--cleanup"]).map(|_| ())
    }

    /// The gateway address of the host's subnet, `10.100.5.1/24`.
    fn gateway(&self, host: &Host) -> Result<String> {
        let text = eventually(format!("{} on {}", self.file, host.name()), FOLLOW, || host.read(self.file))?;
        let line = text.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET="));
        Ok(line.with_context(|| text.clone())?.to_owned())
    }

    /// A bridge as a runtime makes it.
    fn bridge(&self, host: &Host) -> Result<()> {
        let (name, gateway) = (self.bridge_name(), self.gateway(host)?);
        host.sh(&format!(
            "ip link add {name} type bridge; ip addr add {gateway} dev {name}; ip link set {name} up"
        ))?;
        Ok(())
    }

    fn bridge_name(&self) -> String {
        format!("br-{}", self.config.split('.').nth(1).unwrap_or_default())
    }

    /// The address of the bridge of a host.
    fn address(&self, host: &Host) -> Result<String> {
        Ok(self.gateway(host)?.split('/').next().unwrap_or_default().to_owned())
    }

    fn status(&self, lab: &Lab, host: &Host) -> Result<String> {
        let [endpoints, prefix, file] = self.flags(lab);
        Ok(host.run(&["flanneld", &endpoints, &prefix, &file, "status"])?.all())
    }
}

#[test]
fn several_flanneld_share_a_host() {
    in_lab(Lab::new("twins").etcd(), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let mut here = Vec::new();
        let mut there = Vec::new();
        for one in &ALL {
            one.configure(lab)?;
            here.push(one.start(lab, h1, "first")?);
            there.push(one.start(lab, h2, "first")?);
        }
        for one in &ALL {
            one.bridge(h1)?;
            one.bridge(h2)?;
        }
        for one in &ALL {
            let to = one.address(h2)?;
            eventually(format!("{to} by {}", one.device), FOLLOW, || {
                let way = h1.out(&["ip", "route", "get", &to])?;
                ensure!(way.contains(&format!(" dev {} ", one.device)), "{way}");
                ping(h1, &to)
            })?;
        }
        // As upstream's test has it: what is the tunnel's does not come by the plain way.
        let forced = h1.run(&["ping", "-n", "-c", "1", "-W", "1", "-I", "eth0", &VXLAN.address(h2)?])?;
        ensure!(!forced.ok(), "{forced:?}");
        let rules = h1.sh("iptables-save")?;
        for network in ["10.100.0.0/16", "10.2.0.0/16"] {
            let accept =
                format!("-A FLANNEL-FWD -s {network} -m comment --comment \"flanneld forward\" -j ACCEPT");
            ensure!(rules.matches(&accept).count() == 1, "{accept}\n{rules}");
            let masquerade = format!("-A FLANNEL-POSTRTG -s {network} ! -d 224.0.0.0/4 ");
            ensure!(rules.matches(&masquerade).count() == 1, "{masquerade}\n{rules}");
        }
        ensure!(h1.sh("nft list ruleset")?.contains("table ip flannel-ipv4"));
        restarts(lab, h1, &mut here)?;
        conflicts(lab, h1)?;
        leaving(lab, [h1, h2], there)
    });
}

#[test]
fn two_tunnels_of_udp_share_a_host_by_their_ports() {
    in_lab(Lab::new("udp-twins").etcd(), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let both = [UDP, UDP_2];
        let mut daemons = Vec::new();
        for one in &both {
            one.configure(lab)?;
            for host in [h1, h2] {
                daemons.push(one.start(lab, host, "first")?);
                one.bridge(host)?;
            }
        }
        let reached = |one: &One| {
            let to = one.address(h2)?;
            eventually(format!("{to} by {}", one.device), FOLLOW, || {
                let way = h1.out(&["ip", "route", "get", &to])?;
                ensure!(way.contains(&format!(" dev {}", one.device)), "{way}");
                ping(h1, &to)
            })
        };
        both.iter().try_for_each(reached)?;

        SAME_PORT.configure(lab)?;
        let wrong = SAME_PORT.start(lab, h1, "wrong")?;
        wrong.wait_log("could not receive on 10.77.0.11:8285", FOLLOW)?;
        ensure!(wrong.log().contains("Backend.Port"), "{}", wrong.log());
        wrong.stop(secs(10))?;
        SAME_PORT.cleanup(lab, h1)?;
        both.iter().try_for_each(reached)?;

        // The first goes, on both hosts; the second does not notice.
        for first in daemons.drain(..2) {
            first.stop(secs(10))?;
        }
        ensure!(!h1.exists("/sys/class/net/flannel0"), "{}", h1.network_state()?);
        ping_within(secs(2), h1, &UDP_2.address(h2)?)
    });
}

/// One that starts again changes nothing of the others.
fn restarts(lab: &Lab, host: &Host, daemons: &mut [Daemon]) -> Result<()> {
    let before = host.network_state()?;
    for (one, daemon) in ALL.iter().zip(daemons) {
        daemon.stop(secs(10))?;
        unchanged(format!("{} stopped", one.prefix), &before, &host.network_state()?)?;
        *daemon = one.start(lab, host, "again")?;
        daemon.wait_log("flannel is ready", FOLLOW)?;
        unchanged(format!("{} again", one.prefix), &before, &host.network_state()?)?;
        let status = one.status(lab, host)?;
        ensure!(status.contains("flanneld (process ") && status.contains(one.file), "{status}");
    }
    Ok(())
}

/// What is another's is told by its name, once, and stays as it is.
fn conflicts(lab: &Lab, host: &Host) -> Result<()> {
    const DEVICE: &str = "ip -d -o link show flannel.1; ip -o addr show flannel.1; ip route show dev flannel.1; \
        bridge fdb show dev flannel.1; ip neigh show dev flannel.1";
    let before = host.sh(DEVICE)?;
    SAME_VNI.configure(lab)?;
    let key = format!("{}/subnets/10.4.77.0-24", SAME_VNI.prefix);
    let peer = r#"{"PublicIP":"10.77.0.12","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:07"}}"#;
    lab.etcdctl(&["put", &key, peer])?;
    let wrong = SAME_VNI.start(lab, host, "wrong")?;
    wrong.wait_log("this is network default's device", FOLLOW)?;
    let said = wrong.log();
    ensure!(said.contains("Backend.VNI of its own") && said.contains("more changes wait for it"), "{said}");
    // Address, settings, neighbor, forwarding entry, route: none of them has a line.
    ensure!(said.lines().filter(|line| line.contains(" ERROR ")).count() == 1, "{said}");
    wrong.stop(secs(10))?;
    SAME_VNI.cleanup(lab, host)?;
    unchanged("flannel.1", &before, &host.sh(DEVICE)?)?;

    // Another prefix, and a subnet file that is taken.
    let file = format!("--subnet-file={}", HOST_GW.file);
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let second =
        host.spawn("second", &["flanneld", &endpoints, "--etcd-prefix=/x", &file, "--iface=eth0"], &[])?;
    second.wait_log(&format!("which writes {}", HOST_GW.file), FOLLOW)?;
    ensure!(second.log().contains("E116"), "{}", second.log());
    second.stop(secs(10)).map(|_| ())
}

/// Who goes for good takes what is his.
fn leaving(lab: &Lab, [h1, h2]: [&Host; 2], mut daemons: Vec<Daemon>) -> Result<()> {
    for (place, one) in ALL.iter().enumerate() {
        daemons.remove(0).stop(secs(10))?;
        h2.sh(&format!("ip link del {}", one.bridge_name()))?;
        one.cleanup(lab, h2)?;
        let state = h2.network_state()?;
        let network = one.config.split('"').nth(3).unwrap_or_default();
        let base = network.trim_end_matches("0.0/16");
        ensure!(!state.contains(&format!(" {base}")) && !h2.exists(one.file), "{base} is left:\n{state}");
        if one.device != "eth0" {
            ensure!(!state.contains(one.device), "{state}");
        }
        for other in &ALL[place + 1..] {
            ensure!(h2.exists(other.file), "{} is gone", other.file);
            ping_within(secs(5), h1, &other.address(h2)?)?;
        }
    }
    let state = h2.network_state()?;
    ensure!(!state.to_lowercase().contains("flannel"), "{state}");
    ensure!(h2.sh("ls /var/lib/flannel /run/flannel /run/second 2>/dev/null || true")?.trim().is_empty());
    Ok(())
}
