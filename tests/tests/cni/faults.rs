//! What goes wrong on nodes, and what is left of it: nothing.
//!
//! | # | Fault | Test |
//! |---|-------|------|
//! | 1 | the host reboots, and nobody says DEL | `a_reboot_frees_what_nobody_took_down` |
//! | 2 | ADD dies at any step, DEL follows | `an_add_that_dies_at_any_step_is_undone_by_del` |
//! | 3 | ADD dies at any step, DEL never comes, GC does | `an_add_that_dies_at_any_step_is_undone_by_gc` |
//! | 4 | the runtime never says DEL (ctr 1.6), GC does | `what_nobody_took_down_is_collected` |
//! | 5 | DEL with no namespace, a vanished one, a file that is none; without subnet.env; without prevResult | `a_del_needs_to_know_nothing` |
//! | 6 | every address is held by containers that are gone | `addresses_of_the_dead_are_reclaimed_and_of_the_living_never` |
//! | 7 | entries without an owner: their writer died | `empty_entries_are_nobodys` |
//! | 8 | two interfaces in one container, taken down in any order, one ADD having died | `two_interfaces_go_one_by_one` |
//! | 9 | the node gets another subnet under running containers | `another_subnet_under_running_containers` |
//! | 10 | ADD twice, DEL twice; ADD again after one that died | `twice_is_once` |
//! | 11 | GC when nothing is valid, and GC that does not say what is | `gc_takes_everything_or_nothing` |
//! | 12 | the namespace is the host's own | `the_hosts_own_namespace_is_left_alone` |
//! | 13 | the scratch file is damaged or gone | `a_damaged_scratch_file_hinders_nobody` |
//! | 14 | the ledger was tidied up by hand | `interfaces_that_the_ledger_forgot_are_collected` |

use std::os::unix::fs::PermissionsExt;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use flannel_tests::{Output, eventually, in_lab, needs, secs};
use serde_json::{Value, json};

use crate::go::has_debian_plugins;
use crate::node::{Call, DEBIAN, LEDGER, Node, V4, answer, done, error, ip_of, one_host, with};
use crate::remains::{Remains, rich};

