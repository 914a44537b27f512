//! A node shared with the Go plugins: upgraded from them, rolled back to them, delegating to them.

use std::collections::BTreeSet;
use std::fs;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::{in_lab, needs};
use serde_json::{Value, json};

use crate::node::{Call, DEBIAN, Node, answer, done, error, ip_of, one_host, with};

/// What Go's chain does for this configuration: `bridge` with `host-local`, without the meta plugin (Debian has none).
fn go_conf() -> Value {
    json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "bridge", "bridge": "cni0", "isDefaultGateway": true,
            "hairpinMode": true, "mtu": 1450, "ipMasq": false,
            "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.244.1.0/24" }]], "routes": [{ "dst": "10.244.0.0/16" }] } })
}

pub(crate) fn has_debian_plugins() -> bool {
    ["bridge", "host-local", "ptp"]
        .iter()
        .all(|plugin| fs::exists(format!("{DEBIAN}/{plugin}")).unwrap_or(false))
        || needs::skipped("Debian's containernetworking-plugins in /usr/lib/cni")
}

#[test]
fn go_plugins_and_ours_share_a_node() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnigo"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let (conf, go) = (Node::conf(), go_conf());
        let bridge = format!("{DEBIAN}/bridge");
        let by_go = |verb, id| Call { plugin: &bridge, ..Call::new(verb, id) };
        for id in ["g1", "o1", "g2", "o2"] {
            node.container(id)?;
        }
        // Before the upgrade there is only Go. Its meta plugin would keep the delegate's configuration.
        let before = answer(&node.call(&by_go("ADD", "g1"), &go)?)?;
        host.write("/var/lib/cni/flannel/g1", go.to_string())?;
        let mac = host
            .sh("cat /sys/class/net/cni0/address 2>/dev/null || ip -br link show cni0 | awk '{print $3}'")?;
        // Then both, in turns, on one ledger.
        let o1 = node.add("o1", &conf)?;
        let g2 = answer(&node.call(&by_go("ADD", "g2"), &go)?)?;
        let o2 = node.add("o2", &conf)?;
        let ips: Vec<String> = [&before, &o1, &g2, &o2].into_iter().map(ip_of).collect();
        ensure!(ips == ["10.244.1.2", "10.244.1.3", "10.244.1.4", "10.244.1.5"], "{ips:?}");
        ensure!(
            o1["interfaces"][0]["mac"] == mac.as_str(),
            "the bridge's MAC changed under its containers: {o1} {mac}"
        );
        for (from, to) in [("g1", &ips[1]), ("o1", &ips[2]), ("g2", &ips[3]), ("o2", &ips[0])] {
            node.ping(from, to)?;
        }
        done(&node.call(&Call::new("CHECK", "g1"), &with(&conf, "prevResult", before.clone()))?)?;
        // Debian's plugins look for routes without a gateway in vain, their own included.
        let o1 = with(&o1, "routes", json!([]));
        done(&node.call(&by_go("CHECK", "o1"), &with(&go, "prevResult", o1))?).context("Go checks ours")?;
        // Each takes down what the other made: ours Go's, by namespace...
        node.del("g1", &conf)?;
        ensure!(host.sh("ls /var/lib/cni/flannel")? == "o1\no2");
        // ...and without, by the result...
        let gone = Call { netns: String::new(), ..Call::new("DEL", "g2") };
        done(&node.call(&gone, &with(&conf, "prevResult", g2))?)?;
        // ...and Go ours, with what we kept for it.
        let kept: Value = serde_json::from_str(&host.read("/var/lib/cni/flannel/o1")?)?;
        done(&node.call(&by_go("DEL", "o1"), &kept)?)?;
        ensure!(node.ledger()? == ["10.244.1.5"], "{:?}", node.ledger()?);
        ensure!(node.links()?.matches("veth").count() == 1, "{}", node.links()?);
        node.del("o2", &conf)?;
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn rules_of_go_containers_go_with_them() {
    if !has_debian_plugins() || !needs::require("iptables") {
        return;
    }
    in_lab(one_host("cnigomasq"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let go = with(&go_conf(), "ipMasq", json!(true));
        let bridge = format!("{DEBIAN}/bridge");
        node.container("g1")?;
        answer(&node.call(&Call { plugin: &bridge, ..Call::new("ADD", "g1") }, &go)?)?;
        host.write("/var/lib/cni/flannel/g1", go.to_string())?;
        ensure!(host.sh("iptables -t nat -S")?.contains("CNI-"));
        node.del("g1", &Node::conf())?;
        ensure!(!host.sh("iptables -t nat -S")?.contains("CNI-"), "{}", host.sh("iptables -t nat -S")?);
        ensure!(node.ledger()?.is_empty() && host.sh("ls /var/lib/cni/flannel")?.is_empty());
        Ok(())
    });
}

