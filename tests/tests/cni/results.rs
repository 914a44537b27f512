//! What is printed, in the shape of every version of the spec, as the decoders of Go's libcni and of other runtimes want it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use flannel_tests::in_lab;
use rscni_types::legacy;
use rscni_types::types::{CNIResultWithVersion, ErrorResult};
use rscni_types::version::PluginInfo;
use serde_json::{Value, json};

use crate::node::{Call, Node, answer, done, error, one_host, with};

pub(crate) const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

const DUAL: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd42::/48\n\
                    FLANNEL_IPV6_SUBNET=fd42:0:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// The object has these keys and, at most, those.
fn keys(place: &str, value: &Value, must: &[&str], may: &[&str]) -> Result<()> {
    let object = value.as_object().with_context(|| format!("{place} is no object: {value}"))?;
    let have: BTreeSet<&str> = object.keys().map(String::as_str).collect();
    let lack: Vec<_> = must.iter().filter(|key| !have.contains(*key)).collect();
    let more: Vec<_> = have.iter().filter(|key| !must.contains(key) && !may.contains(key)).collect();
    ensure!(lack.is_empty() && more.is_empty(), "{place} lacks {lack:?} and has {more:?}: {value}");
    Ok(())
}

fn list<'a>(place: &str, value: &'a Value) -> Result<&'a [Value]> {
    value.as_array().map(Vec::as_slice).with_context(|| format!("{place} is no list: {value}"))
}

fn string<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("{key} is no string: {value}"))
}

/// An address with a prefix length, as Go's `types.IPNet` reads it.
fn cidr(text: &str) -> Result<IpAddr> {
    let (address, length) = text.split_once('/').with_context(|| format!("{text} has no length"))?;
    let address: IpAddr = address.parse().with_context(|| format!("{text} is no address"))?;
    let max = if address.is_ipv4() { 32 } else { 128 };
    ensure!(length.parse::<u8>()? <= max, "{text}");
    Ok(address)
}

fn mac(text: &str) -> Result<()> {
    let bytes: Vec<&str> = text.split(':').collect();
    let hex = |byte: &&str| byte.len() == 2 && u8::from_str_radix(byte, 16).is_ok();
    ensure!(bytes.len() == 6 && bytes.iter().all(hex), "{text} is no MAC");
    Ok(())
}

fn routes(list: &[Value]) -> Result<()> {
    for route in list {
        keys("a route", route, &["dst"], &["gw", "mtu", "advmss", "priority", "table", "scope"])?;
        let family = cidr(string(route, "dst")?)?.is_ipv4();
        if let Some(via) = route.get("gw") {
            let via: IpAddr = via.as_str().context("gw is no string")?.parse()?;
            ensure!(via.is_ipv4() == family, "{route}");
        }
    }
    Ok(())
}

fn dns(value: &Value) -> Result<()> {
    keys("dns", value, &[], &["nameservers", "domain", "search", "options"])
}

/// 0.1.0 and 0.2.0 (pkg/types/020): the first address of a family, and its routes.
fn by_family(result: &Value) -> Result<()> {
    keys("the result", result, &["cniVersion", "dns"], &["ip4", "ip6"])?;
    ensure!(result.get("ip4").is_some() || result.get("ip6").is_some(), "no address: {result}");
    for (key, is_v4) in [("ip4", true), ("ip6", false)] {
        let Some(ip) = result.get(key) else { continue };
        keys(key, ip, &["ip"], &["gateway", "routes"])?;
        ensure!(cidr(string(ip, "ip")?)?.is_ipv4() == is_v4, "{ip}");
        ensure!(string(ip, "gateway")?.parse::<IpAddr>()?.is_ipv4() == is_v4, "{ip}");
        let list = ip.get("routes").map_or(Ok(&[][..]), |routes| self::list("routes", routes))?;
        routes(list)?;
        for route in list {
            ensure!(cidr(string(route, "dst")?)?.is_ipv4() == is_v4, "a route of the other family: {ip}");
        }
    }
    dns(&result["dns"])
}

