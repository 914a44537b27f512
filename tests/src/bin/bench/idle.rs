//! What a flanneld costs that has nothing to do.

use std::thread;

use anyhow::Result;
use flannel_tests::flanneld::{Flanneld, put_config};
use flannel_tests::{Lab, secs};

use crate::table::{self, megabytes};

/// Go flanneld 0.20.2 on a machine of the same kind, and what is aimed at, in MB and in per cent of a processor.
const GO: f64 = 35.0;
const AIM: f64 = 12.0;
const PERCENT: f64 = 0.1;
const QUIET: u64 = 60;

pub(crate) fn run() -> Result<()> {
    let mut rows = Vec::new();
    // All at once: they have nothing to do, and so are in nobody's way.
    let mut quiet = Vec::new();
    for backend in ["vxlan", "host-gw"] {
        let lab = Lab::new("idle").etcd().start()?;
        put_config(&lab, &format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"{backend}"}}}}"#))?;
        let daemons = Flanneld::start_all(&lab)?;
        quiet.push((backend, lab, daemons));
    }
    thread::sleep(secs(2));
    let before =
        quiet.iter().map(|(_, _, daemons)| daemons[0].daemon().usage()).collect::<Result<Vec<_>>>()?;
    thread::sleep(secs(QUIET));
    for ((backend, lab, daemons), before) in quiet.into_iter().zip(before) {
        let now = daemons[0].daemon().usage()?;
        let rss = now.rss_kib as f64 * 1024.0 / 1e6;
        rows.push(vec![
            format!("{backend}: resident"),
            megabytes(now.rss_kib),
            format!("Go {GO} MB"),
            format!("{:.2}", rss / GO),
            format!("<= {AIM} MB"),
        ]);
        rows.push(vec![format!("{backend}: proportional"), megabytes(now.pss_kib)]);
        let cpu = (now.cpu_seconds - before.cpu_seconds) / QUIET as f64 * 100.0;
        rows.push(vec![
            format!("{backend}: processor"),
            format!("{cpu:.2} %"),
            String::new(),
            String::new(),
            format!("< {PERCENT} %"),
        ]);
        lab.tear_down()?;
    }
    for row in &mut rows {
        row.resize(5, String::new());
    }
    table::print(&["two hosts, nothing to do", "ours", "against", "ratio", "aim"], &rows);
    Ok(())
}
