//! Questions about the network, and the one way to wait: on a state, with a deadline.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::daemon::Daemon;
use crate::engine::Container;
use crate::flanneld::{Flanneld, SubnetEnv};
use crate::host::{Host, Place};

/// Between two looks.
const NAP: Duration = Duration::from_millis(10);

/// The same on an emulated processor, to which a look is work.
const NAP_EMULATED: Duration = Duration::from_millis(100);

/// Deadlines are for machines; there everything takes five to ten times as long.
const EMULATED_FACTOR: u32 = 10;

/// So many seconds.
pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// What a condition may be: a `bool`, an `Option`, or a `Result`, whose error then says what was seen last.
pub trait Condition {
    /// What comes out when it holds.
    type Value;
    /// The value, or what was seen instead.
    fn seen(self) -> std::result::Result<Self::Value, String>;
}

impl Condition for bool {
    type Value = ();
    fn seen(self) -> std::result::Result<(), String> {
        if self { Ok(()) } else { Err("false".to_owned()) }
    }
}

impl<T> Condition for Option<T> {
    type Value = T;
    fn seen(self) -> std::result::Result<T, String> {
        self.ok_or_else(|| "nothing".to_owned())
    }
}

impl<T: Answer> Condition for Result<T> {
    type Value = T;
    fn seen(self) -> std::result::Result<T, String> {
        match self {
            Ok(answer) if answer.holds() => Ok(answer),
            Ok(_) => Err("false".to_owned()),
            Err(error) => Err(format!("{error:#}")),
        }
    }
}

/// What a condition that can fail answers when it does not fail: true if it is a `bool` (`Ok(false)` is "not yet"), else
/// anything that was found.
pub trait Answer {
    /// Whether this ends the wait.
    fn holds(&self) -> bool {
        true
    }
}

impl Answer for bool {
    fn holds(&self) -> bool {
        *self
    }
}

impl Answer for () {}
impl Answer for Flanneld {}
impl Answer for SubnetEnv {}
impl Answer for f64 {}
impl Answer for String {}
impl Answer for UnixStream {}
impl Answer for Container {}
impl<T> Answer for Vec<T> {}
impl<T> Answer for BTreeSet<T> {}
impl<K, V> Answer for BTreeMap<K, V> {}

impl<T: Answer> Answer for &T {
    fn holds(&self) -> bool {
        (*self).holds()
    }
}

/// Looks until `condition` holds, and returns its value; at the deadline an error that says `what` was waited for and what was
/// seen last. A state is asked for, never an event: it does not matter when it came true.
pub fn eventually<C: Condition>(
    what: impl Display,
    deadline: Duration,
    mut condition: impl FnMut() -> C,
) -> Result<C::Value> {
    let start = Instant::now();
    let (nap, deadline) = match crate::vm::is_inside() {
        true => (NAP_EMULATED, deadline * EMULATED_FACTOR),
        false => (NAP, deadline),
    };
    loop {
        let last_look = start.elapsed() >= deadline;
        match condition().seen() {
            Ok(value) => return Ok(value),
            Err(seen) if last_look => bail!("waited {deadline:?} for: {what}\nlast seen: {seen}"),
            Err(_) => thread::sleep(nap),
        }
    }
}

/// Compares two texts line by line, in any order; an error shows what is missing and what is new.
pub fn unchanged(what: impl Display, before: &str, after: &str) -> Result<()> {
    let (before, after) = (sorted(before), sorted(after));
    if before == after {
        return Ok(());
    }
    let lines = |a: &[&str], b: &[&str]| {
        let only = a.iter().filter(|line| !b.contains(line)).copied();
        only.collect::<Vec<_>>().join("\n  ")
    };
    bail!(
        "{what} is not as before\nmissing:\n  {}\nnew:\n  {}",
        lines(&before, &after),
        lines(&after, &before)
    )
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.sort_unstable();
    lines
}

/// Sends datagrams to a port of another host, ten a second from one socket for five minutes at most, and waits until the other
/// host tracks that connection.
pub fn send_datagrams(from: &Host, to: &Host, port: u16) -> Result<Daemon> {
    const TRACKED: &str = "/proc/net/nf_conntrack";
    let send = format!(
        "exec 3<>/dev/udp/{}/{port}; while sleep 0.1; do echo hello >&3 || true; done 2>/dev/null",
        to.ip()
    );
    let sender = from.spawn("sender", &["timeout", "300", "bash", "-c", &send], &[])?;
    if to.exists(TRACKED) {
        let tracked = || to.sh(&format!("grep -q 'dport={port}' {TRACKED}"));
        eventually("the sender is tracked", secs(10), tracked)?;
    } else {
        thread::sleep(secs(1));
    }
    Ok(sender)
}

