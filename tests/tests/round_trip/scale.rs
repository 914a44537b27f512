//! Thousands at once: attribution of failures, looks while others write, and what it all costs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::ensure;
use flannel_core::act::pass::converge;
use flannel_core::touch::world::World as _;
use flannel_core::touch::world::kernel::{Kernel, Namespace};
use flannel_core::words::fact::{Change, Fact, Facts, Route, diff};
use flannel_tests::alone;

use super::facts::{name, peers, route};
use super::{aliased, all, owned, underlay};

#[test]
fn every_failure_in_a_large_batch_is_attributed() {
    alone(|| {
        underlay()?;
        let mut kernel = Kernel::open()?;
        let routes: Vec<Fact> = (0..5000u32)
            .map(|n| {
                let destination = format!("10.{}.{}.0/24", n / 250, n % 250);
                let via = if n % 3 == 0 { "172.16.0.1" } else { "192.168.77.2" };
                Fact::Route(Route { onlink: false, ..route("up0", &destination, Some(via), n) })
            })
            .collect();
        let changes: Vec<_> = routes.iter().map(Change::Create).collect();
        let results = kernel.apply(&changes);
        for (n, result) in results.iter().enumerate() {
            ensure!(result.is_err() == (n % 3 == 0), "{n}: {result:?}");
        }
        Ok(())
    });
}

#[test]
fn a_dump_while_others_write_is_whole() {
    alone(|| {
        underlay()?;
        let mut kernel = Kernel::open()?;
        let territory = owned(&["flannel.1"]);
        let desired: Facts = peers(2000).collect();
        all(kernel.apply(&diff(&desired, &Facts::default())))?;
        let here = Namespace::current()?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                here.run(|| {
                    let mut writer = Kernel::open().unwrap();
                    let noise = Fact::Route(Route {
                        onlink: false,
                        ..route("up0", "10.99.0.0/24", Some("192.168.77.2"), 0)
                    });
                    while !stop.load(Ordering::Relaxed) {
                        writer.apply(&[Change::Create(&noise), Change::Delete(&noise)]);
                    }
                })
            });
            let looked = (0..20).try_for_each(|_| {
                let seen = kernel.observe(&territory)?;
                ensure!(diff(&desired, &seen).is_empty(), "a look missed something");
                Ok(())
            });
            stop.store(true, Ordering::Relaxed);
            looked
        })
    });
}

#[test]
fn thousands_of_peers_and_what_they_cost() {
    alone(|| {
        underlay()?;
        for count in [4000, 10_000] {
            let mut kernel = Kernel::open()?;
            let territory = aliased(&["flannel.1"]);
            let desired: Facts = peers(count).collect();
            let (wall, cpu) = (Instant::now(), cpu_seconds());
            let report = converge(&mut kernel, &territory, &desired)?;
            let (took, used) = (wall.elapsed(), cpu_seconds() - cpu);
            ensure!(
                report.clean && report.looks == 2,
                "{} looks, failed: {:#?}",
                report.looks,
                report.failed.first()
            );
            let (wall, cpu) = (Instant::now(), cpu_seconds());
            let report = converge(&mut kernel, &territory, &desired)?;
            ensure!(report.made.is_empty());
            println!(
                "{count} peers: converge {took:.3?} wall, {used:.3} CPU-s; a look that finds nothing to do {:.3?} wall, {:.3} CPU-s",
                wall.elapsed(),
                cpu_seconds() - cpu,
            );
            kernel.delete_link(name("flannel.1"))?;
        }
        Ok(())
    });
}

/// User and system time of this thread.
fn cpu_seconds() -> f64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD).unwrap();
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}
