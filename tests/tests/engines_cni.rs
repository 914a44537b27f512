//! containerd on two hosts with flanneld and the CNI plugin, as a node of a cluster has them: every ADD and every DEL is one that
//! containerd asks for.

use std::net::Ipv4Addr;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::flanneld::{Flanneld, SubnetEnv, put_config};
use flannel_tests::{
    CREATE_WEB, Container, Daemon, Host, HttpServer, IMAGE_REFERENCE, Lab, LabPlan, PingStream, Place,
    eventually, http_get, in_lab, largest_packet, needs, ping, ping_within, secs, seen_as, unchanged,
};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;

const MASQ: &[&str] = &["--iface", "eth0", "--ip-masq"];
const NO_MASQ: &[&str] = &["--iface", "eth0"];

/// A configuration as an operator drops it into /etc/cni/net.d.
#[derive(Clone, Copy)]
struct Conf {
    file: &'static str,
    text: &'static str,
    has_default_route: bool,
}

/// As kube-flannel ships it, without portmap.
const CBR0: Conf = Conf {
    file: "10-flannel.conflist",
    text: r#"{ "name": "cbr0", "cniVersion": "0.3.1", "plugins": [
        { "type": "flannel", "delegate": { "hairpinMode": true, "isDefaultGateway": true } } ] }"#,
    has_default_route: true,
};
/// With the portmap that kube-flannel's has behind it; that one is Debian's.
const WITH_PORTMAP: Conf = Conf {
    text: r#"{ "name": "cbr0", "cniVersion": "0.3.1", "plugins": [
        { "type": "flannel", "delegate": { "hairpinMode": true, "isDefaultGateway": true } },
        { "type": "portmap", "capabilities": { "portMappings": true } } ] }"#,
    ..CBR0
};
/// The least there can be. Upstream's plugin, too, gives such a container a route to the network alone.
const BARE: Conf = Conf {
    file: "10-flannel.conf",
    text: r#"{"cniVersion":"1.0.0","name":"anything","type":"flannel"}"#,
    has_default_route: false,
};

/// How long a repair may take.
const REPAIR: Duration = Duration::from_secs(1);

/// A host with flanneld, containerd and the plugin.
struct Node<'a> {
    host: &'a Host,
    conf: Conf,
    flanneld: Flanneld,
    env: SubnetEnv,
}

/// A container with `ctr run` waiting for its end, which is when containerd's client asks for DEL.
struct Pod {
    container: Container,
    ctr: Daemon,
    ip: Ipv4Addr,
}

fn lab(name: &str) -> LabPlan {
    Lab::new(name).etcd().needs(&["containerd", "ctr", "runc"])
}

/// Two hosts with everything running.
fn nodes<'a>(lab: &'a Lab, config: &str, confs: [Conf; 2], flags: [&[&str]; 2]) -> Result<Vec<Node<'a>>> {
    put_config(lab, config)?;
    thread::scope(|scope| {
        let each = lab.hosts().iter().zip(confs).zip(flags);
        let starting: Vec<_> = each
            .map(|((host, conf), flags)| scope.spawn(move || Node::start(lab, host, conf, flags)))
            .collect();
        starting.into_iter().map(|node| node.join().expect("no panic")).collect()
    })
}

/// containerd with the image, the plugin and its configuration.
fn start_containerd(host: &Host, conf: Conf) -> Result<()> {
    host.install_cni("flannel")?;
    host.write(&format!("/etc/cni/net.d/{}", conf.file), conf.text)?;
    host.start_containerd()?;
    host.import_image()
}

/// Addresses in the ledger, whatever it is called, once each.
fn ledger(host: &Host) -> Result<Vec<String>> {
    let script = "find /var/lib/cni/networks/ -type f -name '*.*.*.*' | sed 's,.*/,,' | sort";
    Ok(host.sh(script)?.split_whitespace().map(str::to_owned).collect())
}

