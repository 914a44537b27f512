//! One node, two generations of plugins: containers that one made are taken down by the other, with nothing left and
//! nothing of others touched.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use flannel_tests::{Host, Lab, eventually, http_get, in_lab, needs, secs};
use serde_json::{Value, json};

use crate::go::has_debian_plugins;
use crate::node::{Call, DEBIAN, Node, V4, answer, done, ip_of, one_host, with};

/// A plugin of a chain.
#[derive(Clone)]
struct Stage {
    /// What is executed.
    plugin: String,
    /// Its part of the configuration.
    part: Value,
    /// Whether a file is kept for DEL, as Go's flannel does for the plugin that it executes; Debian has no flannel.
    kept: bool,
}

impl Stage {
    fn new(plugin: impl Into<String>, part: Value) -> Self {
        Self { plugin: plugin.into(), part, kept: false }
    }
}

type Chain = Vec<Stage>;

/// Go's flannel and what it tells `bridge` where FLANNEL_IPMASQ=false.
fn go_flannel() -> Stage {
    Stage { kept: true, ..Stage::new(format!("{DEBIAN}/bridge"), go_bridge()) }
}

fn go_portmap(port: u16) -> Stage {
    Stage::new(format!("{DEBIAN}/portmap"), portmap(port))
}

fn our_flannel() -> Stage {
    Stage::new("flannel", flannel())
}

fn go(port: u16) -> Chain {
    vec![go_flannel(), go_portmap(port)]
}

/// The same node after the binary `flannel` was replaced.
fn ours(port: u16) -> Chain {
    vec![our_flannel(), go_portmap(port)]
}

fn go_bridge() -> Value {
    json!({ "type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "isGateway": true, "hairpinMode": true, "mtu": 1450,
            "ipMasq": true, "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.244.1.0/24" }]],
            "routes": [{ "dst": "10.244.0.0/16" }] } })
}

fn portmap(port: u16) -> Value {
    json!({ "type": "portmap", "capabilities": { "portMappings": true },
            "runtimeConfig": { "portMappings": [{ "hostPort": port, "containerPort": 80, "protocol": "tcp" }] } })
}

fn flannel() -> Value {
    json!({ "type": "flannel", "delegate": { "hairpinMode": true, "isDefaultGateway": true } })
}

/// What kube-flannel ships: no result is given at DEL in this version, only the capabilities are.
const OLD: &str = "0.3.1";
const NEW: &str = "1.0.0";

fn whole(part: &Value, version: &str) -> Value {
    with(&with(part, "name", json!("cbr0")), "cniVersion", json!(version))
}

fn scratch(id: &str) -> String {
    format!("/var/lib/cni/flannel/{id}")
}

fn add(node: &Node<'_>, id: &str, chain: &[Stage]) -> Result<Value> {
    add_in(OLD, node, id, chain)
}

fn add_in(version: &str, node: &Node<'_>, id: &str, chain: &[Stage]) -> Result<Value> {
    let mut result = Value::Null;
    for stage in chain {
        let mut conf = whole(&stage.part, version);
        if stage.kept {
            node.host.write(&scratch(id), conf.to_string())?;
        }
        if !result.is_null() {
            conf["prevResult"] = result;
        }
        let output = node.call(&Call { plugin: &stage.plugin, ..Call::new("ADD", id) }, &conf)?;
        result = answer(&output).with_context(|| format!("{} adds {id}", stage.plugin))?;
    }
    Ok(result)
}

fn del(node: &Node<'_>, id: &str, chain: &[Stage]) -> Result<()> {
    del_with(None, node, id, chain)
}

/// With what ADD printed, as libcni gives it in newer versions.
fn del_with(result: Option<&Value>, node: &Node<'_>, id: &str, chain: &[Stage]) -> Result<()> {
    for stage in chain.iter().rev() {
        if stage.kept && !node.host.exists(&scratch(id)) {
            continue;
        }
        // What was kept may be what we kept.
        let conf = match stage.kept {
            true => serde_json::from_str(&node.host.read(&scratch(id))?)?,
            false => match result {
                Some(result) => with(&whole(&stage.part, NEW), "prevResult", result.clone()),
                None => whole(&stage.part, OLD),
            },
        };
        let call = || node.call(&Call { plugin: &stage.plugin, ..Call::new("DEL", id) }, &conf);
        let mut output = call()?;
        // Go's bridge before 1.6 stumbles over a chain that never was, at its very end: runtimes call again, and all is well.
        if stage.plugin == format!("{DEBIAN}/bridge") && output.stdout.contains("does not exist") {
            output = call()?;
        }
        done(&output).with_context(|| format!("{} deletes {id}", stage.plugin))?;
        ensure!(stage.plugin.starts_with(DEBIAN) || output.stderr.is_empty(), "{output}");
        if stage.kept {
            node.host.sh(&format!("rm {}", scratch(id)))?;
        }
    }
    Ok(())
}

