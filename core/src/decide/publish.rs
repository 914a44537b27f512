//! What the packet filter does for single endpoints of a network on this node: published ports lead into containers, and some
//! containers are kept from the world or from each other.
//!
//! A table of its own, beside the network's: that one may be another program's. However many endpoints there are, the
//! rules are the same few; ports and addresses are elements of maps and sets.
//!
//! A packet to a published port has its destination rewritten before it is routed, and keeps its source, so that the
//! container sees who is calling. Only where the answer would not come back through this host is the source rewritten
//! too: between containers of one bridge, and from the host's loopback addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::firewall::Range;
use crate::words::addr::{Family, Prefix};
use crate::words::exposure::{Exposure, PublishedPort};
use crate::words::fact::{Conflict, Fact, Facts, Sysctl};
use crate::words::name::{LinkName, NetworkName};
use crate::words::rule::{
    Base, Chain, ChainKind, Hook, Match, PortKey, PortMap, PortMapKind, PortTarget, Rule, Set, Side, Table,
    TableFamily, TableName, Verdict,
};

/// What the rules of a node's endpoints follow from.
#[derive(Clone, Copy, Debug)]
pub struct PublishScene<'a> {
    /// Which network.
    pub network: &'a NetworkName,
    /// Its address families, each at most once.
    pub ranges: &'a [Range],
    /// What is particular about the endpoints.
    pub exposure: &'a Exposure,
    /// The bridge they are on, if the agent keeps it.
    pub bridge: Option<LinkName>,
}

const RAW: i32 = -300;
const DSTNAT: i32 = -100;
const FILTER: i32 = 0;
/// Before all who masquerade: once a source is settled, nobody changes it.
const BEFORE_SRCNAT: i32 = 99;

/// The table of the network's endpoints. It holds what we want; what it does not hold goes.
pub fn table_name(network: &NetworkName) -> TableName {
    TableName { family: TableFamily::Inet, name: network.endpoints_table() }
}

/// The setting without which the host cannot reach a published port by a loopback address.
pub fn localnet(bridge: LinkName, on: bool) -> Fact {
    let value = if on { "1" } else { "0" }.to_owned();
    let path = format!("net/ipv4/conf/{bridge}/route_localnet");
    Fact::Sysctl(Sysctl { link: Some(bridge), path, value })
}

/// Whether a table guards what [`localnet`] opens: whoever takes the guard away has to close it.
pub fn guards(table: &Table) -> bool {
    table.chains.contains_key(GUARD)
}

const GUARD: &str = "guard";

/// The facts; none if every endpoint is as every endpoint is.
pub fn plan(scene: &PublishScene<'_>) -> Result<Facts, Conflict> {
    let mut facts = Facts::default();
    let mut table = Table::new(table_name(scene.network));
    let mut chains = Chains::default();
    for range in scene.ranges {
        plan_published(scene, *range, &mut table, &mut chains);
        plan_sources(scene, *range, &mut table, &mut chains);
        plan_policy(scene, *range, &mut table, &mut chains);
    }
    if let Some(bridge) = scene.bridge.filter(|_| !chains.guard.is_empty()) {
        facts.add(localnet(bridge, true))?;
    }
    chains.into_table(&mut table);
    if !table.chains.is_empty() {
        facts.add(Fact::Table(Box::new(table)))?;
    }
    Ok(facts)
}

/// Rules by chain.
#[derive(Default)]
pub(super) struct Chains {
    pub(super) guard: Vec<Rule>,
    pub(super) destination: Vec<Rule>,
    pub(super) hairpin: Vec<Rule>,
    source: Vec<Rule>,
    input: Vec<Rule>,
    forward: Vec<Rule>,
}

impl Chains {
    pub(super) fn into_table(mut self, table: &mut Table) {
        self.hairpin.append(&mut self.source);
        let (filter, nat) = (ChainKind::Filter, ChainKind::Nat);
        for (name, kind, hook, priority, rules) in [
            (GUARD, filter, Hook::Prerouting, RAW, self.guard),
            ("prerouting", nat, Hook::Prerouting, DSTNAT, self.destination.clone()),
            ("output", nat, Hook::Output, DSTNAT, self.destination),
            ("postrouting", nat, Hook::Postrouting, BEFORE_SRCNAT, self.hairpin),
            ("input", filter, Hook::Input, FILTER, self.input),
            ("forward", filter, Hook::Forward, FILTER, self.forward),
        ] {
            if !rules.is_empty() {
                let base = Some(Base { kind, hook, priority });
                table.chains.insert(name.to_owned(), Chain { base, rules });
            }
        }
    }
}

