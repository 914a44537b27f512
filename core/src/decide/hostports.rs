//! What the packet filter does for the ports of CNI attachments: one table for the whole node, whatever networks they are on.
//!
//! No program runs between two calls of the plugin, so nobody looks at the table and mends it, and each call writes only its own elements.
//! The rules follow from the subnets that attachments are in; ports and containers are elements of maps and sets.
//!
//! A caller keeps its source unless the answer would not come back through this host. Whether a packet went to this host before it was
//! translated is known at prerouting only, so a mark takes it along: what others translate, such as services of Kubernetes, is
//! not ours to masquerade. The mark is the bit that upstream's `portmap` uses for the same.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::publish::{
    Chains, MASQUERADE, TRANSLATED, guard, is, is_not, key, map_name, named, rule, target, translation,
    within,
};
use crate::words::addr::{Family, Prefix};
use crate::words::exposure::PublishedPort;
use crate::words::hostport::{CallerMasquerade, Holding};
use crate::words::rule::{
    Match, PortKey, PortMap, PortMapKind, Set, Side, Table, TableFamily, TableName, Verdict,
};

/// The bit of a packet's mark that says "to this host, from a container's subnet" (upstream portmap `DefaultMarkBit`).
pub const MARK_BIT: u32 = 13;
const MARK: u32 = 1 << MARK_BIT;

/// The table, the same for all networks of a node.
pub fn table_name() -> TableName {
    TableName { family: TableFamily::Inet, name: "flannel_cni_ports".to_owned() }
}

/// The table with everything that these holdings need.
pub fn plan<'a>(holdings: impl IntoIterator<Item = &'a Holding>) -> Table {
    let mut table = Table::new(table_name());
    let mut subnets = BTreeMap::<Prefix, BTreeSet<IpAddr>>::new();
    let mut always = BTreeSet::new();
    for holding in holdings {
        for port in &holding.ports {
            let Some(subnet) = holding.subnet(port.family()) else { continue };
            let hairpins = subnets.entry(subnet).or_default();
            match holding.masquerade {
                CallerMasquerade::Never => {}
                CallerMasquerade::Needed => drop(hairpins.insert(port.address)),
                CallerMasquerade::Always => drop(always.insert(port.address)),
            }
            for kind in kinds(port.family()) {
                let fresh = || PortMap { kind, elements: BTreeMap::new() };
                let map = table.maps.entry(map_name(kind)).or_insert_with(fresh);
                if kind.bound == port.host_ip.is_some() {
                    map.elements.insert(key(port), target(port, Some(holding.tag())));
                }
            }
        }
    }
    let mut chains = Chains::default();
    for family in Family::BOTH {
        let ours: Vec<_> = subnets.iter().filter(|(subnet, _)| subnet.family() == family).collect();
        if !ours.is_empty() {
            plan_family(family, &ours, &always, &mut table, &mut chains);
        }
    }
    chains.into_table(&mut table);
    table
}

fn plan_family(
    family: Family,
    subnets: &[(&Prefix, &BTreeSet<IpAddr>)],
    always: &BTreeSet<IpAddr>,
    table: &mut Table,
    chains: &mut Chains,
) {
    for (subnet, hairpins) in subnets {
        let set = hairpin_set(subnet);
        let from_subnet = is(Side::Source, **subnet);
        let marked = vec![from_subnet.clone(), Match::LocalDestination];
        chains.destination.push(rule(marked, Verdict::AddMark(MARK)));
        let to_hairpins = within(Side::Destination, family, &set);
        let mark = Match::Mark { mask: MARK, value: MARK };
        let hairpin = vec![mark, TRANSLATED, from_subnet, to_hairpins.clone()];
        chains.hairpin.push(rule(hairpin, MASQUERADE));
        if family == Family::V4 {
            let local = is(Side::Source, Prefix::loopback(family));
            chains.hairpin.push(rule(vec![TRANSLATED, local, to_hairpins], MASQUERADE));
        }
        table.sets.insert(set, Set::of_addresses(family, hairpins.iter().copied()));
    }
    let all = named("masqueraded", family);
    chains.hairpin.push(rule(vec![TRANSLATED, within(Side::Destination, family, &all)], MASQUERADE));
    table.sets.insert(all, Set::of_addresses(family, always.iter().copied()));
    for kind in kinds(family) {
        let mut translation = translation(kind);
        if family == Family::V6 {
            // The kernel routes no loopback address of IPv6: who calls [::1] is better refused at once than left waiting.
            translation.matches.insert(0, is_not(Side::Destination, Prefix::loopback(family)));
            translation.matches.retain(|test| *test != Match::Family(family));
        }
        chains.destination.push(translation);
    }
    if family == Family::V4 {
        chains.guard.push(guard());
    }
}

/// A port of one address goes before the same port of all.
fn kinds(family: Family) -> [PortMapKind; 2] {
    [true, false].map(|bound| PortMapKind { family, bound })
}

/// The set of a subnet's containers that its other containers reach through this host.
fn hairpin_set(subnet: &Prefix) -> String {
    format!("hairpin-{subnet}").replace('/', "-").replace(':', "_")
}

/// The same rules with nothing in maps and sets: between this and the table lie a holding's elements.
pub fn emptied(table: &Table) -> Table {
    let mut empty = table.clone();
    empty.maps.values_mut().for_each(|map| map.elements.clear());
    empty.sets.values_mut().for_each(|set| set.elements.clear());
    empty
}

/// The map that a port is in, and its key there.
pub fn place(port: &PublishedPort) -> (String, PortMapKind, PortKey) {
    let kind = PortMapKind { family: port.family(), bound: port.host_ip.is_some() };
    (map_name(kind), kind, key(port))
}