/// A test on one host where the network was used once. What it leaves behind, it compares with what was there `before`.
fn and_nothing_is_left(name: &str, test: impl FnOnce(&Node<'_>, &Remains) -> Result<()>) {
    in_lab(one_host(name), |lab| {
        let node = Node::new(lab.host(1))?;
        let before = Remains::before(&node)?;
        test(&node, &before)
    });
}

fn gc(node: &Node<'_>, conf: &Value, valid: &[(&str, &str)]) -> Result<()> {
    let valid: Vec<Value> =
        valid.iter().map(|(id, ifname)| json!({ "containerID": id, "ifname": ifname })).collect();
    let conf = with(&with(conf, "cniVersion", json!("1.1.0")), "cni.dev/valid-attachments", json!(valid));
    done(&node.call(&Call::new("GC", ""), &conf)?)
}

/// What ADD changes, it changes by one of these; dying at any other system call is dying before the next of them.
const STEPS: &str = "openat,write,symlink,symlinkat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,\
                     sendto,sendmsg,setns,flock,close";
/// More than any ADD takes.
const STEPS_MAX: usize = 400;

/// A plugin that is killed when it enters its n-th of [`STEPS`].
fn dying(node: &Node<'_>, step: usize) -> Result<String> {
    let script = format!(
        "#!/bin/sh\nexec strace -f -o /dev/null -e trace={STEPS} -e inject={STEPS}:signal=KILL:when={step} flannel\n"
    );
    let place = "/run/dying";
    node.host.write(place, script)?;
    fs::set_permissions(node.host.path(place), fs::Permissions::from_mode(0o755))?;
    Ok(place.to_owned())
}

/// Lets an ADD of `id` die at each of its steps in turn, does `repair` each time, and looks that nothing is left.
fn die_at_every_step(node: &Node<'_>, conf: &Value, repair: impl Fn() -> Result<()>) -> Result<()> {
    node.container("c1")?;
    // What ADD makes once for the node, it has made.
    node.add("c1", conf)?;
    node.del("c1", conf)?;
    let before = Remains::now(node)?;
    for step in 1..STEPS_MAX {
        let plugin = dying(node, step)?;
        let output = node.call(&Call { plugin: &plugin, ..Call::new("ADD", "c1") }, conf)?;
        if output.ok() {
            ensure!(step > 20, "an ADD of {step} steps is none: {output}");
            repair()?;
            return before.are_none(node, "an ADD that lived");
        }
        ensure!(output.code == 137 || output.stdout.is_empty(), "step {step}: {output}");
        repair().with_context(|| format!("after dying at step {step}"))?;
        before.are_none(node, &format!("dying at step {step}"))?;
        // Nothing stands in the way of the next one.
        if step.is_multiple_of(10) {
            node.add("c1", conf).with_context(|| format!("after dying at step {step}"))?;
            node.del("c1", conf)?;
        }
    }
    anyhow::bail!("an ADD of more than {STEPS_MAX} steps")
}

#[test]
fn an_add_that_dies_at_any_step_is_undone_by_del() {
    in_lab(one_host("cnidiedel").needs(&["strace"]).time_to_live(secs(600)), |lab| {
        let node = Node::new(lab.host(1))?;
        let conf = rich();
        die_at_every_step(&node, &conf, || {
            let call = Call { netns: String::new(), ..Call::new("DEL", "c1") };
            done(&node.call(&call, &conf)?)
        })
    });
}

#[test]
fn an_add_that_dies_at_any_step_is_undone_by_gc() {
    in_lab(one_host("cnidiegc").needs(&["strace"]).time_to_live(secs(600)), |lab| {
        let node = Node::new(lab.host(1))?;
        let conf = rich();
        die_at_every_step(&node, &conf, || gc(&node, &conf, &[]))
    });
}

#[test]
fn a_reboot_frees_what_nobody_took_down() {
    and_nothing_is_left("cnireboot", |node, before| {
        let host = node.host;
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
            node.add(id, &Node::conf())?;
        }
        // What a reboot does: namespaces, interfaces and everything below /run are gone, what is on the disk stays.
        host.sh(&format!(
            "for id in c1 c2 c3; do ip netns del $id; done; ip link del cni0; rm -rf /run/flannel; \
             echo 11111111-2222-3333-4444-555555555555 >{LEDGER}/boot_id; touch {LEDGER}/10.244.1.99"
        ))?;
        ensure!(node.ledger()?.len() == 4);
        host.write("/run/flannel/subnet.env", V4)?;
        node.container("c4")?;
        node.add("c4", &Node::conf())?;
        ensure!(node.ledger()?.len() == 1, "{:?}", node.ledger()?);
        // A runtime that finds its containers gone says so.
        for id in ["c1", "c2", "c3"] {
            done(&node.call(&Call { netns: String::new(), ..Call::new("DEL", id) }, &Node::conf())?)?;
        }
        node.del("c4", &Node::conf())?;
        host.sh("ip netns del c4")?;
        before.are_none(node, "a reboot")
    });
}

#[test]
fn what_nobody_took_down_is_collected() {
    and_nothing_is_left("cninodel", |node, before| {
        let conf = rich();
        for id in ["c1", "c2"] {
            node.container(id)?;
        }
        node.add("c1", &conf)?;
        let alive = with(&conf, "runtimeConfig", json!({}));
        node.add("c2", &alive)?;
        // Its processes ended, its namespace with them, and that was that.
        node.host.sh("ip netns del c1")?;
        gc(node, &conf, &[("c2", "eth0")])?;
        ensure!(node.ledger()? == ["10.244.1.4"], "{:?}", node.ledger()?);
        node.ping("c2", "10.244.1.1")?;
        node.del("c2", &alive)?;
        node.host.sh("ip netns del c2")?;
        before.are_none(node, "GC")
    });
}

