//! `IpamDriver.*`: pools are this node's subnets of flannel networks, addresses come from the ledger that CNI shares.
//!
//! `--subnet` names a whole flannel network and the answer is this node's part of it, so one command serves every host, and
//! the engine does not compare the answer with its routes (for an automatic pool it does, and asks again for ever when
//! they overlap; see [`routes_clash`]).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::Uri;
use axum::routing::post;
use serde_json::json;

use flannel_core::words::addr::{Family, InterfaceAddress, Prefix};

use crate::answer::{Nothing, Refusal, blocking, call, constant};
use crate::definition::Wish;
use crate::networks::Part;
use crate::plugin::Plugin;
use crate::pool_id::{GLOBAL_SPACE, LOCAL_SPACE, PoolId};
use crate::wire;

pub(crate) fn introduction() -> Router {
    Router::new()
        .route(
            "/IpamDriver.GetCapabilities",
            post(|| constant(json!({"RequiresMACAddress": false, "RequiresRequestReplay": false}))),
        )
        .route(
            "/IpamDriver.GetDefaultAddressSpaces",
            post(|| {
                constant(json!({
                    "LocalDefaultAddressSpace": LOCAL_SPACE,
                    "GlobalDefaultAddressSpace": GLOBAL_SPACE,
                }))
            }),
        )
}

pub(crate) fn routes() -> Router<Arc<Plugin>> {
    Router::new()
        .route(
            "/IpamDriver.RequestPool",
            post(|s: State<Arc<Plugin>>, u: Uri, b: Bytes| call(s, u, b, request_pool)),
        )
        .route(
            "/IpamDriver.ReleasePool",
            post(|s: State<Arc<Plugin>>, u: Uri, b: Bytes| call(s, u, b, release_pool)),
        )
        .route(
            "/IpamDriver.RequestAddress",
            post(|s: State<Arc<Plugin>>, u: Uri, b: Bytes| call(s, u, b, request_address)),
        )
        .route(
            "/IpamDriver.ReleaseAddress",
            post(|s: State<Arc<Plugin>>, u: Uri, b: Bytes| call(s, u, b, release_address)),
        )
}

async fn request_pool(plugin: Arc<Plugin>, request: wire::RequestPool) -> Result<wire::Pool, Refusal> {
    let family = if request.v6 { Family::V6 } else { Family::V4 };
    let wish = Wish::read(&request.pool, family, &request.options).map_err(|error| Refusal::of(&error))?;
    let (part, cidr, subnet) = match family {
        Family::V4 => {
            let part = plugin.networks().part_for(&wish).await?;
            plugin.networks().halved(&part.network);
            let (cidr, subnet) = (part.cidr, part.subnet);
            (part, cidr, subnet)
        }
        Family::V6 => {
            let (part, half) = plugin.networks().half_for(wish).await?;
            (part, half.cidr, half.subnet)
        }
    };
    if request.pool.is_empty() {
        let plugin = Arc::clone(&plugin);
        let part = part.clone();
        blocking(move || routes_clash(&plugin, &part, subnet)).await?;
    }
    let range = range_within(&request.sub_pool, subnet, cidr)?;
    let pool_id = PoolId { network: part.network, subnet, range }.to_string();
    Ok(wire::Pool { pool_id, pool: subnet, data: BTreeMap::new() })
}

/// What follows `--ip-range` must be a part of this node's subnet, which differs from host to host, or hold all of it.
fn range_within(sub_pool: &str, subnet: Prefix, cidr: Prefix) -> Result<Option<Prefix>, Refusal> {
    if sub_pool.is_empty() {
        return Ok(None);
    }
    let range: Prefix =
        sub_pool.parse().map_err(|error| Refusal(format!("--ip-range {sub_pool}: {error}")))?;
    match range {
        // All of the subnet, as a whole flannel network says it.
        _ if range.covers(&subnet) => Ok(None),
        _ if subnet.covers(&range) => Ok(Some(range)),
        _ => Err(Refusal(format!(
            "--ip-range {range} is not inside {subnet}, this host's subnet of {cidr}: leave it out, or give a part of that subnet"
        ))),
    }
}

