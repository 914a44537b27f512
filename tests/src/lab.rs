//! Several hosts on one machine: see the crate's first page for how to use them.

mod sweep;
mod wiring;

use std::fs;
use std::io::{PipeWriter, pipe};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;

use crate::binaries;
use crate::cgroup;
use crate::command::Output;
use crate::daemon::Daemon;
use crate::host::{Host, SHARED_DIR, Spec, Starting};
use crate::needs::{self, Ability};
use crate::probe::{eventually, http_get};
use wiring::{Cable, Lan};

pub use sweep::{ids, sweep};

/// Hosts are 10.77.x.11, .12, …; .1 is the router and .100 etcd.
const FIRST_HOST: u8 = 10;
const HOSTS_MAX: usize = 80;
const ETCD: u8 = 100;

/// A test that has not ended by itself by then is not going to.
const TIME_TO_LIVE: Duration = Duration::from_secs(3600);

const REBOOT: &str = include_str!("lab/reboot.sh");

const ETCD_DEADLINE: Duration = Duration::from_secs(30);

/// What the lab is to be. Made by [`Lab::new`], ended by [`start`](Self::start).
#[derive(Debug, Clone)]
pub struct LabPlan {
    name: String,
    hosts: usize,
    two_subnets: bool,
    behind_router: Vec<usize>,
    etcd: bool,
    outside: bool,
    second_lan: bool,
    mtu: u32,
    ip_forward: bool,
    rp_filter: u8,
    time_to_live: Duration,
    needs: Vec<String>,
    needs_kernel: Option<Ability>,
}

impl LabPlan {
    /// So many hosts: `h1`, `h2`, … (two unless said).
    pub fn hosts(mut self, n: usize) -> Self {
        self.hosts = n;
        self
    }

    /// A second subnet, 10.77.1.0/24, behind the router; the later half of the hosts lives there unless
    /// [`behind_router`](Self::behind_router) says which.
    pub fn two_subnets(mut self) -> Self {
        self.two_subnets = true;
        self
    }

    /// These hosts (counted from 1) live on the second subnet.
    pub fn behind_router(mut self, hosts: &[usize]) -> Self {
        self.two_subnets = true;
        self.behind_router = hosts.to_vec();
        self
    }

    /// A node 10.77.0.100 that runs etcd.
    pub fn etcd(mut self) -> Self {
        self.etcd = true;
        self.needs(&["etcd", "etcdctl"])
    }

    /// A node 198.51.100.2 that reaches the hosts through the router but knows no container network: what arrives
    /// there was masqueraded.
    pub fn outside(mut self) -> Self {
        self.outside = true;
        self
    }

    /// A second cable for every host: eth1 on one link that all of them share, 10.11.12.11, .12, …
    pub fn second_lan(mut self) -> Self {
        self.second_lan = true;
        self
    }

    /// MTU of all cables, 1500 unless said.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Whether hosts forward from the start (they do unless said). Without, dockerd sets the policy of FORWARD to DROP.
    pub fn ip_forward(mut self, on: bool) -> Self {
        self.ip_forward = on;
        self
    }

    /// The hosts' rp_filter (0 off, which it is unless said; 1 strict; 2 loose).
    pub fn rp_filter(mut self, mode: u8) -> Self {
        self.rp_filter = mode;
        self
    }

    /// After so long everything in the lab is killed even if the test lives (an hour unless said).
    pub fn time_to_live(mut self, time: Duration) -> Self {
        self.time_to_live = time;
        self
    }

    /// Programs of the machine that the test uses; [`in_lab`] skips it where one is missing.
    pub fn needs(mut self, programs: &[&str]) -> Self {
        self.needs.extend(programs.iter().map(|&p| p.to_owned()));
        self
    }

    /// What the test needs of the machine's kernel; where that lacks it, the virtual machine is its place.
    pub fn needs_kernel(mut self, ability: Ability) -> Self {
        self.needs_kernel = Some(ability);
        self
    }

    /// Whether this machine can run it; says what is missing otherwise.
    pub fn can_run(&self) -> bool {
        needs::require_root_and_namespaces()
            && self.needs.iter().all(|program| needs::require(program))
            && self.needs_kernel.is_none_or(needs::require_kernel)
    }

