//! The plugin `host-local`, ours and Debian's (Go), on one directory: the same answers, and no address twice.

use std::collections::BTreeMap;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::{Output, in_lab};
use serde_json::{Value, json};

use crate::go::has_debian_plugins;
use crate::node::{Call, DEBIAN, Node, answer, done, error, one_host, ours, with};

const DIR: &str = "/var/lib/cni/networks";

fn conf(name: &str, ipam: Value) -> Value {
    let mut conf = json!({ "name": name, "cniVersion": "0.4.0", "type": "any", "ipam": ipam });
    conf["ipam"]["type"] = json!("host-local");
    conf
}

/// What an ADD is asked.
struct Asked {
    id: &'static str,
    args: &'static str,
    conf: Value,
}

/// A run of calls on a fresh ledger, by one program: what each answered.
fn answers(node: &Node<'_>, plugin: &str, name: &str, asked: &[Asked]) -> Result<Vec<Value>> {
    node.host.sh(&format!("rm -rf {DIR}/{name}"))?;
    let mut answers = Vec::new();
    for Asked { id, args, conf } in asked {
        let conf = with(conf, "name", json!(name));
        let call = Call { plugin, args, netns: "/run/netns/x".to_owned(), ..Call::new("ADD", id) };
        let output = node.call(&call, &conf)?;
        answers.push(match output.ok() {
            true => {
                let mut result = answer(&output)?;
                // One leaves empty ones out.
                result["dns"] = result.get("dns").cloned().unwrap_or_else(|| json!({}));
                result
            }
            false => json!("refused"),
        });
        // Both must find what they claimed, and what the other claimed.
        if output.ok() {
            for plugin in [plugin, &format!("{DEBIAN}/host-local")] {
                let checked = with(&conf, "prevResult", answers.last().cloned().unwrap_or_default());
                done(&node.call(
                    &Call { plugin, args: "", netns: call.netns.clone(), ..Call::new("CHECK", id) },
                    &checked,
                )?)?;
            }
        }
    }
    // Where the next search starts may differ after a failure; it is a hint.
    let ledger = node.host.sh(&format!(
        "cd {DIR}/{name} 2>/dev/null && for f in $(ls | grep -v -e lock -e boot_id -e last_reserved); do echo $f $(cat -A $f); done || true"
    ))?;
    answers.push(json!(ledger));
    Ok(answers)
}

fn asked(ipam: Value, calls: &[(&'static str, &'static str)]) -> Vec<Asked> {
    calls.iter().map(|(id, args)| Asked { id, args, conf: conf("n", ipam.clone()) }).collect()
}

