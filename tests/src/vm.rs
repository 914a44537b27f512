//! A virtual machine with Debian's kernel, for what the kernel of this machine may lack: ipip, wireguard, ESP, SCTP, bridges
//! that filter VLANs.
//!
//! # What it is
//! qemu boots the kernel that `tests/setup-vm` unpacked below [`KERNEL_DIR`]. Its root is this machine's own, read-only, under a layer
//! in memory: every program and the binaries under test are where they are here, a whole [`Lab`](crate::Lab) runs inside, and
//! nothing that happens there changes anything here. It has no network card. Modules are loaded when the kernel asks for
//! them. Without hardware support (mostly) it is emulated: a command takes five to ten times its time, a boot some seconds.
//!
//! # To add a scene
//! A scene is a test like any other that `needs` something of the kernel; where that is missing it is skipped by name.
//!
//! 1. `#[test] fn three_hosts() { in_lab(Lab::new("ipip").hosts(3).etcd().needs_kernel(needs::IPIP), |lab| ...) }`;
//! 2. its binary has a test `on_debians_kernel` that says [`again`]`(&["three_hosts"], ...)`: `make vm` runs all tests of this name, and
//!    each boots once and runs those that it names, one after the other. Inside, what a test needs and does not find is a failure;
//! 3. one of them by hand, or any other program (`tests/setup-vm` once, before): `target/debug/in_vm target/debug/deps/vm-HASH
//!    --exact ipip::three_hosts --nocapture`;
//!    While it runs, `/tmp/flannel-vm.*/said` has what it says;
//! 4. deadlines of [`eventually`](crate::eventually) are ten times as long inside.
//!
//! **Measured** (2 processors, emulated, a busy machine): a boot 10 to 20 s, three hosts with etcd and flanneld until every pod
//! reached every other 65 s. So this is not part of the ordinary run.
//!
//! # How it ends
//! qemu is killed at the deadline, and by the kernel when the thread that started it ends. It leaves nothing but its temporary directory, which goes
//! with the test.

mod initrd;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::binaries::BIN_DIR_VARIABLE;
use crate::command::{self, Output};
use crate::needs;

/// Where `tests/setup-vm` put the kernel and its modules.
pub const KERNEL_DIR: &str = "/var/cache/flannel-tests/kernel";

/// How long everything in one boot may take unless somebody says otherwise.
pub const DEADLINE: Duration = Duration::from_secs(1200);

/// Set inside.
pub const INSIDE_VARIABLE: &str = "FLANNEL_TESTS_VM";

const QEMU: &str = "qemu-system-x86_64";

/// The guest says with it how its command ended.
const EXIT: &str = "flannel-vm-exit ";

/// How much of what the guest and its kernel said an error shows.
const TAIL: usize = 20_000;

/// Whether this runs inside of one.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE_VARIABLE).is_some()
}

/// Runs tests of this binary again, inside, where their kernel lacks nothing, and fails if one of them does; each of the names is
/// that of a test, or the beginning or another part of some names. Only where there is time (`FLANNEL_TESTS_LONG=1`), by name left out otherwise.
///
/// # Panics
/// If a test fails, if a name is nobody's, or if all together are not done by the deadline.
pub fn again(names: &[&str], deadline: Duration) {
    if std::env::var_os("FLANNEL_TESTS_LONG").is_none_or(|long| long == "0") {
        return needs::left_out("an emulated machine takes minutes; `make vm` runs it");
    }
    if !Vm::can_run() {
        return;
    }
    let binary = std::env::current_exe().expect("this test's binary").display().to_string();
    // One after the other: the processors are emulated, and tests time what they see. What is read below is not colored, although
    // the guest's console is a terminal.
    let argv = [&[&*binary, "--test-threads=1", "--show-output", "--color=never"], names].concat();
    let mut vm = Vm::default().deadline(deadline);
    if let Ok(dir) = std::env::var(BIN_DIR_VARIABLE) {
        vm = vm.env(BIN_DIR_VARIABLE, &dir);
    }
    let ended = vm.run(&argv).unwrap_or_else(|error| panic!("{error:#}"));
    eprintln!("{}", ended.stdout);
    assert!(ended.ok(), "{ended}");
    for name in names {
        let passed =
            |line: &str| line.starts_with("test ") && line.contains(name) && line.ends_with("... ok");
        assert!(ended.stdout.lines().any(passed), "no test {name} ran: {ended}");
    }
}

/// A machine to run one command in.
#[derive(Debug, Clone)]
pub struct Vm {
    memory_mib: u32,
    processors: u32,
    deadline: Duration,
    env: Vec<(String, String)>,
}