/// Lines that belong to one container only: chains of iptables, rules of nftables.
fn rules(host: &Host) -> Result<Vec<String>> {
    let text = host.sh(
        "for f in iptables-nft ip6tables-nft iptables-legacy; do command -v $f >/dev/null && $f -t nat -S 2>/dev/null || true; done; \
         nft list table inet cni_plugins_masquerade 2>/dev/null || true",
    )?;
    let own = |word: &str| word.starts_with("CNI-") && !word.starts_with("CNI-HOSTPORT-");
    let ours = |line: &&str| line.split(' ').any(own) || line.contains("masquerade comment");
    Ok(text.lines().filter(ours).map(str::to_owned).collect())
}

fn nothing_is_left(node: &Node<'_>) -> Result<()> {
    let left = rules(node.host)?;
    ensure!(left.is_empty(), "rules are left: {left:#?}");
    ensure!(node.ledger()?.is_empty(), "leases are left: {:?}", node.ledger()?);
    ensure!(!node.links()?.contains("veth"), "links are left: {}", node.links()?);
    let files = node.host.sh("ls /var/lib/cni/flannel")?;
    ensure!(files.is_empty(), "files are left: {files}");
    Ok(())
}

fn new<'a>(host: &'a Host) -> Result<Node<'a>> {
    let node = Node::new(host)?;
    host.write("/run/flannel/subnet.env", V4.replace("IPMASQ=true", "IPMASQ=false"))?;
    Ok(node)
}

#[test]
fn a_node_is_upgraded_and_rolled_back_under_its_containers() {
    if !has_debian_plugins() || !needs::require("iptables") {
        return;
    }
    in_lab(one_host("cniupgrade").outside(), |lab| {
        let host = lab.host(1);
        let node = new(host)?;
        let outside = lab.outside().ip().to_string();
        let all = ["g1", "g2", "g3", "g4", "o1", "o2", "o3"];
        for id in all {
            node.container(id)?;
        }
        // Go alone.
        let mut results = vec![
            ("g1", add(&node, "g1", &go(8001))?),
            ("g2", add(&node, "g2", &go(8002))?),
            ("g3", add(&node, "g3", &go(8003))?),
        ];
        let of_g2 = |rules: &[String]| -> Vec<String> {
            rules.iter().filter(|rule| rule.contains("id: \\\"g2\\\"")).cloned().collect()
        };
        let before = rules(host)?;
        ensure!(of_g2(&before).len() >= 4, "{before:#?}");
        // The upgrade. No address twice, everybody is reached, and reaches out.
        results.push(("o1", add(&node, "o1", &ours(8081))?));
        results.push(("o2", add(&node, "o2", &[our_flannel()])?));
        let mut ips: Vec<String> = results.iter().map(|(_, result)| ip_of(result)).collect();
        ips.dedup();
        ensure!(ips == ["10.244.1.2", "10.244.1.3", "10.244.1.4", "10.244.1.5", "10.244.1.6"], "{ips:?}");
        for (from, to) in [("g1", 3), ("g2", 4), ("o1", 0), ("o2", 1)] {
            node.ping(from, &ips[to])?;
            node.ping(from, &outside)?;
        }
        // What Go made is checked (from 0.4.0 on) by ours...
        let newer = whole(&flannel(), NEW);
        for (id, result) in &results {
            let result = with(result, "cniVersion", json!(NEW));
            let output = node.call(&Call::new("CHECK", id), &with(&newer, "prevResult", result))?;
            done(&output).with_context(|| (*id).to_owned())?;
        }
        // ...and deleted: with its namespace there, and with nothing but its name.
        del(&node, "g1", &ours(8001))?;
        host.sh("ip netns del g3")?;
        let gone = Call { netns: String::new(), ..Call::new("DEL", "g3") };
        done(&node.call(&gone, &whole(&flannel(), OLD))?)?;
        let now = rules(host)?;
        ensure!(of_g2(&now) == of_g2(&before), "{before:#?}\nbecame\n{now:#?}");
        ensure!(
            !now.iter().any(|rule| rule.contains("\\\"g1\\\"") || rule.contains("\\\"g3\\\"")),
            "{now:#?}"
        );
        ensure!(node.ledger()? == ["10.244.1.3", "10.244.1.5", "10.244.1.6"], "{:?}", node.ledger()?);
        node.ping("g2", &outside)?;
        // Back to Go: it adds beside ours, and deletes ours by what we kept for it.
        let g4 = add(&node, "g4", &go(8004))?;
        ensure!(ip_of(&g4) == "10.244.1.7", "{g4}");
        node.ping("g4", &ips[3])?;
        del(&node, "o1", &go(8081))?;
        del(&node, "g2", &go(8002))?;
        // And again to ours, for the rest.
        add(&node, "o3", &ours(8083))?;
        for id in ["o2", "o3", "g4"] {
            del(&node, id, &ours(8004))?;
            del(&node, id, &ours(8004))?;
        }
        nothing_is_left(&node)
    });
}

