//! The node's bridge of a network: where its endpoints meet and where their gateway lives.
//!
//! The agent plans these facts and so does every attach; both want the same, so who comes first does not matter.

use std::collections::{BTreeMap, BTreeSet};

use crate::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use crate::words::fact::{
    Address, BridgePort, Conflict, Fact, Facts, Key, Link, LinkKind, LinkModes, PortVlans, Route,
    RouteExtras, RouteProtocol, RouteScope, Sysctl, VethPeer, VlanMember,
};
use crate::words::name::{Attachment, LinkName, NameError, table_named};
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
    /// What few bridges have.
    pub options: BridgeOptions,
}

/// What few bridges have.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct BridgeOptions {
    /// Takes frames that are not for it.
    pub promiscuous: bool,
    /// Keeps the VLANs of its ports apart.
    pub vlan_filtering: bool,
    /// The gateway is in a VLAN, on an interface of its own.
    pub vlan_gateway: Option<VlanGateway>,
}

/// A veth pair that is the gateway's place in one VLAN of the bridge. Its upper end is called as upstream's bridge plugin calls it
/// (`ensureVlanInterface`), so that the two share it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VlanGateway {
    /// The end with the address: `cni0.100`.
    pub link: LinkName,
    /// The end on the bridge.
    pub port: LinkName,
    /// The VLAN.
    pub vlan: u16,
    /// The end on the bridge is not in VLAN 1.
    pub not_default: bool,
}

impl VlanGateway {
    /// That of a bridge in a VLAN.
    ///
    /// # Errors
    /// The bridge's name leaves no room for the VLAN's number.
    pub fn new(bridge: LinkName, vlan: u16, not_default: bool) -> Result<Self, NameError> {
        let link = LinkName::new(&format!("{bridge}.{vlan}"))?;
        let port = Attachment { container: bridge.to_string(), interface: vlan.to_string() };
        Ok(Self { link, port: port.host_link("vlan gateway"), vlan, not_default })
    }
}

impl BridgeSpec {
    /// The interface that has the gateways' addresses.
    pub fn gateway_link(&self) -> LinkName {
        self.options.vlan_gateway.as_ref().map_or(self.name, |gateway| gateway.link)
    }
}

/// The bridge's facts.
///
/// The IPv4 subnet's route is ours and of global scope, not the kernel's of link scope: an engine that chooses a pool by
/// itself compares its choice with link-scope routes, finds the bridge of an earlier network on the same lease, and asks again for ever
/// (libnetwork netutils `CheckRouteOverlaps`).
pub fn plan(spec: &BridgeSpec) -> Result<Facts, Conflict> {
    let mut facts = Facts::default();
    let mac = spec.gateways.first().map(|gateway| Mac::for_address(gateway.address()));
    facts.add(Fact::Link(Box::new(Link {
        name: spec.name,
        kind: LinkKind::Bridge,
        mtu: Some(spec.mtu),
        // Pinned: a bridge without a MAC of its own takes its lowest port's, and changes it when that leaves.
        // Without an address nobody knows it, and a derived one could be that of another node's bridge on the same wire.
        mac: mac.filter(|_| spec.options.vlan_gateway.is_none()),
        alias: spec.alias.clone(),
        up: true,
        modes: LinkModes {
            promiscuous: spec.options.promiscuous,
            vlan_filtering: spec.options.vlan_filtering,
        },
    })))?;
    if let Some(gateway) = &spec.options.vlan_gateway {
        plan_vlan(spec, gateway, mac, &mut facts)?;
    }
    for gateway in &spec.gateways {
        match gateway.family() {
            Family::V4 => plan_v4(spec.gateway_link(), *gateway, &mut facts)?,
            Family::V6 => plan_v6(spec.gateway_link(), *gateway, &mut facts)?,
        }
    }
    Ok(facts)
}

