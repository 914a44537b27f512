//! Docker networks: made on a node's part of a flannel network, and removed.

use std::sync::Arc;

use serde_json::Value;

use flannel_core::words::addr::{InterfaceAddress, Prefix};

use crate::answer::{Nothing, Refusal, blocking};
use crate::definition::Wish;
use crate::half::Half;
use crate::journal::{Ipam, NetworkRecord};
use crate::networks::Part;
use crate::options::NetworkOptions;
use crate::plugin::Plugin;
use crate::pool_id::{GLOBAL_SPACE, LOCAL_SPACE};
use crate::wire;

pub(super) async fn create_network(
    plugin: Arc<Plugin>,
    request: wire::CreateNetwork,
) -> Result<Nothing, Refusal> {
    let options = NetworkOptions::read(&request.options).map_err(|error| Refusal::of(&error))?;
    refuse_what_is_not_built(&request)?;
    if options.masquerade == Some(true) && !plugin.masquerades() {
        return Err("-o com.docker.network.bridge.enable_ip_masquerade=true: the plugin on this host was told --ip-masq=false, for all networks: leave the option out, or start the plugin without that flag".into());
    }
    if plugin.is_created(&request)? {
        return Ok(Nothing {});
    }
    let [pool] = request.ipv4_data.as_slice() else {
        return Err(Refusal(format!(
            "a flannel network has one pool, {} were given: use one --subnet",
            request.ipv4_data.len()
        )));
    };
    let behind = part_behind(&plugin, pool, &options).await;
    let (part, ipam) = behind.map_err(|refusal| match lacks_config(&request, pool) {
        true => without_config(&plugin, pool),
        false => refusal,
    })?;
    let asked_here = asks_itself(ipam, &options);
    let created = create_on(&plugin, &part, ipam, options, request).await;
    if created.is_err() && asked_here {
        plugin.networks().withdraw(&part.network)?;
    }
    created
}

async fn create_on(
    plugin: &Arc<Plugin>,
    part: &Part,
    ipam: Ipam,
    options: NetworkOptions,
    request: wire::CreateNetwork,
) -> Result<Nothing, Refusal> {
    if let Some(mtu) = options.mtu.filter(|mtu| *mtu > part.mtu) {
        return Err(Refusal(format!(
            "-o com.docker.network.driver.mtu={mtu}: at most {} fit through flannel network {} on this host",
            part.mtu, part.network
        )));
    }
    let v6 = half_behind(part, ipam, &request)?;
    let bridge = plugin.networks().keep_bridge(&part.network, options.bridge).await?;
    let record = NetworkRecord {
        version: NetworkRecord::VERSION,
        network: part.network.clone(),
        cidr: part.cidr,
        pool: part.subnet,
        gateway: part.gateway,
        v6,
        bridge,
        mtu: part.mtu,
        ipam,
        options,
        request,
    };
    let (plugin, part) = (Arc::clone(plugin), part.clone());
    blocking(move || {
        let id = &record.request.network_id;
        tracing::info!(docker_network = %id, network = %record.network, subnet = %record.pool, "network created");
        plugin.create_network(&part, record)
    })
    .await?;
    Ok(Nothing {})
}

/// Nothing that a user typed is ignored silently.
fn refuse_what_is_not_built(request: &wire::CreateNetwork) -> Result<(), Refusal> {
    let switch = |key: &str| request.options.get(key).and_then(Value::as_bool);
    if switch("com.docker.network.enable_ipv4") == Some(false) {
        return Err("--ipv4=false is not built yet for flannel networks: leave it out".into());
    }
    Ok(())
}

/// The IPv6 half that the Docker network has: what the engine's pool names and, where it has none, what there is.
fn half_behind(part: &Part, ipam: Ipam, request: &wire::CreateNetwork) -> Result<Option<Half>, Refusal> {
    let half = || {
        part.v6.ok_or_else(|| {
            Refusal(format!(
                "flannel network {} is {} and has no IPv6: leave --ipv6 out",
                part.network, part.cidr
            ))
        })
    };
    match request.ipv6_data.as_slice() {
        _ if ipam == Ipam::Null => Ok(part.v6),
        [] if request.options.get("com.docker.network.enable_ipv6") == Some(&Value::Bool(true)) => {
            Err("--ipv6: the engine sent no IPv6 pool".into())
        }
        [] => Ok(None),
        [pool] => half().and_then(|half| half.check(pool).map(|()| Some(half))),
        several => Err(Refusal(format!(
            "a flannel network has one IPv6 pool, {} were given: use one --subnet of IPv6",
            several.len()
        ))),
    }
}

