//! The commands of docs/guides, run as they stand there.
//!
//! A block that says `sh on every host` or `sh on one host` is typed there, line by line; the lab has no systemd, so a line
//! that begins with `systemctl` is done by the test as the units would do it.

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::{
    Daemon, Host, Lab, LabPlan, blocks, eventually, http_get, in_lab, ping, ping_within, secs,
};

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

fn plan(name: &str) -> LabPlan {
    Lab::new(name).hosts(2).etcd().ip_forward(false).needs(&[
        "dockerd",
        "docker",
        "docker-compose",
        "busybox",
    ])
}

/// A host with what runs on it.
struct Node<'a> {
    host: &'a Host,
    endpoints: String,
    dockerd: Option<Daemon>,
    flanneld: Option<Daemon>,
    plugin: Option<Daemon>,
}

impl<'a> Node<'a> {
    fn new(lab: &Lab, host: &'a Host) -> Self {
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        Self { host, endpoints, dockerd: None, flanneld: None, plugin: None }
    }

    fn start_plugin(&mut self) -> Result<()> {
        let plugin = self.host.spawn("plugin", &["flannel-docker-plugin", &self.endpoints], &[])?;
        eventually("the plugin is ready", secs(20), || {
            self.host
                .out(&["flannel-docker-plugin", "status", "--json"])?
                .contains(r#""ready": true"#)
                .then_some(())
                .context("not ready")
        })
        .with_context(|| plugin.tail())?;
        self.plugin = Some(plugin);
        Ok(())
    }

    /// One line of a guide.
    fn type_line(&mut self, line: &str) -> Result<()> {
        match line.trim() {
            "" => Ok(()),
            "systemctl disable --now flanneld" => stop(&mut self.flanneld),
            "systemctl enable --now flannel-docker-plugin" => self.start_plugin(),
            "systemctl restart docker" => {
                stop(&mut self.dockerd)?;
                self.dockerd = Some(self.host.start_dockerd(&["--bip=172.17.0.1/16"])?);
                Ok(())
            }
            line if line.starts_with("systemctl") => bail!("the test does not know how to do: {line}"),
            line => self.host.sh(line).map(drop).with_context(|| line.to_owned()),
        }
    }
}

fn stop(daemon: &mut Option<Daemon>) -> Result<()> {
    daemon.take().context("it does not run")?.stop(secs(30)).map(drop)
}

/// Two hosts with flanneld and `dockerd --bip` move to the plugin one by one; the containers reach each other at every step
/// but for the moment in which an engine restarts.
#[test]
fn from_bip() {
    in_lab(plan("guide-bip"), |lab| {
        let guide = include_str!("../../docs/guides/from-bip.md");
        let steps = blocks(guide, "sh on every host");
        ensure!(steps.len() == 3, "{} steps", steps.len());
        lab.etcdctl(&["put", "/coreos.com/network/config", CONFIG])?;
        let mut nodes: Vec<Node<'_>> = lab.hosts().iter().map(|host| Node::new(lab, host)).collect();
        let mut subnets = Vec::new();
        for node in &mut nodes {
            node.flanneld =
                Some(node.host.spawn("flanneld", &["flanneld", &node.endpoints, "--ip-masq"], &[])?);
            let env = eventually("subnet.env", secs(20), || node.host.read("/run/flannel/subnet.env"))?;
            let subnet =
                env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).context("no subnet")?;
            let bip = format!("--bip={subnet}");
            node.dockerd = Some(node.host.start_dockerd(&[&bip, "--ip-masq=false", "--mtu=1450"])?);
            node.host.load_image()?;
            node.host.docker_run("app", &["--restart", "always"])?;
            subnets.push(subnet.rsplit_once('.').context("no address")?.0.to_owned() + ".");
        }
        let reach = |nodes: &[Node<'_>]| -> Result<()> {
            let (one, other) =
                (nodes[0].host.docker_container("app")?, nodes[1].host.docker_container("app")?);
            ping_within(secs(10), &one, other.address("eth0")?.split('/').next().unwrap_or_default())?;
            ping(&other, one.address("eth0")?.split('/').next().unwrap_or_default())
        };
        reach(&nodes).context("before")?;

        // Both on their way: one with the plugin, the other with flanneld.
        for place in 0..2 {
            for line in steps[0].lines() {
                nodes[place].type_line(line)?;
            }
            reach(&nodes).context("the plugin beside docker0")?;
        }
        // As long as docker0 has the subnet there is a refusal, and docker0 is left alone.
        let early = nodes[0].host.run(&["flannel-docker-plugin", "network", "create", "web"])?;
        ensure!(!early.ok() && early.stderr.contains("docker0 has an address of"), "{early:?}");
        reach(&nodes).context("after the refusal")?;

        for (place, node) in nodes.iter_mut().enumerate() {
            for line in steps[1].lines().chain(steps[2].lines()) {
                node.type_line(line)?;
            }
            let address = node.host.docker_container("app")?.address("eth1")?;
            ensure!(address.starts_with(&subnets[place]), "{address} is not in {}", subnets[place]);
        }
        let (one, other) = (nodes[0].host.docker_container("app")?, nodes[1].host.docker_container("app")?);
        let address = other.address("eth1")?;
        ping_within(secs(10), &one, address.split('/').next().unwrap_or_default())?;
        Ok(())
    });
}

#[test]
fn from_bridge_with_compose() {
    in_lab(plan("guide-bridge"), |lab| {
        let guide = include_str!("../../docs/guides/from-bridge.md");
        let part = |says: &str| blocks(guide, says).first().copied().context(says.to_owned());
        lab.etcdctl(&["put", "/coreos.com/network/config", CONFIG])?;
        let mut nodes: Vec<Node<'_>> = lab.hosts().iter().map(|host| Node::new(lab, host)).collect();
        for node in &mut nodes {
            node.start_plugin()?;
            node.dockerd = Some(node.host.start_dockerd(&[])?);
            node.host.load_image()?;
        }
        let [one, other] = nodes.as_slice() else { bail!("two hosts were wanted") };
        one.host.sh("mkdir -p /run/project")?;
        one.host.write("/run/project/docker-compose.yml", part("yaml before\n".trim_end())?)?;
        one.host.write("/run/project/after.yml", part("yaml after")?)?;
        one.host.sh("cd /run/project && docker-compose up -d")?;
        let url = format!("http://{}:8080/hostname", one.host.ip());
        eventually("published by bridge", secs(10), || http_get(other.host, &url))?;
        one.host.sh(&format!("cd /run/project\nset -e\n{}", part("sh on one host")?))?;
        eventually("published by flannel", secs(10), || http_get(other.host, &url))?;
        for node in &nodes {
            node.host.sh(part("sh on every host")?)?;
        }
        let web = one.host.docker_container("project_web_1")?;
        let far = other.host.docker_run("far", &["--network", "shared"])?;
        let address = web.address("eth0")?;
        eventually("reached from another host's container", secs(10), || {
            http_get(&far, &format!("http://{}/hostname", address.split('/').next().unwrap_or_default()))
        })?;
        one.host.sh("cd /run/project && docker-compose down -t 0")?;
        Ok(())
    });
}
