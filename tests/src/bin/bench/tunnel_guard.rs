//! What the tunnel guard costs: the same containers over the same vxlan, in turns with flanneld there, which keeps the guard, and
//! stopped, which takes it along and leaves the tunnel.

use anyhow::{Result, ensure};
use flannel_tests::flanneld::{Flanneld, Pod, put_config};
use flannel_tests::{Lab, eventually, ping_within, secs};

use crate::table::{self, median};
use crate::throughput::gigabits;

const ROUNDS: usize = 15;
const STREAMS: [u32; 2] = [1, 4];
const AIM: f64 = 0.98;

pub(crate) fn run() -> Result<()> {
    let lab = Lab::new("guard-cost").etcd().needs(&["iperf3"]);
    ensure!(lab.can_run(), "this machine lacks something");
    let lab = lab.start()?;
    put_config(&lab, r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#)?;
    let mut daemons = Flanneld::start_all(&lab)?;
    let pods = lab.hosts().iter().zip(&daemons).map(|(host, daemon)| Pod::new(host, &daemon.ready()?, 2));
    let pods = pods.collect::<Result<Vec<_>>>()?;
    pods.iter().try_for_each(|pod| pod.set_mtu(1450))?;
    ping_within(secs(10), &pods[0], pods[1].ip())?;
    flannel_tests::Place::spawn(&pods[1], "iperf3", &["iperf3", "-s", "--forceflush", "-A", "1"], &[])?
        .wait_log("Server listening", secs(5))?;
    let to = pods[1].ip().to_string();
    let mut seen = vec![vec![Vec::new(); STREAMS.len()]; 2];
    for round in 0..ROUNDS {
        // Whoever comes first meets a machine that has just rested.
        for guarded in [round % 2 == 0, round % 2 == 1] {
            if guarded == daemons.is_empty() {
                match guarded {
                    true => daemons = Flanneld::start_all(&lab)?,
                    false => daemons.drain(..).try_for_each(|one| one.daemon().stop(secs(10)).map(drop))?,
                }
            }
            for host in lab.hosts() {
                let tables = host.sh("nft list tables")?;
                ensure!(tables.contains("flannel_tunnel") == guarded, "{tables}");
            }
            for (i, streams) in STREAMS.into_iter().enumerate() {
                // On a busy machine the server may not be done with the one before.
                let figure = eventually("a figure", secs(10), || gigabits(&pods[0], &to, streams))?;
                seen[usize::from(guarded)][i].push(figure);
            }
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    lab.tear_down()?;
    let middle = |guarded: usize, streams: usize| median(seen[guarded][streams].clone());
    let rows: Vec<Vec<String>> = STREAMS
        .into_iter()
        .enumerate()
        .map(|(i, streams)| {
            let (open, guarded) = (middle(0, i), middle(1, i));
            let ratio = format!("{:.3}", guarded / open);
            vec![
                format!("{streams} at once"),
                format!("{open:.1}"),
                format!("{guarded:.1}"),
                ratio,
                format!(">= {AIM}"),
            ]
        })
        .collect();
    table::print(&["Gb/s, medians of 15 rounds", "without", "with the guard", "ratio", "aim"], &rows);
    Ok(())
}
