//! A long-running program inside a host: its log, its life, what it costs.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::command;

/// How much of a log goes into an error message.
const TAIL: usize = 4000;

/// How long a program may take to be there, and a killed one to be gone.
fn deadline() -> Duration {
    Duration::from_secs(if crate::vm::is_inside() { 100 } else { 10 })
}

/// A program started with [`Host::spawn`](crate::Host::spawn). Dropping it leaves the program running: it ends with
/// [`stop`](Self::stop), [`kill`](Self::kill), or with the lab.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    host: String,
    pid: i32,
    child: Mutex<Child>,
    log: PathBuf,
    log_start: u64,
}

/// What one process has used so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Resident memory now, KiB.
    pub rss_kib: u64,
    /// Largest resident memory so far, KiB.
    pub peak_rss_kib: u64,
    /// Proportional share of memory now, KiB: shared pages are counted once among those that share them.
    pub pss_kib: u64,
    /// Processor time, user and system, seconds.
    pub cpu_seconds: f64,
}

impl Daemon {
    /// `child` is the program that entered the host (nsenter); the daemon proper is its only child.
    pub(crate) fn adopt(
        host: &str,
        name: &str,
        mut child: Child,
        log: PathBuf,
        log_start: u64,
    ) -> Result<Self> {
        let start = Instant::now();
        let pid = loop {
            if let Some(pid) = first_child(child.id()).filter(|&pid| is_itself(pid)) {
                break pid;
            }
            if child.try_wait()?.is_some() {
                break 0; // it was quicker than this look; `wait` and `log` say how it went
            }
            if start.elapsed() > deadline() {
                command::kill_group(&child);
                bail!("{host}: {name} did not start within {:?}", deadline());
            }
            thread::sleep(Duration::from_millis(1));
        };
        Ok(Self {
            name: name.to_owned(),
            host: host.to_owned(),
            pid,
            child: Mutex::new(child),
            log,
            log_start,
        })
    }

    /// The name it was spawned under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id as the machine (and so the test) counts; 0 when it ended before anybody could look.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it still runs.
    pub fn alive(&self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }

    /// Sends a signal and does not wait for what comes of it.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        if !self.alive() {
            bail!(
                "{}: {} runs no more, there is nothing to send {signal} to\n{}",
                self.host,
                self.name,
                self.tail()
            );
        }
        let send = |pid| {
            kill(Pid::from_raw(pid), signal)
                .with_context(|| format!("could not send {signal} to {}", self.name))
        };
        if signal == Signal::SIGCONT {
            // nsenter stops itself together with what it started, and has to be woken too: it reaps.
            send(self.child().id().cast_signed())?;
        }
        send(self.pid)
    }

    /// SIGTERM, then waits; returns how long it took. A program that is still there at the deadline is killed, and that is an error.
    pub fn stop(&self, deadline: Duration) -> Result<Duration> {
        let start = Instant::now();
        if self.alive() {
            self.kill(Signal::SIGTERM)?;
        }
        if self.wait_until(deadline)?.is_some() {
            return Ok(start.elapsed());
        }
        self.crash()?;
        bail!("{}: {} did not stop within {deadline:?} and was killed\n{}", self.host, self.name, self.tail())
    }

    /// SIGKILL, and waits until it is gone: a crash.
    pub fn crash(&self) -> Result<()> {
        if self.alive() {
            self.kill(Signal::SIGKILL)?;
        }
        let gone = self.wait_until(deadline())?;
        gone.map(|_| ()).ok_or_else(|| anyhow!("{}: {} does not die", self.host, self.name))
    }

    /// Waits for it to end by itself.
    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus> {
        self.wait_until(deadline)?.ok_or_else(|| {
            anyhow!("{}: {} still runs after {deadline:?}\n{}", self.host, self.name, self.tail())
        })
    }

    /// Everything this start of it has written, both streams.
    pub fn log(&self) -> String {
        read_from(&self.log, self.log_start)
    }

    /// Waits until its log contains `text`; an error when it ends first or the deadline passes.
    pub fn wait_log(&self, text: &str, deadline: Duration) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let alive = self.alive(); // asked before the log is read, so that its last words count
            if self.log().contains(text) {
                return Ok(start.elapsed());
            }
            if !alive {
                bail!("{}: {} ended without saying {text:?}\n{}", self.host, self.name, self.tail());
            }
            if start.elapsed() > deadline {
                bail!(
                    "{}: {} did not say {text:?} within {deadline:?}\n{}",
                    self.host,
                    self.name,
                    self.tail()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The end of its log, for messages.
    pub fn tail(&self) -> String {
        format!("--- log of {} on {}\n{}", self.name, self.host, tail(&self.log()))
    }

    /// Memory and processor time of this one process (not of its children).
    pub fn usage(&self) -> Result<Usage> {
        let read = |file: &str| {
            let path = format!("/proc/{}/{file}", self.pid);
            fs::read_to_string(&path).with_context(|| format!("could not read {path}"))
        };
        let (status, rollup, stat) = (read("status")?, read("smaps_rollup")?, read("stat")?);
        let kib = |text: &str, key: &str| -> Result<u64> {
            let value =
                text.lines().find_map(|l| l.strip_prefix(key)?.split_whitespace().next()?.parse().ok());
            value.with_context(|| format!("no {key} for {}", self.name))
        };
        // Fields 14 and 15 of proc_pid_stat(5), counted from behind the command, which may contain blanks.
        let after_command = stat.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default();
        let ticks: f64 =
            after_command.split(' ').skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum();
        let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100);
        Ok(Usage {
            rss_kib: kib(&status, "VmRSS:")?,
            peak_rss_kib: kib(&status, "VmHWM:")?,
            pss_kib: kib(&rollup, "Pss:")?,
            cpu_seconds: ticks / f64::from(i32::try_from(per_second)?),
        })
    }

    fn wait_until(&self, deadline: Duration) -> Result<Option<ExitStatus>> {
        command::wait(&mut self.child(), deadline)
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last part of a log, from the start of a line.
pub(crate) fn tail(log: &str) -> &str {
    let log = log.trim_end();
    let Some(mut cut) = log.len().checked_sub(TAIL) else { return log };
    while !log.is_char_boundary(cut) {
        cut += 1;
    }
    log[cut..].split_once('\n').map_or(&log[cut..], |(_, rest)| rest)
}

fn read_from(log: &Path, start: u64) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut file) = fs::File::open(log) {
        // What cannot be read is shown as far as it could be.
        let _ = file.seek(SeekFrom::Start(start)).and_then(|_| file.read_to_end(&mut bytes));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whether the process has become what it was started for, and is not still on its way into the namespaces.
fn is_itself(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| !program.ends_with("nsenter"))
}

/// A process may fork from any of its threads: all of them are asked.
fn first_child(pid: u32) -> Option<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    tasks.flatten().find_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_starts_with_a_whole_line() {
        let log = format!("{}\nlast", "ä".repeat(TAIL));
        assert_eq!(tail(&log), "last");
        assert_eq!(tail("short\n"), "short");
    }
}