/// An engine compares an automatic pool with the host's link-scope routes and its name servers, and when they overlap it
/// keeps asking for another one, for ever. So the same comparison is made here, once, and ends in a text.
fn routes_clash(plugin: &Plugin, part: &Part, subnet: Prefix) -> Result<(), Refusal> {
    let routes = plugin.host_routes()?;
    let route = routes
        .iter()
        .filter(|route| route.scope_link && !route.destination.is_default())
        .find(|route| route.destination.overlaps(&subnet));
    let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let nameserver = nameservers(&resolv_conf).find(|address| subnet.contains(*address));
    let clash = match (route, nameserver) {
        (Some(route), _) => {
            let link = route.link.map(|link| format!(" dev {link}")).unwrap_or_default();
            format!("the route {}{link}", route.destination)
        }
        (None, Some(address)) => format!("the name server {address}"),
        (None, None) => return Ok(()),
    };
    Err(Refusal(format!(
        "an automatic pool cannot be {subnet}: Docker would find that it overlaps {clash} of this host. Name the network instead: {}",
        plugin.command_for(part, subnet.family())
    )))
}

fn nameservers(resolv_conf: &str) -> impl Iterator<Item = IpAddr> {
    resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok())?
    })
}

async fn release_pool(plugin: Arc<Plugin>, request: wire::ReleasePool) -> Result<Nothing, Refusal> {
    // An engine that no longer wants something never hears that we did not have it.
    if let Ok(pool) = request.pool_id.parse::<PoolId>() {
        plugin.networks().give_back(&pool.network)?;
    }
    Ok(Nothing {})
}

async fn request_address(
    plugin: Arc<Plugin>,
    request: wire::RequestAddress,
) -> Result<wire::Address, Refusal> {
    let pool: PoolId = request.pool_id.parse()?;
    let wanted = match request.address.as_str() {
        "" => None,
        text => Some(text.parse::<IpAddr>().map_err(|error| Refusal(format!("address {text:?}: {error}")))?),
    };
    plugin.networks().still_ours(&pool.network, pool.subnet)?;
    let address = match request.is_gateway() {
        true => gateway(&pool, wanted)?,
        false => blocking(move || plugin.claim(&pool, wanted)).await?,
    };
    Ok(wire::Address { address, data: BTreeMap::new() })
}

/// The gateway is on the bridge and nobody can claim it, so it needs no entry.
fn gateway(pool: &PoolId, wanted: Option<IpAddr>) -> Result<InterfaceAddress, Refusal> {
    let gateway = pool
        .subnet
        .nth(1)
        .and_then(|first| InterfaceAddress::new(first, pool.subnet.len()).ok())
        .ok_or_else(|| Refusal(format!("{} has no room for a gateway", pool.subnet)))?;
    match wanted {
        Some(other) if other != gateway.address() => Err(Refusal(format!(
            "--gateway {other}: the gateway of a flannel network is the first address of each host's subnet, here {}; leave --gateway out",
            gateway.address()
        ))),
        Some(_) | None => Ok(gateway),
    }
}

async fn release_address(plugin: Arc<Plugin>, request: wire::ReleaseAddress) -> Result<Nothing, Refusal> {
    let (Ok(pool), Ok(address)) = (request.pool_id.parse::<PoolId>(), request.address.parse::<IpAddr>())
    else {
        return Ok(Nothing {});
    };
    if Some(address) != pool.subnet.nth(1) {
        blocking(move || plugin.release(&pool, address)).await?;
    }
    Ok(Nothing {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_address_can_be_the_gateway() {
        let pool: PoolId = "flannel/default/10.100.5.0/24".parse().unwrap();
        assert_eq!(gateway(&pool, None).unwrap().to_string(), "10.100.5.1/24");
        assert!(gateway(&pool, Some([10, 100, 5, 1].into())).is_ok());
        let error = gateway(&pool, Some([10, 100, 5, 9].into())).unwrap_err();
        assert!(error.0.contains("here 10.100.5.1; leave --gateway out"), "{error}");
    }

    #[test]
    fn name_servers_are_read_as_the_resolver_does() {
        let text =
            "# nameserver 1.1.1.1\nnameserver 10.100.5.53\nsearch x\nnameserver bad\n nameserver fd00::1\n";
        let found: Vec<_> = nameservers(text).map(|address| address.to_string()).collect();
        assert_eq!(found, ["10.100.5.53", "fd00::1"]);
    }
}
