//! Another plugin does the work: what it is told, for every verb, and what becomes of its failures.

use anyhow::{Context, Result, ensure};
use flannel_tests::{Host, in_lab};
use serde_json::{Value, json};

use crate::go::has_debian_plugins;
use crate::node::{Call, Node, answer, done, error, ip_of, one_host, with};

/// A plugin that writes down what it is told, answers what it finds in a file, and fails when there is a file that says so.
const RECORDER: &str = r#"#!/bin/sh
mkdir -p /run/recorded
at=/run/recorded/$(ls /run/recorded | wc -l)
cat > "$at"
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS $CNI_PATH" >> /run/calls
[ ! -e "/run/fail.$CNI_COMMAND" ] || { cat "/run/fail.$CNI_COMMAND"; exit 1; }
[ "$CNI_COMMAND" != ADD ] || cat /run/answer
"#;

const ANSWER: &str = "{\n    \"cniVersion\": \"1.1.0\",\n    \"ips\": [{\"address\": \"10.244.1.9/24\"}],\n    \"x-own\": {\"b\": 1, \"a\": 2}\n}\n";

struct Recorder<'a> {
    host: &'a Host,
}

impl<'a> Recorder<'a> {
    fn install(host: &'a Host) -> Result<Self> {
        host.write("/opt/cni/bin/recorder", RECORDER)?;
        host.sh("chmod 755 /opt/cni/bin/recorder")?;
        host.write("/run/answer", ANSWER)?;
        Ok(Self { host })
    }

    /// The calls since the last look, as verb and what came on stdin.
    fn calls(&self) -> Result<Vec<(String, Value)>> {
        let calls = self.host.sh("cat /run/calls 2>/dev/null || true; rm -f /run/calls")?;
        let verbs: Vec<String> =
            calls.lines().map(|line| line.split(' ').next().unwrap_or("").to_owned()).collect();
        let mut told = Vec::new();
        for at in 0..verbs.len() {
            let text = self.host.read(&format!("/run/recorded/{at}"))?;
            told.push(serde_json::from_str(&text).with_context(|| text.clone())?);
        }
        self.host.sh("rm -rf /run/recorded")?;
        Ok(verbs.into_iter().zip(told).collect())
    }

    fn fail(&self, verb: &str, with: Option<&str>) -> Result<()> {
        let file = format!("/run/fail.{verb}");
        match with {
            Some(text) => self.host.write(&file, text),
            None => self.host.sh(&format!("rm {file}")).map(drop),
        }
    }
}

fn conf() -> Value {
    json!({ "name": "cbr0", "cniVersion": "1.1.0", "type": "flannel",
        "delegate": { "type": "recorder", "x-own": [1, { "a": null }], "mtu": 1300 },
        "ipam": { "type": "x-ipam", "x-more": true, "routes": [{ "dst": "10.9.0.0/16" }] },
        "dns": { "nameservers": ["10.244.0.10"] }, "args": { "cni": { "ips": ["10.244.1.9"] } },
        "capabilities": { "ips": true }, "runtimeConfig": { "ips": ["10.244.1.9"] } })
}

/// What upstream tells, and what it loses: `dns` and `args`.
fn told() -> Value {
    json!({ "name": "cbr0", "cniVersion": "1.1.0", "type": "recorder", "x-own": [1, { "a": null }], "mtu": 1300, "ipMasq": false,
        "ipam": { "type": "x-ipam", "x-more": true, "ranges": [[{ "subnet": "10.244.1.0/24" }]],
                  "routes": [{ "dst": "10.9.0.0/16" }, { "dst": "10.244.0.0/16" }] },
        "dns": { "nameservers": ["10.244.0.10"] }, "args": { "cni": { "ips": ["10.244.1.9"] } },
        "runtimeConfig": { "ips": ["10.244.1.9"] } })
}