#[test]
fn a_del_needs_to_know_nothing() {
    and_nothing_is_left("cnidelblind", |node, before| {
        let host = node.host;
        let conf = rich();
        host.write("/run/stale", "")?;
        let blind: [(&str, &str, &str); 5] = [
            ("", "", ""),
            ("/run/netns/c1", "", "ip netns del c1"),
            ("/run/stale", "", ""),
            ("", "rm /run/flannel/subnet.env", ""),
            ("/run/netns/c1", "rm /var/lib/cni/flannel/c1", ""),
        ];
        for (netns, first, gone) in blind {
            host.write("/run/flannel/subnet.env", V4)?;
            node.container("c1")?;
            node.add("c1", &conf)?;
            host.sh(&format!("true; {first}"))?;
            host.sh(&format!("true; {gone}"))?;
            // Without the capability too: some runtimes forget what they asked for.
            let conf =
                if first.contains("subnet") { with(&conf, "runtimeConfig", json!({})) } else { conf.clone() };
            let call = Call { netns: netns.to_owned(), ..Call::new("DEL", "c1") };
            done(&node.call(&call, &conf)?)?;
            done(&node.call(&call, &conf)?)?;
            host.sh("ip netns del c1 2>/dev/null || true")?;
            host.write("/run/flannel/subnet.env", V4)?;
            before.are_none(node, &format!("a DEL with {netns:?} after {first:?} {gone:?}"))?;
        }
        Ok(())
    });
}

#[test]
fn addresses_of_the_dead_are_reclaimed_and_of_the_living_never() {
    if !has_debian_plugins() {
        return;
    }
    in_lab(one_host("cnifull"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = with(&Node::conf(), "cniVersion", json!("1.1.0"));
        let go = json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "bridge", "bridge": "cni0", "isDefaultGateway": true,
                         "mtu": 1450, "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.244.1.0/24" }]] } });
        let bridge = format!("{DEBIAN}/bridge");
        for id in ["g1", "o1", "o2", "o3"] {
            node.container(id)?;
        }
        let ours = node.add("o1", &conf)?;
        let gos = answer(&node.call(&Call { plugin: &bridge, ..Call::new("ADD", "g1") }, &go)?)?;
        let living = [ip_of(&ours), ip_of(&gos)];
        // Every other address is a dead one's: some long so, some since a moment ago, some from ours.
        host.sh(&format!(
            "cd {LEDGER}; for n in $(seq 2 254); do [ -e 10.244.1.$n ] || printf 'dead%s\\r\\neth0' $n >10.244.1.$n; done; \
             touch -d '10 minutes ago' 10.244.1.*; touch -d '20 minutes ago' 10.244.1.77; touch 10.244.1.200"
        ))?;
        ensure!(node.ledger()?.len() == 253);
        done(&node.call(&Call::new("STATUS", ""), &conf)?)?;
        let output = node.call(&Call::new("ADD", "o2"), &conf)?;
        ensure!(ip_of(&answer(&output)?) == "10.244.1.77", "not the oldest: {output}");
        ensure!(output.stderr.contains("took back 250 of containers that are gone"), "{output}");
        let mut left = node.ledger()?;
        left.sort();
        let mut wanted =
            vec![living[0].clone(), living[1].clone(), "10.244.1.77".into(), "10.244.1.200".into()];
        wanted.sort();
        ensure!(left == wanted, "{left:?}");
        for (id, ip) in [("o1", &living[1]), ("g1", &living[0])] {
            node.ping(id, ip)?;
        }
        // A port of which nobody can say whose it is: who is behind it may have any of these addresses.
        host.sh(&format!(
            "ip netns add vm; ip link add vmtap type veth peer name eth0 netns vm; ip link set vmtap master cni0 up; \
             cd {LEDGER}; for n in $(seq 2 254); do [ -e 10.244.1.$n ] || printf 'dead%s\\r\\neth0' $n >10.244.1.$n; done; \
             touch -d '10 minutes ago' 10.244.1.*"
        ))?;
        let (code, text) = error(&node.call(&Call::new("ADD", "o3"), &conf)?)?;
        ensure!(
            code == 11 && text.contains("no free address: all 253 of 10.244.1.0/24 are taken"),
            "{code} {text}"
        );
        let (code, text) = error(&node.call(&Call::new("STATUS", ""), &conf)?)?;
        ensure!(code == 50 && text.contains("no free address"), "{code} {text}");
        // One of ours whose interface is gone is dead whatever else there is.
        host.sh("ip netns del o2")?;
        eventually("the interface is gone", secs(10), || {
            node.links().map(|links| links.matches("veth").count() <= 2)
        })?;
        ensure!(ip_of(&node.add("o3", &conf)?) == "10.244.1.77");
        Ok(())
    });
}

