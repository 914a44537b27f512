//! What both drivers work on: journal, ledgers, networks, and the veth pairs of endpoints.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use flannel_core::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::node::HostRoute;

use crate::addresses::Addresses;
use crate::answer::{Refusal, blocking};
use crate::half::create_command;
use crate::journal::{EndpointRecord, Ipam, Journal, NetworkRecord, Stage};
use crate::networks::{Networks, Part};
use crate::pool_id::PoolId;
use crate::ports::Ports;
use crate::settings::Settings;
use crate::status::Status;
use crate::suspects::Suspects;
use crate::turns::Turns;
use crate::{definition, port_socket, veth, wire};

mod publish;
mod sweep;

/// The plugin.
pub(crate) struct Plugin {
    settings: Arc<Settings>,
    journal: Arc<Journal>,
    networks: Arc<Networks>,
    /// By endpoint.
    turns: Turns,
    /// Endpoints whose container looks dead.
    suspects: Mutex<Suspects>,
    ports: Ports,
}

impl Plugin {
    pub(crate) fn new(settings: Arc<Settings>, journal: Arc<Journal>, networks: Arc<Networks>) -> Self {
        port_socket::raise_limit();
        let ports = Ports::default();
        journal.endpoints().each(|id, record| ports.restore(id, &record.network, &record.ports));
        let (turns, suspects) = (Turns::default(), Mutex::default());
        Self { settings, journal, networks, turns, suspects, ports }
    }

    pub(crate) fn networks(&self) -> &Arc<Networks> {
        &self.networks
    }

    /// Whether what leaves a network gets this host's address, unless the network says otherwise.
    pub(crate) fn masquerades(&self) -> bool {
        self.settings.common.ip_masq
    }

    /// What is served here.
    pub(crate) fn status(&self) -> Status {
        Status::of(&self.settings, &self.journal, self.networks.states())
    }

    /// The command that works, for texts that say what does not.
    pub(crate) fn create_command(&self, cidr: impl Into<Option<Prefix>>) -> String {
        let name = &self.settings.driver_name;
        let cidr = cidr.into().map_or_else(|| definition::FALLBACK_CIDR.to_owned(), |cidr| cidr.to_string());
        format!("docker network create -d {name} --ipam-driver {name} --subnet {cidr} NAME")
    }

    /// The commands that work in a swarm.
    pub(crate) fn swarm_commands(&self, cidr: Option<Prefix>) -> String {
        let name = &self.settings.driver_name;
        let cidr = cidr.map_or_else(|| definition::FALLBACK_CIDR.to_owned(), |cidr| cidr.to_string());
        format!(
            "on every node: docker network create --config-only --ipam-driver {name} --subnet {cidr} NAME-config; then on a manager: docker network create -d {name} --scope swarm --config-from NAME-config --attachable NAME"
        )
    }

