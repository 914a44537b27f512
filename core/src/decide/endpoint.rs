//! One endpoint: a container's place on a network, as facts of the host and facts of the container.

use std::net::IpAddr;

use crate::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use crate::words::fact::{
    Address, BridgePort, Conflict, Fact, Facts, Link, LinkKind, Route, RouteProtocol, RouteScope, Sysctl,
    VethPeer,
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
}

impl EndpointRoute {
    /// Through the gateway.
    pub fn to(destination: Prefix) -> Self {
        Self { destination, via: None, metric: 0 }
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
    })))?;
    facts.add(Fact::BridgePort(BridgePort {
        link: spec.host_link,
        bridge: spec.bridge,
        hairpin: spec.hairpin,
        isolated: spec.isolated,
    }))?;
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
        up: true,
    })))?;
    for address in &spec.addresses {
        if address.family() == Family::V6 {
            for (setting, value) in [("disable_ipv6", "0"), ("accept_dad", "0")] {
                let path = format!("net/ipv6/conf/{link}/{setting}");
                facts.add(Fact::Sysctl(Sysctl { link: Some(link), path, value: value.to_owned() }))?;
            }
        }
        facts.add(Fact::Address(Address { link, address: *address, no_prefix_route: false }))?;
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
            scope: if via.is_some() { RouteScope::Global } else { RouteScope::Link },
            source: None,
            protocol: RouteProtocol::BOOT,
        }))?;
    }
    Ok(facts)
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
                },
            ],
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
             sysctl -w net.ipv6.conf.eth0.accept_dad=0\n\
             sysctl -w net.ipv6.conf.eth0.disable_ipv6=0\n\
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
        };
        spec.routes = vec![to("10.5.29.8"), to("10.5.29.9")];
        assert!(plan(&spec).unwrap_err().to_string().contains("10.5.29.9"));
        spec.routes = vec![to("10.5.29.8"), to("10.5.29.8")];
        assert!(plan(&spec).is_ok());
    }
}