    /// Makes it. What was made is gone again when this fails.
    pub fn start(self) -> Result<Lab> {
        if self.hosts > HOSTS_MAX || self.behind_router.iter().any(|&n| n == 0 || n > self.hosts) {
            bail!("a lab has up to {HOSTS_MAX} hosts, counted from 1; asked for {self:?}");
        }
        sweep();
        let id = sweep::new_id(&self.name)?;
        let dir = sweep::state_dir(&id);
        fs::create_dir(&dir).with_context(|| format!("could not make {}", dir.display()))?;
        let shared = dir.join("shared");
        fs::create_dir(&shared)?;
        let (life, keep) = pipe().context("could not make a pipe")?;
        // From here on dropping it cleans up.
        let mut lab = Lab {
            id,
            dir,
            shared,
            hosts: Vec::new(),
            others: Vec::new(),
            etcd: Mutex::new(None),
            ip_forward: self.ip_forward,
            life: Some(keep),
            swept: false,
        };
        lab.make_nodes(&self, &life)?;
        lab.wire(&self)?;
        if self.etcd {
            lab.etcd_start()?;
        }
        Ok(lab)
    }

    fn lan_of(&self, host: usize) -> Lan {
        let behind = if self.behind_router.is_empty() {
            host > self.hosts.div_ceil(2)
        } else {
            self.behind_router.contains(&host)
        };
        if self.two_subnets && behind { Lan::B } else { Lan::A }
    }
}

/// Hosts with cables between them. Dropping it ends them all and removes every trace.
#[derive(Debug)]
pub struct Lab {
    id: String,
    dir: PathBuf,
    shared: PathBuf,
    hosts: Vec<Host>,
    /// switch, router and, where asked for, etcd and outside
    others: Vec<Host>,
    etcd: Mutex<Option<Daemon>>,
    ip_forward: bool,
    /// All nodes read from the other end; the kernel closes this one however the test ends.
    life: Option<PipeWriter>,
    swept: bool,
}

impl Lab {
    /// A plan of a lab; `name` is for messages and need not be unique.
    #[expect(clippy::new_ret_no_self, reason = "a test reads Lab::new(…).hosts(2).start()")]
    pub fn new(name: &str) -> LabPlan {
        LabPlan {
            name: name.to_owned(),
            hosts: 2,
            two_subnets: false,
            behind_router: Vec::new(),
            etcd: false,
            outside: false,
            second_lan: false,
            mtu: 1500,
            ip_forward: true,
            rp_filter: 0,
            time_to_live: TIME_TO_LIVE,
            needs: Vec::new(),
            needs_kernel: None,
        }
    }

    /// All hosts, in order.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// One host, counted from 1 as their names are.
    ///
    /// # Panics
    /// When there is none of that number.
    pub fn host(&self, number: usize) -> &Host {
        let host = number.checked_sub(1).and_then(|i| self.hosts.get(i));
        host.unwrap_or_else(|| panic!("the lab has {} hosts, no h{number}", self.hosts.len()))
    }

    /// The router between the subnets: 10.77.0.1 and, where it exists, 10.77.1.1.
    pub fn router(&self) -> &Host {
        self.other("router")
    }

    /// The node outside, 198.51.100.2.
    ///
    /// # Panics
    /// Without [`LabPlan::outside`].
    pub fn outside(&self) -> &Host {
        self.other("outside")
    }

