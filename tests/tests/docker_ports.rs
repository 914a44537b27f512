//! Published ports under real engines: who reaches them, by which address, and what they survive.

use anyhow::{Context, Result, ensure};
use flannel_tests::{
    CREATE_WEB, Container, Daemon, Host, HttpServer, IMAGE, Lab, LabPlan, Place, eventually, http_get,
    in_lab, ping_within, secs, seen_as, send_datagrams, tcp_opens,
};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const CREATE_OTHER: &[&str] = &[
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

/// As Debian installs hosts: forwarding is off until the engine switches it on, and then FORWARD drops.
fn plan(name: &str, hosts: usize) -> LabPlan {
    Lab::new(name).hosts(hosts).ip_forward(false).needs(&["dockerd", "docker", "busybox"])
}

/// A plugin on the lab's etcd, an engine with the image, and the network.
fn start_all(lab: &Lab, host: &Host) -> Result<(Daemon, Daemon)> {
    let plugin = host.start_plugin(&[&format!("--etcd-endpoints={}", lab.etcd_endpoint())])?;
    let dockerd = host.start_dockerd(&[])?;
    host.load_image()?;
    host.docker(CREATE_WEB)?;
    Ok((plugin, dockerd))
}

/// What somebody at `from` gets at a published port within a few seconds.
fn served(from: &dyn Place, at: &str, text: &str) -> Result<()> {
    eventually(format!("{} reaches http://{at}/", from.name()), secs(5), || {
        let said = http_get(from, &format!("http://{at}/"))?;
        ensure!(said == text, "{said:?} instead of {text:?}");
        Ok(())
    })
}

/// A container with published ports and a web server in it.
fn serve(host: &Host, name: &str, args: &[&str], port: u16) -> Result<(Container, HttpServer)> {
    let container = host.docker_run(name, &[&["--network", "web"], args].concat())?;
    let server = HttpServer::start(&container, port, name)?;
    Ok((container, server))
}

#[test]
fn a_published_port_is_reached_from_everywhere() {
    in_lab(plan("ports-reach", 2).etcd().outside(), |lab| {
        lab.etcdctl(&["put", "/coreos.com/network/config", VXLAN])?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let _one = start_all(lab, h1)?;
        let _two = start_all(lab, h2)?;
        ensure!(h1.sh("iptables -S FORWARD | head -1")? == "-P FORWARD DROP");
        ensure!(h1.sh("cat /proc/sys/net/bridge/bridge-nf-call-iptables")? == "1");
        let (c1, _server) = serve(h1, "c1", &["-p", "8080:80"], 80)?;
        let neighbor = h1.docker_run("n1", &["--network", "web"])?;
        let far = h2.docker_run("c2", &["--network", "web"])?;
        let on_host = format!("{}:8080", h1.ip());
        let gateway = c1.sh("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'")?;

        served(lab.outside(), &on_host, "c1")?;
        served(h2, &on_host, "c1")?;
        served(&far, &on_host, "c1")?;
        served(h1, &on_host, "c1")?;
        served(h1, "127.0.0.1:8080", "c1")?;
        served(h1, "127.1.2.3:8080", "c1")?;
        served(h1, &format!("{gateway}:8080"), "c1")?;
        for place in [&c1, &neighbor] {
            served(place, &on_host, "c1")?;
            served(place, &format!("{gateway}:8080"), "c1")?;
        }

        // The container sees who calls, wherever the answer comes back through this host by itself.
        ensure!(seen_as(lab.outside(), h1.ip(), 8080)? == "198.51.100.2");
        ensure!(seen_as(h2, h1.ip(), 8080)? == h2.ip().to_string());
        ensure!(seen_as(h1, h1.ip(), 8080)? == h1.ip().to_string());
        ensure!(seen_as(h1, "127.0.0.1", 8080)? == gateway);
        ensure!(seen_as(&neighbor, h1.ip(), 8080)? == gateway);
        // What is not published is not reached.
        ensure!(tcp_opens(lab.outside(), h1.ip(), 80).is_err());
        // Without bridges in iptables the way of a packet is another one.
        h1.sh("echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables")?;
        for place in [&c1, &neighbor] {
            served(place, &on_host, "c1")?;
        }
        // Nobody beside the host reaches what listens on 127.0.0.1 only.
        let _private = HttpServer::start(h1, 9999, "private")?;
        h2.sh(&format!(
            "ip route add 127.0.0.9/32 via {} dev eth0; sysctl -qw net.ipv4.conf.eth0.route_localnet=1",
            h1.ip()
        ))?;
        ensure!(tcp_opens(h2, "127.0.0.9", 9999).is_err());

        // The port goes with the container, and so does what it needed.
        h1.docker(&["rm", "-f", "c1"])?;
        eventually("nothing is published", secs(5), || {
            let tables = h1.out(&["nft", "list", "tables"])?;
            ensure!(!tables.contains("endpoints"), "{tables}");
            let localnet = h1.out(&["cat", "/proc/sys/net/ipv4/conf/cni0/route_localnet"])?;
            ensure!(localnet == "0", "route_localnet is {localnet}");
            Ok(())
        })?;
        ensure!(tcp_opens(h2, h1.ip(), 8080).is_err());
        Ok(())
    });
}

#[test]
fn ports_are_bound_as_docker_binds_them() {
    in_lab(plan("ports-bound", 2), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let _plugin = h1.start_plugin(&[])?;
        let _dockerd = h1.start_dockerd(&[])?;
        h1.load_image()?;
        h1.docker(CREATE_WEB)?;
        h1.docker(CREATE_OTHER)?;
        let ip = h1.ip().to_string();

        // One address only, a range, whatever is exposed.
        let _local = serve(h1, "local", &["-p", "127.0.0.1:8081:80"], 80)?;
        served(h1, "127.0.0.1:8081", "local")?;
        ensure!(tcp_opens(h2, &ip, 8081).is_err() && tcp_opens(h1, &ip, 8081).is_err());
        let _one = serve(h1, "one", &["-p", &format!("{ip}:8082:80")], 80)?;
        served(h2, &format!("{ip}:8082"), "one")?;
        ensure!(tcp_opens(h1, "127.0.0.1", 8082).is_err());
        let (ranged, _server) = serve(h1, "ranged", &["-p", "9000-9002:9000-9002"], 9002)?;
        served(h2, &format!("{ip}:9002"), "ranged")?;
        let _exposed = serve(h1, "exposed", &["-P", "--expose", "80"], 80)?;
        let end = format!("->{}:80/tcp", h1.docker_ip("exposed", "web")?);
        let all = published(h1)?;
        let port = all.iter().find_map(|line| line.strip_suffix(&end)).context(all.join(" "))?;
        let port = port.rsplit(':').next().context("no port")?;
        served(h2, &format!("{ip}:{port}"), "exposed")?;

        // Another network's container, which does not reach the container itself.
        let other = h1.docker_run("other", &["--network", "other"])?;
        ensure!(tcp_opens(&other, ranged.ip()?, 9002).is_err());
        served(&other, &format!("{ip}:9002"), "ranged")?;

        // Clashes name who is in the way.
        let clash = h1.try_docker(&["run", "--rm", "--network", "other", "-p", "9001:80", IMAGE, "true"])?;
        for part in
            ["Bind for 0.0.0.0:9001 failed: port is already allocated", &ranged.ip()?, "network default"]
        {
            ensure!(!clash.ok() && clash.stderr.contains(part), "{clash}\nnot: {part}");
        }
        let _listener = HttpServer::start(h1, 8090, "the host")?;
        let clash = h1.try_docker(&["run", "--rm", "--network", "web", "-p", "8090:80", IMAGE, "true"])?;
        ensure!(!clash.ok() && clash.stderr.contains("a program of this host uses tcp port 8090"), "{clash}");
        served(h1, "127.0.0.1:8090", "the host")?;
        // And the other way round: what is published is nobody else's.
        let taken = h1.run(&["timeout", "2", "busybox", "nc", "-l", "-p", "9001"])?;
        ensure!(!taken.ok() && taken.stderr.contains("in use"), "{taken}");
        let away =
            h1.try_docker(&["run", "--rm", "--network", "web", "-p", "192.0.2.1:80:80", IMAGE, "true"])?;
        ensure!(!away.ok() && away.stderr.contains("192.0.2.1:80"), "{away}");
        // A refused container leaves its port to the next one.
        h1.docker(&["rm", "-f", "ranged"])?;
        h1.docker(&["run", "--rm", "--network", "other", "-p", "9001:80", IMAGE, "true"])?;
        Ok(())
    });
}

