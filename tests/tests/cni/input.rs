//! What comes in, as real runtimes write it and as nobody should: both are answered in order.

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_tests::{Host, Output, in_lab, needs};
use serde_json::{Value, json};

use crate::node::{Call, Node, V4, answer, done, error, ip_of, one_host, with};
use crate::results::well_formed;

/// Runs the plugin with these variables and this on stdin. `shell` says how: `flannel`, with redirections.
fn raw(host: &Host, variables: &[&str], stdin: &[u8], shell: &str) -> Result<Output> {
    host.write("/run/stdin", stdin)?;
    let script = format!("exec {shell}");
    let argv: Vec<&str> =
        ["env"].into_iter().chain(variables.iter().copied()).chain(["sh", "-c", &script]).collect();
    host.run_input(&argv, File::open(host.path("/run/stdin"))?)
}

const ADD: [&str; 5] = [
    "CNI_COMMAND=ADD",
    "CNI_CONTAINERID=c1",
    "CNI_NETNS=/run/netns/c1",
    "CNI_IFNAME=eth0",
    "CNI_PATH=/usr/lib/cni:/opt/cni/bin",
];

fn by(verb: &str) -> Vec<String> {
    ADD.iter().map(|variable| variable.replace("=ADD", &format!("={verb}"))).collect()
}

/// What runtimes were seen to send for one container: CNI_ARGS, and what they add to the configuration. None of them asks for more
/// than an address here.
fn recorded() -> Vec<(&'static str, &'static str, Value)> {
    vec![
        (
            "containerd 1.6, CRI",
            "K8S_POD_UID=5a1c9d0e;IgnoreUnknown=1;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_NAME=a;K8S_POD_NAMESPACE=default",
            json!({ "capabilities": { "portMappings": true, "bandwidth": true, "dns": true, "ips": true },
                    "runtimeConfig": { "dns": { "Servers": ["10.96.0.10"], "Searches": ["svc.cluster.local"], "Options": ["ndots:5"] },
                                       "portMappings": [], "bandwidth": null, "ipRanges": null,
                                       "io.kubernetes.cri.pod-annotations": { "a/b": "c" }, "cgroupPath": "/kubepods/x" } }),
        ),
        ("ctr", "", json!({ "capabilities": { "portMappings": true } })),
        (
            "podman 4.3",
            "IgnoreUnknown=1;K8S_POD_NAME=web",
            json!({ "capabilities": { "aliases": true, "ips": true }, "runtimeConfig": { "aliases": { "podman": ["web", "5a1c9d"] } } }),
        ),
        (
            "podman 4.3 with an address",
            "IgnoreUnknown=1;K8S_POD_NAME=web;IP=10.244.1.77",
            json!({ "runtimeConfig": { "portMappings": null } }),
        ),
        (
            "nerdctl 2",
            "IgnoreUnknown=1;NERDCTL_CNI_DHCP_HOSTNAME=web",
            json!({ "nerdctlID": "f3a9", "nerdctlLabels": { "x": "y" }, "runtimeConfig": { "bandwidth": {} } }),
        ),
        (
            "CRI-O 1.36",
            "IgnoreUnknown=true;K8S_POD_NAMESPACE=default;K8S_POD_NAME=a;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=5a1c9d0e",
            json!({ "runtimeConfig": { "io.kubernetes.cri-o.pod-annotations": {}, "aliases": {}, "mac": "" } }),
        ),
        (
            "keys in any case, and keys that nobody knows",
            "",
            json!({ "IPAM": { "Routes": [{ "Dst": "10.9.0.0/16", "GW": "10.244.1.1" }], "nobody": 1 },
                    "Delegate": { "HAIRPINMODE": true, "isdefaultgateway": true, "nobody": [1] }, "x-nobody": { "a": [null] } }),
        ),
    ]
}

