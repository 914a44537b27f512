//! What a node keeps for its containers on a network whose lease another agent of the node holds.
//!
//! The bridge with the endpoints' ports, and rules in a table of its own: everything else of the network (devices, routes, the
//! network's own table, the accepts for iptables) is the other agent's and is neither planned nor looked at.

use std::collections::BTreeSet;

use super::bridge::Masquerade;
use super::firewall::{self, FirewallScene, Range};
use super::plan::{Plan, bridge_and_ports};
use super::publish::PublishScene;
use super::scene::Draft;
use super::{bridge, publish};
use crate::words::addr::{Family, InterfaceAddress, Prefix};
use crate::words::exposure::Exposure;
use crate::words::fact::{Conflict, Fact, Facts, Key};
use crate::words::name::{LinkName, NetworkName};
use crate::words::node::Iptables;
use crate::words::rule::{Table, TableFamily, TableName};
use crate::words::territory::Territory;
use crate::words::units::Mtu;

/// What the other agent tells, and what is to be done with it.
#[derive(Clone, Copy, Debug)]
pub struct ReaderScene<'a> {
    /// Which network.
    pub network: &'a NetworkName,
    /// All of it.
    pub networks: &'a [Prefix],
    /// This node's part, as its bridge holds it.
    pub gateways: &'a [InterfaceAddress],
    /// Largest packet of a container.
    pub mtu: Mtu,
    /// The bridge, if one is to be kept.
    pub bridge: Option<LinkName>,
    /// The endpoints' ports that exist.
    pub ports: &'a BTreeSet<LinkName>,
    /// Give what leaves the network the node's address, because the other agent does not.
    pub masquerade: bool,
    /// CIDRs of this node's other networks, which this one must not reach.
    pub isolated_from: &'a BTreeSet<Prefix>,
    /// What is particular about the endpoints; none if that is another program's to say.
    pub exposure: Option<&'a Exposure>,
}

/// The table of a reader. No network's own table is called so, because of the underscore.
pub fn table_name(network: &NetworkName) -> TableName {
    let name = network.table().replacen("flannel", "flannel_reader", 1);
    TableName { family: TableFamily::Inet, name }
}

/// What a reader may leave behind in the kernel, its bridge aside.
pub fn remains(network: &NetworkName) -> Territory {
    Territory { tables: BTreeSet::from([table_name(network)]), ..Territory::default() }
}

/// The plan; the other agent's subnet file is all that it follows from.
pub fn plan(scene: &ReaderScene<'_>) -> Plan {
    let mut draft = Draft::default();
    if let Some(bridge) = scene.bridge {
        bridge_and_ports(bridge, scene.gateways.to_vec(), scene.mtu, scene.ports, &mut draft);
    }
    let ranges = ranges(scene);
    match table(scene, &ranges) {
        Ok(Some(table)) => draft.add(Fact::Table(Box::new(table))),
        Ok(None) => {}
        Err(conflict) => draft.join(Err(conflict)),
    }
    let mut territory = remains(scene.network);
    if let Some(exposure) = scene.exposure {
        let (network, bridge) = (scene.network, scene.bridge);
        draft.join(publish::plan(&PublishScene { network, ranges: &ranges, exposure, bridge }));
        territory.tables.insert(publish::table_name(network));
    }
    let Draft { facts, findings, tunnel, associations, wireguard, errands } = draft;
    let planned = Territory::of(facts.iter());
    territory.links = planned.links;
    territory.sysctls = planned.sysctls;
    Plan { facts, tunnel, associations, wireguard, errands, territory, findings, mtu: scene.mtu, ranges }
}