impl Default for Vm {
    fn default() -> Self {
        Self { memory_mib: 1536, processors: 2, deadline: DEADLINE, env: Vec::new() }
    }
}

impl Vm {
    /// Whether this machine can run one; skips by name otherwise.
    pub fn can_run() -> bool {
        needs::require_root_and_namespaces()
            && [QEMU, "setpriv", "modprobe"].iter().all(|program| needs::require(program))
            && (Path::new(KERNEL_DIR).join("vmlinuz").exists()
                || needs::skipped("a kernel for the virtual machine"))
    }

    /// How long the command may take, with the boot.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Puts a variable into the command's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Boots, runs the command in the current directory, and shuts down. Its two streams come as one; an error if there is no exit code:
    /// the kernel did not boot, or the deadline passed.
    pub fn run(&self, argv: &[&str]) -> Result<Output> {
        let label = format!("vm: {}", argv.join(" "));
        let dir =
            tempfile::Builder::new().prefix("flannel-vm.").tempdir().context("no temporary directory")?;
        let kernel = Path::new(KERNEL_DIR);
        let file = |name: &str| dir.path().join(name);
        fs::write(file("initrd"), initrd::make(kernel, &self.script(argv)?)?)?;
        let ended = command::run(&mut self.qemu(kernel, dir.path()), &label, self.deadline);
        let read =
            |name: &str| String::from_utf8_lossy(&fs::read(file(name)).unwrap_or_default()).into_owned();
        let (said, console) = (read("said").replace("\r\n", "\n"), read("console"));
        let shown = || format!("{}\n--- console\n{}", end_of(&said), end_of(&console));
        let ended = ended.with_context(|| format!("it said:\n{}", shown()))?;
        let Some((said, code)) = said.rsplit_once(EXIT) else {
            bail!("the virtual machine ended without an exit code: {ended}\n{}", shown());
        };
        let code = code.trim().parse().with_context(|| format!("an exit code was expected: {code:?}"))?;
        Ok(Output { command: label, code, stdout: said.to_owned(), stderr: ended.stderr })
    }

    /// `setpriv` has the kernel kill qemu when the thread that starts it ends, however that happens.
    fn qemu(&self, kernel: &Path, dir: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", QEMU]);
        // An emulated timer may be late on a busy machine; without no_timer_check the kernel gives up on it.
        let append = "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off random.trust_cpu=on systemd.unified_cgroup_hierarchy=1";
        let accelerator = if hardware_helps() { "kvm" } else { "tcg,thread=multi,tb-size=512" };
        let processor = if hardware_helps() { "host" } else { "max" };
        let (memory, processors) = (self.memory_mib.to_string(), self.processors.to_string());
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
                "-monitor",
                "none",
                "-nic",
                "none",
            ])
            .args(["-M", "pc", "-accel", accelerator, "-cpu", processor, "-m", &memory, "-smp", &processors])
            .arg("-kernel")
            .arg(kernel.join("vmlinuz"))
            .arg("-initrd")
            .arg(dir.join("initrd"))
            .args(["-append", append])
            .args(["-serial", &format!("file:{}", dir.join("console").display())])
            .args(["-serial", &format!("file:{}", dir.join("said").display())])
            .args(["-device", "virtio-rng-pci"])
            .args([
                "-virtfs",
                "local,path=/,mount_tag=host,security_model=passthrough,readonly=on,multidevs=remap",
            ])
            .stdin(Stdio::null());
        command
    }

    /// What the guest's process 1 runs: the command, in this directory, with this environment.
    fn script(&self, argv: &[&str]) -> Result<String> {
        let mut script = format!("cd {}\n", quoted(&std::env::current_dir()?.display().to_string()));
        let own = [(INSIDE_VARIABLE, "1"), (needs::NO_SKIP_VARIABLE, "1")];
        let own = own.iter().map(|(name, value)| (*name, *value));
        for (name, value) in own.chain(self.env.iter().map(|(name, value)| (name.as_str(), value.as_str()))) {
            script.push_str(&format!("export {name}={}\n", quoted(value)));
        }
        script.push_str(&argv.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "));
        script.push('\n');
        Ok(script)
    }
}

/// What an error shows of a long text.
fn end_of(text: &str) -> &str {
    text.get(text.floor_char_boundary(text.len().saturating_sub(TAIL))..).unwrap_or_default()
}

/// A word that a shell takes as it is.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Whether the processor runs a guest by itself: /dev/kvm alone says nothing of what it takes as a guest.
fn hardware_helps() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let able = flags
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split(' ').any(|flag| flag == "vmx" || flag == "svm"));
    able && PathBuf::from("/dev/kvm").exists()
}
