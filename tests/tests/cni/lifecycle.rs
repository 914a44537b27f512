//! ADD, DEL and VERSION: what comes, what goes, what is refused.

use std::collections::BTreeSet;
use std::thread;

use anyhow::{Context, Result, ensure};
use flannel_tests::in_lab;
use serde_json::{Value, json};

use crate::node::{Call, LEDGER, Node, V4, answer, done, error, ip_of, one_host, with};

#[test]
fn a_container_comes_and_goes() {
    in_lab(one_host("cni"), |lab| {
        let node = Node::new(lab.host(1))?;
        let conf = Node::conf();
        for id in ["c1", "c2"] {
            node.container(id)?;
        }
        let first = node.add("c1", &conf)?;
        let second = node.add("c2", &conf)?;
        ensure!(ip_of(&first) == "10.244.1.2" && ip_of(&second) == "10.244.1.3", "{first} {second}");
        ensure!(
            first["interfaces"][2]
                == json!({ "name": "eth0", "mac": "0a:58:0a:f4:01:02", "sandbox": "/run/netns/c1" }),
            "{first}"
        );
        ensure!(first["interfaces"][0]["name"] == "cni0", "{first}");
        ensure!(
            first["routes"]
                == json!([{ "dst": "10.244.0.0/16" }, { "dst": "0.0.0.0/0", "gw": "10.244.1.1" }]),
            "{first}"
        );
        node.ping("c1", "10.244.1.1")?;
        node.ping("c1", "10.244.1.3")?;
        ensure!(lab.host(1).run(&["ping", "-c", "1", "-W", "2", "10.244.1.2"])?.ok());
        let host = lab.host(1);
        let routes = host.sh("ip -n c1 route; ip route show dev cni0")?;
        for line in [
            "default via 10.244.1.1 dev eth0",
            "10.244.0.0/16 via 10.244.1.1 dev eth0",
            "10.244.1.0/24 dev eth0 proto kernel scope link src 10.244.1.2",
            "10.244.1.0/24 proto 70 src 10.244.1.1",
        ] {
            ensure!(routes.contains(line), "no {line} in\n{routes}");
        }
        ensure!(host.sh("cat /proc/sys/net/ipv4/ip_forward")? == "1");
        ensure!(
            host.sh("ip -n c1 -o link show eth0; ip -o link show cni0")?.matches("mtu 1450").count() == 2
        );
        ensure!(host.sh("bridge -d link")?.matches("hairpin on").count() == 2);
        // The MAC the result names for the host's end is the one it has.
        let veth = first["interfaces"][1]["name"].as_str().context("no host end")?;
        let mac = first["interfaces"][1]["mac"].as_str().context("no MAC")?;
        ensure!(host.out(&["ip", "-o", "link", "show", veth])?.contains(mac));

        ensure!(host.sh(&format!("cat -A {LEDGER}/10.244.1.2"))? == "c1^M$\neth0");
        ensure!(host.sh(&format!("cat {LEDGER}/last_reserved_ip.0"))? == "10.244.1.3");
        node.del("c1", &conf)?;
        node.del("c1", &conf)?;
        // The namespace may be gone, its path unknown, and the result with it.
        host.sh("ip netns del c2")?;
        done(&node.call(&Call { netns: String::new(), ..Call::new("DEL", "c2") }, &conf)?)?;
        done(&node.call(&Call { netns: String::new(), ..Call::new("DEL", "never") }, &conf)?)?;
        // A runtime that unmounted it leaves the file.
        host.write("/run/netns/stale", "")?;
        node.del("stale", &conf)?;
        ensure!(node.ledger()?.is_empty() && !node.links()?.contains("veth"), "{}", node.links()?);
        ensure!(host.sh("ls /var/lib/cni/flannel")?.is_empty());
        let left = host.sh(&format!("ls {LEDGER}"))?;
        ensure!(left.split_whitespace().eq(["boot_id", "last_reserved_ip.0", "lock"]), "{left}");
        // A freed address rests.
        ensure!(ip_of(&node.add("c1", &conf)?) == "10.244.1.4");
        node.del("c1", &conf)
    });
}

