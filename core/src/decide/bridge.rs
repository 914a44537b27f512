//! The node's bridge of a network: where its endpoints meet and where their gateway lives.
//!
//! The agent plans these facts and so does every attach; both want the same, so who comes first does not matter.

use std::collections::{BTreeMap, BTreeSet};

use crate::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use crate::words::fact::{
    Address, Conflict, Fact, Facts, Key, Link, LinkKind, Route, RouteProtocol, RouteScope, Sysctl,
};
use crate::words::name::LinkName;
use crate::words::rule::{
    Base, Chain, ChainKind, Hook, Match, Rule, Side, Table, TableFamily, TableName, Verdict,
};
use crate::words::units::Mtu;

/// What the bridge should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BridgeSpec {
    /// Its name.
    pub name: LinkName,
    /// Its addresses: the gateway of each of the node's subnets, at most one of a family.
    pub gateways: Vec<InterfaceAddress>,
    /// Largest packet.
    pub mtu: Mtu,
    /// Mark of the owner, if it is marked.
    pub alias: Option<String>,
}

/// The bridge's facts.
///
/// The IPv4 subnet's route is ours and of global scope, not the kernel's of link scope: an engine that chooses a pool by
/// itself compares its choice with link-scope routes, finds the bridge of an earlier network on the same lease, and asks again for ever
/// (libnetwork netutils `CheckRouteOverlaps`).
pub fn plan(spec: &BridgeSpec) -> Result<Facts, Conflict> {
    let mut facts = Facts::default();
    facts.add(Fact::Link(Box::new(Link {
        name: spec.name,
        kind: LinkKind::Bridge,
        mtu: Some(spec.mtu),
        // Pinned: a bridge without a MAC of its own takes its lowest port's, and changes it when that leaves.
        mac: spec.gateways.first().map(|gateway| Mac::for_address(gateway.address())),
        alias: spec.alias.clone(),
        up: true,
    })))?;
    for gateway in &spec.gateways {
        match gateway.family() {
            Family::V4 => plan_v4(spec.name, *gateway, &mut facts)?,
            Family::V6 => plan_v6(spec.name, *gateway, &mut facts)?,
        }
    }
    Ok(facts)
}

fn plan_v4(bridge: LinkName, gateway: InterfaceAddress, facts: &mut Facts) -> Result<(), Conflict> {
    facts.add(sysctl(None, "net/ipv4/ip_forward".to_owned(), "1"))?;
    facts.add(Fact::Address(Address { link: bridge, address: gateway, no_prefix_route: true }))?;
    facts.add(Fact::Route(Route {
        destination: gateway.prefix(),
        via: None,
        link: bridge,
        onlink: false,
        metric: 0,
        scope: RouteScope::Global,
        source: Some(gateway.address()),
        protocol: RouteProtocol::FLANNEL,
    }))
}

/// The kernel makes the subnet's route: nobody compares IPv6 pools with routes, and a preferred source would have to be
/// past duplicate address detection first.
fn plan_v6(bridge: LinkName, gateway: InterfaceAddress, facts: &mut Facts) -> Result<(), Conflict> {
    facts.add(sysctl(None, "net/ipv6/conf/all/forwarding".to_owned(), "1"))?;
    // Nobody else advertises anything on this bridge, and nobody else can have its address. The first one is for hosts
    // whose new interfaces get no IPv6.
    for setting in ["disable_ipv6", "accept_ra", "accept_dad"] {
        facts.add(sysctl(Some(bridge), format!("net/ipv6/conf/{bridge}/{setting}"), "0"))?;
    }
    facts.add(Fact::Address(Address { link: bridge, address: gateway, no_prefix_route: false }))
}

fn sysctl(link: Option<LinkName>, path: String, value: &str) -> Fact {
    Fact::Sysctl(Sysctl { link, path, value: value.to_owned() })
}

/// Relaxes a plan to a bridge that exists already: its MAC is in the neighbor caches of its containers and stays, whoever
/// made it.
pub fn adopt(plan: &mut Facts, observed: &Facts, bridge: LinkName) {
    let key = Key::Link(bridge);
    let (Some(Fact::Link(wanted)), Some(Fact::Link(there))) = (plan.get(&key), observed.get(&key)) else {
        return;
    };
    if wanted.kind == there.kind {
        let link = Link { mac: there.mac, ..wanted.as_ref().clone() };
        plan.set(Fact::Link(Box::new(link)));
    }
}

