//! The Docker plugin on a node where another agent holds the lease: it reads that one's subnet.env along.
//!
//! The other agent is our own flanneld, found by its lock, unless `FLANNEL_FOREIGN_FLANNELD` names another program: Go
//! flanneld, which is found by its process.

use std::env;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{SubnetEnv, leases, put_config};
use flannel_tests::{
    BIN_DIR, CREATE_WEB, Container, Daemon, Host, HttpServer, IMAGE, Lab, LabPlan, PingStream, Place,
    eventually, http_get, in_lab, ping, ping_within, secs, seen_as,
};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;
/// Says where a flanneld is that is not ours: a path of this machine.
const FOREIGN: &str = "FLANNEL_FOREIGN_FLANNELD";

fn plan(name: &str) -> LabPlan {
    Lab::new(name).hosts(2).ip_forward(false).etcd().needs(&["dockerd", "docker", "busybox"])
}

/// Starts the agent that owns the lease on a host, and waits for its file.
fn start_owner(lab: &Lab, host: &Host, flags: &[&str]) -> Result<Daemon> {
    let program = match env::var(FOREIGN) {
        Ok(path) => {
            let inside = "/run/flanneld";
            host.write(inside, std::fs::read(&path).with_context(|| format!("{FOREIGN}={path}"))?)?;
            host.out(&["chmod", "0755", inside])?;
            inside.to_owned()
        }
        Err(_) => "flanneld".to_owned(),
    };
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let argv = [&[program.as_str(), &endpoints, "--iface=eth0"], flags].concat();
    let daemon = host.spawn("owner", &argv, &[])?;
    eventually("the owner's subnet.env", secs(20), || SubnetEnv::read(host))
        .with_context(|| daemon.tail())?;
    Ok(daemon)
}

fn start_engine(host: &Host) -> Result<Daemon> {
    let dockerd = host.start_dockerd(&[])?;
    host.load_image()?;
    Ok(dockerd)
}

/// `10.100.5.`
fn lease(host: &Host) -> Result<String> {
    let base = SubnetEnv::read(host)?.base().to_string();
    Ok(base.rsplit_once('.').context("no address")?.0.to_owned() + ".")
}

fn containers_reach_each_other(name: &str, config: &str, plugin_has_etcd: bool) {
    in_lab(plan(name), |lab| {
        put_config(lab, config)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let flags: &[&str] = if plugin_has_etcd { &[&endpoints] } else { &[] };
        let _owner = start_owner(lab, h1, &["--ip-masq"])?;
        let env = h1.read("/run/flannel/subnet.env")?;
        let plugin = h1.start_plugin(flags)?;
        let _other = h2.start_plugin(&[&endpoints])?;
        let _engines = (start_engine(h1)?, start_engine(h2)?);
        h1.docker(CREATE_WEB).with_context(|| plugin.tail())?;
        h2.docker(CREATE_WEB)?;
        let c1 = h1.docker_run("c1", &["--network", "web"])?;
        let c2 = h2.docker_run("c2", &["--network", "web"])?;
        let address = c1.ip()?;
        ensure!(address.starts_with(&lease(h1)?), "{address} is not in {}0/24", lease(h1)?);
        ensure!(c1.mtu("eth0")? == SubnetEnv::read(h1)?.mtu, "MTU {}", c1.mtu("eth0")?);
        ping_within(secs(10), &c1, c2.ip()?)?;
        ping(&c2, c1.ip()?)?;
        let _server = HttpServer::start(&c2, 80, "hello from c2")?;
        ensure!(http_get(&c1, &format!("http://{}/", c2.ip()?))? == "hello from c2");
        let seen = seen_as(&c1, c2.ip()?, 80)?;
        ensure!(seen == c1.ip()?, "seen as {seen}");

        // Nothing of the owner's was touched: one lease of each host, and the file as it was.
        ensure!(leases(lab)?.len() == 2, "{:?}", leases(lab)?);
        ensure!(h1.read("/run/flannel/subnet.env")? == env);
        Ok(())
    });
}

#[test]
fn containers_reach_each_other_beside_another_agent_over_vxlan() {
    containers_reach_each_other("reader-vxlan", VXLAN, true);
}

#[test]
fn a_plugin_without_a_store_of_its_cluster_joins_the_nodes_network() {
    containers_reach_each_other("reader-no-etcd", VXLAN, false);
}

#[test]
fn containers_reach_each_other_beside_another_agent_over_host_gw() {
    containers_reach_each_other("reader-host-gw", HOST_GW, true);
}

