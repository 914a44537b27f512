//! CHECK, GC, and what a configuration can ask for.

use anyhow::{Context, ensure};
use flannel_tests::in_lab;
use serde_json::json;

use crate::node::{Call, LEDGER, Node, V4, answer, done, error, ip_of, one_host, with};

#[test]
fn check_tells_what_is_missing() {
    in_lab(one_host("cnicheck"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = Node::conf();
        node.container("c1")?;
        let result = node.add("c1", &conf)?;
        let veth = result["interfaces"][1]["name"].as_str().context("no host end")?.to_owned();
        let check = || node.call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", result.clone()));
        done(&check()?)?;
        // What a later plugin added is nobody's fault.
        host.sh("ip -n c1 addr add 192.0.2.7/32 dev eth0; ip -n c1 route add 192.0.2.0/24 dev eth0")?;
        done(&check()?)?;
        for (damage, part, repair) in [
            (
                "ip -n c1 route del default".to_owned(),
                "ip route replace default via 10.244.1.1 dev eth0",
                "ip -n c1 route add default via 10.244.1.1",
            ),
            (
                format!("ip link set {veth} nomaster"),
                "master cni0",
                &format!("ip link set {veth} master cni0; bridge link set dev {veth} hairpin on"),
            ),
            (format!("ip link set {veth} down"), veth.as_str(), &format!("ip link set {veth} up")),
            (
                format!("mv {LEDGER}/10.244.1.2 /run/x"),
                "no entry for 10.244.1.2 in the ledger",
                &format!("mv /run/x {LEDGER}/10.244.1.2"),
            ),
            (
                "ip -n c1 link set eth0 address 0a:58:00:00:00:01".to_owned(),
                "address 0a:58:0a:f4:01:02",
                "ip -n c1 link set eth0 address 0a:58:0a:f4:01:02",
            ),
            (
                "ip addr del 10.244.1.1/24 dev cni0".to_owned(),
                "ip addr replace 10.244.1.1/24 dev cni0",
                "ip addr add 10.244.1.1/24 dev cni0 noprefixroute",
            ),
        ] {
            host.sh(&damage)?;
            let (code, text) = error(&check()?)?;
            ensure!(code == 140 && text.contains(part), "after `{damage}`: {code} {text}");
            host.sh(repair)?;
        }
        done(&check()?)?;
        host.sh("ip -n c1 link del eth0")?;
        let (code, text) = error(&check()?)?;
        ensure!(code == 140 && text.contains("ip link add eth0"), "{code} {text}");
        ensure!(error(&node.call(&Call::new("CHECK", "c1"), &conf)?)?.0 == 7, "no prevResult");
        node.del("c1", &conf)
    });
}

#[test]
fn gc_takes_back_what_is_no_more() {
    in_lab(one_host("cnigc"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = with(&Node::conf(), "cniVersion", json!("1.1.0"));
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
            node.add(id, &conf)?;
        }
        // Another configuration of the same network, and an engine, have containers of their own.
        let other = with(&conf, "name", json!("podnet"));
        node.container("p1")?;
        ensure!(ip_of(&node.add("p1", &other)?) == "10.244.1.5", "two ledgers for one subnet");
        ensure!(host.sh("readlink /var/lib/cni/networks/podnet")? == LEDGER);
        host.sh(&format!("printf 'docker:ep1\\r\\neth0' > {LEDGER}/10.244.1.77"))?;
        host.sh("ip netns del c2")?;

        done(&node.call(&Call::new("GC", ""), &conf)?)?;
        ensure!(node.ledger()?.len() == 5, "an absent list is not an empty one");
        let valid =
            with(&conf, "cni.dev/valid-attachments", json!([{ "containerID": "c1", "ifname": "eth0" }]));
        done(&node.call(&Call::new("GC", ""), &valid)?)?;
        ensure!(node.ledger()? == ["10.244.1.2", "10.244.1.5", "10.244.1.77"], "{:?}", node.ledger()?);
        ensure!(node.links()?.matches("veth").count() == 2);
        ensure!(host.sh("ls /var/lib/cni/flannel")? == "c1\np1");
        node.ping("c1", "10.244.1.5")?;
        node.del("c1", &conf)?;
        node.del("p1", &other)
    });
}

#[test]
fn addresses_and_macs_can_be_asked_for() {
    in_lab(one_host("cniask"), |lab| {
        let node = Node::new(lab.host(1))?;
        let conf = Node::conf();
        for id in ["c1", "c2"] {
            node.container(id)?;
        }
        let asked =
            with(&conf, "runtimeConfig", json!({ "ips": ["10.244.1.9/24"], "mac": "0a:58:00:00:00:09" }));
        let result = node.add("c1", &asked)?;
        ensure!(
            ip_of(&result) == "10.244.1.9" && result["interfaces"][2]["mac"] == "0a:58:00:00:00:09",
            "{result}"
        );
        let ask = |ip: &'static str| Call { args: ip, ..Call::new("ADD", "c2") };
        for (ip, code, part) in [
            ("IP=10.244.1.9", 142, "already taken by c1/eth0"),
            ("IP=10.244.1.1", 7, "requested ip 10.244.1.1 is subnet's gateway"),
            (
                "IP=10.9.9.9",
                7,
                "failed to allocate all requested IPs: 10.9.9.9; addresses come from 10.244.1.0/24",
            ),
            ("IP=fd00::7", 7, "failed to allocate all requested IPs: fd00::7"),
        ] {
            let (got, text) = error(&node.call(&ask(ip), &conf)?)?;
            ensure!(got == code && text.contains(part), "{ip}: {got} {text}");
        }
        let result = answer(&node.call(&ask("IgnoreUnknown=1;K8S_POD_NAME=x;IP=10.244.1.20"), &conf)?)?;
        ensure!(ip_of(&result) == "10.244.1.20", "{result}");
        node.ping("c2", "10.244.1.9")?;
        node.del("c1", &conf)?;
        node.del("c2", &conf)
    });
}

