//! Generators: any table that the kernel takes.

use std::collections::BTreeMap;

use flannel_core::words::addr::{Family, Prefix};
use flannel_core::words::name::LinkName;
use flannel_core::words::rule::{
    Base, Chain, ChainKind, Encapsulation, Hook, Match, Rule, Set, Side, Table, TableFamily, TableName,
    Verdict,
};
use flannel_core::words::units::{Port, Vni};
use proptest::prelude::*;
use proptest::sample::Index;

use super::prefix;

fn v4() -> impl Strategy<Value = Prefix> {
    (any::<u32>(), 0..=32u8)
        .prop_map(|(bits, length)| Prefix::containing(std::net::Ipv4Addr::from(bits).into(), length).unwrap())
}

/// Not those below ::/8, whose text has a dotted quad in some libraries.
fn v6() -> impl Strategy<Value = Prefix> {
    (any::<u128>(), 1..=128u8).prop_map(|(bits, length)| {
        let address = std::net::Ipv6Addr::from(bits | 1 << 127);
        Prefix::containing(address.into(), length).unwrap()
    })
}

fn of(family: Family) -> BoxedStrategy<Prefix> {
    match family {
        Family::V4 => v4().boxed(),
        Family::V6 => v6().boxed(),
    }
}

/// Prefixes that lie close together, so that many are adjacent.
fn close(family: Family) -> BoxedStrategy<Prefix> {
    let bits = family.bits();
    (0..64u128, 0..3u8)
        .prop_map(move |(n, shorter)| {
            let net = match family {
                Family::V4 => prefix("255.255.255.192/26"),
                Family::V6 => prefix("fd00::/122"),
            };
            Prefix::containing(net.nth(n).unwrap(), bits - shorter).unwrap()
        })
        .boxed()
}

fn set(family: Family) -> impl Strategy<Value = Set> {
    prop_oneof![
        proptest::collection::vec(of(family), 0..12),
        proptest::collection::vec(close(family), 0..24),
    ]
    .prop_map(move |prefixes| Set::of(family, prefixes))
}

fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::Source), Just(Side::Destination)]
}

fn link() -> impl Strategy<Value = LinkName> {
    "[a-z][a-z0-9.-]{0,14}".prop_map(|name| LinkName::new(&name).unwrap())
}

fn test(family: Family, sets: Vec<String>) -> BoxedStrategy<Match> {
    let address = (side(), any::<bool>(), of(family)).prop_map(|(side, negated, prefix)| Match::Address {
        side,
        negated,
        prefix,
    });
    let input = (any::<bool>(), link()).prop_map(|(negated, link)| Match::Input { negated, link });
    let output = (any::<bool>(), link()).prop_map(|(negated, link)| Match::Output { negated, link });
    let mark =
        (1..=u32::MAX, any::<u32>()).prop_map(|(mask, value)| Match::Mark { mask, value: value & mask });
    if sets.is_empty() {
        return prop_oneof![address, input, output, mark].boxed();
    }
    let lookup = (side(), any::<bool>(), proptest::sample::select(sets))
        .prop_map(move |(side, negated, set)| Match::AddressIn { side, negated, family, set });
    prop_oneof![address, lookup, input, output, mark].boxed()
}

/// A packet has one encapsulation.
fn encapsulated() -> impl Strategy<Value = Option<Match>> {
    let vxlan = (1..=u64::from(u16::MAX), 0..1u64 << 24).prop_map(|(port, vni)| Encapsulation::Vxlan {
        port: Port::new(port).unwrap(),
        vni: Vni::new(vni).unwrap(),
    });
    let one = prop_oneof![Just(Encapsulation::Ipip), vxlan].prop_map(Match::Encapsulated);
    proptest::option::weighted(0.3, one)
}

