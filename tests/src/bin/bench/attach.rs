//! What a container costs on its way onto the network and off it: our CNI plugin, and the chain of Debian's Go plugins that does the
//! same, in turns on one host. Once as kube-flannel configures a node, once with a published port and with masquerading left to the
//! plugins. Debian has no Go `flannel`: its chain begins with the `bridge` that one would execute, and is shorter by a program.

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
const ROUNDS: usize = 40;
const CROWD: usize = 200;
const AT_ONCE: usize = 8;
const BATCHES: usize = 8;

/// What it may cost on a quiet machine of this kind.
const CALLS_MAX: f64 = 150.0;
const DEL_MS_MAX: f64 = 22.0;
const CPU_MS_MAX: f64 = 2.5;
const CHECK_MS_MAX: f64 = 2.0;
const VERSION_MS_MAX: f64 = 1.0;
const SIZE_MB_MAX: f64 = 2.0;

/// What is measured: the same wish, given to both.
struct Scene {
    title: &'static str,
    chains: [Chain; 2],
    add_ms_max: f64,
}

/// Plugins that are executed one after the other, as a runtime does.
struct Chain {
    steps: Vec<Step>,
    /// Its containers' ids begin so.
    prefix: &'static str,
}

/// One plugin of a chain with its configuration.
struct Step {
    plugin: PathBuf,
    conf: Value,
}

/// What was measured of one situation.
#[derive(Default)]
struct Figures {
    add: Vec<f64>,
    del: Vec<f64>,
    add_cpu: Vec<f64>,
    del_cpu: Vec<f64>,
}

pub(crate) fn run() -> Result<()> {
    let lab = Lab::new("bench-cni").hosts(1).needs(&["strace", "nsenter", "iptables"]);
    ensure!(lab.can_run(), "this machine lacks something");
    for plugin in ["bridge", "host-local", "portmap"] {
        ensure!(
            Path::new(DEBIAN).join(plugin).exists(),
            "this machine lacks Debian's containernetworking-plugins"
        );
    }
    let lab = lab.start()?;
    let host = lab.host(1);
    let mut rows = Vec::new();
    let scenes = scenes(host)?;
    for scene in &scenes {
        let names: Vec<String> = scene
            .chains
            .iter()
            .flat_map(|chain| {
                (0..AT_ONCE).chain(crowd()).map(|n| format!("netns add {}", chain.container(n)))
            })
            .collect();
        host.sh(&format!("printf '{}\\n' | ip -batch -", names.join("\\n")))?;
        rows.extend(inside(host, || scene.measure())?);
        let pairs = [scene.chains[0].at_once(host)?, scene.chains[1].at_once(host)?];
        rows.push(figure(&format!("8 at once, ADD+DEL pairs, {}", scene.title), "/s", pairs, Some(">= 150")));
    }
    rows.extend(inside(host, || alone(&scenes[0].chains[0]))?);
    lab.tear_down()?;
    table::print(&["", "flannel", "Go plugins", "ratio", "aim"], &rows);
    Ok(())
}

fn scenes(host: &Host) -> Result<[Scene; 2]> {
    let env = |file: &str, net: u8, masq: bool| {
        let text = format!(
            "FLANNEL_NETWORK=10.{net}.0.0/16\nFLANNEL_SUBNET=10.{net}.0.1/20\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ={masq}\n"
        );
        host.write(file, text)
    };
    env("/run/flannel/subnet.env", 100, true)?;
    env("/run/flannel/networks/ports.env", 101, false)?;
    let conf = |name: &str, file: &str, bridge: &str| {
        json!({ "name": name, "cniVersion": "1.0.0", "type": "flannel", "subnetFile": file,
            "delegate": { "bridge": bridge, "hairpinMode": true, "isDefaultGateway": true } })
    };
    let bridge = |name: &str, bridge: &str, net: u8, masq: bool| {
        json!({ "name": name, "cniVersion": "1.0.0", "type": "bridge", "bridge": bridge, "mtu": 1450,
            "hairpinMode": true, "isDefaultGateway": true, "ipMasq": masq,
            "ipam": { "type": "host-local", "ranges": [[{ "subnet": format!("10.{net}.0.0/20") }]],
                      "routes": [{ "dst": format!("10.{net}.0.0/16") }] } })
    };
    let ports =
        |n: u16| json!({ "portMappings": [{ "hostPort": n, "containerPort": 80, "protocol": "tcp" }] });
    let mut with_port = conf("ours-ports", "/run/flannel/networks/ports.env", "fl-ports");
    with_port["capabilities"] = json!({ "portMappings": true });
    with_port["runtimeConfig"] = ports(PORT);
    let portmap = json!({ "name": "theirs-ports", "cniVersion": "1.0.0", "type": "portmap",
        "capabilities": { "portMappings": true }, "runtimeConfig": ports(PORT) });
    let ours = |conf| Step { plugin: Path::new(BIN_DIR).join("flannel"), conf };
    let theirs = |name: &str, conf| Step { plugin: Path::new(DEBIAN).join(name), conf };
    let chain = |prefix, steps| Chain { steps, prefix };
    Ok([
        Scene {
            title: "plain",
            chains: [
                chain("o", vec![ours(conf("ours", "/run/flannel/subnet.env", "cni0"))]),
                chain("t", vec![theirs("bridge", bridge("theirs", "br-theirs", 102, false))]),
            ],
            add_ms_max: 4.5,
        },
        Scene {
            title: "port, masquerade",
            chains: [
                chain("po", vec![ours(with_port)]),
                chain(
                    "pt",
                    vec![
                        theirs("bridge", bridge("theirs-ports", "br-ports", 103, true)),
                        theirs("portmap", portmap),
                    ],
                ),
            ],
            add_ms_max: 5.0,
        },
    ])
}

