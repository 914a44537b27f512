//! One command of the operator's: run with a deadline, and its words kept within bounds.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

use crate::words::extension::{CommandLine, Errand};

/// Most that is taken of what a command prints.
const STDOUT_MAX: usize = 64 * 1024;
/// Most that is kept of what it complains.
const STDERR_MAX: usize = 2 * 1024;
/// How long after a command's end its output may still come: what it left running may hold the pipe for ever.
const GRACE: Duration = Duration::from_millis(300);
/// What of our own environment is no command's business.
const SECRET: &str = "FLANNELD_ETCD_PASSWORD";

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommandError {
    #[error("could not start {program}")]
    Start { program: String, source: io::Error },
    #[error("could not wait for it")]
    Wait(#[source] io::Error),
    #[error("it ended with {status}{said}")]
    Status { status: ExitStatus, said: Said },
    #[error("it had not ended after {} s (CommandTimeout) and was killed{said}", .deadline.as_secs())]
    Deadline { deadline: Duration, said: Said },
    #[error("it printed more than {STDOUT_MAX} bytes")]
    Long,
    #[error("what it printed is not UTF-8")]
    Text,
}

/// What a command wrote to stderr, as part of a line of ours.
#[derive(Debug, Default)]
pub(super) struct Said(String);

impl Said {
    fn of(kept: &Kept) -> Self {
        let text = String::from_utf8_lossy(&kept.bytes);
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let more = if kept.over { " ..." } else { "" };
        Self(lines.join(" | ") + more)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.is_empty() {
            true => Ok(()),
            false => write!(f, "; it said: {}", self.0.escape_debug()),
        }
    }
}

/// Runs a command. What it prints comes back without white space around it, as upstream takes it.
pub(super) async fn run(
    line: &CommandLine,
    errand: &Errand,
    deadline: Duration,
) -> Result<(String, Said), CommandError> {
    let (program, mut command) = match line {
        CommandLine::Shell(line) => ("sh", command("sh", &["-c", line])),
        CommandLine::Argv(words) => {
            let (program, arguments) =
                words.split_first().map_or(("", words.as_slice()), |(p, a)| (p.as_str(), a));
            (program, command(program, arguments))
        }
    };
    let started = command.envs(&errand.variables).spawn();
    let mut child = started.map_err(|source| CommandError::Start { program: program.to_owned(), source })?;
    let mut group = Group(child.id());
    let (mut stdout, mut stderr) = (Kept::new(STDOUT_MAX), Kept::new(STDERR_MAX));
    let (stdin, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let status = {
        let feed = async {
            if let Some(mut stdin) = stdin {
                // Many a command does not read what it is told.
                let _ = stdin.write_all(format!("{}\n", errand.input).as_bytes()).await;
            }
        };
        let talk = async { tokio::join!(feed, stdout.take(out), stderr.take(err)) };
        tokio::pin!(talk);
        let mut silent = false;
        let ended = timeout(deadline, async {
            loop {
                tokio::select! {
                    status = child.wait() => break status,
                    _ = &mut talk, if !silent => silent = true,
                }
            }
        });
        let ended = ended.await;
        if ended.is_err() {
            group.kill();
        }
        if !silent {
            // What is left open then is a daemon's that the command left behind.
            let _ = timeout(GRACE, &mut talk).await;
        }
        ended
    };
    let said = Said::of(&stderr);
    match status {
        Err(_) => {
            // Killed, so it does not take long; else it is reaped when this process ends.
            let _ = timeout(GRACE, child.wait()).await;
            Err(CommandError::Deadline { deadline, said })
        }
        Ok(status) => {
            group.0 = None;
            let status = status.map_err(CommandError::Wait)?;
            if !status.success() {
                return Err(CommandError::Status { status, said });
            }
            stdout.text().map(|text| (text, said))
        }
    }
}

fn command(program: &str, arguments: &[impl AsRef<std::ffi::OsStr>]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).env_remove(SECRET).process_group(0).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A command and what it started, as long as it has not ended; killed when dropped.
struct Group(Option<u32>);

impl Group {
    fn kill(&mut self) {
        if let Some(id) = self.0.take().and_then(|id| i32::try_from(id).ok()) {
            // It may just have ended.
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The beginning of what comes through a pipe.
struct Kept {
    bytes: Vec<u8>,
    max: usize,
    over: bool,
}

impl Kept {
    const fn new(max: usize) -> Self {
        Self { bytes: Vec::new(), max, over: false }
    }

    /// Reads to the end, so that nobody waits for a full pipe.
    async fn take(&mut self, pipe: Option<impl AsyncRead + Unpin>) {
        let Some(mut pipe) = pipe else { return };
        let mut buffer = [0; 4096];
        while let Ok(len) = pipe.read(&mut buffer).await {
            if len == 0 {
                return;
            }
            let room = self.max.saturating_sub(self.bytes.len()).min(len);
            self.over |= room < len;
            self.bytes.extend(buffer.iter().take(room));
        }
    }

    fn text(self) -> Result<String, CommandError> {
        if self.over {
            return Err(CommandError::Long);
        }
        String::from_utf8(self.bytes).map(|text| text.trim().to_owned()).map_err(|_| CommandError::Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn shell(line: &str) -> CommandLine {
        CommandLine::Shell(line.to_owned())
    }

    fn ran(line: &CommandLine, deadline: Duration) -> Result<(String, String), String> {
        let errand = Errand {
            variables: [("SUBNET".to_owned(), "10.1.2.0/24; echo $HOME".to_owned())].into(),
            input: "from a peer $(id)".to_owned(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ran = runtime.block_on(run(line, &errand, deadline));
        ran.map(|(text, said)| (text, said.to_string())).map_err(|error| error.to_string())
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn values_are_values_in_both_forms() {
        let said = ran(&shell("echo \"$SUBNET\"; echo oh >&2; cat"), LONG).unwrap();
        assert_eq!(
            said,
            ("10.1.2.0/24; echo $HOME\nfrom a peer $(id)".to_owned(), "; it said: oh".to_owned())
        );
        let argv = CommandLine::Argv(["printf", "%s", "a b; $SUBNET"].map(str::to_owned).to_vec());
        assert_eq!(ran(&argv, LONG).unwrap().0, "a b; $SUBNET");
    }

    #[test]
    fn failures_say_what_the_command_said() {
        assert_eq!(
            ran(&shell("echo no such thing >&2; exit 3"), LONG).unwrap_err(),
            "it ended with exit status: 3; it said: no such thing"
        );
        assert_eq!(
            ran(&CommandLine::Argv(vec!["/no/such".into()]), LONG).unwrap_err(),
            "could not start /no/such"
        );
        assert_eq!(
            ran(&shell("head -c 100000 /dev/zero"), LONG).unwrap_err(),
            "it printed more than 65536 bytes"
        );
        assert_eq!(ran(&shell("printf '\\377'"), LONG).unwrap_err(), "what it printed is not UTF-8");
        let noisy = ran(&shell("head -c 1000000 /dev/zero | tr '\\0' x >&2; false"), LONG).unwrap_err();
        assert!(noisy.len() < STDERR_MAX + 100 && noisy.ends_with("x ..."), "{noisy}");
    }

    #[test]
    fn what_hangs_is_killed_with_all_it_started() {
        let started = Instant::now();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let line = format!("sleep 1000 & echo $! > {}; wait", file.display());
        let error = ran(&shell(&line), Duration::from_secs(1)).unwrap_err();
        assert_eq!(error, "it had not ended after 1 s (CommandTimeout) and was killed");
        assert!(started.elapsed() < Duration::from_secs(30));
        let pid = std::fs::read_to_string(file).unwrap();
        // A signal is sent at once and taken when the process next runs.
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        let ended = |state: &str| state.is_empty() || state.contains(") Z ") || state.contains(") X ");
        while !ended(&state()) && started.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(ended(&state()), "{}", state());
    }

    #[test]
    fn a_daemon_left_behind_holds_nobody_up() {
        let started = Instant::now();
        let (pid, _) = ran(&shell("sleep 1000 & echo $!"), LONG).unwrap();
        assert!(started.elapsed() < Duration::from_secs(30));
        let pid = Pid::from_raw(pid.parse().unwrap());
        // It lives: that it can be killed shows it.
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    }
}
