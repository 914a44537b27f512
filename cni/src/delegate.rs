//! Another plugin does the work: the one place where this binary starts a process. As upstream does it, for delegates other
//! than a bridge with host-local.

use std::env;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::result::CniError;

/// How many of us are above, each executed by the one before: two configurations may send each other round for ever.
const DEPTH: &str = "FLANNEL_CNI_DEPTH";
/// flannel, bridge and host-local are two deep.
const DEPTH_MAX: u32 = 4;

/// Runs a plugin with our environment and this configuration. `verb` replaces CNI_COMMAND, if it is another than
/// ours. The answer is what the plugin printed; what it says on stderr is passed on.
pub(crate) fn run(
    kind: &str,
    path: &[PathBuf],
    verb: Option<&str>,
    conf: &Value,
) -> Result<Vec<u8>, CniError> {
    let depth = env::var(DEPTH).ok().and_then(|depth| depth.parse().ok()).unwrap_or(0_u32);
    if depth >= DEPTH_MAX {
        return Err(CniError::config(format!(
            "{kind:?} is executed by a plugin that was executed by a plugin, {depth} deep: do they name each other, or are they one file?"
        )));
    }
    let plugin = find(kind, path)?;
    let failed = |error: io::Error| {
        CniError::new(CniError::INPUT, format!("could not run {}", plugin.display()))
            .with_details(error.to_string())
    };
    let mut command = Command::new(&plugin);
    command.env(DEPTH, (depth + 1).to_string());
    if let Some(verb) = verb {
        command.env("CNI_COMMAND", verb);
    }
    let mut child = start(command.stdin(Stdio::piped()).stdout(Stdio::piped())).map_err(failed)?;
    // Taken, so that it is closed before we wait. A plugin that does not read (VERSION) breaks the pipe, and may.
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(conf.to_string().as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(failed(error)),
            _ => {}
        }
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(explain(&plugin, &output.stdout).unwrap_or_else(|| {
        CniError::new(CniError::INPUT, format!("{} failed: {}", plugin.display(), output.status))
    }))
}

/// A file that somebody is just writing cannot be executed; as libcni does, it is waited for.
fn start(command: &mut Command) -> io::Result<Child> {
    const TRIES: u32 = 20;
    for _ in 1..TRIES {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                thread::sleep(Duration::from_millis(100));
            }
            other => return other,
        }
    }
    command.spawn()
}

/// Whether the plugin of that name is the file that runs right now.
pub(crate) fn is_this_file(kind: &str, path: &[PathBuf]) -> bool {
    let identity = |file: &Path| fs::metadata(file).map(|meta| (meta.dev(), meta.ino())).ok();
    let own = identity(Path::new("/proc/self/exe"));
    own.is_some() && find(kind, path).is_ok_and(|plugin| identity(&plugin) == own)
}

/// The first regular file of that name.
fn find(kind: &str, path: &[PathBuf]) -> Result<PathBuf, CniError> {
    let found = Some(kind)
        .filter(|kind| !kind.contains('/'))
        .and_then(|kind| path.iter().map(|dir| dir.join(kind)).find(|file| file.is_file()));
    found.ok_or_else(|| {
        let path: Vec<_> = path.iter().map(|dir| dir.display().to_string()).collect();
        CniError::new(
            CniError::CONFIG,
            format!("failed to find plugin {kind:?} in path [{}]", path.join(" ")),
        )
    })
}

/// What a failed plugin printed, in its own words.
fn explain(plugin: &Path, stdout: &[u8]) -> Option<CniError> {
    let error: Value = serde_json::from_slice(stdout).ok()?;
    let text =
        |key| error.get(key).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
    let code = error.get("code").and_then(Value::as_u64).and_then(|code| u32::try_from(code).ok())?;
    let msg = text("msg").unwrap_or_default();
    Some(CniError {
        code,
        msg: format!("failed to delegate to {}: {msg}", plugin.display()),
        details: text("details"),
    })
}
