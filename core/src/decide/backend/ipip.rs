//! `ipip`: IPv4 packets in IPv4 packets, by a device of the kernel's.
//!
//! **Shape** — one device without a remote address of its own; the route to a peer's subnet names the peer's public address as
//! its gateway, and the kernel sends there. The lease says nothing but the public address.
//! **Packets that are too large** — the device has the uplink's MTU less the outer header, so the forwarding host itself answers
//! "fragmentation needed" to the byte that does not fit. Without path MTU discovery of its own, as upstream has it, the outer
//! packet has "don't fragment" only where the inner one has it: a smaller link on the way is then learned and passed on to
//! the sender, and packets that may be cut are cut (net/ipv4/ip_tunnel.c `tnl_update_pmtu`, `ip_tunnel_xmit`).
//! **Source** — upstream pkg/backend/ipip/ipip.go.

use std::net::IpAddr;

use crate::decide::scene::{Draft, Scene};
use crate::words::addr::{Family, InterfaceAddress};
use crate::words::code::Code;
use crate::words::config::{IpipConfig, NetworkConfig};
use crate::words::fact::{self, Address, Fact, Link, LinkKind};
use crate::words::lease::Advertisement;
use crate::words::node::Node;
use crate::words::territory::Territory;
use crate::words::units::{Mtu, OutOfRange, Overhead};

use super::{Backend, direct, metric, tunneled};

/// IP in IP.
pub(super) struct Ipip {
    options: IpipConfig,
}

impl Ipip {
    pub(super) fn new(options: IpipConfig) -> Self {
        Self { options }
    }
}

impl Backend for Ipip {
    fn advertise(&self, _: &NetworkConfig, _: &Node) -> Advertisement {
        Advertisement { backend: "ipip".into(), ..Advertisement::default() }
    }

    fn mtu(&self, _: &NetworkConfig, node: &Node) -> Result<Mtu, OutOfRange> {
        node.uplink.mtu.less(Overhead::IPIP)
    }

    fn plan(&self, scene: &Scene<'_>, draft: &mut Draft) {
        if scene.families().any(|family| family == Family::V6) {
            draft
                .find(Code::FAMILY_NOT_CARRIED, "ipip carries IPv4 only; the IPv6 subnet stays on this host");
        }
        let Some(own) = scene.own.subnets.v4() else { return };
        let Some(IpAddr::V4(local)) = scene.node.uplink.address(Family::V4) else {
            draft.find(Code::UPLINK_ABSENT, format!("{} has no IPv4 address", scene.node.uplink.link));
            return;
        };
        let device = scene.network.ipip();
        draft.add(Fact::Link(Box::new(Link {
            name: device,
            kind: LinkKind::Ipip(fact::Ipip { local: Some(local) }),
            // There is one, or there would be no plan: see [`Backend::mtu`].
            mtu: self.mtu(scene.config, scene.node).ok(),
            mac: None,
            alias: Some(Territory::alias_of(scene.network)),
            up: true,
            modes: Default::default(),
        })));
        if let Ok(address) = InterfaceAddress::new(own.base(), Family::V4.bits()) {
            draft.add(Fact::Address(Address {
                link: device,
                address,
                no_prefix_route: false,
                detect_duplicates: false,
            }));
        }
        let places = scene.places(Family::V4, draft);
        let count = places.len();
        for place in places {
            let metric = metric(&place.subnet, count);
            draft.add(match self.options.direct_routing && scene.node.reaches_directly(place.public) {
                true => direct(scene.node, &place, metric),
                false => tunneled(device, place.subnet, place.public, metric),
            });
        }
    }
}