/// This node's part of the flannel network that the pool belongs to, and who hands its addresses out.
async fn part_behind(
    plugin: &Arc<Plugin>,
    pool: &wire::PoolData,
    options: &NetworkOptions,
) -> Result<(Part, Ipam), Refusal> {
    let named = || Wish::of(options.network.clone());
    if pool.address_space == "null" {
        return Ok((plugin.networks().part_for(&named()).await?, Ipam::Null));
    }
    let ours = [LOCAL_SPACE, GLOBAL_SPACE].contains(&pool.address_space.as_str());
    let ipam = if ours { Ipam::Flannel } else { Ipam::Engine };
    let subnet: Prefix =
        pool.pool.parse().map_err(|error| Refusal(format!("the pool {:?}: {error}", pool.pool)))?;
    let part = match asks_itself(ipam, options) {
        true => Some(plugin.networks().part_for(&named()).await?),
        false => plugin.networks().part_with(subnet).await?,
    };
    let checked = match part {
        None => Err(not_here(plugin, subnet)),
        Some(part) => check_part(plugin, pool, (&part, subnet), options).map(|()| part),
    };
    if checked.is_err()
        && asks_itself(ipam, options)
        && let Some(network) = &options.network
    {
        plugin.networks().withdraw(network)?;
    }
    checked.map(|part| (part, ipam))
}

/// Whether this is a swarm's network that was created without `--config-from`: engines drop its `--ipam-driver` and its
/// `--subnet`, and every node takes a pool of its own choice.
fn lacks_config(request: &wire::CreateNetwork, pool: &wire::PoolData) -> bool {
    /// Of a network that one engine made; a swarm's ids are shorter.
    const LOCAL_ID: usize = 64;
    let engines_own = ![LOCAL_SPACE, GLOBAL_SPACE, "null"].contains(&pool.address_space.as_str());
    engines_own && request.network_id.len() < LOCAL_ID
}

fn without_config(plugin: &Plugin, pool: &wire::PoolData) -> Refusal {
    let cidr = pool.pool.parse().ok().and_then(|pool| plugin.networks().cidr_near(pool));
    Refusal(format!(
        "a swarm's network takes each node's addresses from a config-only network there, and this one was created without --config-from: remove it, then type {}",
        plugin.swarm_commands(cidr)
    ))
}

/// Whether no RequestPool came before: then the network may not run yet, and nobody gives the pool back.
fn asks_itself(ipam: Ipam, options: &NetworkOptions) -> bool {
    match ipam {
        Ipam::Flannel => false,
        Ipam::Engine => options.network.is_some(),
        Ipam::Null => true,
    }
}

fn not_here(plugin: &Plugin, subnet: Prefix) -> Refusal {
    Refusal(format!(
        "subnet {subnet} is not this host's part of a flannel network{}; type: {}",
        plugin.networks().parts_text(),
        plugin.create_command(plugin.networks().cidr_near(subnet))
    ))
}

/// Whether the engine means the part that is here.
fn check_part(
    plugin: &Plugin,
    pool: &wire::PoolData,
    (part, subnet): (&Part, Prefix),
    options: &NetworkOptions,
) -> Result<(), Refusal> {
    if part.subnet != subnet {
        return Err(not_here(plugin, subnet));
    }
    if let Some(other) = options.network.as_ref().filter(|network| **network != part.network) {
        return Err(Refusal(format!(
            "-o flannel.network={other}: subnet {subnet} is of flannel network {}: leave the option out, or name {other} with --ipam-opt network={other}",
            part.network
        )));
    }
    let gateway = pool.gateway.as_deref().map(str::parse::<InterfaceAddress>).transpose();
    match gateway {
        Ok(Some(gateway)) if gateway.address() != part.gateway => Err(Refusal(format!(
            "gateway {}: the gateway of this host's subnet {} is {}; type --gateway {2}",
            gateway.address(),
            part.subnet,
            part.gateway
        ))),
        Ok(Some(_) | None) => Ok(()),
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
