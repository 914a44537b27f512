//! How fast containers of two hosts talk, in turns with two containers of the same hosts that are joined by hand in the same way (bridge,
//! VXLAN device or route), and with two of one host that are routed between plain veth pairs: the machine's other work then hits all
//! of them alike.

use anyhow::{Context, Result};
use flannel_tests::flanneld::{Flanneld, Pod, SubnetEnv, put_config};
use flannel_tests::{Host, Lab, Place, eventually, ping_within, secs};

use crate::table::{self, median};

const ROUNDS: usize = 7;
const STREAMS: [u32; 2] = [1, 4];
const FLANNEL: [&str; 2] = ["vxlan", "host-gw"];

/// What is aimed at: ours beside the same made by hand.
const AIM: f64 = 0.97;

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
    let hand = by_hand(&lab)?;
    for server in [&pods[1] as &dyn Place, &plain[1], &hand[1]] {
        // Server and client each have a processor of their own.
        server
            .spawn("iperf3", &["iperf3", "-s", "--forceflush", "-A", "1"], &[])?
            .wait_log("Server listening", secs(5))?;
    }
    // The plain pair, then for each backend ours and the one made by hand.
    let mut seen = vec![vec![Vec::new(); STREAMS.len()]; 1 + 2 * FLANNEL.len()];
    for round in 0..ROUNDS {
        for (i, streams) in STREAMS.into_iter().enumerate() {
            seen[0][i].push(gigabits(&plain[0], "10.99.1.2", streams)?);
        }
        for (backend, name) in FLANNEL.into_iter().enumerate() {
            configure(&lab, name)?;
            follow(&lab, &pods, if name == "vxlan" { 1450 } else { 1500 })?;
            turn(&lab, name)?;
            for (i, streams) in STREAMS.into_iter().enumerate() {
                let ours = || gigabits(&pods[0], &pods[1].ip().to_string(), streams);
                let theirs = || gigabits(&hand[0], "10.98.2.2", streams);
                // Whoever comes first meets a machine that has just rested.
                let (ours, theirs) = match round % 2 {
                    0 => (ours()?, theirs()?),
                    _ => {
                        let theirs = theirs()?;
                        (ours()?, theirs)
                    }
                };
                seen[1 + 2 * backend][i].push(ours);
                seen[2 + 2 * backend][i].push(theirs);
            }
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    lab.tear_down()?;

    let middle = |path: usize, streams: usize| median(seen[path][streams].clone());
    let row = |name: String, path: usize, beside: usize, aim: String| {
        let mut row = vec![name];
        for streams in 0..STREAMS.len() {
            let figure = middle(path, streams);
            row.push(format!("{figure:.1}"));
            row.push(format!("{:.2}", figure / middle(beside, streams)));
        }
        row.push(aim);
        row
    };
    let mut rows = vec![row("plain routed veth, one host".to_owned(), 0, 0, String::new())];
    for (backend, name) in FLANNEL.into_iter().enumerate() {
        let (ours, hand) = (1 + 2 * backend, 2 + 2 * backend);
        rows.push(row(format!("{name}, beside by hand"), ours, hand, format!(">= {AIM}")));
        rows.push(row(format!("{name} by hand, beside plain"), hand, 0, String::new()));
    }
    table::print(&["Gb/s, medians of 7 rounds", "1 stream", "ratio", "4 streams", "ratio", "aim"], &rows);
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

/// A container on each host, as flannel's are made, with a VXLAN device and everything for it, and a network of their own.
fn by_hand(lab: &Lab) -> Result<[Namespace; 2]> {
    for (i, j) in [(1, 2), (2, 1)] {
        let (host, peer) = (lab.host(i), lab.host(j).ip());
        host.sh(&format!(
            "ip netns add hand; ip link add br-hand type bridge; ip addr add 10.98.{i}.1/24 dev br-hand; \
             ip link set br-hand up; ip link add v-hand type veth peer name eth0 netns hand; \
             ip link set v-hand master br-hand up; ip -n hand addr add 10.98.{i}.2/24 dev eth0; \
             ip -n hand link set eth0 up; ip -n hand route add default via 10.98.{i}.1; \
             ip link add hand.1 mtu 1450 address 02:00:00:00:98:0{i} type vxlan id 98 dev eth0 local {} dstport 8498 nolearning; \
             ip addr add 10.98.{i}.0/32 dev hand.1; ip link set hand.1 up; \
             ip neigh add 10.98.{j}.0 lladdr 02:00:00:00:98:0{j} dev hand.1 nud permanent; \
             bridge fdb add 02:00:00:00:98:0{j} dev hand.1 dst {peer} self permanent",
            host.ip()
        ))?;
    }
    Ok([1, 2].map(|n| Namespace { host: lab.host(n).clone(), name: "hand".to_owned() }))
}

/// Has the containers made by hand talk as a backend's would.
fn turn(lab: &Lab, backend: &str) -> Result<()> {
    for (i, j) in [(1, 2), (2, 1)] {
        let (way, mtu) = match backend {
            "vxlan" => (format!("via 10.98.{j}.0 dev hand.1 onlink"), 1450),
            _ => (format!("via {} dev eth0", lab.host(j).ip()), 1500),
        };
        lab.host(i).sh(&format!(
            "ip route replace 10.98.{j}.0/24 {way}; \
             ip -n hand link set eth0 mtu {mtu}; ip link set v-hand mtu {mtu}; ip link set br-hand mtu {mtu}"
        ))?;
    }
    Ok(())
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

/// What iperf3 receives in a second, in Gb/s. Under Linux's usual congestion control, whatever this machine's own is: BBR, for one,
/// paces by its own idea of the path, and then it is that which is measured.
pub(crate) fn gigabits(from: &dyn Place, to: &str, streams: u32) -> Result<f64> {
    let streams = streams.to_string();
    let said = from.out(&["iperf3", "-c", to, "-t", "1", "-A", "0", "-C", "cubic", "-P", &streams, "-J"])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("no figure from iperf3: {}", said["error"]))? / 1e9)
}
