//! `ipsec`: the kernel encrypts what goes between two subnets; charon agrees on the keys with the peers.
//!
//! **Shape** — per peer three policies: what leaves, what comes in for this host, what comes in for its containers. No device and no
//! route: the packet must have some route, and the policy takes it then. The lease says nothing but the public address.
//! **Source** — upstream pkg/backend/ipsec (`ipsec.go`, `handle_xfrm.go`, `ipsec_network.go`).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use crate::decide::scene::{Draft, Scene};
use crate::words::addr::{Family, Prefix};
use crate::words::code::Code;
use crate::words::config::NetworkConfig;
use crate::words::fact::{Fact, Policy, PolicyDirection};
use crate::words::ipsec::{Associations, IpsecConfig};
use crate::words::lease::Advertisement;
use crate::words::node::Node;
use crate::words::units::{Mtu, OutOfRange, Overhead};

use super::Backend;

/// Encrypted by the kernel.
pub(super) struct Ipsec {
    options: IpsecConfig,
}

impl Ipsec {
    pub(super) fn new(options: IpsecConfig) -> Self {
        Self { options }
    }
}

impl Backend for Ipsec {
    fn advertise(&self, _: &NetworkConfig, _: &Node) -> Advertisement {
        Advertisement { backend: "ipsec".into(), ..Advertisement::default() }
    }

    fn mtu(&self, _: &NetworkConfig, node: &Node) -> Result<Mtu, OutOfRange> {
        let overhead = if self.options.udp_encap { Overhead::ESP_IN_UDP } else { Overhead::ESP };
        node.uplink.mtu.less(overhead)
    }

    fn plan(&self, scene: &Scene<'_>, draft: &mut Draft) {
        if scene.families().any(|family| family == Family::V6) {
            draft.find(
                Code::FAMILY_NOT_CARRIED,
                "ipsec carries IPv4 only; the IPv6 subnet stays on this host",
            );
        }
        let Some(own) = scene.own.subnets.v4() else { return };
        let Some(IpAddr::V4(local)) = scene.own.value.public(Family::V4) else { return };
        let mut peers = BTreeMap::new();
        for place in scene.places(Family::V4, draft) {
            if let IpAddr::V4(remote) = place.public {
                peers.insert(place.subnet, remote);
            }
        }
        for (subnet, remote) in &peers {
            policies(own, local, *subnet, *remote).into_iter().for_each(|fact| draft.add(fact));
        }
        unrouted(scene, &peers, draft);
        // Also without the address the policies stay, as when the uplink gets another one: what they hold back would leave in clear.
        if is_here(local, scene, draft) {
            draft.associations = Some(Associations { config: self.options.clone(), local, own, peers });
        }
    }
}

/// ESP packets leave with our public address and come to it, so the uplink itself must have it.
fn is_here(public: Ipv4Addr, scene: &Scene<'_>, draft: &mut Draft) -> bool {
    let uplink = &scene.node.uplink;
    let on_link = uplink.address(Family::V4);
    if on_link == Some(public.into()) {
        return true;
    }
    let shown = on_link.map_or_else(|| "none".to_owned(), |ip| ip.to_string());
    draft.find(
        Code::PUBLIC_IP_FOREIGN,
        format!("the public address is {public}, {} has {shown}", uplink.link),
    );
    false
}

fn policies(own: Prefix, local: Ipv4Addr, subnet: Prefix, remote: Ipv4Addr) -> [Fact; 3] {
    let incoming =
        |direction| Policy { direction, source: subnet, destination: own, from: remote, to: local };
    [
        Policy { direction: PolicyDirection::Out, source: own, destination: subnet, from: local, to: remote },
        incoming(PolicyDirection::In),
        incoming(PolicyDirection::Forward),
    ]
    .map(Fact::Policy)
}

/// The kernel looks for a route first, and for a policy only if there is one.
fn unrouted(scene: &Scene<'_>, peers: &BTreeMap<Prefix, Ipv4Addr>, draft: &mut Draft) {
    let routes = &scene.node.routes;
    let routed = |subnet: &Prefix| routes.iter().any(|route| route.destination.covers(subnet));
    let unrouted: Vec<&Prefix> = peers.keys().filter(|subnet| !routed(subnet)).collect();
    if let Some(first) = unrouted.first() {
        let more = match unrouted.len() {
            1 => String::new(),
            several => format!(" and {} more", several - 1),
        };
        draft.find(Code::ROUTE_ABSENT, format!("this host has no route to {first}{more}"));
    }
}