#[test]
fn empty_entries_are_nobodys() {
    and_nothing_is_left("cniempty", |node, before| {
        let host = node.host;
        node.container("c1")?;
        host.sh(&format!("cd {LEDGER}; for n in $(seq 2 254); do : >10.244.1.$n; done"))?;
        node.add("c1", &Node::conf())?;
        ensure!(node.ledger()?.len() == 1, "{:?}", node.ledger()?);
        // One more, and one whose writer lost power.
        host.sh(&format!("cd {LEDGER}; : >10.244.1.50; head -c 40 /dev/zero >10.244.1.51"))?;
        gc(node, &Node::conf(), &[("c1", "eth0")])?;
        ensure!(node.ledger()?.len() == 1, "{:?}", node.ledger()?);
        node.del("c1", &Node::conf())?;
        host.sh("ip netns del c1")?;
        before.are_none(node, "empty entries")
    });
}

#[test]
fn two_interfaces_go_one_by_one() {
    in_lab(one_host("cnitwogo").needs(&["strace"]), |lab| {
        let node = Node::new(lab.host(1))?;
        let before = Remains::before(&node)?;
        let conf = json!({ "name": "cbr0", "cniVersion": "1.1.0", "type": "flannel" });
        let call = |verb, ifname| Call { ifname, ..Call::new(verb, "c1") };
        for order in [["eth0", "net1"], ["net1", "eth0"]] {
            node.container("c1")?;
            answer(&node.call(&call("ADD", "eth0"), &conf)?)?;
            // The second one dies on its way, and is made anew.
            let plugin = dying(&node, 15)?;
            ensure!(!node.call(&Call { plugin: &plugin, ..call("ADD", "net1") }, &conf)?.ok());
            done(&node.call(&call("DEL", "net1"), &conf)?)?;
            answer(&node.call(&call("ADD", "net1"), &conf)?)?;
            for (n, ifname) in order.into_iter().enumerate() {
                let call = Call { netns: String::new(), ..call("DEL", ifname) };
                done(&node.call(&call, &conf)?)?;
                ensure!(node.ledger()?.len() == 1 - n, "{:?}", node.ledger()?);
            }
            lab.host(1).sh("ip netns del c1")?;
            before.are_none(&node, &format!("{order:?}"))?;
        }
        // GC knows them apart as well.
        node.container("c1")?;
        for ifname in ["eth0", "net1"] {
            answer(&node.call(&call("ADD", ifname), &conf)?)?;
        }
        gc(&node, &conf, &[("c1", "net1")])?;
        ensure!(node.ledger()?.len() == 1 && node.links()?.matches("veth").count() == 1);
        ensure!(lab.host(1).sh("ip -n c1 -o addr show net1")?.contains("10.244.1."));
        gc(&node, &conf, &[])?;
        lab.host(1).sh("ip netns del c1")?;
        before.are_none(&node, "GC")
    });
}

#[test]
fn another_subnet_under_running_containers() {
    in_lab(one_host("cnisubnet"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = with(&Node::conf(), "cniVersion", json!("1.1.0"));
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
        }
        node.add("c1", &conf)?;
        node.add("c2", &conf)?;
        host.write("/run/flannel/subnet.env", V4.replace("10.244.1.1", "10.244.7.1"))?;
        let third = node.add("c3", &conf)?;
        ensure!(ip_of(&third) == "10.244.7.2", "{third}");
        done(&node.call(&Call::new("STATUS", ""), &conf)?)?;
        let on_bridge = || host.sh("ip -4 -o addr show dev cni0 | grep -o '10.244[^ ]*/24' | sort | xargs");
        ensure!(on_bridge()? == "10.244.1.1/24 10.244.7.1/24", "{}", on_bridge()?);
        node.ping("c1", "10.244.1.1")?;
        node.ping("c3", "10.244.7.1")?;
        node.ping("c1", &ip_of(&third))?;
        node.del("c1", &conf)?;
        ensure!(on_bridge()? == "10.244.1.1/24 10.244.7.1/24", "{}", on_bridge()?);
        node.del("c2", &conf)?;
        ensure!(
            on_bridge()? == "10.244.7.1/24",
            "the old gateway outlived its last container: {}",
            on_bridge()?
        );
        node.del("c3", &conf)?;
        ensure!(node.ledger()?.is_empty());
        Ok(())
    });
}