/// One echo request; an error shows what ping said. Waits a second for the answer.
pub fn ping(from: &dyn Place, to: impl Display) -> Result<()> {
    from.out(&["ping", "-n", "-c", "1", "-W", "1", &to.to_string()]).map(|_| ())
}

/// Pings until an answer comes.
pub fn ping_within(deadline: Duration, from: &dyn Place, to: impl Display) -> Result<()> {
    eventually(format!("{} reaches {to}", from.name()), deadline, || ping(from, &to))
}

/// The largest IPv4 packet (bytes, headers included) that gets through unfragmented, up to 9,000: the path's MTU.
pub fn largest_packet(from: &dyn Place, to: impl Display) -> Result<u32> {
    /// IPv4 and ICMP headers.
    const HEADERS: u32 = 28;
    let to = to.to_string();
    let wait = if crate::vm::is_inside() { "5" } else { "0.3" };
    let passes = |size: u32| -> Result<bool> {
        let payload = (size - HEADERS).to_string();
        // Two: the first too large one may only teach the path's MTU.
        let said =
            from.run(&["ping", "-n", "-M", "do", "-c", "2", "-i", "0.01", "-W", wait, "-s", &payload, &to])?;
        Ok(said.stdout.contains(" 0% packet loss"))
    };
    let (mut passed, mut failed) = (HEADERS, 9001);
    if !passes(passed)? {
        bail!("{}: {to} does not answer at all", from.name());
    }
    while failed - passed > 1 {
        let middle = passed.midpoint(failed);
        if passes(middle)? { passed = middle } else { failed = middle }
    }
    Ok(passed)
}

/// A ping that goes on until it is stopped.
#[derive(Debug)]
pub struct PingStream {
    ping: Daemon,
}

/// What a [`PingStream`] saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PingCount {
    /// Requests sent, but for a last one that was still on its way.
    pub sent: u32,
    /// Requests that were answered.
    pub received: u32,
    /// The longest time without an answer, from the first answer to the end; about the interval where nothing was lost.
    pub longest_gap: Duration,
}

impl PingCount {
    /// Requests without an answer.
    pub fn lost(&self) -> u32 {
        self.sent.saturating_sub(self.received)
    }
}

impl PingStream {
    /// Starts pinging.
    pub fn start(from: &dyn Place, to: impl Display, interval: Duration) -> Result<Self> {
        let (to, every) = (to.to_string(), format!("{:.3}", interval.as_secs_f64()));
        // -D: each answer with its time; -W: how long ping waits for the last ones after its SIGINT.
        let ping =
            from.spawn(&format!("ping-{to}"), &["ping", "-n", "-D", "-i", &every, "-W", "1", &to], &[])?;
        Ok(Self { ping })
    }

    /// Goes on until that many answers have come, for ten seconds at most; then ends it and counts.
    pub fn stop_after(self, answers: usize) -> Result<PingCount> {
        // Answers that never come show in the count.
        let _ = eventually("the answers", secs(10), || self.come() >= answers);
        self.stop()
    }

    /// Goes on until that many more answers have come, for ten seconds at most.
    pub fn more(&self, answers: usize) -> Result<()> {
        let enough = self.come() + answers;
        eventually(format!("{answers} more answers"), secs(10), || self.come() >= enough)
            .with_context(|| self.ping.tail())
    }

    fn come(&self) -> usize {
        self.ping.log().lines().filter(|line| line.starts_with('[')).count()
    }

    /// Ends it and counts.
    pub fn stop(self) -> Result<PingCount> {
        let end = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        self.ping.kill(Signal::SIGINT)?;
        self.ping.wait(secs(5))?;
        let log = self.ping.log();
        count(&log, end).with_context(|| format!("no statistics from ping:\n{log}"))
    }
}

/// One line of `ping -D`: `[1700000000.123456] 64 bytes from 10.0.0.1: icmp_seq=7 ttl=64 time=0.05 ms`, as number and time.
pub(crate) fn answer(line: &str) -> Option<(u32, f64)> {
    let (time, rest) = line.strip_prefix('[')?.split_once("] ")?;
    let (_, sequence) = rest.split_once("icmp_seq=")?;
    (rest.contains(" ttl=") && !rest.contains("DUP!")).then_some(())?;
    Some((sequence.split(' ').next()?.parse().ok()?, time.parse().ok()?))
}

/// Reads the output of `ping -D`.
fn count(log: &str, end: f64) -> Option<PingCount> {
    let answers: Vec<(u32, f64)> = log.lines().filter_map(answer).collect();
    let summary = log.lines().find(|line| line.contains(" packets transmitted"))?;
    let sent: u32 = summary.split(' ').next()?.parse().ok()?;
    let last = answers.iter().map(|(sequence, _)| *sequence).max().unwrap_or(0);
    let mut times: Vec<f64> = answers.iter().map(|(_, time)| *time).collect();
    times.push(end);
    let gap = times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
    Some(PingCount {
        sent: if sent == last + 1 { last } else { sent },
        received: u32::try_from(answers.len()).ok()?,
        longest_gap: Duration::from_secs_f64(gap),
    })
}