/// What the plugin says is published on a host.
fn published(host: &Host) -> Result<Vec<String>> {
    let text = host.sh("flannel-docker-plugin status")?;
    Ok(text.split([' ', ',', '\n']).filter(|word| word.contains("->")).map(str::to_owned).collect())
}

#[test]
fn published_ports_survive_what_happens_to_the_host() {
    in_lab(plan("ports-survive", 2).etcd(), |lab| {
        lab.etcdctl(&["put", "/coreos.com/network/config", VXLAN])?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let (plugin, dockerd) = start_all(lab, h1)?;
        let publish = ["--restart=always", "-p", "8080:80"];
        let command = ["--network", "web", "--entrypoint", "busybox"];
        let server = ["httpd", "-f", "-p", "80", "-h", "/etc"];
        let mut run = vec!["run", "-d", "--name", "c1"];
        run.extend(publish.iter().chain(&command));
        run.push(IMAGE);
        run.extend(server);
        h1.docker(&run)?;
        let at = format!("http://{}:8080/group", h1.ip());
        let reached = |what: &str| {
            eventually(format!("the port is reached after {what}"), secs(30), || {
                let said = http_get(h2, &at)?;
                ensure!(said.starts_with("root:"), "{said:?}");
                Ok(())
            })
        };
        reached("its start")?;

        h1.out(&["nft", "flush", "ruleset"])?;
        reached("nft flush ruleset")?;

        plugin.crash()?;
        reached("the plugin's end")?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let plugin = h1.start_plugin(&[&endpoints])?;
        reached("the plugin's restart")?;
        let clash = h1.try_docker(&["run", "--rm", "--network", "web", "-p", "8080:80", IMAGE, "true"])?;
        ensure!(!clash.ok() && clash.stderr.contains("already allocated"), "{clash}\n{}", plugin.tail());

        dockerd.stop(secs(30))?;
        ensure!(tcp_opens(h2, h1.ip(), 8080).is_err(), "the container is gone and its port is not");
        let dockerd = h1.start_dockerd(&[])?;
        reached("the engine's restart")?;
        dockerd.crash()?;
        let _dockerd = h1.start_dockerd(&[])?;
        reached("the engine's crash")?;
        Ok(())
    });
}

