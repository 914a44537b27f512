//! An agent at work: it follows the newest values and decides when the kernel is looked at.

mod commands;
mod looks;
mod peers;
mod subnet_file;
mod told;
mod tunnels;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep_until};

use self::peers::Peers;
use self::subnet_file::inode;
use self::told::Told;
use super::memory::Memory;
use super::{Command, Leased, Status, WAIT};
use crate::decide::allocate::compatible;
use crate::decide::{changes, firewall};
use crate::run::extension::Extension;
use crate::run::hold::{self, Hold};
use crate::run::ipsec::Ipsec;
use crate::run::kernel_events::KernelEvents;
use crate::run::reconcile::{Look, Place, Reconciler};
use crate::run::retire;
use crate::run::settings::AgentSettings;
use crate::run::store::Snapshot;
use crate::run::store::sign::NodeMark;
use crate::run::survey::{self, Survey};
use crate::run::tenure::{Offer, Tenure, TenureState};
use crate::touch::identity;
use crate::touch::other_agents::OtherAgent;
use crate::touch::subnet_env::SubnetEnv;
use crate::touch::uplink::Sought;
use crate::words::addr::{Family, Prefix};
use crate::words::code::Code;
use crate::words::config::NetworkConfig;
use crate::words::extension::Errands;
use crate::words::fact::TunnelHost;
use crate::words::lease::{LeaseSet, OwnLease, Subnets};
use crate::words::report::{Finding, Reason};

/// How an agent's work ends.
pub(super) enum End {
    /// With the agent.
    Over,
    /// Another agent serves the network now.
    Yielded(Box<AgentSettings>, watch::Sender<Status>),
}

/// A running agent's state: the newest value of everything it was told.
pub(super) struct Work {
    settings: AgentSettings,
    publish: watch::Sender<Status>,
    hold: Hold,
    reconciler: Reconciler,
    snapshots: watch::Receiver<Snapshot>,
    offer: watch::Sender<Option<Offer>>,
    tenure: watch::Receiver<TenureState>,
    kernel_notice: Arc<Notify>,
    _events: KernelEvents,
    /// The document as it was last parsed, and what it said.
    document: Option<String>,
    config: Option<Arc<NetworkConfig>>,
    /// The newest config that this host can serve: it stays in force while a later one cannot be.
    served: Option<Arc<NetworkConfig>>,
    config_trouble: Option<Finding>,
    survey: Option<Survey>,
    survey_trouble: Option<Finding>,
    survey_due: bool,
    own: Option<OwnLease>,
    leases: Arc<LeaseSet>,
    peers: Peers,
    /// Whether the reconciler does not know of them yet.
    leases_due: bool,
    memory: Memory,
    env: Option<SubnetEnv>,
    /// The subnet file as we wrote it, or as somebody did whom we have looked at.
    file: Option<u64>,
    file_due: bool,
    /// Where containers of this host have, or had, their addresses: its subnets.
    containers: BTreeSet<Prefix>,
    /// CIDRs of earlier configs.
    former: BTreeSet<Prefix>,
    failures: u32,
    next_look: Instant,
    pending: Option<Reason>,
    /// Kernel notices in a row: somebody may be undoing what we do.
    streak: u32,
    last_notice: Instant,
    /// Runs the commands of the extension backend, where they are allowed.
    extension: Option<Extension>,
    /// Tells charon what the ipsec backend wants of it.
    ipsec: Ipsec,
    /// What they should be told, by the newest pass.
    errands: Option<Arc<Errands>>,
    /// What `PreStartupCommand` said when we last looked.
    printed: Option<Option<String>>,
    ready: bool,
    told: Told,
    /// Broken keys that were told while no lease is to be had, and so no pass tells them.
    told_of_keys: BTreeSet<Finding>,
}