/// Our binary by another plugin's name.
fn alias(host: &Host, name: &str) -> Result<String> {
    let file = format!("/run/ours/{name}");
    host.sh(&format!("mkdir -p /run/ours; ln -sf /run/lab/bin/flannel {file}"))?;
    let about = host.run(&[&file])?;
    ensure!(about.stderr.starts_with(&format!("CNI {name} plugin v")), "{about}");
    Ok(file)
}

/// A container, who made it, and who is to delete it.
struct Made {
    id: String,
    port: u16,
    ip: String,
    maker: [Stage; 2],
    breaker: [Stage; 2],
}

/// Those of the addresses that rules still name.
fn published<'a>(host: &Host, ips: &BTreeSet<&'a String>) -> Result<BTreeSet<&'a String>> {
    let rules = host.sh("nft list ruleset")?;
    let whole = |rest: &str| !rest.starts_with(|next: char| next.is_ascii_digit() || next == '/');
    let named =
        |ip: &&&String| rules.match_indices(ip.as_str()).any(|(at, _)| whole(&rules[at + ip.len()..]));
    Ok(ips.iter().filter(named).copied().collect())
}

/// Adds a container with each chain of these stages for each of them to delete: all are reached by their ports, and nothing is left.
fn every_pair(lab: &Lab, networks: &[Stage], portmaps: &[String]) -> Result<()> {
    let host = lab.host(1);
    let node = new(host)?;
    let chains: Vec<(&Stage, &String)> =
        networks.iter().flat_map(|network| portmaps.iter().map(move |portmap| (network, portmap))).collect();
    let mut containers = Vec::new();
    for (made, maker) in chains.iter().enumerate() {
        for (gone, breaker) in chains.iter().enumerate() {
            let id = format!("c{made}{gone}");
            let port = 8000 + u16::try_from(10 * made + gone)?;
            node.container(&id)?;
            let chain = |(network, plugin): &(&Stage, &String)| {
                [(*network).clone(), Stage::new(plugin.as_str(), portmap(port))]
            };
            let (maker, breaker) = (chain(maker), chain(breaker));
            let ip = ip_of(&add(&node, &id, &maker).with_context(|| id.clone())?);
            host.write(&format!("/run/www/{id}/index.html"), &id)?;
            host.sh(&format!("ip netns exec {id} busybox httpd -p 80 -h /run/www/{id}"))?;
            containers.push(Made { id, port, ip, maker, breaker });
        }
    }
    let ips: BTreeSet<&String> = containers.iter().map(|container| &container.ip).collect();
    ensure!(ips.len() == containers.len() && node.ledger()?.len() == ips.len(), "{ips:?}");
    for Made { id, port, .. } in &containers {
        let url = format!("http://{}:{port}/", host.ip());
        let got = eventually(&url, secs(20), || http_get(lab.outside(), &url))?;
        ensure!(got.trim() == id, "port {port} leads to {got}, not to {id}");
        node.ping(id, &lab.outside().ip().to_string())?;
    }
    for Made { id, breaker, .. } in &containers {
        del(&node, id, breaker).with_context(|| id.clone())?;
    }
    // Go's plugins do not know of ports that ours published. Who went back for good deletes the table; else ours finds them.
    let unknown = |maker: &[Stage], breaker: &[Stage]| {
        !maker[1].plugin.starts_with(DEBIAN) && breaker.iter().all(|stage| stage.plugin.starts_with(DEBIAN))
    };
    let expected: BTreeSet<&String> = containers
        .iter()
        .filter(|container| unknown(&container.maker, &container.breaker))
        .map(|container| &container.ip)
        .collect();
    ensure!(published(host, &ips)? == expected, "{expected:?} in\n{}", host.sh("nft list ruleset")?);
    if let Some(portmap) = portmaps.iter().find(|plugin| !plugin.starts_with(DEBIAN)) {
        let nobody = json!({ "name": "cbr0", "cniVersion": "1.1.0", "type": "portmap", "cni.dev/valid-attachments": [] });
        done(&node.call(&Call { plugin: portmap, ..Call::new("GC", "") }, &nobody)?)?;
    }
    ensure!(published(host, &ips)?.is_empty(), "{}", host.sh("nft list ruleset")?);
    nothing_is_left(&node)
}