/// Every call that a configuration can differ in.
fn cases() -> Vec<(&'static str, Vec<Asked>)> {
    let several = || vec![("a", ""), ("b", ""), ("c", ""), ("d", "")];
    let ranges = json!({ "ranges": [[{ "subnet": "10.1.0.0/29", "rangeStart": "10.1.0.3", "rangeEnd": "10.1.0.4" },
                                     { "subnet": "10.2.0.0/29", "gateway": "10.2.0.6" }],
                                    [{ "subnet": "fd00:1::/64", "rangeStart": "fd00:1::10" }]] });
    let routed = json!({ "subnet": "10.1.0.0/24", "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.9.0.0/16", "gw": "10.1.0.9" }],
                         "resolvConf": "/run/resolv.conf" });
    let runtime = |key: &str, value: Value, id| Asked {
        id,
        args: "",
        conf: with(&conf("n", json!({ "subnet": "10.1.0.0/29" })), "runtimeConfig", json!({ key: value })),
    };
    vec![
        ("a whole subnet", asked(json!({ "subnet": "10.1.0.0/24" }), &several())),
        ("the smallest subnet, to its end", asked(json!({ "subnet": "10.1.0.0/30" }), &several())),
        ("another gateway", asked(json!({ "subnet": "10.1.0.0/30", "gateway": "10.1.0.2" }), &several())),
        (
            "a part of a subnet, to its end",
            asked(
                json!({ "subnet": "10.1.0.0/24", "rangeStart": "10.1.0.7", "rangeEnd": "10.1.0.9" }),
                &several(),
            ),
        ),
        ("several ranges in several sets", asked(ranges, &several())),
        ("routes and name servers", asked(routed, &several())),
        ("IPv6 alone", asked(json!({ "subnet": "fd00::/126" }), &several())),
        (
            "an address by CNI_ARGS",
            asked(
                json!({ "subnet": "10.1.0.0/24" }),
                &[
                    ("a", "IP=10.1.0.9"),
                    ("b", ""),
                    ("c", "IP=10.1.0.9"),
                    ("d", "IP=10.1.0.1"),
                    ("e", "IP=192.0.2.1"),
                ],
            ),
        ),
        ("twice", asked(json!({ "subnet": "10.1.0.0/24" }), &[("a", ""), ("a", ""), ("b", "")])),
        (
            "addresses by capability",
            vec![
                runtime("ips", json!(["10.1.0.5/29"]), "a"),
                runtime("ips", json!(["10.1.0.5", "10.1.0.6"]), "b"),
            ],
        ),
        (
            "ranges by capability",
            vec![
                runtime("ipRanges", json!([[{ "subnet": "10.7.0.0/24" }]]), "a"),
                runtime("ipRanges", json!([]), "b"),
            ],
        ),
        ("no ranges", asked(json!({}), &[("a", "")])),
        ("too small", asked(json!({ "subnet": "10.1.0.0/31" }), &[("a", "")])),
        ("host bits", asked(json!({ "subnet": "10.1.0.3/24" }), &[("a", "")])),
        (
            "sets that overlap",
            asked(
                json!({ "ranges": [[{ "subnet": "10.1.0.0/24" }], [{ "subnet": "10.1.0.0/16" }]] }),
                &[("a", "")],
            ),
        ),
        (
            "ranges that overlap",
            asked(
                json!({ "ranges": [[{ "subnet": "10.1.0.0/24" }, { "subnet": "10.1.0.0/16" }]] }),
                &[("a", "")],
            ),
        ),
        (
            "mixed families",
            asked(
                json!({ "ranges": [[{ "subnet": "10.1.0.0/24" }, { "subnet": "fd00::/64" }]] }),
                &[("a", "")],
            ),
        ),
        (
            "a start outside",
            asked(json!({ "subnet": "10.1.0.0/24", "rangeStart": "10.2.0.1" }), &[("a", "")]),
        ),
        (
            "the wrong way round",
            asked(
                json!({ "subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.8" }),
                &[("a", "")],
            ),
        ),
        (
            "unknown arguments",
            asked(json!({ "subnet": "10.1.0.0/24" }), &[("a", "FOO=1"), ("b", "IgnoreUnknown=1;FOO=1")]),
        ),
    ]
}

#[test]
fn both_answer_the_same() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnihlsame"), |lab| {
        let node = Node::new(lab.host(1))?;
        let mine = ours(lab.host(1), "host-local")?;
        lab.host(1).write(
            "/run/resolv.conf",
            "nameserver 10.1.0.53\nsearch a.example b.example\noptions ndots:2\n",
        )?;
        for (what, asked) in cases() {
            let go = answers(&node, &format!("{DEBIAN}/host-local"), "n", &asked)?;
            let rust = answers(&node, &mine, "n", &asked)?;
            ensure!(go == rust, "{what}: Go says\n{go:#?}\nand we\n{rust:#?}");
        }
        Ok(())
    });
}

