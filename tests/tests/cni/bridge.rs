//! What a bridge configuration can ask for, in the kernel and by traffic: of `flannel`'s delegate, and of the plugin named `bridge`.

use std::fs;

use anyhow::{Context, Result, ensure};
use flannel_tests::{Host, in_lab, needs};
use serde_json::{Value, json};

use crate::node::{Call, DEBIAN, Node, V4, answer, done, error, ip_of, one_host, ours, with};

fn has_debian(plugins: &[&str]) -> bool {
    plugins.iter().all(|plugin| fs::exists(format!("{DEBIAN}/{plugin}")).unwrap_or(false))
        || needs::skipped("Debian's containernetworking-plugins in /usr/lib/cni")
}

/// A configuration of the plugin `bridge` with one address from Debian's `static`.
fn fixed(address: &str, gateway: &str) -> Value {
    json!({ "name": "fixed", "cniVersion": "1.0.0", "type": "bridge", "bridge": "br9", "isDefaultGateway": true,
            "ipam": { "type": "static", "addresses": [{ "address": address, "gateway": gateway }] } })
}

/// As podman 4 ships it (87-podman-bridge.conflist), as libcni hands it to the plugin.
fn podman() -> Value {
    json!({ "name": "podman", "cniVersion": "0.4.0", "type": "bridge", "bridge": "cni-podman0", "isGateway": true,
            "ipMasq": true, "hairpinMode": true,
            "ipam": { "type": "host-local", "routes": [{ "dst": "0.0.0.0/0" }],
                      "ranges": [[{ "subnet": "10.88.0.0/16", "gateway": "10.88.0.1" }]] } })
}

fn delegate(asked: Value) -> Value {
    let mut delegate = asked;
    delegate["isDefaultGateway"] = json!(true);
    with(&Node::conf(), "delegate", delegate)
}

fn reaches(node: &Node<'_>, from: &str, to: &str) -> Result<bool> {
    Ok(node.host.run(&["ip", "netns", "exec", from, "ping", "-c", "1", "-W", "1", to])?.ok())
}

fn check(node: &Node<'_>, plugin: &str, id: &str, conf: &Value, result: &Value) -> Result<()> {
    let call = Call { plugin, ..Call::new("CHECK", id) };
    done(&node.call(&call, &with(conf, "prevResult", result.clone()))?)
}

fn veths(host: &Host) -> Result<usize> {
    Ok(host.sh("ip -o link show type veth")?.matches("veth").count())
}

#[test]
fn another_mac_than_its_own_is_dropped() {
    in_lab(one_host("cnispoof").needs(&["nft"]), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = delegate(json!({ "macspoofchk": true }));
        for id in ["c1", "c2"] {
            node.container(id)?;
        }
        let result = node.add("c1", &conf)?;
        // One that nobody guards is let be.
        node.add("c2", &Node::conf())?;
        check(&node, "flannel", "c1", &conf, &result)?;
        ensure!(reaches(&node, "c1", "10.244.1.1")? && reaches(&node, "c1", "10.244.1.3")?);
        let own = result["interfaces"][2]["mac"].as_str().context("no MAC")?.to_owned();
        let become_ = |id: &str, mac: &str| host.sh(&format!("ip -n {id} link set eth0 address {mac}"));
        become_("c1", "0a:58:00:00:00:99")?;
        host.sh("ip neigh flush dev cni0")?;
        ensure!(!reaches(&node, "c1", "10.244.1.1")?, "a foreign MAC came through");
        become_("c2", "0a:58:00:00:00:98")?;
        host.sh("ip neigh flush dev cni0")?;
        ensure!(reaches(&node, "c2", "10.244.1.1")?, "nobody asked to guard c2");
        become_("c1", &own)?;
        ensure!(reaches(&node, "c1", "10.244.1.1")?);
        host.sh("nft flush ruleset")?;
        let call = Call::new("CHECK", "c1");
        let (code, text) = error(&node.call(&call, &with(&conf, "prevResult", result))?)?;
        ensure!(code == 140 && text.contains("flannel_cni sources"), "{code} {text}");
        // The next one makes the table anew; with the last one both elements go.
        node.container("c3")?;
        node.add("c3", &conf)?;
        ensure!(host.sh("nft list table bridge flannel_cni")?.matches("0a:58:").count() == 1);
        for id in ["c1", "c2", "c3"] {
            node.del(id, &conf)?;
        }
        let left = host.sh("nft list table bridge flannel_cni")?;
        ensure!(!left.contains("elements"), "{left}");
        Ok(())
    });
}