#[test]
fn every_verb_is_forwarded() {
    in_lab(one_host("cnideleg"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let recorder = Recorder::install(host)?;
        node.container("c1")?;
        let conf = conf();
        let call = |verb| Call { args: "IgnoreUnknown=1;X=y", ..Call::new(verb, "c1") };
        let scratch = || host.sh("ls /var/lib/cni/flannel");

        let added = node.call(&call("ADD"), &conf)?;
        ensure!(added.ok() && added.stdout == ANSWER && added.stderr.is_empty(), "{added}");
        let line = host.sh("cat /run/calls")?;
        ensure!(line == "ADD c1 /run/netns/c1 eth0 IgnoreUnknown=1;X=y /opt/cni/bin:/usr/lib/cni", "{line}");
        ensure!(recorder.calls()? == [("ADD".to_owned(), told())]);
        ensure!(scratch()? == "c1");
        let kept: Value = serde_json::from_str(&host.read("/var/lib/cni/flannel/c1")?)?;
        ensure!(kept == told(), "{kept}");

        let result: Value = serde_json::from_str(ANSWER)?;
        let later = with(&conf, "prevResult", result.clone());
        done(&node.call(&call("CHECK"), &later)?)?;
        ensure!(recorder.calls()? == [("CHECK".to_owned(), with(&told(), "prevResult", result.clone()))]);

        done(&node.call(&call("STATUS"), &conf)?)?;
        ensure!(recorder.calls()? == [("STATUS".to_owned(), told())]);

        done(&node.call(&call("GC"), &conf)?)?;
        ensure!(recorder.calls()?.is_empty(), "no list is not an empty one");
        let valid = json!([{ "containerID": "c1", "ifname": "eth0" }]);
        done(&node.call(&call("GC"), &with(&conf, "cni.dev/valid-attachments", valid.clone()))?)?;
        let expected =
            with(&with(&told(), "cni.dev/valid-attachments", valid.clone()), "cni.dev/attachments", valid);
        ensure!(recorder.calls()? == [("GC".to_owned(), expected)]);

        done(&node.call(&call("DEL"), &later)?)?;
        ensure!(recorder.calls()? == [("DEL".to_owned(), with(&told(), "prevResult", result))]);
        ensure!(scratch()?.is_empty());
        // Its file may be lost, as after a crash of the host.
        done(&node.call(&call("DEL"), &conf)?)?;
        ensure!(recorder.calls()? == [("DEL".to_owned(), told())]);
        ensure!(node.ledger()?.is_empty() && !node.links()?.contains("cni0"));
        Ok(())
    });
}

