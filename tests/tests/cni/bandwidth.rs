//! Limits: measured, checked, and gone when they should be; by `flannel`, by the plugin named `bandwidth`, and beside Go's.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_tests::{Host, in_lab, needs, secs};
use serde_json::{Value, json};

use crate::go::has_debian_plugins;
use crate::node::{Call, DEBIAN, Node, answer, done, error, ip_of, one_host, ours, with};

/// What containerd asks for whatever the rate is.
const BURST: u64 = 4_294_967_295;
const RATE: f64 = 20e6;

/// As containerd spells it.
fn asked(ingress: u64, egress: u64) -> Value {
    json!({ "bandwidth": { "IngressRate": ingress, "IngressBurst": BURST, "EgressRate": egress, "EgressBurst": BURST } })
}

fn both() -> Value {
    asked(RATE as u64, RATE as u64)
}

/// Bits per second that arrive at `to`, once the burst is over. Both ends are namespaces of the host, or the host itself.
fn throughput(host: &Host, (from, to): (&str, &str), address: &str) -> Result<f64> {
    let within = |namespace: &str, command: &str| match namespace {
        "" => command.to_owned(),
        name => format!("ip netns exec {name} {command}"),
    };
    let script = |place: &str, command: &str| within(place, &format!("timeout 30 sh -c '{command}'"));
    // It ends with its own input.
    let receive = script(to, "sleep 30 | busybox nc -l -p 5001 >/dev/null");
    let receiver = host.spawn("receiver", &["sh", "-c", &receive], &[])?;
    host.sh(&format!(
        "for i in $(seq 100); do {} | grep -q :5001 && exit; sleep 0.1; done; exit 1",
        within(to, "ss -Hltn")
    ))?;
    let send = script(from, &format!("busybox nc {address} 5001 </dev/zero"));
    let sender = host.spawn("sender", &["sh", "-c", &send], &[])?;
    let device = if to.is_empty() { "cni0" } else { "eth0" };
    let count = within(to, &format!("ip -s -j link show {device}"));
    let received = || -> Result<(f64, Instant)> {
        let links: Value = serde_json::from_str(&host.sh(&count)?)?;
        let bytes = links[0]["stats64"]["rx"]["bytes"].as_f64().context("no counter")?;
        Ok((bytes, Instant::now()))
    };
    thread::sleep(Duration::from_millis(1500));
    let (before, start) = received()?;
    thread::sleep(secs(3));
    let (after, end) = received()?;
    sender.crash()?;
    receiver.crash()?;
    Ok((after - before) * 8.0 / (end - start).as_secs_f64())
}

fn near(what: &str, measured: f64, rate: f64) -> Result<()> {
    ensure!(
        (0.85 * rate..1.15 * rate).contains(&measured),
        "{what}: {measured:.0} bit/s instead of {rate:.0}"
    );
    Ok(())
}

fn shaping(host: &Host) -> Result<String> {
    host.sh("tc qdisc show | grep -v noqueue || true; ip -o link | grep bwp || true; tc filter show dev cni0 || true")
}

/// Nothing of any limit is left on the host.
fn no_traces(host: &Host) -> Result<()> {
    let left = host.sh("tc qdisc show | grep -E 'tbf|ingress' || true; ip -o link | grep bwp || true")?;
    ensure!(left.is_empty(), "left:\n{left}");
    Ok(())
}

fn has_tc() -> bool {
    needs::require("tc") && needs::require("ss")
}

#[test]
fn limits_are_kept_in_both_directions() {
    if !has_tc() {
        return;
    }
    in_lab(one_host("cnibw"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let conf = with(&Node::conf(), "runtimeConfig", asked(RATE as u64, RATE as u64 / 2));
        node.container("c1")?;
        let result = node.add("c1", &conf)?;
        node.ping("c1", "10.244.1.1")?;
        near("to the container", throughput(host, ("", "c1"), &ip_of(&result))?, RATE)?;
        near("from the container", throughput(host, ("c1", ""), "10.244.1.1")?, RATE / 2.0)?;
        // Not what containerd asks for, behind which a container would send half a gigabyte at once.
        let shaping = shaping(host)?;
        ensure!(
            shaping.contains("rate 20Mbit burst 250000b") && shaping.contains("rate 10Mbit burst 125000b"),
            "{shaping}"
        );

        let check = || node.call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", result.clone()));
        done(&check()?)?;
        let end = result["interfaces"][1]["name"].as_str().context("no host end")?;
        let funnel = host.sh("ip -o link | grep -o 'bwp[0-9a-f]*' | head -1")?;
        for (damage, part) in [
            (
                format!(
                    "tc qdisc replace dev {funnel} root handle 1: tbf rate 1mbit burst 20000 limit 30000"
                ),
                funnel.as_str(),
            ),
            (format!("tc qdisc del dev {end} root"), "tbf rate 2500000bps burst 250000 limit 312500"),
            (format!("tc qdisc del dev {end} ingress"), "sent through no interface"),
        ] {
            host.sh(&damage)?;
            let (_, text) = error(&check()?)?;
            ensure!(text.contains(part), "{damage}: {text}");
        }
        node.del("c1", &conf)?;
        no_traces(host)?;
        node.del("c1", &conf)
    });
}