impl Work {
    pub(super) fn start(
        mut settings: AgentSettings,
        publish: watch::Sender<Status>,
        hold: Hold,
    ) -> Result<Self, std::io::Error> {
        let place = Place::of(&settings);
        let reconciler = Reconciler::start(place, settings.exposure.clone(), settings.counters.clone())?;
        let kernel_notice = Arc::new(Notify::new());
        let memory = Memory::read(settings.state_dir.clone(), settings.network.clone());
        match identity::mark(&settings.state_dir, &settings.network) {
            Ok(mark) => settings.store = settings.store.signed_by(NodeMark(mark)),
            Err(error) => tracing::warn!("leases are not signed: {}", crate::act::pass::chain(&error)),
        }
        let (offer, offered) = watch::channel(None);
        let snapshots = settings.store.watch();
        let tenure = Tenure::spawn(settings.store.clone(), snapshots.clone(), offered, settings.renew_margin);
        // Whoever served here last, another version or another program, may have served another Network.
        let former = SubnetEnv::read(&settings.subnet_file).map(|env| env.networks).unwrap_or_default();
        let former = former.into_iter().collect();
        let written = |family| SubnetEnv::previous_subnet(&settings.subnet_file, family);
        let containers = Family::BOTH.into_iter().filter_map(written).collect();
        Ok(Self {
            extension: commands::spawn(&settings),
            ipsec: Ipsec::spawn(&settings.network),
            errands: None,
            printed: None,
            _events: KernelEvents::subscribe(kernel_notice.clone(), reconciler.own_writes.clone())?,
            reconciler,
            snapshots,
            settings,
            publish,
            hold,
            offer,
            tenure,
            kernel_notice,
            document: None,
            config: None,
            served: None,
            config_trouble: None,
            survey: None,
            survey_trouble: None,
            survey_due: true,
            own: None,
            leases: Arc::default(),
            peers: Peers::default(),
            leases_due: false,
            memory,
            env: None,
            file: None,
            file_due: false,
            containers,
            former,
            failures: 0,
            next_look: Instant::now() + WAIT,
            pending: None,
            streak: 0,
            last_notice: Instant::now(),
            ready: false,
            told: Told::new(),
            told_of_keys: BTreeSet::new(),
        })
    }

    pub(super) async fn run(mut self, inbox: &mut mpsc::UnboundedReceiver<Command>) -> End {
        self.restore();
        loop {
            self.follow().await;
            if let Some(other) = self.rival().await {
                return self.give_way(&other).await;
            }
            // Every arm is cancel-safe; none awaits inside the select.
            tokio::select! {
                changed = self.snapshots.changed() => if changed.is_err() { return End::Over },
                changed = self.tenure.changed() => if changed.is_err() { return End::Over },
                () = commands::changed(self.extension.as_mut()) => self.commands_ran(),
                () = tunnels::changed(&mut self.ipsec) => self.look(Reason::Retry, Duration::ZERO),
                Ok(()) = self.settings.isolated_from.changed() => self.look(Reason::Config, Duration::ZERO),
                Ok(()) = self.reconciler.outcome.changed() => self.passed(),
                () = self.kernel_notice.notified() => self.noticed(),
                () = sleep_until(self.next_look) => self.look_now(),
                () = sleep_until(self.memory.due().min(self.peers.due())) => {}
                command = inbox.recv() => match command {
                    Some(Command::Poke(reason)) => self.look(reason, Duration::ZERO),
                    Some(Command::Expose(exposure, reply)) => {
                        self.settings.exposure = Some(exposure.clone());
                        self.reconciler.expose(exposure, reply);
                    }
                    Some(Command::Retire(reply)) => {
                        let _ = reply.send(self.retire().await);
                        return End::Over;
                    }
                    Some(Command::Stop(reply)) => {
                        self.memory.hurry();
                        self.save().await;
                        self.memory.settle().await;
                        self.lift_guard().await;
                        self.reconciler.end().await;
                        let _ = reply.send(());
                        return End::Over;
                    }
                    None => return End::Over,
                },
            }
        }
    }

    /// Another agent that knows nothing of our lock and has just written our subnet file anew: it is looked for only then.
    async fn rival(&mut self) -> Option<OtherAgent> {
        if !std::mem::take(&mut self.file_due) {
            return None;
        }
        let now = inode(&self.settings.subnet_file)?;
        if self.file.replace(now)? == now {
            return None;
        }
        let lock = self.hold.file().try_clone().ok()?;
        let subnet_file = self.settings.subnet_file.clone();
        let look = move || OtherAgent::find(&subnet_file, &lock);
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }

    /// Leaves the network to an agent that cannot leave it to us. Lease, device and routes are as it has them, too; our rules
    /// would stay for ever.
    async fn give_way(self, other: &OtherAgent) -> End {
        let network = &self.settings.network;
        tracing::warn!(%network, "{other} serves this network too and has written {}; giving way", self.settings.subnet_file.display());
        if let Err(error) = self.reconciler.retire_table(firewall::table_name(network)).await {
            tracing::warn!(%network, "our rules may be left: {error}");
        }
        self.lift_guard().await;
        self.reconciler.end().await;
        End::Yielded(Box::new(self.settings), self.publish)
    }

    /// Nobody keeps the tunnels' guard from now on: it would keep out whoever comes later.
    async fn lift_guard(&self) {
        let table = TunnelHost::table_of(&self.settings.network);
        if let Err(error) = self.reconciler.retire_table(table).await {
            tracing::warn!(network = %self.settings.network, "the tunnel guard may be left: {error}");
        }
    }

    /// A start without the store goes on with what was true last: local containers must not wait for it.
    fn restore(&mut self) {
        let last = self.memory.last();
        let Some(own) = last.own.clone() else { return };
        let Ok(parsed) = NetworkConfig::parse(&last.config) else { return };
        if self.refuses(&parsed.config).is_some() {
            return;
        }
        tracing::info!(
            network = %self.settings.network,
            "starting from the last known state: subnet {}, {} leases", own.subnets, last.leases.leases.len()
        );
        self.document = Some(last.config.clone());
        self.leases = last.leases.clone();
        self.peers.restored(&self.leases);
        self.config = Some(Arc::new(parsed.config));
        self.holds(own);
        self.look(Reason::Startup, Duration::ZERO);
    }

    /// Brings everything up to the newest values: config, uplink, what we offer, what we hold, what is published.
    async fn follow(&mut self) {
        let snapshot = self.snapshots.borrow_and_update().clone();
        if let Some(document) = &snapshot.config
            && self.document.as_ref() != Some(document)
        {
            self.read_config(document.clone());
        } else if snapshot.known && snapshot.config.is_none() {
            self.miss_config();
        }
        if snapshot.known {
            let fits = |own: &&Subnets| self.config.as_ref().is_some_and(|config| compatible(config, own));
            let own = self.own.as_ref().map(|own| &own.subnets).filter(fits);
            let leases = self.peers.newest(&snapshot, own);
            if self.leases != leases {
                self.leases = leases;
                self.leases_due = true;
            }
        }
        self.tell_commands();
        self.look_around().await;
        self.make_offer();
        self.take_tenure();
        self.tell_leases();
        self.save().await;
        self.announce(&snapshot);
    }

    /// Peers that changed are written at once, and without a look if nothing else is new.
    fn tell_leases(&mut self) {
        if !std::mem::take(&mut self.leases_due) {
            return;
        }
        if self.pending.is_some() && self.next_look <= Instant::now() {
            self.look(Reason::Leases, Duration::ZERO);
        } else if let Some(inputs) = self.inputs() {
            self.reconciler.pass(inputs, Reason::Leases, Look::IfInDoubt);
        }
    }

    /// There is none. Whoever had one goes on with it; what was wrong with one that is gone counts no more.
    fn miss_config(&mut self) {
        if self.config.is_none() {
            let text = format!("network {} has none", self.settings.network);
            self.config_trouble = Some(Finding::new(Code::CONFIG_ABSENT, text));
        } else if self.config_trouble.take().is_some() {
            self.document = None;
        }
    }

    /// That what this host serves is not in the store any more, if it is not.
    fn missed_config(&self, snapshot: &Snapshot) -> Option<Finding> {
        if !snapshot.known || snapshot.config.is_some() || self.config.is_none() {
            return None;
        }
        let network = &self.settings.network;
        let text = format!(
            "that of network {network} was removed; this host goes on with the last one, and no other can join"
        );
        Some(Finding::new(Code::CONFIG_ABSENT, text))
    }

