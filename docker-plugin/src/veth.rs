//! The veth pair of an endpoint: one end on the node's bridge, the other for the engine to move into the container.
//!
//! The bridge is planned by the agent and by every attach alike, so an endpoint that comes first (a host that boots, an
//! engine that was faster) need not wait for it.

use std::collections::BTreeSet;

use flannel_core::act::attach::{AttachError, Shared, connect, disconnect};
use flannel_core::decide::bridge::BridgeSpec;
use flannel_core::decide::endpoint::{Birth, EndpointSpec};
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::addr::{InterfaceAddress, Mac};
use flannel_core::words::name::{Attachment, LinkName, NetworkName};
use flannel_core::words::node::HostRoute;
use flannel_core::words::territory::Territory;
use flannel_core::words::units::Mtu;

use crate::addresses::owner;
use crate::answer::Refusal;

/// Makes the pair, and the bridge if it is not there yet. The answer is the end that the engine takes; a pair that is there
/// already stays as it is.
pub(crate) fn attach(
    endpoint_id: &str,
    network: &NetworkName,
    (bridge, gateway): (LinkName, InterfaceAddress),
    mac: Mac,
    mtu: Mtu,
) -> Result<LinkName, Refusal> {
    let mut kernel = Kernel::open().map_err(|error| Refusal::of(&error))?;
    let spec = EndpointSpec {
        host_link: owner(endpoint_id).host_link(network.as_str()),
        container_link: container_link(endpoint_id, network),
        birth: Birth::OnHost,
        bridge,
        hairpin: false,
        mtu: Some(mtu),
        mac: Some(mac),
        // Addresses and routes are the engine's to set, inside the container.
        addresses: Vec::new(),
        gateways: Vec::new(),
        routes: Vec::new(),
    };
    let bridge = BridgeSpec { name: bridge, gateways: vec![gateway], mtu, alias: None };
    // The rules of the network are the agent's.
    let shared = Shared { bridge, rules: Vec::new(), force_address: false };
    match connect(&mut kernel, None, &shared, &spec) {
        Ok(_) | Err(AttachError::Exists { .. }) => Ok(spec.container_link),
        Err(error) => Err(Refusal::of(&error)),
    }
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