#[test]
fn isolated_endpoints_reach_the_gateway_and_not_each_other() {
    in_lab(one_host("cniisolated"), |lab| {
        let node = Node::new(lab.host(1))?;
        let conf = delegate(json!({ "portIsolation": true }));
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
        }
        let result = node.add("c1", &conf)?;
        node.add("c2", &conf)?;
        node.add("c3", &Node::conf())?;
        ensure!(!reaches(&node, "c1", "10.244.1.3")?, "both are isolated");
        ensure!(reaches(&node, "c1", "10.244.1.4")?, "the third is not");
        ensure!(reaches(&node, "c1", "10.244.1.1")? && reaches(&node, "c2", "10.244.1.1")?);
        check(&node, "flannel", "c1", &conf, &result)?;
        for id in ["c1", "c2", "c3"] {
            node.del(id, &conf)?;
        }
        Ok(())
    });
}

#[test]
fn modes_of_the_bridge_and_routes_with_attributes() {
    in_lab(one_host("cnimodes"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let routes = json!([{ "dst": "192.0.2.0/24", "mtu": 1300, "advmss": 1200, "priority": 9 },
                            { "dst": "198.51.100.0/24", "table": 77, "scope": 0 }]);
        let conf = with(&delegate(json!({ "promiscMode": true })), "ipam", json!({ "routes": routes }));
        let conf = with(&conf, "cniVersion", json!("1.1.0"));
        node.container("c1")?;
        let result = node.add("c1", &conf)?;
        ensure!(host.sh("ip link show cni0")?.contains("PROMISC"));
        let shown = host.sh("ip -n c1 route show 192.0.2.0/24; ip -n c1 route show table 77")?;
        for part in ["metric 9", "mtu 1300", "advmss 1200", "198.51.100.0/24 via 10.244.1.1"] {
            ensure!(shown.contains(part), "{part} is not in {shown}");
        }
        ensure!(result["routes"][0]["advmss"] == 1200 && result["routes"][1]["table"] == 77, "{result}");
        check(&node, "flannel", "c1", &conf, &result)?;
        host.sh("ip -n c1 route del 198.51.100.0/24 table 77")?;
        let call = Call::new("CHECK", "c1");
        let (code, text) = error(&node.call(&call, &with(&conf, "prevResult", result))?)?;
        ensure!(code == 140 && text.contains("table 77"), "{code} {text}");
        ensure!(host.sh("ip netns exec c1 cat /proc/sys/net/ipv4/conf/eth0/arp_notify")? == "1");
        node.del("c1", &conf)?;
        // No gateway: nothing on the bridge, and nobody there to answer.
        host.sh("ip link del cni0")?;
        let plain = with(&Node::conf(), "delegate", json!({ "isGateway": false }));
        node.container("c2")?;
        let result = node.add("c2", &plain)?;
        ensure!(!host.sh("ip -o -4 addr show dev cni0")?.contains("inet "), "an address on a plain bridge");
        ensure!(!reaches(&node, "c2", "10.244.1.1")?);
        check(&node, "flannel", "c2", &plain, &result)?;
        let down = delegate(json!({ "disableContainerInterface": true }));
        node.container("c3")?;
        let (code, text) = error(&node.call(&Call::new("ADD", "c3"), &down)?)?;
        ensure!(code == 7 && text.contains("DisableContainerInterface"), "{code} {text}");
        node.del("c2", &plain)?;
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn a_gateway_that_nobody_needs_any_more_goes() {
    in_lab(one_host("cniretire").outside().needs(&["nft"]), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let masqueraded = V4.replace("IPMASQ=true", "IPMASQ=false");
        host.write("/run/flannel/subnet.env", &masqueraded)?;
        let conf = Node::conf();
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
        }
        node.add("c1", &conf)?;
        node.add("c2", &conf)?;
        host.write("/run/flannel/subnet.env", masqueraded.replace("10.244.1.", "10.244.9."))?;
        ensure!(ip_of(&node.add("c3", &conf)?) == "10.244.9.2");
        let addresses = || host.sh("ip -o -4 addr show dev cni0");
        let rules = || host.sh("nft list table inet flannel_cni");
        // Both are served as long as somebody needs the first: within the network, and on the way out.
        node.ping("c3", "10.244.1.2")?;
        node.ping("c1", &lab.outside().ip().to_string())?;
        node.del("c1", &conf)?;
        ensure!(addresses()?.contains("10.244.1.1/24") && rules()?.contains("10.244.1.0/24"));
        node.del("c2", &conf)?;
        let left = addresses()?;
        ensure!(!left.contains("10.244.1.1/24") && left.contains("10.244.9.1/24"), "{left}");
        ensure!(!rules()?.contains("10.244.1.0/24"), "{}", rules()?);
        node.ping("c3", &lab.outside().ip().to_string())?;
        node.del("c3", &conf)?;
        ensure!(addresses()?.contains("10.244.9.1/24"), "the node's own stays");
        Ok(())
    });
}

#[test]
fn the_plugin_named_bridge_with_fixed_addresses() {
    if !has_debian(&["static"]) {
        return;
    }
    in_lab(one_host("cnibrstatic"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let plugin = ours(host, "bridge")?;
        let by_ours = |verb, id| Call { plugin: &plugin, ..Call::new(verb, id) };
        let (one, two) = (fixed("10.9.0.2/24", "10.9.0.1"), fixed("10.9.0.3/24", "10.9.0.1"));
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
        }
        let result = answer(&node.call(&by_ours("ADD", "c1"), &one)?)?;
        answer(&node.call(&by_ours("ADD", "c2"), &two)?)?;
        ensure!(result["interfaces"][0]["name"] == "br9" && ip_of(&result) == "10.9.0.2", "{result}");
        node.ping("c1", "10.9.0.3")?;
        node.ping("c1", "10.9.0.1")?;
        check(&node, &plugin, "c1", &one, &result)?;
        // Upstream's words, and its way out.
        let other = fixed("10.8.0.2/24", "10.8.0.1");
        let (code, text) = error(&node.call(&by_ours("ADD", "c3"), &other)?)?;
        let expected = "\"br9\" already has an IP address different from 10.8.0.1/24";
        ensure!(code == 7 && text.contains(expected), "{code} {text}");
        ensure!(host.sh("ip -n c3 -o link")?.lines().count() == 1, "something was left in c3");
        answer(&node.call(&by_ours("ADD", "c3"), &with(&other, "forceAddress", json!(true)))?)?;
        let addresses = host.sh("ip -o -4 addr show dev br9")?;
        ensure!(addresses.contains("10.8.0.1/24") && !addresses.contains("10.9.0.1/24"), "{addresses}");
        for (id, conf) in [("c1", &one), ("c2", &two), ("c3", &other)] {
            done(&node.call(&by_ours("DEL", id), conf)?)?;
            // Again, and with the namespace gone.
            let again = Call { netns: String::new(), ..by_ours("DEL", id) };
            done(&node.call(&again, conf)?)?;
        }
        ensure!(veths(host)? == 0, "{}", node.links()?);
        Ok(())
    });
}

