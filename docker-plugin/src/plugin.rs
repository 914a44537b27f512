//! What both drivers work on: journal, ledgers, networks, and the veth pairs of endpoints.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flannel_core::words::addr::{InterfaceAddress, Prefix};
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::node::HostRoute;

use crate::addresses::Addresses;
use crate::answer::{Refusal, blocking};
use crate::ipam_driver::PoolId;
use crate::journal::{EndpointRecord, Ipam, Journal, NetworkRecord, Stage};
use crate::networks::Networks;
use crate::settings::Settings;
use crate::status::Status;
use crate::suspects::Suspects;
use crate::{definition, veth};

/// An endpoint that is created and never joined belongs to an engine that died in between.
const NEVER_JOINED_MAX: Duration = Duration::from_secs(600);

/// The plugin.
pub(crate) struct Plugin {
    settings: Arc<Settings>,
    journal: Arc<Journal>,
    networks: Arc<Networks>,
    suspects: Mutex<Suspects>,
}

impl Plugin {
    pub(crate) fn new(settings: Arc<Settings>, journal: Arc<Journal>, networks: Arc<Networks>) -> Self {
        Self { settings, journal, networks, suspects: Mutex::default() }
    }

    pub(crate) fn journal(&self) -> &Journal {
        &self.journal
    }

    pub(crate) fn networks(&self) -> &Arc<Networks> {
        &self.networks
    }

    /// What is served here.
    pub(crate) fn status(&self) -> Status {
        Status::of(&self.settings, &self.journal, &self.networks)
    }

    /// The command that works, for texts that say what does not.
    pub(crate) fn create_command(&self, cidr: impl Into<Option<Prefix>>) -> String {
        let name = &self.settings.driver_name;
        let cidr = cidr.into().map_or_else(|| definition::FALLBACK_CIDR.to_owned(), |cidr| cidr.to_string());
        format!("docker network create -d {name} --ipam-driver {name} --subnet {cidr} NAME")
    }

    /// A Docker network as it was created.
    pub(crate) fn docker_network(&self, id: &str) -> Result<NetworkRecord, Refusal> {
        self.journal.networks().get(id).ok_or_else(|| {
            Refusal(format!(
                "network {id} is unknown to the flannel plugin on this host (was {} cleared?): remove it with docker network rm and create it again",
                self.settings.common.state_dir.display()
            ))
        })
    }

    /// Forgets a Docker network; one that is not known is forgotten already. What only it used leaves the host.
    pub(crate) async fn forget_network(self: &Arc<Self>, id: String) -> Result<(), Refusal> {
        let plugin = Arc::clone(self);
        let forgotten = blocking(move || {
            let gone = plugin.journal.networks().remove(&id).map_err(|error| Refusal::of(&error))?;
            Ok(gone.map(|record| (id, record.network)))
        });
        let Some((id, network)) = forgotten.await? else { return Ok(()) };
        tracing::info!(docker_network = %id, %network, "network removed");
        self.networks.let_go(&network)
    }

    /// Docker networks that no endpoint is on.
    pub(crate) fn networks_without_endpoints(&self) -> BTreeSet<String> {
        let networks = self.journal.networks().all().into_iter().map(|(id, _)| id);
        let used = self.journal.endpoints().all().into_iter().map(|(_, record)| record.docker_network);
        &networks.collect::<BTreeSet<_>>() - &used.collect()
    }

    /// Routes of this host's main table.
    pub(crate) fn host_routes(&self) -> Result<Vec<HostRoute>, Refusal> {
        veth::host_routes()
    }

    fn addresses(&self, network: &NetworkName, subnet: Prefix) -> Result<Addresses, Refusal> {
        let file = self.settings.subnet_file(network);
        Addresses::open(&file, &self.settings.ledger_dir, network, subnet)
            .map_err(|error| Refusal::of(&error))
    }

