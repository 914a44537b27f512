//! The Docker plugin under real engines: what its users do, and what happens to them meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_tests::{
    CREATE_WEB, Container, Daemon, Host, HttpServer, IMAGE, Lab, LabPlan, PingStream, Place as _, eventually,
    http_get, in_lab, ping, ping_within, secs, seen_as, tcp_opens,
};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// Hosts as Debian installs them: forwarding is off until the engine switches it on, and then FORWARD drops.
fn plan(name: &str, hosts: usize) -> LabPlan {
    Lab::new(name).hosts(hosts).ip_forward(false).needs(&["dockerd", "docker", "busybox"])
}

fn configure(lab: &Lab, config: &str) -> Result<()> {
    lab.etcdctl(&["put", "/coreos.com/network/config", config]).map(drop)
}

/// A plugin on etcd and an engine with the image.
fn start_all(lab: &Lab, host: &Host) -> Result<(Daemon, Daemon)> {
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let plugin = host.start_plugin(&[&endpoints])?;
    let dockerd = host.start_dockerd(&[])?;
    host.load_image()?;
    Ok((plugin, dockerd))
}

/// `FLANNEL_SUBNET` of a host without its last byte: `10.100.7.`
fn lease(host: &Host) -> Result<String> {
    let env = host.read("/run/flannel/subnet.env")?;
    let subnet = env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).context(env.clone())?;
    Ok(subnet.rsplit_once('.').context("no address")?.0.to_owned() + ".")
}

fn containers_of_two_hosts_reach_each_other(name: &str, config: &str, mtu: u32) {
    in_lab(plan(name, 2).etcd(), |lab| {
        configure(lab, config)?;
        let mut daemons = Vec::new();
        let mut containers = Vec::new();
        for host in lab.hosts() {
            daemons.push(start_all(lab, host)?);
            host.docker(CREATE_WEB)?;
            containers.push(host.docker_run("c0", &["--network", "web"])?);
            host.docker_run("d0", &["--network", "web"])?;
        }
        let (h1, h2, c1, c2) = (lab.host(1), lab.host(2), &containers[0], &containers[1]);
        for (host, container) in [(h1, c1), (h2, c2)] {
            let lease = lease(host)?;
            let address = container.address("eth0")?;
            ensure!(
                address.starts_with(&lease) && address.ends_with("/24"),
                "{address} is not in {lease}0/24"
            );
            ensure!(container.mtu("eth0")? == mtu, "MTU {}", container.mtu("eth0")?);
            let routes = container.out(&["ip", "route"])?;
            ensure!(routes.contains(&format!("default via {lease}1 dev eth0")), "{routes}");
            ensure!(routes.contains(&format!("10.100.0.0/16 via {lease}1 dev eth0")), "{routes}");
        }
        ensure!(lease(h1)? != lease(h2)?);

        ping_within(secs(5), c1, c2.ip()?)?;
        ping(c2, c1.ip()?)?;
        let _server = HttpServer::start(c2, 80, "hello from c2")?;
        ensure!(http_get(c1, &format!("http://{}/", c2.ip()?))? == "hello from c2");
        ensure!(flannel_tests::largest_packet(c1, c2.ip()?)? == mtu);

        // On one host: by name, and the host itself, both ways.
        let said = h1.docker(&["exec", "c0", "ping", "-c", "1", "-W", "2", "d0"])?;
        ensure!(said.contains("1 packets received"), "{said}");
        ping(h2, c2.ip()?)?;
        ensure!(http_get(h2, &format!("http://{}/", c2.ip()?))? == "hello from c2");
        ping(c1, h1.ip())?;
        ping(c1, lease(h1)? + "1")?;
        let link = c1.out(&["ip", "-o", "link", "show", "dev", "eth0"])?;
        let shown = h1.docker(&["inspect", "-f", "{{.NetworkSettings.Networks.web.MacAddress}}", "c0"])?;
        ensure!(link.contains(&shown) && shown.starts_with("0a:58:"), "{link} {shown}");
        Ok(())
    });
}

#[test]
fn containers_reach_each_other_over_vxlan() {
    containers_of_two_hosts_reach_each_other("docker-vxlan", VXLAN, 1450);
}

#[test]
fn containers_reach_each_other_over_host_gw() {
    containers_of_two_hosts_reach_each_other("docker-host-gw", HOST_GW, 1500);
}

