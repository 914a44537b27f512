//! The plugin as a managed plugin of a real engine: its settings, its life, and what happens to containers meanwhile.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_tests::{
    Container, Daemon, Host, IMAGE, Lab, LabPlan, MANAGED, MANAGED_DIR, MANAGED_NEEDS, PingStream,
    eventually, http_get, in_lab, ping_within, secs,
};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// The one command, the same on every host.
const CREATE: &[&str] =
    &["network", "create", "-d", MANAGED, "--ipam-driver", MANAGED, "--subnet", "10.100.0.0/16", "web"];

fn plan(name: &str, hosts: usize) -> LabPlan {
    let plan = Lab::new(name).hosts(hosts).ip_forward(false);
    plan.needs(&["dockerd", "docker", "busybox"]).needs(MANAGED_NEEDS)
}

fn configure(lab: &Lab) -> Result<()> {
    lab.etcdctl(&["put", "/coreos.com/network/config", VXLAN]).map(drop)
}

/// `FLANNEL_SUBNET` of a host without its last byte: `10.100.7.`
fn lease(host: &Host) -> Result<String> {
    let env = host.read("/run/flannel/subnet.env")?;
    let subnet = env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).context(env.clone())?;
    Ok(subnet.rsplit_once('.').context("no address")?.0.to_owned() + ".")
}

#[test]
fn a_managed_plugin_serves_like_the_service() {
    in_lab(plan("docker-managed", 2).etcd(), |lab| {
        configure(lab)?;
        lab.build_managed_plugin()?;
        let endpoints = format!("FLANNELD_ETCD_ENDPOINTS={}", lab.etcd_endpoint());
        let mut engines = Vec::new();
        for host in lab.hosts() {
            engines.push(host.start_dockerd(&[])?);
            host.load_image()?;
            host.start_managed_plugin(&[&endpoints, "FLANNELD_IPTABLES_RESYNC=1"])?;
            host.docker(CREATE)?;
            host.docker_run("c0", &["--network", "web", "--restart=always"])?;
        }
        let (h1, h2) = (lab.host(1), lab.host(2));
        let reachable = || -> Result<()> {
            let back = |host: &Host| eventually("c0 is back", secs(30), || host.docker_container("c0"));
            let (c1, c2): (Container, Container) = (back(h1)?, back(h2)?);
            ping_within(secs(10), &c1, c2.ip()?)?;
            ping_within(secs(5), &c2, c1.ip()?)
        };
        reachable()?;
        // Files that CNI on the same host reads are where it looks.
        let ledger = h1.sh("ls /var/lib/cni/networks/cbr0")?;
        let address = h1.docker_ip("c0", "web")?;
        ensure!(ledger.contains(&address) && lease(h1)?.starts_with("10.100."), "{ledger}");
        // Settings of the host can be written from inside, where /proc/sys is read-only.
        h1.sh("echo 0 > /proc/sys/net/ipv4/ip_forward")?;
        eventually("forwarding is on again", secs(8), || {
            h1.out(&["cat", "/proc/sys/net/ipv4/ip_forward"]).is_ok_and(|on| on == "1")
        })?;

        // The legacy kind beside it would fight over the same lease.
        let second = h1.run(&["flannel-docker-plugin"])?;
        ensure!(!second.ok() && second.stderr.contains("already serves this host"), "{second}");

        let text = h1.try_docker(&["network", "create", "-d", MANAGED, "wrong"])?;
        ensure!(text.stderr.contains("--ipam-driver flannel:latest --subnet 10.100.0.0/16"), "{text}");

        // Engine and plugin go down together and come back together.
        engines[0].stop(secs(60))?;
        engines[0] = h1.start_dockerd(&[])?;
        reachable()?;
        h1.docker(&["rm", "-f", "c0"])?;
        h1.docker(&["network", "rm", "web"])?;
        h1.docker(&["plugin", "disable", MANAGED])?;
        h1.docker(&["plugin", "rm", MANAGED])?;
        Ok(())
    });
}

/// A registry on the host's loopback, which engines trust without TLS.
const REGISTRY: &str = "127.0.0.1:5000";
const REGISTRY_CONFIG: &str = "version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: /var/lib/registry}}\nhttp: {addr: \"127.0.0.1:5000\"}\n";

