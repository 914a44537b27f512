//! The plugin as a managed plugin of a real engine: its settings, its life, and what happens to containers meanwhile.

use anyhow::{Context, Result, ensure};
use flannel_tests::{
    Container, Host, Lab, LabPlan, MANAGED, MANAGED_NEEDS, eventually, in_lab, ping_within, secs,
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