/// The map that a port must not be in because it is another way to ask for the same packets, and its keys there: one, or
/// (none) all of that protocol and port.
pub fn rival_place(port: &PublishedPort) -> (String, PortMapKind, Option<PortKey>) {
    let kind = PortMapKind { family: port.family(), bound: port.host_ip.is_none() };
    let everywhere = port.host_ip.map(|_| PortKey { address: None, ..key(port) });
    (map_name(kind), kind, everywhere)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::exposure::Transport;
    use crate::words::name::Attachment;

    fn holding(container: &str, addresses: &[&str], host_ip: Option<&str>) -> Holding {
        let addresses: Vec<crate::words::addr::InterfaceAddress> =
            addresses.iter().map(|address| address.parse().unwrap()).collect();
        let port = |address: IpAddr| PublishedPort {
            protocol: Transport::Tcp,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port: 8080,
            address,
            port: 80,
        };
        Holding {
            network: "cbr0".to_owned(),
            owner: Attachment { container: container.to_owned(), interface: "eth0".to_owned() },
            ports: addresses.iter().map(|address| port(address.address())).collect(),
            addresses,
            masquerade: CallerMasquerade::Needed,
        }
    }

    #[test]
    fn a_port_of_both_families() {
        let expected = "\
table inet flannel_cni_ports {
	set hairpin-10.244.1.0-24 { type ipv4_addr; elements = { 10.244.1.5 }; }
	set hairpin-fd00_1__-64 { type ipv6_addr; elements = { fd00:1::5 }; }
	set masqueraded { type ipv4_addr; }
	set masqueraded6 { type ipv6_addr; }
	map bound { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
	map bound6 { type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; }
	map published { type inet_proto . inet_service : ipv4_addr . inet_service; elements = { tcp . 8080 comment \"cbr0 c1 eth0\" : 10.244.1.5 . 80 }; }
	map published6 { type inet_proto . inet_service : ipv6_addr . inet_service; elements = { tcp . 8080 comment \"cbr0 c1 eth0\" : fd00:1::5 . 80 }; }
	chain guard {
		type filter hook prerouting priority raw; policy accept;
		ip daddr 127.0.0.0/8 iifname != \"lo\" counter drop
	}
	chain output {
		type nat hook output priority -100; policy accept;
		ip saddr 10.244.1.0/24 fib daddr type local meta mark set meta mark | 0x00002000
		fib daddr type local dnat ip to ip daddr . meta l4proto . th dport map @bound
		meta nfproto ipv4 fib daddr type local dnat ip to meta l4proto . th dport map @published
		ip6 saddr fd00:1::/64 fib daddr type local meta mark set meta mark | 0x00002000
		ip6 daddr != ::1 fib daddr type local dnat ip6 to ip6 daddr . meta l4proto . th dport map @bound6
		ip6 daddr != ::1 fib daddr type local dnat ip6 to meta l4proto . th dport map @published6
	}
	chain postrouting {
		type nat hook postrouting priority srcnat - 1; policy accept;
		meta mark & 0x00002000 == 0x00002000 ct status dnat ip saddr 10.244.1.0/24 ip daddr @hairpin-10.244.1.0-24 masquerade
		ct status dnat ip saddr 127.0.0.0/8 ip daddr @hairpin-10.244.1.0-24 masquerade
		ct status dnat ip daddr @masqueraded masquerade
		meta mark & 0x00002000 == 0x00002000 ct status dnat ip6 saddr fd00:1::/64 ip6 daddr @hairpin-fd00_1__-64 masquerade
		ct status dnat ip6 daddr @masqueraded6 masquerade
	}
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		ip saddr 10.244.1.0/24 fib daddr type local meta mark set meta mark | 0x00002000
		fib daddr type local dnat ip to ip daddr . meta l4proto . th dport map @bound
		meta nfproto ipv4 fib daddr type local dnat ip to meta l4proto . th dport map @published
		ip6 saddr fd00:1::/64 fib daddr type local meta mark set meta mark | 0x00002000
		ip6 daddr != ::1 fib daddr type local dnat ip6 to ip6 daddr . meta l4proto . th dport map @bound6
		ip6 daddr != ::1 fib daddr type local dnat ip6 to meta l4proto . th dport map @published6
	}
}";
        let table = plan([&holding("c1", &["10.244.1.5/24", "fd00:1::5/64"], None)]);
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn rules_follow_from_subnets_and_not_from_containers() {
        let one = plan([&holding("c1", &["10.244.1.5/24"], None)]);
        let mut other = holding("c2", &["10.244.1.6/24"], Some("192.0.2.1"));
        other.masquerade = CallerMasquerade::Always;
        let two = plan([&holding("c1", &["10.244.1.5/24"], None), &other]);
        assert_eq!(emptied(&one), emptied(&two));
        assert_eq!(two.sets["masqueraded"].elements.len(), 1);
        assert_eq!(two.sets["hairpin-10.244.1.0-24"].elements.len(), 1);
        assert_eq!((two.maps["bound"].elements.len(), two.maps["published"].elements.len()), (1, 1));
        other.masquerade = CallerMasquerade::Never;
        assert!(plan([&other]).sets.values().all(|set| set.elements.is_empty()));
    }

    #[test]
    fn a_port_and_its_rival_are_in_different_maps() {
        let everywhere = *holding("c1", &["10.244.1.5/24"], None).ports.first().unwrap();
        let here = *holding("c1", &["10.244.1.5/24"], Some("192.0.2.1")).ports.first().unwrap();
        let (map, _, key) = place(&everywhere);
        assert_eq!(rival_place(&here), (map, place(&everywhere).1, Some(key)));
        let (map, kind, _) = place(&here);
        assert_eq!(rival_place(&everywhere), (map, kind, None));
    }
}