/// A web server in some place. It serves one text at `/`, and at `/cgi-bin/who` the address that the client seems to have.
#[derive(Debug)]
pub struct HttpServer {
    daemon: Daemon,
}

impl HttpServer {
    /// Starts one and waits until it listens.
    pub fn start(place: &dyn Place, port: u16, text: &str) -> Result<Self> {
        Self::start_at(place, ("0.0.0.0", "127.0.0.1"), port, text)
    }

    /// The same for IPv6 (and for IPv4, whose clients it sees as `::ffff:...`).
    pub fn start_v6(place: &dyn Place, port: u16, text: &str) -> Result<Self> {
        Self::start_at(place, ("[::]", "[::1]"), port, text)
    }

    fn start_at(place: &dyn Place, (listen, own): (&str, &str), port: u16, text: &str) -> Result<Self> {
        let name = format!("httpd-{port}");
        let dir = format!("/run/lab/www/{}-{port}", place.name().replace(' ', "-"));
        place.host().write(&format!("{dir}/index.html"), text)?;
        let who = "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n%s' \"$REMOTE_ADDR\"\n";
        place.host().write(&format!("{dir}/cgi-bin/who"), who)?;
        place.host().out(&["chmod", "755", &format!("{dir}/cgi-bin/who")])?;
        let listen = format!("{listen}:{port}");
        let daemon = place.spawn(&name, &["busybox", "httpd", "-f", "-p", &listen, "-h", &dir], &[])?;
        let server = Self { daemon };
        eventually(format!("{name} listens"), secs(5), || {
            if !server.daemon.alive() {
                return Ok(()); // its log says why, below
            }
            http_get(place, &format!("http://{own}:{port}/")).map(|_| ())
        })
        .context(server.daemon.tail())?;
        if !server.daemon.alive() {
            bail!("{name} ended at once\n{}", server.daemon.tail());
        }
        Ok(server)
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        self.daemon.crash()
    }
}

/// Fetches a page; waits two seconds for it.
pub fn http_get(from: &dyn Place, url: &str) -> Result<String> {
    // Not wget's own -T: Debian 12's busybox crashes on it.
    from.out(&["timeout", "2", "busybox", "wget", "-q", "-O", "-", url])
}

/// The address under which `from` appears to an [`HttpServer`]. An IPv6 server is named in brackets.
pub fn seen_as(from: &dyn Place, server: impl Display, port: u16) -> Result<String> {
    let seen = http_get(from, &format!("http://{server}:{port}/cgi-bin/who"))?;
    Ok(seen.trim_matches(['[', ']']).to_owned())
}

/// Whether a TCP connection to there opens within two seconds.
pub fn tcp_opens(from: &dyn Place, to: impl Display, port: u16) -> Result<()> {
    from.out(&["busybox", "nc", "-w", "2", &to.to_string(), &port.to_string()]).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_counted_with_their_gaps() {
        let log = "PING 10.0.0.1 (10.0.0.1) 56(84) bytes of data.\n\
            [100.000000] 64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.05 ms\n\
            [100.100000] 64 bytes from 10.0.0.1: icmp_seq=2 ttl=64 time=0.05 ms\n\
            [100.100100] 64 bytes from 10.0.0.1: icmp_seq=2 ttl=64 time=0.05 ms (DUP!)\n\
            [100.150000] From 10.0.0.2 icmp_seq=3 Destination Host Unreachable\n\
            [100.600000] 64 bytes from 10.0.0.1: icmp_seq=7 ttl=64 time=0.05 ms\n\
            \n--- 10.0.0.1 ping statistics ---\n\
            8 packets transmitted, 3 received, +1 duplicates, 50% packet loss, time 700ms\n";
        let seen = count(log, 100.65).unwrap();
        assert_eq!((seen.sent, seen.received, seen.lost()), (7, 3, 4));
        assert_eq!(seen.longest_gap.as_millis(), 500);
        assert_eq!(count(log, 102.0).unwrap().longest_gap.as_millis(), 1400);
        assert_eq!(count("ping: connect: Network is unreachable\n", 0.0), None);
    }

    #[test]
    fn a_condition_that_never_holds_says_what_was_seen() {
        let error = eventually("the moon", Duration::from_millis(20), || Option::<()>::None).unwrap_err();
        assert!(format!("{error:#}").contains("for: the moon\nlast seen: nothing"), "{error:#}");
        let mut looks = 0;
        let third = eventually("third look", secs(1), || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(third.unwrap(), 3);
    }
}