/// Puts the plugin into the registry under two versions, the second with one more file and another description.
fn publish(host: &Host) -> Result<Daemon> {
    host.write("/etc/registry.yml", REGISTRY_CONFIG)?;
    let registry = host.spawn("docker-registry", &["docker-registry", "serve", "/etc/registry.yml"], &[])?;
    eventually("the registry answers", secs(10), || http_get(host, &format!("http://{REGISTRY}/v2/")))?;
    let (one, two) = (format!("{REGISTRY}/flannel:1"), format!("{REGISTRY}/flannel:2"));
    let next = "/opt/next";
    host.sh(&format!(
        "cp -a {MANAGED_DIR} {next}; echo 2 > {next}/rootfs/version; \
         sed -i 's/\"description\": \"flannel:/\"description\": \"the next flannel:/' {next}/config.json"
    ))?;
    for (reference, dir) in [(&one, MANAGED_DIR), (&two, next)] {
        host.docker(&["plugin", "create", reference, dir])?;
        host.docker(&["plugin", "push", reference])?;
        host.docker(&["plugin", "rm", reference])?;
    }
    host.sh(&format!("rm -r {next}"))?;
    Ok(registry)
}

/// One property of the installed plugin.
fn plugin_says(host: &Host, format: &str) -> Result<String> {
    host.docker(&["plugin", "inspect", "-f", format, MANAGED])
}