#[test]
fn the_plugin_named_bridge_without_addresses() {
    in_lab(one_host("cnibrl2"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let plugin = ours(host, "bridge")?;
        let by_ours = |verb, id| Call { plugin: &plugin, ..Call::new(verb, id) };
        let conf = json!({ "name": "wire", "cniVersion": "1.0.0", "type": "bridge", "bridge": "br8" });
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
        }
        let results = ["c1", "c2"].map(|id| node.call(&by_ours("ADD", id), &conf));
        let [first, second] = results.map(|output| output.and_then(|output| answer(&output)));
        let (first, second) = (first?, second?);
        ensure!(first.get("ips").is_none() && first["interfaces"][0]["mac"].is_string(), "{first}");
        ensure!(first["interfaces"][2]["mac"] != second["interfaces"][2]["mac"], "{first} {second}");
        check(&node, &plugin, "c1", &conf, &first)?;
        host.sh("ip -n c1 addr add 192.0.2.1/24 dev eth0; ip -n c2 addr add 192.0.2.2/24 dev eth0")?;
        ensure!(reaches(&node, "c1", "192.0.2.2")?, "frames do not pass");
        ensure!(!host.sh("ip -o -4 addr show dev br8")?.contains("inet "));
        // Left down, as who sets it up himself asks.
        let down = with(&conf, "disableContainerInterface", json!(true));
        answer(&node.call(&by_ours("ADD", "c3"), &down)?)?;
        ensure!(host.sh("ip -n c3 -o link show eth0")?.contains("state DOWN"));
        let old = with(&conf, "cniVersion", json!("0.2.0"));
        let (code, text) = error(&node.call(&by_ours("ADD", "c3"), &old)?)?;
        ensure!(code == 7 && text.contains("0.3.0 or later"), "{code} {text}");
        for id in ["c1", "c2", "c3"] {
            done(&node.call(&by_ours("DEL", id), &conf)?)?;
        }
        ensure!(veths(host)? == 0, "{}", node.links()?);
        Ok(())
    });
}