#[test]
fn a_delegates_failure_is_told_in_its_own_words() {
    in_lab(one_host("cnidelfail"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let recorder = Recorder::install(host)?;
        node.container("c1")?;
        let conf = conf();
        let call = |verb| node.call(&Call::new(verb, "c1"), &conf);
        let verbs =
            || -> Result<Vec<String>> { Ok(recorder.calls()?.into_iter().map(|(verb, _)| verb).collect()) };
        let scratch = || host.sh("ls /var/lib/cni/flannel");

        recorder.fail(
            "ADD",
            Some(r#"{"cniVersion":"1.1.0","code":117,"msg":"no more carrier","details":"of pigeons"}"#),
        )?;
        let (code, text) = error(&call("ADD")?)?;
        ensure!(
            code == 117 && text == "failed to delegate to /opt/cni/bin/recorder: no more carrier of pigeons",
            "{code} {text}"
        );
        ensure!(verbs()? == ["ADD", "DEL"] && scratch()?.is_empty());
        // What could not be taken back is the runtime's DEL's.
        recorder.fail("DEL", Some("what?"))?;
        ensure!(error(&call("ADD")?)?.0 == 117);
        ensure!(verbs()? == ["ADD", "DEL"] && scratch()?.is_empty());
        let tried = call("DEL")?;
        done(&tried)?;
        ensure!(verbs()? == ["DEL"] && tried.stderr.contains("recorder failed: exit status: 1"), "{tried}");
        recorder.fail("ADD", None)?;
        answer(&call("ADD")?)?;
        let (code, text) = error(&call("DEL")?)?;
        ensure!(code == 5 && text.contains("/opt/cni/bin/recorder failed: exit status: 1"), "{code} {text}");
        ensure!(scratch()? == "c1", "a DEL that failed comes again");
        recorder.fail("DEL", None)?;
        done(&call("DEL")?)?;
        ensure!(scratch()?.is_empty());

        for (told, expected) in [("51", 51), ("50", 50), ("4", 50)] {
            recorder.fail("STATUS", Some(&format!(r#"{{"code":{told},"msg":"m"}}"#)))?;
            let (code, text) = error(&call("STATUS")?)?;
            ensure!(code == expected && text.contains("recorder: m"), "{code} {text}");
        }
        recorder.fail("CHECK", Some(r#"{"code":100,"msg":"gone"}"#))?;
        call("ADD")?;
        let check = node
            .call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", json!({ "cniVersion": "1.1.0" })))?;
        ensure!(error(&check)?.0 == 100);
        call("DEL")?;
        // Who dies, and who does not even listen to a configuration larger than a pipe.
        host.write("/opt/cni/bin/recorder", "#!/bin/sh\nkill -SEGV $$\n")?;
        let (code, text) = error(&call("ADD")?)?;
        ensure!(code == 5 && text.contains("signal: 11"), "{code} {text}");
        host.write(
            "/opt/cni/bin/recorder",
            "#!/bin/sh\n[ $CNI_COMMAND != ADD ] || echo '{\"cniVersion\":\"1.1.0\"}'\n",
        )?;
        let large = with(&conf, "args", json!({ "cni": { "x": "x".repeat(1 << 20) } }));
        answer(&node.call(&Call::new("ADD", "c1"), &large)?)?;
        done(&node.call(&Call::new("DEL", "c1"), &large)?)?;
        ensure!(scratch()?.is_empty());
        Ok(())
    });
}

#[test]
fn real_plugins_do_the_work_of_other_kinds() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnikinds"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let before = node.links()?;
        let supported = |kind: &str| -> Result<bool> {
            let made = host.run(&["ip", "link", "add", "probe0", "link", "eth0", "type", kind])?.ok();
            // A kernel need not have them all.
            Ok(made && host.run(&["ip", "link", "del", "probe0"])?.ok())
        };
        let ipam = json!({ "type": "static", "addresses": [{ "address": "10.244.1.50/24", "gateway": "10.244.1.1" }] });
        for (kind, delegate, ipam, ip, shown) in [
            (
                "macvlan",
                json!({ "type": "macvlan", "master": "eth0", "mtu": 1450 }),
                json!({}),
                "10.244.1.2",
                "macvlan",
            ),
            (
                "ipvlan",
                json!({ "type": "ipvlan", "master": "eth0", "mtu": 1450 }),
                json!({}),
                "10.244.1.3",
                "ipvlan",
            ),
            ("static", json!({ "type": "bridge", "bridge": "other0" }), ipam, "10.244.1.50", "veth"),
        ] {
            if kind != "static" && !supported(kind)? {
                continue;
            }
            node.container(kind)?;
            let mut conf = with(&with(&Node::conf(), "delegate", delegate), "ipam", ipam);
            conf["cniVersion"] = json!("0.3.1");
            let result = node.add(kind, &conf).with_context(|| kind.to_owned())?;
            ensure!(ip_of(&result).starts_with(ip), "{kind}: {result}");
            let link =
                host.sh(&format!("ip -n {kind} -d -o link show eth0; ip -n {kind} -o addr show eth0"))?;
            ensure!(link.contains(shown) && link.contains(ip), "{kind}: {link}");
            node.del(kind, &conf)?;
            ensure!(!host.run(&["ip", "-n", kind, "link", "show", "eth0"])?.ok(), "{kind} is left");
            node.del(kind, &conf)?;
        }
        ensure!(node.ledger()?.is_empty() && host.sh("ls /var/lib/cni/flannel")?.is_empty());
        host.sh("ip link del other0")?;
        ensure!(node.links()? == before);
        Ok(())
    });
}

#[test]
fn plugins_that_send_each_other_round_come_to_an_end() {
    in_lab(one_host("cniround"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let before = node.links()?;
        node.container("c1")?;
        host.sh("mkdir -p /opt/cni/bin; ln -s /run/lab/bin/flannel /opt/cni/bin/flannel2; ln -s /run/lab/bin/flannel /opt/cni/bin/bridge")?;
        for (delegate, ipam, part) in [
            ("flannel2", "host-local", "is this plugin: leave it out"),
            ("bridge", "bridge", "do they name each other"),
        ] {
            let mut conf = with(&Node::conf(), "delegate", json!({ "type": delegate }));
            conf["ipam"] = json!({ "type": ipam });
            for verb in ["ADD", "DEL", "DEL"] {
                let output = node.call(&Call::new(verb, "c1"), &conf)?;
                ensure!(verb == "DEL" || error(&output)?.1.contains(part), "{output}");
            }
            ensure!(node.ledger()?.is_empty() && !node.links()?.contains("veth"), "{}", node.links()?);
        }
        host.sh("ip link del cni0 2>/dev/null || true")?;
        ensure!(node.links()? == before, "{}", node.links()?);
        Ok(())
    });
}

#[test]
fn a_bridge_of_ours_takes_addresses_from_another() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnideleg2"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        host.sh("mkdir -p /opt/cni/bin; ln -s /run/lab/bin/flannel /opt/cni/bin/bridge")?;
        node.container("c1")?;
        let addresses = json!([{ "address": "10.244.1.50/24", "gateway": "10.244.1.1" }]);
        let conf = with(&Node::conf(), "ipam", json!({ "type": "static", "addresses": addresses }));
        let result = node.add("c1", &conf)?;
        ensure!(ip_of(&result) == "10.244.1.50", "{result}");
        node.ping("c1", "10.244.1.1")?;
        done(&node.call(&Call::new("CHECK", "c1"), &with(&conf, "prevResult", result))?)?;
        ensure!(node.ledger()?.is_empty(), "who gives addresses keeps the books");
        node.del("c1", &conf)?;
        node.del("c1", &conf)?;
        ensure!(!node.links()?.contains("veth") && host.sh("ls /var/lib/cni/flannel")?.is_empty());
        Ok(())
    });
}
