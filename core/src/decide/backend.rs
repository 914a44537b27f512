//! Backends: how packets travel between the hosts of a network.
//!
//! A backend is one file: what it tells the peers, how much of a packet it needs, and which facts make it work. Adding
//! one takes a variant of [`BackendConfig`] and a line in [`of`].

mod alloc;
mod extension;
mod host_gw;
mod ipip;
mod ipsec;
mod udp;
mod vxlan;
mod wireguard;

use std::net::IpAddr;

use crate::words::addr::{Family, Prefix};
use crate::words::config::{BackendConfig, NetworkConfig};
use crate::words::fact::{Fact, Route, RouteExtras, RouteProtocol, RouteScope};
use crate::words::lease::Advertisement;
use crate::words::name::LinkName;
use crate::words::node::Node;
use crate::words::units::{Mtu, OutOfRange};

use super::scene::{Draft, Place, Scene};

/// How packets travel between the hosts of a network.
pub trait Backend: Send + Sync {
    /// What peers must know to reach us: `BackendType` and `BackendData` of our lease.
    fn advertise(&self, config: &NetworkConfig, node: &Node) -> Advertisement;

    /// Largest packet of a container on this node: `FLANNEL_MTU`. Fails if the uplink's MTU leaves nothing.
    fn mtu(&self, config: &NetworkConfig, node: &Node) -> Result<Mtu, OutOfRange>;

    /// Names of the IPv4 and of the IPv6 device whose MAC is part of the node's identity, as far as there are any.
    fn device(&self) -> [Option<LinkName>; 2] {
        [None, None]
    }

    /// Everything this backend wants to be true on this node.
    fn plan(&self, scene: &Scene<'_>, draft: &mut Draft);
}

/// The backend that a config asks for.
pub fn of(config: &BackendConfig) -> Box<dyn Backend> {
    match config {
        BackendConfig::Alloc => Box::new(alloc::Alloc),
        BackendConfig::Extension(options) => Box::new(extension::Extension::new(options.clone())),
        BackendConfig::HostGw => Box::new(host_gw::HostGw),
        BackendConfig::Ipip(options) => Box::new(ipip::Ipip::new(*options)),
        BackendConfig::Ipsec(options) => Box::new(ipsec::Ipsec::new(options.clone())),
        BackendConfig::Udp(options) => Box::new(udp::Udp::new(options.clone())),
        BackendConfig::Vxlan(options) => Box::new(vxlan::Vxlan::new(options.clone())),
        BackendConfig::Wireguard(options) => Box::new(wireguard::Wireguard::new(options.clone())),
    }
}

/// A peer on our own link needs no tunnel.
fn direct(node: &Node, place: &Place<'_>, metric: u32) -> Fact {
    Fact::Route(Route {
        destination: place.subnet,
        via: Some(place.public),
        link: node.uplink.link,
        onlink: false,
        metric,
        scope: RouteScope::Global,
        source: None,
        protocol: RouteProtocol::FLANNEL,
        extras: RouteExtras::default(),
    })
}

/// The route to a peer's subnet by a tunnel's device. On-link, because the gateway is one behind the device, wherever the host's own
/// route to it leads.
fn tunneled(device: LinkName, subnet: Prefix, gateway: IpAddr, metric: u32) -> Fact {
    Fact::Route(Route {
        destination: subnet,
        via: Some(gateway),
        link: device,
        onlink: true,
        metric,
        scope: RouteScope::Global,
        source: None,
        protocol: RouteProtocol::BOOT,
        extras: RouteExtras::default(),
    })
}

/// What the kernel fills in for an IPv6 route without a metric (uapi/linux/ipv6_route.h `IP6_RT_PRIO_USER`).
const V6_METRIC: u32 = 1024;

/// Up to so many peers, routes look exactly as upstream makes them.
pub(super) const PLAIN_METRIC_PEERS: usize = 500;

/// The metric of the route to a peer's subnet.
///
/// **Units** — none; less wins, and every subnet has one route only, so the value does not matter to routing.
/// **Why** — the kernel finds nexthops that routes can share by a hash over device, protocol, scope and metric, not over the
/// gateway (net/ipv4/fib_semantics.c `fib_info_hashfn`): thousands of routes that differ in the gateway alone
/// share one bucket, and adding them takes quadratic time. Neighboring subnets get different metrics, so that the
/// buckets stay short. IPv6 has no such hash.
fn metric(subnet: &Prefix, peers: usize) -> u32 {
    const SPREAD: u32 = 1024;
    match (subnet.family(), subnet.base()) {
        (Family::V4, std::net::IpAddr::V4(base)) if peers > PLAIN_METRIC_PEERS => {
            let index = base.to_bits().checked_shr(32 - u32::from(subnet.len())).unwrap_or(0);
            1 + index % SPREAD
        }
        (Family::V4, _) => 0,
        (Family::V6, _) => V6_METRIC,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn small_clusters_have_upstreams_metrics() {
        assert_eq!(metric(&prefix("10.100.5.0/24"), 500), 0);
        assert_eq!(metric(&prefix("fd42:cafe:0:1::/64"), 500), 1024);
    }

    #[test]
    fn large_clusters_spread_them_evenly() {
        let mut buckets = std::collections::BTreeMap::<u32, usize>::new();
        for n in 0..4096 {
            *buckets.entry(metric(&prefix("10.0.0.0/24").step(n).unwrap(), 4096)).or_default() += 1;
        }
        assert_eq!(buckets.len(), 1024);
        assert!(buckets.iter().all(|(metric, count)| *metric > 0 && *count == 4));
        assert_eq!(metric(&prefix("fd42:cafe:0:1::/64"), 4096), 1024);
    }
}
