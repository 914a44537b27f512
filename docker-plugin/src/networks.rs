//! The flannel networks that this host serves for Docker: one agent each.
//!
//! **Which ones run** — a network runs while a Docker network stands on it, while its ledger holds an address (CNI shares
//! it), and for a moment after an engine asked for its pool. The default network of a cluster (`--etcd-endpoints`) runs from
//! the start and always, because CNI on the same host reads its subnet.env; without Docker networks it keeps no bridge.
//! With the embedded store nothing runs that nobody uses.
//! **When the last user goes** — everything of the network leaves the host: bridge, tunnel, rules, ledger, lease; and the
//! definition, if this plugin made it and no other host holds a lease.

mod bridge;
mod known;
mod read_along;
mod tell;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, watch};
use tokio::time::{Instant, timeout_at};

use flannel_core::run::agent::{Agent, Leased, Status};
use flannel_core::run::health::Counters;
use flannel_core::run::store::Store;
use flannel_core::run::{retire, setup};
use flannel_core::touch::ledger::{Entry, Ledger, Retired};
use flannel_core::words::addr::{Family, Prefix};
use flannel_core::words::exposure::Exposure;
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::units::Mtu;

use crate::answer::{Refusal, blocking};
use crate::catalogue::Catalogue;
use crate::definition::Wish;
use crate::exposure;
use crate::half::{Half, Halves, create_command};
use crate::journal::{Journal, PoolRecord};
use crate::settings::Settings;

use self::bridge::remove_bridge;

/// How long a call may wait for a store and for a lease, together: an engine's user sees an error within 5 s.
const PATIENCE: Duration = Duration::from_millis(3500);

/// How long the kernel may take to be as planned before a network is handed over all the same.
const SETTLING: Duration = Duration::from_millis(1000);

/// This node's part of a flannel network.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    pub(crate) network: NetworkName,
    /// All of the network.
    pub(crate) cidr: Prefix,
    /// What this node holds of it.
    pub(crate) subnet: Prefix,
    /// First address of the subnet.
    pub(crate) gateway: IpAddr,
    /// The same for IPv6, if the network has it.
    pub(crate) v6: Option<Half>,
    pub(crate) mtu: Mtu,
}

impl Part {
    fn of(network: &NetworkName, lease: &Leased) -> Option<Self> {
        Some(Self {
            network: network.clone(),
            cidr: lease.network(Family::V4)?,
            subnet: lease.subnets.v4()?,
            gateway: lease.gateway(Family::V4)?.address(),
            v6: Half::of(lease),
            mtu: lease.mtu,
        })
    }

    /// This node's subnet of a family.
    pub(crate) fn subnet_of(&self, family: Family) -> Option<Prefix> {
        match family {
            Family::V4 => Some(self.subnet),
            Family::V6 => self.v6.map(|half| half.subnet),
        }
    }
}

/// A network that runs.
struct Served {
    agent: Agent,
    status: watch::Receiver<Status>,
    bridge: Option<LinkName>,
    isolated_from: watch::Sender<BTreeSet<Prefix>>,
    /// What its agent was told last of its endpoints.
    exposure: Option<Exposure>,
}

impl Served {
    /// All of the network, in every family.
    fn cidrs(&self) -> Vec<Prefix> {
        self.status.borrow().lease.as_ref().map(|lease| lease.networks.clone()).unwrap_or_default()
    }

    fn part(&self, network: &NetworkName) -> Option<Part> {
        self.status.borrow().lease.as_ref().and_then(|lease| Part::of(network, lease))
    }
}

/// All of them.
pub(crate) struct Networks {
    settings: Arc<Settings>,
    journal: Arc<Journal>,
    store: Store,
    catalogue: Catalogue,
    counters: Counters,
    /// Networks of which an engine has one half.
    halves: Halves,
    served: Mutex<BTreeMap<NetworkName, Served>>,
    /// One change of what runs at a time, for each network: none waits for another's store.
    turns: Mutex<BTreeMap<NetworkName, Arc<tokio::sync::Mutex<()>>>>,
    /// Nothing is started any more.
    stopping: AtomicBool,
}