#[test]
fn twice_is_once() {
    in_lab(one_host("cnitwiceonce").needs(&["strace"]), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let before = Remains::before(&node)?;
        let conf = Node::conf();
        node.container("c1")?;
        let first = node.add("c1", &conf)?;
        let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &conf)?)?;
        ensure!(code == 141 && text.contains("duplicate allocation is not allowed"), "{code} {text}");
        node.ping("c1", "10.244.1.1")?;
        node.del("c1", &conf)?;
        node.del("c1", &conf)?;
        // Two at once: one makes it, the other says so and harms nothing.
        let both: Vec<Output> = thread::scope(|scope| {
            let add = || node.call(&Call::new("ADD", "c1"), &conf);
            let other = scope.spawn(add);
            let one = add()?;
            Ok::<_, anyhow::Error>(vec![one, other.join().expect("a call panicked")?])
        })?;
        ensure!(both.iter().filter(|output| output.ok()).count() == 1, "{} {}", both[0], both[1]);
        ensure!(node.ledger()?.len() == 1);
        node.ping("c1", "10.244.1.1")?;
        node.del("c1", &conf)?;
        // One that died before it had an interface: the next gets what it had.
        for step in 2..STEPS_MAX {
            let plugin = dying(&node, step)?;
            let output = node.call(&Call { plugin: &plugin, ..Call::new("ADD", "c1") }, &conf)?;
            ensure!(!output.ok(), "no ADD died between its address and its interface: {output}");
            match (node.ledger()?.first().cloned(), node.links()?.contains("veth")) {
                (Some(held), false) => {
                    ensure!(ip_of(&node.add("c1", &conf)?) == held && node.ledger()?.len() == 1);
                    ensure!(held != ip_of(&first), "a freed address rests");
                    node.del("c1", &conf)?;
                    host.sh("ip netns del c1")?;
                    return before.are_none(&node, "an ADD in two goes");
                }
                _ => node.del("c1", &conf)?,
            }
        }
        anyhow::bail!("no ADD died between its address and its interface")
    });
}

#[test]
fn gc_takes_everything_or_nothing() {
    and_nothing_is_left("cnigcall", |node, before| {
        let host = node.host;
        let conf = rich();
        let plain = with(&conf, "runtimeConfig", json!({}));
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
        }
        node.add("c1", &conf)?;
        node.add("c2", &plain)?;
        answer(&node.call(&Call { ifname: "net1", ..Call::new("ADD", "c2") }, &plain)?)?;
        let state = Remains::now(node)?;
        done(&node.call(&Call::new("GC", ""), &plain)?)?;
        state.are_none(node, "a GC that does not say what is valid")?;
        // Docker's are not the runtime's to know.
        host.sh(&format!("cd {LEDGER}; printf 'docker:e1\\r\\neth0' >10.244.1.100"))?;
        gc(node, &conf, &[])?;
        ensure!(node.ledger()? == ["10.244.1.100"], "{:?}", node.ledger()?);
        host.sh(&format!("rm {LEDGER}/10.244.1.100; for id in c1 c2 c3; do ip netns del $id; done"))?;
        before.are_none(node, "GC with nothing valid")
    });
}

#[test]
fn the_hosts_own_namespace_is_left_alone() {
    and_nothing_is_left("cniownns", |node, before| {
        let host = node.host;
        for verb in ["ADD", "DEL"] {
            let call = Call { netns: "/proc/1/ns/net".to_owned(), ifname: "eth0", ..Call::new(verb, "c1") };
            let output = node.call(&call, &rich())?;
            match verb {
                "ADD" => ensure!(error(&output)?.0 == 8, "{output}"),
                _ => done(&output)?,
            }
            before.are_none(node, verb)?;
        }
        ensure!(host.sh("ip -o link show eth0")?.contains("UP"));
        Ok(())
    });
}