#[test]
fn duplicate_addresses_are_found_where_that_is_asked_for() {
    if !has_debian(&["static"]) {
        return;
    }
    in_lab(one_host("cnidad"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let plugin = ours(host, "bridge")?;
        let by_ours = |verb, id| Call { plugin: &plugin, ..Call::new(verb, id) };
        let asked = |address: &str| with(&fixed(address, "fd09::1"), "enabledad", json!(true));
        for id in ["c1", "c2"] {
            node.container(id)?;
        }
        let first = answer(&node.call(&by_ours("ADD", "c1"), &asked("fd09::2/64"))?)?;
        let shown = host.sh("ip -n c1 -6 -o addr show dev eth0")?;
        ensure!(shown.contains("fd09::2/64") && !shown.contains("tentative"), "{shown}");
        check(&node, &plugin, "c1", &asked("fd09::2/64"), &first)?;
        let (code, text) = error(&node.call(&by_ours("ADD", "c2"), &asked("fd09::2/64"))?)?;
        ensure!(code == 115 && text.contains("fd09::2 is in use on this link already"), "{code} {text}");
        ensure!(host.sh("ip -n c2 -o link")?.lines().count() == 1, "something was left in c2");
        answer(&node.call(&by_ours("ADD", "c2"), &asked("fd09::3/64"))?)?;
        node.ping("c2", "fd09::2")?;
        for id in ["c1", "c2"] {
            done(&node.call(&by_ours("DEL", id), &asked("fd09::2/64"))?)?;
        }
        ensure!(veths(host)? == 0, "{}", node.links()?);
        Ok(())
    });
}

#[test]
fn podmans_configuration_and_both_families_from_host_local() {
    in_lab(one_host("cnibrpodman").outside().needs(&["nft"]), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let plugin = ours(host, "bridge")?;
        let by_ours = |verb, id| Call { plugin: &plugin, ..Call::new(verb, id) };
        let both = json!({ "name": "both", "cniVersion": "1.0.0", "type": "bridge", "bridge": "br7",
            "isDefaultGateway": true, "ipam": { "type": "host-local",
            "ranges": [[{ "subnet": "10.7.0.0/24" }], [{ "subnet": "fd07::/64" }]] } });
        for id in ["c1", "c2", "d1", "d2"] {
            node.container(id)?;
        }
        let conf = podman();
        let result = answer(&node.call(&by_ours("ADD", "c1"), &conf)?)?;
        answer(&node.call(&by_ours("ADD", "c2"), &conf)?)?;
        ensure!(result["ips"][0]["version"] == "4" && ip_of(&result) == "10.88.0.2", "{result}");
        node.ping("c1", "10.88.0.3")?;
        // Nobody outside knows the way back to 10.88.0.2.
        node.ping("c1", &lab.outside().ip().to_string())?;
        let rules = host.sh("nft list table inet flannel_cni_net-podman")?;
        let rule = "ip saddr 10.88.0.0/16 ip daddr != 10.88.0.0/16 ip daddr != 224.0.0.0/4 masquerade";
        ensure!(rules.matches("masquerade").count() == 1 && rules.contains(rule), "{rules}");
        check(&node, &plugin, "c1", &conf, &result)?;
        let result = answer(&node.call(&by_ours("ADD", "d1"), &both)?)?;
        answer(&node.call(&by_ours("ADD", "d2"), &both)?)?;
        ensure!(result["routes"].as_array().map(Vec::len) == Some(2), "{result}");
        node.ping("d1", "10.7.0.3")?;
        node.ping("d1", "fd07::3")?;
        node.ping("d1", "fd07::1")?;
        check(&node, &plugin, "d1", &both, &result)?;
        for (id, conf) in [("c1", &conf), ("c2", &conf), ("d1", &both), ("d2", &both)] {
            done(&node.call(&by_ours("DEL", id), conf)?)?;
        }
        ensure!(veths(host)? == 0, "{}", node.links()?);
        let leases = host.sh("ls /var/lib/cni/networks/podman /var/lib/cni/networks/both")?;
        ensure!(!leases.contains("10.88.0.") && !leases.contains("fd07::"), "{leases}");
        Ok(())
    });
}