/// Starts an agent that knows nothing of our lock: the foreign one, or a process that is called like it and has just
/// written the file. More than that is not to be known of one.
fn start_foreign(lab: &Lab, host: &Host) -> Result<Daemon> {
    if env::var_os(FOREIGN).is_some() {
        return start_owner(lab, host, &["--ip-masq"]);
    }
    host.sh("cp /usr/bin/sleep /run/flanneld")?;
    let daemon = host.spawn("owner", &["/run/flanneld", "600"], &[])?;
    host.sh("cd /run/flannel; cp subnet.env new; mv new subnet.env")?;
    Ok(daemon)
}

#[test]
fn an_agent_that_knows_nothing_of_the_lock_gets_the_way() {
    in_lab(plan("reader-yields"), |lab| {
        put_config(lab, VXLAN)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let plugin = h1.start_plugin(&[&endpoints])?;
        h2.start_plugin(&[&endpoints])?;
        start_engine(h1)?;
        start_engine(h2)?;
        h1.docker(CREATE_WEB)?;
        h2.docker(CREATE_WEB)?;
        let c1 = h1.docker_run("c1", &["--network", "web"])?;
        let c2 = h2.docker_run("c2", &["--network", "web"])?;
        ping_within(secs(10), &c1, c2.ip()?)?;
        let env = h1.read("/run/flannel/subnet.env")?;
        let foreign = start_foreign(lab, h1)?;
        let yields = || {
            // Something happens on every host now and then, and is looked at.
            h1.sh("ip link add now type bridge; ip link del now")?;
            let log = plugin.log();
            ensure!(log.contains("giving way") && log.contains("reading along"), "{}", plugin.tail());
            Ok(())
        };
        eventually("the plugin gives way", secs(20), yields)?;
        ensure!(h1.read("/run/flannel/subnet.env")? == env, "another subnet");
        ensure!(leases(lab)?.len() == 2, "{:?}", leases(lab)?);
        let status = h1.out(&["flannel-docker-plugin", "status"])?;
        ensure!(status.contains("flanneld (process"), "{status}");
        ping_within(secs(5), &c1, c2.ip()?)?;
        let c3 = h1.docker_run("c3", &["--network", "web"])?;
        ping_within(secs(5), &c3, c2.ip()?)?;
        // Its rules are not kept beside the other one's.
        let tables = h1.out(&["nft", "list", "tables"])?;
        ensure!(!tables.lines().any(|table| table == "table inet flannel"), "{tables}");
        ensure!(foreign.alive());
        Ok(())
    });
}

#[test]
fn a_reader_publishes_ports() {
    in_lab(plan("reader-ports"), |lab| {
        let (owner, _plugin, _c1, c2) = two_containers(lab)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let web = h1.docker_run("server", &["--network", "web", "-p", "8080:80"])?;
        let _server = HttpServer::start(&web, 80, "hello from a port")?;
        let url = format!("http://{}:8080/", h1.ip());
        for from in [&c2 as &dyn Place, h2, h1] {
            let said = eventually("the port answers", secs(5), || http_get(from, &url))?;
            ensure!(said == "hello from a port", "{said}");
        }
        ensure!(seen_as(h2, h1.ip(), 8080)? == h2.ip().to_string());
        // With the owner away, too.
        owner.crash()?;
        let second = h1.docker_run("second", &["--network", "web", "-p", "8081:80"])?;
        let _second = HttpServer::start(&second, 80, "and another")?;
        let url = format!("http://{}:8081/", h1.ip());
        ensure!(eventually("the port answers", secs(5), || http_get(h2, &url))? == "and another");
        h1.docker(&["rm", "-f", "server", "second"])?;
        let closed = || {
            let rules = h1.out(&["nft", "list", "ruleset"])?;
            ensure!(!rules.contains("8080") && !rules.contains("8081"), "{rules}");
            Ok(())
        };
        eventually("the ports are closed", secs(10), closed)
    });
}

/// An owner and a plugin beside it on the first host, a plugin on the second, a container on each.
fn two_containers(lab: &Lab) -> Result<(Daemon, Daemon, Container, Container)> {
    put_config(lab, VXLAN)?;
    let (h1, h2) = (lab.host(1), lab.host(2));
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let owner = start_owner(lab, h1, &["--ip-masq"])?;
    let plugin = h1.start_plugin(&[&endpoints])?;
    h2.start_plugin(&[&endpoints])?;
    start_engine(h1)?;
    start_engine(h2)?;
    h1.docker(CREATE_WEB)?;
    h2.docker(CREATE_WEB)?;
    let c1 = h1.docker_run("c1", &["--network", "web"])?;
    let c2 = h2.docker_run("c2", &["--network", "web"])?;
    ping_within(secs(10), &c1, c2.ip()?)?;
    Ok((owner, plugin, c1, c2))
}

