//! Endpoints: a container's place on a Docker network.
//!
//! CreateEndpoint only books: engines serialise it per network. The veth pair is made in Join, which engines run in
//! parallel, and DeleteEndpoint is answered before it is gone, which takes the kernel tens of milliseconds.

use std::sync::Arc;

use serde_json::{Value, json};

use flannel_core::words::addr::{InterfaceAddress, Mac};

use crate::answer::{Nothing, Refusal, blocking};
use crate::journal::{EndpointRecord, Stage};
use crate::plugin::Plugin;
use crate::wire;

pub(super) async fn create_endpoint(
    plugin: Arc<Plugin>,
    request: wire::CreateEndpoint,
) -> Result<wire::CreatedEndpoint, Refusal> {
    if let Some(option) = request.options.keys().find(|option| !option.starts_with("com.docker.")) {
        return Err(Refusal(format!("--driver-opt {option}: flannel endpoints have no options yet")));
    }
    if !request.interface.address_ipv6.is_empty() {
        return Err("IPv6 addresses are not built yet for flannel networks".into());
    }
    let network = plugin.docker_network(&request.network_id)?;
    plugin.networks().still_ours(&network.network, network.pool)?;
    let address: InterfaceAddress = request
        .interface
        .address
        .parse()
        .map_err(|error| Refusal(format!("address {:?}: {error}", request.interface.address)))?;
    let given = &request.interface.mac_address;
    let mac: Option<Mac> = (!given.is_empty())
        .then(|| given.parse())
        .transpose()
        .map_err(|error| Refusal(format!("--mac-address: {error}")))?;
    let chosen = Mac::for_address(address.address());
    let record = EndpointRecord::new(&request.network_id, &network, address, mac.unwrap_or(chosen));
    let id = request.endpoint_id;
    blocking(move || plugin.book(&id, record)).await?;
    // An engine takes the answer for a change of what it chose, so only our own choice is in it.
    let interface = mac.is_none().then_some(wire::ChosenInterface { mac_address: chosen });
    Ok(wire::CreatedEndpoint { interface })
}

pub(super) async fn join(plugin: Arc<Plugin>, request: wire::Join) -> Result<wire::Joined, Refusal> {
    let network = plugin.docker_network(&request.network_id)?;
    let id = request.endpoint_id;
    let Some(endpoint) = plugin.journal().endpoints().get(&id).filter(|found| found.stage != Stage::Deleted)
    else {
        return Err(Refusal(format!("endpoint {id} is unknown: it was never created, or is deleted")));
    };
    let (gateway, cidr) = (network.gateway, network.cidr);
    let src_name = blocking(move || plugin.plug_in(&id, endpoint, &network)).await?;
    Ok(wire::Joined {
        interface_name: wire::InterfaceName { src_name: src_name.to_string(), dst_prefix: "eth" },
        gateway: gateway.to_string(),
        // Another network of the container may own its default route; the other hosts are reached all the same.
        static_routes: vec![wire::StaticRoute {
            destination: cidr,
            route_type: 0,
            next_hop: gateway.to_string(),
        }],
    })
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
        plugin.unplug_later(id);
    }
    Ok(Nothing {})
}