/// 0.3.0 and later (pkg/types/040 and 100).
fn by_interface(version: &str, result: &Value, netns: &str, ifname: &str) -> Result<()> {
    let old = version.starts_with("0.");
    let newest = version == "1.1.0";
    let must: &[&str] =
        if old { &["cniVersion", "interfaces", "ips", "dns"] } else { &["cniVersion", "interfaces", "ips"] };
    keys("the result", result, must, &["routes", "dns"])?;
    let interfaces = list("interfaces", &result["interfaces"])?;
    let fields: &[&str] =
        if newest { &["mac", "sandbox", "mtu", "socketPath", "pciID"] } else { &["mac", "sandbox"] };
    for interface in interfaces {
        keys("an interface", interface, &["name"], fields)?;
        // podman reads it of every one in the container, `bandwidth` looks for the host's ends.
        mac(string(interface, "mac")?)?;
        ensure!(interface.get("sandbox").is_none_or(|sandbox| sandbox == netns), "{interface}");
        ensure!(!newest || interface["mtu"] == 1450, "{interface}");
    }
    let inside: Vec<usize> =
        (0..interfaces.len()).filter(|index| interfaces[*index].get("sandbox").is_some()).collect();
    ensure!(inside.len() == 1 && interfaces[inside[0]]["name"] == ifname, "{result}");
    ensure!(interfaces.len() == 3 && inside == [2], "bridge, host's end, container's: {result}");
    for ip in list("ips", &result["ips"])? {
        let must: &[&str] = if old {
            &["interface", "address", "gateway", "version"]
        } else {
            &["interface", "address", "gateway"]
        };
        keys("an address", ip, must, &[])?;
        let address = cidr(string(ip, "address")?)?;
        ensure!(string(ip, "gateway")?.parse::<IpAddr>()?.is_ipv4() == address.is_ipv4(), "{ip}");
        ensure!(ip["interface"] == inside[0], "{ip}");
        if old {
            ensure!(ip["version"] == if address.is_ipv4() { "4" } else { "6" }, "{ip}");
        }
    }
    if let Some(list) = result.get("routes") {
        routes(self::list("routes", list)?)?;
    }
    result.get("dns").map_or(Ok(()), dns)?;
    written_as_others_write_it(result, old)
}

/// What another implementation reads out of the result, and writes in the shape of that version, is the result.
fn written_as_others_write_it(result: &Value, old: bool) -> Result<()> {
    let read: CNIResultWithVersion =
        serde_json::from_value(result.clone()).with_context(|| result.to_string())?;
    let version = read.cni_version();
    let written = match old {
        true => serde_json::to_value(legacy::CNIResult::new(version, read.into_result()))?,
        false => serde_json::to_value(read)?,
    };
    ensure!(written == *result, "ours:   {result}\nothers: {written}");
    Ok(())
}

/// A result of any version.
pub(crate) fn well_formed(version: &str, result: &Value, netns: &str, ifname: &str) -> Result<()> {
    // No version in a configuration is the first one.
    let named = if version.is_empty() { "0.1.0" } else { version };
    ensure!(result["cniVersion"] == named, "{version}: {result}");
    match named {
        "0.1.0" | "0.2.0" => by_family(result),
        _ => by_interface(named, result, netns, ifname),
    }
    .with_context(|| format!("version {version:?}"))
}