#[test]
fn either_bridge_plugin_takes_down_what_the_other_made() {
    if !has_debian(&["bridge", "host-local"]) || !needs::require("iptables") {
        return;
    }
    in_lab(one_host("cnibrgo"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let (ours, go) = (ours(host, "bridge")?, format!("{DEBIAN}/bridge"));
        let by = |plugin| move |verb, id| Call { plugin, ..Call::new(verb, id) };
        let (by_ours, by_go) = (by(ours.as_str()), by(go.as_str()));
        let conf = podman();
        for id in ["g1", "o1"] {
            node.container(id)?;
        }
        let made_by_go = answer(&node.call(&by_go("ADD", "g1"), &conf)?)?;
        answer(&node.call(&by_ours("ADD", "o1"), &conf)?)?;
        node.ping("o1", &ip_of(&made_by_go))?;
        ensure!(host.sh("iptables -t nat -S")?.contains("CNI-"));
        done(&node.call(&by_ours("DEL", "g1"), &conf)?)?;
        ensure!(!host.sh("iptables -t nat -S")?.contains("CNI-"), "{}", host.sh("iptables -t nat -S")?);
        // With ipMasq Go looks for a chain of this container's own. We make none, and on iptables-nft its DEL says so, when
        // all else is done: nothing is left, and the runtime's next DEL is quiet.
        let first = node.call(&by_go("DEL", "o1"), &conf)?;
        ensure!(first.ok() || first.stdout.contains("does not exist"), "{first}");
        ensure!(veths(host)? == 0, "{}", node.links()?);
        done(&node.call(&by_go("DEL", "o1"), &conf)?)?;
        // Without, it is quiet at once.
        let plain = with(&conf, "ipMasq", json!(false));
        node.container("o2")?;
        answer(&node.call(&by_ours("ADD", "o2"), &plain)?)?;
        done(&node.call(&by_go("DEL", "o2"), &plain)?)?;
        ensure!(veths(host)? == 0, "{}", node.links()?);
        ensure!(!host.sh("ls /var/lib/cni/networks/podman")?.contains("10.88.0."));
        Ok(())
    });
}

#[test]
fn endpoints_of_one_vlan_reach_each_other() {
    in_lab(one_host("cnivlan"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let of = |vlan: u16| delegate(json!({ "vlan": vlan, "preserveDefaultVlan": false }));
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
        }
        let made = host.run(&["ip", "link", "add", "vlantest", "type", "bridge", "vlan_filtering", "1"])?;
        if !made.ok() {
            // Such a kernel is told from a broken configuration.
            let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &of(100))?)?;
            ensure!(code == 2 && text.contains("CONFIG_BRIDGE_VLAN_FILTERING"), "{code} {text}");
            ensure!(node.ledger()?.is_empty() && veths(host)? == 0);
            needs::require_kernel(needs::BRIDGE_VLANS);
            return Ok(());
        }
        let result = node.add("c1", &of(100))?;
        node.add("c2", &of(100))?;
        ensure!(result["interfaces"][3]["name"] == "cni0.100", "{result}");
        ensure!(reaches(&node, "c1", "10.244.1.3")? && reaches(&node, "c1", "10.244.1.1")?);
        check(&node, "flannel", "c1", &of(100), &result)?;
        // The subnet is one, and so is the host's route to it: the gateway is that VLAN's now.
        node.add("c3", &of(200))?;
        ensure!(reaches(&node, "c1", "10.244.1.3")? && reaches(&node, "c3", "10.244.1.1")?);
        ensure!(!reaches(&node, "c1", "10.244.1.4")?, "two VLANs are one");
        for (id, vlan) in [("c1", 100), ("c2", 100), ("c3", 200)] {
            node.del(id, &of(vlan))?;
        }
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}
