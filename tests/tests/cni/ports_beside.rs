//! Ports of CNI containers beside those of others on the same node: Docker's, and upstream's own plugins before and after ours.

use std::fs;

use anyhow::{Context, Result, ensure};
use flannel_tests::{CREATE_WEB, Host, IMAGE, Lab, LabPlan, eventually, in_lab, needs, secs, tcp_opens};
use serde_json::{Value, json};

use crate::node::{Call, DEBIAN, Node, answer, done, error, with};
use crate::pod::{Pod, served};

fn plan(name: &str, programs: &[&str]) -> LabPlan {
    Lab::new(name).hosts(2).ip_forward(false).needs(&[&["busybox", "nft"], programs].concat())
}

fn has_debian_portmap() -> bool {
    ["bridge", "host-local", "portmap"]
        .iter()
        .all(|plugin| fs::exists(format!("{DEBIAN}/{plugin}")).unwrap_or(false))
        || needs::skipped("Debian's containernetworking-plugins in /usr/lib/cni")
}

fn ports(host_port: u16) -> Value {
    json!({ "portMappings": [{ "hostPort": host_port, "containerPort": 80, "protocol": "tcp" }] })
}

fn with_ports(conf: &Value, host_port: u16) -> Value {
    with(conf, "runtimeConfig", ports(host_port))
}

fn portmap_conf(host_port: u16, previous: &Value) -> Value {
    json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "portmap", "prevResult": previous,
            "runtimeConfig": ports(host_port) })
}

/// Our own under upstream's name.
fn portmap(host: &Host) -> Result<String> {
    host.sh("mkdir -p /opt/cni/bin; ln -sf \"$(command -v flannel)\" /opt/cni/bin/portmap")?;
    Ok("/opt/cni/bin/portmap".to_owned())
}

#[test]
fn our_portmap_stands_behind_gos_bridge() {
    if !has_debian_portmap() {
        return;
    }
    in_lab(plan("cnipmgo", &["iptables"]), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let node = Node::new(h1)?;
        let (portmap, bridge) = (portmap(h1)?, format!("{DEBIAN}/bridge"));
        let go = json!({ "name": "cbr0", "cniVersion": "0.4.0", "type": "bridge", "bridge": "br7", "isDefaultGateway": true,
                         "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.7.1.0/24" }]] } });
        node.container("c1")?;
        let result = answer(&node.call(&Call { plugin: &bridge, ..Call::new("ADD", "c1") }, &go)?)?;
        let conf = with(&portmap_conf(8080, &result), "cniVersion", json!("0.4.0"));
        let by = |verb| Call { plugin: &portmap, ..Call::new(verb, "c1") };
        ensure!(answer(&node.call(&by("ADD"), &conf)?)? == result);
        let pod = Pod::of(h1, "c1", result);
        let _server = pod.serve()?;
        served(h2, &format!("{}:8080", h1.ip()), "c1")?;
        served(h1, "127.0.0.1:8080", "c1")?;
        done(&node.call(&by("CHECK"), &conf)?)?;
        ensure!(!h1.sh("iptables-save -t nat")?.contains("CNI-"), "not by iptables");
        done(&node.call(&by("DEL"), &conf)?)?;
        ensure!(tcp_opens(h2, h1.ip(), 8080).is_err());
        // A result of the oldest shape names no interfaces.
        let address = pod.result["ips"][0]["address"].clone();
        let old =
            json!({ "cniVersion": "0.2.0", "ip4": { "ip": address, "gateway": "10.7.1.1" }, "dns": {} });
        let conf = with(&portmap_conf(8080, &old), "cniVersion", json!("0.2.0"));
        h1.sh("echo 0 > /proc/sys/net/ipv4/conf/br7/route_localnet")?;
        ensure!(answer(&node.call(&by("ADD"), &conf)?)? == old);
        served(h2, &format!("{}:8080", h1.ip()), "c1")?;
        served(h1, "127.0.0.1:8080", "c1")?;
        done(&node.call(&by("DEL"), &conf)?)?;
        done(&node.call(&Call { plugin: &bridge, ..Call::new("DEL", "c1") }, &go)?)
    });
}