impl<'a> Node<'a> {
    fn start(lab: &Lab, host: &'a Host, conf: Conf, flags: &[&str]) -> Result<Self> {
        let flanneld = Flanneld::start_with(lab, host, flags)?;
        start_containerd(host, conf)?;
        let env = flanneld.ready()?;
        Ok(Self { host, conf, flanneld, env })
    }

    fn pod(&self, name: &str) -> Result<Pod> {
        Pod::run(self.host, name)
    }

    fn ledger(&self) -> Result<Vec<String>> {
        ledger(self.host)
    }

    /// Whether a container got the n-th address, the gateway and the MTU it should have.
    fn placed(&self, pod: &Pod, nth: u8, mtu: u32) -> Result<()> {
        let (container, env) = (&pod.container, &self.env);
        let address = format!("{}/{}", env.address(nth), env.len);
        ensure!(container.address("eth0")? == address, "{} is not {address}", container.address("eth0")?);
        let routes = container.out(&["ip", "route"])?;
        let gateway = env.address(1);
        ensure!(routes.contains(&format!("10.100.0.0/16 via {gateway} dev eth0")), "{routes}");
        let default = routes.contains(&format!("default via {gateway} dev eth0"));
        ensure!(default == self.conf.has_default_route, "{routes}");
        let bridge = self.host.sh("ip -4 -o addr show dev cni0; ip -o link show cni0")?;
        ensure!(
            bridge.contains(&format!("inet {} ", env.gateway())) && bridge.contains(&format!("mtu {mtu} ")),
            "{bridge}"
        );
        ensure!(container.mtu("eth0")? == mtu && env.mtu == mtu, "MTU {}", container.mtu("eth0")?);
        Ok(())
    }
}

impl Pod {
    fn run(host: &Host, name: &str) -> Result<Self> {
        let argv = ["ctr", "run", "--rm", "--cni", "--null-io", IMAGE_REFERENCE, name, "sleep", "infinity"];
        let ctr = host.spawn(name, &argv, &[])?;
        let runs = || -> Result<bool> {
            let tasks = host.ctr(&["task", "ls"])?;
            let row = |line: &str| line.starts_with(&format!("{name} ")) && line.contains("RUNNING");
            ensure!(tasks.lines().any(row) || !ctr.alive(), "{tasks}");
            Ok(ctr.alive())
        };
        if !eventually(format!("{name} runs on {}", host.name()), secs(20), runs)? {
            bail!("{}: ctr run {name} ended\n{}", host.name(), ctr.tail());
        }
        let container = host.ctr_container(name)?;
        let ip = container.ip()?.parse()?;
        Ok(Self { container, ctr, ip })
    }

    /// Ends it; containerd's client then asks for DEL.
    fn remove(self, name: &str) -> Result<()> {
        let host = self.container.host().clone();
        host.ctr(&["task", "kill", "-s", "KILL", name])?;
        let status = self.ctr.wait(secs(20))?;
        // 137: what `ctr run` says of a container that was killed.
        ensure!(status.code() == Some(137), "{status}\n{}", self.ctr.tail());
        Ok(())
    }
}

