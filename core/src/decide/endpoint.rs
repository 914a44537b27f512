//! One endpoint: a container's place on a network, as facts of the host and facts of the container.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use crate::words::fact::{
    Address, BridgePort, Conflict, Fact, Facts, Guard, Link, LinkKind, LinkModes, PortVlans, Route,
    RouteExtras, RouteProtocol, RouteScope, Sysctl, VethPeer, VlanMember,
};
use crate::words::name::LinkName;
use crate::words::units::Mtu;

/// Who moves the container's end of the veth pair to where it belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Birth {
    /// Nobody has to: it is born in the container's namespace (CNI).
    InSandbox,
    /// Somebody else: it is born beside the host's end (Docker's engine moves, renames and configures it).
    OnHost,
}

/// A route inside the container.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EndpointRoute {
    /// Destination.
    pub destination: Prefix,
    /// Through here; none for the gateway of the destination's family.
    pub via: Option<IpAddr>,
    /// Metric; 0 for what the kernel takes.
    pub metric: u32,
    /// Scope; none for the one that suits the gateway.
    pub scope: Option<RouteScope>,
    /// What few routes have.
    pub extras: RouteExtras,
}

impl EndpointRoute {
    /// Through the gateway.
    pub fn to(destination: Prefix) -> Self {
        Self { destination, via: None, metric: 0, scope: None, extras: RouteExtras::default() }
    }
}

/// What an endpoint should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointSpec {
    /// The host's end of the veth pair ([`crate::words::name::Attachment::host_link`]).
    pub host_link: LinkName,
    /// The container's end.
    pub container_link: LinkName,
    /// Where the container's end is born.
    pub birth: Birth,
    /// The bridge it joins.
    pub bridge: LinkName,
    /// Frames may leave by the port they came in by: a container reaches itself through a published port.
    pub hairpin: bool,
    /// Frames do not go between this endpoint and others of the bridge that are isolated.
    pub isolated: bool,
    /// Largest packet; none where it is not looked at.
    pub mtu: Option<Mtu>,
    /// MAC of the container's end; none where it is not looked at.
    pub mac: Option<Mac>,
    /// Its addresses.
    pub addresses: Vec<InterfaceAddress>,
    /// Gateway of each family.
    pub gateways: Vec<IpAddr>,
    /// Its routes, beside those to its own subnets.
    pub routes: Vec<EndpointRoute>,
    /// What few endpoints have.
    pub options: EndpointOptions,
}

/// What few endpoints have.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct EndpointOptions {
    /// The VLANs of its port; none where the bridge keeps none apart.
    pub vlans: Option<EndpointVlans>,
    /// What it sends from another MAC than this one is dropped.
    pub guard: Option<Mac>,
    /// Its IPv6 addresses are not used before nobody objects.
    pub detect_duplicates: bool,
    /// Its interface is left down.
    pub down: bool,
}

/// The VLANs of an endpoint's port.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct EndpointVlans {
    /// By number.
    pub members: BTreeMap<u16, VlanMember>,
    /// Not in VLAN 1, which every port joins by itself.
    pub not_default: bool,
}

/// An endpoint's facts, by the namespace they are true of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointPlan {
    /// In the host's namespace.
    pub host: Facts,
    /// In the container's; empty where somebody else configures it.
    pub container: Facts,
}

/// MAC of the host's end: follows from the container's, so that nothing need be read back.
pub fn host_mac(container: Mac) -> Mac {
    let [first, rest @ ..] = container.0;
    let [b, c, d, e, f] = rest;
    // Another locally administered unicast address; the bridge's MAC is pinned, so this one is never anybody's gateway.
    Mac([(first ^ 0x04) & 0xfe | 0x02, b ^ 0x01, c, d, e, f])
}

/// The endpoint's facts. Does not hold the bridge's.
pub fn plan(spec: &EndpointSpec) -> Result<EndpointPlan, Conflict> {
    let container = match spec.birth {
        Birth::InSandbox => container(spec)?,
        Birth::OnHost => Facts::default(),
    };
    Ok(EndpointPlan { host: host(spec)?, container })
}

