//! What a container costs on its way onto the network and off it: our CNI plugin, and Debian's `bridge` with `host-local` under an
//! equivalent configuration, in turns on one host.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use flannel_tests::{BIN_DIR, Host, Lab};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde_json::{Value, json};

use crate::table::{self, median};

const DEBIAN: &str = "/usr/lib/cni";
const ROUNDS: usize = 60;
const CROWD: usize = 200;
const AT_ONCE: usize = 8;
const BATCHES: usize = 8;

/// What it may cost on a quiet machine of this kind.
const ADD_MS_MAX: f64 = 5.0;
const DEL_MS_MAX: f64 = 22.0;
const CALLS_MAX: f64 = 150.0;

/// A plugin under test with its configuration.
struct Chain {
    plugin: PathBuf,
    conf: String,
    /// Its containers' ids begin so.
    prefix: &'static str,
}

/// Medians of one situation.
#[derive(Default)]
struct Figures {
    add: Vec<f64>,
    del: Vec<f64>,
    add_cpu: Vec<f64>,
    del_cpu: Vec<f64>,
}

pub(crate) fn run() -> Result<()> {
    let lab = Lab::new("bench-cni").hosts(1).needs(&["strace", "nsenter"]);
    ensure!(lab.can_run(), "this machine lacks something");
    ensure!(
        Path::new(DEBIAN).join("bridge").exists(),
        "this machine lacks Debian's containernetworking-plugins"
    );
    let lab = lab.start()?;
    let host = lab.host(1);
    host.write(
        "/run/flannel/subnet.env",
        "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET=10.100.0.1/20\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    )?;
    let chains = chains();
    let names: Vec<String> = chains
        .iter()
        .flat_map(|chain| (0..AT_ONCE).chain(crowd()).map(|n| format!("netns add {}", chain.container(n))))
        .collect();
    host.sh(&format!("printf '{}\\n' | ip -batch -", names.join("\\n")))?;
    let mut rows = inside(host, || measure(&chains))?;
    let pairs = [chains[0].at_once(host)?, chains[1].at_once(host)?];
    rows.push(figure("8 at once, ADD and DEL pairs", "/s", pairs[0], pairs[1], None));
    lab.tear_down()?;
    table::print(&["", "flannel", "bridge + host-local", "ratio", "aim"], &rows);
    Ok(())
}

fn chains() -> [Chain; 2] {
    let ours = json!({ "name": "ours", "cniVersion": "1.0.0", "type": "flannel",
        "delegate": { "hairpinMode": true, "isDefaultGateway": true } });
    let theirs = json!({ "name": "theirs", "cniVersion": "1.0.0", "type": "bridge", "bridge": "br-theirs", "mtu": 1450,
        "hairpinMode": true, "isDefaultGateway": true, "ipMasq": false,
        "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.101.0.0/20" }]], "routes": [{ "dst": "10.101.0.0/16" }] } });
    let chain = |plugin: PathBuf, conf: Value, prefix| Chain { plugin, conf: conf.to_string(), prefix };
    [
        chain(Path::new(BIN_DIR).join("flannel"), ours, "o"),
        chain(Path::new(DEBIAN).join("bridge"), theirs, "t"),
    ]
}

/// Works on a thread in the host's namespaces, so that what is measured is the plugin and not the way to it.
fn inside<T: Send>(host: &Host, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = |kind: &str| {
        let path = format!("/proc/{}/ns/{kind}", host.pid());
        File::open(&path).with_context(|| format!("could not open {path}"))
    };
    let (net, mount, processes) = (namespace("net")?, namespace("mnt")?, namespace("pid")?);
    thread::scope(|scope| {
        let entered = move || {
            // A thread that shares its root with others cannot change it.
            unshare(CloneFlags::CLONE_FS).context("could not get a root directory of my own")?;
            setns(net, CloneFlags::CLONE_NEWNET).context("could not enter the host's network")?;
            setns(mount, CloneFlags::CLONE_NEWNS).context("could not enter the host's files")?;
            // Go looks for itself in the host's /proc.
            setns(processes, CloneFlags::CLONE_NEWPID).context("could not enter the host's processes")?;
            work()
        };
        scope.spawn(entered).join().unwrap_or_else(|_| Err(anyhow::anyhow!("the measuring thread panicked")))
    })
}

/// Containers that come and stay, by number.
fn crowd() -> std::ops::Range<usize> {
    1000..1000 + CROWD
}