impl Networks {
    pub(crate) fn new(
        settings: Arc<Settings>,
        journal: Arc<Journal>,
        store: Store,
        counters: Counters,
    ) -> Self {
        let catalogue = Catalogue::new(store.clone(), &settings);
        Self {
            settings,
            journal,
            store,
            catalogue,
            counters,
            halves: Halves::default(),
            served: Mutex::default(),
            turns: Mutex::default(),
            stopping: AtomicBool::new(false),
        }
    }

    fn served(&self) -> MutexGuard<'_, BTreeMap<NetworkName, Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to start, stop, define or retire a network.
    async fn turn(&self, network: &NetworkName) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(turns.entry(network.clone()).or_default())
        };
        turn.lock_owned().await
    }

    /// Starts what ran before, and the cluster's default network; takes away what was being taken away.
    pub(crate) async fn start(self: &Arc<Self>) {
        let mut names: BTreeSet<NetworkName> =
            self.journal.networks().all().into_iter().map(|(_, record)| record.network).collect();
        for (_, record) in self.journal.pools().all() {
            match record.is_fresh() || self.has_users(&record.network) {
                true => drop(names.insert(record.network)),
                false => self.let_go_later(&record.network),
            }
        }
        if self.always_runs(&NetworkName::default_network()) {
            names.insert(NetworkName::default_network());
        }
        for name in names {
            let bridged = self.asked_for(&name) || self.has_users(&name);
            if let Err(Refusal(text)) = self.serve(&name, bridged).await {
                tracing::error!(network = %name, "not served: {text}");
            }
        }
    }

    /// Ends every agent. The data path stays: containers go on while the plugin is away.
    pub(crate) async fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        let served = std::mem::take(&mut *self.served());
        for (_, served) in served {
            served.agent.stop().await;
        }
    }

    fn always_runs(&self, network: &NetworkName) -> bool {
        network.is_default() && self.settings.embedded_store().is_none()
    }

    /// Whether an engine has just asked for its pool.
    fn asked_for(&self, network: &NetworkName) -> bool {
        self.journal.pools().get(network.as_str()).is_some_and(|record| record.is_fresh())
    }

    /// Whether a Docker network or a container is on it.
    fn has_users(&self, network: &NetworkName) -> bool {
        let docker = self.journal.networks().find(|_, record| record.network == *network).is_some();
        docker || self.addresses_held(network, |_| true)
    }

    fn addresses_held(&self, network: &NetworkName, counts: impl Fn(&Entry) -> bool) -> bool {
        let file = self.settings.subnet_file(network);
        let ledger = Ledger::find(&file, &self.settings.ledger_dir, network.ledger());
        let entries = ledger.and_then(|ledger| ledger.map_or(Ok(Vec::new()), |ledger| ledger.look()));
        let held = entries.map(|entries| entries.iter().any(counts));
        held.unwrap_or_else(|error| {
            // In doubt it is in use: taking a network from under containers is the worse mistake.
            tracing::warn!(%network, "{}", Refusal::of(&error));
            true
        })
    }

    // --- from a wish to a part ---------------------------------------------------------------------------------------

    /// This node's part of the network that a wish names, defined and leased if need be. Fails within seconds, with what it
    /// waits for.
    pub(crate) async fn part_for(self: &Arc<Self>, wish: &Wish) -> Result<Part, Refusal> {
        let deadline = Instant::now() + PATIENCE;
        let network = timeout_at(deadline, self.bring_up(wish)).await.unwrap_or_else(|_| {
            Err(Refusal(format!("the store did not answer within {} s", PATIENCE.as_secs_f32())))
        })?;
        match self.lease(&network, deadline).await.and_then(|part| read_along::as_asked(part, wish)) {
            Ok(part) => {
                let here = |record: &mut PoolRecord| record.subnet = Some(part.subnet);
                self.journal.pools().update(network.as_str(), here).map_err(|e| Refusal::of(&e))?;
                Ok(part)
            }
            Err(refusal) => {
                // Nobody has it, so nothing of it stays; a definition that was made for it goes too.
                self.withdraw(&network)?;
                Err(refusal)
            }
        }
    }

    /// The IPv6 half of this node's part of a network. A wish that names none means the one whose IPv4 half was asked for just
    /// before, if that is one; else the default network, as without IPv6.
    pub(crate) async fn half_for(self: &Arc<Self>, wish: Wish) -> Result<(Part, Half), Refusal> {
        let wish = match wish.names_none() {
            true => wish.named(self.halves.only()?),
            false => wish,
        };
        let part = self.part_for(&wish).await?;
        let Some(half) = part.v6 else {
            self.give_back(&part.network)?;
            return Err(Refusal(format!(
                "flannel network {} is {} and has no IPv6: leave --ipv6 out, switch it on in the store's config (EnableIPv6, IPv6Network), or, for a new network: {}",
                part.network,
                part.cidr,
                create_command(&self.settings.driver_name, Some(part.cidr), wish.cidr_v6)
            )));
        };
        Ok((part, half))
    }

    /// An engine was given the IPv4 half of a network, and may ask for the other one next.
    pub(crate) fn halved(&self, network: &NetworkName) {
        self.halves.ask(network);
    }

    /// The network of a wish, running. What is defined and asked for cannot be taken away in between, so that
    /// `docker network rm` and `create` may follow each other closely.
    async fn bring_up(self: &Arc<Self>, wish: &Wish) -> Result<NetworkName, Refusal> {
        let network = match self.local(wish) {
            Some(network) => network,
            None => self.catalogue.named(wish).await?,
        };
        let _turn = self.turn(&network).await;
        let defined = match self.local(wish).is_some_and(|local| local == network) {
            true => None,
            false => self.catalogue.settle(wish, &network).await?,
        };
        // What the engine does next may come after a restart of ours.
        let ask = |record: &mut PoolRecord| {
            record.defined = defined.or_else(|| record.defined.take());
            record.ask();
        };
        let asked = self.journal.pools().upsert(network.as_str(), || PoolRecord::new(&network), ask);
        asked.map_err(|error| Refusal::of(&error))?;
        self.serve_in_turn(&network, true).await?;
        Ok(network)
    }

    /// One request for the network's pool has been followed up.
    fn followed(&self, network: &NetworkName) -> Result<(), Refusal> {
        let noted = self.journal.pools().update(network.as_str(), PoolRecord::follow);
        noted.map_err(|error| Refusal::of(&error))
    }

    /// The wish answered from what runs here: no store is asked.
    fn local(&self, wish: &Wish) -> Option<NetworkName> {
        let default = NetworkName::default_network();
        let served = self.served();
        served
            .iter()
            .find(|(name, served)| {
                let status = served.status.borrow();
                let Some(lease) = &status.lease else { return false };
                let meant = match (&wish.network, wish.cidr.or(wish.cidr_v6)) {
                    (Some(wanted), _) => wanted == *name,
                    (None, Some(cidr)) => lease.network(cidr.family()) == Some(cidr),
                    (None, None) => **name == default,
                };
                // What defines a network that another agent holds is not known here; its CIDR is.
                let agrees = match &lease.config {
                    Some(config) => wish.agrees_with(config),
                    None => wish.names_only(&lease.networks),
                };
                meant && agrees
            })
            .map(|(name, _)| name.clone())
    }

    /// Waits for the lease, and a moment for the kernel.
    async fn lease(&self, network: &NetworkName, deadline: Instant) -> Result<Part, Refusal> {
        let Some(mut status) = self.served().get(network).map(|served| served.status.clone()) else {
            return Err(Refusal(format!("network {network} is not served")));
        };
        let leased = timeout_at(deadline, status.wait_for(|status| status.lease.is_some())).await;
        // What it answers holds the value's lock.
        let leased = leased.is_ok_and(|leased| leased.is_ok());
        if !leased {
            let waits_for = status.borrow().waiting.clone();
            let text =
                waits_for.map_or_else(|| "the lease is still being acquired".to_owned(), |w| w.to_string());
            return Err(Refusal(format!("no lease of flannel network {network} on this host yet: {text}")));
        }
        let settled = Instant::now() + SETTLING;
        drop(timeout_at(settled, status.wait_for(|status| status.ready)).await);
        let lease = status.borrow().lease.clone();
        let part = lease
            .and_then(|lease| Part::of(network, &lease))
            .ok_or_else(|| Refusal(format!("flannel network {network} has no IPv4 subnet on this host")))?;
        if let Some(bridge) = self.bridge(network) {
            let subnet = part.subnet;
            blocking(move || bridge::alone_on(subnet, bridge)).await?;
        }
        Ok(part)
    }

    // --- what runs ---------------------------------------------------------------------------------------------------

    /// Runs a network's agent, with or without a bridge.
    async fn serve(self: &Arc<Self>, network: &NetworkName, bridged: bool) -> Result<(), Refusal> {
        if self.runs(network, bridged) {
            return Ok(());
        }
        let _turn = self.turn(network).await;
        self.serve_in_turn(network, bridged).await
    }

    fn runs(&self, network: &NetworkName, bridged: bool) -> bool {
        self.served().get(network).is_some_and(|served| served.bridge.is_some() == bridged)
    }

    async fn serve_in_turn(self: &Arc<Self>, network: &NetworkName, bridged: bool) -> Result<(), Refusal> {
        if self.runs(network, bridged) {
            return Ok(());
        }
        let bridge = match bridged {
            true => Some(self.settled_bridge(network)?),
            false => None,
        };
        if self.stopping.load(Ordering::Relaxed) {
            return Err("the plugin is stopping".into());
        }
        let reads_only = self.catalogue.is_foreign(network).await?;
        let known = self.served().get(network).and_then(|served| served.part(network));
        if let (Some(bridge), Some(part)) = (bridge, known) {
            blocking(move || bridge::alone_on(part.subnet, bridge)).await?;
        }
        let before = self.served().remove(network);
        if let Some(before) = before {
            before.agent.stop().await;
        }
        let (isolated_from, isolation) = watch::channel(BTreeSet::new());
        let mut settings = setup::agent(
            &self.settings.common,
            &self.store,
            network.clone(),
            self.counters.clone(),
            isolation,
        )
        .map_err(|error| Refusal(format!("{error:#}")))?;
        settings.bridge = bridge;
        settings.reads_only = reads_only;
        settings.exposure = Some(exposure::of(&self.journal, network));
        let agent = Agent::spawn(settings);
        let status = agent.status();
        self.served().insert(
            network.clone(),
            Served { agent, status: status.clone(), bridge, isolated_from, exposure: None },
        );
        // What was recorded while it was being started.
        drop(self.expose(network));
        self.isolate();
        tokio::spawn(Arc::clone(self).follow(status));
        Ok(())
    }

    /// A Docker network stands on the network now, so it has a pool record whoever's IPAM it came by.
    /// `pools` is how many requests it came by.
    pub(crate) fn taken_up(&self, part: &Part, pools: usize) -> Result<(), Refusal> {
        self.halves.settle(&part.network);
        let follow = |record: &mut PoolRecord| {
            record.subnet = Some(part.subnet);
            (0..pools).for_each(|_| record.follow());
        };
        let made = || PoolRecord::new(&part.network);
        let noted = self.journal.pools().upsert(part.network.as_str(), made, follow);
        noted.map_err(|error| Refusal::of(&error))
    }

    /// An engine gives back a pool that it asked for. While a Docker network stands on the network, the pool is that one's and
    /// DeleteNetwork follows; a request for another Docker network may be under way at the same time.
    pub(crate) fn give_back(self: &Arc<Self>, network: &NetworkName) -> Result<(), Refusal> {
        self.halves.settle(network);
        match self.journal.networks().find(|_, record| record.network == *network).is_none() {
            true => self.withdraw(network),
            false => Ok(()),
        }
    }

    /// A request for the network's pool came to nothing.
    pub(crate) fn withdraw(self: &Arc<Self>, network: &NetworkName) -> Result<(), Refusal> {
        self.followed(network)?;
        self.let_go_later(network);
        Ok(())
    }

    /// The same for pools that were asked for so long ago that the engine must have died since.
    pub(crate) fn let_go_of_stale(self: &Arc<Self>) {
        for (_, record) in self.journal.pools().all() {
            if !record.is_fresh() && !self.has_users(&record.network) {
                self.let_go_later(&record.network);
            }
        }
    }

    pub(crate) fn let_go_later(self: &Arc<Self>, network: &NetworkName) {
        let (networks, network) = (Arc::clone(self), network.clone());
        // Only a running plugin gets here; at its start the sweep repeats what a stop interrupted.
        tokio::runtime::Handle::current().spawn(async move {
            if let Err(Refusal(text)) = networks.retire_unused(&network).await {
                tracing::warn!(%network, "not everything of it could be removed: {text}");
            }
        });
    }

    async fn retire_unused(self: &Arc<Self>, network: &NetworkName) -> Result<(), Refusal> {
        let _turn = self.turn(network).await;
        // Said by another call that came first.
        let known = self.journal.pools().get(network.as_str()).is_some();
        if !known || self.asked_for(network) || self.has_users(network) {
            return Ok(());
        }
        // The agent first: it looks into the ledger as long as it runs.
        let served = self.served().remove(network);
        let file = self.settings.subnet_file(network);
        let anothers = match &served {
            Some(served) => served.reads_along(),
            None => self.catalogue.is_anothers(network, &self.settings).await?,
        };
        if anothers {
            self.read_no_more(network, served).await?;
        } else if self.always_runs(network) {
            if let Some(served) = served {
                served.agent.stop().await;
            }
            // The agent that keeps no bridge does not know of one.
            let taken_down = blocking(move || remove_ledger(&file).and_then(|()| remove_bridge(&file))).await;
            self.serve_in_turn(network, false).await?;
            taken_down?;
        } else {
            if let Some(served) = served {
                served.agent.retire().await.map_err(Refusal)?;
            }
            self.isolate();
            // What the agent leaves, or all of it if none ran.
            let left = retire::everything(&self.settings.common, self.store.network(network)).await;
            if let Err(error) = left {
                if self.has_users(network) {
                    // A container of CNI came in this very moment.
                    self.serve_in_turn(network, true).await?;
                }
                return Err(Refusal(format!("{error:#}")));
            }
            let defined = self.journal.pools().get(network.as_str()).and_then(|record| record.defined);
            self.catalogue.undefine(network, defined.as_deref()).await?;
        }
        self.journal.pools().remove(network.as_str()).map_err(|error| Refusal::of(&error))?;
        tracing::info!(%network, "no Docker network uses it any more");
        Ok(())
    }
}

/// Removes the ledger of a network that nobody is on any more.
fn remove_ledger(subnet_file: &Path) -> Result<(), Refusal> {
    match Ledger::retire(subnet_file).map_err(|error| Refusal::of(&error))? {
        Retired::Absent | Retired::Gone => Ok(()),
        Retired::InUse(held) => Err(Refusal(format!("its ledger holds {} addresses again", held.len()))),
    }
}
