//! A host of the lab: namespaces kept by one process, and what a test does there.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::Groups;
use crate::command::{self, COMMAND_DEADLINE, Output};
use crate::daemon::{self, Daemon};

const SETUP: &str = include_str!("lab/setup.sh");

/// Search path inside a host: the binaries under test come first.
const PATH: &str = "/run/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The binaries under test, as every host sees them.
pub const BIN_DIR: &str = "/run/lab/bin";

/// A directory that all hosts of a lab share, as every host sees it: for the embedded store.
pub const SHARED_DIR: &str = "/run/lab/shared";

/// Where commands can be run: a [`Host`], or a [`Container`](crate::Container) on one. Probes take any of them.
pub trait Place: Sync {
    /// Name for messages.
    fn name(&self) -> String;

    /// The host it is, or is on.
    fn host(&self) -> &Host;

    /// A command that will run there once it is started.
    fn enter(&self, argv: &[&str]) -> Command;

    /// Runs a command there; an error only when it could not be run or took longer than `deadline`.
    fn run_for(&self, deadline: Duration, argv: &[&str]) -> Result<Output> {
        let mut command = self.enter(argv);
        command.stdin(Stdio::null());
        command::run(&mut command, &format!("{}: {}", self.name(), argv.join(" ")), deadline)
    }

    /// Same with the deadline of a minute.
    fn run(&self, argv: &[&str]) -> Result<Output> {
        self.run_for(COMMAND_DEADLINE, argv)
    }

    /// Runs a command that must succeed, returns what it printed (trimmed).
    fn out(&self, argv: &[&str]) -> Result<String> {
        self.run(argv)?.text()
    }

    /// Runs a shell script that must succeed (`sh -e`), returns what it printed (trimmed).
    fn sh(&self, script: &str) -> Result<String> {
        self.out(&["sh", "-ec", script])
    }

    /// Starts a program that stays. `name` names its log; spawned again under the same name, it appends to it.
    fn spawn(&self, name: &str, argv: &[&str], env: &[(&str, &str)]) -> Result<Daemon> {
        let place = self.name();
        let host = self.host();
        // A container's log lies with its host's and carries both names.
        let file =
            if place == host.name() { name.to_owned() } else { format!("{place} {name}").replace(' ', "-") };
        let log = host.0.log_dir.join(format!("{file}.log"));
        let file = OpenOptions::new().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("could not open {}", log.display()))?;
        let log_start = file.metadata()?.len();
        let mut command = self.enter(argv);
        command.envs(env.iter().copied()).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child =
            command.spawn().with_context(|| format!("{place}: could not start `{}`", argv.join(" ")))?;
        Daemon::adopt(&place, name, child, log, log_start)
    }
}

/// A host: its own net, mount, uts, ipc, pid and cgroup namespaces, with its own /run, /var/lib, /var/log, /etc, /opt.
/// Cheap to clone; all clones are the same host, which lives as long as its lab.
#[derive(Clone)]
pub struct Host(Arc<Node>);

struct Node {
    name: String,
    ip: Option<Ipv4Addr>,
    ip6: Option<Ipv6Addr>,
    /// Process 1 of the host, as the machine counts.
    pid: i32,
    /// The machine's process that made the namespaces; it ends when process 1 has ended and everything with it.
    parent: Mutex<Child>,
    join_files: String,
    log_dir: PathBuf,
}

/// What a node is to be; see `lab/setup.sh` for what becomes of it.
#[derive(Debug, Clone)]
pub(crate) struct Spec<'a> {
    pub(crate) lab: &'a str,
    pub(crate) name: &'a str,
    /// With its own /etc, /var/lib and so on, and cgroups: runs engines.
    pub(crate) host: bool,
    pub(crate) ip: Option<Ipv4Addr>,
    pub(crate) ip6: Option<Ipv6Addr>,
    pub(crate) ip_forward: bool,
    pub(crate) rp_filter: u8,
    pub(crate) bin_dir: &'a Path,
    pub(crate) shared_dir: &'a Path,
    pub(crate) log_dir: PathBuf,
    /// After so long the node ends whatever happens.
    pub(crate) time_to_live: Duration,
}

/// A node on its way up: the process is started, nothing was waited for.
pub(crate) struct Starting {
    child: Child,
    groups: Groups,
    name: String,
    ip: Option<Ipv4Addr>,
    ip6: Option<Ipv6Addr>,
    log_dir: PathBuf,
}

