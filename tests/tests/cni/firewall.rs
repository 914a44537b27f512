//! The plugin named `firewall`, and `ingressPolicy` as part of `flannel`: who may forward, and which bridges keep to themselves.

use std::thread;

use anyhow::{Context, Result, ensure};
use flannel_tests::{Host, in_lab, needs};
use serde_json::{Value, json};

use crate::go::has_debian_plugins;
use crate::node::{Call, DEBIAN, Node, answer, done, error, ip_of, one_host, ours, with};

/// A namespace behind the host, as another machine of its network is.
fn outside(host: &Host) -> Result<()> {
    host.sh(
        "ip netns add out; ip link add towards-out type veth peer name eth0 netns out; ip addr add 192.0.2.1/24 dev towards-out
         ip link set towards-out up; ip -n out addr add 192.0.2.2/24 dev eth0; ip -n out link set eth0 up
         ip -n out route add default via 192.0.2.1; sysctl -q -w net.ipv4.ip_forward=1",
    )
    .map(drop)
}

/// A network as nerdctl makes them, less its ports: Go's bridge, and the firewall behind it.
struct Network {
    bridge: Value,
    firewall: Value,
}

impl Network {
    fn new(n: u8, policy: &str) -> Self {
        let (name, bridge) = (format!("net{n}"), format!("br{n}"));
        Self {
            bridge: json!({ "name": name, "cniVersion": "1.0.0", "type": "bridge", "bridge": bridge, "isGateway": true,
                "ipam": { "type": "host-local", "routes": [{ "dst": "0.0.0.0/0" }],
                          "ranges": [[{ "subnet": format!("10.4.{n}.0/24") }]] } }),
            firewall: json!({ "name": name, "cniVersion": "1.0.0", "type": "firewall", "ingressPolicy": policy }),
        }
    }

    /// Both plugins, one after the other. The answer is the address.
    fn add(&self, node: &Node<'_>, id: &str) -> Result<String> {
        let (bridge, firewall) = (format!("{DEBIAN}/bridge"), ours(node.host, "firewall")?);
        node.container(id)?;
        let made = answer(&node.call(&Call { plugin: &bridge, ..Call::new("ADD", id) }, &self.bridge)?)?;
        let conf = with(&self.firewall, "prevResult", made.clone());
        let passed = answer(&node.call(&Call { plugin: &firewall, ..Call::new("ADD", id) }, &conf)?)?;
        ensure!(passed == made, "{passed}");
        done(&node.call(&Call { plugin: &firewall, ..Call::new("CHECK", id) }, &conf)?)?;
        Ok(ip_of(&made))
    }
}

fn unreachable(node: &Node<'_>, from: &str, to: &str) -> Result<()> {
    ensure!(node.ping(from, to).is_err(), "{from} reaches {to}");
    Ok(())
}

fn isolation(host: &Host) -> Result<String> {
    host.sh("nft list table inet flannel_cni_isolation 2>/dev/null || true")
}

#[test]
fn bridges_keep_to_themselves() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnifw"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        outside(host)?;
        let (first, second, open) =
            (Network::new(1, "same-bridge"), Network::new(2, "same-bridge"), Network::new(3, ""));
        let (a, b) = (first.add(&node, "a")?, first.add(&node, "b")?);
        let (c, o) = (second.add(&node, "c")?, open.add(&node, "o")?);
        // Within a bridge, to a bridge that says nothing, and to other machines and back.
        for (from, to) in [("a", &b), ("a", &o), ("o", &a), ("o", &c)] {
            node.ping(from, to)?;
        }
        node.ping("c", "192.0.2.2")?;
        node.ping("out", &a)?;
        unreachable(&node, "a", &c)?;
        unreachable(&node, "c", &b)?;
        let written = isolation(host)?;
        // Nothing more for the next container, and nothing less after the last.
        first.add(&node, "d")?;
        ensure!(isolation(host)? == written);

        let isolated =
            Network { firewall: with(&first.firewall, "ingressPolicy", json!("isolated")), ..first };
        let (e, f) = (isolated.add(&node, "e")?, isolated.add(&node, "f")?);
        unreachable(&node, "e", &f)?;
        unreachable(&node, "f", &e)?;
        node.ping("e", "192.0.2.2")?;
        node.ping("e", "10.4.1.1")?;
        // A network that is removed is forgotten with the next one that comes.
        host.sh("ip link del br2")?;
        Network::new(4, "same-bridge").add(&node, "g")?;
        let written = isolation(host)?;
        ensure!(!written.contains("br2") && written.contains("br1") && written.contains("br4"), "{written}");
        Ok(())
    });
}