fn plan_published(scene: &PublishScene<'_>, range: Range, table: &mut Table, chains: &mut Chains) {
    let family = range.cidr.family();
    let of_range = |port: &&PublishedPort| port.family() == family && range.subnet.contains(port.address);
    let ports: Vec<_> = scene.exposure.published.iter().filter(of_range).collect();
    for bound in [true, false] {
        let kind = PortMapKind { family, bound };
        let elements: BTreeMap<_, _> = ports
            .iter()
            .filter(|port| port.host_ip.is_some() == bound)
            .map(|port| (key(port), target(port, None)))
            .collect();
        if elements.is_empty() {
            continue;
        }
        chains.destination.push(translation(kind));
        table.maps.insert(map_name(kind), PortMap { kind, elements });
    }
    if ports.is_empty() {
        return;
    }
    for source in [range.subnet, Prefix::loopback(family)] {
        let matches = vec![TRANSLATED, is(Side::Source, source), is(Side::Destination, range.subnet)];
        chains.hairpin.push(rule(matches, MASQUERADE));
    }
    if family == Family::V4 && scene.bridge.is_some() {
        chains.guard.push(guard());
    }
}

pub(super) const MASQUERADE: Verdict = Verdict::Masquerade { fully_random: false };

/// With route_localnet a neighbor on the wire could reach what listens on 127.0.0.1 only (CVE-2020-8558).
pub(super) fn guard() -> Rule {
    let outside = Match::Input { negated: true, link: LinkName::loopback() };
    denied(vec![is(Side::Destination, Prefix::loopback(Family::V4)), outside])
}

/// Name of the map of published ports.
pub(super) fn map_name(kind: PortMapKind) -> String {
    named(if kind.bound { "bound" } else { "published" }, kind.family)
}

/// Sends what comes to a published port where its map says.
pub(super) fn translation(kind: PortMapKind) -> Rule {
    let matches = match kind.bound {
        // The address in the key says the family.
        true => vec![Match::LocalDestination],
        false => vec![Match::Family(kind.family), Match::LocalDestination],
    };
    rule(matches, Verdict::Dnat { kind, map: map_name(kind) })
}

/// An endpoint's source is kept by giving it its own: other tables, whosever they are, then leave it alone.
fn plan_sources(scene: &PublishScene<'_>, range: Range, table: &mut Table, chains: &mut Chains) {
    let family = range.cidr.family();
    if let Some(kept) = set(table, "unmasqueraded", range, &scene.exposure.unmasqueraded) {
        let matches = vec![within(Side::Source, family, &kept)];
        chains.source.push(rule(matches, Verdict::KeepSource(family)));
    }
}

fn plan_policy(scene: &PublishScene<'_>, range: Range, table: &mut Table, chains: &mut Chains) {
    let (family, cidr) = (range.cidr.family(), range.cidr);
    if let Some(internal) = set(table, "internal", range, &scene.exposure.internal) {
        for (ours, theirs) in [(Side::Source, Side::Destination), (Side::Destination, Side::Source)] {
            chains.forward.push(denied(vec![within(ours, family, &internal), is_not(theirs, cidr)]));
        }
        // This host as the gateway, and no other address of it. Neighbors are found by multicast and link-local addresses.
        let mut matches = vec![within(Side::Source, family, &internal)];
        let spared = [range.subnet, Prefix::multicast(family)].into_iter().chain(Prefix::link_local(family));
        matches.extend(spared.map(|prefix| is_not(Side::Destination, prefix)));
        matches.push(Match::Established { negated: true });
        chains.input.push(denied(matches));
    }
    if let Some(closed) = set(table, "closed", range, &scene.exposure.closed) {
        chains.forward.push(denied(vec![
            is(Side::Source, cidr),
            within(Side::Destination, family, &closed),
            Match::Established { negated: true },
            Match::Translated { negated: true },
        ]));
    }
}

/// The set of those of the addresses that lie in our part of the range; none if there is none.
fn set(table: &mut Table, name: &str, range: Range, addresses: &BTreeSet<IpAddr>) -> Option<String> {
    let ours = addresses.iter().filter(|address| range.subnet.contains(**address));
    let set = Set::of(range.cidr.family(), ours.map(|address| Prefix::host(*address)));
    let name = named(name, range.cidr.family());
    (!set.elements.is_empty()).then(|| {
        table.sets.insert(name.clone(), set);
        name
    })
}

pub(super) fn named(name: &str, family: Family) -> String {
    match family {
        Family::V4 => name.to_owned(),
        Family::V6 => format!("{name}6"),
    }
}

pub(super) fn key(port: &PublishedPort) -> PortKey {
    PortKey { address: port.host_ip, protocol: port.protocol, port: port.host_port }
}

/// Where a port leads.
pub(super) fn target(port: &PublishedPort, owner: Option<String>) -> PortTarget {
    PortTarget { address: port.address, port: port.port, owner }
}

pub(super) const TRANSLATED: Match = Match::Translated { negated: false };

pub(super) fn rule(matches: Vec<Match>, verdict: Verdict) -> Rule {
    Rule { matches, counter: false, verdict }
}

/// Counted, so that whoever wonders can see them.
fn denied(matches: Vec<Match>) -> Rule {
    Rule { matches, counter: true, verdict: Verdict::Drop }
}

pub(super) fn within(side: Side, family: Family, set: &str) -> Match {
    Match::AddressIn { side, negated: false, family, set: set.to_owned() }
}

pub(super) fn is(side: Side, prefix: Prefix) -> Match {
    Match::Address { side, negated: false, prefix }
}

pub(super) fn is_not(side: Side, prefix: Prefix) -> Match {
    Match::Address { side, negated: true, prefix }
}