#[test]
fn what_real_runtimes_send_is_understood() {
    in_lab(one_host("cniruntimes"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        node.container("c1")?;
        for (who, args, added) in recorded() {
            // kube-flannel's own.
            let mut conf = json!({ "name": "cbr0", "cniVersion": "0.3.1", "type": "flannel",
                "delegate": { "hairpinMode": true, "isDefaultGateway": true } });
            for (key, value) in added.as_object().context("an object")? {
                if key == "Delegate" {
                    conf.as_object_mut().context("an object")?.remove("delegate");
                }
                conf[key] = value.clone();
            }
            // Tracing variables come from the newest libcni.
            let args = format!("CNI_ARGS={args}");
            let more = [args.as_str(), "TRACEPARENT=00-4bf9-00f0-01", "TRACESTATE=a=b", "BAGGAGE=x"];
            let variables: Vec<&str> = ADD.into_iter().chain(more).collect();
            let output = raw(host, &variables, conf.to_string().as_bytes(), "flannel")?;
            ensure!(output.stderr.is_empty(), "{who}: {output}");
            let result = answer(&output).with_context(|| who.to_owned())?;
            well_formed("0.3.1", &result, "/run/netns/c1", "eth0")?;
            ensure!(who.contains("with an address") == (ip_of(&result) == "10.244.1.77"), "{who}: {result}");
            ensure!(host.sh("ip -n c1 route show default")?.contains("via 10.244.1.1"), "{who}");
            ensure!(host.sh("bridge -d link")?.contains("hairpin on"), "{who}");
            if who.starts_with("keys") {
                ensure!(host.sh("ip -n c1 route")?.contains("10.9.0.0/16 via 10.244.1.1"), "{who}");
            }
            let variables = by("DEL");
            let variables: Vec<&str> = variables.iter().map(String::as_str).chain(more).collect();
            let output = raw(host, &variables, conf.to_string().as_bytes(), "flannel")?;
            done(&output).with_context(|| who.to_owned())?;
            ensure!(output.stderr.is_empty(), "{who}: {output}");
        }
        ensure!(node.ledger()?.is_empty() && !node.links()?.contains("veth"));
        Ok(())
    });
}