/// The host port of the container with number 0; the others follow.
const PORT: u16 = 20_000;

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

impl Scene {
    fn measure(&self) -> Result<Vec<Vec<String>>> {
        let mut rows = Vec::new();
        let title = self.title;
        let calls = [self.chains[0].calls()?, self.chains[1].calls()?];
        for (crowded, others) in [(false, ""), (true, ", 200 others")] {
            for chain in self.chains.iter().filter(|_| crowded) {
                crowd().try_for_each(|n| chain.add(n))?;
            }
            let [ours, theirs] = alternate(&self.chains)?;
            let row = |what: &str, pick: fn(&Figures) -> &Vec<f64>, aim: Option<f64>| {
                let aim = aim.map(|aim| format!("<= {aim} ms"));
                let pair = [median(pick(&ours).clone()), median(pick(&theirs).clone())];
                figure(&format!("{what}, {title}{others}"), " ms", pair, aim.as_deref())
            };
            rows.push(row("ADD p50", |f| &f.add, Some(self.add_ms_max)));
            rows.push(row("DEL p50", |f| &f.del, Some(DEL_MS_MAX)));
            rows.push(row("ADD processor", |f| &f.add_cpu, Some(CPU_MS_MAX)));
            rows.push(row("DEL processor", |f| &f.del_cpu, Some(CPU_MS_MAX)));
        }
        let most = format!("< {CALLS_MAX}");
        let both = |pick: fn(&Calls) -> f64| [pick(&calls[0]), pick(&calls[1])];
        rows.push(figure(&format!("ADD system calls, {title}"), "", both(|c| c.add), Some(&most)));
        rows.push(figure(&format!("DEL system calls, {title}"), "", both(|c| c.del), None));
        rows.push(figure(&format!("ADD programs executed, {title}"), "", both(|c| c.execs), Some("1")));
        Ok(rows)
    }
}

/// What only we are measured at: VERSION, CHECK, and the size.
fn alone(chain: &Chain) -> Result<Vec<Vec<String>>> {
    let step = &chain.steps[0];
    let result = step.call(step.command(&step.plugin, "ADD", &chain.container(0)), 0, None)?;
    let timed = |verb: &str| -> Result<f64> {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let start = Instant::now();
            step.call(step.command(&step.plugin, verb, &chain.container(0)), 0, Some(&result))?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(median(times))
    };
    let (version, check) = (timed("VERSION")?, timed("CHECK")?);
    chain.del(0)?;
    let size = fs::metadata(&step.plugin)?.len() as f64 / 1e6;
    let row = |what: &str, figure: String, aim: String| {
        vec![what.to_owned(), figure, String::new(), String::new(), aim]
    };
    Ok(vec![
        row("VERSION p50", format!("{version:.2} ms"), format!("<= {VERSION_MS_MAX} ms")),
        row("CHECK p50, plain", format!("{check:.2} ms"), format!("<= {CHECK_MS_MAX} ms")),
        row("size of the binary", format!("{size:.2} MB"), format!("<= {SIZE_MB_MAX} MB")),
    ])
}

fn figure(what: &str, unit: &str, [ours, theirs]: [f64; 2], aim: Option<&str>) -> Vec<String> {
    let digits = if unit == " ms" { 2 } else { 0 };
    vec![
        what.to_owned(),
        format!("{ours:.digits$}{unit}"),
        format!("{theirs:.digits$}{unit}"),
        format!("{:.2}", ours / theirs),
        aim.unwrap_or_default().to_owned(),
    ]
}