#[test]
fn every_version_gets_its_shape() {
    in_lab(one_host("cniver"), |lab| {
        let node = Node::new(lab.host(1))?;
        node.container("c1")?;
        for version in ["", "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let conf = with(&Node::conf(), "cniVersion", json!(version));
            let result = node.add("c1", &conf)?;
            let named = if version.is_empty() { "0.1.0" } else { version };
            ensure!(result["cniVersion"] == named, "{version}: {result}");
            let old = matches!(version, "" | "0.1.0" | "0.2.0");
            ensure!(old == result["ip4"]["ip"].is_string(), "{version}: {result}");
            ensure!(old != result["interfaces"].is_array(), "{version}: {result}");
            ensure!(
                version.starts_with("0.3") == (result["ips"][0]["version"] == "4" && version != "0.4.0"),
                "{result}"
            );
            let check = node.call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", result))?;
            match version {
                "0.4.0" | "1.0.0" | "1.1.0" => done(&check)?,
                _ => ensure!(error(&check)?.0 == 1, "{version}: {check}"),
            }
            node.del("c1", &conf)?;
        }
        let conf = with(&Node::conf(), "cniVersion", json!("9.9.9"));
        let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &conf)?)?;
        ensure!(code == 1 && text.contains("config is \"9.9.9\", plugin supports [0.1.0"), "{text}");
        let versions = answer(&node.call(&Call::new("VERSION", ""), &json!({}))?)?;
        ensure!(versions["supportedVersions"].as_array().map(Vec::len) == Some(7), "{versions}");
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn bad_calls_are_refused_before_anything_is_touched() {
    in_lab(one_host("cnibad"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        node.container("c1")?;
        let before = host.network_state()?;
        let about = host.run_env(&["flannel"], &[])?;
        ensure!(
            about.ok() && about.stdout.is_empty() && about.stderr.starts_with("CNI flannel plugin v"),
            "{about}"
        );
        let conf = Node::conf();
        let call = |change: &dyn Fn(&mut Call<'_>), conf: &Value| -> Result<(u64, String)> {
            let mut call = Call::new("ADD", "c1");
            change(&mut call);
            error(&node.call(&call, conf)?)
        };
        let keep = |_: &mut Call<'_>| {};
        let delegate = |delegate: Value| with(&conf, "delegate", delegate);
        for ((code, text), expected, part) in [
            (call(&|c| c.verb = "FROB", &conf)?, 4, "unknown CNI_COMMAND: FROB"),
            (call(&|c| c.id = "", &conf)?, 4, "required env variables [CNI_CONTAINERID] missing"),
            (call(&|c| c.netns.clear(), &conf)?, 4, "[CNI_NETNS] missing"),
            (call(&|c| c.id = "../../etc/passwd", &conf)?, 4, "invalid characters in containerID"),
            (call(&|c| c.ifname = "a/b", &conf)?, 4, "invalid interface name"),
            (call(&|c| c.netns = "/run/netns/absent".to_owned(), &conf)?, 8, "failed to open netns"),
            (call(&|c| c.netns = "/proc/self/ns/net".to_owned(), &conf)?, 8, "should not be the same"),
            (call(&|c| c.args = "FOO=1", &conf)?, 4, "unknown args"),
            (call(&keep, &json!("text"))?, 6, "error unmarshall network config"),
            (call(&keep, &json!({ "type": "flannel" }))?, 7, "missing network name"),
            (
                call(&keep, &with(&conf, "name", json!("../x")))?,
                7,
                "invalid characters found in network name",
            ),
            (call(&keep, &delegate(json!({ "name": "x" })))?, 7, "'name'"),
            (call(&keep, &delegate(json!({ "vlan": 5000 })))?, 7, "delegate.vlan"),
            (call(&keep, &delegate(json!({ "bridge": "much-too-long-a-name" })))?, 7, "delegate.bridge"),
            (call(&keep, &delegate(json!({ "bridge": "eth0" })))?, 7, "eth0 exists and is no bridge"),
        ] {
            ensure!(code == expected && text.contains(part), "wanted {expected} {part}, got {code} {text}");
        }
        ensure!(node.ledger()?.is_empty());
        ensure!(host.network_state()? == before);
        ensure!(host.sh("ls /var/lib/cni/flannel 2>/dev/null || true")?.is_empty());
        Ok(())
    });
}

#[test]
fn without_a_usable_lease_add_says_try_again_and_status_says_no() {
    in_lab(one_host("cninolease"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        node.container("c1")?;
        let conf = with(&Node::conf(), "cniVersion", json!("1.1.0"));
        done(&node.call(&Call::new("STATUS", ""), &conf)?)?;
        for (text, part) in [
            (None, "is flanneld"),
            (Some("FLANNEL_MTU\n"), "FLANNEL_MTU has no value"),
            (
                Some("FLANNEL_NETWORK=10.244.0.0/16\n"),
                "is missing FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ",
            ),
        ] {
            match text {
                None => drop(host.sh("rm /run/flannel/subnet.env")?),
                Some(text) => host.write("/run/flannel/subnet.env", text)?,
            }
            let (code, told) = error(&node.call(&Call::new("ADD", "c1"), &conf)?)?;
            ensure!(
                code == 11 && told.contains(part) && told.contains("/run/flannel/subnet.env"),
                "{code} {told}"
            );
            let (code, told) = error(&node.call(&Call::new("STATUS", ""), &conf)?)?;
            ensure!(code == 50 && told.contains(part), "{code} {told}");
        }
        host.write("/run/flannel/subnet.env", V4.replace("/24", "/30"))?;
        node.add("c1", &conf)?;
        node.container("c2")?;
        let (code, told) = error(&node.call(&Call::new("ADD", "c2"), &conf)?)?;
        ensure!(
            code == 11 && told.contains("no free address: all 1 of 10.244.1.0/30 are taken"),
            "{code} {told}"
        );
        ensure!(error(&node.call(&Call::new("STATUS", ""), &conf)?)?.0 == 50);
        // Taking down needs no lease.
        host.sh("rm /run/flannel/subnet.env")?;
        node.del("c1", &conf)?;
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn a_second_add_is_refused_and_harms_nothing() {
    in_lab(one_host("cnitwice"), |lab| {
        let node = Node::new(lab.host(1))?;
        let conf = Node::conf();
        node.container("c1")?;
        node.add("c1", &conf)?;
        let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &conf)?)?;
        ensure!(code == 141 && text.contains("eth0 is attached already"), "{code} {text}");
        ensure!(node.ledger()? == ["10.244.1.2"], "{:?}", node.ledger()?);
        node.ping("c1", "10.244.1.1")?;
        // The name is taken by something that is not ours.
        node.container("c2")?;
        lab.host(1).sh("ip -n c2 link add eth0 type bridge")?;
        let (code, text) = error(&node.call(&Call::new("ADD", "c2"), &conf)?)?;
        ensure!(code == 141 && text.contains("(eth0) already exists"), "{code} {text}");
        ensure!(node.ledger()? == ["10.244.1.2"]);
        ensure!(lab.host(1).sh("ip -n c2 -o link show eth0")?.contains("eth0"));
        ensure!(node.links()?.matches("veth").count() == 1);
        node.del("c2", &conf)?;
        ensure!(
            lab.host(1).sh("ip -n c2 -o link show eth0")?.contains("eth0"),
            "DEL took somebody else's interface"
        );
        node.del("c1", &conf)
    });
}

#[test]
fn what_fails_half_way_leaves_nothing() {
    in_lab(one_host("cnihalf"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        node.container("c1")?;
        // The bridge is the network's and stays; the rest must be as it is now.
        node.add("c1", &Node::conf())?;
        node.del("c1", &Node::conf())?;
        // A bridge without ports loses its carrier a moment later; that is nobody's doing.
        let state = || -> Result<String> {
            let carrier = [" linkdown", "NO-CARRIER,", ",LOWER_UP"];
            let state = host.network_state()? + &host.sh("ip -n c1 -o link")?;
            Ok(carrier.iter().fold(state, |state, part| state.replace(part, "")))
        };
        let before = state()?;
        // The container's half fails last: its gateway is nowhere.
        let routes = json!({ "routes": [{ "dst": "10.9.0.0/16", "gw": "192.0.2.1" }] });
        let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &with(&Node::conf(), "ipam", routes))?)?;
        ensure!(code == 115 && text.contains("10.9.0.0/16 via 192.0.2.1"), "{code} {text}");
        ensure!(node.ledger()?.is_empty() && host.sh("ls /var/lib/cni/flannel")?.is_empty());
        let after = state()?;
        ensure!(after == before, "{before}\nbecame\n{after}");
        Ok(())
    });
}

