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
    /// Where requests were lost, how many, and when before the next answer came, in seconds after the cause's end.
    pub outages: Vec<String>,
}

/// One way, as it is.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    /// Since when it is whole.
    since: f64,
    /// When an answer came after requests without one, and how many these were; since before the cause.
    lost: Vec<(f64, u32)>,
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
            let whole = seen.iter().all(|seen| seen.as_ref().is_ok_and(|seen| seen.since <= calm_since));
            if whole && end <= calm_since {
                return Ok(self.recovery(seen.into_iter().flatten(), end));
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

    /// What all ways together saw.
    fn recovery(&self, seen: impl Iterator<Item = Seen>, end: f64) -> Recovery {
        let nothing =
            Recovery { after: Duration::ZERO, lost: 0, slowest: String::new(), outages: Vec::new() };
        self.ways.iter().zip(seen).fold(nothing, |mut worst, (way, seen)| {
            let name = format!("{} to {}", way.from, way.to);
            let after = Duration::try_from_secs_f64(seen.since - end).unwrap_or_default();
            for (time, lost) in &seen.lost {
                worst.lost += lost;
                worst.outages.push(format!("{name}: {lost} until {:.2}", time - end));
            }
            if after > worst.after {
                (worst.after, worst.slowest) = (after, name);
            }
            worst
        })
    }

    /// Ends all pings.
    pub fn stop(self) -> Result<()> {
        self.ways.iter().try_for_each(Way::stop)
    }
}

impl Way {
    fn seen(&self, before: f64) -> Result<Seen, String> {
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

fn seen(log: &str, gap: f64, before: f64, now: f64) -> Result<Seen, String> {
    let mut answers = log.lines().filter_map(answer);
    let Some((mut sequence, mut last)) = answers.next() else { return Err("no answer yet".to_owned()) };
    let mut seen = Seen { since: last, lost: Vec::new() };
    for (number, time) in answers {
        let missing = number.saturating_sub(sequence + 1);
        if time >= before && missing > 0 {
            seen.lost.push((time, missing));
        }
        if missing > 0 || time - last > gap {
            seen.since = time;
        }
        (sequence, last) = (number, time);
    }
    match now - last > gap {
        true => Err(format!("no answer for {:.1} s", now - last)),
        false => Ok(seen),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: u32, time: f64) -> String {
        format!("[{time:.6}] 64 bytes from 10.0.0.1: icmp_seq={number} ttl=64 time=0.05 ms\n")
    }

    #[test]
    fn a_way_is_whole_since_its_last_outage() {
        let log = line(1, 100.0) + &line(2, 100.1) + &line(12, 101.0) + &line(13, 101.1) + &line(14, 101.2);
        let seen = |log: &str, before, now| {
            seen(log, REAL.gap, before, now).map(|Seen { since, lost }| (since, lost))
        };
        assert_eq!(seen(&log, 100.05, 101.3), Ok((101.0, vec![(101.0, 9)])));
        assert_eq!(seen(&log, 101.05, 101.3), Ok((101.0, vec![])));
        let more = |number, time| log.clone() + &line(number, time);
        assert_eq!(seen(&more(16, 101.25), 101.05, 101.3), Ok((101.25, vec![(101.25, 1)])));
        assert_eq!(seen(&more(15, 101.5), 101.05, 101.6), Ok((101.5, vec![])));
        assert_eq!(seen(&log, 100.05, 102.0), Err("no answer for 0.8 s".to_owned()));
        assert_eq!(seen("connect: Network is unreachable\n", 0.0, 1.0), Err("no answer yet".to_owned()));
    }
}