#[test]
fn every_version_gets_exactly_its_shape() {
    in_lab(one_host("cnishape"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        node.container("c1")?;
        // The name of the sandbox is the runtime's, to the letter.
        host.sh("ln -s /run/netns/c1 /run/c1-by-another-name")?;
        let netns = "/run/../run/c1-by-another-name";
        let dns = json!({ "nameservers": ["10.244.0.10"], "domain": "d", "search": ["a", "b"], "options": ["ndots:5"] });
        for (env, families) in [(crate::node::V4, 1), (DUAL, 2)] {
            host.write("/run/flannel/subnet.env", env)?;
            for version in [""].iter().chain(&VERSIONS) {
                for dns in [None, Some(&dns)] {
                    let mut conf = with(&Node::conf(), "cniVersion", json!(version));
                    conf["ipam"] =
                        json!({ "routes": [{ "dst": "10.9.0.0/16", "gw": "10.244.1.1", "priority": 7 }] });
                    if let Some(dns) = dns {
                        conf["dns"] = dns.clone();
                    }
                    let call =
                        |verb| Call { netns: netns.to_owned(), ifname: "net0", ..Call::new(verb, "c1") };
                    let result = answer(&node.call(&call("ADD"), &conf)?)?;
                    well_formed(version, &result, netns, "net0")?;
                    match result.get("ips") {
                        Some(ips) => ensure!(list("ips", ips)?.len() == families, "{result}"),
                        None => ensure!(result.get("ip6").is_some() == (families == 2), "{result}"),
                    }
                    ensure!(dns.is_none_or(|dns| result["dns"] == *dns), "{result}");
                    let check = node.call(&call("CHECK"), &with(&conf, "prevResult", result))?;
                    match *version {
                        "0.4.0" | "1.0.0" | "1.1.0" => done(&check).with_context(|| (*version).to_owned())?,
                        _ => ensure!(error(&check)?.1.contains("config version does not allow CHECK")),
                    }
                    done(&node.call(&call("DEL"), &conf)?)?;
                }
            }
        }
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn an_error_is_one_object_on_stdout_in_the_version_of_the_configuration() {
    in_lab(one_host("cnierror"), |lab| {
        let node = Node::new(lab.host(1))?;
        node.container("c1")?;
        for version in VERSIONS {
            let conf = with(&Node::conf(), "cniVersion", json!(version));
            let broken = with(&conf, "delegate", json!({ "mtu": 7 }));
            let output = node.call(&Call::new("ADD", "c1"), &broken)?;
            ensure!(output.code == 1 && output.stderr.is_empty(), "{output}");
            let told: Value = serde_json::from_str(&output.stdout)?;
            keys("an error", &told, &["cniVersion", "code", "msg"], &["details"])?;
            ensure!(told["cniVersion"] == version && told["code"] == 7, "{told}");
            serde_json::from_value::<ErrorResult>(told)?;
            // Before CHECK, GC and STATUS there were none.
            for (verb, since) in [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")] {
                let told = node.call(&Call::new(verb, "c1"), &conf)?;
                let refused =
                    !told.ok() && error(&told)?.1.contains(&format!("config version does not allow {verb}"));
                ensure!(refused == (version < since), "{version} {verb}: {told}");
                ensure!(!refused || error(&told)?.0 == 1, "{told}");
            }
        }
        // Of a version nobody knows, or none at all: our newest, and a list.
        for (version, code) in [(json!("0.5.0"), 1), (json!("1.2.0"), 1), (json!("1.0"), 1), (json!(1), 6)] {
            let told =
                node.call(&Call::new("ADD", "c1"), &with(&Node::conf(), "cniVersion", version.clone()))?;
            ensure!(error(&told)?.0 == code, "{version}: {told}");
        }
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn versions_are_told_to_whoever_asks() {
    in_lab(one_host("cniversion"), |lab| {
        let node = Node::new(lab.host(1))?;
        for version in VERSIONS {
            // Old runtimes fill the variables with anything, because older plugins wanted them.
            let call = Call { netns: "dummy".to_owned(), ifname: "dummy", ..Call::new("VERSION", "dummy") };
            let told = answer(&node.call(&call, &json!({ "cniVersion": version }))?)?;
            keys("the versions", &told, &["cniVersion", "supportedVersions"], &[])?;
            ensure!(told["supportedVersions"] == json!(VERSIONS), "{told}");
            ensure!(told["cniVersion"] == version, "not the version that was asked in: {told}");
            let read: PluginInfo = serde_json::from_value(told)?;
            ensure!(read.supported_versions().len() == VERSIONS.len());
        }
        Ok(())
    });
}

#[test]
fn plugins_behind_others_pass_on_what_came() {
    in_lab(one_host("cnichained"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        for id in ["c1", "c2"] {
            node.container(id)?;
        }
        let names = ["portmap", "bandwidth", "tuning", "firewall"];
        for name in names {
            host.sh(&format!("mkdir -p /run/ours; ln -s /run/lab/bin/flannel /run/ours/{name}"))?;
        }
        for version in VERSIONS {
            let conf = with(&Node::conf(), "cniVersion", json!(version));
            let result = node.add("c1", &conf)?;
            for name in names {
                let plugin = format!("/run/ours/{name}");
                let conf = json!({ "name": "cbr0", "cniVersion": version, "type": name, "x-nobody": 1,
                                   "capabilities": { "portMappings": true }, "runtimeConfig": { "aliases": {} } });
                let call =
                    |verb, conf: &Value| node.call(&Call { plugin: &plugin, ..Call::new(verb, "c1") }, conf);
                let passed = answer(&call("ADD", &with(&conf, "prevResult", result.clone()))?)?;
                ensure!(passed == result, "{name} {version}: {result}\nbecame {passed}");
                let what = || format!("{name} {version}");
                // Behind nobody there is nothing to do it to.
                let (code, text) = error(&call("ADD", &conf)?).with_context(what)?;
                ensure!(code == 7 && text.contains("prevResult"), "{name} {version}: {code} {text}");
                if version >= "0.4.0" {
                    done(&call("CHECK", &with(&conf, "prevResult", result.clone()))?).with_context(what)?;
                }
                if version == "1.1.0" {
                    done(&call("STATUS", &conf)?).with_context(what)?;
                    done(&call("GC", &conf)?).with_context(what)?;
                    done(&call("GC", &with(&conf, "cni.dev/valid-attachments", json!([])))?)
                        .with_context(what)?;
                }
                done(&call("DEL", &conf)?).with_context(what)?;
                done(&call("DEL", &with(&conf, "prevResult", result.clone()))?).with_context(what)?;
            }
            node.del("c1", &conf)?;
        }
        Ok(())
    });
}

#[test]
fn every_plugin_answers_by_its_own_name() {
    in_lab(one_host("cninames"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        for name in ["flannel", "portmap", "bandwidth", "tuning", "firewall", "loopback"] {
            let plugin = format!("/run/ours/{name}");
            host.sh(&format!("mkdir -p /run/ours; ln -s /run/lab/bin/flannel {plugin}"))?;
            let about = host.run_env(&[&plugin], &[])?;
            let lines: Vec<&str> = about.stderr.lines().collect();
            ensure!(about.ok() && about.stdout.is_empty() && lines.len() == 2, "{about}");
            ensure!(lines[0].starts_with(&format!("CNI {name} plugin v")), "{about}");
            ensure!(
                lines[1] == format!("CNI protocol versions supported: {}", VERSIONS.join(", ")),
                "{about}"
            );
            let call = |verb| Call { plugin: &plugin, ..Call::new(verb, "c1") };
            let told = answer(&node.call(&call("VERSION"), &json!({ "cniVersion": "1.0.0" }))?)?;
            ensure!(told == json!({ "cniVersion": "1.0.0", "supportedVersions": VERSIONS }), "{told}");
            let (code, text) =
                error(&node.call(&call("ADD"), &json!({ "name": "n", "cniVersion": "2.0.0" }))?)?;
            ensure!(code == 1 && text.contains("plugin supports [0.1.0"), "{name}: {code} {text}");
            let missing = Call { netns: String::new(), ifname: "", ..call("ADD") };
            let (code, text) = error(&node.call(&missing, &json!({ "name": "n" }))?)?;
            ensure!(code == 4 && text.contains("[CNI_NETNS,CNI_IFNAME] missing"), "{name}: {code} {text}");
        }
        Ok(())
    });
}
