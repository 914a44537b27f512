//! The CNI plugin as a runtime sees it: the built binary, called in namespaces as containerd, podman and CRI-O call it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::{Host, Lab, LabPlan, Output, in_lab, needs};
use serde_json::{Value, json};

const LEDGER: &str = "/var/lib/cni/networks/cbr0";
const DEBIAN: &str = "/usr/lib/cni";
const V4: &str =
    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// A node with a lease and without any daemon: the plugin needs none.
struct Node<'a> {
    host: &'a Host,
}

/// One call of a plugin.
struct Call<'a> {
    verb: &'a str,
    id: &'a str,
    netns: String,
    ifname: &'a str,
    args: &'a str,
    plugin: &'a str,
}

impl<'a> Call<'a> {
    fn new(verb: &'a str, id: &'a str) -> Self {
        let netns = format!("/run/netns/{id}");
        Self { verb, id, netns, ifname: "eth0", args: "", plugin: "flannel" }
    }
}

impl<'a> Node<'a> {
    fn new(host: &'a Host) -> Result<Self> {
        host.write("/run/flannel/subnet.env", V4)?;
        Ok(Self { host })
    }

    /// As kube-flannel ships it.
    fn conf() -> Value {
        json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "flannel",
                "delegate": { "hairpinMode": true, "isDefaultGateway": true } })
    }

    fn container(&self, id: &str) -> Result<()> {
        self.host.sh(&format!("ip netns add {id}; ip -n {id} link set lo up")).map(drop)
    }

    fn call(&self, call: &Call<'_>, conf: &Value) -> Result<Output> {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let file = format!("/run/conf.{}", CALLS.fetch_add(1, Ordering::Relaxed));
        self.host.write(&file, conf.to_string())?;
        let env = [
            format!("CNI_COMMAND={}", call.verb),
            format!("CNI_CONTAINERID={}", call.id),
            format!("CNI_NETNS={}", call.netns),
            format!("CNI_IFNAME={}", call.ifname),
            format!("CNI_ARGS={}", call.args),
            format!("CNI_PATH={DEBIAN}"),
        ];
        let argv: Vec<&str> =
            ["env"].into_iter().chain(env.iter().map(String::as_str)).chain([call.plugin]).collect();
        let path = self.host.path(&file);
        let output = self.host.run_input(&argv, File::open(&path)?)?;
        fs::remove_file(path)?;
        Ok(output)
    }

    fn add(&self, id: &str, conf: &Value) -> Result<Value> {
        answer(&self.call(&Call::new("ADD", id), conf)?)
    }

    fn del(&self, id: &str, conf: &Value) -> Result<()> {
        done(&self.call(&Call::new("DEL", id), conf)?)
    }

    /// Addresses in the ledger.
    fn ledger(&self) -> Result<Vec<String>> {
        let script = format!("cd {LEDGER} 2>/dev/null && ls | grep -E '^[0-9a-f]*[.:].*[.:]' || true");
        Ok(self.host.sh(&script)?.split_whitespace().map(str::to_owned).collect())
    }

    fn ping(&self, id: &str, to: &str) -> Result<()> {
        let ping = self.host.run(&["ip", "netns", "exec", id, "ping", "-c", "1", "-W", "2", to])?;
        ensure!(ping.ok(), "{ping}");
        Ok(())
    }

    fn links(&self) -> Result<String> {
        self.host.sh("ip -o link | cut -d: -f2 | cut -d@ -f1")
    }
}

fn answer(output: &Output) -> Result<Value> {
    ensure!(output.ok(), "{output}");
    serde_json::from_str(&output.stdout).with_context(|| output.to_string())
}

/// Commands other than ADD print nothing.
fn done(output: &Output) -> Result<()> {
    ensure!(output.ok() && output.stdout.is_empty(), "{output}");
    Ok(())
}

/// The error printed on stdout: code, and the whole text.
fn error(output: &Output) -> Result<(u64, String)> {
    ensure!(!output.ok(), "it did not fail: {output}");
    let error: Value = serde_json::from_str(&output.stdout).with_context(|| output.to_string())?;
    let code = error["code"].as_u64().with_context(|| output.to_string())?;
    ensure!(error["cniVersion"].is_string(), "{error}");
    Ok((code, format!("{} {}", error["msg"].as_str().unwrap_or(""), error["details"].as_str().unwrap_or(""))))
}

fn ip_of(result: &Value) -> String {
    let cidr = result["ips"][0]["address"].as_str().unwrap_or_default();
    cidr.split('/').next().unwrap_or_default().to_owned()
}

fn with(base: &Value, key: &str, value: Value) -> Value {
    let mut conf = base.clone();
    conf[key] = value;
    conf
}

fn one_host(name: &str) -> LabPlan {
    Lab::new(name).hosts(1).ip_forward(false)
}

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
            (call(&keep, &delegate(json!({ "vlan": 5 })))?, 2, "delegate.vlan"),
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
        ensure!(code == 115, "{code} {text}");
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
            ("IP=10.244.1.1", 7, "it is the gateway"),
            ("IP=10.9.9.9", 7, "not in this node's subnet 10.244.1.0/24"),
            ("IP=fd00::7", 7, "no subnet of that family"),
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

/// What Go's chain does for this configuration: `bridge` with `host-local`, without the meta plugin (Debian has none).
fn go_conf() -> Value {
    json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "bridge", "bridge": "cni0", "isDefaultGateway": true,
            "hairpinMode": true, "mtu": 1450, "ipMasq": false,
            "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.244.1.0/24" }]], "routes": [{ "dst": "10.244.0.0/16" }] } })
}

fn has_debian_plugins() -> bool {
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
            code == 7 && text.contains("failed to find plugin \"nosuch\" in path [/usr/lib/cni]"),
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