fn rule(family: Family, sets: Vec<String>, verdicts: Vec<Verdict>) -> impl Strategy<Value = Rule> {
    let tests = (encapsulated(), proptest::collection::vec(test(family, sets), 0..4), any::<Index>());
    (tests, any::<bool>(), proptest::sample::select(verdicts)).prop_map(
        |((encapsulated, mut matches, place), counter, verdict)| {
            let place = place.index(matches.len() + 1);
            matches.splice(place..place, encapsulated);
            Rule { matches, counter, verdict }
        },
    )
}

fn base() -> impl Strategy<Value = Option<Base>> {
    let filter = (
        prop_oneof![
            Just(Hook::Prerouting),
            Just(Hook::Input),
            Just(Hook::Forward),
            Just(Hook::Output),
            Just(Hook::Postrouting)
        ],
        -310..310i32,
    )
        .prop_map(|(hook, priority)| Some(Base { kind: ChainKind::Filter, hook, priority }));
    let nat = (Just(Hook::Postrouting), 90..120i32)
        .prop_map(|(hook, priority)| Some(Base { kind: ChainKind::Nat, hook, priority }));
    prop_oneof![Just(None), filter, nat]
}

fn chain(
    table: TableFamily,
    sets: BTreeMap<String, Set>,
    later: Vec<String>,
) -> impl Strategy<Value = Chain> {
    base().prop_flat_map(move |base| {
        let mut verdicts = vec![Verdict::Accept, Verdict::Drop, Verdict::Return];
        verdicts.extend(later.iter().cloned().map(Verdict::Jump));
        if base.is_some_and(|base| base.kind == ChainKind::Nat) {
            verdicts.push(Verdict::Masquerade { fully_random: true });
            verdicts.push(Verdict::Masquerade { fully_random: false });
        }
        let sets = sets.clone();
        let one = family().prop_flat_map(move |family| {
            let family = match table {
                TableFamily::Ip => Family::V4,
                TableFamily::Ip6 => Family::V6,
                TableFamily::Inet => family,
            };
            let of_family = sets.iter().filter(|(_, set)| set.family == family);
            rule(family, of_family.map(|(name, _)| name.clone()).collect(), verdicts.clone())
        });
        proptest::collection::vec(one, 0..5).prop_map(move |rules| Chain { base, rules })
    })
}

/// Any table that the kernel takes: jumps only lead on to chains without a hook.
pub(super) fn table(family: TableFamily, name: &'static str) -> impl Strategy<Value = Table> {
    let set = family_of_sets(family).prop_flat_map(set);
    proptest::collection::btree_map("[a-c]set", set, 0..3).prop_flat_map(move |sets| {
        let tail = vec!["y1".to_owned(), "y2".to_owned()];
        let heads = proptest::collection::btree_map("[a-e]", chain(family, sets.clone(), tail), 0..4);
        let leaf = chain(family, sets.clone(), Vec::new()).boxed();
        (heads, leaf.clone(), leaf).prop_map(move |(mut chains, one, two)| {
            let plain = |chain: Chain| Chain {
                base: None,
                rules: chain
                    .rules
                    .into_iter()
                    .filter(|rule| !matches!(rule.verdict, Verdict::Masquerade { .. }))
                    .collect(),
            };
            chains.insert("y1".to_owned(), plain(one));
            chains.insert("y2".to_owned(), plain(two));
            let name = TableName { family, name: name.to_owned() };
            Table { sets: sets.clone(), chains, ..Table::new(name) }
        })
    })
}

fn family_of_sets(table: TableFamily) -> BoxedStrategy<Family> {
    match table {
        TableFamily::Ip => Just(Family::V4).boxed(),
        TableFamily::Ip6 => Just(Family::V6).boxed(),
        TableFamily::Inet => family().boxed(),
    }
}

pub(super) fn families() -> impl Strategy<Value = TableFamily> {
    prop_oneof![Just(TableFamily::Inet), Just(TableFamily::Ip), Just(TableFamily::Ip6)]
}