#[test]
fn a_damaged_scratch_file_hinders_nobody() {
    and_nothing_is_left("cniscratch", |node, before| {
        let host = node.host;
        let conf = rich();
        let file = "/var/lib/cni/flannel/c1";
        for damage in [format!(": >{file}"), format!("printf '{{\"name\":' >{file}"), format!("rm {file}")] {
            for collected in [false, true] {
                node.container("c1")?;
                node.add("c1", &conf)?;
                host.sh(&damage)?;
                // Without a file, GC cannot tell whose it is as long as it lives.
                host.sh("ip netns del c1")?;
                if collected {
                    eventually("GC takes it for dead", secs(20), || {
                        gc(node, &conf, &[])?;
                        node.ledger().map(|entries| entries.is_empty())
                    })?;
                } else {
                    node.del("c1", &conf)?;
                }
                before.are_none(node, &format!("{damage}, by GC: {collected}"))?;
            }
        }
        // A live one with an unreadable file, too.
        node.container("c1")?;
        node.add("c1", &conf)?;
        host.sh(&format!(": >{file}"))?;
        gc(node, &conf, &[])?;
        host.sh("ip netns del c1")?;
        before.are_none(node, "GC of an unreadable file")
    });
}

#[test]
fn interfaces_that_the_ledger_forgot_are_collected() {
    and_nothing_is_left("cniforgot", |node, before| {
        let host = node.host;
        for id in ["c1", "c2", "c3"] {
            node.container(id)?;
            node.add(id, &Node::conf())?;
        }
        // As advice on the net has it when addresses run out.
        host.sh(&format!("rm {LEDGER}/10.244.1.[34] /var/lib/cni/flannel/*"))?;
        gc(node, &Node::conf(), &[("c2", "eth0"), ("c3", "eth0")])?;
        // Of c1 there is nothing but the interface, and its address would be the next to be given away.
        ensure!(node.links()?.matches("veth").count() == 2, "{}", node.links()?);
        gc(node, &Node::conf(), &[("c3", "eth0")])?;
        ensure!(node.links()?.matches("veth").count() == 1, "{}", node.links()?);
        node.ping("c3", "10.244.1.1")?;
        for id in ["c1", "c2", "c3"] {
            node.del(id, &Node::conf())?;
            host.sh(&format!("ip netns del {id}"))?;
        }
        before.are_none(node, "a ledger that was tidied up")
    });
}

#[test]
fn containers_that_are_cut_off_make_status_say_so() {
    in_lab(one_host("cnicutoff"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = with(&Node::conf(), "cniVersion", json!("1.1.0"));
        let status = || node.call(&Call::new("STATUS", ""), &conf);
        done(&status()?)?;
        node.container("c1")?;
        node.add("c1", &conf)?;
        done(&status()?)?;
        for (harm, part) in [
            ("ip addr flush dev cni0", "ip address add 10.244.1.1/24 dev cni0"),
            ("ip addr add 10.244.1.1/24 dev cni0; ip link set cni0 down", "ip link set cni0 up"),
            ("ip link del cni0", "the bridge cni0 is gone"),
        ] {
            host.sh(harm)?;
            let (code, text) = error(&status()?)?;
            ensure!(
                code == 51 && text.contains("1 containers") && text.contains(part),
                "{harm}: {code} {text}"
            );
        }
        // Who is gone suffers no more, and the next container makes it anew.
        node.del("c1", &conf)?;
        done(&status()?)?;
        node.container("c2")?;
        node.add("c2", &conf)?;
        done(&status()?)?;
        node.del("c2", &conf)
    });
}

#[test]
fn a_ledger_that_is_locked_does_not_hang_anybody() {
    if !needs::require("flock") {
        return;
    }
    in_lab(one_host("cnilocked"), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        node.container("c1")?;
        node.add("c1", &Node::conf())?;
        node.del("c1", &Node::conf())?;
        let holder = host.spawn("holder", &["flock", &format!("{LEDGER}/lock"), "sleep", "60"], &[])?;
        eventually("it is locked", secs(10), || {
            host.run(&["flock", "-n", &format!("{LEDGER}/lock"), "true"]).map(|output| !output.ok())
        })?;
        let (code, text) = error(&node.call(&Call::new("ADD", "c1"), &Node::conf())?)?;
        ensure!(code == 11 && text.contains("still locked by another process after 10 s"), "{code} {text}");
        holder.crash()?;
        ensure!(node.ledger()?.is_empty() && !node.links()?.contains("veth"));
        Ok(())
    });
}