fn measure(chains: &[Chain; 2]) -> Result<Vec<Vec<String>>> {
    let mut rows = Vec::new();
    let calls = [chains[0].calls()?, chains[1].calls()?];
    for (crowded, title) in [(false, "alone"), (true, "with 200 others")] {
        for chain in chains.iter().filter(|_| crowded) {
            crowd().try_for_each(|n| chain.call(chain.command(&chain.plugin, "ADD", n)))?;
        }
        let [ours, theirs] = alternate(chains)?;
        let row = |what: &str, unit: &str, pick: fn(&Figures) -> &Vec<f64>, aim: Option<f64>| {
            figure(
                &format!("{what}, {title}"),
                unit,
                median(pick(&ours).clone()),
                median(pick(&theirs).clone()),
                aim.filter(|_| !crowded),
            )
        };
        rows.push(row("ADD p50", " ms", |f| &f.add, Some(ADD_MS_MAX)));
        rows.push(row("DEL p50", " ms", |f| &f.del, Some(DEL_MS_MAX)));
        rows.push(row("ADD processor", " ms", |f| &f.add_cpu, None));
        rows.push(row("DEL processor", " ms", |f| &f.del_cpu, None));
    }
    rows.push(figure("ADD system calls", "", calls[0].0, calls[1].0, Some(CALLS_MAX)));
    rows.push(figure("DEL system calls", "", calls[0].1, calls[1].1, None));
    Ok(rows)
}

fn figure(what: &str, unit: &str, ours: f64, theirs: f64, aim: Option<f64>) -> Vec<String> {
    let digits = if unit == " ms" { 2 } else { 0 };
    vec![
        what.to_owned(),
        format!("{ours:.digits$}{unit}"),
        format!("{theirs:.digits$}{unit}"),
        format!("{:.2}", ours / theirs),
        aim.map_or_else(String::new, |aim| format!("<= {aim}{unit}")),
    ]
}

/// In turns, so that the machine's other work hits both alike.
fn alternate(chains: &[Chain; 2]) -> Result<[Figures; 2]> {
    let mut figures = [Figures::default(), Figures::default()];
    for _ in 0..ROUNDS {
        for (chain, figures) in chains.iter().zip(&mut figures) {
            let (add, add_cpu) = chain.timed("ADD", 0)?;
            let (del, del_cpu) = chain.timed("DEL", 0)?;
            figures.add.push(add);
            figures.del.push(del);
            figures.add_cpu.push(add_cpu);
            figures.del_cpu.push(del_cpu);
        }
    }
    Ok(figures)
}

impl Chain {
    fn container(&self, n: usize) -> String {
        format!("{}{n}", self.prefix)
    }

    fn command(&self, program: &Path, verb: &str, n: usize) -> Command {
        let id = self.container(n);
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_NETNS", format!("/run/netns/{id}"))
            .env("CNI_CONTAINERID", id)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", DEBIAN)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn call(&self, mut command: Command) -> Result<()> {
        let mut child =
            command.spawn().with_context(|| format!("could not start {}", self.plugin.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(self.conf.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{}: {}{}",
            self.plugin.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Wall and processor time in ms; the latter with all processes it started.
    fn timed(&self, verb: &str, n: usize) -> Result<(f64, f64)> {
        let before = processor_ms()?;
        let start = Instant::now();
        self.call(self.command(&self.plugin, verb, n))?;
        Ok((start.elapsed().as_secs_f64() * 1e3, processor_ms()? - before))
    }

    /// System calls of an ADD and a DEL on a bridge that exists.
    fn calls(&self) -> Result<(f64, f64)> {
        for verb in ["ADD", "DEL"] {
            self.call(self.command(&self.plugin, verb, 0))?;
        }
        let count = |verb| -> Result<f64> {
            let summary = format!("/run/strace.{}.{verb}", self.prefix);
            let mut command = self.command(Path::new("strace"), verb, 0);
            command.env("PATH", "/usr/bin:/bin").args(["-f", "-qq", "-c", "-o", &summary]).arg(&self.plugin);
            self.call(command)?;
            total(&fs::read_to_string(&summary)?).context("strace says no total")
        };
        Ok((count("ADD")?, count("DEL")?))
    }

    /// Pairs a second, with as many at work at once.
    fn at_once(&self, host: &Host) -> Result<f64> {
        let work = |n: usize| {
            inside(host, || {
                (0..BATCHES).try_for_each(|_| {
                    self.call(self.command(&self.plugin, "ADD", n))?;
                    self.call(self.command(&self.plugin, "DEL", n))
                })
            })
        };
        let start = Instant::now();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..AT_ONCE).map(|n| scope.spawn(move || work(n))).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, Result<()>>| {
                thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a measuring thread panicked")))
            };
            threads.into_iter().map(join).collect::<Result<Vec<()>>>()
        })?;
        Ok((AT_ONCE * BATCHES) as f64 / start.elapsed().as_secs_f64())
    }
}

/// User and system time of all children that have ended, in ms.
fn processor_ms() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(micros as f64 / 1e3)
}

/// The calls column of `strace -c`'s last line; the errors column may be empty.
fn total(summary: &str) -> Option<f64> {
    let line = summary.lines().rev().find(|line| line.trim_end().ends_with("total"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}
