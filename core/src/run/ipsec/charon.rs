//! charon as a child of this process.
//!
//! **Life** — it dies with this process and is killed outright, not asked to end: asked, it would tell every peer that the tunnels are
//! over, and take them from the kernel. So the kernel's associations carry packets on while there is no charon, until the next one
//! has agreed on new ones with the peers. Only when the network leaves this host is it asked.

use std::collections::VecDeque;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid, getppid};
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
/// What of our own environment is not its business.
const SECRET: &str = "FLANNELD_ETCD_PASSWORD";
/// How long its last words may take after its end.
const GRACE: Duration = Duration::from_millis(50);
/// How long it may take to say good-bye to every peer.
const FAREWELL_MAX: Duration = Duration::from_secs(5);

/// Of what it prints so many lines are kept, for the case that it ends.
const WORDS_MAX: usize = 5;

/// A charon of ours.
pub(super) struct Charon {
    child: Child,
    words: Words,
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

impl Charon {
    /// Starts it.
    #[expect(unsafe_code, reason = "a child can be told to die with its parent between fork and exec only")]
    pub(super) fn start(program: &Path) -> io::Result<Self> {
        forget_the_dead();
        let parent = getpid();
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env_remove(SECRET).process_group(0).kill_on_drop(true);
        // SAFETY: two system calls that take numbers; nothing is allocated and no lock is taken.
        unsafe {
            command.pre_exec(move || {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                // It may be too late for that.
                if getppid() == parent { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
            });
        }
        let mut child = command.spawn()?;
        let words = Words::default();
        if let Some(out) = child.stdout.take() {
            tokio::spawn(keep(out, words.clone()));
        }
        if let Some(err) = child.stderr.take() {
            tokio::spawn(keep(err, words.clone()));
        }
        Ok(Self { child, words })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// Resolves when it has ended.
    pub(super) async fn ended(&mut self) -> String {
        let ended = self.child.wait().await;
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
        self.child.try_wait().ok().flatten().map(how)
    }

    /// Asks it to end, so that the peers and the kernel forget the tunnels.
    pub(super) async fn farewell(mut self) {
        if let Some(id) = self.child.id().and_then(|id| i32::try_from(id).ok()) {
            // It may just have ended.
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        if timeout(FAREWELL_MAX, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
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