/// The pair is made by the end whose name comes first, because facts are made in the order of their keys.
fn plan_vlan(
    spec: &BridgeSpec,
    gateway: &VlanGateway,
    mac: Option<Mac>,
    facts: &mut Facts,
) -> Result<(), Conflict> {
    let VlanGateway { link, port, vlan, not_default } = *gateway;
    let mut ends = [(link, mac), (port, None)];
    ends.sort_by_key(|(name, _)| *name);
    let [(first, first_mac), (second, second_mac)] = ends;
    let mtu = Some(spec.mtu);
    let peer = VethPeer { name: second, mac: second_mac, mtu, in_sandbox: false };
    for (name, mac, peer) in [(first, first_mac, Some(peer)), (second, second_mac, None)] {
        let kind = LinkKind::Veth { peer };
        let modes = LinkModes::default();
        facts.add(Fact::Link(Box::new(Link { name, kind, mtu, mac, alias: None, up: true, modes })))?;
    }
    let bridge = spec.name;
    facts.add(Fact::BridgePort(BridgePort { link: port, bridge, hairpin: false, isolated: false }))?;
    let members = BTreeMap::from([(vlan, VlanMember::Access)]);
    facts.add(Fact::PortVlans(PortVlans { link: port, members, not_default }))
}

fn plan_v4(bridge: LinkName, gateway: InterfaceAddress, facts: &mut Facts) -> Result<(), Conflict> {
    facts.add(sysctl(None, "net/ipv4/ip_forward".to_owned(), "1"))?;
    facts.add(Fact::Address(Address {
        link: bridge,
        address: gateway,
        no_prefix_route: true,
        detect_duplicates: false,
    }))?;
    facts.add(Fact::Route(Route {
        destination: gateway.prefix(),
        via: None,
        link: bridge,
        onlink: false,
        metric: 0,
        scope: RouteScope::Global,
        source: Some(gateway.address()),
        protocol: RouteProtocol::FLANNEL,
        extras: RouteExtras::default(),
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
    facts.add(Fact::Address(Address {
        link: bridge,
        address: gateway,
        no_prefix_route: false,
        detect_duplicates: false,
    }))
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

/// Who keeps its source when it leaves a bridge's subnets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Masquerade {
    /// Where the rules are.
    pub table: TableName,
    /// What leaves these gets the node's address...
    pub subnets: Vec<Prefix>,
    /// ...unless it goes to these.
    pub spared: Vec<Prefix>,
    /// What the table says already goes on: nobody knows all subnets at once.
    pub accumulate: bool,
}

impl Masquerade {
    /// With the subnets that a table of this kind masquerades now; they are spared by each other.
    pub fn accumulated(mut self, there: &Table) -> Self {
        let tests = there.chains.values().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.matches);
        for test in tests {
            if let Match::Address { side: Side::Source, negated: false, prefix } = test
                && !self.subnets.contains(prefix)
            {
                self.subnets.push(*prefix);
                self.spared.push(*prefix);
            }
        }
        self
    }
}

/// Name of the table that [`masquerade`] plans for a network of the plugin `bridge`; several may share a bridge.
pub fn network_masquerade_table(network: &str) -> TableName {
    TableName { family: TableFamily::Inet, name: table_named("flannel_cni_net", network) }
}

/// Name of the table that [`masquerade`] plans for a flannel network's bridge.
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
pub fn masquerade(wanted: &Masquerade) -> Fact {
    const SRCNAT: i32 = 100;
    let rules = wanted.subnets.iter().map(|subnet| {
        let family = subnet.family();
        let inside = wanted.spared.iter().filter(|network| network.family() == family);
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
        ..Table::new(wanted.table.clone())
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
            options: BridgeOptions::default(),
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
        let table = masquerade_table(LinkName::new("cni0").unwrap());
        let wanted =
            Masquerade { table, subnets: subnets.into(), spared: networks.into(), accumulate: false };
        let table = masquerade(&wanted).to_string();
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
