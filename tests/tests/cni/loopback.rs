//! The plugin named `loopback`: `lo` of a container, as containerd asks for it beside the network.

use anyhow::{Result, ensure};
use flannel_tests::{Host, in_lab};
use serde_json::{Value, json};

use crate::node::{Call, Node, answer, done, error, one_host, ours, with};

/// A container as a runtime makes it: its `lo` is down.
fn bare(host: &Host, id: &str) -> Result<()> {
    host.sh(&format!("ip netns add {id}; ip -n {id} link set lo down")).map(drop)
}

fn is_up(host: &Host, id: &str) -> Result<bool> {
    Ok(host.sh(&format!("ip -n {id} link show lo"))?.contains("LOOPBACK,UP"))
}

#[test]
fn a_container_reaches_itself() {
    in_lab(one_host("cnilo"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let plugin = ours(host, "loopback")?;
        let call = |verb, id| Call { plugin: &plugin, ..Call::new(verb, id) };
        // As containerd has it built in.
        let conf = json!({ "cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback" });
        bare(host, "c1")?;
        ensure!(!is_up(host, "c1")? && node.ping("c1", "127.0.0.1").is_err());
        // The runtime's name for the interface does not matter.
        let result = answer(&node.call(&Call { ifname: "lo0", ..call("ADD", "c1") }, &conf)?)?;
        node.ping("c1", "127.0.0.1")?;
        node.ping("c1", "::1")?;
        ensure!(
            result
                == json!({ "cniVersion": "0.3.1", "dns": {},
                    "interfaces": [{ "name": "lo", "mac": "00:00:00:00:00:00", "sandbox": "/run/netns/c1" }],
                    "ips": [{ "version": "4", "interface": 0, "address": "127.0.0.1/8" },
                            { "version": "6", "interface": 0, "address": "::1/128" }] }),
            "{result}"
        );
        let conf = with(&conf, "cniVersion", json!("1.0.0"));
        let check = || node.call(&call("CHECK", "c1"), &with(&conf, "prevResult", result.clone()));
        done(&check()?)?;
        done(&node.call(&call("DEL", "c1"), &conf)?)?;
        ensure!(!is_up(host, "c1")?);
        ensure!(error(&check()?)?.1.contains("ip link set lo up"));
        // Behind another plugin it passes on what that one said.
        let before =
            json!({ "cniVersion": "1.0.0", "ips": [{ "address": "10.1.2.3/24" }], "dns": { "domain": "x" } });
        let passed = answer(&node.call(&call("ADD", "c1"), &with(&conf, "prevResult", before.clone()))?)?;
        ensure!(passed == before && is_up(host, "c1")?, "{passed}");
        Ok(())
    });
}

#[test]
fn what_is_gone_is_down_and_what_is_no_loopback_is_told() {
    in_lab(one_host("cnilogone"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let plugin = ours(host, "loopback")?;
        let call = |verb, id| Call { plugin: &plugin, ..Call::new(verb, id) };
        let conf = json!({ "cniVersion": "1.0.0", "name": "lo", "type": "loopback" });
        for netns in ["", "/run/netns/never", "/etc/hostname"] {
            done(&node.call(&Call { netns: netns.to_owned(), ..call("DEL", "c1") }, &conf)?)?;
        }
        let (code, _) = error(&node.call(&call("ADD", "c1"), &conf)?)?;
        ensure!(code == 8, "{code}");
        // Nobody takes the host's own interface down.
        let own = |verb| Call { netns: "/proc/self/ns/net".to_owned(), ..call(verb, "c1") };
        ensure!(error(&node.call(&own("ADD"), &conf)?)?.0 == 8);
        done(&node.call(&own("DEL"), &conf)?)?;
        ensure!(host.sh("ip link show lo")?.contains("LOOPBACK,UP"));
        bare(host, "c2")?;
        host.sh("ip -n c2 addr add 192.0.2.1/32 dev lo")?;
        let (_, text) = error(&node.call(&call("ADD", "c2"), &conf)?)?;
        ensure!(text.contains("loopback interface found with non-loopback address 192.0.2.1/32"), "{text}");
        let about = host.run(&[plugin.as_str()])?;
        ensure!(about.ok() && about.stderr.starts_with("CNI loopback plugin v"), "{about}");
        let _: Value = answer(&host.run(&["env", "CNI_COMMAND=VERSION", &plugin])?)?;
        Ok(())
    });
}