/// Name of the table that [`masquerade`] plans.
pub fn masquerade_table(bridge: LinkName) -> TableName {
    const FIRST: &str = "flannel_cni";
    let name = match bridge.as_str() {
        "cni0" => FIRST.to_owned(),
        other => format!("{FIRST}_{other}"),
    };
    TableName { family: TableFamily::Inet, name }
}

/// What leaves the networks gets the node's address, for a node whose agent does not see to that itself: one static rule
/// for each subnet, nothing for a container, so that nothing can be left behind by one. Traffic to other nodes' containers and
/// multicast keep their source.
pub fn masquerade(bridge: LinkName, subnets: &[Prefix], networks: &[Prefix]) -> Fact {
    const SRCNAT: i32 = 100;
    let rules = subnets.iter().map(|subnet| {
        let family = subnet.family();
        let inside = networks.iter().filter(|network| network.family() == family);
        let kept: BTreeSet<Prefix> = inside.copied().chain([Prefix::multicast(family)]).collect();
        let mut matches = vec![Match::Address { side: Side::Source, negated: false, prefix: *subnet }];
        matches.extend(kept.into_iter().map(|prefix| Match::Address {
            side: Side::Destination,
            negated: true,
            prefix,
        }));
        Rule { matches, counter: false, verdict: Verdict::Masquerade { fully_random: false } }
    });
    let chain = Chain {
        base: Some(Base { kind: ChainKind::Nat, hook: Hook::Postrouting, priority: SRCNAT }),
        rules: rules.collect(),
    };
    Fact::Table(Box::new(Table {
        chains: BTreeMap::from([("postrouting".to_owned(), chain)]),
        ..Table::new(masquerade_table(bridge))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(gateways: &[&str]) -> BridgeSpec {
        BridgeSpec {
            name: LinkName::new("cni0").unwrap(),
            gateways: gateways.iter().map(|gateway| gateway.parse().unwrap()).collect(),
            mtu: Mtu::new(1450).unwrap(),
            alias: None,
        }
    }

    #[test]
    fn a_bridge_for_both_families() {
        assert_eq!(
            plan(&spec(&["10.5.29.1/24", "fd00:5::1/64"])).unwrap().to_string(),
            "sysctl -w net.ipv4.ip_forward=1\n\
             sysctl -w net.ipv6.conf.all.forwarding=1\n\
             ip link add cni0 address 0a:58:0a:05:1d:01 mtu 1450 up type bridge\n\
             sysctl -w net.ipv6.conf.cni0.accept_dad=0\n\
             sysctl -w net.ipv6.conf.cni0.accept_ra=0\n\
             sysctl -w net.ipv6.conf.cni0.disable_ipv6=0\n\
             ip addr replace 10.5.29.1/24 dev cni0 noprefixroute\n\
             ip addr replace fd00:5::1/64 dev cni0\n\
             ip route replace 10.5.29.0/24 dev cni0 proto 70 scope global src 10.5.29.1\n"
        );
    }

    #[test]
    fn a_bridge_that_is_there_keeps_its_mac() {
        let mut facts = plan(&spec(&["10.5.29.1/24"])).unwrap();
        let theirs: Mac = "76:e6:39:1b:26:de".parse().unwrap();
        let mut there = facts.clone();
        if let Some(Fact::Link(mut link)) = there.remove(&Key::Link(LinkName::new("cni0").unwrap())) {
            link.mac = Some(theirs);
            there.set(Fact::Link(link));
        }
        assert_eq!(crate::words::fact::diff(&facts, &there).len(), 1);
        adopt(&mut facts, &there, LinkName::new("cni0").unwrap());
        assert_eq!(crate::words::fact::diff(&facts, &there), []);
    }

    #[test]
    fn masquerading_spares_the_networks_and_multicast() {
        let subnets = ["10.5.29.0/24".parse().unwrap(), "fd00:5::/64".parse().unwrap()];
        let networks = ["10.5.0.0/16".parse().unwrap(), "fd00::/16".parse().unwrap()];
        let table = masquerade(LinkName::new("cni0").unwrap(), &subnets, &networks).to_string();
        assert!(table.contains("table inet flannel_cni {"), "{table}");
        assert!(
            table
                .contains("ip saddr 10.5.29.0/24 ip daddr != 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade"),
            "{table}"
        );
        assert!(
            table.contains("ip6 saddr fd00:5::/64 ip6 daddr != fd00::/16 ip6 daddr != ff00::/8 masquerade"),
            "{table}"
        );
        assert_eq!(masquerade_table(LinkName::new("fl-web").unwrap()).name, "flannel_cni_fl-web");
    }
}
