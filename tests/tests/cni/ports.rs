//! Ports of a node that lead into containers, without any daemon: who reaches them, who is seen, and what is left.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, anyhow, ensure};
use flannel_tests::{
    Host, HttpServer, Lab, LabPlan, Place, eventually, in_lab, needs, secs, seen_as, send_datagrams,
    tcp_opens,
};
use serde_json::{Value, json};

use crate::node::{Call, Node, answer, done, error, with};
use crate::pod::{Pod, served};

const TABLE: &[&str] = &["nft", "list", "table", "inet", "flannel_cni_ports"];
const DUAL: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00:244::/48\n\
    FLANNEL_IPV6_SUBNET=fd00:244:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

fn plan(name: &str, hosts: usize) -> LabPlan {
    Lab::new(name).hosts(hosts).ip_forward(false).needs(&["busybox", "nft"])
}

/// The configuration with ports, as containerd spells them.
fn mapped(mappings: &Value) -> Value {
    with(&Node::conf(), "runtimeConfig", json!({ "portMappings": mappings }))
}

fn tcp(host_port: u16) -> Value {
    json!([{ "HostPort": host_port, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "" }])
}

/// Elements of the table, by their comments.
fn elements(host: &Host) -> Result<usize> {
    Ok(host.out(TABLE)?.matches("comment").count())
}

fn nothing_left(host: &Host) -> Result<()> {
    let table = host.out(TABLE)?;
    ensure!(!table.contains("elements"), "{table}");
    let state =
        host.sh("find /run/flannel/cni -type f ! -name lock; find /run/flannel/cni -mindepth 1 -type d")?;
    ensure!(state.is_empty(), "{state}");
    Ok(())
}

/// A copy of the binary under the other name.
fn portmap(host: &Host) -> Result<String> {
    host.sh("mkdir -p /opt/cni/bin; ln -sf \"$(command -v flannel)\" /opt/cni/bin/portmap")?;
    Ok("/opt/cni/bin/portmap".to_owned())
}