#[test]
fn networks_made_at_once_are_all_remembered() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnifwmany"), |lab| {
        let node = Node::new(lab.host(1))?;
        const MANY: u8 = 8;
        let made: Vec<Result<String>> = thread::scope(|scope| {
            let node = &node;
            let threads: Vec<_> = (1..=MANY)
                .map(|n| scope.spawn(move || Network::new(n, "same-bridge").add(node, &format!("c{n}"))))
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("a call panicked")).collect()
        });
        made.into_iter().collect::<Result<Vec<_>>>()?;
        let written = isolation(node.host)?;
        for n in 1..=MANY {
            ensure!(written.contains(&format!("oifname \"br{n}\" drop")), "br{n} is missing:\n{written}");
        }
        Ok(())
    });
}

/// Containers forward although FORWARD drops, whichever iptables keeps it.
fn forwards_although_dropped(lab: &str, iptables: &'static str) {
    if !has_debian_plugins() || !needs::require(iptables) {
        return;
    }
    in_lab(one_host(lab), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        outside(host)?;
        let network = Network::new(1, "");
        let bridge = format!("{DEBIAN}/bridge");
        node.container("plain")?;
        answer(&node.call(&Call { plugin: &bridge, ..Call::new("ADD", "plain") }, &network.bridge)?)?;
        node.ping("plain", "192.0.2.2")?;
        host.sh(&format!("{iptables} -P FORWARD DROP"))?;
        unreachable(&node, "plain", "192.0.2.2")?;
        let a = network.add(&node, "a")?;
        node.ping("a", "192.0.2.2")?;
        node.ping("out", &a)?;
        let rules = host.sh(&format!("{iptables} -S"))?;
        ensure!(rules.contains("-s 10.4.1.0/24") && rules.contains("-d 10.4.1.0/24"), "{rules}");
        network.add(&node, "b")?;
        ensure!(host.sh(&format!("{iptables} -S"))? == rules, "another container needed rules of its own");
        // What somebody flushes is told and made again.
        host.sh(&format!("{iptables} -F FORWARD"))?;
        unreachable(&node, "a", "192.0.2.2")?;
        let firewall = ours(host, "firewall")?;
        let result = json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": "/run/netns/a" }],
                             "ips": [{ "interface": 0, "address": format!("{a}/24") }] });
        let conf = with(&network.firewall, "prevResult", result);
        let check = node.call(&Call { plugin: &firewall, ..Call::new("CHECK", "a") }, &conf)?;
        ensure!(error(&check)?.1.contains("10.4.1.0/24"), "{check}");
        network.add(&node, "c")?;
        node.ping("a", "192.0.2.2")
    });
}

#[test]
fn forward_is_accepted_in_nftables() {
    forwards_although_dropped("cnifwdrop", "iptables-nft");
}

#[test]
fn forward_is_accepted_in_the_older_tables() {
    forwards_although_dropped("cnifwold", "iptables-legacy");
}

#[test]
fn rules_of_gos_containers_go_with_them() {
    if !has_debian_plugins() || !needs::require("iptables-nft") {
        return;
    }
    in_lab(one_host("cnifwgo"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let network = Network::new(1, "");
        let (bridge, go) = (format!("{DEBIAN}/bridge"), format!("{DEBIAN}/firewall"));
        let firewall = ours(host, "firewall")?;
        let mut confs = Vec::new();
        for id in ["g1", "g2"] {
            node.container(id)?;
            let made =
                answer(&node.call(&Call { plugin: &bridge, ..Call::new("ADD", id) }, &network.bridge)?)?;
            let conf = with(&with(&network.firewall, "prevResult", made), "backend", json!("iptables"));
            answer(&node.call(&Call { plugin: &go, ..Call::new("ADD", id) }, &conf)?)?;
            confs.push(conf);
        }
        let rules = || host.sh("iptables-nft -S CNI-FORWARD");
        ensure!(rules()?.matches("10.4.1.2/32").count() == 2, "{}", rules()?);
        for _ in 0..2 {
            done(&node.call(
                &Call { plugin: &firewall, ..Call::new("DEL", "g1") },
                confs.first().context("one")?,
            )?)?;
        }
        let left = rules()?;
        ensure!(!left.contains("10.4.1.2/32") && left.matches("10.4.1.3/32").count() == 2, "{left}");
        Ok(())
    });
}

