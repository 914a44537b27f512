//! flanneld on one host of thousands: what it costs must grow with what changes, not with how many there are, and what is in the
//! kernel must be the plan, however it got there. `FLANNEL_TESTS_LONG=1` runs it with 5,000 leases and ten minutes of churn.

use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::crowd::{Crowd, LINK, await_routes, routes};
use flannel_tests::flanneld::Flanneld;
use flannel_tests::{Host, Lab, eventually, in_lab, secs};

/// So long may anything take on a machine that does many other things, in a build without optimization.
const PATIENCE: Duration = Duration::from_secs(60);

/// How large the crowd is, what joins it at once, and how long leases come and go.
struct Size {
    leases: usize,
    burst: usize,
    churn: Duration,
}

fn size() -> Size {
    match env::var_os("FLANNEL_TESTS_LONG").is_some_and(|long| long != "0") {
        true => Size { leases: 5000, burst: 1000, churn: secs(600) },
        false => Size { leases: 2000, burst: 500, churn: secs(3) },
    }
}

#[test]
fn thousands_of_vxlan_hosts() {
    among_thousands("vxlan");
}

#[test]
fn thousands_of_host_gw_hosts() {
    among_thousands("host-gw");
}

fn among_thousands(backend: &str) {
    let size = size();
    let plan = Lab::new("scale").hosts(1).etcd().time_to_live(size.churn + secs(900));
    in_lab(plan, |lab| {
        let host = lab.host(1);
        let crowd = Crowd::new(lab, host, backend)?;
        grows_with_the_crowd_and_no_more(lab, &crowd, &size)?;
        let daemon = start(lab, host)?;
        await_routes(host, size.leases, Instant::now(), PATIENCE)?;
        daemon.ready()?;
        as_planned(lab, host)?;
        single_leases_need_no_look(lab, &daemon, &crowd, &size)?;
        a_burst(lab, &daemon, &crowd, &size)?;
        a_restart_changes_nothing(lab, daemon, &size)?;
        let daemon = start(lab, host)?;
        daemon.ready()?;
        churn_leaves_no_trace(lab, &daemon, &crowd, &size)
    });
}

fn start(lab: &Lab, host: &Host) -> Result<Flanneld> {
    Flanneld::start_with(lab, host, &["--iface", LINK])
}

/// A start among eight times as many takes less than twenty times the processor time. What takes a square would take more than
/// sixty times.
fn grows_with_the_crowd_and_no_more(lab: &Lab, crowd: &Crowd, size: &Size) -> Result<()> {
    let host = lab.host(1);
    let cost = |leases: usize| -> Result<f64> {
        let daemon = start(lab, host)?;
        await_routes(host, leases, Instant::now(), PATIENCE)?;
        daemon.ready()?;
        let seconds = daemon.daemon().usage()?.cpu_seconds;
        daemon.daemon().stop(secs(10))?;
        Ok(seconds)
    };
    let few = size.leases / 8;
    crowd.join(0..few)?;
    let small = cost(few)?;
    crowd.join(few..size.leases)?;
    let large = cost(size.leases)?;
    eprintln!("processor at a start: {small:.2} s among {few}, {large:.2} s among {}", size.leases);
    ensure!(large < 20.0 * small.max(0.05), "{small:.2} s among {few}, {large:.2} s among {}", size.leases);
    Ok(())
}

/// What the whole plan says of the kernel: nothing to do.
fn as_planned(lab: &Lab, host: &Host) -> Result<()> {
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    eventually("the kernel is as planned", PATIENCE, || {
        let said = host.run(&["flanneld", &endpoints, "--iface", LINK, "plan"])?;
        let shown: String = said.all().lines().take(8).collect::<Vec<_>>().join("\n");
        ensure!(said.ok(), "{shown}");
        Ok(())
    })
}

