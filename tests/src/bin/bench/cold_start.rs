//! A cold start into a large cluster: seconds, processor time and memory until every entry is in the kernel.
//!
//! The host gets an interface on a /16 LAN of its own, so that host-gw's 4,000 gateways are on its link. The floor in the table is
//! iproute2 writing the very same entries in batches.

use std::fmt::Write as _;
use std::fs;
use std::io::{Seek, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{PREFIX, SUBNET_FILE, put_config};
use flannel_tests::{Host, Lab, secs};

use crate::table::{self, median, megabytes};

const LEASES: usize = 4000;
const RUNS: usize = 3;
/// etcd takes up to 128 operations at once unless configured otherwise.
const BATCH: usize = 128;

/// Go flanneld 0.20.2 on a quiet machine of the same kind: seconds, CPU seconds, MB.
const GO: &[(&str, f64, f64, f64)] = &[("vxlan", 2.5, 1.4, 56.0), ("host-gw", 19.7, 21.8, 54.0)];

/// What is aimed at: seconds, CPU seconds, MB.
const AIM: (f64, f64, f64) = (0.6, 0.3, 20.0);

pub(crate) fn run() -> Result<()> {
    let mut rows = Vec::new();
    for (backend, go_seconds, go_cpu, go_memory) in GO {
        let runs = (0..RUNS).map(|_| measure(backend)).collect::<Result<Vec<_>>>()?;
        let of = |figure: fn(&Figures) -> f64| median(runs.iter().map(figure).collect());
        let (all, env, floor) = (of(|f| f.all), of(|f| f.env), of(|f| f.floor));
        let row = |what: &str, figure: f64, unit: &str, ratio: f64, other: String, aim: String| {
            vec![
                format!("{backend}: {what}"),
                format!("{figure:.2} {unit}"),
                other,
                format!("{ratio:.2}"),
                aim,
            ]
        };
        let go = |figure: f64, unit: &str| format!("Go {figure} {unit}");
        rows.push(row(
            "all entries",
            all,
            "s",
            all / go_seconds,
            go(*go_seconds, "s"),
            format!("<= {} s", AIM.0),
        ));
        rows.push(row("the same", all, "s", all / floor, format!("ip -batch {floor:.2} s"), String::new()));
        rows.push(row("subnet.env", env, "s", env / all, "all entries".into(), String::new()));
        let cpu = of(|f| f.cpu);
        rows.push(row("processor", cpu, "s", cpu / go_cpu, go(*go_cpu, "s"), format!("<= {} s", AIM.1)));
        let memory = of(|f| f.rss_kib as f64) * 1024.0 / 1e6;
        rows.push(row(
            "memory",
            memory,
            "MB",
            memory / go_memory,
            go(*go_memory, "MB"),
            format!("<= {} MB", AIM.2),
        ));
        let peak = of(|f| f.peak_kib as f64) * 1024.0 / 1e6;
        rows.push(row("memory, peak", peak, "MB", peak / go_memory, go(*go_memory, "MB"), String::new()));
    }
    table::print(&["4,000 leases, medians of 3", "ours", "against", "ratio", "aim"], &rows);
    println!(
        "\nGo: flanneld 0.20.2, measured before on a quiet machine of this kind. ip -batch: the same entries, in this run."
    );
    Ok(())
}

struct Figures {
    env: f64,
    all: f64,
    cpu: f64,
    rss_kib: u64,
    peak_kib: u64,
    floor: f64,
}

fn measure(backend: &str) -> Result<Figures> {
    let lab = Lab::new("cold-start").hosts(1).etcd().start()?;
    let host = lab.host(1);
    host.sh("ip link add lan0 type veth peer name lan1; ip addr add 10.88.0.1/16 dev lan0; \
        ip link set lan1 up; ip link set lan0 up")?;
    put_config(
        &lab,
        &format!(r#"{{"Network":"172.16.0.0/12","SubnetLen":24,"Backend":{{"Type":"{backend}"}}}}"#),
    )?;
    fill(&lab, backend)?;

    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let start = Instant::now();
    let daemon = host.spawn("flanneld", &["flanneld", &endpoints, "--iface", "lan0"], &[])?;
    let (mut env, mut all) = (None, None);
    let (file, routes) = (host.path(SUBNET_FILE), format!("/proc/{}/net/route", host.pid()));
    while env.is_none() || all.is_none() {
        ensure!(
            start.elapsed() < secs(60) && daemon.alive(),
            "not there after {:?}\n{}",
            start.elapsed(),
            daemon.tail()
        );
        if env.is_none() && file.exists() {
            env = Some(start.elapsed());
        }
        // Routes are the last to be written.
        if all.is_none() && fs::read(&routes)?.iter().filter(|byte| **byte == b'\n').count() > LEASES {
            all = Some(start.elapsed());
        }
        thread::sleep(Duration::from_millis(10));
    }
    let (env, all) = env.zip(all).context("both were waited for")?;
    thread::sleep(secs(1)); // what it does afterwards counts too
    let usage = daemon.usage()?;
    let floor = floor(host, backend)?;
    eprintln!(
        "{backend}: subnet.env {:.2} s, all {:.2} s, {:.2} CPU s, {} (peak {}); ip -batch {floor:.2} s",
        env.as_secs_f64(),
        all.as_secs_f64(),
        usage.cpu_seconds,
        megabytes(usage.rss_kib),
        megabytes(usage.peak_rss_kib)
    );
    daemon.crash()?;
    lab.tear_down()?;
    Ok(Figures {
        env: env.as_secs_f64(),
        all: all.as_secs_f64(),
        cpu: usage.cpu_seconds,
        rss_kib: usage.rss_kib,
        peak_kib: usage.peak_rss_kib,
        floor,
    })
}

/// Leases of hosts that are not there.
fn fill(lab: &Lab, backend: &str) -> Result<()> {
    let said = lab.etcdctl(&["lease", "grant", "86400"])?;
    let lease = said.split(' ').nth(1).with_context(|| format!("no lease in {said:?}"))?;
    let numbers: Vec<usize> = (1..=LEASES).collect();
    for chunk in numbers.chunks(BATCH) {
        // No conditions, these requests, nothing else.
        let mut text = String::from("\n");
        for n in chunk {
            let (high, low) = (n / 256, n % 256);
            let data = match backend {
                "vxlan" => {
                    format!(r#","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:{high:02x}:{low:02x}"}}"#)
                }
                _ => String::new(),
            };
            let public = format!("10.88.{}.{}", 1 + n / 250, 1 + n % 250);
            let value =
                format!(r#"{{"PublicIP":"{public}","PublicIPv6":null,"BackendType":"{backend}"{data}}}"#);
            // etcdctl takes it in quotes, as a Go string.
            writeln!(text, "put --lease={lease} {PREFIX}/subnets/172.{}.{low}.0-24 {value:?}", 16 + high)?;
        }
        text.push_str("\n\n");
        let mut input = tempfile::tempfile()?;
        input.write_all(text.as_bytes())?;
        input.rewind()?;
        let said = lab
            .etcd_host()
            .run_input(&["etcdctl", "--endpoints", &lab.etcd_endpoint(), "txn"], input)?
            .text()?;
        ensure!(said.starts_with("SUCCESS"), "{said}");
    }
    let count = lab.etcdctl(&["get", "--prefix", "--keys-only", &format!("{PREFIX}/subnets/")])?;
    let count = count.lines().filter(|line| !line.is_empty()).count();
    ensure!(count == LEASES, "etcd has {count} leases");
    Ok(())
}

/// Checks that every entry is there, copies them to another namespace's devices by iproute2, and says how long that took.
fn floor(host: &Host, backend: &str) -> Result<f64> {
    let device = if backend == "vxlan" { "flannel.1" } else { "lan0" };
    let routes = host.out(&["ip", "-4", "route", "show", "dev", device])?;
    let routes: Vec<&str> = routes.lines().filter(|line| line.starts_with("172.")).collect();
    ensure!(routes.len() == LEASES, "{} routes", routes.len());
    let mut links = String::new();
    for route in &routes {
        writeln!(links, "route add {} dev {device}", route.trim())?;
    }
    let mut forwards = String::new();
    if backend == "vxlan" {
        let neighbours = host.out(&["ip", "-4", "neigh", "show", "dev", device])?;
        let entries = host.out(&["bridge", "fdb", "show", "dev", device])?;
        ensure!(neighbours.lines().count() == LEASES, "{} neighbours", neighbours.lines().count());
        ensure!(entries.lines().count() == LEASES, "{} forwarding entries", entries.lines().count());
        for line in neighbours.lines() {
            writeln!(
                links,
                "neigh add {} dev {device} nud permanent",
                line.trim_end().trim_end_matches(" PERMANENT")
            )?;
        }
        for line in entries.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [mac, "dst", public, ..] = words[..] else { continue };
            writeln!(forwards, "fdb add {mac} dev {device} dst {public} self permanent")?;
        }
    }
    // A namespace beside the host's, with the same devices and nothing on them.
    host.sh("ip netns add floor; ip -n floor link add lan0 type veth peer name lan1; \
        ip -n floor addr add 10.88.0.1/16 dev lan0; ip -n floor link set lan1 up; ip -n floor link set lan0 up; \
        ip -n floor link add flannel.1 type vxlan id 1 local 10.88.0.1 dev lan0 dstport 8472 nolearning; \
        ip -n floor link set flannel.1 up")?;
    let start = Instant::now();
    for (program, batch) in [("bridge", forwards), ("ip", links)] {
        let mut input = tempfile::tempfile()?;
        input.write_all(batch.as_bytes())?;
        input.rewind()?;
        host.run_input(&[program, "-n", "floor", "-batch", "-"], input)?.text()?;
    }
    let took = start.elapsed().as_secs_f64();
    host.out(&["ip", "netns", "del", "floor"])?;
    Ok(took)
}
