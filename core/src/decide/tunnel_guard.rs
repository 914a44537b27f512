//! Who may send into the tunnels of a network: the holders of its leases, and nobody else.
//!
//! The kernel's VXLAN and IPIP take packets from whoever can reach the host, and what is in them comes out among the containers with
//! any source address. The guard looks at the outer one, before anything else of the host does: a packet that one of our
//! devices would unwrap is dropped, and counted, unless its source is the public address of a lease. Other VNIs on the
//! same port are somebody else's and pass.
//!
//! It is two kinds of facts: a table with the rules, which follow from the devices; and the addresses, one by one, which follow from the
//! leases. WireGuard and IPsec know their peers by keys, and the udp backend asks the leases itself.

use std::sync::Arc;

use super::scene::{Draft, Peer, Scene};
use crate::words::addr::{Family, Prefix};
use crate::words::fact::{Fact, LinkKind, TunnelHost};
use crate::words::lease::LeaseSet;
use crate::words::rule::{
    Base, Chain, ChainKind, Encapsulation, Hook, Match, Rule, Set, Side, Table, Verdict,
};

/// Earlier than all that looks at packets for this host. Fragments have been put together by then, which they have not before the
/// hook `input`.
const RAW: i32 = -300;

/// Guards the tunnels in the draft.
pub(super) fn plan(scene: &Scene<'_>, leases: &LeaseSet, draft: &mut Draft) {
    let name = TunnelHost::table_of(scene.network);
    let mut table = Table::new(name.clone());
    let mut rules = Vec::new();
    for fact in draft.facts.iter() {
        let Fact::Link(link) = fact else { continue };
        let Some((family, matches)) = arriving(&link.kind) else { continue };
        let set = TunnelHost::set(family);
        table.sets.insert(set.to_owned(), Set::of_addresses(family, []));
        let known = Match::AddressIn { side: Side::Source, negated: true, family, set: set.to_owned() };
        let matches = matches.into_iter().chain([known]).collect();
        rules.push(Rule { matches, counter: true, verdict: Verdict::Drop });
    }
    if rules.is_empty() {
        return;
    }
    let base = Base { kind: ChainKind::Filter, hook: Hook::Input, priority: RAW };
    let families: Vec<Family> = table.sets.values().map(|set| set.family).collect();
    table.chains.insert("input".to_owned(), Chain { base: Some(base), rules });
    draft.add(Fact::Table(Box::new(table)));

    let name = Arc::new(name);
    // All of them, also those that cannot be served: who holds a lease is no stranger.
    for (subnets, value) in leases.peers(&scene.own.subnets) {
        let peer = Peer { subnets: *subnets, value };
        for address in families.iter().filter_map(|family| scene.reachable(&peer, *family)) {
            // Nothing comes through a tunnel from oneself.
            if Some(address) != scene.own.value.public(Family::of(address)) {
                draft.add(Fact::TunnelHost(TunnelHost { table: name.clone(), address }));
            }
        }
    }
}

/// What a device unwraps: the outer family, and the tests that such packets pass.
fn arriving(device: &LinkKind) -> Option<(Family, Vec<Match>)> {
    match device {
        // Sent to any address of this host: the kernel's socket is bound to none (drivers/net/vxlan/vxlan_core.c
        // `vxlan_create_sock`).
        LinkKind::Vxlan(vxlan) => {
            let encapsulation = Encapsulation::Vxlan { port: vxlan.port, vni: vxlan.vni };
            Some((Family::of(vxlan.local), vec![Match::Encapsulated(encapsulation)]))
        }
        // Sent to its own address (net/ipv4/ip_tunnel.c `ip_tunnel_lookup`).
        LinkKind::Ipip(ipip) => {
            let prefix = Prefix::host(ipip.local?.into());
            let here = Match::Address { side: Side::Destination, negated: false, prefix };
            Some((Family::V4, vec![here, Match::Encapsulated(Encapsulation::Ipip)]))
        }
        LinkKind::Bridge | LinkKind::Veth { .. } | LinkKind::Wireguard | LinkKind::Given => None,
    }
}