#[test]
fn installing_upgrading_and_restarting_cost_no_packet() {
    let plan = plan("docker-managed-life", 2).etcd().needs(&["docker-registry"]);
    in_lab(plan, |lab| {
        configure(lab)?;
        lab.build_managed_plugin()?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let endpoints = format!("FLANNELD_ETCD_ENDPOINTS={}", lab.etcd_endpoint());
        let engine1 = h1.start_dockerd(&[])?;
        h2.write("/etc/docker/daemon.json", r#"{"live-restore": true}"#)?;
        let engine2 = h2.start_dockerd(&[])?;
        let _registry = publish(h1)?;
        let one = format!("{REGISTRY}/flannel:1");
        let install =
            ["plugin", "install", "--alias", "flannel", "--grant-all-permissions", &one, &endpoints];
        h1.docker(&install)?;
        h2.start_managed_plugin(&[&endpoints])?;
        for host in lab.hosts() {
            host.load_image()?;
            host.docker(CREATE)?;
        }
        let c1 = h1.docker_run("c1", &["--network", "web", "--restart=always"])?;
        let c2 = h2.docker_run("c2", &["--network", "web"])?;
        ping_within(secs(10), &c1, c2.ip()?)?;
        let stream = PingStream::start(&c1, c2.ip()?, Duration::from_millis(50))?;

        // Not while networks are on it, except by force; and then nothing is lost.
        let refused = h1.try_docker(&["plugin", "disable", MANAGED])?;
        ensure!(!refused.ok() && refused.stderr.contains("is in use"), "{refused}");
        h1.docker(&["plugin", "disable", "-f", MANAGED])?;
        let two = format!("{REGISTRY}/flannel:2");
        h1.docker(&["plugin", "upgrade", "--skip-remote-check", "--grant-all-permissions", MANAGED, &two])?;
        h1.docker(&["plugin", "enable", MANAGED])?;
        let description = plugin_says(h1, "{{.Config.Description}}")?;
        ensure!(description.starts_with("the next flannel"), "{description}");
        let settings = plugin_says(h1, "{{.Settings.Env}}")?;
        ensure!(settings.contains(&endpoints), "{settings}");
        let c3 = h1.docker_run("c3", &["--network", "web", "-p", "80:80"])?;
        ensure!(c3.ip()? != c1.ip()?, "{} was given out twice", c1.ip()?);
        ping_within(secs(10), &c3, c2.ip()?)?;

        // With live-restore an engine leaves its containers and its plugins alone.
        engine2.stop(secs(60))?;
        let engine2 = h2.start_dockerd(&[])?;
        let c4 = h2.docker_run("c4", &["--network", "web"])?;
        engine2.crash()?;
        let _engine2 = h2.start_dockerd(&[])?;
        let c5 = h2.docker_run("c5", &["--network", "web"])?;
        ensure!(h2.docker_container("c2")?.pid() == c2.pid());
        let given = BTreeSet::from([c2.ip()?, c4.ip()?, c5.ip()?]);
        ensure!(given.len() == 3, "an address was given out twice: {given:?}");
        ping_within(secs(10), &c5, c1.ip()?)?;
        let count = stream.stop_after(61)?;
        ensure!(count.lost() == 0, "{count:?}");

        // Power comes back while etcd is down, and /run is empty: the engine starts, and so does what it restarts.
        engine1.crash()?;
        lab.etcd_stop()?;
        lab.reboot(h1)?;
        let start = Instant::now();
        let _engine1 = h1.start_dockerd(&[])?;
        ensure!(start.elapsed() < secs(40), "the engine waited {:?}", start.elapsed());
        let c1 = eventually("c1 is back", secs(30), || h1.docker_container("c1"))?;
        lab.etcd_start()?;
        ping_within(secs(30), &c1, c2.ip()?)?;
        let c6 = h1.docker_run("c6", &["--network", "web"])?;
        ping_within(secs(10), &c6, c2.ip()?)?;

        h1.docker(&["rm", "-f", "c1", "c3", "c6"])?;
        h1.docker(&["network", "rm", "web"])?;
        eventually("the bridge is gone", secs(10), || {
            ensure!(!h1.run(&["ip", "link", "show", "dev", "cni0"])?.ok());
            Ok(())
        })?;
        h1.docker(&["plugin", "disable", MANAGED])?;
        h1.docker(&["plugin", "rm", MANAGED]).map(drop)
    });
}

/// Where the plugin keeps its networks in etcd in the next test.
const PREFIX: &str = "/lab/network";

/// Every setting that config.json lets a user make, with a value that can be told from the default.
const SETTINGS: &[(&str, &str)] = &[
    ("FLANNELD_ETCD_ENDPOINTS", "https://10.77.0.100:2479"),
    ("FLANNELD_ETCD_PREFIX", PREFIX),
    ("FLANNELD_ETCD_USERNAME", "flannel"),
    ("FLANNELD_ETCD_PASSWORD", "hunter2"),
    ("FLANNELD_ETCD_CAFILE", "/var/lib/flannel/tls/ca.pem"),
    ("FLANNELD_ETCD_CERTFILE", "/host/run/tls/client.pem"),
    ("FLANNELD_ETCD_KEYFILE", "/host/run/tls/client.key"),
    ("FLANNELD_IFACE", "up0"),
    ("FLANNELD_PUBLIC_IP", "192.0.2.77"),
    ("FLANNELD_IP_MASQ", "false"),
    ("FLANNELD_IPTABLES_FORWARD_RULES", "false"),
    ("FLANNELD_TUNNEL_GUARD", "false"),
    ("FLANNELD_IPTABLES_RESYNC", "1"),
    ("FLANNELD_HEALTHZ_PORT", "8081"),
    ("FLANNELD_V", "1"),
    ("FLANNELD_DRIVER_NAME", "other:name"),
    ("FLANNELD_DOCKER_SOCKET", "/host/run/other.sock"),
];

/// An etcd with TLS, client certificates and users, beside the lab's own; certificates in /run/tls of its host.
fn start_etcd_with_tls(lab: &Lab) -> Result<Daemon> {
    let etcd = lab.etcd_host();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    etcd.sh(&format!(
        "mkdir -p /run/tls; cd /run/tls; \
         printf 'subjectAltName=IP:10.77.0.100\nextendedKeyUsage=serverAuth,clientAuth\n' > ext; \
         openssl req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=authority 2> log; \
         for name in server client; do \
             openssl req {key} -keyout $name.key -out $name.csr -subj /CN=$name 2>> log; \
             openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out $name.pem -days 2 -extfile ext 2>> log; \
         done"
    ))?;
    let url = "https://10.77.0.100:2479";
    let peer = "http://127.0.0.1:2480";
    #[rustfmt::skip]
    let daemon = etcd.spawn("etcd-tls", &[
        "etcd", "--name", "tls", "--data-dir", "/run/etcd-tls", "--listen-client-urls", url, "--advertise-client-urls", url,
        "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "tls=http://127.0.0.1:2480",
        "--cert-file", "/run/tls/server.pem", "--key-file", "/run/tls/server.key", "--client-cert-auth",
        "--trusted-ca-file", "/run/tls/ca.pem", "--logger", "zap",
    ], &[])?;
    let ctl = format!(
        "etcdctl --endpoints {url} --cacert /run/tls/ca.pem --cert /run/tls/client.pem --key /run/tls/client.key"
    );
    eventually("etcd with TLS answers", secs(30), || etcd.sh(&format!("{ctl} endpoint health")))
        .with_context(|| daemon.tail())?;
    etcd.sh(&format!(
        "{ctl} put {PREFIX}/config '{VXLAN}'; {ctl} user add root:rootpw; {ctl} user grant-role root root; \
         {ctl} role add flannel; {ctl} role grant-permission flannel readwrite --prefix=true {PREFIX}/; \
         {ctl} user add flannel:hunter2; {ctl} user grant-role flannel flannel; {ctl} auth enable"
    ))?;
    Ok(daemon)
}

/// Copies a file from the etcd host's /run/tls.
fn take_certificate(lab: &Lab, name: &str, to: &str) -> Result<()> {
    lab.host(1).write(to, lab.etcd_host().read(&format!("/run/tls/{name}"))?)
}

/// A container that comes and goes.
const RUN: &[&str] = &["run", "--rm", "--network", "web", IMAGE, "true"];

/// What a command is refused with, soon.
fn refusal(host: &Host, command: &[&str]) -> Result<String> {
    let start = Instant::now();
    let said = host.try_docker(command)?;
    ensure!(!said.ok() && start.elapsed() < secs(10), "{said} after {:?}", start.elapsed());
    Ok(said.stderr)
}

fn set(host: &Host, setting: &str) -> Result<()> {
    host.docker(&["plugin", "disable", "-f", MANAGED])?;
    host.docker(&["plugin", "set", MANAGED, setting])?;
    host.docker(&["plugin", "enable", MANAGED]).map(drop)
}

#[test]
fn every_setting_counts_and_a_wrong_one_is_named() {
    let plan = plan("docker-managed-settings", 1).etcd().needs(&["openssl"]);
    in_lab(plan, |lab| {
        let host = lab.host(1);
        lab.build_managed_plugin()?;
        let config: serde_json::Value = serde_json::from_str(include_str!("../../config.json"))?;
        let env = config["env"].as_array().context("config.json has no env")?;
        let settable: BTreeSet<&str> = env
            .iter()
            .filter(|one| !one["settable"].is_null())
            .filter_map(|one| one["name"].as_str())
            .collect();
        let tried: BTreeSet<&str> = SETTINGS.iter().map(|(name, _)| *name).collect();
        ensure!(settable == tried, "config.json's settings: {settable:?}\ntried: {tried:?}");

        let _etcd = start_etcd_with_tls(lab)?;
        host.sh("ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up; \
             ip addr add 192.0.2.1/24 dev up0")?;
        let dockerd = host.start_dockerd(&[])?;
        host.load_image()?;
        let settings: Vec<String> = SETTINGS.iter().map(|(name, value)| format!("{name}={value}")).collect();
        host.start_managed_plugin(&settings.iter().map(String::as_str).collect::<Vec<_>>())?;

        // Something is in the way: whoever types a command reads what it is, and when it is gone all is well.
        let said = refusal(host, CREATE)?;
        ensure!(said.contains("/var/lib/flannel/tls/ca.pem"), "{said}");
        take_certificate(lab, "client.pem", "/run/tls/client.pem")?;
        take_certificate(lab, "client.key", "/run/tls/client.key")?;
        take_certificate(lab, "ca.pem", "/var/lib/flannel/tls/ca.pem")?;
        eventually("the network can be created", secs(20), || host.docker(CREATE))?;
        settings_are_in_effect(host, &dockerd)?;

        // A value that cannot be read is named, and so is another plugin that serves this host.
        set(host, "FLANNELD_IPTABLES_RESYNC=often")?;
        let said = refusal(host, RUN)?;
        ensure!(said.contains("FLANNELD_IPTABLES_RESYNC") && said.contains("often"), "{said}");
        set(host, "FLANNELD_IPTABLES_RESYNC=1")?;
        dockerd.stop(secs(60))?;
        let legacy = host.spawn("legacy", &["flannel-docker-plugin", "--socket=/run/elsewhere.sock"], &[])?;
        eventually("the other one serves", secs(10), || host.exists("/run/elsewhere.sock"))?;
        let _dockerd = host.start_dockerd(&[])?;
        let said = refusal(host, RUN)?;
        ensure!(said.contains("another flannel-docker-plugin already serves"), "{said}");
        legacy.stop(secs(10))?;
        eventually("containers start again", secs(20), || host.docker(RUN)).map(drop)
    });
}

fn settings_are_in_effect(host: &Host, dockerd: &Daemon) -> Result<()> {
    let link = host.out(&["ip", "-d", "link", "show", "dev", "flannel.1"])?;
    ensure!(link.contains("dev up0") && link.contains("local 192.0.2.1 "), "{link}");
    let env = host.read("/run/flannel/subnet.env")?;
    ensure!(env.contains("FLANNEL_IPMASQ=false"), "{env}");
    let rules = host.sh("nft list ruleset; iptables-save")?;
    for without in ["flanneld masq", "flanneld forward", "flannel_tunnel"] {
        ensure!(!rules.contains(without), "{without} in\n{rules}");
    }
    host.sh("echo 0 > /proc/sys/net/ipv4/ip_forward")?;
    eventually("forwarding is on again", secs(15), || {
        ensure!(host.out(&["cat", "/proc/sys/net/ipv4/ip_forward"])? == "1");
        Ok(())
    })?;
    ensure!(http_get(host, "http://127.0.0.1:8081/healthz")?.contains("running"));
    ensure!(dockerd.log().contains("DEBUG answered"), "{}", dockerd.tail());
    let said = host.try_docker(&["network", "create", "-d", MANAGED, "wrong"])?;
    ensure!(said.stderr.contains("docker network create -d other:name --ipam-driver other:name"), "{said}");
    Ok(())
}
