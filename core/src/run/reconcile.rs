//! The reconciler: one thread that looks at the kernel and changes it, one pass at a time.
//!
//! It is given whole values and the reason to look; if several come while a pass runs, the newest value and the
//! weightiest reason count. It gives back an [`Outcome`]. It keeps no list of what it did.

mod endpoints;
mod follow;
mod guard;
mod known;
mod newest;
mod planning;
mod ports;
mod sight;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use self::endpoints::{Endpoints, Reply};
use self::guard::TunnelGuard;
use self::known::Known;
use self::newest::newest;
use self::ports::ports;
pub(super) use self::sight::{Inputs, Place, ReaderInputs, Sight};
use super::health::Counters;
use super::journal::Journal;
use super::kernel_events::OwnWrites;
use super::survey::Public;
use super::udp::{Carrier, UdpError};
use super::wireguard::{Wireguard, WireguardError};
use crate::act::pass::{chain, converge};
use crate::decide::bridge;
use crate::decide::plan::{Plan, PlanError, remains};
use crate::touch::memory;
use crate::touch::uplink::UplinkError;
use crate::touch::world::kernel::Kernel;
use crate::touch::world::{World as _, WorldError};
use crate::words::addr::Prefix;
use crate::words::code::Code;
use crate::words::exposure::Exposure;
use crate::words::extension::Errands;
use crate::words::fact::{Fact, Facts, diff};
use crate::words::ipsec::Associations;
use crate::words::lease::OwnLease;
use crate::words::name::LinkName;
use crate::words::report::{Finding, Reason, Report};
use crate::words::rule::TableName;
use crate::words::territory::Territory;
use crate::words::units::Mtu;

/// A look at more facts than this takes so much memory that it is given back.
const MANY: usize = 1000;

/// Whether a pass has to look at the kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Look {
    /// Something may have changed there.
    Needed,
    /// Nothing but leases is new: if it was as planned before, the difference is enough.
    IfInDoubt,
}

/// How a pass ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// How many passes there have been.
    pub(super) passes: u64,
    /// The own lease it planned for.
    pub(super) own: Option<OwnLease>,
    /// Whether the kernel is as planned.
    pub(super) clean: bool,
    /// Largest packet of a container.
    pub(super) mtu: Option<Mtu>,
    /// What the operator's commands should be told.
    pub(super) errands: Option<Arc<Errands>>,
    /// What charon should hold.
    pub(super) associations: Option<Arc<Associations>>,
    /// How peers reach us, as the uplink is now.
    pub(super) public: Public,
}

enum Work {
    Expose(Exposure, Reply),
    Pass(Box<Sight>, Reason, Look),
    Retire(Going, tokio::sync::oneshot::Sender<Result<Report, String>>),
}

/// What is to be taken away.
enum Going {
    /// All of a network with these CIDRs.
    Network(BTreeSet<Prefix>),
    /// One table of rules.
    Table(TableName),
}

/// The way to the thread. It ends when this is dropped.
pub(super) struct Reconciler {
    work: Sender<Work>,
    /// What it writes, for whoever listens to the kernel.
    pub(super) own_writes: Arc<OwnWrites>,
    pub(super) outcome: watch::Receiver<Outcome>,
}

impl Reconciler {
    /// Starts the thread. It works in the network namespace of the caller.
    pub(super) fn start(place: Place, exposure: Option<Exposure>, counters: Counters) -> io::Result<Self> {
        let (work, todo) = channel();
        let (thread, outcome) = Thread::new(place, exposure, counters);
        let own_writes = thread.own_writes.clone();
        std::thread::Builder::new().name("reconciler".into()).spawn(move || thread.run(&todo))?;
        Ok(Self { work, own_writes, outcome })
    }

    /// Asks for a pass.
    pub(super) fn pass(&self, inputs: impl Into<Sight>, reason: Reason, look: Look) {
        // The thread lives as long as this sender.
        let _ = self.work.send(Work::Pass(Box::new(inputs.into()), reason, look));
    }

    /// Asks for what is particular about the endpoints; the answer comes when it is written.
    pub(super) fn expose(&self, exposure: Exposure, reply: Reply) {
        let _ = self.work.send(Work::Expose(exposure, reply));
    }

    /// Waits until nothing is changed any more: another agent, or nobody, may have other plans.
    pub(super) async fn end(self) {
        let Self { work, mut outcome, .. } = self;
        drop(work);
        // The thread holds the other end until its last pass is over.
        while outcome.changed().await.is_ok() {}
    }

    /// Takes everything of the network away from the kernel.
    pub(super) async fn retire(&self, cidrs: BTreeSet<Prefix>) -> Result<Report, String> {
        self.take_away(Going::Network(cidrs)).await
    }