    /// The same for a network that runs here, in the families that are meant.
    pub(crate) fn command_for(&self, part: &Part, family: Family) -> String {
        match (family, part.v6) {
            (Family::V6, Some(half)) => {
                create_command(&self.settings.driver_name, Some(part.cidr), Some(half.cidr))
            }
            _ => self.create_command(part.cidr),
        }
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

    fn addresses(&self, network: &NetworkName, subnets: &[Prefix]) -> Result<Addresses, Refusal> {
        let file = self.settings.subnet_file(network);
        Addresses::open(&file, &self.settings.ledger_dir, network, subnets)
            .map_err(|error| Refusal::of(&error))
    }

    fn addresses_if_any(
        &self,
        network: &NetworkName,
        subnets: &[Prefix],
    ) -> Result<Option<Addresses>, Refusal> {
        let file = self.settings.subnet_file(network);
        Addresses::find(&file, &self.settings.ledger_dir, network, subnets)
            .map_err(|error| Refusal::of(&error))
    }

    // --- Docker networks ---------------------------------------------------------------------------------------------

    /// Whether a Docker network is there already, as this request says. One that was made otherwise and has no endpoints is
    /// one that its engine removed while nobody listened: a swarm makes its networks again under the same id.
    pub(crate) fn is_created(&self, request: &wire::CreateNetwork) -> Result<bool, Refusal> {
        let id = &request.network_id;
        match self.journal.networks().get(id) {
            Some(known) if known.request == *request => Ok(true),
            Some(known) if self.endpoints_of(id).next().is_some() => Err(Refusal(format!(
                "network {id} exists already on subnet {} of {}, was made with other options, and has endpoints: remove it with docker network rm and create it again",
                known.pool, known.cidr
            ))),
            Some(_) | None => Ok(false),
        }
    }

    fn endpoints_of(&self, docker_network: &str) -> impl Iterator<Item = String> {
        let all = self.journal.endpoints().all().into_iter();
        all.filter(move |(_, endpoint)| {
            endpoint.docker_network == docker_network && endpoint.stage != Stage::Deleted
        })
        .map(|(id, _)| id)
    }

    /// Records a Docker network; its auxiliary addresses are nobody else's from now on.
    pub(crate) fn create_network(&self, part: &Part, record: NetworkRecord) -> Result<(), Refusal> {
        let id = record.request.network_id.clone();
        // Only our own IPAM driver was asked once for each family.
        let pools = if record.ipam == Ipam::Flannel { record.subnets().len() } else { 1 };
        let _turn = self.turns.take(&id);
        self.keep_auxiliary(&id, &record)?;
        self.journal.networks().put(&id, record).map_err(|error| Refusal::of(&error))?;
        self.networks.taken_up(part, pools)
    }

    fn keep_auxiliary(&self, id: &str, record: &NetworkRecord) -> Result<(), Refusal> {
        let kept = record.auxiliary_addresses()?;
        let addresses = match kept.is_empty() {
            // No ledger is made for nothing.
            true => self.addresses_if_any(&record.network, &record.subnets())?,
            false => Some(self.addresses(&record.network, &record.subnets())?),
        };
        addresses.map_or(Ok(()), |addresses| addresses.keep(id, &kept)).map_err(|error| Refusal::of(&error))
    }

    /// Docker networks that no endpoint is on.
    pub(crate) fn networks_without_endpoints(&self) -> BTreeSet<String> {
        let networks = self.journal.networks().all().into_iter().map(|(id, _)| id);
        let used = self.journal.endpoints().all().into_iter().map(|(_, record)| record.docker_network);
        &networks.collect::<BTreeSet<_>>() - &used.collect()
    }

    /// Forgets a Docker network and what is left of it here: endpoints, auxiliary addresses and, if nobody else uses that, the
    /// flannel network, after the answer. One that is not known is forgotten already.
    pub(crate) async fn forget_network(self: &Arc<Self>, id: String) -> Result<(), Refusal> {
        let plugin = Arc::clone(self);
        let forgotten = blocking(move || plugin.forget(&id)).await?;
        if let Some(network) = forgotten {
            self.networks.let_go_later(&network);
        }
        Ok(())
    }

    fn forget(self: &Arc<Self>, id: &str) -> Result<Option<NetworkName>, Refusal> {
        let _turn = self.turns.take(id);
        let Some(record) = self.journal.networks().get(id) else { return Ok(None) };
        for endpoint in self.endpoints_of(id) {
            if self.mark_deleted(&endpoint)? {
                self.unplug_later(endpoint, true);
            }
        }
        if let Some(addresses) = self.addresses_if_any(&record.network, &record.subnets())? {
            addresses.keep(id, &BTreeSet::new()).map_err(|error| Refusal::of(&error))?;
        }
        self.journal.networks().remove(id).map_err(|error| Refusal::of(&error))?;
        tracing::info!(docker_network = %id, network = %record.network, "network removed");
        Ok(Some(record.network))
    }

    // --- addresses ---------------------------------------------------------------------------------------------------

    /// Claims an address of a pool.
    pub(crate) fn claim(&self, pool: &PoolId, wanted: Option<IpAddr>) -> Result<InterfaceAddress, Refusal> {
        let addresses = self.addresses(&pool.network, &[pool.subnet])?;
        let claimed = match wanted {
            None => addresses.sparing(self.chosen(&pool.network)).claim_any(pool.subnet.family(), pool.range),
            Some(address) => addresses.claim(address, |holder| self.makes_way(holder)),
        };
        let claimed = claimed.map_err(|error| Refusal::of(&error))?;
        self.note_chosen(&pool.network, wanted)?;
        Ok(claimed)
    }

    /// Addresses of a network that somebody asked for by name.
    fn chosen(&self, network: &NetworkName) -> BTreeSet<IpAddr> {
        self.journal.pools().get(network.as_str()).map(|record| record.chosen).unwrap_or_default()
    }

    fn note_chosen(&self, network: &NetworkName, wanted: Option<IpAddr>) -> Result<(), Refusal> {
        let Some(address) = wanted.filter(|address| !self.chosen(network).contains(address)) else {
            return Ok(());
        };
        let noted = self.journal.pools().update(network.as_str(), |record| record.choose(address));
        noted.map_err(|error| Refusal::of(&error))
    }

    /// Gives an address back. That of an endpoint which never joined takes the endpoint along: its engine gave up.
    pub(crate) fn release(&self, pool: &PoolId, address: IpAddr) -> Result<(), Refusal> {
        let addresses = self.addresses(&pool.network, &[pool.subnet])?;
        addresses.release(address, |holder| self.gives_up(holder)).map_err(|error| Refusal::of(&error))
    }

    // --- endpoints ---------------------------------------------------------------------------------------------------

    /// Books an endpoint with the address that an IPAM driver chose: it becomes its own, and both are on disk. Booked already
    /// in the same way is booked.
    pub(crate) fn book(&self, id: &str, record: EndpointRecord) -> Result<(), Refusal> {
        let _turn = self.turns.take(id);
        if let Some(known) = self.live_endpoint(id) {
            return agrees(id, &known, &record);
        }
        self.finish_deleting(id, false)?;
        let addresses = self.addresses(&record.network, &record.subnets())?;
        for address in record.addresses() {
            let confirmed = addresses.confirm(address.address(), id, |holder| self.gives_up(holder));
            if let Err(error) = confirmed {
                return Err(undone(&addresses, id, &record, Refusal::of(&error)));
            }
        }
        self.record_endpoint(&addresses, id, record)
    }

    /// Books an endpoint without an IPAM driver: `wanted`, or any address, becomes its own.
    pub(crate) fn book_any(
        &self,
        id: &str,
        (docker_network, network): (&str, &NetworkRecord),
        wanted: Option<IpAddr>,
        mac: Option<Mac>,
    ) -> Result<EndpointRecord, Refusal> {
        let _turn = self.turns.take(id);
        let record = |addresses: (InterfaceAddress, Option<InterfaceAddress>)| {
            let mac = mac.unwrap_or_else(|| Mac::for_address(addresses.0.address()));
            EndpointRecord::new(docker_network, network, addresses, mac)
        };
        if let Some(known) = self.live_endpoint(id) {
            let same = wanted
                .is_none_or(|wanted| known.addresses().iter().any(|address| address.address() == wanted));
            let asked = match same {
                true => record((known.address, known.address_v6)),
                false => return Err(other_address(id, &known)),
            };
            return agrees(id, &known, &asked).map(|()| known);
        }
        self.finish_deleting(id, false)?;
        let addresses = self.addresses(&network.network, &network.subnets())?;
        let addresses = addresses.sparing(self.chosen(&network.network));
        let claimed = addresses.claim_for(id, wanted, |holder| self.makes_way(holder));
        let claimed = claimed.map_err(|error| Refusal::of(&error))?;
        let mut claimed = claimed.into_iter();
        let Some(first) = claimed.next() else {
            return Err(Refusal(format!("network {docker_network} has no subnet here")));
        };
        let record = record((first, claimed.next()));
        self.record_endpoint(&addresses, id, record.clone())?;
        self.note_chosen(&network.network, wanted)?;
        Ok(record)
    }

    fn live_endpoint(&self, id: &str) -> Option<EndpointRecord> {
        self.journal.endpoints().get(id).filter(|known| known.stage != Stage::Deleted)
    }

    /// What a failed CreateEndpoint took is given back before it is answered: no engine deletes what it did not get.
    fn record_endpoint(
        &self,
        addresses: &Addresses,
        id: &str,
        record: EndpointRecord,
    ) -> Result<(), Refusal> {
        let put = self.journal.endpoints().put(id, record.clone());
        put.map_err(|error| undone(addresses, id, &record, Refusal::of(&error)))
    }

    /// Makes the endpoint's veth pair; the answer is the end that the engine takes.
    pub(crate) fn plug_in(
        &self,
        id: &str,
        sandbox: &str,
        network: &NetworkRecord,
    ) -> Result<LinkName, Refusal> {
        let _turn = self.turns.take(id);
        let Some(endpoint) = self.live_endpoint(id) else {
            return Err(Refusal(format!("endpoint {id} is unknown: it was never created, or is deleted")));
        };
        let gateway = InterfaceAddress::new(network.gateway, network.pool.len());
        // The backend may have changed since the network was created.
        let fits = self.networks.mtu(&network.network).unwrap_or(network.mtu);
        let port = veth::Port {
            network: network.network.clone(),
            // After a reboot somebody else may have named the bridge first.
            bridge: self.networks.bridge(&network.network).unwrap_or(network.bridge),
            gateways: [gateway.map_err(|error| Refusal::of(&error))?]
                .into_iter()
                .chain(network.v6.map(|half| half.gateway))
                .collect(),
            mac: endpoint.mac,
            mtu: network.options.mtu.map_or(fits, |wanted| wanted.min(fits)),
            bridge_mtu: fits,
            isolated: network.options.isolated && !veth::bridged_packets_are_filtered(),
        };
        let made = veth::attach(id, &port)?;
        let joined = EndpointRecord { stage: Stage::Joined, sandbox: sandbox.to_owned(), ..endpoint };
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
        let deleted = EndpointRecord { stage: Stage::Deleted, ports: BTreeSet::new(), ..record };
        self.journal.endpoints().put(id, deleted).map_err(|error| Refusal::of(&error))?;
        self.ports.release(id);
        self.networks.expose_changes();
        Ok(true)
    }

    /// Takes a deleted endpoint's veth pair away, after the engine has its answer. `forgotten` as in [`Self::unplug`].
    pub(crate) fn unplug_later(self: &Arc<Self>, id: String, forgotten: bool) {
        let plugin = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let network = plugin.journal.endpoints().get(&id).map(|record| record.network);
            match (plugin.unplug(&id, forgotten), network) {
                // Its address may have been the last use of the network: DeleteNetwork does not wait for us.
                (Ok(()), Some(network)) => plugin.networks.let_go_later(&network),
                (Ok(()), None) => {}
                // The record stays, so the next start or sweep tries again.
                (Err(Refusal(text)), _) => tracing::warn!(endpoint = %id, "not cleaned up yet: {text}"),
            }
        });
    }

    /// `forgotten`: the engine will not ask us to take the address back.
    fn unplug(&self, id: &str, forgotten: bool) -> Result<(), Refusal> {
        let _turn = self.turns.take(id);
        self.finish_deleting(id, forgotten)
    }

    /// Takes away what is left of an endpoint that is marked as deleted; nothing happens to any other.
    fn finish_deleting(&self, id: &str, forgotten: bool) -> Result<(), Refusal> {
        let Some(record) = self.journal.endpoints().get(id).filter(|found| found.stage == Stage::Deleted)
        else {
            return Ok(());
        };
        veth::detach(id, &record.network)?;
        // Our own IPAM driver is asked to take the address back; nobody asks where the engine had none or its own.
        if forgotten || record.ipam != Ipam::Flannel {
            let addresses = self.addresses(&record.network, &record.subnets())?;
            for address in record.addresses() {
                let released = addresses.release(address.address(), |holder| holder == id);
                released.map_err(|error| Refusal::of(&error))?;
            }
        }
        self.journal.endpoints().remove(id).map_err(|error| Refusal::of(&error))?;
        self.ports.release(id);
        Ok(())
    }
}

/// Whether an endpoint that is there is the one asked for.
fn agrees(id: &str, known: &EndpointRecord, asked: &EndpointRecord) -> Result<(), Refusal> {
    let same = known.docker_network == asked.docker_network && known.mac == asked.mac;
    let same = same && known.addresses() == asked.addresses();
    if same { Ok(()) } else { Err(other_address(id, known)) }
}

fn other_address(id: &str, known: &EndpointRecord) -> Refusal {
    Refusal(format!(
        "endpoint {id} exists already with address {} and MAC {}: an engine that wants another one deletes it first",
        listed(&known.addresses()),
        known.mac
    ))
}

/// The refusal of an endpoint whose addresses are nobody's again.
fn undone(addresses: &Addresses, id: &str, record: &EndpointRecord, refusal: Refusal) -> Refusal {
    let release = |address: &InterfaceAddress| addresses.release(address.address(), |holder| holder == id);
    match record.addresses().iter().try_for_each(release) {
        Ok(()) => refusal,
        Err(undo) => Refusal(format!(
            "{refusal}; and giving {} back failed too: {}",
            listed(&record.addresses()),
            Refusal::of(&undo)
        )),
    }
}

fn listed(addresses: &[InterfaceAddress]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}