#[test]
fn what_nobody_should_send_is_refused_in_words() {
    in_lab(one_host("cniinput"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        node.container("c1")?;
        let before = host.network_state()?;
        let conf = Node::conf().to_string();
        let nested = format!("{{\"name\":{}{}}}", "[".repeat(5000), "]".repeat(5000));
        for (stdin, shell, code, part) in [
            (b"".as_slice(), "flannel", 6, "error unmarshall network config"),
            (b"{", "flannel", 6, "EOF"),
            (nested.as_bytes(), "flannel", 6, "recursion limit"),
            (b"\xff\xfe{}", "flannel", 6, "error unmarshall"),
            (conf.as_bytes(), "flannel <&-", 6, "error unmarshall"),
            (b"", "flannel < /run", 5, "error reading from stdin"),
            (br#"{"name":"n","delegate":[]}"#, "flannel", 6, "delegate"),
            (br#"{"name":"n","runtimeConfig":"x"}"#, "flannel", 6, "runtimeConfig"),
            (br#"{"name":"n","ipam":{"routes":[5]}}"#, "flannel", 6, "ipam.routes[0]"),
            (br#"{"name":"n","runtimeConfig":{"ips":[5]}}"#, "flannel", 6, "runtimeConfig.ips"),
            (br#"{"name":"n","delegate":{"mtu":1e999}}"#, "flannel", 6, "number out of range"),
            (br#"{"name":"n","delegate":{"mtu":-1}}"#, "flannel", 6, "delegate.mtu"),
            (br#"{"name":"n","delegate":{"hairpinMode":"yes"}}"#, "flannel", 6, "hairpinMode"),
            (br#"{"name":".n"}"#, "flannel", 7, "invalid characters found in network name"),
        ] {
            let output = raw(host, &ADD, stdin, shell)?;
            let shown = String::from_utf8_lossy(&stdin[..stdin.len().min(80)]).into_owned();
            let (got, text) = error(&output).with_context(|| shown.clone())?;
            ensure!(got == code && text.contains(part), "{shown} {shell}: wanted {code} {part}: {output}");
            ensure!(output.stderr.is_empty() && output.code == 1, "{output}");
        }
        // A name for a file must not lead elsewhere, whatever verb.
        for verb in ["ADD", "DEL", "CHECK"] {
            for (name, value, part) in [
                ("CNI_CONTAINERID", "a/../b", "containerID"),
                ("CNI_CONTAINERID", "..", "containerID"),
                ("CNI_CONTAINERID", "a b", "containerID"),
                ("CNI_IFNAME", "..", "interface name"),
                ("CNI_IFNAME", "abcdefghijklmnop", "interface name"),
                ("CNI_IFNAME", "a:b", "interface name"),
                ("CNI_IFNAME", "a b", "interface name"),
            ] {
                let variables: Vec<String> = by(verb)
                    .into_iter()
                    .map(|variable| match variable.starts_with(name) {
                        true => format!("{name}={value}"),
                        false => variable,
                    })
                    .collect();
                let variables: Vec<&str> = variables.iter().map(String::as_str).collect();
                let (code, text) = error(&raw(host, &variables, conf.as_bytes(), "flannel")?)?;
                ensure!(code == 4 && text.contains(part), "{verb} {value}: {code} {text}");
            }
        }
        let none = raw(host, &["CNI_COMMAND=ADD"], conf.as_bytes(), "flannel")?;
        let all = "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing";
        ensure!(error(&none)?.1.contains(all), "{none}");
        ensure!(node.ledger()?.is_empty() && host.network_state()? == before);
        Ok(())
    });
}

#[test]
fn a_large_configuration_is_read_and_a_broken_pipe_is_no_crash() {
    in_lab(one_host("cnilarge"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        node.container("c1")?;
        let conf = with(&Node::conf(), "x-labels", json!(vec!["x".repeat(100); 20_000]));
        node.add("c1", &conf)?;
        node.del("c1", &conf)?;
        let conf = Node::conf().to_string();
        // A runtime that went away: what was made is taken down by the next one.
        for shell in [
            "flannel >&-",
            "flannel 2>&-",
            "flannel | true",
            "flannel 2>&1 >&- | true",
            "flannel > /dev/full",
        ] {
            for verb in ["ADD", "ADD", "DEL", "STATUS", "VERSION"] {
                let variables = by(verb);
                let variables: Vec<&str> = variables.iter().map(String::as_str).collect();
                let output = raw(host, &variables, conf.as_bytes(), &format!("sh -c '{shell}'"))?;
                ensure!(output.code < 2 && !output.all().contains("panick"), "{shell} {verb}: {output}");
            }
        }
        let about = raw(host, &[], b"", "sh -c 'flannel 2>&1 | true; flannel 2> /dev/full'")?;
        ensure!(about.ok(), "{about}");
        ensure!(node.ledger()?.is_empty() && !node.links()?.contains("veth"));
        Ok(())
    });
}

#[test]
fn versions_are_told_without_waiting_for_input() {
    in_lab(one_host("cnistdin"), |lab| {
        let host = lab.host(1);
        for shell in [
            "flannel <&-",
            "flannel </dev/null",
            "flannel < <(exec sleep 50 >/dev/null 2>&1)",
            "flannel </run",
        ] {
            let start = Instant::now();
            let output = raw(host, &["CNI_COMMAND=VERSION"], b"", &format!("bash -c '{shell}'"))?;
            let told = answer(&output).with_context(|| shell.to_owned())?;
            ensure!(told["cniVersion"] == "1.1.0", "{shell}: {told}");
            ensure!(start.elapsed() < Duration::from_secs(40), "{shell}: it waited");
        }
        Ok(())
    });
}

#[test]
fn the_hosts_own_namespace_is_refused_unless_it_is_insisted_on() {
    in_lab(one_host("cniown"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let before = host.network_state()?;
        let conf = Node::conf();
        for verb in ["ADD", "CHECK"] {
            let own = Call { netns: "/proc/self/ns/net".to_owned(), ifname: "own0", ..Call::new(verb, "c1") };
            let (code, text) = error(&node.call(&own, &with(&conf, "prevResult", json!({})))?)?;
            ensure!(code == 8 && text.contains("should not be the same"), "{verb}: {code} {text}");
        }
        ensure!(host.network_state()? == before && node.ledger()?.is_empty());
        ensure!(!host.exists("/var/lib/cni/networks/cbr0") && !host.exists("/var/lib/cni/flannel"));
        // DEL must not take the host's interface for the container's.
        let eth0 = Call { netns: "/proc/self/ns/net".to_owned(), ..Call::new("DEL", "c1") };
        done(&node.call(&eth0, &conf)?)?;
        ensure!(host.network_state()? == before);
        for insisted in ["CNI_NETNS_OVERRIDE=1", "CNI_NETNS_OVERRIDE=true"] {
            let own = |verb: &str| -> Result<Output> {
                let variables = [
                    &format!("CNI_COMMAND={verb}"),
                    "CNI_CONTAINERID=c1",
                    "CNI_NETNS=/proc/self/ns/net",
                    "CNI_IFNAME=own0",
                    "CNI_PATH=/usr/lib/cni",
                    insisted,
                ];
                raw(host, &variables, conf.to_string().as_bytes(), "flannel")
            };
            let result = answer(&own("ADD")?)?;
            ensure!(host.sh("ip -o addr show own0")?.contains(&ip_of(&result)), "{result}");
            done(&own("DEL")?)?;
            ensure!(!node.links()?.contains("own0") && node.ledger()?.is_empty());
        }
        Ok(())
    });
}

#[test]
fn a_lease_that_comes_late_is_waited_for() {
    in_lab(one_host("cnilate"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = Node::conf();
        node.container("c1")?;
        for first in [None, Some("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.2")] {
            host.sh("rm -rf /run/flannel")?;
            if let Some(first) = first {
                host.write("/run/flannel/subnet.env", first)?;
            }
            let added = thread::scope(|scope| {
                let adding = scope.spawn(|| node.add("c1", &conf));
                // Within its patience even where starting a process takes long.
                thread::sleep(Duration::from_millis(300));
                let written = host.write("/run/flannel/subnet.env.new", V4);
                let [new, env] =
                    ["subnet.env.new", "subnet.env"].map(|name| host.path("/run/flannel").join(name));
                let moved = fs::rename(new, env).context("could not rename");
                written.and(moved).and_then(|()| adding.join().expect("a call panicked"))
            })?;
            well_formed("1.0.0", &added, "/run/netns/c1", "eth0")?;
            // Nobody else waits.
            node.del("c1", &conf)?;
        }
        host.sh("rm -rf /run/flannel")?;
        let start = Instant::now();
        let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &conf)?)?;
        ensure!(start.elapsed() >= Duration::from_secs(2), "it did not wait");
        ensure!(
            code == 11
                && text.contains("/run/flannel/subnet.env")
                && text.contains("is flanneld")
                && text.contains("journalctl"),
            "{code} {text}"
        );
        if needs::find("strace") {
            host.write("/run/flannel/subnet.env", V4)?;
            let variables = by("ADD");
            let variables: Vec<&str> = variables.iter().map(String::as_str).collect();
            let output =
                raw(host, &variables, conf.to_string().as_bytes(), "strace -f -o /run/trace flannel")?;
            answer(&output)?;
            let trace = host.read("/run/trace")?;
            ensure!(
                trace.contains("subnet.env") && !trace.contains("inotify") && !trace.contains("epoll"),
                "a file that is ready was waited for"
            );
            node.del("c1", &conf)?;
        }
        Ok(())
    });
}
