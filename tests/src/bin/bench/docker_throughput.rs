//! How fast containers of two engines talk over a flannel network and over Docker's own overlay, in turns on the same two hosts.

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::put_config;
use flannel_tests::{Container, Daemon, Lab, Place, eventually, ping_within, secs};

use crate::table::{self, median};

const ROUNDS: usize = 5;
const NETWORKS: [&str; 2] = ["overlay", "flannel"];

pub(crate) fn run() -> Result<()> {
    for backend in ["vxlan", "host-gw"] {
        measure(backend)?;
    }
    Ok(())
}

fn measure(backend: &str) -> Result<()> {
    let lab = Lab::new("bench-overlay").hosts(2).etcd().needs(&["dockerd", "docker", "busybox", "iperf3"]);
    ensure!(lab.can_run(), "this machine lacks something");
    let lab = lab.start()?;
    put_config(&lab, &format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"{backend}"}}}}"#))?;
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let mut daemons: Vec<Daemon> = Vec::new();
    for host in lab.hosts() {
        daemons.push(host.spawn("plugin", &["flannel-docker-plugin", &endpoints], &[])?);
        eventually("the lease", secs(10), || host.exists("/run/flannel/subnet.env"))?;
        daemons.push(host.start_dockerd(&[])?);
        host.load_image()?;
    }
    let (one, other) = (lab.host(1), lab.host(2));
    let advertise = |ip: String| format!("--advertise-addr={ip}");
    one.docker(&["swarm", "init", &advertise(one.ip().to_string())])?;
    let token = one.docker(&["swarm", "join-token", "-q", "worker"])?;
    let manager = format!("{}:2377", one.ip());
    other.docker(&[
        "swarm",
        "join",
        "--token",
        token.trim(),
        &advertise(other.ip().to_string()),
        &manager,
    ])?;
    one.docker(&["network", "create", "-d", "overlay", "--attachable", "overlay"])?;
    for host in lab.hosts() {
        let ipam = ["--ipam-driver", "flannel", "--subnet", "10.100.0.0/16", "flannel"];
        host.docker(&[&["network", "create", "-d", "flannel"][..], &ipam].concat())?;
    }
    let mut pairs: Vec<[Container; 2]> = Vec::new();
    for network in NETWORKS {
        let client = one.docker_run(&format!("client-{network}"), &["--network", network])?;
        let server = other.docker_run(&format!("server-{network}"), &["--network", network])?;
        server
            .spawn("iperf3", &["iperf3", "-s", "--forceflush", "-A", "1"], &[])?
            .wait_log("Server listening", secs(5))?;
        pairs.push([client, server]);
    }
    let mut gigabits = vec![Vec::new(); NETWORKS.len()];
    let mut microseconds = vec![Vec::new(); NETWORKS.len()];
    for round in 0..ROUNDS {
        for (place, [client, server]) in pairs.iter().enumerate() {
            let to = server.ip()?;
            ping_within(secs(20), client, &to)?;
            gigabits[place].push(throughput(client, &to)?);
            microseconds[place].push(latency(client, &to)?);
        }
        eprintln!("{backend}: round {} of {ROUNDS}", round + 1);
    }
    lab.tear_down()?;
    let middle = |of: &[Vec<f64>], place: usize| of.get(place).cloned().map(median).unwrap_or_default();
    let row = |what: &str, of: &[Vec<f64>], aim: &str| {
        let (overlay, ours) = (middle(of, 0), middle(of, 1));
        vec![
            what.to_owned(),
            format!("{overlay:.2}"),
            format!("{ours:.2}"),
            format!("{:.2}", ours / overlay),
            aim.into(),
        ]
    };
    let head =
        [&format!("flannel {backend}, medians of {ROUNDS} rounds"), "overlay", "flannel", "ratio", "aim"];
    table::print(&head, &[row("TCP, Gb/s", &gigabits, ">= 1"), row("ping, µs", &microseconds, "<= 1")]);
    println!();
    Ok(())
}

fn throughput(from: &Container, to: &str) -> Result<f64> {
    let said = from.out(&["iperf3", "-c", to, "-t", "1", "-A", "0", "-C", "cubic", "-J"])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("no figure from iperf3: {}", said["error"]))? / 1e9)
}

/// Average round trip of 200 pings.
fn latency(from: &Container, to: &str) -> Result<f64> {
    let said = from.out(&["ping", "-q", "-c", "200", "-i", "0.002", to])?;
    let times = said.lines().find(|line| line.starts_with("rtt")).context("no summary from ping")?;
    let average = times.split('/').nth(4).context("no average")?;
    Ok(average.parse::<f64>()? * 1e3)
}