#[test]
fn nothing_is_left_whatever_happens_to_a_container() {
    if !has_tc() {
        return;
    }
    in_lab(one_host("cnibwgone"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let conf = with(&Node::conf(), "runtimeConfig", both());
        let mut results = Vec::new();
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
            results.push(node.add(id, &conf)?);
        }
        // DEL without the container and without what was asked for.
        host.sh("ip netns del c1")?;
        done(&node.call(&Call { netns: String::new(), ..Call::new("DEL", "c1") }, &Node::conf())?)?;
        ensure!(host.sh("ip -o link | grep -c bwp")? == "2");
        // No DEL at all.
        host.sh("ip netns del c2")?;
        let valid = json!([{ "containerID": "c3", "ifname": "eth0" }]);
        let gc = with(&with(&Node::conf(), "cniVersion", json!("1.1.0")), "cni.dev/valid-attachments", valid);
        done(&node.call(&Call::new("GC", ""), &gc)?)?;
        ensure!(host.sh("ip -o link | grep -c bwp")? == "1", "{}", shaping(host)?);
        done(&node.call(
            &Call::new("CHECK", "c3"),
            &with(&conf, "prevResult", results.pop().context("no result")?),
        )?)?;
        // An ADD that fails.
        node.container("c4")?;
        let wrong = json!({ "bandwidth": { "ingressRate": 8000 } });
        let failed = node.call(&Call::new("ADD", "c4"), &with(&conf, "runtimeConfig", wrong))?;
        ensure!(error(&failed)?.1.contains("if rate is set, burst must also be set"));
        ensure!(node.ledger()?.len() == 1, "{:?}", node.ledger()?);
        node.del("c3", &conf)?;
        no_traces(host)
    });
}

#[test]
fn two_interfaces_of_a_container_are_limited_apart() {
    if !has_tc() {
        return;
    }
    in_lab(one_host("cnibwtwo"), |lab| {
        let node = Node::new(lab.host(1))?;
        let conf = |rate| with(&Node::conf(), "runtimeConfig", asked(rate, rate));
        let second = |verb| Call { ifname: "eth1", ..Call::new(verb, "c1") };
        node.container("c1")?;
        node.add("c1", &conf(8_000_000))?;
        answer(
            &node
                .call(&second("ADD"), &with(&conf(4_000_000), "delegate", json!({ "hairpinMode": true })))?,
        )?;
        let shaping = shaping(node.host)?;
        ensure!(
            shaping.matches("rate 8Mbit").count() == 2 && shaping.matches("rate 4Mbit").count() == 2,
            "{shaping}"
        );
        done(&node.call(&second("DEL"), &Node::conf())?)?;
        let left = self::shaping(node.host)?;
        ensure!(left.matches("rate 8Mbit").count() == 2 && !left.contains("4Mbit"), "{left}");
        node.del("c1", &Node::conf())?;
        no_traces(node.host)
    });
}

/// What libcni hands to the second plugin of a chain.
fn chained(kind: &str, previous: &Value) -> Value {
    json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": kind, "runtimeConfig": both(), "prevResult": previous })
}