/// Isolation as everywhere, and masquerading as the CNI plugin does it under such an agent.
fn table(scene: &ReaderScene<'_>, ranges: &[Range]) -> Result<Option<Table>, Conflict> {
    let mut facts = firewall::plan(&FirewallScene {
        network: scene.network,
        ranges,
        masquerade: false,
        fully_random: false,
        forward: false,
        isolated_from: scene.isolated_from,
        forward_chains: &BTreeSet::new(),
        iptables: &Iptables::default(),
        nftables: false,
    })?;
    let mut table = take_table(&mut facts, firewall::table_name(scene.network))
        .unwrap_or_else(|| Table::new(table_name(scene.network)));
    if let Some(bridge) = scene.bridge.filter(|_| scene.masquerade) {
        let subnets: Vec<Prefix> = scene.gateways.iter().map(InterfaceAddress::prefix).collect();
        let name = bridge::masquerade_table(bridge);
        let planned = bridge::masquerade(&Masquerade {
            table: name.clone(),
            subnets,
            spared: scene.networks.to_vec(),
            accumulate: false,
        });
        let chains = take_table(&mut Facts::from_iter([planned]), name);
        table.chains.extend(chains.into_iter().flat_map(|table| table.chains));
    }
    table.name = table_name(scene.network);
    Ok((!table.chains.is_empty()).then_some(table))
}

fn take_table(facts: &mut Facts, name: TableName) -> Option<Table> {
    match facts.remove(&Key::Table(name)) {
        Some(Fact::Table(table)) => Some(*table),
        _ => None,
    }
}

fn ranges(scene: &ReaderScene<'_>) -> Vec<Range> {
    let range = |family: Family| {
        let of = |prefix: &Prefix| prefix.family() == family;
        let subnet = scene.gateways.iter().map(InterfaceAddress::prefix).find(of)?;
        let cidr = scene.networks.iter().copied().find(|cidr| cidr.covers(&subnet))?;
        Some(Range { cidr, subnet })
    };
    Family::BOTH.into_iter().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(change: impl for<'a> FnOnce(&mut ReaderScene<'a>, &'a BTreeSet<Prefix>)) -> Plan {
        let network = NetworkName::default_network();
        let networks = ["10.42.0.0/16".parse().unwrap()];
        let gateways = ["10.42.3.1/24".parse().unwrap()];
        let ports = BTreeSet::from([LinkName::new("veth1").unwrap()]);
        let (alone, others) = (BTreeSet::new(), BTreeSet::from(["10.200.0.0/16".parse().unwrap()]));
        let mut scene = ReaderScene {
            network: &network,
            networks: &networks,
            gateways: &gateways,
            mtu: Mtu::new(1450).unwrap(),
            bridge: Some(LinkName::new("cni0").unwrap()),
            ports: &ports,
            masquerade: false,
            isolated_from: &alone,
            exposure: None,
        };
        change(&mut scene, &others);
        plan(&scene)
    }

    #[test]
    fn a_reader_keeps_the_bridge_and_its_ports() {
        let plan = planned(|_, _| {});
        assert_eq!(
            plan.facts.to_string(),
            "sysctl -w net.ipv4.ip_forward=1\n\
             ip link add cni0 address 0a:58:0a:2a:03:01 mtu 1450 up type bridge\n\
             ip link add veth1 up type veth\n\
             ip link set veth1 master cni0\n\
             ip addr replace 10.42.3.1/24 dev cni0 noprefixroute\n\
             ip route replace 10.42.3.0/24 dev cni0 proto 70 scope global src 10.42.3.1\n"
        );
    }

    #[test]
    fn its_rules_are_in_a_table_of_its_own() {
        let text = planned(|scene, others| (scene.masquerade, scene.isolated_from) = (true, others));
        let text = text.facts.to_string();
        assert!(text.contains("table inet flannel_reader {"), "{text}");
        assert!(text.contains("ip saddr 10.42.0.0/16 ip daddr @isolated counter drop"), "{text}");
        assert!(text.contains("ip saddr 10.42.3.0/24 ip daddr != 10.42.0.0/16"), "{text}");
        assert!(!text.contains("FLANNEL-FWD") && !text.contains("table inet flannel {"), "{text}");
    }

    #[test]
    fn nothing_of_the_other_agents_is_in_its_territory() {
        let plan = planned(|_, _| {});
        assert_eq!(plan.territory.tables, BTreeSet::from([table_name(&NetworkName::default_network())]));
        assert!(plan.territory.alias.is_none() && plan.territory.cidrs.is_empty() && !plan.territory.accepts);
        let without = planned(|scene, _| scene.bridge = None);
        assert_eq!((without.facts.len(), without.territory.links.len()), (0, 0));
    }
}