fn host(spec: &EndpointSpec) -> Result<Facts, Conflict> {
    let peer = VethPeer {
        name: spec.container_link,
        mac: spec.mac,
        mtu: spec.mtu,
        in_sandbox: spec.birth == Birth::InSandbox,
    };
    let mut facts = Facts::default();
    facts.add(Fact::Link(Box::new(Link {
        name: spec.host_link,
        kind: LinkKind::Veth { peer: Some(peer) },
        mtu: spec.mtu,
        mac: spec.mac.map(host_mac),
        alias: None,
        up: true,
        modes: LinkModes::default(),
    })))?;
    facts.add(Fact::BridgePort(BridgePort {
        link: spec.host_link,
        bridge: spec.bridge,
        hairpin: spec.hairpin,
        isolated: spec.isolated,
    }))?;
    if let Some(EndpointVlans { members, not_default }) = spec.options.vlans.clone() {
        facts.add(Fact::PortVlans(PortVlans { link: spec.host_link, members, not_default }))?;
    }
    if let Some(mac) = spec.options.guard {
        facts.add(Fact::Guard(Guard { link: spec.host_link, mac }))?;
    }
    Ok(facts)
}

fn container(spec: &EndpointSpec) -> Result<Facts, Conflict> {
    let link = spec.container_link;
    let mut facts = Facts::default();
    facts.add(Fact::Link(Box::new(Link {
        name: link,
        kind: LinkKind::Veth { peer: None },
        mtu: spec.mtu,
        mac: spec.mac,
        alias: None,
        up: !spec.options.down,
        modes: LinkModes::default(),
    })))?;
    for address in &spec.addresses {
        for (setting, value) in settings(address.family(), spec.options.detect_duplicates) {
            let path = format!("net/{setting}").replace("IFNAME", link.as_str());
            facts.add(Fact::Sysctl(Sysctl { link: Some(link), path, value: (*value).to_owned() }))?;
        }
        let detect_duplicates = spec.options.detect_duplicates;
        facts.add(Fact::Address(Address {
            link,
            address: *address,
            no_prefix_route: false,
            detect_duplicates,
        }))?;
    }
    for route in &spec.routes {
        let family = route.destination.family();
        let via = route.via.or_else(|| spec.gateways.iter().copied().find(|g| Family::of(*g) == family));
        facts.add(Fact::Route(Route {
            destination: route.destination,
            via,
            link,
            onlink: false,
            metric: match (route.metric, family) {
                (0, Family::V6) => IPV6_METRIC,
                (metric, _) => metric,
            },
            scope: match (route.scope, family) {
                (Some(scope), Family::V4) => scope,
                (None, Family::V4) if via.is_none() => RouteScope::Link,
                // The kernel has no scopes of IPv6 routes: whatever was asked for, it shows this one.
                _ => RouteScope::Global,
            },
            source: None,
            protocol: RouteProtocol::BOOT,
            extras: route.extras,
        }))?;
    }
    Ok(facts)
}

/// How an interface treats addresses of a family: as upstream's bridge and ipam package set it. The neighbors hear of a link that
/// comes up; IPv6 addresses survive one that goes down.
fn settings(family: Family, detect_duplicates: bool) -> &'static [(&'static str, &'static str)] {
    match (family, detect_duplicates) {
        (Family::V4, _) => &[("ipv4/conf/IFNAME/arp_notify", "1")],
        (Family::V6, false) => &[
            ("ipv6/conf/IFNAME/disable_ipv6", "0"),
            ("ipv6/conf/IFNAME/accept_dad", "0"),
            ("ipv6/conf/IFNAME/keep_addr_on_down", "1"),
        ],
        (Family::V6, true) => &[
            ("ipv6/conf/IFNAME/disable_ipv6", "0"),
            ("ipv6/conf/IFNAME/accept_dad", "1"),
            ("ipv6/conf/IFNAME/enhanced_dad", "1"),
            ("ipv6/conf/IFNAME/keep_addr_on_down", "1"),
        ],
    }
}