    /// Takes one table of rules away; everything else stays.
    pub(super) async fn retire_table(&self, table: TableName) -> Result<Report, String> {
        self.take_away(Going::Table(table)).await
    }

    async fn take_away(&self, going: Going) -> Result<Report, String> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let _ = self.work.send(Work::Retire(going, reply));
        answer.await.unwrap_or_else(|_| Err("the reconciler has ended".into()))
    }
}

/// Why a pass did not take place.
#[derive(Debug, thiserror::Error)]
enum PassError {
    #[error(transparent)]
    World(#[from] WorldError),
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Udp(#[from] UdpError),
    #[error(transparent)]
    Wireguard(#[from] WireguardError),
}

struct Thread {
    place: Place,
    journal: Journal,
    counters: Counters,
    endpoints: Endpoints,
    kernel: Option<Kernel>,
    /// What the last pass left, if it was clean.
    known: Option<Known>,
    own_writes: Arc<OwnWrites>,
    /// Carries the packets of the udp backend.
    carrier: Carrier,
    /// Whether it was said that there is no iptables.
    told_of_no_iptables: bool,
    guard: TunnelGuard,
    wireguard: Wireguard,
    done: watch::Sender<Outcome>,
}

/// What a pass would find and change now, one line each; nothing is changed.
///
/// # Errors
/// For the operator: there is no plan, or the kernel cannot be looked at.
pub(super) fn preview(place: Place, inputs: &Inputs) -> Result<Vec<String>, String> {
    let (mut thread, _) = Thread::new(place, None, Counters::default());
    let ports = thread.ports().map_err(|error| chain(&error))?;
    let (mut plan, _) = thread.plan(inputs, &ports, None).map_err(|error| chain(&error))?;
    let kernel = open(&mut thread.kernel).map_err(|error| chain(&error))?;
    thread.guard.spare_others(kernel, &mut plan).map_err(|error| chain(&error))?;
    let seen = kernel.observe(&plan.territory);
    let seen = seen.map_err(|error| chain(&error))?;
    let findings = plan.findings.iter().map(|finding| format!("! {finding}"));
    let changes = diff(&plan.facts, &seen);
    Ok(findings.chain(changes.iter().map(ToString::to_string)).collect())
}

impl Thread {
    fn new(place: Place, exposure: Option<Exposure>, counters: Counters) -> (Self, watch::Receiver<Outcome>) {
        let (done, outcome) = watch::channel(Outcome::default());
        let endpoints = Endpoints::new(place.network.clone(), place.bridge, exposure);
        let journal = Journal::new(&place.network, counters.clone());
        let guard = TunnelGuard::new(&place.network, place.guard);
        let carrier = Carrier::new(place.udp_offload);
        let own_writes = Arc::new(OwnWrites::default());
        let told_of_no_iptables = false;
        let thread = Self {
            journal,
            counters,
            place,
            guard,
            endpoints,
            kernel: None,
            known: None,
            own_writes,
            carrier,
            wireguard: Wireguard::default(),
            told_of_no_iptables,
            done,
        };
        (thread, outcome)
    }

    fn run(mut self, todo: &Receiver<Work>) {
        let mut retired = false;
        while let Ok(work) = todo.recv() {
            for work in newest(work, todo) {
                match work {
                    Work::Expose(..) | Work::Pass(..) if retired => {}
                    Work::Expose(exposure, reply) => self.endpoints.want(exposure, reply),
                    Work::Pass(inputs, reason, look) => {
                        // Somebody waits for these, and they do not take long.
                        self.serve_endpoints();
                        self.pass(&inputs, reason, look);
                    }
                    Work::Retire(going, reply) => {
                        retired = true;
                        let _ = reply.send(self.retire(going).map_err(|error| chain(&error)));
                    }
                }
            }
            self.serve_endpoints();
        }
    }

    fn serve_endpoints(&mut self) {
        if self.endpoints.is_due() {
            let opened = open(&mut self.kernel);
            self.endpoints.serve(opened);
        }
    }

    fn pass(&mut self, sight: &Sight, reason: Reason, look: Look) {
        let started = Instant::now();
        if self.guard.begins_again(reason) {
            self.known = None;
        }
        let mut outcome = Outcome { passes: self.done.borrow().passes + 1, ..Outcome::default() };
        let followed = if look == Look::IfInDoubt { self.follow(sight) } else { None };
        match followed.map_or_else(|| self.try_pass(sight), Ok) {
            Ok((plan, report, public)) => {
                self.journal.pass(reason, &report, &plan.findings, sight.leases(), started.elapsed());
                outcome.clean = report.clean;
                outcome.mtu = Some(plan.mtu);
                outcome.public = public;
                outcome.associations = plan.associations.map(Arc::new);
                outcome.errands = plan.errands.map(Arc::new);
                outcome.own = sight.own().cloned();
            }
            Err(error) => {
                // The sockets may be what is broken.
                self.kernel = None;
                self.known = None;
                self.journal.broken(reason, &chain(&error));
            }
        }
        self.done.send_replace(outcome);
    }

    /// Endpoints go while a pass plans for them: what then fails is no failure, and is planned anew at once.
    fn try_pass(&mut self, sight: &Sight) -> Result<(Plan, Report, Public), PassError> {
        const TRIES: usize = 3;
        for _ in 1..TRIES {
            let before = self.ports()?;
            let passed = self.pass_once(sight, &before)?;
            if passed.1.clean || self.ports()? == before {
                return Ok(passed);
            }
        }
        let ports = self.ports()?;
        self.pass_once(sight, &ports)
    }

    fn ports(&mut self) -> Result<BTreeSet<LinkName>, WorldError> {
        let place = self.place.clone();
        ports(self.kernel()?, &place)
    }

    fn pass_once(
        &mut self,
        sight: &Sight,
        ports: &BTreeSet<LinkName>,
    ) -> Result<(Plan, Report, Public), PassError> {
        let known = self.known.take();
        let (mut plan, node) = match sight {
            Sight::Own(inputs) => {
                let (plan, node) = self.plan(inputs, ports, known)?;
                (plan, Some((inputs, node)))
            }
            Sight::Others(inputs) => (self.plan_reader(inputs, ports), None),
        };
        let public = node.as_ref().map(|(_, node)| Public::of_node(node)).unwrap_or_default();
        self.guard.spare_others(open(&mut self.kernel)?, &mut plan)?;
        let rest = Known::rest(&plan.facts);
        if let Some(bridge) = self.place.bridge
            && let Some(link) = self.kernel()?.link(bridge)?
        {
            bridge::adopt(&mut plan.facts, &Facts::from_iter([Fact::Link(Box::new(link))]), bridge);
        }
        if let Some(tunnel) = &plan.tunnel {
            self.carrier.carry(tunnel)?;
        }
        self.wireguard.carry(&mut plan)?;
        let kernel = open(&mut self.kernel)?;
        self.endpoints.prepare(kernel, &mut plan.facts, &mut plan.territory)?;
        let report = converge(&mut self.own_writes.signed(kernel), &plan.territory, &plan.facts)?;
        if self.guard.is_refused(&report) {
            return self.pass_once(sight, ports);
        }
        self.endpoints.passed(kernel, plan.ranges.clone(), &report);
        // Only now: until here the packets of a network that leaves this backend had it still.
        if plan.tunnel.is_none() {
            self.carrier.stop();
        }
        self.wireguard.keep_only(&plan);
        let mut found = Vec::new();
        if node.is_some() {
            found.extend(self.guard.count(open(&mut self.kernel)?, &self.counters)?);
        }
        if self.place.forward
            && let Some(hint) = self.kernel()?.netfilter()?.hint()
        {
            found.push(Finding::new(Code::FORWARD_DROPPED, hint));
        }
        let facts = std::mem::take(&mut plan.facts);
        if report.clean {
            let kernel = open(&mut self.kernel)?;
            self.wireguard.told(kernel, &facts, &mut plan);
        }
        let many = facts.len() > MANY;
        if let Some((inputs, node)) = node.filter(|_| report.clean) {
            self.known = Some(Known::after(inputs, node, rest, facts, (plan.clone(), found.clone())));
        }
        plan.findings.extend(found);
        if many {
            memory::give_back();
        }
        Ok((plan, report, public))
    }

    fn retire(&mut self, going: Going) -> Result<Report, WorldError> {
        self.known = None;
        let territory = match going {
            Going::Network(cidrs) => {
                self.carrier.stop();
                self.wireguard.stop();
                let mut territory = remains(&self.place.network, cidrs);
                territory.links.extend(self.place.bridge);
                territory.tables.extend(self.place.bridge.map(bridge::masquerade_table));
                territory
            }
            Going::Table(table) => Territory { tables: BTreeSet::from([table]), ..Territory::default() },
        };
        converge(self.kernel()?, &territory, &Facts::default())
    }

    fn kernel(&mut self) -> Result<&mut Kernel, WorldError> {
        open(&mut self.kernel)
    }
}

fn open(kernel: &mut Option<Kernel>) -> Result<&mut Kernel, WorldError> {
    match kernel {
        Some(kernel) => Ok(kernel),
        empty => Ok(empty.insert(Kernel::open()?)),
    }
}

/// How long until a pass that left something undone is tried again: 0.2 s, doubling to 30 s.
pub(super) fn backoff(failures: u32) -> Duration {
    const FIRST: Duration = Duration::from_millis(200);
    const MAX: Duration = Duration::from_secs(30);
    FIRST.saturating_mul(1 << failures.min(8)).min(MAX)
}
