//! The operator's commands: `flannel-docker-plugin network create` and `flannel-docker-plugin status`.

use anyhow::{Context, Result, ensure};
use flannel_tests::{Daemon, Host, Lab, eventually, in_lab, ping, secs};

fn start_plugin(host: &Host, endpoints: &str) -> Result<Daemon> {
    let daemon = host.spawn("plugin", &["flannel-docker-plugin", endpoints], &[])?;
    eventually("the plugin's socket", secs(10), || host.exists("/run/docker/plugins/flannel.sock"))
        .with_context(|| daemon.tail())?;
    Ok(daemon)
}

/// The table, when everything agrees.
fn status(host: &Host) -> Result<String> {
    host.out(&["flannel-docker-plugin", "status"])
}

#[test]
fn create_types_what_flannel_needs_and_status_tells_who_disagrees() {
    in_lab(Lab::new("commands").hosts(1).etcd().needs(&["dockerd", "docker", "busybox"]), |lab| {
        let host = lab.host(1);
        lab.etcdctl(&[
            "put",
            "/coreos.com/network/config",
            r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#,
        ])?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());

        let said = host.run(&["flannel-docker-plugin", "status"])?;
        ensure!(!said.ok() && said.stderr.contains("does not answer"), "{said:?}");
        let said = host.run(&["flannel-docker-plugin", "network", "create", "web"])?;
        ensure!(!said.ok() && said.stderr.contains("start it, or say --driver-name"), "{said:?}");

        let plugin = start_plugin(host, &endpoints)?;
        let _dockerd = host.start_dockerd(&[])?;
        host.load_image()?;
        eventually("the default network's lease", secs(10), || {
            status(host).is_ok_and(|table| table.contains("ready"))
        })?;

        // Both networks are the flannel network that this host has a lease of, and --ip works in them.
        for name in ["web", "second"] {
            let id =
                host.out(&["flannel-docker-plugin", "network", "create", "--label", "tier=front", name])?;
            let shown = host.docker(&["network", "inspect", name])?;
            ensure!(shown.contains(id.trim()) && shown.contains(r#""Subnet": "10.100.0.0/16""#), "{shown}");
            ensure!(shown.contains(r#""tier": "front""#), "{shown}");
        }
        let again = host.run(&["flannel-docker-plugin", "network", "create", "web"])?;
        ensure!(!again.ok() && again.stderr.contains("already exists"), "{again:?}");
        let swarm = host.run(&["flannel-docker-plugin", "network", "create", "--swarm", "s"])?;
        ensure!(!swarm.ok() && swarm.stderr.contains("docker swarm init"), "{swarm:?}");

        let container = host.docker_run("c0", &["--network", "web"])?;
        let address = container.ip()?;
        let table = status(host)?;
        for part in ["10.100.0.0/16", "vxlan", "cni0", "web", "second", "c0 ", &address.to_string(), "joined"]
        {
            ensure!(table.contains(part), "{part} in {table}");
        }
        let json = host.out(&["flannel-docker-plugin", "status", "--json"])?;
        ensure!(json.contains(r#""link_exists": true"#), "{json}");

        // The kernel loses a link, the engine loses a network: both are named, and the exit status says so.
        let link =
            json.lines().find_map(|line| line.trim().strip_prefix(r#""link": ""#)).context("no link")?;
        host.out(&["ip", "link", "del", link.trim_end_matches("\",")])?;
        let said = host.run(&["flannel-docker-plugin", "status"])?;
        ensure!(!said.ok() && said.stdout.contains("the kernel has no link"), "{said:?}");
        host.docker(&["rm", "-f", "c0"])?;
        plugin.kill(flannel_tests::Signal::SIGKILL)?;
        // As if the engine had removed one while the plugin was away, which takes it 45 s.
        host.sh("cd /var/lib/flannel/docker/networks; id=$(ls | head -n 1 | cut -d. -f1); gone=$(printf '%064d' 1)
            sed s/$id/$gone/ $id.json > $gone.json")?;
        let _plugin = start_plugin(host, &endpoints)?;
        eventually("the disagreement", secs(10), || {
            let said = host.run(&["flannel-docker-plugin", "status"])?;
            ensure!(said.stdout.contains("known to the plugin, not to the engine"), "{said:?}");
            Ok(())
        })?;
        let c1 = host.docker_run("c1", &["--network", "web", "--ip", &address.to_string()])?;
        ping(host, c1.ip()?)?;
        Ok(())
    });
}
