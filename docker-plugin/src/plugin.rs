//! What both drivers work on: journal, ledgers, networks, and the veth pairs of endpoints.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::words::addr::{InterfaceAddress, Prefix};
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::node::HostRoute;

use crate::addresses::Addresses;
use crate::answer::Refusal;
use crate::ipam_driver::PoolId;
use crate::journal::{EndpointRecord, Ipam, Journal, NetworkRecord, Stage};
use crate::networks::Networks;
use crate::settings::Settings;
use crate::{definition, veth};

/// An endpoint that is created and never joined belongs to an engine that died in between.
const NEVER_JOINED_MAX: Duration = Duration::from_secs(600);

/// The plugin.
pub(crate) struct Plugin {
    settings: Arc<Settings>,
    journal: Arc<Journal>,
    networks: Arc<Networks>,
}

impl Plugin {
    pub(crate) fn new(settings: Arc<Settings>, journal: Arc<Journal>, networks: Arc<Networks>) -> Self {
        Self { settings, journal, networks }
    }

    pub(crate) fn journal(&self) -> &Journal {
        &self.journal
    }

    pub(crate) fn networks(&self) -> &Arc<Networks> {
        &self.networks
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
            if let Err(Refusal(text)) = plugin.unplug(&id) {
                // The record stays, so the next start or sweep tries again.
                tracing::warn!(endpoint = %id, "not cleaned up yet: {text}");
            }
        });
    }

    fn unplug(&self, id: &str) -> Result<(), Refusal> {
        let Some(record) = self.journal.endpoints().get(id) else { return Ok(()) };
        veth::detach(id, &record.network)?;
        // Our own IPAM driver is asked to take the address back; an engine's own IPAM never tells us.
        if record.ipam == Ipam::Engine {
            let addresses = self.addresses(&record.network, record.address.prefix())?;
            let released = addresses.release(record.address.address(), |holder| holder == id);
            released.map_err(|error| Refusal::of(&error))?;
        }
        self.journal.endpoints().remove(id).map_err(|error| Refusal::of(&error))?;
        Ok(())
    }

    /// What a crash of ours or of an engine's left: endpoints that were being deleted, endpoints that never joined,
    /// claims that nobody confirmed, networks that nobody uses any more.
    pub(crate) fn sweep(&self) {
        for (id, record) in self.journal.endpoints().all() {
            let abandoned =
                record.stage == Stage::Created && Duration::from_secs(record.age()) > NEVER_JOINED_MAX;
            if record.stage == Stage::Deleted || abandoned {
                match self.unplug(&id) {
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