/// What the kernel fills in for IPv6 (uapi/linux/ipv6_route.h `IP6_RT_PRIO_USER`).
const IPV6_METRIC: u32 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> EndpointSpec {
        EndpointSpec {
            host_link: LinkName::new("veth0123456789a").unwrap(),
            container_link: LinkName::new("eth0").unwrap(),
            birth: Birth::InSandbox,
            bridge: LinkName::new("cni0").unwrap(),
            hairpin: true,
            isolated: false,
            mtu: Some(Mtu::new(1450).unwrap()),
            mac: Some(Mac::for_address("10.5.29.7".parse().unwrap())),
            addresses: vec!["10.5.29.7/24".parse().unwrap(), "fd00:5::7/64".parse().unwrap()],
            gateways: vec!["10.5.29.1".parse().unwrap(), "fd00:5::1".parse().unwrap()],
            routes: vec![
                EndpointRoute::to("10.5.0.0/16".parse().unwrap()),
                EndpointRoute::to("0.0.0.0/0".parse().unwrap()),
                EndpointRoute::to("::/0".parse().unwrap()),
                EndpointRoute {
                    destination: "10.9.0.0/16".parse().unwrap(),
                    via: Some("10.5.29.9".parse().unwrap()),
                    metric: 7,
                    scope: None,
                    extras: RouteExtras::default(),
                },
            ],
            options: EndpointOptions::default(),
        }
    }

    #[test]
    fn an_endpoint_of_both_families() {
        let plan = plan(&spec()).unwrap();
        assert_eq!(
            plan.host.to_string(),
            "ip link add veth0123456789a address 0e:59:0a:05:1d:07 mtu 1450 up type veth peer name eth0 \
             address 0a:58:0a:05:1d:07 mtu 1450 netns SANDBOX\n\
             ip link set veth0123456789a master cni0; bridge link set dev veth0123456789a hairpin on\n"
        );
        assert_eq!(
            plan.container.to_string(),
            "ip link add eth0 address 0a:58:0a:05:1d:07 mtu 1450 up type veth\n\
             sysctl -w net.ipv4.conf.eth0.arp_notify=1\n\
             sysctl -w net.ipv6.conf.eth0.accept_dad=0\n\
             sysctl -w net.ipv6.conf.eth0.disable_ipv6=0\n\
             sysctl -w net.ipv6.conf.eth0.keep_addr_on_down=1\n\
             ip addr replace 10.5.29.7/24 dev eth0\n\
             ip addr replace fd00:5::7/64 dev eth0\n\
             ip route replace default via 10.5.29.1 dev eth0\n\
             ip route replace 10.5.0.0/16 via 10.5.29.1 dev eth0\n\
             ip route replace 10.9.0.0/16 via 10.5.29.9 dev eth0 metric 7\n\
             ip route replace default via fd00:5::1 dev eth0 metric 1024\n"
        );
    }

    #[test]
    fn an_engine_configures_its_containers_itself() {
        let plan = plan(&EndpointSpec { birth: Birth::OnHost, ..spec() }).unwrap();
        assert!(plan.container.is_empty());
        assert!(!plan.host.to_string().contains("netns"), "{}", plan.host);
        let isolated = super::plan(&EndpointSpec { isolated: true, hairpin: false, ..spec() }).unwrap();
        assert!(isolated.host.to_string().contains("dev veth0123456789a isolated on"), "{}", isolated.host);
    }

    #[test]
    fn routes_that_contradict_each_other_are_refused() {
        let mut spec = spec();
        let to = |via: &str| EndpointRoute {
            destination: "10.9.0.0/16".parse().unwrap(),
            via: Some(via.parse().unwrap()),
            metric: 0,
            scope: None,
            extras: RouteExtras::default(),
        };
        spec.routes = vec![to("10.5.29.8"), to("10.5.29.9")];
        assert!(plan(&spec).unwrap_err().to_string().contains("10.5.29.9"));
        spec.routes = vec![to("10.5.29.8"), to("10.5.29.8")];
        assert!(plan(&spec).is_ok());
    }
}