    fn read_config(&mut self, document: String) {
        let network = &self.settings.network;
        match NetworkConfig::parse(&document) {
            Ok(parsed) if let Some(refusal) = self.refuses(&parsed.config) => {
                self.config_trouble = Some(refusal)
            }
            Ok(parsed) => {
                for finding in &parsed.findings {
                    tracing::warn!(%network, "{finding}");
                }
                tracing::info!(%network, "Found network config - Backend type: {}", parsed.config.backend.name());
                if let Some(before) = &self.config {
                    let changes = changes::between(before, &parsed.config);
                    if !changes.is_empty() {
                        tracing::info!(%network, "the network config has changed: {}", changes.join(", "));
                    }
                }
                if self.config.as_deref() != Some(&parsed.config) {
                    self.former.extend(self.config.iter().flat_map(|config| config.cidrs()));
                    self.survey_due = true;
                    self.config = Some(Arc::new(parsed.config));
                    self.look(Reason::Config, Duration::ZERO);
                }
                self.config_trouble = None;
            }
            Err(error) => {
                self.config_trouble = Some(Finding::new(Code::CONFIG_BROKEN, error.to_string()));
            }
        }
        self.document = Some(document);
    }

    /// Uplink, identity, what we advertise: looked at when something they follow from has changed.
    async fn look_around(&mut self) {
        let Some(config) = self.config.clone() else { return };
        if !self.survey_due {
            return;
        }
        let Some(printed) = self.prepared(&config) else { return };
        self.survey_due = false;
        let mut settings = self.settings.clone();
        settings.uplink = self.sought();
        let known = self.survey.as_ref().map(|survey| survey.uplink.link);
        let survey =
            tokio::task::spawn_blocking(move || survey::take(&settings, &config, known, printed)).await;
        match survey.unwrap_or_else(|error| Err(Finding::new(Code::UPLINK_ABSENT, error.to_string()))) {
            Ok(survey) => {
                if self.survey.as_ref().is_none_or(|known| {
                    known.uplink.link != survey.uplink.link || known.value != survey.value
                }) {
                    survey.tell(&self.settings.network, &self.settings.uplink);
                    if self.survey.as_ref().is_some_and(|known| known.uplink != survey.uplink) {
                        self.settings.store.connect_anew().await;
                    }
                    self.look(Reason::Uplink, Duration::ZERO);
                }
                self.survey = Some(survey);
                self.served = self.config.clone();
                self.survey_trouble = None;
            }
            Err(finding) => self.survey_trouble = Some(finding),
        }
    }

    /// This host has a lease.
    fn holds(&mut self, own: OwnLease) {
        self.containers.extend(Family::BOTH.into_iter().filter_map(|family| own.subnets.of(family)));
        self.own = Some(own);
    }

    /// Which interface is wanted. Never a bridge of containers or flannel's own device: when the uplink loses its address for a moment,
    /// an expression that fits their addresses, too, would find them, and stay there. Other addresses of the network are not meant:
    /// hosts may have some.
    pub(super) fn sought(&self) -> Sought {
        Sought { never: self.containers.iter().copied().collect(), ..self.settings.uplink.clone() }
    }

    /// Offers the lease value; nothing is offered while the network cannot be served here.
    fn make_offer(&mut self) {
        let (Some(config), Some(survey)) = (&self.config, &self.survey) else { return };
        // With a document that cannot be used the last good one counts, after a restart, too: its lease is renewed.
        if self.survey_due || self.survey_trouble.is_some() {
            return;
        }
        let last = self.memory.last().own.as_ref();
        let previous = last.map(|own| own.subnets).or_else(|| {
            let written = |family| SubnetEnv::previous_subnet(&self.settings.subnet_file, family);
            Subnets::new(written(Family::V4), written(Family::V6))
        });
        let offer = Offer {
            config: config.clone(),
            value: survey.value.clone(),
            previous,
            former: last.map(|own| &own.value).filter(|value| survey.is_of(value)).cloned(),
            avoid: survey.avoid.clone(),
        };
        self.offer.send_if_modified(|current| {
            let news = current.as_ref() != Some(&offer);
            *current = Some(offer);
            news
        });
    }