    /// The directory that all hosts share, as they see it.
    pub fn shared_dir(&self) -> &'static str {
        SHARED_DIR
    }

    /// The same directory as the test sees it.
    pub fn shared_path(&self) -> &Path {
        &self.shared
    }

    /// The name of everything it has on the machine: state directory and cgroups.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Plugs the cable of a host in or pulls it, at the switch: eth0 loses its carrier.
    pub fn link(&self, host: &Host, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        self.other("switch")
            .out(&["ip", "link", "set", &wiring::port(host.name(), "eth0"), state])
            .map(|_| ())
    }

    /// Cuts the power of a host and switches it on again. Disks stay (/etc, /opt, /var/lib, /var/log); processes, mounts, links,
    /// addresses, rules and /run are gone, and the boot id is another. Nothing is started: the test plays systemd.
    pub fn reboot(&self, host: &Host) -> Result<()> {
        let forward = u8::from(self.ip_forward).to_string();
        host.run_env(&["sh", "-c", REBOOT], &[("IP_FORWARD", &forward)])?.text()?;
        let number =
            self.hosts.iter().position(|h| h.name() == host.name()).context("not a host of this lab")? + 1;
        let lan = if host.ip().octets()[2] == 1 { Lan::B } else { Lan::A };
        wiring::address(&Cable { host, link: "eth0", lan, last: last_octet(number), default_route: true })
    }

    /// Etcd's client URL.
    pub fn etcd_endpoint(&self) -> String {
        format!("http://{}:2379", Lan::A.ip(ETCD))
    }

    /// The node that runs etcd.
    ///
    /// # Panics
    /// Without [`LabPlan::etcd`].
    pub fn etcd_host(&self) -> &Host {
        self.other("etcd")
    }

    /// Runs etcdctl beside etcd; it must succeed. Returns what it printed.
    pub fn etcdctl(&self, argv: &[&str]) -> Result<String> {
        self.try_etcdctl(argv)?.text()
    }

    /// Starts etcd (the lab's start does it the first time) and waits until it answers. Its data outlives a stop.
    pub fn etcd_start(&self) -> Result<()> {
        let mut running = self.etcd_daemon();
        if running.as_ref().is_some_and(Daemon::alive) {
            return Ok(());
        }
        let (client, peer) = (self.etcd_endpoint(), format!("http://{}:2380", Lan::A.ip(ETCD)));
        #[rustfmt::skip]
        let argv = [
            "etcd", "--name", "etcd", "--data-dir", "/run/etcd", "--listen-client-urls", "http://0.0.0.0:2379",
            "--advertise-client-urls", &client, "--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer,
            "--initial-cluster", &format!("etcd={peer}"), "--logger", "zap",
            // One member needs no patience: it elects itself after this long (ms) instead of a second.
            "--heartbeat-interval", "20", "--election-timeout", "100",
        ];
        let daemon = self.etcd_host().spawn("etcd", &argv, &[])?;
        // Over HTTP: etcdctl finding nobody there would wait a second before it tried again.
        let health = format!("{client}/health");
        eventually("etcd answers", ETCD_DEADLINE, || match http_get(self.etcd_host(), &health) {
            Ok(said) if said.contains("true") => Ok(()),
            Ok(said) => Err(anyhow!("{said}")),
            // Waiting longer does not help a dead one.
            Err(_) if !daemon.alive() => Ok(()),
            Err(error) => Err(error),
        })
        .with_context(|| daemon.tail())?;
        if !daemon.alive() {
            bail!("etcd ended at once\n{}", daemon.tail());
        }
        *running = Some(daemon);
        Ok(())
    }

    /// Stops etcd; its data stays.
    pub fn etcd_stop(&self) -> Result<()> {
        self.etcd_daemon().take().map_or(Ok(()), |daemon| daemon.stop(ETCD_DEADLINE).map(|_| ()))
    }

    /// Kills etcd as a crash does; its data stays.
    pub fn etcd_crash(&self) -> Result<()> {
        self.etcd_daemon().take().map_or(Ok(()), |daemon| daemon.crash())
    }

    /// Sends etcd a signal: stopped, it holds its connections and says nothing, as if a cable were cut.
    pub fn etcd_signal(&self, signal: Signal) -> Result<()> {
        self.etcd_daemon().as_ref().context("etcd does not run")?.kill(signal)
    }

    /// Everything one would look at after a failure: each host's kernel and logs.
    pub fn dump(&self) -> String {
        let nodes = self.others.iter().filter(|n| n.name() == "etcd").chain(&self.hosts);
        nodes.map(Host::dump).collect()
    }

    /// Ends all nodes and removes every trace of the lab. Dropping does it too, but cannot say what went wrong.
    pub fn tear_down(mut self) -> Result<()> {
        self.clean()
    }

    fn try_etcdctl(&self, argv: &[&str]) -> Result<Output> {
        let endpoint = self.etcd_endpoint();
        // The wait for an etcd that is stopped; an emulated one may take long to answer.
        let timeout = if crate::vm::is_inside() { "30s" } else { "2s" };
        let argv = [&["etcdctl", "--endpoints", &endpoint, "--command-timeout", timeout], argv].concat();
        self.etcd_host().run(&argv)
    }

    fn etcd_daemon(&self) -> MutexGuard<'_, Option<Daemon>> {
        self.etcd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn other(&self, name: &str) -> &Host {
        let node = self.others.iter().find(|n| n.name() == name);
        node.unwrap_or_else(|| panic!("this lab has no {name}; its plan must ask for it"))
    }

    /// Starts all nodes at once, then waits for each.
    fn make_nodes(&mut self, plan: &LabPlan, life: &std::io::PipeReader) -> Result<()> {
        let bin_dir = binaries::dir()?;
        let base = Spec {
            lab: &self.id,
            name: "",
            host: false,
            ip: None,
            ip6: None,
            ip_forward: true,
            rp_filter: 0,
            bin_dir: &bin_dir,
            shared_dir: &self.shared,
            log_dir: PathBuf::new(),
            time_to_live: plan.time_to_live,
        };
        let at = |lan: Lan, last| (Some(lan.ip(last)), Some(lan.ip6(last)));
        let mut nodes = vec![("switch".to_owned(), (None, None)), ("router".to_owned(), at(Lan::A, 1))];
        if plan.etcd {
            nodes.push(("etcd".to_owned(), at(Lan::A, ETCD)));
        }
        if plan.outside {
            nodes.push(("outside".to_owned(), at(Lan::Outside, 2)));
        }
        let others = nodes.len();
        nodes.extend((1..=plan.hosts).map(|n| (format!("h{n}"), at(plan.lan_of(n), last_octet(n)))));

        let mut starting = Vec::new();
        for (i, (name, (ip, ip6))) in nodes.iter().enumerate() {
            let host = i >= others;
            let spec = Spec {
                name,
                host,
                ip: *ip,
                ip6: *ip6,
                ip_forward: if host { plan.ip_forward } else { name == "router" },
                rp_filter: if host { plan.rp_filter } else { 0 },
                log_dir: self.dir.join(name),
                ..base.clone()
            };
            starting.push(Starting::begin(&spec, Stdio::from(life.try_clone()?))?);
        }
        for (i, node) in starting.into_iter().enumerate() {
            let node = node.finish()?;
            if i < others { &mut self.others } else { &mut self.hosts }.push(node);
        }
        Ok(())
    }

    fn wire(&self, plan: &LabPlan) -> Result<()> {
        let cable = |host, link, lan, last, default_route| Cable { host, link, lan, last, default_route };
        let mut cables = vec![cable(self.router(), "eth0", Lan::A, 1, false)];
        if plan.two_subnets {
            cables.push(cable(self.router(), "eth1", Lan::B, 1, false));
        }
        if plan.outside {
            cables.push(cable(self.router(), "eth2", Lan::Outside, 1, false));
            cables.push(cable(self.outside(), "eth0", Lan::Outside, 2, true));
        }
        if plan.etcd {
            cables.push(cable(self.etcd_host(), "eth0", Lan::A, ETCD, true));
        }
        for (i, host) in self.hosts.iter().enumerate() {
            cables.push(cable(host, "eth0", plan.lan_of(i + 1), last_octet(i + 1), true));
            if plan.second_lan {
                cables.push(cable(host, "eth1", Lan::Second, last_octet(i + 1), false));
            }
        }
        wiring::connect(self.other("switch"), plan.mtu, &cables)
    }

    fn clean(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.swept, true) {
            return Ok(());
        }
        self.life.take();
        // All are told before any is waited for: closing the pipe did that; `end` makes sure.
        let ended = self.hosts.iter().chain(&self.others).map(Host::end).collect::<Vec<_>>();
        let ended = ended.into_iter().collect::<Result<Vec<()>>>();
        let groups = cgroup::remove(&self.id);
        let dir = remove_dir(&self.dir);
        ended.and(groups).and(dir)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() && !self.swept {
            eprintln!("{}", self.dump());
        }
        if let Err(error) = self.clean() {
            eprintln!("lab {}: could not clean up: {error:#}", self.id);
        }
    }
}