/// Everything a container is promised, with two containers on the first node and one on the second.
fn everybody_reaches_everybody(lab: &Lab, nodes: &[Node<'_>], mtu: u32) -> Result<()> {
    let [one, two] = nodes else { bail!("two nodes are wanted, not {}", nodes.len()) };
    let pods = [(one, one.pod("a")?, 2), (one, one.pod("b")?, 3), (two, two.pod("c")?, 2)];
    for (node, pod, nth) in &pods {
        node.placed(pod, *nth, mtu)?;
    }
    let mut servers = vec![HttpServer::start(lab.outside(), 8000, "outside")?];
    for (_, pod, _) in &pods {
        servers.push(HttpServer::start(&pod.container, 80, &pod.ip.to_string())?);
    }
    for node in nodes {
        servers.push(HttpServer::start(node.host, 8000, node.host.name())?);
    }
    for (home, from, _) in &pods {
        for (_, to, _) in pods.iter().filter(|(_, to, _)| to.ip != from.ip) {
            ping_within(secs(2), &from.container, to.ip)?;
            ensure!(http_get(&from.container, &format!("http://{}/", to.ip))? == to.ip.to_string());
            // Nothing between two containers hides who asks.
            ensure!(seen_as(&from.container, to.ip, 80)? == from.ip.to_string());
        }
        for node in nodes {
            ping(&from.container, node.env.address(1))?;
            ping(node.host, from.ip)?;
            ensure!(http_get(node.host, &format!("http://{}/", from.ip))? == from.ip.to_string());
        }
        if home.conf.has_default_route {
            for node in nodes {
                ping(&from.container, node.host.ip())?;
                let page = http_get(&from.container, &format!("http://{}:8000/", node.host.ip()))?;
                ensure!(page == node.host.name(), "{page}");
            }
            // There nobody knows the way back to a container.
            let seen = seen_as(&from.container, lab.outside().ip(), 8000)?;
            ensure!(seen == home.host.ip().to_string(), "{} is seen as {seen}", from.ip);
        }
    }
    ensure!(largest_packet(&pods[0].1.container, pods[2].1.ip)? == mtu);
    ensure!(one.ledger()? == [pods[0].1.ip.to_string(), pods[1].1.ip.to_string()], "{:?}", one.ledger()?);
    ensure!(two.ledger()? == [pods[2].1.ip.to_string()], "{:?}", two.ledger()?);
    for node in nodes {
        let log = node.flanneld.daemon().log();
        let trouble = [" ERROR ", " WARN ", "reason=kernel"].iter().find(|word| log.contains(**word));
        ensure!(
            trouble.is_none(),
            "containers are no business of flanneld's, and nothing went wrong:\n{log}"
        );
    }
    Ok(())
}

#[test]
fn containers_reach_each_other_under_vxlan() {
    in_lab(lab("cni-vxlan").outside(), |lab| {
        everybody_reaches_everybody(lab, &nodes(lab, VXLAN, [CBR0, BARE], [MASQ; 2])?, 1450)
    });
}

#[test]
fn containers_reach_each_other_under_host_gw() {
    in_lab(lab("cni-hostgw").outside(), |lab| {
        everybody_reaches_everybody(lab, &nodes(lab, HOST_GW, [CBR0, CBR0], [MASQ; 2])?, 1500)
    });
}

#[test]
fn another_plugin_of_the_chain_understands_our_result() {
    if !Path::new("/usr/lib/cni/portmap").exists() {
        needs::skipped("Debian's containernetworking-plugins in /usr/lib/cni");
        return;
    }
    in_lab(lab("cni-chain").hosts(1), |lab| {
        lab.host(1).install_debian_cni()?;
        let nodes = nodes(lab, VXLAN, [WITH_PORTMAP; 2], [MASQ; 2])?;
        let before = lab.host(1).network_state()?;
        let a = nodes[0].pod("a")?;
        nodes[0].placed(&a, 2, 1450)?;
        ping_within(secs(2), &a.container, nodes[0].env.address(1))?;
        a.remove("a")?;
        lab.host(1).out(&["ip", "link", "del", "cni0"])?;
        unchanged("the kernel after DEL", &before, &lab.host(1).network_state()?)
    });
}

#[test]
fn a_killed_flanneld_costs_no_packet_and_no_container() {
    in_lab(lab("cni-kill"), |lab| {
        let nodes = nodes(lab, VXLAN, [CBR0, BARE], [MASQ; 2])?;
        let (a, b) = (nodes[0].pod("a")?, nodes[1].pod("b")?);
        ping_within(secs(2), &a.container, b.ip)?;
        let there = PingStream::start(&a.container, b.ip, Duration::from_millis(10))?;
        let back = PingStream::start(&b.container, a.ip, Duration::from_millis(10))?;
        for node in &nodes {
            node.flanneld.daemon().crash()?;
        }
        lab.etcd_stop()?;
        // Nothing of flannel runs anywhere now; containers come and go.
        let c = nodes[0].pod("c")?;
        ping(&c.container, b.ip)?;
        ping(&b.container, c.ip)?;
        c.remove("c")?;
        ensure!(nodes[0].ledger()? == [a.ip.to_string()]);
        lab.etcd_start()?;
        for node in &nodes {
            Flanneld::start(lab, node.host)?.ready()?;
            ensure!(SubnetEnv::read(node.host)? == node.env, "another subnet after the restart");
        }
        for stream in [there, back] {
            let seen = stream.stop_after(41)?;
            ensure!(seen.sent > 40 && seen.lost() == 0, "{seen:?}");
        }
        Ok(())
    });
}

#[test]
fn nothing_is_left_behind() {
    in_lab(lab("cni-left"), |lab| {
        let files = |host: &Host| {
            // What libcni keeps of its results is containerd's.
            let script =
                "find /run/flannel /var/lib/flannel /var/lib/cni -not -name results 2>/dev/null | sort";
            host.sh(script)
        };
        let before =
            lab.hosts().iter().map(|h| Ok((h.network_state()?, files(h)?))).collect::<Result<Vec<_>>>()?;
        // On the second flanneld does not masquerade, so the plugin does. The guard of a tunnel goes when its flanneld is stopped,
        // unlike the rest of what that made.
        let flags = [MASQ, NO_MASQ].map(|flags| [flags, &["--tunnel-guard=false"]].concat());
        let nodes = nodes(lab, VXLAN, [CBR0, BARE], flags.each_ref().map(Vec::as_slice))?;
        for (node, (network, files_before)) in nodes.iter().zip(&before) {
            let host = node.host;
            let agent_only = host.network_state()?;
            let (a, b) = (node.pod("a")?, node.pod("b")?);
            ping(&a.container, b.ip)?;
            a.remove("a")?;
            let links = host.out(&["ip", "-br", "link"])?;
            ensure!(links.matches("veth").count() == 1, "{links}");
            ensure!(node.ledger()? == [b.ip.to_string()]);
            let error = cleanup(lab, host)?.stderr;
            ensure!(error.contains("flanneld (process") && error.contains("stop it first"), "{error}");
            node.flanneld.daemon().stop(secs(5))?;
            let error = cleanup(lab, host)?.stderr;
            ensure!(
                error.contains(&format!("containers still hold addresses: {} (default-b/eth0)", b.ip)),
                "{error}"
            );
            ping(host, b.ip)?;
            b.remove("b")?;

            // The bridge stays for the next container; nothing else does.
            ensure!(node.ledger()?.is_empty(), "{:?}", node.ledger()?);
            ensure!(
                host.sh("ls /var/lib/cni/flannel /var/lib/cni/results")?
                    .lines()
                    .all(|l| l.is_empty() || l.ends_with(':'))
            );
            host.sh("ip link del cni0; nft delete table inet flannel_cni 2>/dev/null || true")?;
            unchanged("the kernel after the last DEL", &agent_only, &host.network_state()?)?;
            let c = node.pod("c")?;
            c.remove("c")?;
            cleanup(lab, host)?.text()?;
            unchanged("the kernel after --cleanup", network, &host.network_state()?)?;
            unchanged("the files after --cleanup", files_before, &files(host)?)?;
        }
        let left = lab.etcdctl(&["get", "--prefix", "--keys-only", "/coreos.com/network/subnets/"])?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    });
}

fn cleanup(lab: &Lab, host: &Host) -> Result<flannel_tests::Output> {
    host.run(&["flanneld", "--cleanup", "--etcd-endpoints", &lab.etcd_endpoint()])
}

#[test]
fn a_firewall_that_drops_does_not_stop_the_network() {
    in_lab(lab("cni-drop").needs(&["iptables"]), |lab| {
        let nodes = nodes(lab, VXLAN, [CBR0, BARE], [MASQ; 2])?;
        let (a, b) = (nodes[0].pod("a")?, nodes[1].pod("b")?);
        ping_within(secs(2), &a.container, b.ip)?;
        let _server = HttpServer::start(&b.container, 80, "b")?;
        let url = format!("http://{}/", b.ip);
        // One transaction each: between two commands flanneld would have repaired the first, and the second would find a chain in use.
        for mischief in [
            "iptables -P FORWARD DROP",
            "iptables -F",
            "printf '*filter\\n:FORWARD DROP\\nCOMMIT\\n' | iptables-restore",
            "printf 'flush ruleset\\nadd table ip filter\\nadd chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }\\n' | nft -f -",
        ] {
            for node in &nodes {
                node.host.sh(mischief)?;
                eventually(format!("repaired after {mischief}"), REPAIR, || {
                    let rules = node.host.sh("nft list ruleset; iptables -S FORWARD")?;
                    let ours = ["-P FORWARD DROP", "-j FLANNEL-FWD", "chain FLANNEL-POSTRTG {", "masquerade"];
                    ensure!(ours.iter().all(|part| rules.contains(part)), "{rules}");
                    Ok(())
                })?;
            }
            ping(&a.container, b.ip).context(mischief)?;
            ensure!(http_get(&a.container, &url)? == "b");
        }
        for node in &nodes {
            // The rules are seen in the kernel a moment before the pass that wrote them is counted.
            eventually("every repair counted", REPAIR, || {
                let repaired = node.flanneld.repaired()?;
                ensure!(repaired.get("chain").is_some_and(|count| *count >= 4), "{repaired:?}");
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// ctr 1.6 tells nobody that a container which it started with `-d` has ended.
#[test]
fn addresses_of_containers_that_ctr_forgot_are_given_out_again() {
    in_lab(Lab::new("cni-forgot").hosts(1).needs(&["containerd", "ctr", "runc"]), |lab| {
        let host = lab.host(1);
        let subnet = "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET=10.100.5.1/29\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        host.write("/run/flannel/subnet.env", subnet)?;
        start_containerd(host, CBR0)?;
        let names = ["a", "b", "c", "d", "e"];
        let all = names.map(|name| host.ctr_run(name, &["--cni"])).into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(ledger(host)?.len() == names.len(), "{:?}", ledger(host)?);
        let full =
            host.try_ctr(&["run", "-d", "--null-io", "--cni", IMAGE_REFERENCE, "f", "sleep", "infinity"])?;
        ensure!(!full.ok() && full.stderr.contains("10.100.5.0/29"), "{full}");
        ensure!(ledger(host)?.len() == names.len());
        let forgotten = [all[1].ip()?, all[2].ip()?];
        host.ctr_remove("b")?;
        host.ctr_remove("c")?;
        let next = host.ctr_run("g", &["--cni"])?;
        ensure!(forgotten.contains(&next.ip()?), "{} is not one of {forgotten:?}", next.ip()?);
        for living in [&all[0], &all[3], &all[4]] {
            ping_within(secs(3), &next, living.ip()?)?;
        }
        Ok(())
    });
}

/// Without an agent that keeps the bridge nobody looks after the ports of containers that are there already: they are cut off
/// until they are made anew, and can be removed at any time.
#[test]
fn a_deleted_bridge_comes_back_with_the_next_container() {
    in_lab(lab("cni-bridge"), |lab| {
        let nodes = nodes(lab, VXLAN, [CBR0, BARE], [MASQ; 2])?;
        let host = nodes[0].host;
        let (a, b) = (nodes[0].pod("a")?, nodes[1].pod("b")?);
        ping_within(secs(2), &a.container, b.ip)?;
        let before = host.network_state()?;
        host.out(&["ip", "link", "del", "cni0"])?;
        ensure!(ping(&a.container, b.ip).is_err(), "a container without a bridge reaches others");
        let c = nodes[0].pod("c")?;
        ping_within(secs(2), &c.container, b.ip)?;
        ensure!(http_answers(&b, &c.container)?);
        let ports = host.out(&["bridge", "link"])?;
        ensure!(ports.matches("master cni0").count() == 1, "{ports}");
        ensure!(ping(&a.container, b.ip).is_err(), "somebody looked after it: say so here");
        a.remove("a")?;
        let a = nodes[0].pod("a")?;
        ping_within(secs(2), &a.container, b.ip)?;
        ping(&a.container, c.ip)?;
        c.remove("c")?;
        // The same but for the MAC and the address of the one container.
        let after = host.network_state()?;
        ensure!(before.lines().count() == after.lines().count(), "before\n{before}\nafter\n{after}");
        Ok(())
    });
}

fn http_answers(server: &Pod, from: &Container) -> Result<bool> {
    let running = HttpServer::start(&server.container, 80, "here")?;
    let page = http_get(from, &format!("http://{}/", server.ip))?;
    running.stop()?;
    Ok(page == "here")
}

/// A host with two engines: the Docker plugin serves the network, the CNI plugin joins it.
struct Shared<'a> {
    host: &'a Host,
    docker: (Container, Ipv4Addr),
    containerd: Pod,
    plugin: Daemon,
}

impl<'a> Shared<'a> {
    /// `docker_first` says whose container comes first, and so names the ledger.
    fn start(lab: &Lab, host: &'a Host, conf: Conf, docker_first: bool) -> Result<Self> {
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let plugin = host.spawn("plugin", &["flannel-docker-plugin", &endpoints], &[])?;
        start_containerd(host, conf)?;
        host.start_dockerd(&[])?;
        host.load_image()?;
        let from_docker = || -> Result<_> {
            host.docker(CREATE_WEB)?;
            let container = host.docker_run("docker", &["--network", "web"])?;
            let ip = container.ip()?.parse()?;
            Ok((container, ip))
        };
        let (docker, containerd) = if docker_first {
            let docker = from_docker()?;
            (docker, Pod::run(host, "c")?)
        } else {
            eventually("subnet.env", secs(10), || host.read("/run/flannel/subnet.env"))
                .with_context(|| plugin.tail())?;
            let containerd = Pod::run(host, "c")?;
            (from_docker()?, containerd)
        };
        Ok(Self { host, docker, containerd, plugin })
    }

    fn containers(&self) -> [(&Container, Ipv4Addr); 2] {
        [(&self.docker.0, self.docker.1), (&self.containerd.container, self.containerd.ip)]
    }

    /// The Docker plugin's agent keeps the bridge, and puts back on it whoever is in the ledger.
    fn mends_its_bridge(&self, far: Ipv4Addr) -> Result<()> {
        self.host.out(&["ip", "link", "del", "cni0"])?;
        for (container, ip) in self.containers() {
            ping_within(REPAIR, container, far).with_context(|| format!("{ip} is cut off"))?;
        }
        Ok(())
    }

    /// One subnet, one bridge, one ledger.
    fn shares(&self) -> Result<()> {
        let (host, env) = (self.host, SubnetEnv::read(self.host)?);
        for (container, ip) in self.containers() {
            ensure!(container.address("eth0")? == format!("{ip}/{}", env.len));
            ensure!(container.mtu("eth0")? == env.mtu);
            let gateway = container.out(&["ip", "route", "get", "10.100.255.1"])?;
            ensure!(gateway.contains(&format!("via {}", env.address(1))), "{gateway}");
        }
        let mut expected = [2, 3].map(|nth| env.address(nth));
        let mut ips = self.containers().map(|(_, ip)| ip);
        expected.sort();
        ips.sort();
        ensure!(ips == expected, "{ips:?} are not the first two of {}", env.subnet());
        ensure!(ledger(host)? == ips.map(|ip| ip.to_string()), "{:?}", ledger(host)?);
        let ledgers = host.sh("find /var/lib/cni/networks -mindepth 1 -maxdepth 1 -type d")?;
        ensure!(ledgers.lines().count() == 1, "{ledgers}");
        let bridges = host.out(&["ip", "-br", "link", "show", "type", "bridge"])?;
        let names: Vec<_> = bridges.lines().filter_map(|line| line.split_whitespace().next()).collect();
        ensure!(names.len() == 2 && names.contains(&"cni0") && names.contains(&"docker0"), "{bridges}");
        let ports = host.out(&["bridge", "link"])?;
        ensure!(ports.matches("master cni0").count() == 2, "{ports}");
        Ok(())
    }
}

#[test]
fn docker_and_containerd_share_a_node() {
    let plan = lab("cni-docker").needs(&["dockerd", "docker"]).ip_forward(false).outside();
    in_lab(plan, |lab| {
        put_config(lab, VXLAN)?;
        let hosts = thread::scope(|scope| {
            let each = lab.hosts().iter().zip([(CBR0, false), (BARE, true)]);
            let starting: Vec<_> = each
                .map(|(host, (conf, docker_first))| {
                    scope.spawn(move || Shared::start(lab, host, conf, docker_first))
                })
                .collect();
            starting.into_iter().map(|host| host.join().expect("no panic")).collect::<Result<Vec<_>>>()
        })?;
        hosts.iter().try_for_each(Shared::shares)?;
        let all: Vec<_> = hosts.iter().flat_map(Shared::containers).collect();
        let _servers = all
            .iter()
            .map(|(container, ip)| HttpServer::start(*container, 80, &ip.to_string()))
            .collect::<Result<Vec<_>>>()?;
        for (from, own) in &all {
            for (_, to) in all.iter().filter(|(_, to)| to != own) {
                ping_within(secs(3), *from, to)?;
                ensure!(http_get(*from, &format!("http://{to}/"))? == to.to_string());
                ensure!(seen_as(*from, to, 80)? == own.to_string());
            }
        }
        let _outside = HttpServer::start(lab.outside(), 8000, "outside")?;
        for host in &hosts {
            for (_, ip) in &all {
                ensure!(http_get(host.host, &format!("http://{ip}/"))? == ip.to_string());
            }
            let seen = seen_as(&host.docker.0, lab.outside().ip(), 8000)?;
            ensure!(seen == host.host.ip().to_string(), "{seen}");
        }
        let seen = seen_as(&hosts[0].containerd.container, lab.outside().ip(), 8000)?;
        ensure!(seen == hosts[0].host.ip().to_string(), "{seen}");
        hosts[0].mends_its_bridge(hosts[1].containerd.ip)?;
        docker_leaves_containerd_alone(&hosts)
    });
}

/// The Docker network goes; the containers of the other engine keep theirs.
fn docker_leaves_containerd_alone(hosts: &[Shared<'_>]) -> Result<()> {
    let [one, two] = hosts else { bail!("two hosts are wanted") };
    let stream = PingStream::start(&one.containerd.container, two.containerd.ip, Duration::from_millis(50))?;
    one.host.docker(&["rm", "-f", "docker"])?;
    one.host.docker(&["network", "rm", "web"])?;
    eventually("the container's address is free", secs(5), || -> Result<()> {
        let ledger = ledger(one.host)?;
        ensure!(ledger == [one.containerd.ip.to_string()], "{ledger:?}");
        Ok(())
    })?;
    one.plugin.crash()?;
    let next = Pod::run(one.host, "next")?;
    ping(&next.container, one.containerd.ip)?;
    ping(&next.container, two.docker.1)?;
    next.remove("next")?;
    let seen = stream.stop_after(6)?;
    ensure!(seen.sent > 5 && seen.lost() == 0, "{seen:?}");
    Ok(())
}