#[test]
fn a_port_is_reached_from_everywhere_and_callers_are_seen() {
    in_lab(plan("cniports", 2).outside(), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let node = Node::new(h1)?;
        let ip = h1.ip().to_string();
        let (on_host, gateway) = (format!("{ip}:8080"), "10.244.1.1");
        let mappings = json!([
            { "HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "" },
            { "hostPort": 8081, "containerPort": 80, "protocol": "TCP", "hostIP": ip },
            { "hostPort": 8082, "containerPort": 80, "hostIP": "127.0.0.1" },
            { "hostPort": 8083, "containerPort": 80, "protocol": "tcp", "hostIP": "0.0.0.0" },
        ]);
        let c1 = Pod::add(&node, "c1", &mapped(&mappings))?;
        let n1 = Pod::add(&node, "n1", &Node::conf())?;
        let _server = c1.serve()?;

        for from in [lab.outside(), h2, h1] {
            served(from, &on_host, "c1")?;
            served(from, &format!("{ip}:8081"), "c1")?;
            served(from, &format!("{ip}:8083"), "c1")?;
        }
        for at in ["127.0.0.1:8080", "127.1.2.3:8080", "127.0.0.1:8082", "127.0.0.1:8083", "10.244.1.1:8080"]
        {
            served(h1, at, "c1")?;
        }
        for pod in [&c1, &n1] {
            served(pod, &on_host, "c1")?;
            served(pod, "10.244.1.1:8080", "c1")?;
        }
        // The container sees who calls, wherever the answer comes back through this host by itself.
        ensure!(seen_as(lab.outside(), &ip, 8080)? == "198.51.100.2");
        ensure!(seen_as(h2, &ip, 8080)? == h2.ip().to_string());
        ensure!(seen_as(h1, &ip, 8080)? == ip);
        ensure!(seen_as(h1, "127.0.0.1", 8080)? == gateway);
        ensure!(seen_as(&n1, &ip, 8080)? == gateway && seen_as(&c1, &ip, 8080)? == gateway);
        ensure!(seen_as(&n1, &c1.ip, 80)? == n1.ip);
        // A port of one address answers on that alone.
        ensure!(tcp_opens(h1, "127.0.0.1", 8081).is_err() && tcp_opens(h1, gateway, 8081).is_err());
        ensure!(tcp_opens(h2, &ip, 8082).is_err() && tcp_opens(h1, &ip, 8082).is_err());
        ensure!(tcp_opens(h2, &ip, 80).is_err());
        others_translations_are_their_own(h1, &n1, &c1)?;
        // Nobody beside the host reaches what listens on 127.0.0.1 only, though its loopback addresses are routed now.
        let _private = HttpServer::start(h1, 9999, "private")?;
        ensure!(h1.sh("cat /proc/sys/net/ipv4/conf/cni0/route_localnet")? == "1");
        n1.sh("ip route add 127.0.0.9/32 via 10.244.1.1; ip route flush table local 127.0.0.0/8 || true
               sysctl -qw net.ipv4.conf.eth0.route_localnet=1")?;
        ensure!(tcp_opens(&n1, "127.0.0.9", 9999).is_err());

        node.del("c1", &mapped(&mappings))?;
        ensure!(tcp_opens(h2, &ip, 8080).is_err() && tcp_opens(h1, "127.0.0.1", 8080).is_err());
        nothing_left(h1)?;
        node.del("c1", &mapped(&mappings))
    });
}

/// A service of Kubernetes is an address of no host; where it leads to a neighbor, the neighbor sees the caller.
fn others_translations_are_their_own(host: &Host, from: &Pod<'_>, to: &Pod<'_>) -> Result<()> {
    const BRIDGES_FILTER: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    // Without, what goes from port to port of a bridge cannot be translated at all.
    if !host.exists(BRIDGES_FILTER) {
        return Ok(());
    }
    host.sh(&format!(
        "before=$(cat {BRIDGES_FILTER}); echo 1 > {BRIDGES_FILTER}; echo $before > /run/before
         nft add table ip service
         nft add chain ip service pre '{{ type nat hook prerouting priority -90; }}'
         nft add rule ip service pre ip daddr 10.96.0.1 tcp dport 8080 dnat to {}:80",
        to.ip
    ))?;
    let seen = seen_as(from, "10.96.0.1", 8080);
    host.sh(&format!("nft delete table ip service; cat /run/before > {BRIDGES_FILTER}"))?;
    let seen = seen?;
    ensure!(seen == from.ip, "a service's caller is seen as {seen}");
    Ok(())
}

#[test]
fn ports_of_both_families() {
    in_lab(plan("cniports6", 2), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let node = Node::new(h1)?;
        h1.write("/run/flannel/subnet.env", DUAL)?;
        let at6 = "[fd77::b]";
        let mappings = json!([
            { "hostPort": 8080, "containerPort": 80 },
            { "hostPort": 8081, "containerPort": 80, "hostIP": "fd77::b" },
            { "hostPort": 8082, "containerPort": 80, "hostIP": "::" },
            { "hostPort": 8083, "containerPort": 80, "hostIP": "0.0.0.0" },
            { "hostPort": 8084, "containerPort": 80, "protocol": "sctp" },
        ]);
        let c1 = Pod::add(&node, "c1", &mapped(&mappings))?;
        let n1 = Pod::add(&node, "n1", &Node::conf())?;
        let _server = HttpServer::start_v6(&c1, 80, "c1")?;
        for port in [8080, 8081, 8082] {
            served(h2, &format!("{at6}:{port}"), "c1")?;
        }
        for from in [&c1 as &dyn Place, &n1, h1] {
            served(from, &format!("{at6}:8080"), "c1")?;
        }
        served(h2, &format!("{}:8080", h1.ip()), "c1")?;
        served(h2, &format!("{}:8083", h1.ip()), "c1")?;
        ensure!(tcp_opens(h2, h1.ip(), 8082).is_err() && tcp_opens(h2, "fd77::b", 8083).is_err());
        ensure!(seen_as(h2, at6, 8080)? == "fd77::c");
        ensure!(seen_as(&n1, at6, 8080)? == "fd00:244:0:1::1");
        // Refused at once, so that `localhost` goes on with the other family.
        let refused = h1.run(&["busybox", "nc", "-w", "5", "::1", "8080"])?;
        ensure!(!refused.ok() && refused.stderr.contains("refused"), "{refused}");
        served(h1, "127.0.0.1:8080", "c1")?;
        let table = h1.out(TABLE)?;
        ensure!(table.contains("sctp . 8084"), "{table}");
        node.del("c1", &mapped(&mappings))?;
        nothing_left(h1)
    });
}

