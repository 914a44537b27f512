//! `udp`: whole IPv4 packets in UDP, carried by this program through a TUN device.
//!
//! **Shape** — the device holds the base address of our subnet and the route to the whole network; who of the peers gets a
//! packet is the tunnel's business. The lease says nothing but the public address.
//! **Source** — upstream pkg/backend/udp (`udp_network_amd64.go`, `proxy_amd64.c`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::decide::scene::{Draft, Scene};
use crate::words::addr::{Family, InterfaceAddress};
use crate::words::code::Code;
use crate::words::config::{NetworkConfig, UdpConfig};
use crate::words::fact::{Address, Fact, Link, LinkKind, Route, RouteProtocol, RouteScope, Sysctl};
use crate::words::lease::Advertisement;
use crate::words::node::Node;
use crate::words::territory::Territory;
use crate::words::tunnel::Tunnel;
use crate::words::units::{Mtu, OutOfRange, Overhead};

use super::Backend;

/// Packets in UDP.
pub(super) struct Udp {
    options: UdpConfig,
}

impl Udp {
    pub(super) fn new(options: UdpConfig) -> Self {
        Self { options }
    }

    /// What is carried for whom; none while something of it is not known, which is then a finding.
    fn tunnel(&self, scene: &Scene<'_>, draft: &mut Draft) -> Option<Tunnel> {
        let (Some(own), Some(IpAddr::V4(address))) =
            (scene.own.subnets.v4(), scene.own.subnets.v4().map(|own| own.base()))
        else {
            return None;
        };
        let Some(IpAddr::V4(local)) = scene.node.uplink.address(Family::V4) else {
            draft.find(Code::UPLINK_ABSENT, format!("{} has no IPv4 address", scene.node.uplink.link));
            return None;
        };
        let mut peers = BTreeMap::new();
        for place in scene.places(Family::V4, draft) {
            if let IpAddr::V4(public) = place.public {
                peers.insert(place.subnet, public);
            }
        }
        let mtu = self.mtu(scene.config, scene.node).ok()?;
        let (device, port) = (scene.network.tunnel(), self.options.port);
        Some(Tunnel { device, address, mtu, local, port, own, peers })
    }
}

impl Backend for Udp {
    /// Upstream's leases of this backend do not even name it.
    fn advertise(&self, _: &NetworkConfig, _: &Node) -> Advertisement {
        Advertisement::default()
    }

    fn mtu(&self, _: &NetworkConfig, node: &Node) -> Result<Mtu, OutOfRange> {
        node.uplink.mtu.less(Overhead::UDP_OVER_V4)
    }

    fn plan(&self, scene: &Scene<'_>, draft: &mut Draft) {
        if scene.families().any(|family| family == Family::V6) {
            draft.find(Code::FAMILY_NOT_CARRIED, "udp carries IPv4 only; the IPv6 subnet stays on this host");
        }
        let Some(tunnel) = self.tunnel(scene, draft) else { return };
        let Some(range) = scene.config.range(Family::V4) else { return };
        draft.add(Fact::Link(Box::new(Link {
            name: tunnel.device,
            kind: LinkKind::Given,
            mtu: Some(tunnel.mtu),
            mac: None,
            alias: Some(Territory::alias_of(scene.network)),
            up: true,
            modes: Default::default(),
        })));
        // ICMP errors come out of the device with the device's own address, which only our own packets have there.
        let path = format!("net/ipv4/conf/{}/accept_local", tunnel.device);
        draft.add(Fact::Sysctl(Sysctl { link: Some(tunnel.device), path, value: "1".into() }));
        if let Ok(address) = InterfaceAddress::new(tunnel.address.into(), Family::V4.bits()) {
            draft.add(Fact::Address(Address {
                link: tunnel.device,
                address,
                no_prefix_route: false,
                detect_duplicates: false,
            }));
        }
        draft.add(Fact::Route(Route {
            destination: range.cidr,
            via: None,
            link: tunnel.device,
            onlink: false,
            metric: 0,
            scope: RouteScope::Global,
            source: None,
            protocol: RouteProtocol::BOOT,
            extras: Default::default(),
        }));
        draft.tunnel = Some(tunnel);
    }
}
