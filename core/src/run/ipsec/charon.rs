//! A charon of ours: one that this process started, or an earlier flanneld.
//!
//! **Life** — it outlives this process, as everything does that carries packets: keys that were agreed on are agreed on still when the next
//! flanneld comes, which knows it by a note. Only when the network leaves this host is it asked to end: asked, it tells every peer that the
//! tunnels are over, and takes them from the kernel.

use std::collections::VecDeque;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use super::listener::on_one_line;

/// Where distributions put it, as upstream looks for it; the search path comes first.
const PLACES: [&str; 4] = [
    "/usr/lib/strongswan/charon",
    "/usr/lib/ipsec/charon",
    "/usr/libexec/strongswan/charon",
    "/usr/libexec/ipsec/charon",
];
/// Its note of its own process.
const PID_FILE: &str = "/var/run/charon.pid";
/// Ours of which process is ours: its number, and when it was started.
const NOTE: &str = "/run/flannel/charon";
/// What of our own environment is not its business.
const SECRET: &str = "FLANNELD_ETCD_PASSWORD";
/// How long its last words may take after its end.
const GRACE: Duration = Duration::from_millis(50);
/// How long it may take to say good-bye to every peer.
const FAREWELL_MAX: Duration = Duration::from_secs(5);
/// How often it is looked whether one that is nobody's child has ended. Its socket tells that sooner.
const LOOK: Duration = Duration::from_secs(1);

/// Of what it prints so many lines are kept, for the case that it ends.
const WORDS_MAX: usize = 5;

/// A charon of ours.
pub(super) struct Charon {
    process: Process,
    /// None for one that an earlier flanneld started.
    child: Option<Child>,
    words: Words,
}

/// A process, told from a later one with its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Process {
    id: i32,
    /// In clock ticks since the machine was started (proc(5), `starttime`).
    started: u64,
}

/// What it printed last. While it serves, its log comes by its socket and at once; what it prints comes late and is the same.
type Words = Arc<Mutex<VecDeque<String>>>;