#[test]
fn a_chained_plugin_of_that_name_does_the_same() {
    if !has_tc() || !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnibwchain"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let plugin = ours(host, "bandwidth")?;
        let by_ours = |verb, id| Call { plugin: &plugin, ..Call::new(verb, id) };
        // Behind our own flannel that was not told of limits, and behind Go's bridge.
        let bridge = format!("{DEBIAN}/bridge");
        let go = json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "bridge", "bridge": "cni0", "isGateway": true,
                         "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.244.1.0/24" }]] } });
        for id in ["c1", "g1"] {
            node.container(id)?;
        }
        let first = node.add("c1", &Node::conf())?;
        let behind_go = answer(&node.call(&Call { plugin: &bridge, ..Call::new("ADD", "g1") }, &go)?)?;
        for (id, previous) in [("c1", &first), ("g1", &behind_go)] {
            let conf = chained("bandwidth", previous);
            let result = answer(&node.call(&by_ours("ADD", id), &conf)?)?;
            // Everything that was there, and the interface it made.
            ensure!(
                result["ips"] == previous["ips"] && result["interfaces"][1] == previous["interfaces"][1],
                "{result}"
            );
            ensure!(
                result["interfaces"][3]["name"].as_str().is_some_and(|name| name.starts_with("bwp")),
                "{result}"
            );
            done(&node.call(&by_ours("CHECK", id), &chained("bandwidth", &result))?)?;
            near(id, throughput(host, ("", id), &ip_of(&result))?, RATE)?;
            done(&node.call(&by_ours("DEL", id), &conf)?)?;
            done(&node.call(&by_ours("DEL", id), &with(&conf, "prevResult", Value::Null))?)?;
        }
        node.del("c1", &Node::conf())?;
        done(&node.call(&Call { plugin: &bridge, ..Call::new("DEL", "g1") }, &go)?)?;
        no_traces(host)?;

        // Behind a flannel that has done it already.
        let conf = with(&Node::conf(), "runtimeConfig", both());
        let shaped = node.add("c1", &conf)?;
        let before = shaping(host)?;
        let result = answer(&node.call(&by_ours("ADD", "c1"), &chained("bandwidth", &shaped))?)?;
        ensure!(result == shaped, "{result}");
        ensure!(shaping(host)? == before);
        let (code, _) = error(&node.call(
            &by_ours("ADD", "c1"),
            &with(&chained("bandwidth", &shaped), "prevResult", Value::Null),
        )?)?;
        ensure!(code == 7);
        node.del("c1", &conf)?;
        no_traces(host)
    });
}

#[test]
fn gos_plugin_and_ours_take_down_what_the_other_made() {
    if !has_tc() || !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnibwgo"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = node.host;
        let (go, ours) = (format!("{DEBIAN}/bandwidth"), ours(host, "bandwidth")?);
        let moderate = json!({ "bandwidth": { "ingressRate": 8_000_000, "ingressBurst": 800_000,
                                              "egressRate": 8_000_000, "egressBurst": 800_000 } });
        for (maker, breaker) in [(&go, &ours), (&ours, &go)] {
            node.container("c1")?;
            let previous = node.add("c1", &Node::conf())?;
            let conf = with(&chained("bandwidth", &previous), "runtimeConfig", moderate.clone());
            let result = answer(&node.call(&Call { plugin: maker, ..Call::new("ADD", "c1") }, &conf)?)?;
            done(&node.call(
                &Call { plugin: &ours, ..Call::new("CHECK", "c1") },
                &with(&conf, "prevResult", result.clone()),
            )?)?;
            done(&node.call(
                &Call { plugin: breaker, ..Call::new("DEL", "c1") },
                &with(&conf, "prevResult", result),
            )?)?;
            ensure!(host.sh("ip -o link | grep bwp || true")?.is_empty(), "{maker} made what {breaker} left");
            node.del("c1", &Node::conf())?;
            host.sh("ip netns del c1")?;
        }
        // Our flannel takes down a whole Go container.
        node.container("c1")?;
        let previous = node.add("c1", &Node::conf())?;
        answer(
            &node.call(&Call { plugin: &go, ..Call::new("ADD", "c1") }, &chained("bandwidth", &previous))?,
        )?;
        node.del("c1", &Node::conf())?;
        no_traces(host)
    });
}

#[test]
fn the_burst_is_as_asked_where_the_configuration_says_so() {
    if !has_tc() {
        return;
    }
    in_lab(one_host("cnibwburst"), |lab| {
        let node = Node::new(lab.host(1))?;
        let conf = with(&Node::conf(), "burst", json!("as-asked"));
        let conf = with(
            &conf,
            "runtimeConfig",
            json!({ "bandwidth": { "ingressRate": 40_000_000, "ingressBurst": BURST } }),
        );
        node.container("c1")?;
        let result = node.add("c1", &conf)?;
        let shaping = shaping(node.host)?;
        ensure!(shaping.contains("rate 40Mbit burst 512Mb") && !shaping.contains("bwp"), "{shaping}");
        done(&node.call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", result))?)?;
        node.del("c1", &conf)?;
        let elsewhere = with(&with(&conf, "delegate", json!({ "type": "ptp" })), "ingressRate", json!(8000));
        let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &elsewhere)?)?;
        ensure!(
            code == 2 && text.contains("ingressRate is not supported where delegate.type is \"ptp\""),
            "{text}"
        );
        no_traces(node.host)
    });
}