#[test]
fn both_families() {
    in_lab(one_host("cniv6"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let both = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd42::/48\n\
                    FLANNEL_IPV6_SUBNET=fd42:0:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        host.write("/run/flannel/subnet.env", both)?;
        let conf = Node::conf();
        for id in ["c1", "c2"] {
            node.container(id)?;
        }
        let result = node.add("c1", &conf)?;
        node.add("c2", &conf)?;
        ensure!(
            result["ips"][1]
                == json!({ "interface": 2, "address": "fd42:0:0:1::2/64", "gateway": "fd42:0:0:1::1" }),
            "{result}"
        );
        ensure!(result["routes"].as_array().map(Vec::len) == Some(4), "{result}");
        node.ping("c1", "fd42:0:0:1::1")?;
        node.ping("c1", "fd42:0:0:1::3")?;
        node.ping("c1", "10.244.1.3")?;
        ensure!(host.sh("ip -n c1 -6 route show default")?.contains("via fd42:0:0:1::1 dev eth0"));
        done(&node.call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", result))?)?;
        ensure!(host.sh(&format!("cat {LEDGER}/last_reserved_ip.1"))? == "fd42:0:0:1::3");
        node.del("c1", &conf)?;
        node.del("c2", &conf)?;
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn a_network_has_one_bridge_and_the_first_comer_names_it() {
    in_lab(one_host("cnibridge"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        for id in ["c1", "c2"] {
            node.container(id)?;
        }
        let named = |name: &str| with(&Node::conf(), "delegate", json!({ "bridge": name, "mtu": 1300 }));
        node.add("c1", &named("br7"))?;
        ensure!(host.sh("ip -o link show br7; ip -n c1 -o link show eth0")?.matches("mtu 1300").count() == 2);
        let (code, text) = error(&node.call(&Call::new("ADD", "c2"), &named("br8"))?)?;
        ensure!(code == 7 && text.contains("br8") && text.contains("br7"), "{code} {text}");
        // Who does not care gets the first one's.
        let conf = Node::conf();
        ensure!(node.add("c2", &conf)?["interfaces"][0]["name"] == "br7");
        node.ping("c2", "10.244.1.2")?;
        // A new lease: the old containers stay reachable, new ones get the new subnet.
        host.write("/run/flannel/subnet.env", V4.replace("10.244.1.", "10.244.9."))?;
        node.container("c3")?;
        ensure!(ip_of(&node.add("c3", &conf)?) == "10.244.9.2");
        node.ping("c3", "10.244.1.3")?;
        let forced = with(&conf, "delegate", json!({ "forceAddress": true, "isDefaultGateway": true }));
        node.container("c4")?;
        node.add("c4", &forced)?;
        ensure!(
            !host.sh("ip -o addr show br7")?.contains("10.244.1.1/24"),
            "forceAddress left the old address"
        );
        for id in ["c1", "c2", "c3", "c4"] {
            node.del(id, &conf)?;
        }
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn masquerading_is_one_static_table() {
    in_lab(one_host("cnimasq").outside().needs(&["nft"]), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        host.write("/run/flannel/subnet.env", V4.replace("IPMASQ=true", "IPMASQ=false"))?;
        let conf = Node::conf();
        for id in ["c1", "c2"] {
            node.container(id)?;
            node.add(id, &conf)?;
        }
        let rules = host.out(&["nft", "list", "table", "inet", "flannel_cni"])?;
        ensure!(
            rules.matches("masquerade").count() == 1
                && rules.contains(
                    "ip saddr 10.244.1.0/24 ip daddr != 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade"
                ),
            "{rules}"
        );
        // Without the rule nobody outside knows the way back.
        node.ping("c1", &lab.outside().ip().to_string())?;
        host.sh("nft flush ruleset")?;
        node.del("c2", &conf)?;
        node.add("c2", &conf)?;
        node.ping("c2", &lab.outside().ip().to_string())?;
        ensure!(
            host.sh("cat /var/lib/cni/flannel/c1")?.contains("\"ipMasq\":false"),
            "Go would look for rules of its own"
        );
        node.del("c1", &conf)?;
        node.del("c2", &conf)
    });
}

#[test]
fn name_servers_come_from_the_configuration_or_from_a_file() {
    in_lab(one_host("cnidns"), |lab| {
        let node = Node::new(lab.host(1))?;
        lab.host(1).write("/run/resolv.conf", "nameserver 10.244.0.10\nsearch a.example\n")?;
        let from_file = with(&Node::conf(), "ipam", json!({ "resolvConf": "/run/resolv.conf" }));
        node.container("c1")?;
        let dns = node.add("c1", &from_file)?["dns"].clone();
        ensure!(dns == json!({ "nameservers": ["10.244.0.10"], "search": ["a.example"] }), "{dns}");
        node.del("c1", &from_file)?;
        let given = with(&from_file, "dns", json!({ "nameservers": ["192.0.2.53"] }));
        let dns = node.add("c1", &given)?["dns"].clone();
        ensure!(dns == json!({ "nameservers": ["192.0.2.53"] }), "{dns}");
        node.del("c1", &given)?;
        let absent = with(&Node::conf(), "ipam", json!({ "resolvConf": "/run/none" }));
        let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &absent)?)?;
        ensure!(code == 7 && text.contains("/run/none"), "{code} {text}");
        ensure!(node.ledger()?.is_empty(), "{:?}", node.ledger()?);
        Ok(())
    });
}