#[test]
fn cleanup_takes_away_what_the_plugin_made() {
    in_lab(one_host("cniclean"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        node.container("c1")?;
        let (network, files) = (
            host.network_state()?,
            host.sh("find /run/flannel /var/lib/cni /var/lib/flannel 2>/dev/null || true")?,
        );
        host.write("/run/flannel/subnet.env", V4.replace("IPMASQ=true", "IPMASQ=false"))?;
        node.add("c1", &Node::conf())?;
        let cleanup = || host.run(&["flanneld", "--cleanup"]);
        let refused = cleanup()?;
        ensure!(
            !refused.ok() && refused.all().contains("containers still hold addresses: 10.244.1.2 (c1/eth0)"),
            "{refused}"
        );
        node.ping("c1", "10.244.1.1")?;
        node.del("c1", &Node::conf())?;
        let cleaned = cleanup()?;
        ensure!(cleaned.ok(), "{cleaned}");
        ensure!(host.network_state()? == network, "{network}\nbecame\n{}", host.network_state()?);
        let left = host
            .sh("find /run/flannel /var/lib/cni /var/lib/flannel -type f -o -type l 2>/dev/null || true")?;
        ensure!(left.is_empty(), "before:\n{files}\nleft:\n{left}");
        Ok(())
    });
}