#[test]
fn two_hosts_share_a_directory_as_their_store() {
    in_lab(plan("docker-embedded", 2).outside(), |lab| {
        let store = format!("--store-dir={}/store", lab.shared_dir());
        let mut daemons = Vec::new();
        for host in lab.hosts() {
            daemons.push((host.start_plugin(&[&store])?, host.start_dockerd(&[])?));
            host.load_image()?;
            // Nothing is configured anywhere: the first one defines the network, the second one joins it.
            host.docker(CREATE_WEB)?;
            host.docker_run("c0", &["--network", "web"])?;
        }
        let (h1, h2) = (lab.host(1), lab.host(2));
        let (c1, c2) = (h1.docker_container("c0")?, h2.docker_container("c0")?);
        ping_within(secs(5), &c1, c2.ip()?)?;

        // What leaves the network is masqueraded, what stays inside is not.
        let _outside = HttpServer::start(lab.outside(), 80, "outside")?;
        let _inside = HttpServer::start(&c2, 80, "inside")?;
        let seen = seen_as(&c1, "198.51.100.2", 80)?;
        ensure!(seen == h1.ip().to_string(), "seen as {seen}");
        let seen = seen_as(&c1, c2.ip()?, 80)?;
        ensure!(seen == c1.ip()?, "seen as {seen}");

        // The definition goes with its last user.
        let config = lab.shared_path().join("store/default/config");
        for (host, left) in [(h2, true), (h1, false)] {
            host.docker(&["rm", "-f", "c0"])?;
            host.docker(&["network", "rm", "web"])?;
            eventually("the lease is given back", secs(8), || {
                !host.exists("/run/flannel/subnet.env") && config.exists() == left
            })?;
        }
        Ok(())
    });
}

#[test]
fn nothing_is_left_of_a_removed_network() {
    in_lab(plan("docker-nothing-left", 1), |lab| {
        let host = lab.host(1);
        let plugin = host.start_plugin(&[])?;
        let dockerd = host.start_dockerd(&[])?;
        host.load_image()?;
        let before = host.network_state()?;
        host.docker(CREATE_WEB)?;
        host.docker_run("c1", &["--network", "web"])?;
        host.docker_run("c2", &["--network", "web", "--ip", &(lease(host)? + "77")])?;
        host.docker(&["network", "disconnect", "web", "c1"])?;
        host.docker(&["network", "connect", "web", "c1"])?;
        ping_within(secs(3), &host.docker_container("c1")?, lease(host)? + "77")?;
        host.docker(&["rm", "-f", "c1", "c2"])?;
        host.docker(&["network", "rm", "web"])?;
        eventually("the kernel is as before", secs(8), || {
            let now = host.network_state()?;
            ensure!(now == before, "{now}\n--- before\n{before}\n{}", plugin.tail());
            Ok(())
        })?;
        let files = host.sh(
            "cd /; find var/lib/cni/networks/* run/flannel var/lib/flannel -type f -o -type l 2>/dev/null | grep -v lock || true",
        )?;
        ensure!(files.is_empty(), "files are left:\n{files}");
        // And it can be made again.
        host.docker(CREATE_WEB)?;
        host.docker(&["run", "--rm", "--network", "web", IMAGE, "true"])?;
        dockerd.stop(secs(20))?;
        Ok(())
    });
}

#[test]
fn a_killed_plugin_costs_no_packet() {
    in_lab(plan("docker-kill", 2).etcd(), |lab| {
        configure(lab, VXLAN)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let (plugin, _dockerd) = start_all(lab, h1)?;
        let _other = start_all(lab, h2)?;
        h1.docker(CREATE_WEB)?;
        h2.docker(CREATE_WEB)?;
        let c1 = h1.docker_run("c1", &["--network", "web"])?;
        let c2 = h2.docker_run("c2", &["--network", "web"])?;
        ping_within(secs(5), &c1, c2.ip()?)?;
        let stream = PingStream::start(&c1, c2.ip()?, Duration::from_millis(50))?;
        std::thread::sleep(secs(1));
        plugin.crash()?;
        std::thread::sleep(secs(1));
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let plugin = h1.start_plugin(&[&endpoints])?;
        std::thread::sleep(secs(2));
        let c3 = h1.docker_run("c3", &["--network", "web"])?;
        ping_within(secs(3), &c3, c2.ip()?)?;
        ensure!(c3.ip()? != c1.ip()?);
        h1.docker(&["rm", "-f", "c3"])?;
        let count = stream.stop_after(61)?;
        ensure!(count.lost() == 0 && count.sent > 60, "{count:?}\n{}", plugin.tail());
        Ok(())
    });
}