/// Runs a test in a lab: skips it by name where the machine lacks something, fails it with the whole chain of an error, and
/// shows the hosts when it fails.
///
/// # Panics
/// When the lab cannot be made, when `test` returns an error, and when cleaning up leaves something.
pub fn in_lab(plan: LabPlan, test: impl FnOnce(&Lab) -> Result<()>) {
    if !plan.can_run() {
        return;
    }
    let lab = plan.start().unwrap_or_else(|error| panic!("could not start the lab: {error:#}"));
    // A panic unwinds through the lab's drop, which shows the hosts; an error has to be shown here.
    let result = catch_unwind(AssertUnwindSafe(|| test(&lab)));
    match result {
        Ok(Ok(())) => lab.tear_down().unwrap_or_else(|error| panic!("could not clean up the lab: {error:#}")),
        Ok(Err(error)) => {
            eprintln!("{}", lab.dump());
            drop(lab);
            panic!("{error:#}");
        }
        Err(panic) => {
            eprintln!("{}", lab.dump());
            drop(lab);
            resume_unwind(panic);
        }
    }
}

fn last_octet(host: usize) -> u8 {
    FIRST_HOST + u8::try_from(host).expect("start() allows no more hosts than fit")
}

/// Mounts vanish a moment after the namespace that held them, and hold their directory until then.
fn remove_dir(dir: &Path) -> Result<()> {
    let start = Instant::now();
    loop {
        match fs::remove_dir_all(dir) {
            Err(error) if dir.exists() && start.elapsed() > Duration::from_secs(5) => {
                return Err(anyhow!(error)).with_context(|| format!("could not remove {}", dir.display()));
            }
            _ if !dir.exists() => return Ok(()),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}
