//! The benchmarks: `bench all`, `bench flanneld` (what is about flanneld alone; eight minutes), or `bench` and the names of some. They measure in labs on this machine and print tables with ratios
//! between figures of one run; they are no tests, and nothing fails for being slow.
//!
//! Give them release binaries: `make bench`, or `FLANNEL_BIN_DIR=target/x86_64-unknown-linux-gnu/release`.
#![expect(clippy::print_stdout, reason = "what is measured goes to stdout")]

mod attach;
mod cold_start;
mod docker;
mod docker_throughput;
mod idle;
mod scale;
mod table;
mod throughput;
mod tunnel_guard;
mod udp;

use std::process::ExitCode;

use anyhow::Result;

/// A benchmark: what it is called, what it measures, how it is run.
type Bench = (&'static str, &'static str, fn() -> Result<()>);

const ALL: &[Bench] = &[
    ("cni", "ADD and DEL of the CNI plugin, beside Debian's Go plugins", attach::run),
    (
        "cold-start",
        "flanneld with 4,000 leases in etcd, from its start to everything in the kernel",
        cold_start::run,
    ),
    ("scale", "flanneld among 5,000 leases: start, events, burst, churn, restart, memory", scale::run),
    ("idle", "memory of flanneld that has nothing to do", idle::run),
    ("docker", "networks, containers and ports of Docker, beside its bridge driver", docker::run),
    ("docker-throughput", "containers of two engines, beside Docker's overlay", docker_throughput::run),
    ("throughput", "TCP between containers of two hosts, beside a plain routed veth pair", throughput::run),
    ("tunnel-guard", "TCP over vxlan with the tunnel guard, beside without", tunnel_guard::run),
    ("udp", "TCP over the udp backend, beside vxlan and one packet for each system call", udp::run),
];

/// Those that need neither an engine nor other plugins.
const FLANNELD: [&str; 4] = ["scale", "idle", "throughput", "udp"];

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let known =
        |name: &str| name == "all" || name == "flanneld" || ALL.iter().any(|(known, ..)| *known == name);
    let unknown = names.iter().find(|name| !known(name));
    if names.is_empty() || unknown.is_some() {
        eprintln!("usage: bench all | flanneld | NAME...");
        for (name, what, _) in ALL {
            eprintln!("  {name:18} {what}");
        }
        return ExitCode::from(2);
    }
    let mut failed = false;
    let chosen = |name: &str| {
        names.iter().any(|n| n == "all" || n == name || (n == "flanneld" && FLANNELD.contains(&name)))
    };
    for (name, what, run) in ALL.iter().filter(|(name, ..)| chosen(name)) {
        println!("\n## {name}: {what}\n");
        println!("Load of this machine before it, 1, 5 and 15 minutes: {}\n", load());
        if let Err(error) = run() {
            eprintln!("bench {name}: {error:#}");
            failed = true;
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Figures of a busy machine say little; ratios of one run say more.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(", ")
}