#[test]
fn a_restarted_engine_brings_its_containers_back() {
    in_lab(plan("docker-restart", 2).etcd(), |lab| {
        configure(lab, VXLAN)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let (_plugin, dockerd) = start_all(lab, h1)?;
        let _other = start_all(lab, h2)?;
        h1.docker(CREATE_WEB)?;
        h2.docker(CREATE_WEB)?;
        let fixed = lease(h1)? + "99";
        h1.docker_run("fixed", &["--network", "web", "--restart=always", "--ip", &fixed])?;
        h1.docker_run("any", &["--network", "web", "--restart=always"])?;
        let c2 = h2.docker_run("c2", &["--network", "web"])?;
        ping_within(secs(5), &c2, &fixed)?;
        let mut dockerd = dockerd;
        for sigkill in [false, true] {
            if sigkill {
                dockerd.crash()?;
            } else {
                dockerd.stop(secs(30))?;
            }
            dockerd = h1.start_dockerd(&[])?;
            for name in ["fixed", "any"] {
                let container =
                    eventually(format!("{name} is back"), secs(20), || h1.docker_container(name))?;
                ping_within(secs(5), &c2, container.ip()?)?;
            }
            ensure!(h1.docker_ip("fixed", "web")? == fixed);
        }
        // Claims of the dead engine do not pile up.
        let held = h1.sh("cd /var/lib/cni/networks/cbr0; ls | grep -c '^10\\.'")?;
        ensure!(held == "2", "{held} addresses are held for two containers");
        Ok(())
    });
}

#[test]
fn live_restore_costs_no_packet() {
    in_lab(plan("docker-live-restore", 2).etcd(), |lab| {
        configure(lab, VXLAN)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        h1.write("/etc/docker/daemon.json", r#"{"live-restore": true}"#)?;
        let (plugin, dockerd) = start_all(lab, h1)?;
        let _other = start_all(lab, h2)?;
        h1.docker(CREATE_WEB)?;
        h2.docker(CREATE_WEB)?;
        let c1 = h1.docker_run("c1", &["--network", "web"])?;
        let c2 = h2.docker_run("c2", &["--network", "web"])?;
        ping_within(secs(5), &c1, c2.ip()?)?;
        let stream = PingStream::start(&c1, c2.ip()?, Duration::from_millis(50))?;
        dockerd.stop(secs(30))?;
        plugin.crash()?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let _plugin = h1.start_plugin(&[&endpoints])?;
        let _dockerd = h1.start_dockerd(&[])?;
        ensure!(h1.docker_container("c1")?.pid() == c1.pid());
        let c3 = h1.docker_run("c3", &["--network", "web"])?;
        ensure!(c3.ip()? != c1.ip()?, "{} was given out twice", c1.ip()?);
        ping_within(secs(3), &c3, c1.ip()?)?;
        let count = stream.stop()?;
        ensure!(count.lost() == 0, "{count:?}");
        Ok(())
    });
}

#[test]
fn the_store_may_run_in_a_container_of_the_same_engine() {
    in_lab(plan("docker-no-order", 2).needs(&["etcd"]), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let endpoints = format!("--etcd-endpoints=http://{}:2379", h1.ip());
        let boot = |host: &Host| -> Result<(Daemon, Daemon)> {
            let dockerd = host.start_dockerd(&[])?;
            let plugin = host.start_plugin(&[&endpoints])?;
            Ok((dockerd, plugin))
        };
        let _first = (boot(h1)?, boot(h2)?);
        h1.load_image()?;
        h2.load_image()?;
        let start = Instant::now();
        let failed = h1.try_docker(CREATE_WEB)?;
        ensure!(!failed.ok() && start.elapsed() < secs(5), "{failed} after {:?}", start.elapsed());
        ensure!(failed.stderr.contains(":2379"), "the store is not named: {failed}");

        h1.docker_run_etcd("store", &["--restart=always"])?;
        for host in [h1, h2] {
            eventually("the network can be created", secs(20), || host.docker(CREATE_WEB))?;
            host.docker_run("c0", &["--network", "web", "--restart=always"])?;
        }
        let reachable = || -> Result<()> {
            let back = |host: &Host| eventually("c0 is back", secs(30), || host.docker_container("c0"));
            let (c1, c2): (Container, Container) = (back(h1)?, back(h2)?);
            ping_within(secs(20), &c1, c2.ip()?)?;
            ping_within(secs(5), &c2, c1.ip()?)
        };
        reachable()?;

        // Power comes back: engines, plugins and the store start in no order.
        lab.reboot(h1)?;
        lab.reboot(h2)?;
        let _second = (boot_plugin_first(h1, &endpoints)?, boot_plugin_first(h2, &endpoints)?);
        reachable()
    });
}