/// iperf3 agrees over TCP on what it then measures: one port of each kind.
#[test]
fn sctp_reaches_a_published_port() {
    let plan = plan("cnisctp", 2).needs(&["iperf3"]).needs_kernel(needs::SCTP);
    in_lab(plan, |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let node = Node::new(h1)?;
        let both = ["tcp", "sctp"];
        let mappings = both.map(|kind| json!({ "hostPort": 7201, "containerPort": 5201, "protocol": kind }));
        let mappings = json!(mappings);
        let c1 = Pod::add(&node, "c1", &mapped(&mappings))?;
        let n1 = Pod::add(&node, "n1", &Node::conf())?;
        let server = c1.spawn("iperf3", &["iperf3", "-s"], &[])?;
        let host = h1.ip().to_string();
        let send = ["iperf3", "-c", &host, "-p", "7201", "--sctp", "-n", "64K"];
        for from in [h2 as &dyn Place, &n1, h1] {
            let said = eventually(format!("{} sends", from.name()), secs(10), || from.out(&send))?;
            ensure!(said.contains("receiver"), "{said}");
        }
        // Nobody but the published one is reached.
        node.del("c1", &mapped(&mappings))?;
        ensure!(!h2.run(&send)?.ok());
        server.crash()?;
        nothing_left(h1)
    });
}

#[test]
fn a_taken_port_is_refused_with_its_holder() {
    in_lab(plan("cniheld", 1), |lab| {
        let host = lab.host(1);
        let node = Node::new(host)?;
        let local = |port| json!([{ "hostPort": port, "containerPort": 80, "hostIP": "127.0.0.1" }]);
        Pod::add(&node, "c1", &mapped(&tcp(8080)))?;
        Pod::add(&node, "c2", &mapped(&local(8081)))?;
        node.container("c3")?;
        let links = node.links()?;
        let table = host.out(TABLE)?;
        for (mappings, holder) in
            [(tcp(8080), "c1"), (local(8080), "c1"), (tcp(8081), "c2"), (local(8081), "c2")]
        {
            let (code, text) = error(&node.call(&Call::new("ADD", "c3"), &mapped(&mappings))?)?;
            let named = text.contains(&format!("container {holder} (eth0) on network cbr0"));
            ensure!(code == 7 && named, "{mappings}: {code} {text}");
        }
        ensure!(node.links()? == links && host.out(TABLE)? == table, "a failed ADD leaves nothing");
        ensure!(node.ledger()?.len() == 2);
        let udp = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "udp" }]);
        node.add("c3", &mapped(&udp))?;
        node.del("c3", &mapped(&udp))?;

        // Whose container is gone without a DEL holds nothing, and its late DEL harms nobody.
        host.sh("ip netns del c1; for n in $(seq 100); do ip netns exec c2 true; ip -o link | grep -q veth || break; sleep 0.01; done")?;
        eventually("the port is free", secs(10), || node.add("c3", &mapped(&tcp(8080))).map(drop))?;
        node.del("c1", &mapped(&tcp(8080)))?;
        ensure!(host.out(TABLE)?.contains("cbr0 c3 eth0"));
        node.del("c2", &mapped(&local(8081)))?;
        node.del("c3", &mapped(&tcp(8080)))?;
        nothing_left(host)
    });
}

