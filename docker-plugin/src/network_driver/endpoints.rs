//! Endpoints: a container's place on a Docker network.
//!
//! CreateEndpoint only books: engines serialise it per network. The veth pair is made in Join, which engines run in
//! parallel, and DeleteEndpoint is answered before it is gone, which takes the kernel tens of milliseconds.

use std::sync::Arc;

use serde_json::{Value, json};

use flannel_core::words::addr::{InterfaceAddress, Mac, Prefix};

use crate::answer::{Nothing, Refusal, blocking};
use crate::exposure;
use crate::journal::{EndpointRecord, Ipam, NetworkRecord};
use crate::options::{EndpointOptions, Publish};
use crate::plugin::Plugin;
use crate::wire;

pub(super) async fn create_endpoint(
    plugin: Arc<Plugin>,
    request: wire::CreateEndpoint,
) -> Result<wire::CreatedEndpoint, Refusal> {
    let options = EndpointOptions::read(&request.options).map_err(|error| Refusal::of(&error))?;
    let network = plugin.docker_network(&request.network_id)?;
    for subnet in network.subnets() {
        plugin.networks().still_ours(&network.network, subnet)?;
    }
    let given_v6 = given_v6(&request.interface.address_ipv6, &network)?;
    let mac = given_mac(&request.interface.mac_address)?;
    let (id, given) = (request.endpoint_id, request.interface.address);
    // An engine takes the answer for a change of what it chose, so only our own choice is in it.
    let interface = if given.is_empty() && network.ipam == Ipam::Null {
        let docker_network = request.network_id;
        let booked =
            blocking(move || plugin.book_any(&id, (&docker_network, &network), options.address, mac)).await?;
        let mac_address = mac.is_none().then_some(booked.mac);
        Some(wire::ChosenInterface {
            address: Some(booked.address),
            address_ipv6: booked.address_v6,
            mac_address,
        })
    } else {
        let address: InterfaceAddress =
            given.parse().map_err(|error| Refusal(format!("address {given:?}: {error}")))?;
        let chosen = [Some(address), given_v6].map(|given| given.map(|given| given.address()));
        if let Some(wanted) = options.address.filter(|wanted| !chosen.contains(&Some(*wanted))) {
            return Err(Refusal(format!(
                "--driver-opt flannel.ip={wanted}: the addresses of this network come from its IPAM driver; use --ip {wanted}"
            )));
        }
        let chosen = Mac::for_address(address.address());
        let addresses = (address, given_v6);
        let record = EndpointRecord::new(&request.network_id, &network, addresses, mac.unwrap_or(chosen));
        blocking(move || plugin.book(&id, record)).await?;
        let chosen = wire::ChosenInterface { address: None, address_ipv6: None, mac_address: Some(chosen) };
        mac.is_none().then_some(chosen)
    };
    Ok(wire::CreatedEndpoint { interface })
}

/// The IPv6 address that the engine chose.
fn given_v6(text: &str, network: &NetworkRecord) -> Result<Option<InterfaceAddress>, Refusal> {
    if text.is_empty() {
        return Ok(None);
    }
    let address = text.parse().map_err(|error| Refusal(format!("address {text:?}: {error}")))?;
    match network.v6 {
        Some(_) => Ok(Some(address)),
        None => Err(Refusal(format!("{address}: the network was created without --ipv6"))),
    }
}

/// What follows `--mac-address`.
fn given_mac(text: &str) -> Result<Option<Mac>, Refusal> {
    if text.is_empty() {
        return Ok(None);
    }
    let mac: Mac = text.parse().map_err(|error| Refusal(format!("--mac-address: {error}")))?;
    // What the kernel refuses for an interface (include/linux/etherdevice.h is_valid_ether_addr).
    match mac.0 {
        [first, ..] if first & 1 == 1 => Err(Refusal(format!(
            "--mac-address {mac}: the address of a group of interfaces cannot be one's own: the first byte must be even"
        ))),
        [0, 0, 0, 0, 0, 0] => Err(Refusal(format!("--mac-address {mac}: an interface cannot have it"))),
        _ => Ok(Some(mac)),
    }
}

pub(super) async fn join(plugin: Arc<Plugin>, request: wire::Join) -> Result<wire::Joined, Refusal> {
    let network = plugin.docker_network(&request.network_id)?;
    let (id, sandbox, of) = (request.endpoint_id, request.sandbox_key, network.clone());
    let plugs = Arc::clone(&plugin);
    let src_name = blocking(move || plugs.plug_in(&id, &sandbox, &of)).await?;
    if exposure::is_particular(&network) {
        // Before the container can send anything.
        plugin.expose(&network.network).await.map_err(|cause| {
            Refusal(format!("what the network's options keep apart could not be kept apart: {cause}"))
        })?;
    }
    let gateway = network.gateway.to_string();
    // Without a gateway of ours an engine gives the container its own (docker_gwbridge), unless the network is internal.
    let leads_out = network.options.publish == Publish::Driver && !network.options.internal;
    Ok(wire::Joined {
        interface_name: wire::InterfaceName {
            src_name: src_name.to_string(),
            dst_prefix: network.options.interface_prefix().to_owned(),
        },
        gateway: leads_out.then(|| gateway.clone()),
        gateway_ipv6: network.v6.filter(|_| leads_out).map(|half| half.gateway().to_string()),
        // Another network of the container may own its default route; the other hosts are reached all the same.
        static_routes: [by(network.cidr, gateway)]
            .into_iter()
            .chain(network.v6.map(|half| by(half.cidr, half.gateway().to_string())))
            .collect(),
    })
}

fn by(destination: Prefix, next_hop: String) -> wire::StaticRoute {
    wire::StaticRoute { destination, route_type: 0, next_hop }
}

pub(super) async fn endpoint_oper_info(
    _plugin: Arc<Plugin>,
    _request: wire::Endpoint,
) -> Result<Value, Refusal> {
    // An error here would fail the container's start, and no command shows what could be told.
    Ok(json!({"Value": {}}))
}

/// The engine has taken the interface out of the container; DeleteEndpoint follows.
pub(super) async fn leave(_plugin: Arc<Plugin>, request: wire::Endpoint) -> Result<Nothing, Refusal> {
    tracing::trace!(docker_network = %request.network_id, endpoint = %request.endpoint_id, "left");
    Ok(Nothing {})
}

pub(super) async fn delete_endpoint(
    plugin: Arc<Plugin>,
    request: wire::Endpoint,
) -> Result<Nothing, Refusal> {
    let id = request.endpoint_id;
    let mark = Arc::clone(&plugin);
    let marked = blocking(move || mark.mark_deleted(&id).map(|known| known.then_some(id))).await?;
    if let Some(id) = marked {
        plugin.unplug_later(id, false);
    }
    Ok(Nothing {})
}