/// The program, if this host has it.
pub(super) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let searched = std::env::split_paths(&path).map(|dir| dir.join("charon"));
    searched.chain(PLACES.iter().map(PathBuf::from)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    file.is_file() && nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// Where it is looked for, for the operator.
pub(super) fn places() -> String {
    format!("PATH, {}", PLACES.join(", "))
}

impl Process {
    /// None if there is no such process, or only what its parent has not heard of yet.
    fn of(id: i32) -> Option<Self> {
        // The name, in parentheses, may hold anything; state and the rest come behind it.
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let lives = !matches!(fields.next()?, "Z" | "X");
        let started = fields.nth(18)?.parse().ok()?;
        lives.then_some(Self { id, started })
    }

    fn lives(self) -> bool {
        Self::of(self.id) == Some(self)
    }

    fn signal(self, signal: Signal) {
        if self.lives() {
            // It may just have ended.
            let _ = kill(Pid::from_raw(self.id), signal);
        }
    }

    /// As a note has it.
    fn parse(note: &str) -> Option<Self> {
        let (id, started) = note.trim().split_once(' ')?;
        Some(Self { id: id.parse().ok()?, started: started.parse().ok()? })
    }

    fn note(self) -> String {
        format!("{} {}\n", self.id, self.started)
    }
}

impl Charon {
    /// Starts it.
    pub(super) fn start(program: &Path) -> io::Result<Self> {
        forget_the_dead();
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Of its own group, so that what ends us from a terminal does not end it.
        command.env_remove(SECRET).process_group(0);
        let mut child = command.spawn()?;
        let words = Words::default();
        if let Some(out) = child.stdout.take() {
            tokio::spawn(keep(out, words.clone()));
        }
        if let Some(err) = child.stderr.take() {
            tokio::spawn(keep(err, words.clone()));
        }
        let process = child.id().and_then(|id| Process::of(i32::try_from(id).ok()?));
        let process = process.ok_or_else(|| io::Error::other("it ended at once"))?;
        if let Err(error) = write_note(process) {
            tracing::warn!(
                "{NOTE} cannot be written, so the next flanneld takes this charon for somebody else's: {error}"
            );
        }
        Ok(Self { process, child: Some(child), words })
    }

    /// The one that an earlier flanneld started and left.
    pub(super) fn left() -> Option<Self> {
        let process = Process::parse(&std::fs::read_to_string(NOTE).ok()?)?;
        process.lives().then(|| Self { process, child: None, words: Words::default() })
    }

    pub(super) fn id(&self) -> i32 {
        self.process.id
    }

    /// Resolves when it has ended.
    pub(super) async fn ended(&mut self) -> String {
        let Some(child) = &mut self.child else {
            while self.process.lives() {
                sleep(LOOK).await;
            }
            return "it ended".to_owned();
        };
        let ended = child.wait().await;
        // What is left in the pipe is read by then.
        sleep(GRACE).await;
        let words =
            self.words.lock().map(|mut words| words.drain(..).collect::<Vec<_>>()).unwrap_or_default();
        let said = if words.is_empty() { String::new() } else { format!("; it said: {}", words.join(" | ")) };
        match ended {
            Ok(status) => how(status) + &said,
            Err(error) => format!("{error}{said}"),
        }
    }

    /// How it ended, if it has.
    pub(super) fn gone(&mut self) -> Option<String> {
        match &mut self.child {
            Some(child) => child.try_wait().ok().flatten().map(how),
            None => (!self.process.lives()).then(|| "it ended".to_owned()),
        }
    }

    /// Asks it to end, so that the peers and the kernel forget the tunnels.
    pub(super) async fn farewell(mut self) {
        self.process.signal(Signal::SIGTERM);
        if timeout(FAREWELL_MAX, self.ended()).await.is_err() {
            self.kill().await;
        }
        let _ = std::fs::remove_file(NOTE);
    }

    /// Ends it at once, for one that does not serve.
    pub(super) async fn kill(mut self) {
        self.process.signal(Signal::SIGKILL);
        let _ = timeout(FAREWELL_MAX, self.ended()).await;
    }
}

/// Whole, or not at all: half a number would be another process.
fn write_note(process: Process) -> io::Result<()> {
    let new = format!("{NOTE}.new");
    if let Some(directory) = Path::new(NOTE).parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::write(&new, process.note())?;
    std::fs::rename(&new, NOTE)
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it ended with status {code}"),
        (None, Some(signal)) => format!("it was killed by signal {signal}"),
        (None, None) => "it ended".to_owned(),
    }
}

/// charon refuses to start while a process has the number in its note, whatever that process is by now.
fn forget_the_dead() {
    let Ok(text) = std::fs::read_to_string(PID_FILE) else { return };
    let name = std::fs::read_to_string(format!("/proc/{}/comm", text.trim())).unwrap_or_default();
    if !name.starts_with("charon") {
        // Where it cannot be removed, charon says what is wrong.
        let _ = std::fs::remove_file(PID_FILE);
    }
}

async fn keep(pipe: impl AsyncRead + Unpin, words: Words) {
    let mut lines = BufReader::new(pipe).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Ok(mut words) = words.lock() {
            if words.len() == WORDS_MAX {
                words.pop_front();
            }
            words.push_back(on_one_line(&line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_its_start() {
        let own = Process::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.lives() && own.started > 0);
        assert_eq!(Process::parse(&own.note()), Some(own));
        // Somebody later with the same number.
        assert!(!Process { started: own.started + 1, ..own }.lives());
        assert_eq!(Process::of(-1), None);
        for note in ["", "12", "12 x", "x 12"] {
            assert_eq!(Process::parse(note), None, "{note}");
        }
    }

    #[test]
    fn who_has_ended_and_was_not_waited_for_does_not_live() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let id = i32::try_from(child.id()).unwrap();
        let ended = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            Process::of(id).is_none()
        });
        child.wait().unwrap();
        assert!(ended);
    }
}