#[test]
fn either_generation_deletes_what_either_made() {
    if !has_debian_plugins() || !needs::require("iptables") {
        return;
    }
    in_lab(one_host("cnipairs").outside(), |lab| {
        let ours = alias(lab.host(1), "portmap")?;
        every_pair(lab, &[go_flannel(), our_flannel()], &[format!("{DEBIAN}/portmap"), ours])
    });
}

#[test]
fn either_generation_of_bridge_deletes_what_either_made() {
    if !has_debian_plugins() || !needs::require("iptables") {
        return;
    }
    in_lab(one_host("cnibridges").outside(), |lab| {
        // As nerdctl and podman write it; nothing is kept in files, everything comes with each call.
        let [bridge, portmap] = ["bridge", "portmap"].map(|name| alias(lab.host(1), name));
        let networks =
            [Stage::new(format!("{DEBIAN}/bridge"), go_bridge()), Stage::new(bridge?, go_bridge())];
        lab.host(1).sh("mkdir -p /var/lib/cni/flannel")?;
        every_pair(lab, &networks, &[format!("{DEBIAN}/portmap"), portmap?])
    });
}

#[test]
fn either_variant_of_iptables_is_cleaned() {
    if !has_debian_plugins() || !needs::require("iptables-legacy") || !needs::require("iptables-nft") {
        return;
    }
    in_lab(one_host("cnivariants"), |lab| {
        let host = lab.host(1);
        let node = new(host)?;
        if host.sh("iptables-legacy -t nat -S 2>/dev/null || true")?.is_empty() {
            needs::skipped("the table nat of the older iptables in its kernel");
            return Ok(());
        }
        for variant in ["nft", "legacy"] {
            // Go's plugins run whatever `iptables` is.
            let mut chain = Chain::new();
            for stage in go(8080) {
                let plugin = &stage.plugin;
                let name = plugin.rsplit('/').next().unwrap_or_default().to_owned();
                let file = format!("/run/{variant}/{name}");
                let links =
                    "iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore";
                host.write(&file, format!("#!/bin/sh\nexec env PATH=/run/{variant}:$PATH {plugin}\n"))?;
                host.sh(&format!(
                    "chmod 755 {file}; for l in {links}; do ln -sf $(command -v xtables-{variant}-multi) /run/{variant}/$l; done"
                ))?;
                chain.push(Stage { plugin: file, ..stage });
            }
            for id in ["g1", "g2"] {
                node.container(id)?;
                let port = if id == "g1" { 8001 } else { 8002 };
                chain[1].part = portmap(port);
                add(&node, id, &chain)?;
            }
            let listed = host.sh(&format!("iptables-{variant} -t nat -S"))?;
            ensure!(listed.matches("-N CNI-").count() >= 4, "{variant} is not what was written:\n{listed}");
            // `portmap` is in the chain no more; then the chain is as it was.
            del(&node, "g1", &[our_flannel()])?;
            let left = rules(host)?;
            ensure!(left.iter().any(|rule| rule.contains("g2")), "{left:#?}");
            ensure!(!left.iter().any(|rule| rule.contains("g1")), "{left:#?}");
            del(&node, "g2", &ours(8002))?;
            nothing_is_left(&node).with_context(|| variant.to_owned())?;
            host.sh("ip netns del g1; ip netns del g2")?;
        }
        Ok(())
    });
}