fn boot_plugin_first(host: &Host, endpoints: &str) -> Result<(Daemon, Daemon)> {
    let plugin = host.start_plugin(&[endpoints])?;
    Ok((host.start_dockerd(&[])?, plugin))
}

#[test]
fn containers_of_different_networks_do_not_reach_each_other() {
    in_lab(plan("docker-isolation", 2).etcd(), |lab| {
        configure(lab, VXLAN)?;
        let named: &[&str] = &[
            "network",
            "create",
            "-d",
            "flannel",
            "--ipam-driver",
            "flannel",
            "--subnet",
            "10.200.0.0/16",
            "--ipam-opt",
            "network=other",
            "other",
        ];
        let mut daemons = Vec::new();
        for host in lab.hosts() {
            daemons.push(start_all(lab, host)?);
            host.docker(CREATE_WEB)?;
            host.docker(named)?;
            host.docker_run("a0", &["--network", "web"])?;
            host.docker_run("b0", &["--network", "other"])?;
        }
        let container = |host: usize, name: &str| lab.host(host).docker_container(name);
        let (a1, b1, a2, b2) =
            (container(1, "a0")?, container(1, "b0")?, container(2, "a0")?, container(2, "b0")?);
        ensure!(b1.ip()?.starts_with("10.200.") && b2.ip()?.starts_with("10.200."));
        ping_within(secs(5), &a1, a2.ip()?)?;
        ping_within(secs(5), &b1, b2.ip()?)?;
        let _servers = [HttpServer::start(&b1, 80, "b1")?, HttpServer::start(&b2, 80, "b2")?];
        for (from, to) in [(&a1, &b1), (&b1, &a1), (&a1, &b2), (&b2, &a1), (&a2, &b2)] {
            ensure!(ping(from, to.ip()?).is_err(), "{from:?} reaches {to:?}");
        }
        for server in [&b1, &b2] {
            ensure!(tcp_opens(&a1, server.ip()?, 80).is_err(), "a1 opens a connection to {server:?}");
        }
        let config = lab.etcdctl(&["get", "--print-value-only", "/coreos.com/network/other/config"])?;
        ensure!(config.contains("\"VNI\":2"), "{config}");
        Ok(())
    });
}

#[test]
fn wrong_use_is_answered_with_what_to_type() {
    in_lab(plan("docker-wrong-use", 1), |lab| {
        let host = lab.host(1);
        let _plugin = host.start_plugin(&[])?;
        let _dockerd = host.start_dockerd(&[])?;
        host.load_image()?;
        host.docker(CREATE_WEB)?;
        let command = "docker network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 NAME";
        let flannel = ["network", "create", "-d", "flannel", "--ipam-driver", "flannel"];
        let cases: [(&[&str], &str); 5] = [
            (&["network", "create", "-d", "flannel", "wrong"], command),
            (
                &[&flannel[..], &["--ipv6", "--subnet", "10.100.0.0/16", "wrong"]].concat(),
                "--ipv6 --subnet 10.100.0.0/16 --subnet fd00:100::/48 --ipam-opt ipv6-network=fd00:100::/48 NAME",
            ),
            (&[&flannel[..], &["-o", "mtu=1400", "wrong"]].concat(), "-o mtu: "),
            (
                &["run", "--rm", "--network", "web", "-p", "192.0.2.1:80:80", IMAGE, "true"],
                "Bind for 192.0.2.1:80",
            ),
            (&["run", "--rm", "--network", "web", "--ip", "10.100.0.1", IMAGE, "true"], "10.100.0.1"),
        ];
        for (command, said) in cases {
            let output = host.try_docker(command)?;
            ensure!(!output.ok() && output.stderr.contains(said), "{command:?}: {output}\nnot: {said}");
        }
        ensure!(!host.docker(&["network", "ls"])?.contains("wrong"));
        // A refused container leaves nothing.
        let ports = || host.out(&["ip", "-o", "link", "show", "master", "cni0"]);
        eventually("no port is left", secs(3), || ports().is_ok_and(|ports| ports.is_empty()))?;
        ensure!(host.sh("ls /var/lib/cni/networks/cbr0 | grep -c '^10\\.' || true")? == "0");
        Ok(())
    });
}