    fn take_tenure(&mut self) {
        let state = self.tenure.borrow_and_update().clone();
        if let Some(own) = state.own
            && self.own.as_ref() != Some(&own)
        {
            self.holds(own);
            self.ready = false;
            self.look(Reason::Leases, Duration::ZERO);
        }
    }

    /// Keeps what is true now for a start without the store.
    async fn save(&mut self) {
        match (&self.document, &self.own) {
            (Some(document), Some(own)) if self.config_trouble.is_none() && self.survey_trouble.is_none() => {
                self.memory.keep(document, own, &self.leases).await;
            }
            _ => self.memory.postpone(),
        }
    }

    /// Tells everybody how the agent stands, and the operator what it waits for, once.
    fn announce(&mut self, snapshot: &Snapshot) {
        let waiting = self
            .config_trouble
            .clone()
            .or_else(|| self.survey_trouble.clone())
            .or_else(|| self.ipsec.state.borrow().trouble.clone())
            .or_else(|| snapshot.down.clone())
            .or_else(|| self.tenure.borrow().waiting.clone())
            .or_else(|| self.missed_config(snapshot));
        if self.told.is_due(waiting.as_ref(), Instant::now()) {
            let network = &self.settings.network;
            match &waiting {
                Some(finding) if self.own.is_some() => tracing::warn!(%network, "{finding}"),
                Some(finding) => tracing::error!(%network, "waiting: {finding}"),
                None => tracing::info!(%network, "not waiting any more"),
            }
        }
        if self.own.is_none() && self.tenure.borrow().waiting.is_some() {
            for finding in &snapshot.leases.findings {
                if self.told_of_keys.insert(finding.clone()) {
                    tracing::warn!(network = %self.settings.network, "{finding}");
                }
            }
        }
        let lease = match (&self.served, &self.own, &self.survey) {
            (Some(config), Some(own), Some(survey)) => Some(Leased {
                config: Some(config.clone()),
                networks: config.cidrs().collect(),
                subnets: own.subnets,
                mtu: survey.mtu,
                holder: None,
            }),
            _ => None,
        };
        let status = Status { waiting, lease, ready: self.ready };
        let (counters, network) = (&self.settings.counters, self.settings.network.as_str());
        counters.ready(network, status.ready);
        counters.store_up(network, snapshot.known && snapshot.down.is_none());
        counters.leases(network, self.leases.leases.len());
        self.publish.send_if_modified(|current| {
            let news = *current != status;
            *current = status;
            news
        });
    }

    /// Takes everything of the network away from this host.
    async fn retire(self) -> Result<(), String> {
        let known = self.config.iter().flat_map(|config| config.cidrs());
        let cidrs: BTreeSet<Prefix> =
            known.chain(self.env.iter().flat_map(|env| env.networks.iter().copied())).collect();
        let report = self.reconciler.retire(cidrs.clone()).await?;
        self.ipsec.retire(cidrs).await;
        if let Some(extension) = self.extension {
            extension.retire().await;
        }
        // Nothing is offered any more, so what is released now is not claimed again.
        self.offer.send_replace(None);
        if let Some(own) = &self.own
            && let Err(error) = self.settings.store.release(&own.subnets, &own.value).await
        {
            tracing::warn!("the lease {} stays in the store until it expires: {error}", own.subnets);
        }
        retire::traces(&self.settings.subnet_file, &self.settings.state_dir, &self.settings.network)
            .map_err(|error| format!("the files of the network could not be removed: {error}"))?;
        drop(self.hold);
        hold::remove(&self.settings.subnet_file, &self.settings.network);
        tracing::info!(network = %self.settings.network, "retired");
        match report.failed.first() {
            Some((made, cause)) => Err(format!("{cause} ({})", made.text)),
            None => Ok(()),
        }
    }
}