impl Starting {
    /// Starts making a node. `life` is the end of a pipe whose other end the lab keeps: when that closes, the node ends.
    pub(crate) fn begin(spec: &Spec<'_>, life: Stdio) -> Result<Self> {
        fs::create_dir_all(&spec.log_dir)?;
        let groups = if spec.host { Groups::create(spec.lab, spec.name)? } else { Groups::default() };
        let seconds = spec.time_to_live.as_secs().to_string();
        let mut command = Command::new("timeout");
        command
            .args(["-s", "KILL", &seconds])
            // The shell joins the groups first, so that they become the roots of the cgroup namespace.
            .args(["sh", "-ec", r#"for f in $JOIN; do echo $$ > "$f"; done; exec "$@""#, "lab"])
            // `--kill-child` ends the node when `timeout` ends `unshare`.
            .args([
                "unshare",
                "--mount",
                "--net",
                "--uts",
                "--ipc",
                "--pid",
                "--cgroup",
                "--fork",
                "--kill-child",
            ])
            .args(["--propagation", "private", "sh", "-c", SETUP, "lab-init"])
            .env_clear()
            .env("PATH", PATH)
            .env("NODE", spec.name)
            .env("KIND", if spec.host { "host" } else { "plain" })
            .env("BIN_DIR", spec.bin_dir)
            .env("SHARED_DIR", spec.shared_dir)
            .env("CGROUPS_V1", groups.v1_mounts())
            .env("CGROUP_V2", groups.v2_mount())
            .env("JOIN", groups.join_files())
            .env("IP_FORWARD", u8::from(spec.ip_forward).to_string())
            .env("RP_FILTER", spec.rp_filter.to_string())
            .current_dir("/")
            .stdin(life)
            .stdout(Stdio::piped())
            .stderr(fs::File::create(spec.log_dir.join(INIT_LOG))?)
            .process_group(0);
        let child = command.spawn().context("could not start `timeout` to make a node")?;
        let (name, log_dir) = (spec.name.to_owned(), spec.log_dir.clone());
        Ok(Self { child, groups, name, ip: spec.ip, ip6: spec.ip6, log_dir })
    }

    /// Waits until the node is set up.
    pub(crate) fn finish(mut self) -> Result<Host> {
        let mut line = String::new();
        if let Some(stdout) = self.child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let Some(pid) = line.strip_prefix("ready ").and_then(|pid| pid.trim().parse().ok()) else {
            command::kill_group(&self.child);
            self.child.wait()?;
            let said = fs::read_to_string(self.log_dir.join(INIT_LOG)).unwrap_or_default();
            bail!("could not set up node {}: {}", self.name, said.trim());
        };
        self.groups.make_room()?;
        Ok(Host(Arc::new(Node {
            name: self.name,
            ip: self.ip,
            ip6: self.ip6,
            pid,
            parent: Mutex::new(self.child),
            join_files: self.groups.join_files(),
            log_dir: self.log_dir,
        })))
    }
}

const INIT_LOG: &str = "init.log";

/// Enters the host's groups, then what follows (nsenter into its namespaces).
const JOIN_AND_ENTER: &str = r#"for f in $0; do echo $$ > "$f"; done; exec "$@""#;

impl Place for Host {
    fn name(&self) -> String {
        self.0.name.clone()
    }

    fn host(&self) -> &Host {
        self
    }

    fn enter(&self, argv: &[&str]) -> Command {
        let mut command = Command::new("/bin/sh");
        let pid = self.0.pid.to_string();
        command
            .args(["-ec", JOIN_AND_ENTER, &self.0.join_files])
            .args(["nsenter", "-t", &pid, "-m", "-n", "-u", "-i", "-p", "-C", "--"])
            .args(argv)
            .env_clear()
            .envs([("PATH", PATH), ("HOME", "/root"), ("LANG", "C.UTF-8"), ("TMPDIR", "/run/lab/tmp")])
            .envs([
                ("ETCDCTL_API", "3"),
                ("DOCKER_CONFIG", "/run/lab/docker-cli"),
                ("LAB_HOST", &self.0.name),
            ])
            .current_dir("/")
            .process_group(0);
        command
    }
}

impl Host {
    /// The same in one of its named network namespaces (`ip netns`).
    pub fn enter_netns(&self, name: &str, argv: &[&str]) -> Command {
        let net = format!("--net=/run/netns/{name}");
        self.enter(&[&["nsenter", &net, "--"], argv].concat())
    }
}

/// The blocks of a text, each up to and with a line that `ends` it, that have a line which is more than `frame`.
fn blocks_that_say_something(
    text: &str,
    ends: impl Fn(&str) -> bool,
    frame: impl Fn(&str) -> bool,
) -> String {
    let (mut kept, mut block) = (String::new(), Vec::new());
    for line in text.lines() {
        block.push(line);
        if ends(line) {
            if !block.iter().all(|line| frame(line)) {
                block.iter().for_each(|line| kept.extend([line, "\n"]));
            }
            block.clear();
        }
    }
    kept.extend(block.iter().flat_map(|line| [line, "\n"]));
    kept
}

// The same names again as methods of its own, so that a test need not import the trait.
impl Host {
    /// Its name: `h1`, `h2`, …
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its address on the underlay (eth0).
    ///
    /// # Panics
    /// For the switch, which has none.
    pub fn ip(&self) -> Ipv4Addr {
        self.0.ip.expect("the switch has no address")
    }

    /// Its IPv6 address on the underlay.
    ///
    /// # Panics
    /// For the switch, which has none.
    pub fn ip6(&self) -> Ipv6Addr {
        self.0.ip6.expect("the switch has no address")
    }

    /// Its process 1, as the machine counts.
    pub fn pid(&self) -> i32 {
        self.0.pid
    }

    /// Its network namespace, as a path the test can open.
    pub fn netns(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.pid).into()
    }

    /// A path of the host as the test can open it. Symbolic links with an absolute target would lead out of the host, so
    /// /var/run, the one that everybody uses, is followed here.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let inside = match inside.strip_prefix("/var/run") {
            Ok(rest) => Path::new("/run").join(rest),
            Err(_) => inside.to_owned(),
        };
        let relative = inside.strip_prefix("/").unwrap_or(&inside);
        Path::new(&format!("/proc/{}/root", self.0.pid)).join(relative)
    }

    /// Reads a file of the host.
    pub fn read(&self, inside: &str) -> Result<String> {
        fs::read_to_string(self.path(inside))
            .with_context(|| format!("{}: could not read {inside}", self.0.name))
    }

    /// Writes a file of the host; missing directories are made.
    pub fn write(&self, inside: &str, text: impl AsRef<[u8]>) -> Result<()> {
        let path = self.path(inside);
        let write = || {
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(&path, text)
        };
        write().with_context(|| format!("{}: could not write {inside}", self.0.name))
    }

    /// Whether the host has such a file or directory.
    pub fn exists(&self, inside: &str) -> bool {
        self.path(inside).exists()
    }

    /// Runs a command; an error only when it could not be run or took longer than a minute.
    pub fn run(&self, argv: &[&str]) -> Result<Output> {
        Place::run(self, argv)
    }

    /// Runs a command with a deadline of its own.
    pub fn run_for(&self, deadline: Duration, argv: &[&str]) -> Result<Output> {
        Place::run_for(self, deadline, argv)
    }

    /// Runs a command with more in its environment.
    pub fn run_env(&self, argv: &[&str], env: &[(&str, &str)]) -> Result<Output> {
        let mut command = self.enter(argv);
        command.stdin(Stdio::null()).envs(env.iter().copied());
        command::run(&mut command, &self.label(argv), COMMAND_DEADLINE)
    }

    /// Runs a command that reads `input` (an open file, a pipe).
    pub fn run_input(&self, argv: &[&str], input: impl Into<Stdio>) -> Result<Output> {
        let mut command = self.enter(argv);
        command.stdin(input);
        command::run(&mut command, &self.label(argv), COMMAND_DEADLINE)
    }

    /// Runs a command that must succeed, returns what it printed (trimmed).
    pub fn out(&self, argv: &[&str]) -> Result<String> {
        Place::out(self, argv)
    }

    /// Runs a shell script that must succeed (`sh -e`), returns what it printed (trimmed).
    pub fn sh(&self, script: &str) -> Result<String> {
        Place::sh(self, script)
    }

    /// Starts a program that stays. `name` names its log; spawned again under the same name, it appends to it.
    pub fn spawn(&self, name: &str, argv: &[&str], env: &[(&str, &str)]) -> Result<Daemon> {
        Place::spawn(self, name, argv, env)
    }

    /// Links, addresses, routes and rules as text, without what changes by itself (counters, lifetimes): equal before and
    /// after means that nothing was left behind.
    ///
    /// Chains of iptables that are empty and accept everything do not count: whoever lists them makes them.
    pub fn network_state(&self) -> Result<String> {
        let network = self.sh(
            "ip -o link | sed 's/^[0-9]*: //; s/@if[0-9]*/@if/; s/ link-netns[id]* [^ ]*//; s/state [A-Z]* //'; \
             for f in -4 -6; do ip $f -o addr | sed 's/^[0-9]*: //; s/valid_lft.*//'; ip $f rule; \
             ip $f route show table all; done; ip neigh show nud permanent; bridge fdb show | grep -v -e ^33:33 -e ^01:00:5e | sort",
        )?;
        let tables = self.sh("nft -s list ruleset")?;
        let rules = self.sh("iptables-save 2>/dev/null | grep -v '^#' | sed 's/\\[[0-9:]*\\]//'")?;
        let tables = blocks_that_say_something(
            &tables,
            |line| line == "}",
            |line| {
                let frame = line.starts_with("table ip filter {") || line.starts_with("table ip nat {");
                let frame6 = line.starts_with("table ip6 filter {") || line.starts_with("table ip6 nat {");
                let hook = line.contains(" hook ") && line.ends_with("policy accept;");
                frame
                    || frame6
                    || hook
                    || line.trim() == "}"
                    || line.trim_start().starts_with("chain ")
                    || line.trim().is_empty()
            },
        );
        let rules = blocks_that_say_something(
            &rules,
            |line| line == "COMMIT",
            |line| {
                line.starts_with('*')
                    || line == "COMMIT"
                    || (line.starts_with(':') && line.contains(" ACCEPT"))
            },
        );
        Ok(format!("{network}\n{tables}{rules}"))
    }

    /// What to look at when a test failed: the host's kernel and the ends of its logs.
    pub fn dump(&self) -> String {
        let mut text = format!("=== host {}\n", self.0.name);
        for command in [
            "ip -d -br link",
            "ip -br addr",
            "ip route show table all type unicast",
            "ip neigh",
            "bridge fdb | grep -v 33:33",
            "nft list ruleset",
            "iptables-save | grep -v '^#'",
        ] {
            let said = match Place::run_for(self, Duration::from_secs(5), &["sh", "-c", command]) {
                Ok(output) => output.all(),
                Err(error) => format!("{error:#}"),
            };
            text.push_str(&format!("--- {}: {command}\n{}\n", self.0.name, said.trim_end()));
        }
        let mut logs: Vec<PathBuf> =
            fs::read_dir(&self.0.log_dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
        logs.sort();
        for log in logs {
            let bytes = fs::read(&log).unwrap_or_default();
            let said = String::from_utf8_lossy(&bytes);
            if !said.trim().is_empty() {
                text.push_str(&format!("--- {}: {}\n{}\n", self.0.name, log.display(), daemon::tail(&said)));
            }
        }
        text
    }

    /// Whether its process 1 still runs.
    pub fn alive(&self) -> bool {
        matches!(self.0.parent.lock().unwrap_or_else(PoisonError::into_inner).try_wait(), Ok(None))
    }

    /// Ends the node, as pulling the plug would, and waits until everything in it is gone. Twice is once.
    pub(crate) fn end(&self) -> Result<()> {
        let mut parent = self.0.parent.lock().unwrap_or_else(PoisonError::into_inner);
        if parent.try_wait()?.is_none() {
            let _ = kill(Pid::from_raw(self.0.pid), Signal::SIGKILL);
        }
        // unshare ends when process 1 is reaped, and that waits for every process of the pid namespace.
        command::wait(&mut parent, END_DEADLINE)?
            .map(|_| ())
            .ok_or_else(|| anyhow!("node {} did not end within {END_DEADLINE:?}", self.0.name))
    }

    fn label(&self, argv: &[&str]) -> String {
        format!("{}: {}", self.0.name, argv.join(" "))
    }
}

/// How long a killed node may take to be gone.
const END_DEADLINE: Duration = Duration::from_secs(20);

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("name", &self.0.name)
            .field("ip", &self.0.ip)
            .field("pid", &self.0.pid)
            .finish()
    }
}
