//! The plugin named `tuning`, and settings as part of `flannel`.

use anyhow::{Result, ensure};
use flannel_tests::{Host, in_lab};
use serde_json::{Value, json};

use crate::node::{Call, Node, answer, done, error, one_host, ours, with};

const LIST: &str = "/etc/cni/tuning/allowlist.conf";

fn setting(host: &Host, id: &str, key: &str) -> Result<String> {
    host.sh(&format!("ip netns exec {id} sysctl -n {key}"))
}

fn conf(previous: &Value, more: &Value) -> Value {
    let mut conf = json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "tuning", "prevResult": previous });
    for (key, value) in more.as_object().into_iter().flatten() {
        conf[key] = value.clone();
    }
    conf
}

#[test]
fn settings_of_the_container_are_made_and_others_refused() {
    in_lab(one_host("cnitune"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let plugin = ours(host, "tuning")?;
        let call = |verb, id| Call { plugin: &plugin, ..Call::new(verb, id) };
        node.container("c1")?;
        let previous = node.add("c1", &Node::conf())?;
        let of_the_host = host.sh("sysctl -n net.core.somaxconn")?;
        let wanted = conf(
            &previous,
            &json!({ "sysctl": { "net.core.somaxconn": "517", "net.ipv4.conf.IFNAME.arp_filter": "1",
                                 "net.ipv4.ip_local_port_range": "20000 30000" },
                     "args": { "cni": { "sysctl": { "net.ipv4.conf.IFNAME.arp_ignore": "1" } } } }),
        );
        let result = answer(&node.call(&call("ADD", "c1"), &wanted)?)?;
        ensure!(result == previous, "{result}");
        for (key, value) in [
            ("net.core.somaxconn", "517"),
            ("net.ipv4.conf.eth0.arp_filter", "1"),
            ("net.ipv4.conf.eth0.arp_ignore", "1"),
            ("net.ipv4.ip_local_port_range", "20000\t30000"),
        ] {
            ensure!(setting(host, "c1", key)? == value, "{key}: {}", setting(host, "c1", key)?);
        }
        ensure!(host.sh("sysctl -n net.core.somaxconn")? == of_the_host, "the host's was set");
        done(&node.call(&call("CHECK", "c1"), &wanted)?)?;
        host.sh("ip netns exec c1 sysctl -q -w net.core.somaxconn=99")?;
        let (_, text) = error(&node.call(&call("CHECK", "c1"), &wanted)?)?;
        ensure!(text.contains("net.core.somaxconn=517") || text.contains("net/core/somaxconn"), "{text}");

        for (key, part) in [
            ("kernel.msgmax", "invalid net sysctl key: \"kernel.msgmax\""),
            ("net.core.nosuchthing", "nosuchthing"),
        ] {
            let refused = conf(&previous, &json!({ "sysctl": { key: "1" } }));
            let (_, text) = error(&node.call(&call("ADD", "c1"), &refused)?)?;
            ensure!(text.contains(part), "{key}: {text}");
        }
        host.write(LIST, "^net.core.*$\n")?;
        let (_, text) = error(&node.call(&call("ADD", "c1"), &wanted)?)?;
        ensure!(text.contains("is not allowed. Only the following sysctls are allowed"), "{text}");
        done(&node.call(&call("DEL", "c1"), &wanted)?)?;
        let (code, _) = error(&node.call(&call("ADD", "c1"), &with(&wanted, "prevResult", Value::Null))?)?;
        ensure!(code == 7);
        Ok(())
    });
}

