//! Everybody pings everybody, all the time: how long after a cause's end all of them reach each other again, and what was lost.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use nix::sys::signal::Signal;

use crate::daemon::Daemon;
use crate::host::Place;
use crate::probe::{answer, secs};

/// What depends on the machine, in seconds.
struct Pace {
    /// Between two requests.
    interval: f64,
    /// Longer without an answer is an outage, though nothing was lost in the end; less may be the machine's.
    gap: f64,
    /// Without an outage for so long, a way counts as whole again: what breaks late breaks within that time.
    calm: f64,
}

const REAL: Pace = Pace { interval: 0.02, gap: 0.25, calm: 0.5 };

/// To an emulated processor every request is work.
const EMULATED: Pace = Pace { interval: 0.2, gap: 1.0, calm: 2.0 };

fn pace() -> Pace {
    if crate::vm::is_inside() { EMULATED } else { REAL }
}

/// Pings from everybody to everybody else.
#[derive(Debug, Default)]
pub struct Mesh {
    ways: Vec<Way>,
}

#[derive(Debug)]
struct Way {
    from: String,
    to: Ipv4Addr,
    ping: Daemon,
}

/// What became of a [`Mesh`] after a cause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// From the cause's end to the last outage's; nothing where there was none.
    pub after: Duration,
    /// Requests without an answer since before the cause, of all ways.
    pub lost: u32,
    /// The way that took longest.
    pub slowest: String,
}

/// Now, in seconds as `ping -D` has them.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

impl Mesh {
    /// Pings between all of these, both ways.
    pub fn start(places: &[(&dyn Place, Ipv4Addr)]) -> Result<Self> {
        let mut mesh = Self::default();
        for (i, (from, _)) in places.iter().enumerate() {
            for (_, to) in places.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, place)| place) {
                mesh.add(*from, *to)?;
            }
        }
        Ok(mesh)
    }

    /// One more way.
    pub fn add(&mut self, from: &dyn Place, to: Ipv4Addr) -> Result<()> {
        let interval = pace().interval.to_string();
        let argv = ["ping", "-n", "-D", "-i", &interval, "-W", "1", &to.to_string()];
        let ping = from.spawn(&format!("mesh-{to}"), &argv, &[])?;
        self.ways.push(Way { from: from.name(), to, ping });
        Ok(())
    }

    /// Ends the pings from and to an address's owner.
    pub fn remove(&mut self, place: &dyn Place, ip: Ipv4Addr) -> Result<()> {
        let (gone, kept) = self.ways.drain(..).partition(|way| way.to == ip || way.from == place.name());
        self.ways = kept;
        gone.iter().try_for_each(Way::stop)
    }

    /// Waits until every way is whole. `before` is a moment before the cause, `end` when it was over, both of [`now`].
    pub fn recovers(&self, before: f64, end: f64, deadline: Duration) -> Result<Recovery> {
        let start = Instant::now();
        loop {
            let late = start.elapsed() >= deadline;
            let seen: Vec<_> = self.ways.iter().map(|way| way.seen(before)).collect();
            let calm_since = now() - pace().calm;
            let whole = seen.iter().all(|seen| seen.as_ref().is_ok_and(|(since, _)| *since <= calm_since));
            if whole && end <= calm_since {
                let seen = seen.into_iter().flatten().zip(&self.ways);
                return Ok(seen.fold(
                    Recovery { after: Duration::ZERO, lost: 0, slowest: String::new() },
                    |worst, ((since, lost), way)| {
                        let after = Duration::try_from_secs_f64(since - end).unwrap_or_default();
                        let slower = after > worst.after;
                        Recovery {
                            after: after.max(worst.after),
                            lost: worst.lost + lost,
                            slowest: if slower {
                                format!("{} to {}", way.from, way.to)
                            } else {
                                worst.slowest
                            },
                        }
                    },
                ));
            }
            if late {
                let broken = seen.iter().zip(&self.ways).filter_map(|(seen, way)| {
                    let text = seen.as_ref().err()?;
                    Some(format!("{} to {}: {text}\n{}", way.from, way.to, way.ping.tail()))
                });
                let broken: Vec<_> = broken.collect();
                bail!("not everybody reaches everybody after {deadline:?}\n{}", broken.join("\n"));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends all pings.
    pub fn stop(self) -> Result<()> {
        self.ways.iter().try_for_each(Way::stop)
    }
}

impl Way {
    /// Since when it is whole, and how many requests were lost since before the cause.
    fn seen(&self, before: f64) -> Result<(f64, u32), String> {
        seen(&self.ping.log(), pace().gap, before, now())
    }

    fn stop(&self) -> Result<()> {
        if self.ping.alive() {
            self.ping.kill(Signal::SIGINT)?;
            self.ping.wait(secs(5))?;
        }
        Ok(())
    }
}

fn seen(log: &str, gap: f64, before: f64, now: f64) -> Result<(f64, u32), String> {
    let mut answers = log.lines().filter_map(answer);
    let Some((mut sequence, mut last)) = answers.next() else { return Err("no answer yet".to_owned()) };
    let (mut since, mut lost) = (last, 0);
    for (number, time) in answers {
        if time >= before {
            lost += number.saturating_sub(sequence + 1);
        }
        if number > sequence + 1 || time - last > gap {
            since = time;
        }
        (sequence, last) = (number, time);
    }
    match now - last > gap {
        true => Err(format!("no answer for {:.1} s", now - last)),
        false => Ok((since, lost)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: u32, time: f64) -> String {
        format!("[{time:.6}] 64 bytes from 10.0.0.1: icmp_seq={number} ttl=64 time=0.05 ms\n")
    }

    const GAP: f64 = REAL.gap;

    #[test]
    fn a_way_is_whole_since_its_last_outage() {
        let log = line(1, 100.0) + &line(2, 100.1) + &line(12, 101.0) + &line(13, 101.1) + &line(14, 101.2);
        assert_eq!(seen(&log, GAP, 100.05, 101.3), Ok((101.0, 9)));
        assert_eq!(seen(&log, GAP, 101.05, 101.3), Ok((101.0, 0)));
        assert_eq!(seen(&(log.clone() + &line(16, 101.25)), GAP, 101.05, 101.3), Ok((101.25, 1)));
        assert_eq!(seen(&(log.clone() + &line(15, 101.5)), GAP, 101.05, 101.6), Ok((101.5, 0)));
        assert_eq!(seen(&log, GAP, 100.05, 102.0), Err("no answer for 0.8 s".to_owned()));
        assert_eq!(seen("connect: Network is unreachable\n", GAP, 0.0, 1.0), Err("no answer yet".to_owned()));
    }
}