#[test]
fn two_interfaces_of_one_container_are_two() {
    in_lab(one_host("cnitwo"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "flannel" });
        node.container("c1")?;
        let second = |verb| Call { ifname: "net1", ..Call::new(verb, "c1") };
        node.add("c1", &conf)?;
        answer(&node.call(&second("ADD"), &conf)?)?;
        ensure!(node.ledger()?.len() == 2);
        node.del("c1", &conf)?;
        ensure!(node.ledger()? == ["10.244.1.3"]);
        ensure!(host.sh("ip -n c1 -o addr show net1")?.contains("10.244.1.3/24"));
        ensure!(host.sh("ls /var/lib/cni/flannel")? == "c1", "the other interface still needs it");
        done(&node.call(&second("DEL"), &conf)?)?;
        ensure!(node.ledger()?.is_empty() && host.sh("ls /var/lib/cni/flannel")?.is_empty());
        Ok(())
    });
}

#[test]
fn sixteen_at_once_on_a_fresh_node() {
    in_lab(one_host("cnimany"), |lab| {
        let node = Node::new(lab.host(1))?;
        let conf = Node::conf();
        let ids: Vec<String> = (0..16).map(|n| format!("c{n}")).collect();
        for id in &ids {
            node.container(id)?;
        }
        let all = |work: &(dyn Fn(&str) -> Result<Value> + Sync)| -> Result<Vec<Value>> {
            thread::scope(|scope| {
                let threads: Vec<_> = ids.iter().map(|id| scope.spawn(move || work(id))).collect();
                threads.into_iter().map(|thread| thread.join().expect("a call panicked")).collect()
            })
        };
        let results = all(&|id| node.add(id, &conf))?;
        let distinct: BTreeSet<String> = results.iter().map(ip_of).collect();
        ensure!(distinct.len() == 16 && node.ledger()?.len() == 16, "{distinct:?}");
        for id in &ids {
            node.ping(id, "10.244.1.1")?;
        }
        all(&|id| node.del(id, &conf).map(|()| Value::Null))?;
        ensure!(node.ledger()?.is_empty() && !node.links()?.contains("veth"));
        Ok(())
    });
}