#[test]
fn rules_of_the_newest_go_plugins_are_found_by_their_comments() {
    if !needs::require("sha512sum") {
        return;
    }
    in_lab(one_host("cninftmasq").needs(&["nft"]), |lab| {
        let host = lab.host(1);
        let node = new(host)?;
        // As bridge 1.9 writes them with `ipMasqBackend: nftables`, and portmap with `backend: nftables`.
        host.write("/run/make", r#"
            hash() { printf %s "$1" | sha512sum | cut -c1-16; }
            nft add table inet cni_plugins_masquerade
            nft add chain inet cni_plugins_masquerade masq_checks
            nft add table ip cni_hostport
            nft add chain ip cni_hostport hostports
            for id in g1 g11; do
                comment="$(hash cbr0)-$(hash eth0:$id), net: cbr0, if: eth0, id: $id"
                nft "add rule inet cni_plugins_masquerade masq_checks ip saddr 10.244.1.2 masquerade comment \"$comment\""
                nft "add rule ip cni_hostport hostports tcp dport 80 counter comment \"$id\""
            done"#)?;
        host.sh("sh -e /run/make")?;
        host.write("/var/lib/cni/flannel/g1", whole(&go_bridge(), OLD).to_string())?;
        node.container("g1")?;
        node.del("g1", &whole(&flannel(), OLD))?;
        let left = host.sh("nft list ruleset")?;
        ensure!(
            left.matches("id: g11\"").count() == 1 && left.matches("comment \"g11\"").count() == 1,
            "{left}"
        );
        ensure!(!left.contains("id: g1\"") && !left.contains("\"g1\""), "{left}");
        Ok(())
    });
}

/// What clusters put behind the plugin that makes the interface.
fn behind(id: &str, port: u16, by: impl Fn(&str) -> String) -> Chain {
    let part = |kind: &str, more: Value| {
        let mut part = more;
        part["type"] = json!(kind);
        Stage::new(by(kind), part)
    };
    let rates = json!({ "ingressRate": 80_000_000, "ingressBurst": 8_000_000, "egressRate": 80_000_000, "egressBurst": 8_000_000 });
    let mac = format!("0a:58:00:00:00:{id}");
    vec![
        Stage::new(by("portmap"), portmap(port)),
        part("bandwidth", json!({ "runtimeConfig": { "bandwidth": rates } })),
        part("tuning", json!({ "mac": mac, "mtu": 1400, "sysctl": { "net.ipv4.conf.all.arp_ignore": "1" } })),
        part("firewall", json!({ "backend": "iptables" })),
    ]
}

#[test]
fn whole_chains_of_both_generations_behind_either() {
    if !has_debian_plugins() || !needs::require("iptables") {
        return;
    }
    in_lab(one_host("cnichains").outside(), |lab| {
        let host = lab.host(1);
        let node = new(host)?;
        for name in ["portmap", "bandwidth", "tuning", "firewall"] {
            alias(host, name)?;
        }
        let go = |kind: &str| format!("{DEBIAN}/{kind}");
        let ours = |kind: &str| format!("/run/ours/{kind}");
        let mut containers = Vec::new();
        for (id, port, first, behind) in [
            ("a0", 8001, our_flannel(), behind("a0", 8001, go)),
            ("b0", 8002, go_flannel(), behind("b0", 8002, ours)),
            ("c0", 8003, our_flannel(), behind("c0", 8003, ours)),
        ] {
            node.container(id)?;
            let chain: Chain = [first].into_iter().chain(behind).collect();
            let result = add_in(NEW, &node, id, &chain).with_context(|| id.to_owned())?;
            ensure!(host.sh(&format!("ip -n {id} -o link show eth0"))?.contains("mtu 1400"), "{id}");
            host.write(&format!("/run/www/{id}/index.html"), id)?;
            host.sh(&format!("ip netns exec {id} busybox httpd -p 80 -h /run/www/{id}"))?;
            containers.push((id, port, chain, result));
        }
        for (id, port, chain, result) in &containers {
            let url = format!("http://{}:{port}/", host.ip());
            let got = eventually(&url, secs(20), || http_get(lab.outside(), &url))?;
            ensure!(got.trim() == *id, "port {port} leads to {got}");
            // Ours checks what it made, and is not disturbed by what the others did to it.
            for stage in chain.iter().filter(|stage| !stage.plugin.starts_with(DEBIAN)) {
                let conf = with(&whole(&stage.part, NEW), "prevResult", result.clone());
                let output = node.call(&Call { plugin: &stage.plugin, ..Call::new("CHECK", id) }, &conf)?;
                done(&output).with_context(|| format!("{} checks {id}", stage.plugin))?;
            }
        }
        for (id, _, chain, result) in &containers {
            del_with(Some(result), &node, id, chain).with_context(|| (*id).to_owned())?;
        }
        let left = host.sh("ip -o link; tc qdisc show")?;
        ensure!(!left.contains("bwp") && !left.contains("tbf"), "{left}");
        nothing_is_left(&node)
    });
}