/// In turns, so that the machine's other work hits both alike.
fn alternate(chains: &[Chain; 2]) -> Result<[Figures; 2]> {
    let mut figures = [Figures::default(), Figures::default()];
    for _ in 0..ROUNDS {
        for (chain, figures) in chains.iter().zip(&mut figures) {
            let (add, add_cpu) = timed(|| chain.add(0))?;
            let (del, del_cpu) = timed(|| chain.del(0))?;
            figures.add.push(add);
            figures.del.push(del);
            figures.add_cpu.push(add_cpu);
            figures.del_cpu.push(del_cpu);
        }
    }
    Ok(figures)
}

/// Wall and processor time in ms; the latter with all processes it started.
fn timed(work: impl FnOnce() -> Result<()>) -> Result<(f64, f64)> {
    let before = processor_ms()?;
    let start = Instant::now();
    work()?;
    Ok((start.elapsed().as_secs_f64() * 1e3, processor_ms()? - before))
}

/// System calls, and programs that were executed for ADD.
struct Calls {
    add: f64,
    del: f64,
    execs: f64,
}

impl Chain {
    fn container(&self, n: usize) -> String {
        format!("{}{n}", self.prefix)
    }

    /// Every plugin gets the result of the one before it.
    fn add(&self, n: usize) -> Result<()> {
        let mut result = None;
        for step in &self.steps {
            let command = step.command(&step.plugin, "ADD", &self.container(n));
            result = Some(step.call(command, n, result.as_ref())?);
        }
        Ok(())
    }

    /// In the opposite order, as a runtime does that has lost the result.
    fn del(&self, n: usize) -> Result<()> {
        let del = |step: &Step| step.call(step.command(&step.plugin, "DEL", &self.container(n)), n, None);
        self.steps.iter().rev().try_for_each(|step| del(step).map(drop))
    }

    /// System calls of an ADD and a DEL on a bridge that exists.
    fn calls(&self) -> Result<Calls> {
        self.add(0)?;
        self.del(0)?;
        let mut calls = Calls { add: 0.0, del: 0.0, execs: 0.0 };
        let mut result = None;
        for step in &self.steps {
            let (printed, summary) = step.traced("ADD", &self.container(0), result.as_ref())?;
            calls.add += counted(&summary, "total")?;
            calls.execs += counted(&summary, "execve")?;
            result = Some(printed);
        }
        for step in self.steps.iter().rev() {
            calls.del += counted(&step.traced("DEL", &self.container(0), None)?.1, "total")?;
        }
        Ok(calls)
    }

    /// Pairs a second, with as many at work at once.
    fn at_once(&self, host: &Host) -> Result<f64> {
        let work =
            |n: usize| inside(host, || (0..BATCHES).try_for_each(|_| self.add(n).and_then(|()| self.del(n))));
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

impl Step {
    fn command(&self, program: &Path, verb: &str, container: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_NETNS", format!("/run/netns/{container}"))
            .env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", DEBIAN)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// The answer, null if there is none.
    fn call(&self, mut command: Command, n: usize, previous: Option<&Value>) -> Result<Value> {
        let mut conf = self.conf.clone();
        if let Some(previous) = previous {
            conf["prevResult"] = previous.clone();
        }
        if let Some(port) = conf.pointer_mut("/runtimeConfig/portMappings/0/hostPort") {
            *port = json!(usize::from(PORT) + n);
        }
        let mut child =
            command.spawn().with_context(|| format!("could not start {}", self.plugin.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // VERSION does not read, and may have ended.
            let _ = stdin.write_all(conf.to_string().as_bytes());
        }
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{}: {}{}",
            self.plugin.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    /// The answer, and what strace counted.
    fn traced(&self, verb: &str, container: &str, previous: Option<&Value>) -> Result<(Value, String)> {
        let summary = format!("/run/strace.{container}.{verb}");
        let mut command = self.command(Path::new("strace"), verb, container);
        command.args(["-f", "-qq", "-c", "-o", &summary]).arg(&self.plugin);
        let answer = self.call(command, 0, previous)?;
        Ok((answer, fs::read_to_string(&summary)?))
    }
}

/// User and system time of all children that have ended, in ms.
fn processor_ms() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(micros as f64 / 1e3)
}

/// The calls column of the line of `strace -c` that ends so; the errors column before the name may be empty.
fn counted(summary: &str, name: &str) -> Result<f64> {
    let line = summary.lines().rev().find(|line| line.split_whitespace().last() == Some(name));
    let calls = line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
    calls.with_context(|| format!("strace says nothing of {name}"))
}
