//! How fast containers of two hosts talk over the udp backend: as it is, with one packet for each system call
//! (`--udp-offload=false`, which is what a tunnel without any of the kernel's help does), and beside vxlan and wireguard. In turns, so that the
//! machine's other work hits all of them alike.

use anyhow::{Context, Result};
use flannel_tests::flanneld::{Flanneld, Pod, SubnetEnv, put_config};
use flannel_tests::{Lab, Place, eventually, ping_within, secs};

use crate::table::{self, median};
use crate::throughput::gigabits;

const ROUNDS: usize = 5;
const STREAMS: [u32; 2] = [1, 4];

/// Name, backend, flag, device, MTU.
const PATHS: [(&str, &str, &str, &str, u32); 4] = [
    ("vxlan", "vxlan", "--udp-offload=true", "flannel.1", 1450),
    ("udp", "udp", "--udp-offload=true", "flannel0", 1472),
    ("udp, one packet a call", "udp", "--udp-offload=false", "flannel0", 1472),
    // By the kernel where it can, else by flanneld.
    ("wireguard", "wireguard", "--udp-offload=true", "flannel-wg", 1420),
];

pub(crate) fn run() -> Result<()> {
    let lab = Lab::new("udp-bench").etcd().needs(&["iperf3"]);
    anyhow::ensure!(lab.can_run(), "this machine lacks something");
    let lab = lab.start()?;
    configure(&lab, PATHS[0].1)?;
    let mut daemons = start(&lab, PATHS[0].2)?;
    let pods = lab
        .hosts()
        .iter()
        .map(|host| Pod::new(host, &SubnetEnv::read(host)?, 2))
        .collect::<Result<Vec<_>>>()?;
    // Server and client each have a processor of their own.
    pods[1]
        .spawn("iperf3", &["iperf3", "-s", "--forceflush", "-A", "1"], &[])?
        .wait_log("Server listening", secs(5))?;
    let mut by_itself = false;
    let mut seen = vec![vec![Vec::new(); STREAMS.len()]; PATHS.len()];
    for round in 0..ROUNDS {
        for (path, (_, backend, flag, device, mtu)) in PATHS.into_iter().enumerate() {
            for daemon in daemons {
                daemon.daemon().stop(secs(10))?;
            }
            configure(&lab, backend)?;
            daemons = start(&lab, flag)?;
            for (host, pod) in lab.hosts().iter().zip(&pods) {
                let directory = format!("/sys/class/net/{device}");
                eventually("the device is there", secs(10), || host.exists(&directory))?;
                pod.set_mtu(mtu)?;
                // Where the kernel has no WireGuard, the device is a TUN.
                by_itself |= backend == "wireguard" && host.exists(&format!("{directory}/tun_flags"));
            }
            ping_within(secs(10), &pods[0], pods[1].ip())?;
            for (i, streams) in STREAMS.into_iter().enumerate() {
                let figure = gigabits(&pods[0], &pods[1].ip().to_string(), streams)
                    .with_context(|| format!("{backend} {flag}"))?;
                seen[path][i].push(figure);
            }
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    drop(daemons);
    lab.tear_down()?;

    let middle = |path: usize, streams: usize| median(seen[path][streams].clone());
    let row = |(path, (name, ..)): (usize, &(&str, &str, &str, &str, u32))| {
        let how = match *name {
            "wireguard" if by_itself => ", by flanneld",
            "wireguard" => ", by the kernel",
            _ => "",
        };
        let mut row = vec![format!("{name}{how}")];
        for streams in 0..STREAMS.len() {
            let figure = middle(path, streams);
            row.push(format!("{figure:.2}"));
            row.push(format!("{:.2}", figure / middle(0, streams)));
            row.push(format!("{:.1}", figure / middle(2, streams)));
        }
        row
    };
    let rows: Vec<_> = PATHS.iter().enumerate().map(row).collect();
    let head = [
        "Gb/s, medians of 5 rounds",
        "1 stream",
        "/ vxlan",
        "/ one a call",
        "4 streams",
        "/ vxlan",
        "/ one a call",
    ];
    table::print(&head, &rows);
    println!("\nAims: udp >= 0.6 of vxlan and >= 10 times one packet a call.");
    Ok(())
}

fn start(lab: &Lab, flag: &str) -> Result<Vec<Flanneld>> {
    let flags = ["--iface", "eth0", "--ip-masq", flag];
    let all =
        lab.hosts().iter().map(|host| Flanneld::start_with(lab, host, &flags)).collect::<Result<Vec<_>>>()?;
    for one in &all {
        one.ready()?;
    }
    Ok(all)
}

fn configure(lab: &Lab, backend: &str) -> Result<()> {
    put_config(lab, &format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"{backend}"}}}}"#))
}
