//! `NetworkDriver.*`: Docker networks on this node's bridges.
//!
//! CreateEndpoint only books: engines serialise it per network. The veth pair is made in Join, which engines run in
//! parallel, and DeleteEndpoint is answered before it is gone, which takes the kernel tens of milliseconds. Calls that
//! take something away succeed when there is nothing to take away: engines repeat them after crashes.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::Uri;
use axum::routing::post;
use serde_json::{Value, json};

use flannel_core::words::addr::{InterfaceAddress, Mac, Prefix};

use crate::answer::{Nothing, Refusal, blocking, call, constant};
use crate::ipam_driver::{GLOBAL_SPACE, LOCAL_SPACE};
use crate::journal::{EndpointRecord, Ipam, NetworkRecord, Stage};
use crate::networks::Part;
use crate::plugin::Plugin;
use crate::wire;

pub(crate) fn routes() -> Router<Arc<Plugin>> {
    type Here = State<Arc<Plugin>>;
    let nothing = || post(|| constant(json!({})));
    Router::new()
        // Scope local: every host has its own pool. Connectivity global: a swarm's names then resolve on every host.
        .route(
            "/NetworkDriver.GetCapabilities",
            post(|| constant(json!({"Scope": "local", "ConnectivityScope": "global"}))),
        )
        .route(
            "/NetworkDriver.CreateNetwork",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, create_network)),
        )
        .route(
            "/NetworkDriver.DeleteNetwork",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, delete_network)),
        )
        .route(
            "/NetworkDriver.CreateEndpoint",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, create_endpoint)),
        )
        .route(
            "/NetworkDriver.DeleteEndpoint",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, delete_endpoint)),
        )
        .route(
            "/NetworkDriver.EndpointOperInfo",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, endpoint_oper_info)),
        )
        .route("/NetworkDriver.Join", post(|s: Here, u: Uri, b: Bytes| call(s, u, b, join)))
        .route("/NetworkDriver.Leave", post(|s: Here, u: Uri, b: Bytes| call(s, u, b, acknowledge)))
        .route(
            "/NetworkDriver.ProgramExternalConnectivity",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, program_external_connectivity)),
        )
        .route(
            "/NetworkDriver.RevokeExternalConnectivity",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, acknowledge)),
        )
        // Nodes of a swarm come and go; the store tells us more of them.
        .route("/NetworkDriver.DiscoverNew", nothing())
        .route("/NetworkDriver.DiscoverDelete", nothing())
}

async fn create_network(plugin: Arc<Plugin>, request: wire::CreateNetwork) -> Result<Nothing, Refusal> {
    refuse_what_is_not_built(&request)?;
    let [pool] = request.ipv4_data.as_slice() else {
        return Err(Refusal(format!(
            "a flannel network has one pool, {} were given: use one --subnet",
            request.ipv4_data.len()
        )));
    };
    let (part, ipam) = part_behind(&plugin, pool).await?;
    let record = NetworkRecord {
        version: NetworkRecord::VERSION,
        network: part.network.clone(),
        cidr: part.cidr,
        pool: part.subnet,
        gateway: part.gateway,
        bridge: plugin.networks().keep_bridge(&part.network).await?,
        mtu: part.mtu,
        ipam,
        request,
    };
    blocking(move || {
        let id = record.request.network_id.clone();
        tracing::info!(docker_network = %id, network = %record.network, subnet = %record.pool, "network created");
        plugin.journal().networks().put(&id, record).map_err(|error| Refusal::of(&error))?;
        Ok(Nothing {})
    })
    .await
}

/// Nothing that a user typed is ignored silently.
fn refuse_what_is_not_built(request: &wire::CreateNetwork) -> Result<(), Refusal> {
    let switch = |key: &str| request.options.get(key).and_then(Value::as_bool);
    if switch("com.docker.network.enable_ipv6") == Some(true) || !request.ipv6_data.is_empty() {
        return Err("--ipv6 is not built yet for flannel networks: leave it out".into());
    }
    if switch("com.docker.network.enable_ipv4") == Some(false) {
        return Err("--ipv4=false is not built yet for flannel networks: leave it out".into());
    }
    if switch("com.docker.network.internal") == Some(true) {
        return Err("--internal is not built yet for flannel networks: leave it out".into());
    }
    let options = request.options.get("com.docker.network.generic").and_then(Value::as_object);
    match options.and_then(|options| options.keys().next()) {
        Some(option) => Err(Refusal(format!(
            "-o {option}: flannel networks have no driver options yet; what defines the flannel network is given with --ipam-opt (network=, backend=, vni=, subnet-len=, …)"
        ))),
        None => Ok(()),
    }
}

