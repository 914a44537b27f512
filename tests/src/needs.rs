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

/// What one kernel has and another lacks.
#[derive(Debug, Clone, Copy)]
pub struct Ability {
    name: &'static str,
    /// Fails without it, in a network namespace that goes away afterwards.
    probe: &'static str,
}

/// WireGuard in the kernel.
pub const WIREGUARD: Ability = Ability { name: "WireGuard", probe: "ip link add type wireguard" };
/// Devices of type ipip.
pub const IPIP: Ability = Ability { name: "ipip", probe: "ip link add probe type ipip local 192.0.2.1" };
/// IPsec, and packets that it encrypts.
pub const ESP: Ability = Ability {
    name: "ESP",
    probe: "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 1 mode tunnel enc 'ecb(cipher_null)' ''",
};
/// Bridges that keep VLANs apart.
pub const BRIDGE_VLANS: Ability =
    Ability { name: "CONFIG_BRIDGE_VLAN_FILTERING", probe: "ip link add type bridge vlan_filtering 1" };
/// SCTP, as a protocol of its own sockets.
pub const SCTP: Ability =
    Ability { name: "SCTP", probe: "modprobe -q sctp 2>/dev/null; test -e /proc/sys/net/sctp" };

/// Whether the machine's kernel has it; says that it lacks it otherwise.
pub fn require_kernel(ability: Ability) -> bool {
    has(ability)
        || skipped(&format!("{} in its kernel (`make vm` runs this test with Debian's)", ability.name))
}

/// The same without a word.
pub fn has(ability: Ability) -> bool {
    let mut probe = Command::new("unshare");
    probe.args(["--net", "sh", "-c", ability.probe]).stdin(Stdio::null());
    probe.output().is_ok_and(|said| said.status.success())
}

/// Reports by name that this run leaves a test out, and who does not; where skips are not wanted, too, because nothing is lacking.
pub fn left_out(why: &str) {
    tell(&format!("left out: {}: {why}", test_name()));
}

/// Reports a skip by name; always false, or a failure where skips are not wanted.
///
/// # Panics
/// Where `FLANNEL_TESTS_NO_SKIP` is set.
pub fn skipped(lack: &str) -> bool {
    let message = format!("skipped: {}: this machine lacks {lack}", test_name());
    assert!(env::var_os(NO_SKIP_VARIABLE).is_none_or(|v| v == "0"), "{message}");
    tell(&message);
    false
}

/// On stderr and, because a test runner may keep to itself what a passing test says, in a file that is shown at the end.
fn tell(message: &str) {
    eprintln!("{message}");
    if let Some(log) = env::var_os(SKIP_LOG_VARIABLE) {
        let file = OpenOptions::new().create(true).append(true).open(log);
        let _ = file.and_then(|mut file| writeln!(file, "{message}"));
    }
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
