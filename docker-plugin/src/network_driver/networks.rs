//! Docker networks: made on a node's part of a flannel network, and removed.

use std::sync::Arc;

use serde_json::Value;

use flannel_core::words::addr::{InterfaceAddress, Prefix};

use crate::answer::{Nothing, Refusal, blocking};
use crate::ipam_driver::{GLOBAL_SPACE, LOCAL_SPACE};
use crate::journal::{Ipam, NetworkRecord};
use crate::networks::Part;
use crate::plugin::Plugin;
use crate::wire;

pub(super) async fn create_network(
    plugin: Arc<Plugin>,
    request: wire::CreateNetwork,
) -> Result<Nothing, Refusal> {
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

pub(super) async fn delete_network(
    plugin: Arc<Plugin>,
    request: wire::DeleteNetwork,
) -> Result<Nothing, Refusal> {
    plugin.forget_network(request.network_id).await?;
    Ok(Nothing {})
}