#[test]
fn rules_of_upstreams_go_from_either_iptables_and_nothing_else_does() {
    if !needs::require("iptables-nft") || !needs::require("iptables-legacy") {
        return;
    }
    in_lab(one_host("cnifwboth"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let firewall = ours(host, "firewall")?;
        // As upstream writes them, for this container and for one whose address begins alike.
        let rule = |ip: &str| {
            format!(
                "-A CNI-FORWARD -d {ip}/32 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A CNI-FORWARD -s {ip}/32 -j ACCEPT\n"
            )
        };
        for iptables in ["iptables-nft", "iptables-legacy"] {
            let text = format!(
                "*filter\n:CNI-FORWARD - [0:0]\n-A FORWARD -s 10.4.1.2/32 -j ACCEPT\n{}{}COMMIT\n",
                rule("10.4.1.2"),
                rule("10.4.1.20")
            );
            host.write("/run/rules", text)?;
            host.sh(&format!("{iptables}-restore < /run/rules"))?;
        }
        let result = json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": "/run/netns/a" }],
                             "ips": [{ "interface": 0, "address": "10.4.1.2/24" }] });
        let conf = with(&Network::new(1, "").firewall, "prevResult", result);
        for _ in 0..2 {
            done(
                &node.call(
                    &Call { plugin: &firewall, netns: String::new(), ..Call::new("DEL", "a") },
                    &conf,
                )?,
            )?;
            for iptables in ["iptables-nft", "iptables-legacy"] {
                let left = host.sh(&format!("{iptables} -S"))?;
                ensure!(
                    left.matches("10.4.1.2/32").count() == 1 && left.contains("-A FORWARD -s 10.4.1.2/32"),
                    "{left}"
                );
                ensure!(left.matches("10.4.1.20/32").count() == 2, "{left}");
            }
        }
        Ok(())
    });
}

#[test]
fn flannel_keeps_its_bridge_to_itself() {
    in_lab(one_host("cnifwfl"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let conf = with(&Node::conf(), "ingressPolicy", json!("isolated"));
        for id in ["c1", "c2"] {
            node.container(id)?;
        }
        let (first, second) = (node.add("c1", &conf)?, node.add("c2", &conf)?);
        unreachable(&node, "c1", &ip_of(&second))?;
        node.ping("c1", "10.244.1.1")?;
        let check = || node.call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", first.clone()));
        done(&check()?)?;
        let end = first["interfaces"][1]["name"].as_str().context("no host end")?;
        for damage in [format!("bridge link set dev {end} isolated off"), "nft flush ruleset".to_owned()] {
            host.sh(&damage)?;
            ensure!(error(&check()?)?.1.contains("isolated"), "{damage}");
        }
        for id in ["c1", "c2"] {
            node.del(id, &conf)?;
        }
        let (code, text) =
            error(&node.call(&Call::new("ADD", "c1"), &with(&conf, "ingressPolicy", json!("closed")))?)?;
        ensure!(code == 7 && text.contains("unknown ingress policy: \"closed\""), "{text}");
        let firewall = ours(host, "firewall")?;
        let about = host.run(&[firewall.as_str()])?;
        // nerdctl cuts this prefix off and reads the rest of the line as a version, which it wants to be 1.7.1 at least.
        let version = about.stderr.lines().next().and_then(|line| line.strip_prefix("CNI firewall plugin v"));
        let parts: Vec<u32> = version
            .and_then(|version| version.split('+').next())
            .map(|version| version.split('.').filter_map(|part| part.parse().ok()).collect())
            .unwrap_or_default();
        ensure!(parts.len() == 3 && parts >= vec![1, 7, 1], "{about}");
        Ok(())
    });
}