/// This node's part of the flannel network that the pool belongs to, and who hands its addresses out.
async fn part_behind(plugin: &Arc<Plugin>, pool: &wire::PoolData) -> Result<(Part, Ipam), Refusal> {
    if pool.address_space == "null" {
        return Err(Refusal(format!(
            "--ipam-driver null is not built yet for flannel networks; type: {}",
            plugin.create_command(None)
        )));
    }
    let ours = [LOCAL_SPACE, GLOBAL_SPACE].contains(&pool.address_space.as_str());
    let subnet: Prefix =
        pool.pool.parse().map_err(|error| Refusal(format!("the pool {:?}: {error}", pool.pool)))?;
    let Some(part) = plugin.networks().part_with(subnet).await? else {
        return Err(Refusal(format!(
            "subnet {subnet} is not this host's part of a flannel network{}; type: {}",
            plugin.networks().parts_text(),
            plugin.create_command(plugin.networks().first_cidr())
        )));
    };
    let gateway = pool.gateway.as_deref().map(str::parse::<InterfaceAddress>).transpose();
    match gateway {
        Ok(Some(gateway)) if gateway.address() != part.gateway => Err(Refusal(format!(
            "gateway {}: the gateway of this host's subnet {} is {}",
            gateway.address(),
            part.subnet,
            part.gateway
        ))),
        Ok(Some(_) | None) => Ok((part, if ours { Ipam::Flannel } else { Ipam::Engine })),
        Err(error) => Err(Refusal(format!("the gateway: {error}"))),
    }
}

async fn delete_network(plugin: Arc<Plugin>, request: wire::DeleteNetwork) -> Result<Nothing, Refusal> {
    let id = request.network_id;
    let forget = Arc::clone(&plugin);
    let gone = blocking(move || {
        forget.journal().networks().remove(&id).map_err(|error| Refusal::of(&error)).map(|gone| (id, gone))
    })
    .await;
    if let Ok((id, Some(record))) = gone {
        tracing::info!(docker_network = %id, network = %record.network, "network removed");
        plugin.networks().let_go(&record.network)?;
    }
    Ok(Nothing {})
}

async fn create_endpoint(
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

async fn join(plugin: Arc<Plugin>, request: wire::Join) -> Result<wire::Joined, Refusal> {
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

/// The engine calls this for the one endpoint through which a container's ports are to be published.
async fn program_external_connectivity(
    plugin: Arc<Plugin>,
    request: wire::ProgramExternalConnectivity,
) -> Result<Nothing, Refusal> {
    tracing::debug!(docker_network = %request.network_id, endpoint = %request.endpoint_id, "external connectivity");
    let Some(port) = wire::published_ports(&request.options).into_iter().next() else {
        return Ok(Nothing {});
    };
    let protocol = match port.proto {
        6 => "tcp",
        17 => "udp",
        132 => "sctp",
        _ => "?",
    };
    let cidr = plugin.docker_network(&request.network_id).map(|network| network.cidr);
    let reach = cidr.map_or_else(|_| "the network".to_owned(), |cidr| cidr.to_string());
    Err(Refusal(format!(
        "publishing ports is not built yet for flannel networks: leave -p {}:{}/{protocol} out; the container's own address is reached from every host and container of {reach}",
        port.host_port, port.port
    )))
}

async fn endpoint_oper_info(_plugin: Arc<Plugin>, _request: wire::Endpoint) -> Result<Value, Refusal> {
    // An error here would fail the container's start, and no command shows what could be told.
    Ok(json!({"Value": {}}))
}

/// Leave: the engine has taken the interface out of the container, DeleteEndpoint follows. Revoke: nothing is published.
async fn acknowledge(_plugin: Arc<Plugin>, request: wire::Endpoint) -> Result<Nothing, Refusal> {
    tracing::trace!(docker_network = %request.network_id, endpoint = %request.endpoint_id, "acknowledged");
    Ok(Nothing {})
}

async fn delete_endpoint(plugin: Arc<Plugin>, request: wire::Endpoint) -> Result<Nothing, Refusal> {
    let id = request.endpoint_id;
    let mark = Arc::clone(&plugin);
    let marked = blocking(move || mark.mark_deleted(&id).map(|known| known.then_some(id))).await?;
    if let Some(id) = marked {
        plugin.unplug_later(id);
    }
    Ok(Nothing {})
}
