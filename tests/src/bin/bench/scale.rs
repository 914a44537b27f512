//! flanneld on one host of 5,000: how it comes up, what one lease more costs it, a burst, a restart, what it uses with nothing to do, and
//! whether its memory stays as it is while leases come, move and go.

use std::env;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use flannel_tests::crowd::{Crowd, LINK, RouteWatch, await_routes, routes};
use flannel_tests::{Daemon, Host, Lab, secs};

use crate::table::{self, median, megabytes};

const LEASES: usize = 5000;
const BURST: usize = 1000;
const EVENTS: usize = 300;
const QUIET: u64 = 30;
const CHURN: u64 = 30;

/// Aims: an event p99 in ms, memory with nothing to do and at this size in MB, idle processor in per cent.
const EVENT_MS: f64 = 10.0;
const MEMORY_MB: f64 = 20.0;
const IDLE_PERCENT: f64 = 0.1;

pub(crate) fn run() -> Result<()> {
    let mut rows = Vec::new();
    for backend in ["vxlan", "host-gw"] {
        measure(backend, &mut rows)?;
    }
    table::print(&["5,000 leases", "ours", "aim"], &rows);
    Ok(())
}

fn measure(backend: &str, rows: &mut Vec<Vec<String>>) -> Result<()> {
    let lab = Lab::new("scale").hosts(1).etcd().start()?;
    let host = lab.host(1);
    let crowd = Crowd::new(&lab, host, backend)?;
    crowd.join(0..LEASES)?;
    let mut row = |what: &str, figure: String, aim: String| {
        eprintln!("{backend}: {what}: {figure}");
        rows.push(vec![format!("{backend}: {what}"), figure, aim]);
    };

    let start = Instant::now();
    let daemon = spawn(&lab, host)?;
    let took = await_routes(host, LEASES, start, secs(60))?;
    thread::sleep(secs(1)); // what it does afterwards counts too
    let usage = daemon.usage()?;
    row("cold start", format!("{:.2} s", took.as_secs_f64()), String::new());
    row("cold start, processor", format!("{:.2} s", usage.cpu_seconds), String::new());
    row(
        "memory then, peak",
        format!("{}, {}", megabytes(usage.rss_kib), megabytes(usage.peak_rss_kib)),
        format!("<= {MEMORY_MB} MB"),
    );

    let before = daemon.usage()?.cpu_seconds;
    thread::sleep(secs(QUIET));
    let usage = daemon.usage()?;
    let percent = (usage.cpu_seconds - before) / QUIET as f64 * 100.0;
    row("idle", format!("{percent:.2} %"), format!("< {IDLE_PERCENT} %"));
    row("idle, memory", megabytes(usage.rss_kib), format!("<= {MEMORY_MB} MB"));

    let (sent, answered, cpu) = events(&crowd, host, &daemon)?;
    let figures = |mut of: Vec<f64>| {
        of.sort_by(f64::total_cmp);
        format!("{:.1} ms, {:.1} ms", median(of.clone()), of[(of.len() * 99).div_ceil(100) - 1])
    };
    row("lease to route p50, p99, from etcd's answer", figures(answered), format!("p99 <= {EVENT_MS} ms"));
    row("the same from asking etcd", figures(sent), String::new());
    row("the same, processor", format!("{:.1} ms each", cpu * 1e3), String::new());

    let before = daemon.usage()?.cpu_seconds;
    let start = Instant::now();
    crowd.join(LEASES..LEASES + BURST)?;
    let written = start.elapsed();
    let took = await_routes(host, LEASES + BURST, start, secs(60))?;
    thread::sleep(secs(2));
    let cpu = daemon.usage()?.cpu_seconds - before;
    row(
        "1,000 join at once",
        format!("{:.2} s (etcd {:.2} s), {cpu:.2} CPU-s", took.as_secs_f64(), written.as_secs_f64()),
        String::new(),
    );
    crowd.leave(LEASES..LEASES + BURST)?;
    await_routes(host, LEASES, Instant::now(), secs(60))?;

    let usage = churn(&crowd, &daemon)?;
    row("memory before and after churn", usage, String::new());

    await_routes(host, LEASES, Instant::now(), secs(60))?;
    daemon.stop(secs(10))?;
    ensure!(routes(host)? == LEASES, "a stop leaves the routes");
    let again = spawn(&lab, host)?;
    let took = again.wait_log("flannel is ready", secs(20))?;
    thread::sleep(secs(1));
    let usage = again.usage()?;
    row("restart", format!("{:.2} s, {:.2} CPU-s", took.as_secs_f64(), usage.cpu_seconds), String::new());
    again.crash()?;
    lab.tear_down()
}

fn spawn(lab: &Lab, host: &Host) -> Result<Daemon> {
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    host.spawn("flanneld", &["flanneld", &endpoints, "--iface", LINK], &[])
}

/// Single leases come, move and go at no particular times: milliseconds to the route from sending and from etcd's answer, and the
/// processor seconds of each.
fn events(crowd: &Crowd, host: &Host, daemon: &Daemon) -> Result<(Vec<f64>, Vec<f64>, f64)> {
    let watch = RouteWatch::open(host)?;
    let (mut sent, mut answered) = (Vec::new(), Vec::new());
    let before = daemon.usage()?.cpu_seconds;
    for event in 0..EVENTS {
        let n = LEASES + event / 3;
        let start = Instant::now();
        match event % 3 {
            0 => crowd.put(n, 0)?,
            1 => crowd.put(n, 1)?,
            _ => crowd.remove(n)?,
        }
        let answer = Instant::now();
        // Where a vxlan host moves, its route stays.
        let at = match (event % 3, crowd.routes_follow_homes()) {
            (1, false) => None,
            (step, _) => Some(watch.wait(n, step != 2)?),
        };
        if let Some(at) = at {
            sent.push((at - start).as_secs_f64() * 1e3);
            answered.push((at - answer).as_secs_f64() * 1e3);
        }
        thread::sleep(Duration::from_millis(20 + (event as u64 * 37) % 150));
    }
    thread::sleep(secs(1));
    Ok((sent, answered, (daemon.usage()?.cpu_seconds - before) / EVENTS as f64))
}

/// Memory before and after so many seconds (`FLANNEL_BENCH_CHURN`) of leases that come, move and go as fast as etcd takes them.
fn churn(crowd: &Crowd, daemon: &Daemon) -> Result<String> {
    let seconds = env::var("FLANNEL_BENCH_CHURN").ok().and_then(|s| s.parse().ok()).unwrap_or(CHURN);
    let (before, start) = (daemon.usage()?, Instant::now());
    let mut done = 0;
    while start.elapsed() < secs(seconds) {
        let n = done * 7 % LEASES;
        crowd.put(n, 1 + done % 6)?;
        crowd.remove(n)?;
        crowd.put(n, 0)?;
        done += 1;
    }
    let after = daemon.usage()?;
    Ok(format!(
        "{}, {} ({} changes in {seconds} s, {:.0} % processor)",
        megabytes(before.rss_kib),
        megabytes(after.rss_kib),
        done * 3,
        (after.cpu_seconds - before.cpu_seconds) / start.elapsed().as_secs_f64() * 100.0
    ))
}
