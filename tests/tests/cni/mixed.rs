//! One node, two generations of plugins: containers that one made are taken down by the other, with nothing left and
//! nothing of others touched.

use anyhow::{Context, Result, ensure};
use flannel_tests::{Host, in_lab, needs};
use serde_json::{Value, json};

use crate::go::has_debian_plugins;
use crate::node::{Call, DEBIAN, Node, V4, answer, done, ip_of, one_host, with};

/// A chain of plugins: what is executed, and its part of the configuration.
type Chain = Vec<(String, Value)>;

/// What kube-flannel ships: no result is given at DEL in this version, only the capabilities are.
const VERSION: &str = "0.3.1";

/// Go's flannel chain, as it runs `bridge` and `host-local` with FLANNEL_IPMASQ=false, and `portmap` behind it.
fn go(port: u16) -> Chain {
    vec![(format!("{DEBIAN}/bridge"), go_bridge()), (format!("{DEBIAN}/portmap"), portmap(port))]
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

/// The same node after the binary `flannel` was replaced.
fn ours(port: u16) -> Chain {
    vec![("flannel".to_owned(), flannel()), (format!("{DEBIAN}/portmap"), portmap(port))]
}

fn flannel() -> Value {
    json!({ "type": "flannel", "delegate": { "hairpinMode": true, "isDefaultGateway": true } })
}

fn whole(part: &Value) -> Value {
    with(&with(part, "name", json!("cbr0")), "cniVersion", json!(VERSION))
}

fn add(node: &Node<'_>, id: &str, chain: &Chain) -> Result<Value> {
    let mut result = Value::Null;
    for (plugin, part) in chain {
        let mut conf = whole(part);
        if !result.is_null() {
            conf["prevResult"] = result;
        }
        let output = node.call(&Call { plugin, ..Call::new("ADD", id) }, &conf)?;
        result = answer(&output).with_context(|| format!("{plugin} adds {id}"))?;
        if plugin.ends_with("/bridge") {
            // As Go's flannel, which Debian does not have.
            node.host.write(&format!("/var/lib/cni/flannel/{id}"), whole(part).to_string())?;
        }
    }
    Ok(result)
}

fn del(node: &Node<'_>, id: &str, chain: &Chain) -> Result<()> {
    for (plugin, part) in chain.iter().rev() {
        let scratch = format!("/var/lib/cni/flannel/{id}");
        let go = plugin.ends_with("/bridge");
        if go && !node.host.exists(&scratch) {
            continue;
        }
        // Go's flannel hands its delegate what it kept, which may be what we kept.
        let conf = if go { serde_json::from_str(&node.host.read(&scratch)?)? } else { whole(part) };
        let output = node.call(&Call { plugin, ..Call::new("DEL", id) }, &conf)?;
        done(&output).with_context(|| format!("{plugin} deletes {id}"))?;
        ensure!(output.stderr.is_empty() || go || plugin.starts_with('/'), "{output}");
        if go {
            node.host.sh(&format!("rm {scratch}"))?;
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
        let (go, ours) = (go(8080), ours(8081));
        let ports = |port| vec![go[0].clone(), (go[1].0.clone(), portmap(port))];
        // Go alone.
        let mut results = vec![
            ("g1", add(&node, "g1", &ports(8001))?),
            ("g2", add(&node, "g2", &ports(8002))?),
            ("g3", add(&node, "g3", &ports(8003))?),
        ];
        let of_g2 = |rules: &[String]| -> Vec<String> {
            rules.iter().filter(|rule| rule.contains("id: \\\"g2\\\"")).cloned().collect()
        };
        let before = rules(host)?;
        ensure!(of_g2(&before).len() >= 4, "{before:#?}");
        // The upgrade. No address twice, everybody is reached, and reaches out.
        results.push(("o1", add(&node, "o1", &ours)?));
        results.push(("o2", add(&node, "o2", &vec![ours[0].clone()])?));
        let mut ips: Vec<String> = results.iter().map(|(_, result)| ip_of(result)).collect();
        ips.dedup();
        ensure!(ips == ["10.244.1.2", "10.244.1.3", "10.244.1.4", "10.244.1.5", "10.244.1.6"], "{ips:?}");
        for (from, to) in [("g1", 3), ("g2", 4), ("o1", 0), ("o2", 1)] {
            node.ping(from, &ips[to])?;
            node.ping(from, &outside)?;
        }
        // What Go made is checked (from 0.4.0 on) by ours...
        let newer = with(&whole(&flannel()), "cniVersion", json!("1.0.0"));
        for (id, result) in &results {
            let result = with(result, "cniVersion", json!("1.0.0"));
            let output = node.call(&Call::new("CHECK", id), &with(&newer, "prevResult", result))?;
            done(&output).with_context(|| (*id).to_owned())?;
        }
        // ...and deleted: with its namespace there, and with nothing but its name.
        del(&node, "g1", &ours)?;
        host.sh("ip netns del g3")?;
        let gone = Call { netns: String::new(), ..Call::new("DEL", "g3") };
        done(&node.call(&gone, &whole(&flannel()))?)?;
        let now = rules(host)?;
        ensure!(of_g2(&now) == of_g2(&before), "{before:#?}\nbecame\n{now:#?}");
        ensure!(
            !now.iter().any(|rule| rule.contains("\\\"g1\\\"") || rule.contains("\\\"g3\\\"")),
            "{now:#?}"
        );
        ensure!(node.ledger()? == ["10.244.1.3", "10.244.1.5", "10.244.1.6"], "{:?}", node.ledger()?);
        node.ping("g2", &outside)?;
        // Back to Go: it adds beside ours, and deletes ours by what we kept for it.
        let g4 = add(&node, "g4", &ports(8004))?;
        ensure!(ip_of(&g4) == "10.244.1.7", "{g4}");
        node.ping("g4", &ips[3])?;
        del(&node, "o1", &go)?;
        del(&node, "g2", &go)?;
        // And again to ours, for the rest.
        add(&node, "o3", &ours)?;
        for id in ["o2", "o3", "g4"] {
            del(&node, id, &ours)?;
            del(&node, id, &ours)?;
        }
        nothing_is_left(&node)
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
            for (plugin, part) in go(8080) {
                let name = plugin.rsplit('/').next().unwrap_or_default().to_owned();
                let file = format!("/run/{variant}/{name}");
                let links =
                    "iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore";
                host.write(&file, format!("#!/bin/sh\nexec env PATH=/run/{variant}:$PATH {plugin}\n"))?;
                host.sh(&format!(
                    "chmod 755 {file}; for l in {links}; do ln -sf $(command -v xtables-{variant}-multi) /run/{variant}/$l; done"
                ))?;
                chain.push((file, part));
            }
            for id in ["g1", "g2"] {
                node.container(id)?;
                let port = if id == "g1" { 8001 } else { 8002 };
                let chain = vec![chain[0].clone(), (chain[1].0.clone(), portmap(port))];
                add(&node, id, &chain)?;
            }
            let listed = host.sh(&format!("iptables-{variant} -t nat -S"))?;
            ensure!(listed.matches("-N CNI-").count() >= 4, "{variant} is not what was written:\n{listed}");
            // `portmap` is in the chain no more; then the chain is as it was.
            del(&node, "g1", &vec![("flannel".to_owned(), flannel())])?;
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
        host.write("/var/lib/cni/flannel/g1", whole(&go_bridge()).to_string())?;
        node.container("g1")?;
        node.del("g1", &whole(&flannel()))?;
        let left = host.sh("nft list ruleset")?;
        ensure!(
            left.matches("id: g11\"").count() == 1 && left.matches("comment \"g11\"").count() == 1,
            "{left}"
        );
        ensure!(!left.contains("id: g1\"") && !left.contains("\"g1\""), "{left}");
        Ok(())
    });
}
