//! How fast containers of two hosts talk, in turns with two containers of one host that are routed between plain veth pairs: the
//! machine's other work then hits all of them alike.

use anyhow::{Context, Result};
use flannel_tests::flanneld::{Flanneld, Pod, SubnetEnv, put_config};
use flannel_tests::{Host, Lab, Place, eventually, ping_within, secs};

use crate::table::{self, median};

const ROUNDS: usize = 5;
const STREAMS: [u32; 2] = [1, 4];
const FLANNEL: [&str; 2] = ["vxlan", "host-gw"];

/// Go flanneld 0.20.2 on a quiet machine of the same kind: its part of the plain pair's throughput with 1 and 4 streams.
const GO: [(f64, f64); 2] = [(11.0 / 17.7, 13.7 / 27.7), (13.0 / 17.7, 18.5 / 27.7)];

pub(crate) fn run() -> Result<()> {
    let lab = Lab::new("throughput").etcd().needs(&["iperf3"]);
    anyhow::ensure!(lab.can_run(), "this machine lacks something");
    let lab = lab.start()?;
    configure(&lab, FLANNEL[0])?;
    Flanneld::start_all(&lab)?;
    let pods = lab
        .hosts()
        .iter()
        .map(|host| Pod::new(host, &SubnetEnv::read(host)?, 2))
        .collect::<Result<Vec<_>>>()?;
    let plain = plain(lab.host(1))?;
    for server in [&pods[1] as &dyn Place, &plain[1]] {
        // Server and client each have a processor of their own.
        server
            .spawn("iperf3", &["iperf3", "-s", "--forceflush", "-A", "1"], &[])?
            .wait_log("Server listening", secs(5))?;
    }
    let mut seen = vec![vec![Vec::new(); STREAMS.len()]; 1 + FLANNEL.len()];
    for round in 0..ROUNDS {
        for (i, streams) in STREAMS.into_iter().enumerate() {
            seen[0][i].push(gigabits(&plain[0], "10.99.1.2", streams)?);
        }
        for (backend, name) in FLANNEL.into_iter().enumerate() {
            configure(&lab, name)?;
            follow(&lab, &pods, if name == "vxlan" { 1450 } else { 1500 })?;
            for (i, streams) in STREAMS.into_iter().enumerate() {
                seen[1 + backend][i].push(gigabits(&pods[0], &pods[1].ip().to_string(), streams)?);
            }
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    lab.tear_down()?;

    let middle = |path: usize, streams: usize| median(seen[path][streams].clone());
    let mut rows = vec![vec![
        "plain routed veth".to_owned(),
        format!("{:.1}", middle(0, 0)),
        "1.00".into(),
        String::new(),
        format!("{:.1}", middle(0, 1)),
        "1.00".into(),
        String::new(),
    ]];
    for (i, name) in FLANNEL.into_iter().enumerate() {
        let (one, four) = (middle(1 + i, 0), middle(1 + i, 1));
        rows.push(vec![
            name.to_owned(),
            format!("{one:.1}"),
            format!("{:.2}", one / middle(0, 0)),
            format!(">= {:.2}", GO[i].0),
            format!("{four:.1}"),
            format!("{:.2}", four / middle(0, 1)),
            format!(">= {:.2}", GO[i].1),
        ]);
    }
    let head = ["Gb/s, medians of 5 rounds", "1 stream", "ratio", "Go's", "4 streams", "ratio", "Go's"];
    table::print(&head, &rows);
    Ok(())
}

fn configure(lab: &Lab, backend: &str) -> Result<()> {
    put_config(lab, &format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"{backend}"}}}}"#))
}

/// Waits until the hosts follow the config, and gives the pods the MTU that goes with it, as CNI and Docker would.
fn follow(lab: &Lab, pods: &[Pod], mtu: u32) -> Result<()> {
    for (host, pod) in lab.hosts().iter().zip(pods) {
        eventually("subnet.env follows", secs(10), || SubnetEnv::read(host).is_ok_and(|env| env.mtu == mtu))?;
        pod.set_mtu(mtu)?;
    }
    eventually("no device of the other backend", secs(10), || {
        lab.hosts().iter().all(|host| host.exists("/sys/class/net/flannel.1") == (mtu == 1450))
    })?;
    ping_within(secs(10), &pods[0], pods[1].ip())
}

/// Two namespaces of one host, each on a veth pair of its own, and the host routes between them.
fn plain(host: &Host) -> Result<[Namespace; 2]> {
    for n in [0, 1] {
        host.sh(&format!(
            "ip netns add plain{n}; ip link add v-plain{n} type veth peer name eth0 netns plain{n}; \
             ip addr add 10.99.{n}.1/30 dev v-plain{n}; ip link set v-plain{n} up; \
             ip -n plain{n} addr add 10.99.{n}.2/30 dev eth0; ip -n plain{n} link set eth0 up; \
             ip -n plain{n} route add default via 10.99.{n}.1"
        ))?;
    }
    Ok([0, 1].map(|n| Namespace { host: host.clone(), name: format!("plain{n}") }))
}

struct Namespace {
    host: Host,
    name: String,
}

impl Place for Namespace {
    fn name(&self) -> String {
        format!("{} on {}", self.name, self.host.name())
    }

    fn host(&self) -> &Host {
        &self.host
    }

    fn enter(&self, argv: &[&str]) -> std::process::Command {
        self.host.enter_netns(&self.name, argv)
    }
}

/// What iperf3 receives in a second, in Gb/s.
pub(crate) fn gigabits(from: &dyn Place, to: &str, streams: u32) -> Result<f64> {
    let streams = streams.to_string();
    let said = from.out(&["iperf3", "-c", to, "-t", "1", "-A", "0", "-P", &streams, "-J"])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("no figure from iperf3: {}", said["error"]))? / 1e9)
}