fn passes(daemon: &Flanneld, reason: &str) -> Result<u64> {
    let (_, text) = daemon.health("/metrics")?;
    let wanted = format!("reason=\"{reason}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix("flannel_passes_total{")?.split_once(&wanted));
    line.map_or(Ok(0), |(_, count)| count.trim().parse().with_context(|| format!("{count:?}")))
}

/// Leases that come, move and go one by one are followed; nobody else changed the kernel, so nobody looks at all of it for them.
fn single_leases_need_no_look(lab: &Lab, daemon: &Flanneld, crowd: &Crowd, size: &Size) -> Result<()> {
    const EACH: usize = 5;
    let host = lab.host(1);
    // A look may still be due to what the start did.
    let settled = Instant::now();
    let mut before = passes(daemon, "kernel")?;
    eventually("nothing more happens", PATIENCE, || {
        let now = passes(daemon, "kernel")?;
        let quiet = std::mem::replace(&mut before, now) == now && settled.elapsed() > secs(1);
        ensure!(quiet, "{now} looks");
        Ok(())
    })?;
    let followed = passes(daemon, "leases")?;
    for n in size.leases..size.leases + EACH {
        crowd.put(n, 0)?;
        await_routes(host, size.leases + 1, Instant::now(), PATIENCE)?;
        crowd.put(n, 1)?;
        crowd.remove(n)?;
        await_routes(host, size.leases, Instant::now(), PATIENCE)?;
    }
    crowd.put(7, 3)?;
    as_planned(lab, host)?;
    let (looks, followed) = (passes(daemon, "kernel")? - before, passes(daemon, "leases")? - followed);
    ensure!(followed >= 2 * EACH as u64, "{followed} passes for {EACH} leases that came and went");
    ensure!(looks <= 1, "{looks} looks at {} leases, for {EACH} that came and went", size.leases);
    Ok(())
}

fn a_burst(lab: &Lab, daemon: &Flanneld, crowd: &Crowd, size: &Size) -> Result<()> {
    let host = lab.host(1);
    let (before, lines) = (daemon.daemon().usage()?.cpu_seconds, daemon.daemon().log().lines().count());
    crowd.join(size.leases..size.leases + size.burst)?;
    let took = await_routes(host, size.leases + size.burst, Instant::now(), PATIENCE)?;
    as_planned(lab, host)?;
    let said = daemon.daemon().log().lines().count() - lines;
    let cpu = daemon.daemon().usage()?.cpu_seconds - before;
    eprintln!("{} at once: {took:.2?} after etcd had them, {cpu:.2} CPU-s, {said} lines", size.burst);
    ensure!(said < size.burst, "{said} lines for {} leases", size.burst);
    crowd.leave(size.leases..size.leases + size.burst)?;
    await_routes(host, size.leases, Instant::now(), PATIENCE)?;
    as_planned(lab, host)
}

fn a_restart_changes_nothing(lab: &Lab, daemon: Flanneld, size: &Size) -> Result<()> {
    let host = lab.host(1);
    daemon.daemon().stop(secs(10))?;
    ensure!(routes(host)? == size.leases, "a stop leaves the routes");
    let again = start(lab, host)?;
    again.ready()?;
    let changes: Vec<String> = again
        .said("network=\"default\"")
        .into_iter()
        .filter(|line| {
            ["route", "neighbor", "forward"].iter().any(|kind| line.contains(&format!(" {kind} ")))
        })
        .collect();
    ensure!(changes.is_empty() && routes(host)? == size.leases, "{changes:#?}");
    // A crash leaves as much.
    again.daemon().crash()?;
    ensure!(routes(host)? == size.leases, "a crash leaves the routes");
    Ok(())
}

/// Memory is what it was, once leases have come, moved and gone for long.
fn churn_leaves_no_trace(lab: &Lab, daemon: &Flanneld, crowd: &Crowd, size: &Size) -> Result<()> {
    let host = lab.host(1);
    let churn = |time: Duration| -> Result<usize> {
        let (start, mut done) = (Instant::now(), 0);
        while start.elapsed() < time {
            let n = done * 7 % size.leases;
            crowd.put(n, 1 + done % 6)?;
            crowd.remove(n)?;
            crowd.put(n, 0)?;
            done += 1;
        }
        Ok(done * 3)
    };
    // What it needs for that at all, it has after the first of it.
    churn(size.churn / 10)?;
    let before = daemon.daemon().usage()?.rss_kib;
    let done = churn(size.churn)?;
    await_routes(host, size.leases, Instant::now(), PATIENCE)?;
    as_planned(lab, host)?;
    let after = daemon.daemon().usage()?.rss_kib;
    eprintln!("{done} changes in {:?}: {before} KiB before, {after} KiB after", size.churn);
    ensure!(after < before + 8 * 1024, "{before} KiB before {done} changes, {after} KiB after");
    Ok(())
}