#[test]
fn a_flushed_table_is_seen_and_made_anew() {
    in_lab(plan("cniflush", 2), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let node = Node::new(h1)?;
        let many: Vec<Value> = (0..100)
            .map(|n| json!({ "hostPort": 9000 + n, "containerPort": 80, "protocol": "tcp" }))
            .collect();
        let (many, one) = (mapped(&Value::Array(many)), mapped(&tcp(8080)));
        let c1 = Pod::add(&node, "c1", &one)?;
        let c2 = Pod::add(&node, "c2", &many)?;
        let (_one, _many) = (c1.serve()?, c2.serve()?);
        let at = |port: u16| format!("{}:{port}", h1.ip());
        served(h2, &at(9000), "c2")?;
        served(h2, &at(9099), "c2")?;
        ensure!(elements(h1)? == 101);
        let check = |pod: &Pod<'_>, id, conf: &Value| {
            node.call(&Call::new("CHECK", id), &with(conf, "prevResult", pod.result.clone()))
        };
        done(&check(&c1, "c1", &one)?)?;
        done(&check(&c2, "c2", &many)?)?;
        for (damage, part) in [
            ("nft delete element inet flannel_cni_ports published '{ tcp . 8080 }'", "tcp . 8080"),
            ("nft flush chain inet flannel_cni_ports prerouting", "in chain prerouting"),
            ("nft flush ruleset", "chain prerouting of table inet flannel_cni_ports"),
        ] {
            h1.sh(damage)?;
            let (code, text) = error(&check(&c1, "c1", &one)?)?;
            ensure!(code == 140 && text.contains(part), "after `{damage}`: {code} {text}");
        }
        ensure!(tcp_opens(h2, h1.ip(), 8080).is_err());
        Pod::add(&node, "c3", &mapped(&tcp(8090)))?;
        served(h2, &at(8080), "c1")?;
        served(h2, &at(9050), "c2")?;
        done(&check(&c1, "c1", &one)?)?;
        ensure!(elements(h1)? == 102);

        // What is not in the list goes, with whatever no record speaks of; without a list nothing does.
        let gc = with(&Node::conf(), "cniVersion", json!("1.1.0"));
        let call = Call::new("GC", "");
        done(&node.call(&call, &gc)?)?;
        ensure!(elements(h1)? == 102);
        h1.sh("nft add element inet flannel_cni_ports published '{ tcp . 7000 comment \"cbr0 lost eth0\" : 10.244.1.9 . 80 }'
               nft add element inet flannel_cni_ports published '{ tcp . 7001 comment \"web lost eth0\" : 10.244.1.9 . 80 }'")?;
        let valid = json!([{ "containerID": "c1", "ifname": "eth0" }]);
        done(&node.call(&call, &with(&gc, "cni.dev/valid-attachments", valid))?)?;
        let left = h1.out(TABLE)?;
        ensure!(elements(h1)? == 2 && left.contains("cbr0 c1 eth0") && left.contains("web lost"), "{left}");
        served(h2, &at(8080), "c1")?;
        // A DEL knows everything by itself, whatever it is told.
        h1.sh("nft delete element inet flannel_cni_ports published '{ tcp . 7001 }'")?;
        node.del("c1", &Node::conf())?;
        nothing_left(h1)
    });
}

/// A sender that never stops goes where the port leads now, not where it led when it began.
#[test]
fn udp_senders_follow_the_port() {
    in_lab(plan("cniudp", 2), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let node = Node::new(h1)?;
        let udp = mapped(&json!([{ "hostPort": 5353, "containerPort": 53, "protocol": "udp" }]));
        // Something has to have the kernel track connections before the port is there.
        Pod::add(&node, "other", &mapped(&tcp(8080)))?;
        let _sender = send_datagrams(h2, h1, 5353)?;
        for name in ["first", "second"] {
            let pod = Pod::add(&node, name, &udp)?;
            // Nobody need listen: the kernel counts what came for a port that nobody listens on.
            let heard = || pod.sh(r"sed -n 's/^Udp: [0-9]* \([0-9]*\) .*/\1/p' /proc/net/snmp");
            eventually(format!("{name} hears the sender"), secs(10), || {
                let count = heard()?;
                ensure!(count != "0", "{count} datagrams came");
                Ok(())
            })?;
            node.del(name, &udp)?;
        }
        Ok(())
    });
}