    /// Whether a Docker network of this flannel network keeps the address as an auxiliary one.
    fn keeps(&self, network: &NetworkName, address: IpAddr) -> bool {
        let names = |cidr: &String| cidr.split('/').next().and_then(|ip| ip.parse().ok()) == Some(address);
        let auxiliary = |record: &NetworkRecord| {
            record.request.ipv4_data.iter().any(|pool| pool.aux_addresses.values().any(names))
        };
        self.journal.networks().find(|_, record| record.network == *network && auxiliary(record)).is_some()
    }

    /// Claims an address of a pool.
    pub(crate) fn claim(&self, pool: &PoolId, wanted: Option<IpAddr>) -> Result<InterfaceAddress, Refusal> {
        let addresses = self.addresses(&pool.network, pool.subnet)?;
        let claimed = match wanted {
            None => addresses.claim_any(pool.range),
            Some(address) => addresses.claim(address, |address| self.keeps(&pool.network, address)),
        };
        claimed.map_err(|error| Refusal::of(&error))
    }

    /// Gives an address back. That of an endpoint which never joined takes the endpoint along: its engine gave up.
    pub(crate) fn release(&self, pool: &PoolId, address: IpAddr) -> Result<(), Refusal> {
        let addresses = self.addresses(&pool.network, pool.subnet)?;
        let may = |endpoint: &str| match self.journal.endpoints().get(endpoint).map(|found| found.stage) {
            Some(Stage::Joined) => false,
            Some(Stage::Created) => self.journal.endpoints().remove(endpoint).is_ok(),
            Some(Stage::Deleted) | None => true,
        };
        addresses.release(address, may).map_err(|error| Refusal::of(&error))
    }

    /// Books an endpoint: its address becomes its own, and both are on disk.
    pub(crate) fn book(&self, id: &str, record: EndpointRecord) -> Result<(), Refusal> {
        let addresses = self.addresses(&record.network, record.address.prefix())?;
        let usurps = |holder: &str| match self.journal.endpoints().get(holder).map(|found| found.stage) {
            Some(Stage::Joined) => false,
            Some(Stage::Created) => self.journal.endpoints().remove(holder).is_ok(),
            Some(Stage::Deleted) | None => true,
        };
        let address = record.address.address();
        addresses.confirm(address, id, usurps).map_err(|error| Refusal::of(&error))?;
        self.journal.endpoints().put(id, record).map_err(|error| Refusal::of(&error))
    }

    /// Makes the endpoint's veth pair; the answer is the end that the engine takes.
    pub(crate) fn plug_in(
        &self,
        id: &str,
        endpoint: EndpointRecord,
        network: &NetworkRecord,
    ) -> Result<LinkName, Refusal> {
        // The backend may have changed since the network was created.
        let mtu = self.networks.mtu(&network.network).unwrap_or(network.mtu);
        let gateway = InterfaceAddress::new(network.gateway, network.pool.len());
        let gateway = gateway.map_err(|error| Refusal::of(&error))?;
        let made = veth::attach(id, &network.network, (network.bridge, gateway), endpoint.mac, mtu)?;
        let joined = EndpointRecord { stage: Stage::Joined, ..endpoint };
        if let Err(error) = self.journal.endpoints().put(id, joined) {
            // Undone before the answer: after a failed Join the engine deletes the endpoint, but only if it can.
            let _ = veth::detach(id, &network.network);
            return Err(Refusal::of(&error));
        }
        Ok(made)
    }

    /// Records that the engine has deleted an endpoint; false if it is not known.
    pub(crate) fn mark_deleted(&self, id: &str) -> Result<bool, Refusal> {
        let Some(record) = self.journal.endpoints().get(id) else { return Ok(false) };
        let deleted = EndpointRecord { stage: Stage::Deleted, ..record };
        self.journal.endpoints().put(id, deleted).map_err(|error| Refusal::of(&error))?;
        Ok(true)
    }

