//! Facts as the tests write them.

use flannel_core::words::addr::Mac;
use flannel_core::words::fact::{
    Address, Fact, Forward, Link, LinkKind, LinkModes, Neighbor, Route, RouteExtras, RouteProtocol,
    RouteScope, VethPeer, Vxlan,
};
use flannel_core::words::name::LinkName;
use flannel_core::words::units::{Mtu, Port, Vni};

pub(crate) fn name(text: &str) -> LinkName {
    LinkName::new(text).unwrap()
}

pub(crate) fn mac(text: &str) -> Mac {
    text.parse().unwrap()
}

pub(crate) fn bridge(of: &str) -> Fact {
    link(of, LinkKind::Bridge, "0a:58:0a:64:05:01", 1450)
}

pub(crate) fn link(of: &str, kind: LinkKind, address: &str, mtu: u64) -> Fact {
    Fact::Link(Box::new(Link {
        name: name(of),
        kind,
        mtu: Some(Mtu::new(mtu).unwrap()),
        mac: Some(mac(address)),
        alias: Some("flannel network default".into()),
        up: true,
        modes: LinkModes::default(),
    }))
}

pub(crate) fn veth(host: &str, inside: &str, in_sandbox: bool) -> Fact {
    let peer = VethPeer {
        name: name(inside),
        mac: Some(mac("0a:58:0a:64:05:02")),
        mtu: Some(Mtu::new(1450).unwrap()),
        in_sandbox,
    };
    link(host, LinkKind::Veth { peer: Some(peer) }, "0a:58:00:00:00:01", 1450)
}

pub(crate) fn vxlan(of: &str, vni: u64, local: &str) -> Fact {
    let vxlan = Vxlan {
        vni: Vni::new(vni).unwrap(),
        port: Port::VXLAN,
        local: local.parse().unwrap(),
        underlay: name("up0"),
        learning: false,
        gbp: false,
    };
    link(of, LinkKind::Vxlan(vxlan), "76:e6:39:1b:26:de", 1430)
}

pub(crate) fn address(of: &str, text: &str) -> Fact {
    Fact::Address(Address {
        link: name(of),
        address: text.parse().unwrap(),
        no_prefix_route: false,
        detect_duplicates: false,
    })
}

pub(crate) fn neighbor(of: &str, ip: &str, address: &str) -> Fact {
    Fact::Neighbor(Neighbor { link: name(of), ip: ip.parse().unwrap(), mac: mac(address) })
}

pub(crate) fn forward(of: &str, address: &str, remote: &str) -> Fact {
    Fact::Forward(Forward { link: name(of), mac: mac(address), remote: remote.parse().unwrap() })
}

pub(crate) fn route(of: &str, destination: &str, via: Option<&str>, metric: u32) -> Route {
    Route {
        destination: destination.parse().unwrap(),
        via: via.map(|via| via.parse().unwrap()),
        link: name(of),
        onlink: via.is_some(),
        metric,
        scope: RouteScope::Global,
        source: None,
        protocol: RouteProtocol::BOOT,
        extras: RouteExtras::default(),
    }
}

/// A VXLAN device and what it takes to reach this many peers; the metric is spread.
pub(crate) fn peers(count: u32) -> impl Iterator<Item = Fact> {
    let each = |n: u32| {
        let subnet = format!("10.{}.{}.0", 128 + n / 256, n % 256);
        let address = format!("76:e6:00:{:02x}:{:02x}:01", n / 256, n % 256);
        let remote = format!("192.168.{}.{}", 100 + n / 256, n % 256);
        [
            neighbor("flannel.1", &subnet, &address),
            forward("flannel.1", &address, &remote),
            Fact::Route(route("flannel.1", &format!("{subnet}/24"), Some(&subnet), 1 + n)),
        ]
    };
    [vxlan("flannel.1", 1, "192.168.77.1"), address("flannel.1", "10.128.0.0/32")]
        .into_iter()
        .chain((1..=count).flat_map(each))
}