#[test]
fn datagrams_come_and_go() {
    in_lab(plan("cniecho", 2), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let node = Node::new(h1)?;
        let udp = mapped(&json!([{ "hostPort": 7007, "containerPort": 7, "protocol": "UDP" }]));
        let (c1, n1) = (Pod::add(&node, "c1", &udp)?, Pod::add(&node, "n1", &Node::conf())?);
        let echo = c1.udp(7)?;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut datagram = [0; 64];
                while !done.load(Ordering::Relaxed) {
                    if let Ok((length, from)) = echo.recv_from(&mut datagram) {
                        let _ = echo.send_to(&datagram[..length], from);
                    }
                }
            });
            let asked = askers_are_answered(h1, h2, &c1, &n1);
            done.store(true, Ordering::Relaxed);
            asked
        })?;
        node.del("c1", &udp)?;
        nothing_left(h1)
    });
}

fn askers_are_answered(h1: &Host, h2: &Host, c1: &Pod<'_>, n1: &Pod<'_>) -> Result<()> {
    let ip = h1.ip().to_string();
    let askers: [(&dyn Place, &str); 5] =
        [(h2, &ip), (h1, &ip), (h1, "127.0.0.1"), (n1, &ip), (c1, "10.244.1.1")];
    for (from, at) in askers {
        let ask = format!("exec 3<>/dev/udp/{at}/7007; echo hello >&3; timeout 1 head -n 1 <&3");
        eventually(format!("{} gets an echo from {at}", from.name()), secs(10), || {
            let said = from.out(&["bash", "-c", &ask])?;
            ensure!(said == "hello", "{said:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Who publishes nothing does not pay for it, and who does pays for one transaction.
#[test]
fn what_is_not_asked_for_costs_nothing() {
    in_lab(plan("cnifrugal", 1).needs(&["strace"]), |lab| {
        let host = lab.host(1);
        let node = Node::new(host)?;
        host.sh("mkdir -p /opt/cni/bin
                 printf '#!/bin/sh\nexec strace -f -s 0 -o /run/trace flannel\n' > /opt/cni/bin/traced
                 chmod 755 /opt/cni/bin/traced")?;
        let traced = |verb, id, conf: &Value| -> Result<String> {
            let output = node.call(&Call { plugin: "/opt/cni/bin/traced", ..Call::new(verb, id) }, conf)?;
            ensure!(output.ok(), "{output}");
            host.read("/run/trace")
        };
        // The first makes bridge and table.
        Pod::add(&node, "c1", &mapped(&tcp(8080)))?;
        node.container("c2")?;
        for verb in ["ADD", "DEL"] {
            let trace = traced(verb, "c2", &Node::conf())?;
            ensure!(
                !trace.contains("NETLINK_NETFILTER") && !trace.contains("/run/flannel/cni/lock"),
                "{verb}:\n{trace}"
            );
        }
        let calls = |trace: &str| trace.lines().filter(|line| line.contains('(')).count();
        let few = calls(&traced("ADD", "c2", &mapped(&tcp(8081)))?);
        let trace = traced("DEL", "c2", &mapped(&tcp(8081)))?;
        ensure!(
            trace.matches("NETLINK_NETFILTER").count() == 1 && !trace.contains("execve(\"/usr/sbin"),
            "{trace}"
        );
        for n in 0..40 {
            let id = format!("m{n}");
            Pod::add(&node, &id, &mapped(&tcp(9000 + n)))?;
        }
        let many = calls(&traced("ADD", "c2", &mapped(&tcp(8081)))?);
        // Some vary with what the ledger finds; none with the number of ports.
        ensure!(many < few + 30, "{few} calls beside one port, {many} beside forty");
        Ok(())
    });
}

/// The first containers of a node come at once, and each finds no table.
#[test]
fn many_come_and_go_at_once() {
    const COUNT: u16 = 12;
    in_lab(plan("cnirush", 1), |lab| {
        let host = lab.host(1);
        let node = Node::new(host)?;
        let ids: Vec<(String, u16)> = (0..COUNT).map(|n| (format!("r{n}"), 9000 + n)).collect();
        for (id, _) in &ids {
            node.container(id)?;
        }
        let at_once = |call: &(dyn Fn(&str, &Value) -> Result<()> + Sync)| -> Result<()> {
            std::thread::scope(|scope| {
                let calls: Vec<_> = ids
                    .iter()
                    .map(|(id, port)| scope.spawn(move || call(id, &mapped(&tcp(*port)))))
                    .collect();
                calls.into_iter().try_for_each(|call| call.join().map_err(|_| anyhow!("a call panicked"))?)
            })
        };
        for _ in 0..2 {
            at_once(&|id, conf| node.add(id, conf).map(drop))?;
            ensure!(elements(host)? == usize::from(COUNT), "{}", host.out(TABLE)?);
            at_once(&|id, conf| node.del(id, conf))?;
            nothing_left(host)?;
            host.sh("nft flush ruleset; nft add table inet flannel_cni_ports")?;
        }
        Ok(())
    });
}

#[test]
fn portmap_is_a_plugin_too() {
    in_lab(plan("cniportmap", 2), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let node = Node::new(h1)?;
        let portmap = portmap(h1)?;
        let by = |verb, id| Call { plugin: &portmap, ..Call::new(verb, id) };
        let conf = |more: Value| {
            let mut conf = json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "portmap",
                                   "runtimeConfig": { "portMappings": tcp(8080) } });
            conf.as_object_mut()
                .into_iter()
                .for_each(|conf| conf.extend(more.as_object().cloned().unwrap_or_default()));
            conf
        };
        let (code, text) = error(&node.call(&by("ADD", "c1"), &conf(json!({})))?)?;
        ensure!(code == 7 && text.contains("prevResult"), "{code} {text}");
        Pod::add(&node, "n1", &Node::conf())?;

        // Alone behind our flannel, and behind one that has done the work.
        for flannel in [Node::conf(), mapped(&tcp(8080))] {
            let pod = Pod::add(&node, "c1", &flannel)?;
            let server = pod.serve()?;
            let before = h1.run(TABLE)?.stdout;
            let chained = conf(json!({ "prevResult": pod.result }));
            let passed = answer(&node.call(&by("ADD", "c1"), &chained)?)?;
            ensure!(passed == pod.result, "{passed}");
            served(h2, &format!("{}:8080", h1.ip()), "c1")?;
            served(h1, "127.0.0.1:8080", "c1")?;
            ensure!(elements(h1)? == 1);
            if flannel == mapped(&tcp(8080)) {
                ensure!(h1.out(TABLE)? == before.trim(), "twice is once");
            }
            done(&node.call(&by("CHECK", "c1"), &chained)?)?;
            h1.sh("nft flush map inet flannel_cni_ports published")?;
            ensure!(error(&node.call(&by("CHECK", "c1"), &chained)?)?.0 == 140);
            done(&node.call(&by("DEL", "c1"), &chained)?)?;
            nothing_left(h1)?;
            node.del("c1", &flannel)?;
            server.stop()?;
            h1.sh("ip netns del c1")?;
        }

        // Who is seen, as asked.
        for (more, seen) in [
            (json!({ "snat": false }), h2.ip().to_string()),
            (json!({ "masqAll": true }), "10.244.1.1".to_owned()),
        ] {
            let pod = Pod::add(&node, "c1", &Node::conf())?;
            let server = pod.serve()?;
            let chained = with(&conf(more.clone()), "prevResult", pod.result.clone());
            answer(&node.call(&by("ADD", "c1"), &chained)?)?;
            served(h2, &format!("{}:8080", h1.ip()), "c1")?;
            ensure!(seen_as(h2, h1.ip(), 8080)? == seen, "{more}");
            if more == json!({ "snat": false }) {
                ensure!(tcp_opens(h1, "127.0.0.1", 8080).is_err());
            }
            done(&node.call(&by("CHECK", "c1"), &chained)?)?;
            done(&node.call(&by("DEL", "c1"), &chained)?)?;
            node.del("c1", &Node::conf())?;
            server.stop()?;
            h1.sh("ip netns del c1")?;
        }
        let gc = with(&conf(json!({ "cni.dev/valid-attachments": [] })), "cniVersion", json!("1.1.0"));
        done(&node.call(&by("GC", ""), &gc)?)?;
        done(&node.call(&by("STATUS", ""), &gc)?)?;
        nothing_left(h1)?;
        ensure!(node.ledger()?.len() == 1, "the neighbor's address stays");
        Ok(())
    });
}