    /// Takes a deleted endpoint's veth pair away, after the engine has its answer.
    pub(crate) fn unplug_later(self: &Arc<Self>, id: String) {
        let plugin = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            if let Err(Refusal(text)) = plugin.unplug(&id, false) {
                // The record stays, so the next start or sweep tries again.
                tracing::warn!(endpoint = %id, "not cleaned up yet: {text}");
            }
        });
    }

    /// `forgotten`: the engine will not ask us to take the address back.
    fn unplug(&self, id: &str, forgotten: bool) -> Result<(), Refusal> {
        let Some(record) = self.journal.endpoints().get(id) else { return Ok(()) };
        veth::detach(id, &record.network)?;
        // Our own IPAM driver is asked to take the address back; an engine's own IPAM never tells us.
        if forgotten || record.ipam == Ipam::Engine {
            let addresses = self.addresses(&record.network, record.address.prefix())?;
            let released = addresses.release(record.address.address(), |holder| holder == id);
            released.map_err(|error| Refusal::of(&error))?;
        }
        self.journal.endpoints().remove(id).map_err(|error| Refusal::of(&error))?;
        Ok(())
    }

    /// Endpoints whose container ended while we were away: the veth pair is gone with the container's namespace, or both ends
    /// are back here, where an engine leaves them. It does not tell us again.
    fn reap(&self) {
        let links = match veth::existing() {
            Ok(links) => links,
            Err(Refusal(text)) => return tracing::warn!("the kernel's links are not known: {text}"),
        };
        let dead = |id: &str, record: &EndpointRecord| {
            let (host, container) = veth::ends(id, &record.network);
            record.stage == Stage::Joined && (!links.contains(&host) || links.contains(&container))
        };
        let endpoints = self.journal.endpoints().all().into_iter();
        let dead = endpoints.filter(|(id, record)| dead(id, record)).map(|(id, _)| id).collect();
        let confirmed =
            self.suspects.lock().unwrap_or_else(PoisonError::into_inner).look(dead, Instant::now());
        for id in confirmed {
            match self.unplug(&id, true) {
                Ok(()) => tracing::info!(endpoint = %id, "its container has ended: cleaned up"),
                Err(Refusal(text)) => tracing::warn!(endpoint = %id, "not cleaned up yet: {text}"),
            }
        }
    }

    /// What a crash of ours or of an engine's left: endpoints that were being deleted, endpoints that never joined,
    /// claims that nobody confirmed, networks that nobody uses any more.
    pub(crate) fn sweep(&self) {
        self.reap();
        for (id, record) in self.journal.endpoints().all() {
            let abandoned =
                record.stage == Stage::Created && Duration::from_secs(record.age()) > NEVER_JOINED_MAX;
            if record.stage == Stage::Deleted || abandoned {
                match self.unplug(&id, abandoned) {
                    Ok(()) => tracing::info!(endpoint = %id, "cleaned up"),
                    Err(Refusal(text)) => tracing::warn!(endpoint = %id, "not cleaned up yet: {text}"),
                }
            }
        }
        for (network, subnet) in self.networks.subnets_here() {
            let file = self.settings.subnet_file(&network);
            let swept =
                Addresses::find(&file, &self.settings.ledger_dir, &network, subnet).and_then(|found| {
                    let lives = |endpoint: &str| self.journal.endpoints().get(endpoint).is_some();
                    let keeps = |address| self.keeps(&network, address);
                    found.map_or(Ok(Vec::new()), |addresses| addresses.sweep(keeps, lives))
                });
            match swept {
                Ok(freed) => {
                    for address in freed {
                        tracing::info!(%network, %address, "reclaimed: no endpoint came for it");
                    }
                }
                Err(error) => tracing::warn!(%network, "ledger not swept: {}", Refusal::of(&error)),
            }
        }
        self.networks.let_go_of_stale();
    }
}
