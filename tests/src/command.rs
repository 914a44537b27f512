//! Running one command to its end: captured, timed, and never left behind.

use std::fmt;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long a command may run when the test does not say.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// After a command has ended: how long a grandchild that kept its pipes may hold us up.
const PIPES_DEADLINE: Duration = Duration::from_millis(500);

/// What a finished command left: its exit code and its two streams.
#[derive(Debug, Clone)]
pub struct Output {
    /// Where and what, for messages: `h1: ip route`.
    pub command: String,
    /// Exit code; 128 + n for a command that died of signal n, as a shell counts.
    pub code: i32,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error, as text.
    pub stderr: String,
}

impl Output {
    /// Whether it exited with 0.
    pub fn ok(&self) -> bool {
        self.code == 0
    }

    /// Standard output without surrounding white space, or an error that shows everything.
    pub fn text(&self) -> Result<String> {
        if !self.ok() {
            bail!("{self}");
        }
        Ok(self.stdout.trim().to_owned())
    }

    /// Both streams, for looking for a message wherever it went.
    pub fn all(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ended with code {}", self.command, self.code)?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.trim().is_empty() {
                write!(f, "\n--- {name}\n{}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// Runs `command` (called `label` in messages) and collects what it says. It gets its own process group, so that at the
/// deadline everything it started is killed with it. Errors: it could not be started, or the deadline passed.
pub(crate) fn run(command: &mut Command, label: &str, deadline: Duration) -> Result<Output> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("could not start `{label}`"))?;
    let stdout = Stream::collect(child.stdout.take());
    let stderr = Stream::collect(child.stderr.take());
    let status = wait(&mut child, deadline)?;
    if status.is_none() {
        kill_group(&child);
        child.wait().with_context(|| format!("could not reap `{label}`"))?;
    }
    let (stdout, stderr) = (stdout.finish(), stderr.finish());
    let Some(status) = status else {
        bail!("`{label}` was still running after {deadline:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}");
    };
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(Output { command: label.to_owned(), code, stdout, stderr })
}

/// Waits for `child` up to `deadline`; `None` when it is still running then.
pub(crate) fn wait(child: &mut Child, deadline: Duration) -> Result<Option<std::process::ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().context("could not wait for a child process")? {
            return Ok(Some(status));
        }
        if start.elapsed() >= deadline {
            return Ok(None);
        }
        // Most commands take a few milliseconds; the long ones need no such attention.
        let nap = if start.elapsed() < Duration::from_millis(100) { 1 } else { 5 };
        thread::sleep(Duration::from_millis(nap));
    }
}

/// Kills the process group that `child` leads.
pub(crate) fn kill_group(child: &Child) {
    // It may be gone already, which is as good.
    let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
}

/// One stream being read by a thread of its own, so that a full pipe never blocks the command.
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    end: Receiver<()>,
}

impl Stream {
    fn collect(source: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (done, end) = channel::<()>();
        let into = Arc::clone(&bytes);
        thread::spawn(move || {
            let _done = done; // dropped at the end of the thread, which is what `finish` waits for
            let Some(mut source) = source else { return };
            let mut chunk = [0_u8; 16 * 1024];
            while let Ok(n @ 1..) = source.read(&mut chunk) {
                into.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&chunk[..n]);
            }
        });
        Self { bytes, end }
    }

    fn finish(self) -> String {
        let _ = self.end.recv_timeout(PIPES_DEADLINE);
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