#[test]
fn an_owner_that_is_killed_and_comes_back_costs_no_packet() {
    in_lab(plan("reader-restart"), |lab| {
        let (owner, plugin, c1, c2) = two_containers(lab)?;
        let h1 = lab.host(1);
        let stream = PingStream::start(&c1, c2.ip()?, Duration::from_millis(50))?;
        owner.crash()?;
        let ended = || {
            ensure!(plugin.log().contains("unless it comes back"), "{}", plugin.tail());
            Ok(())
        };
        eventually("the plugin sees that it is gone", secs(10), ended)?;
        // Containers come and go meanwhile.
        h1.docker(&["run", "--rm", "--network", "web", IMAGE, "ping", "-c", "1", "-W", "3", &c2.ip()?])?;
        let _owner = start_owner(lab, h1, &["--ip-masq"])?;
        let back = || {
            ensure!(plugin.log().contains("served again"), "{}", plugin.tail());
            Ok(())
        };
        eventually("the plugin sees that it is back", secs(10), back)?;
        let count = stream.stop_after(61)?;
        // Go flanneld takes its accepts down and up again at its start, and the engine's FORWARD chain drops meanwhile.
        let allowed = if env::var_os(FOREIGN).is_some() { 3 } else { 0 };
        ensure!(count.lost() <= allowed, "{count:?}\n{}", plugin.tail());
        ensure!(leases(lab)?.len() == 2, "{:?}", leases(lab)?);
        Ok(())
    });
}

#[test]
fn an_owner_that_has_ended_for_good_is_succeeded() {
    in_lab(plan("reader-take-over"), |lab| {
        let (owner, plugin, c1, c2) = two_containers(lab)?;
        let h1 = lab.host(1);
        let before = h1.read("/run/flannel/subnet.env")?;
        let stream = PingStream::start(&c1, c2.ip()?, Duration::from_millis(100))?;
        owner.stop(secs(20))?;
        let taken = || {
            let holder = h1.read("/run/flannel/default.agent")?;
            ensure!(holder.starts_with("flannel-docker-plugin"), "held by {holder:?}\n{}", plugin.tail());
            let log = plugin.log();
            let leased = log.contains("reusing") && log.contains("Wrote subnet file");
            ensure!(leased, "{}", plugin.tail());
            Ok(())
        };
        eventually("the plugin takes over", secs(120), taken)?;
        ensure!(h1.read("/run/flannel/subnet.env")? == before, "another subnet:\n{}", plugin.tail());
        ensure!(leases(lab)?.len() == 2, "{:?}", leases(lab)?);
        // A reader's rules are gone, and the data path is kept as it was.
        ensure!(!h1.out(&["nft", "list", "tables"])?.contains("flannel_reader"));
        let count = stream.stop_after(31)?;
        ensure!(count.lost() == 0, "{count:?}\n{}", plugin.tail());
        h1.out(&["ip", "link", "del", "flannel.1"])?;
        eventually("the tunnel is repaired", secs(20), || ping(&c1, c2.ip()?))
    });
}

#[test]
fn containers_of_docker_and_of_cni_share_a_node() {
    in_lab(plan("reader-cni"), |lab| {
        let (_owner, plugin, c1, c2) = two_containers(lab)?;
        let host = lab.host(1);
        let pods = [Pod::start(host, "pod1")?, Pod::start(host, "pod2")?];
        let second = host.docker_run("second", &["--network", "web"])?;
        let mut addresses = vec![c1.ip()?, second.ip()?];
        for pod in &pods {
            addresses.push(pod.ip()?);
            ping_within(secs(5), pod, c1.ip()?)?;
            ping_within(secs(5), pod, c2.ip()?)?;
            ping(&second, pod.ip()?)?;
            ping(&c2, pod.ip()?)?;
        }
        addresses.sort();
        addresses.dedup();
        ensure!(addresses.len() == 4, "given out twice: {addresses:?}");
        let ports = host.out(&["ip", "-o", "link", "show", "master", "cni0"])?;
        ensure!(ports.lines().count() == 4, "{ports}");

        // Docker goes, the pods stay.
        host.docker(&["rm", "-f", "c1", "second"])?;
        host.docker(&["network", "rm", "web"])?;
        let removed = || {
            ensure!(!host.out(&["nft", "list", "tables"])?.contains("flannel_reader"), "{}", plugin.tail());
            let held = host.sh("ls /var/lib/cni/networks/cbr0 | grep -c '^10\\.'")?;
            ensure!(held == "2", "{held} addresses are held for two pods");
            Ok(())
        };
        eventually("Docker's part is gone", secs(15), removed)?;
        ping(&pods[0], pods[1].ip()?)?;
        ping(&pods[0], c2.ip()?)?;
        pods.iter().try_for_each(Pod::stop)
    });
}