#[test]
fn host_local_and_ours_at_once_share_nothing_twice() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnimixed"), |lab| {
        let node = Node::new(lab.host(1))?;
        let (conf, go) = (Node::conf(), go_conf());
        let local = format!("{DEBIAN}/host-local");
        const EACH: usize = 12;
        for n in 0..EACH {
            node.container(&format!("o{n}"))?;
        }
        let taken: Vec<String> = thread::scope(|scope| {
            let threads: Vec<_> = (0..2 * EACH)
                .map(|n| {
                    let (node, conf, go, local) = (&node, &conf, &go, local.as_str());
                    scope.spawn(move || -> Result<String> {
                        if n % 2 == 0 {
                            return Ok(ip_of(&node.add(&format!("o{}", n / 2), conf)?));
                        }
                        let id = format!("g{}", n / 2);
                        let call = Call {
                            plugin: local,
                            netns: "/run/netns/o0".to_owned(),
                            ..Call::new("ADD", &id)
                        };
                        Ok(ip_of(&answer(&node.call(&call, go)?)?))
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("a call panicked")).collect::<Result<_>>()
        })?;
        let distinct: BTreeSet<&String> = taken.iter().collect();
        ensure!(distinct.len() == 2 * EACH && node.ledger()?.len() == 2 * EACH, "{taken:?}");
        for n in 0..EACH {
            node.del(&format!("o{n}"), &conf)?;
            let id = format!("g{n}");
            done(&node.call(&Call { plugin: &local, ..Call::new("DEL", &id) }, &go)?)?;
        }
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn other_delegates_are_executed() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cniptp"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = with(&Node::conf(), "delegate", json!({ "type": "ptp", "ipMasq": false }));
        node.container("c1")?;
        let result = node.add("c1", &conf)?;
        ensure!(ip_of(&result) == "10.244.1.2", "{result}");
        ensure!(host.read("/var/lib/cni/flannel/c1")?.contains("\"type\":\"ptp\""));
        ensure!(!node.links()?.contains("cni0"), "a bridge nobody asked for");
        // Debian's plugins look for routes without a gateway in vain.
        let result = with(&result, "routes", json!([]));
        let check = || node.call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", result.clone()));
        done(&check()?)?;
        host.sh("ip -n c1 addr flush dev eth0")?;
        let (_, text) = error(&check()?)?;
        ensure!(text.contains("failed to delegate to /usr/lib/cni/ptp"), "{text}");
        node.del("c1", &conf)?;
        node.del("c1", &conf)?;
        ensure!(node.ledger()?.is_empty() && host.sh("ls /var/lib/cni/flannel")?.is_empty());
        let absent = with(&conf, "delegate", json!({ "type": "nosuch" }));
        let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &absent)?)?;
        ensure!(
            code == 7
                && text.contains("failed to find plugin \"nosuch\" in path [/opt/cni/bin /usr/lib/cni]"),
            "{code} {text}"
        );
        let (_, text) = error(
            &node
                .call(&Call::new("ADD", "c1"), &with(&conf, "delegate", json!({ "type": "host-device" })))?,
        )?;
        ensure!(text.contains("failed to delegate to /usr/lib/cni/host-device"), "{text}");
        ensure!(host.sh("ls /var/lib/cni/flannel")?.is_empty(), "a failed ADD left its file");
        if node.links()?.contains("veth") {
            bail!("a veth is left:\n{}", node.links()?);
        }
        Ok(())
    });
}