/// Also a container that upstream's plugin published a port of is taken down when ours has taken its place, by either name.
#[test]
fn gos_portmap_stands_behind_our_flannel_and_is_cleaned_up_after() {
    if !has_debian_portmap() {
        return;
    }
    in_lab(plan("cnigopm", &["iptables"]), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let node = Node::new(h1)?;
        let (ours, gos) = (portmap(h1)?, format!("{DEBIAN}/portmap"));
        let chains = || {
            h1.sh("iptables-save -t nat | grep CNI-DN- || true; ip6tables-save -t nat | grep CNI-DN- || true")
        };
        for (id, by) in [("c1", Some(&gos)), ("c2", Some(&ours)), ("c3", None)] {
            let pod = Pod::add(&node, id, &Node::conf())?;
            let _server = pod.serve()?;
            let conf = portmap_conf(8080, &pod.result);
            answer(&node.call(&Call { plugin: &gos, ..Call::new("ADD", id) }, &conf)?)?;
            served(h2, &format!("{}:8080", h1.ip()), id)?;
            ensure!(chains()?.contains("CNI-DN-"));
            match by {
                Some(portmap) => {
                    done(&node.call(&Call { plugin: portmap, ..Call::new("DEL", id) }, &conf)?)?;
                    node.del(id, &Node::conf())?;
                }
                None => node.del(id, &with_ports(&Node::conf(), 8080))?,
            }
            let left = chains()?;
            ensure!(left.is_empty(), "of {id}: {left}");
            ensure!(tcp_opens(h2, h1.ip(), 8080).is_err());
        }
        Ok(())
    });
}

#[test]
fn docker_and_cni_publish_ports_on_one_bridge() {
    in_lab(plan("cnidocker", &["dockerd", "docker"]), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let daemon = h1.spawn("flannel-docker-plugin", &["flannel-docker-plugin"], &[])?;
        eventually("the plugin's socket", secs(10), || h1.exists("/run/docker/plugins/flannel.sock"))
            .with_context(|| daemon.tail())?;
        let _dockerd = h1.start_dockerd(&[])?;
        h1.load_image()?;
        h1.docker(CREATE_WEB)?;
        eventually("a lease", secs(10), || h1.exists("/run/flannel/subnet.env"))?;
        let node = Node { host: h1 };
        let conf = with_ports(&Node::conf(), 8080);
        let pod = Pod::add(&node, "c1", &conf)?;
        let _server = pod.serve()?;
        let container = h1.docker_run("d1", &["--network", "web", "-p", "8081:80"])?;
        let _other = flannel_tests::HttpServer::start(&container, 80, "d1")?;
        for from in [h1, h2] {
            served(from, &format!("{}:8080", h1.ip()), "c1")?;
            served(from, &format!("{}:8081", h1.ip()), "d1")?;
        }
        served(h1, "127.0.0.1:8080", "c1")?;
        served(h1, "127.0.0.1:8081", "d1")?;
        node.container("c2")?;
        let (code, text) = error(&node.call(&Call::new("ADD", "c2"), &with_ports(&Node::conf(), 8081))?)?;
        ensure!(code == 7 && text.contains("Docker network"), "{code} {text}");
        for taken in ["8080:80", "127.0.0.1:8080:80"] {
            let refused = h1.run(&["docker", "run", "-d", "--network", "web", "-p", taken, IMAGE, "true"])?;
            ensure!(!refused.ok() && refused.stderr.contains("cbr0 c1 eth0"), "{taken}: {refused}");
        }

        // The last port of Docker's goes, and with it what only Docker's needed.
        h1.docker(&["rm", "-f", "d1"])?;
        eventually("nothing of Docker's is published", secs(10), || {
            let tables = h1.out(&["nft", "list", "tables"])?;
            ensure!(!tables.contains("endpoints"), "{tables}");
            Ok(())
        })?;
        served(h1, "127.0.0.1:8080", "c1")?;
        ensure!(h1.sh("cat /proc/sys/net/ipv4/conf/cni0/route_localnet")? == "1");
        node.del("c1", &conf)
    });
}