/// A Docker network on the flannel network of the others, with options.
fn create_beside(host: &Host, name: &str, options: &[&str]) -> Result<()> {
    let start = &CREATE_WEB[..CREATE_WEB.len() - 1];
    host.docker(&[start, options, &[name]].concat()).map(drop)
}

#[test]
fn networks_keep_their_containers_as_their_options_say() {
    in_lab(plan("ports-policy", 2).etcd().outside(), |lab| {
        lab.etcdctl(&["put", "/coreos.com/network/config", VXLAN])?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let _one = start_all(lab, h1)?;
        let _two = start_all(lab, h2)?;
        create_beside(h1, "inside", &["--internal"])?;
        create_beside(h1, "quiet", &["-o", "com.docker.network.bridge.enable_icc=false"])?;
        create_beside(h1, "known", &["-o", "com.docker.network.bridge.enable_ip_masquerade=false"])?;
        let run = |name: &str, network: &str, args: &[&str]| {
            h1.docker_run(name, &[&["--network", network], args].concat())
        };
        let far = h2.docker_run("far", &["--network", "web"])?;
        let near = run("near", "web", &[])?;
        let _outside = HttpServer::start(lab.outside(), 80, "outside")?;
        let _host = HttpServer::start(h1, 9000, "host")?;
        let _beside = HttpServer::start(h2, 9000, "beside")?;
        ping_within(secs(10), &near, far.ip()?)?;

        // Internal: everybody of the network and the host, and nobody else, even by a route of the container's own.
        let inside = run("inside1", "inside", &["-p", "8070:80"])?;
        let _server = HttpServer::start(&inside, 80, "inside")?;
        let gateway = near.sh("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'")?;
        inside.sh(&format!("ip route replace default via {gateway}"))?;
        ping_within(secs(5), &inside, far.ip()?)?;
        served(h1, &inside.ip()?, "inside")?;
        served(&near, &inside.ip()?, "inside")?;
        served(&inside, &format!("{gateway}:9000"), "host")?;
        ensure!(tcp_opens(&inside, "198.51.100.2", 80).is_err(), "an internal network has a way out");
        ensure!(tcp_opens(&inside, h1.ip(), 9000).is_err(), "an internal network reaches the host's address");
        ensure!(tcp_opens(&inside, h2.ip(), 9000).is_err(), "an internal network reaches another host");
        ensure!(tcp_opens(h2, h1.ip(), 8070).is_err(), "an internal network publishes a port");

        // Without inter-container communication: only what is published, and answers.
        let (quiet, other) = (run("quiet1", "quiet", &["-p", "8071:80"])?, run("quiet2", "quiet", &[])?);
        let _quiet = HttpServer::start(&quiet, 80, "quiet")?;
        served(h2, &format!("{}:8071", h1.ip()), "quiet")?;
        served(&other, &format!("{}:8071", h1.ip()), "quiet")?;
        served(h1, &quiet.ip()?, "quiet")?;
        for (name, from) in
            [("a neighbor", &other), ("a container elsewhere", &far), ("another network", &near)]
        {
            ensure!(tcp_opens(from, quiet.ip()?, 80).is_err(), "{name} reaches it");
        }
        ping_within(secs(5), &quiet, far.ip()?)?;
        served(&quiet, "198.51.100.2", "outside")?;

        // Not masqueraded: whoever has a route to the network sees the container itself.
        let known = run("known1", "known", &[])?;
        ensure!(seen_as(&near, h2.ip(), 9000)? == h1.ip().to_string());
        let seen = seen_as(&known, h2.ip(), 9000)?;
        ensure!(seen == known.ip()?, "seen as {seen}");

        // Nothing of all that stays.
        for name in ["inside1", "quiet1", "quiet2", "known1"] {
            h1.docker(&["rm", "-f", name])?;
        }
        eventually("no endpoint is particular", secs(5), || {
            let tables = h1.out(&["nft", "list", "tables"])?;
            ensure!(!tables.contains("endpoints"), "{tables}");
            Ok(())
        })
    });
}

/// A UDP sender that never stops goes where the port leads now, not where it led when it began.
#[test]
fn udp_senders_follow_the_port() {
    in_lab(plan("ports-udp", 2), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let _plugin = h1.start_plugin(&[])?;
        let _dockerd = h1.start_dockerd(&[])?;
        h1.load_image()?;
        h1.docker(CREATE_WEB)?;
        // Something has to have the kernel track connections before the port is there.
        h1.docker_run("other", &["--network", "web", "-p", "8080:80"])?;
        let _sender = send_datagrams(h2, h1, 5353)?;
        for name in ["first", "second"] {
            let container = h1.docker_run(name, &["--network", "web", "-p", "5353:53/udp"])?;
            // Nobody need listen: the kernel counts what came for a port that nobody listens on.
            let heard = || container.sh(r"sed -n 's/^Udp: [0-9]* \([0-9]*\) .*/\1/p' /proc/net/snmp");
            eventually(format!("{name} hears the sender"), secs(10), || {
                let count = heard()?;
                ensure!(count != "0", "{count} datagrams came");
                Ok(())
            })?;
            h1.docker(&["rm", "-f", name])?;
        }
        Ok(())
    });
}