#[test]
fn an_interface_is_turned_and_turned_back() {
    in_lab(one_host("cniturn"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let plugin = ours(host, "tuning")?;
        let call = |verb, id| Call { plugin: &plugin, ..Call::new(verb, id) };
        let look = |id: &str| host.sh(&format!("ip -d -n {id} link show eth0"));
        node.container("c1")?;
        let previous = node.add("c1", &with(&Node::conf(), "cniVersion", json!("1.1.0")))?;
        let before = look("c1")?;
        let wanted = conf(
            &previous,
            &json!({ "cniVersion": "1.1.0", "mtu": 1300, "promisc": true, "allmulti": true, "txQLen": 77,
                     "runtimeConfig": { "mac": "0a:11:22:33:44:55" } }),
        );
        let result = answer(&node.call(&call("ADD", "c1"), &wanted)?)?;
        let container = &result["interfaces"][2];
        ensure!(container["mac"] == "0a:11:22:33:44:55" && container["mtu"] == 1300, "{result}");
        ensure!(result["interfaces"][1] == previous["interfaces"][1] && result["ips"] == previous["ips"]);
        let turned = look("c1")?;
        for part in ["0a:11:22:33:44:55", "mtu 1300", "PROMISC", "ALLMULTI", "qlen 77"] {
            ensure!(turned.contains(part), "{part}\n{turned}");
        }
        node.ping("c1", "10.244.1.1")?;
        let check = || node.call(&call("CHECK", "c1"), &with(&wanted, "prevResult", result.clone()));
        done(&check()?)?;
        host.sh("ip -n c1 link set eth0 mtu 1200 promisc off")?;
        let (_, text) = error(&check()?)?;
        ensure!(text.contains("ip link set eth0 mtu 1300; ip link set eth0 promisc on"), "{text}");
        // Only what upstream wrote is needed to turn it back.
        ensure!(host.read("/run/cni/tuning/c1_eth0.json")?.contains("\"txQLen\""));
        done(&node.call(&call("DEL", "c1"), &wanted)?)?;
        ensure!(look("c1")? == before, "before:\n{before}\nafter:\n{}", look("c1")?);
        ensure!(host.sh("ls /run/cni/tuning")?.is_empty());
        done(&node.call(&call("DEL", "c1"), &wanted)?)?;

        // A container that is gone, and one whose DEL never came.
        for id in ["c2", "c3"] {
            node.container(id)?;
            let previous = node.add(id, &with(&Node::conf(), "cniVersion", json!("1.1.0")))?;
            answer(
                &node.call(
                    &call("ADD", id),
                    &conf(&previous, &json!({ "cniVersion": "1.1.0", "mtu": 1300 })),
                )?,
            )?;
        }
        done(
            &node
                .call(&Call { netns: String::new(), ..call("DEL", "c2") }, &conf(&Value::Null, &json!({})))?,
        )?;
        let valid = |name: &str| json!({ "name": name, "cniVersion": "1.1.0", "type": "tuning", "cni.dev/valid-attachments": [] });
        done(&node.call(&call("GC", ""), &valid("another"))?)?;
        ensure!(host.sh("ls /run/cni/tuning")? == "c3_eth0.json");
        done(&node.call(&call("GC", ""), &valid("cbr0"))?)?;
        ensure!(host.sh("ls /run/cni/tuning")?.is_empty());
        Ok(())
    });
}

#[test]
fn flannel_makes_settings_itself() {
    in_lab(one_host("cnisysctl"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let conf = with(&Node::conf(), "sysctl", json!({ "net.core.somaxconn": "517" }));
        node.container("c1")?;
        let result = node.add("c1", &conf)?;
        ensure!(setting(host, "c1", "net.core.somaxconn")? == "517");
        let check = || node.call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", result.clone()));
        done(&check()?)?;
        host.sh("ip netns exec c1 sysctl -q -w net.core.somaxconn=99")?;
        ensure!(error(&check()?)?.1.contains("somaxconn"));
        node.del("c1", &conf)?;
        // What is refused is refused before anything is made, and what fails leaves nothing.
        node.container("c2")?;
        for key in ["kernel.msgmax", "net.core.nosuchthing"] {
            let refused = with(&conf, "sysctl", json!({ key: "1" }));
            let (_, text) = error(&node.call(&Call::new("ADD", "c2"), &refused)?)?;
            ensure!(text.contains(key) || text.contains("nosuchthing"), "{text}");
            ensure!(node.ledger()?.is_empty() && !node.links()?.contains("veth"), "{}", node.links()?);
        }
        Ok(())
    });
}