/// A container of CNI: a network namespace that our plugin has attached, as kube-flannel's configuration tells it to.
struct Pod {
    host: Host,
    name: &'static str,
}

impl Pod {
    fn start(host: &Host, name: &'static str) -> Result<Self> {
        host.out(&["ip", "netns", "add", name])?;
        let pod = Self { host: host.clone(), name };
        pod.cni("ADD")?;
        Ok(pod)
    }

    fn stop(&self) -> Result<()> {
        self.cni("DEL")?;
        self.host.out(&["ip", "netns", "del", self.name]).map(drop)
    }

    fn cni(&self, command: &str) -> Result<String> {
        let name = self.name;
        self.host.sh(&format!(
            "echo '{{\"cniVersion\":\"1.0.0\",\"name\":\"cbr0\",\"type\":\"flannel\"}}' | \
             CNI_COMMAND={command} CNI_CONTAINERID={name} CNI_NETNS=/run/netns/{name} CNI_IFNAME=eth0 \
             CNI_PATH={BIN_DIR} flannel"
        ))
    }

    fn ip(&self) -> Result<String> {
        let shown = Place::out(self, &["ip", "-4", "-o", "addr", "show", "dev", "eth0"])?;
        let cidr = shown.split_whitespace().nth(3).context(shown.clone())?;
        Ok(cidr.split('/').next().unwrap_or_default().to_owned())
    }
}

impl Place for Pod {
    fn name(&self) -> String {
        format!("{} on {}", self.name, self.host.name())
    }

    fn host(&self) -> &Host {
        &self.host
    }

    fn enter(&self, argv: &[&str]) -> std::process::Command {
        self.host.enter_netns(self.name, argv)
    }
}

#[test]
fn what_the_plugin_removes_is_its_own() {
    in_lab(plan("reader-removal"), |lab| {
        put_config(lab, VXLAN)?;
        let host = lab.host(1);
        let owner = start_owner(lab, host, &["--ip-masq=false"])?;
        // An engine's own rules are its own affair.
        let _engine = start_engine(host)?;
        let env = host.read("/run/flannel/subnet.env")?;
        let before = host.network_state()?;
        for with_etcd in [true, false] {
            let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
            let endpoints: &[&str] = if with_etcd { &[&endpoints] } else { &[] };
            let plugin = host.start_plugin(endpoints)?;
            host.docker(CREATE_WEB).with_context(|| plugin.tail())?;
            host.docker_run("c1", &["--network", "web"])?;
            // Nobody else masquerades here.
            let rules = host.out(&["nft", "list", "ruleset"])?;
            ensure!(rules.contains("table inet flannel_reader"), "{rules}");
            host.docker(&["rm", "-f", "c1"])?;
            host.docker(&["network", "rm", "web"])?;
            as_before(host, &before, &plugin)?;
            ensure!(host.read("/run/flannel/subnet.env")? == env);

            // And what a plugin left behind that ended before its networks were removed.
            host.docker(CREATE_WEB)?;
            host.docker_run("c1", &["--network", "web"])?;
            plugin.stop(secs(20))?;
            host.out(&[&["flannel-docker-plugin", "--cleanup"], endpoints].concat())?;
            as_before(host, &before, &plugin)?;
            ensure!(host.read("/run/flannel/subnet.env")? == env);
            ensure!(leases(lab)?.len() == 1 && owner.alive(), "{:?}", leases(lab)?);
            let plugin = host.start_plugin(endpoints)?;
            host.docker(&["rm", "-f", "c1"])?;
            host.docker(&["network", "rm", "web"])?;
            plugin.stop(secs(20))?;
        }
        Ok(())
    });
}

fn as_before(host: &Host, before: &str, plugin: &Daemon) -> Result<()> {
    eventually("the kernel is as before", secs(15), || {
        let now = host.network_state()?;
        ensure!(now == *before, "{now}\n--- before\n{before}\n{}", plugin.tail());
        Ok(())
    })
}
