//! What a test needs of the machine, and the one way to skip: by name, saying what is missing.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::{env, thread};

/// Set to anything but `0`: a test that lacks something fails instead of being skipped (for the one job that must run all).
pub const NO_SKIP_VARIABLE: &str = "FLANNEL_TESTS_NO_SKIP";

/// A file that every skip is written to.
pub const SKIP_LOG_VARIABLE: &str = "FLANNEL_TESTS_SKIP_LOG";

/// Whether the machine lets us make the namespaces of a lab; says what is in the way otherwise.
pub fn require_root_and_namespaces() -> bool {
    static LACK: OnceLock<Option<String>> = OnceLock::new();
    match LACK.get_or_init(lack_of_namespaces) {
        Some(lack) => skipped(lack),
        None => true,
    }
}

/// Whether the machine has the program; says that it lacks it otherwise.
pub fn require(program: &str) -> bool {
    find(program) || skipped(program)
}

/// Whether the machine has the program, without a word.
pub fn find(program: &str) -> bool {
    let default = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    default.split(':').any(|dir| Path::new(dir).join(program).exists())
}

/// Reports a skip by name; always false, or a failure where skips are not wanted.
///
/// # Panics
/// Where `FLANNEL_TESTS_NO_SKIP` is set.
pub fn skipped(lack: &str) -> bool {
    let message = format!("skipped: {}: this machine lacks {lack}", test_name());
    assert!(env::var_os(NO_SKIP_VARIABLE).is_none_or(|v| v == "0"), "{message}");
    eprintln!("{message}");
    if let Some(log) = env::var_os(SKIP_LOG_VARIABLE) {
        // A test runner may keep what a passing test says to itself; this file is shown at the end.
        let file = OpenOptions::new().create(true).append(true).open(log);
        let _ = file.and_then(|mut file| writeln!(file, "{message}"));
    }
    false
}

/// The name of the running test: libtest names its threads, except where it runs the test on the first one.
fn test_name() -> String {
    let thread = thread::current();
    match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => env::args().skip_while(|a| a != "--exact").nth(1).unwrap_or_else(|| "this test".to_owned()),
    }
}

fn lack_of_namespaces() -> Option<String> {
    for program in ["ip", "unshare", "nsenter", "timeout", "mount", "bridge", "nft", "ping", "busybox"] {
        if !find(program) {
            return Some(program.to_owned());
        }
    }
    if !nix::unistd::geteuid().is_root() {
        return Some("root (run the tests with sudo)".to_owned());
    }
    let mut probe = Command::new("unshare");
    probe.args(["--mount", "--net", "--uts", "--ipc", "--pid", "--cgroup", "--fork", "true"]);
    match probe.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("namespaces ({})", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Some(format!("namespaces ({error})")),
    }
}
