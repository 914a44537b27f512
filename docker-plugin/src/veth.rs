//! The veth pair of an endpoint: one end on the node's bridge, the other for the engine to move into the container.
//!
//! The bridge is planned by the agent and by every attach alike, so an endpoint that comes first (a host that boots, an
//! engine that was faster) need not wait for it.

use std::collections::BTreeSet;

use flannel_core::act::attach::{AttachError, OtherAddresses, Shared, connect, disconnect};
use flannel_core::decide::bridge::{BridgeOptions, BridgeSpec};
use flannel_core::decide::endpoint::{Birth, EndpointOptions, EndpointSpec};
use flannel_core::touch::world::World as _;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::addr::{InterfaceAddress, Mac};
use flannel_core::words::fact::Key;
use flannel_core::words::name::{Attachment, LinkName, NetworkName};
use flannel_core::words::node::HostRoute;
use flannel_core::words::territory::Territory;
use flannel_core::words::units::Mtu;

use crate::addresses::owner;
use crate::answer::Refusal;

/// What an endpoint's pair is made with.
pub(crate) struct Port {
    pub(crate) network: NetworkName,
    pub(crate) bridge: LinkName,
    /// The bridge's address of each family.
    pub(crate) gateways: Vec<InterfaceAddress>,
    pub(crate) mac: Mac,
    /// Largest packet of the container.
    pub(crate) mtu: Mtu,
    /// Largest packet of the network.
    pub(crate) bridge_mtu: Mtu,
    /// No frames to and from other isolated ports.
    pub(crate) isolated: bool,
}

/// Makes the pair, and the bridge if it is not there yet. The answer is the end that the engine takes; a pair that is there
/// already stays as it is.
pub(crate) fn attach(endpoint_id: &str, port: &Port) -> Result<LinkName, Refusal> {
    let mut kernel = Kernel::open().map_err(|error| Refusal::of(&error))?;
    let spec = EndpointSpec {
        host_link: owner(endpoint_id).host_link(port.network.as_str()),
        container_link: container_link(endpoint_id, &port.network),
        birth: Birth::OnHost,
        bridge: port.bridge,
        // With bridge-nf-call-iptables a packet to a port that the container itself publishes turns round on the bridge.
        hairpin: true,
        isolated: port.isolated,
        mtu: Some(port.mtu),
        mac: Some(port.mac),
        // Addresses and routes are the engine's to set, inside the container.
        addresses: Vec::new(),
        gateways: Vec::new(),
        routes: Vec::new(),
        options: EndpointOptions::default(),
    };
    let gateways = port.gateways.clone();
    let options = BridgeOptions::default();
    let bridge = BridgeSpec { name: port.bridge, gateways, mtu: port.bridge_mtu, alias: None, options };
    // The rules of the network are the agent's.
    let shared = Shared { bridge, masquerade: None, others: OtherAddresses::Keep };
    match connect(&mut kernel, None, &shared, &spec) {
        Ok(_) | Err(AttachError::Exists { .. }) => Ok(spec.container_link),
        Err(error) => Err(Refusal::of(&error)),
    }
}

/// Refuses a name that an interface of this host has.
pub(crate) fn refuse_taken(name: LinkName) -> Result<(), Refusal> {
    let territory = Territory { links: BTreeSet::from([name]), ..Territory::default() };
    let seen = Kernel::open().and_then(|mut kernel| kernel.observe(&territory));
    match seen.map_err(|error| Refusal::of(&error))?.get(&Key::Link(name)) {
        None => Ok(()),
        Some(_) => Err(Refusal(format!(
            "an interface {name} exists on this host and is not this network's: choose another name for the bridge, or remove it (ip link delete {name})"
        ))),
    }
}

/// Whether the packet filter sees what goes from port to port of a bridge, as Docker sets it. Then it keeps containers apart
/// by itself, and isolated ports would keep them from each other's published ports too, which turn round on the bridge.
pub(crate) fn bridged_packets_are_filtered() -> bool {
    // Absent where br_netfilter is not loaded.
    let setting = std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables");
    setting.is_ok_and(|on| on.trim() == "1")
}

/// Removes the pair; one that died with its container's namespace is removed already.
pub(crate) fn detach(endpoint_id: &str, network: &NetworkName) -> Result<(), Refusal> {
    let link = owner(endpoint_id).host_link(network.as_str());
    let removed = Kernel::open().and_then(|mut kernel| disconnect(&mut kernel, link));
    removed.map_err(|error| Refusal::of(&error))
}

/// Every link that may be an end of a pair of ours.
pub(crate) fn existing() -> Result<BTreeSet<LinkName>, Refusal> {
    let found = Kernel::open().and_then(|mut kernel| kernel.existing_links("veth"));
    found.map_err(|error| Refusal::of(&error))
}

/// The ends of an endpoint's pair: the host's, and the container's as it is called while it is here.
pub(crate) fn ends(endpoint_id: &str, network: &NetworkName) -> (LinkName, LinkName) {
    (owner(endpoint_id).host_link(network.as_str()), container_link(endpoint_id, network))
}

/// Removes the bridge of a network without endpoints.
pub(crate) fn remove_bridge(bridge: LinkName) -> Result<(), Refusal> {
    let removed = Kernel::open().and_then(|mut kernel| kernel.delete_link(bridge));
    removed.map(drop).map_err(|error| Refusal::of(&error))
}

/// Routes of this host's main table.
pub(crate) fn host_routes() -> Result<Vec<HostRoute>, Refusal> {
    let found = Kernel::open().and_then(|mut kernel| kernel.routes_of_others(&Territory::default()));
    found.map_err(|error| Refusal::of(&error))
}

/// The end that the engine takes, as it is called until then: the hash of an interface name that no engine gives.
fn container_link(endpoint_id: &str, network: &NetworkName) -> LinkName {
    Attachment { interface: "peer of eth".to_owned(), ..owner(endpoint_id) }.host_link(network.as_str())
}