#[test]
fn each_takes_down_what_the_other_made() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnihldel"), |lab| {
        let node = Node::new(lab.host(1))?;
        let mine = ours(lab.host(1), "host-local")?;
        let go = format!("{DEBIAN}/host-local");
        let conf =
            conf("n", json!({ "ranges": [[{ "subnet": "10.1.0.0/24" }], [{ "subnet": "fd00::/64" }]] }));
        let call = |plugin, verb, id| {
            node.call(&Call { plugin, netns: "/run/netns/x".into(), ..Call::new(verb, id) }, &conf)
        };
        let files = || {
            lab.host(1)
                .sh(&format!("cd {DIR}/n; ls -A | grep -v -e ^lock -e ^last_reserved -e ^boot_id || true"))
        };
        for (maker, taker) in [(&mine, &go), (&go, &mine), (&mine, &mine)] {
            for id in ["a", "b"] {
                answer(&call(maker, "ADD", id)?)?;
            }
            done(&call(taker, "DEL", "a")?)?;
            ensure!(!files()?.is_empty());
            done(&call(taker, "DEL", "b")?)?;
            done(&call(taker, "DEL", "b")?)?;
            ensure!(files()?.is_empty(), "{maker} made, {taker} left: {}", files()?);
        }
        // GC and STATUS are ours alone.
        let new = with(&conf, "cniVersion", json!("1.1.0"));
        for id in ["a", "b"] {
            answer(&call(if id == "a" { &go } else { &mine }, "ADD", id)?)?;
        }
        let ask = |verb, conf: &Value| node.call(&Call { plugin: &mine, ..Call::new(verb, "") }, conf);
        done(&ask("GC", &new)?)?;
        ensure!(files()?.matches("10.1.0.").count() >= 2, "{}", files()?);
        let valid = json!([{ "containerID": "b", "ifname": "eth0" }]);
        done(&ask("GC", &with(&new, "cni.dev/valid-attachments", valid))?)?;
        done(&call(&mine, "CHECK", "b")?)?;
        ensure!(
            error(&call(&mine, "CHECK", "a")?)?.1.contains("Failed to find address added by container a")
        );
        done(&ask("GC", &with(&new, "cni.dev/valid-attachments", json!([])))?)?;
        ensure!(files()?.is_empty(), "{}", files()?);
        done(&ask("STATUS", &new)?)?;
        let full = with(&new, "ipam", json!({ "type": "host-local", "subnet": "10.3.0.0/30" }));
        answer(
            &node.call(
                &Call { plugin: &mine, netns: "/run/netns/x".into(), ..Call::new("ADD", "z") },
                &full,
            )?,
        )?;
        let (code, text) = error(&ask("STATUS", &full)?)?;
        ensure!(code == 50 && text.contains("all 1 of 10.3.0.0/30 are taken"), "{code} {text}");
        Ok(())
    });
}

#[test]
fn four_of_each_give_no_address_twice() {
    const OPERATIONS: usize = 250;
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnihlmany").time_to_live(std::time::Duration::from_secs(600)), |lab| {
        let node = Node::new(lab.host(1))?;
        let mine = ours(lab.host(1), "host-local")?;
        let go = format!("{DEBIAN}/host-local");
        // So few addresses that they go round and run out now and then.
        let conf = conf("n", json!({ "subnet": "10.1.0.0/28" }));
        let held = std::sync::Mutex::new(BTreeMap::<String, String>::new());
        let work = |worker: usize| -> Result<usize> {
            let plugin = if worker.is_multiple_of(2) { &mine } else { &go };
            let other = if worker % 4 < 2 { &mine } else { &go };
            let mut given = 0;
            let mut own: Vec<(String, String)> = Vec::new();
            for n in 0..OPERATIONS {
                let call = |plugin, verb, id| -> Result<Output> {
                    node.call(&Call { plugin, netns: "/run/netns/x".into(), ..Call::new(verb, id) }, &conf)
                };
                if own.len() >= 2 || (n % 3 == 2 && !own.is_empty()) {
                    let (id, ip) = own.remove(0);
                    // Ours no more before the ledger says so.
                    held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&ip);
                    done(&call(other, "DEL", &id)?)?;
                    continue;
                }
                let id = format!("w{worker}n{n}");
                let output = call(plugin, "ADD", &id)?;
                if !output.ok() {
                    ensure!(
                        output.stdout.contains("no free address")
                            || output.stdout.contains("no IP addresses available"),
                        "{output}"
                    );
                    continue;
                }
                let ip = answer(&output)?["ips"][0]["address"].as_str().context("no address")?.to_owned();
                let before = held
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .insert(ip.clone(), id.clone());
                if let Some(before) = before {
                    bail!("{ip} was given to {id} while {before} had it");
                }
                own.push((id, ip));
                given += 1;
            }
            for (id, ip) in own {
                held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&ip);
                done(&node.call(
                    &Call { plugin: other, netns: "/run/netns/x".into(), ..Call::new("DEL", &id) },
                    &conf,
                )?)?;
            }
            Ok(given)
        };
        let given: Vec<usize> = thread::scope(|scope| {
            let workers: Vec<_> = (0..8)
                .map(|worker| {
                    let work = &work;
                    scope.spawn(move || work(worker))
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().expect("a worker panicked")).collect::<Result<_>>()
        })?;
        println!("{} addresses were given in {} operations", given.iter().sum::<usize>(), 8 * OPERATIONS);
        ensure!(given.iter().all(|given| *given > 20), "{given:?}");
        let left = lab
            .host(1)
            .sh(&format!("cd {DIR}/n; ls -A | grep -v -e ^lock -e ^last_reserved -e ^boot_id || true"))?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    });
}
