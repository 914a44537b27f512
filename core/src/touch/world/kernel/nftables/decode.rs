//! From what the kernel lists back to a table as we say it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::encapsulation;
use super::encode::{FULLY_RANDOM, INTERVAL, INTERVAL_END, hook_number, kind_name, lower};
use super::expression::{Expression, Meta, NatKind};
use super::packet::{key_of, number_of, offset, protocol_of};
use super::port_map;
use super::wire::{Attributes, Socket, attribute, attributes, kind, number, text};
use crate::touch::world::WorldError;
use crate::words::addr::{Family, Prefix};
use crate::words::name::LinkName;
use crate::words::rule::{
    Base, Chain, ChainKind, Hook, Match, PortMapKind, Rule, Set, Side, Table, TableFamily, TableName, Verdict,
};

/// The table as it is in the kernel now, or none.
pub(super) fn read(socket: &mut Socket, name: &TableName) -> Result<Option<Table>, WorldError> {
    let family = number_of(name.family);
    let mut of_table = Attributes::default();
    of_table.text(1, &name.name);
    let Some(found) = socket.get(&format!("read table {name}"), kind::GET_TABLE, family, &of_table)? else {
        return Ok(None);
    };
    let mut table = Table::new(name.clone());
    // NFTA_TABLE_FLAGS: a dormant table is not executed, one with an owner goes with its owner.
    if number(&found, 2).unwrap_or(0) != 0 {
        table.strange.push("the table has flags".to_owned());
    }
    // Chains cannot be listed by table, sets and rules can.
    let what = format!("read chains of table {name}");
    let chains = socket.dump(&what, kind::GET_CHAIN, family, &Attributes::default())?;
    for chain in chains.iter().filter(|chain| text(chain, 1) == Some(&name.name)) {
        add_chain(&mut table, chain);
    }
    for set in socket.dump(&format!("read sets of table {name}"), kind::GET_SET, family, &of_table)? {
        add_set(socket, &mut table, &set)?;
    }
    let known = Named::of(&table);
    for rule in socket.dump(&format!("read rules of table {name}"), kind::GET_RULE, family, &of_table)? {
        add_rule(&mut table, &known, &rule);
    }
    Ok(Some(table))
}

/// The chains of a table with their rules, which may look into these; the sets themselves are not read. Chains that are not
/// there are not in the answer.
pub(super) fn read_chains(
    socket: &mut Socket,
    name: &TableName,
    known: &Named,
) -> Result<BTreeMap<String, Chain>, WorldError> {
    let family = number_of(name.family);
    let mut table = Table::new(name.clone());
    let mut of_table = Attributes::default();
    of_table.text(1, &name.name);
    let what = format!("read chains of table {name}");
    let chains = socket.dump(&what, kind::GET_CHAIN, family, &Attributes::default())?;
    for chain in chains.iter().filter(|chain| text(chain, 1) == Some(&name.name)) {
        add_chain(&mut table, chain);
    }
    for rule in socket.dump(&format!("read rules of table {name}"), kind::GET_RULE, family, &of_table)? {
        add_rule(&mut table, known, &rule);
    }
    Ok(table.chains)
}

/// What rules may look into, by name.
#[derive(Default)]
pub(super) struct Named {
    sets: BTreeMap<String, Family>,
    maps: BTreeMap<String, PortMapKind>,
}

impl Named {
    /// What there is in a table.
    pub(super) fn of(table: &Table) -> Self {
        Self {
            sets: table.sets.iter().map(|(name, set)| (name.clone(), set.family)).collect(),
            maps: table.maps.iter().map(|(name, map)| (name.clone(), map.kind)).collect(),
        }
    }
}

fn add_chain(table: &mut Table, found: &[u8]) {
    let Some(name) = text(found, 3) else {
        return table.strange.push("a chain without a name".to_owned());
    };
    let base = attribute(found, 4).map(|hook| read_base(found, hook));
    // NFT_CHAIN_BASE is the only flag a chain of ours can have.
    let flagged = number(found, 10).unwrap_or(0) & !1 != 0;
    if flagged || base == Some(None) {
        table.strange.push(format!("chain {name} is of another kind"));
    }
    table.chains.insert(name.to_owned(), Chain { base: base.flatten(), rules: Vec::new() });
}

pub(super) fn read_base(chain: &[u8], hook: &[u8]) -> Option<Base> {
    const POLICY_ACCEPT: u32 = 1;
    let hooks = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];
    let number_of_hook = number(hook, 1)?;
    let base = Base {
        kind: [ChainKind::Filter, ChainKind::Nat]
            .into_iter()
            .find(|kind| Some(kind_name(*kind)) == text(chain, 7))?,
        hook: hooks.into_iter().find(|hook| hook_number(*hook) == number_of_hook)?,
        priority: number(hook, 2)? as i32,
    };
    (number(chain, 5)? == POLICY_ACCEPT).then_some(base)
}

fn add_set(socket: &mut Socket, table: &mut Table, found: &[u8]) -> Result<(), WorldError> {
    let Some(name) = text(found, 2) else {
        table.strange.push("a set without a name".to_owned());
        return Ok(());
    };
    let mut of_set = Attributes::default();
    of_set.text(1, &table.name.name).text(2, name);
    let what = format!("read set {name} of table {}", table.name);
    let family_of_table = number_of(table.name.family);
    if number(found, 3) == Some(port_map::MAP)
        && let Some(kind) = port_map::kind_of(found)
    {
        let lists = socket.dump(&what, kind::GET_ELEMENTS, family_of_table, &of_set)?;
        match port_map::read_elements(kind, &lists) {
            Some(map) => drop(table.maps.insert(name.to_owned(), map)),
            None => table.strange.push(format!("map {name} has elements that are not ports")),
        }
        return Ok(());
    }
    let key = (number(found, 4), number(found, 5));
    let family = [Family::V4, Family::V6].into_iter().find(|family| {
        let (kind, length) = key_of(*family);
        key == (Some(kind), Some(length))
    });
    let single = number(found, 3).unwrap_or(0) == 0;
    let Some(family) = family.filter(|_| single || number(found, 3) == Some(INTERVAL)) else {
        table.strange.push(format!("set {name} is of another kind"));
        return Ok(());
    };
    let lists = socket.dump(&what, kind::GET_ELEMENTS, family_of_table, &of_set)?;
    let read = if single { read_addresses } else { read_elements };
    match read(family, &lists) {
        Some(elements) => {
            table.sets.insert(name.to_owned(), Set { family, single, elements });
        }
        None => table.strange.push(format!("set {name} has elements that are not prefixes")),
    }
    Ok(())
}

/// The addresses that the elements are; none if one has flags or another length.
fn read_addresses(family: Family, lists: &[Vec<u8>]) -> Option<BTreeSet<Prefix>> {
    let mut addresses = BTreeSet::new();
    for list in lists {
        for (_, element) in attributes(attribute(list, 3).unwrap_or_default()) {
            let key = attribute(attribute(element, 1)?, 1)?;
            if number(element, 3).unwrap_or(0) != 0 || key.len() != key_of(family).1 as usize {
                return None;
            }
            addresses.insert(prefix_of(family, key, family.bits())?);
        }
    }
    Some(addresses)
}

/// The prefixes that the elements bound; none if one of the intervals is no prefix.
fn read_elements(family: Family, lists: &[Vec<u8>]) -> Option<BTreeSet<Prefix>> {
    // An end sorts before the beginning at the same address, as adjacent intervals have it.
    let mut bounds: Vec<(u128, bool)> = Vec::new();
    for list in lists {
        for (_, element) in attributes(attribute(list, 3).unwrap_or_default()) {
            let key = attribute(attribute(element, 1)?, 1)?;
            let flags = number(element, 3).unwrap_or(0);
            if flags & !INTERVAL_END != 0 || key.len() != key_of(family).1 as usize {
                return None;
            }
            let address = key.iter().fold(0, |bits, byte| bits << 8 | u128::from(*byte));
            bounds.push((address, flags & INTERVAL_END == 0));
        }
    }
    bounds.sort_unstable();
    let top = u128::MAX >> (128 - u32::from(family.bits()));
    let mut elements = BTreeSet::new();
    let mut bounds = bounds.into_iter().peekable();
    while let Some((first, begins)) = bounds.next() {
        // nft puts an end at address 0 where no interval begins.
        if begins {
            let last = match bounds.peek() {
                Some((_, true)) => return None,
                Some((end, false)) => end.checked_sub(1)?,
                None => top,
            };
            elements.insert(prefix_between(family, first, last)?);
        }
    }
    Some(elements)
}

fn prefix_between(family: Family, first: u128, last: u128) -> Option<Prefix> {
    let spanned = 128 - (first ^ last).leading_zeros();
    let length = family.bits().checked_sub(spanned as u8)?;
    let base = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(first).ok()?)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(first)),
    };
    let prefix = Prefix::new(base, length).ok()?;
    let ends = match prefix.last() {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    (ends == last).then_some(prefix)
}

fn add_rule(table: &mut Table, named: &Named, found: &[u8]) {
    let family = table.name.family;
    let chain = text(found, 2).and_then(|name| table.chains.get_mut(name));
    // A chain that came after we listed the chains; the next look has it.
    let Some(chain) = chain else {
        return table.strange.push("a rule of an unknown chain".to_owned());
    };
    let rule = attribute(found, 4)
        .and_then(Expression::read_all)
        .and_then(|expressions| raise(family, named, &expressions));
    match rule {
        Some(rule) => chain.rules.push(rule),
        None => {
            let name = text(found, 2).unwrap_or_default().to_owned();
            table.strange.push(format!("a rule in chain {name} that is not of ours"));
        }
    }
}

/// The rule that these expressions execute; none if it is not one that we can say.
pub(super) fn raise(table: TableFamily, named: &Named, expressions: &[Expression]) -> Option<Rule> {
    let (verdict, mut rest) = raise_verdict(table, named, expressions)?;
    let counter = rest.last() == Some(&Expression::Counter);
    if counter {
        rest = &rest[..rest.len() - 1];
    }
    let mut known = match table {
        TableFamily::Ip => Some(Family::V4),
        TableFamily::Ip6 => Some(Family::V6),
        TableFamily::Inet => None,
    };
    let mut matches = Vec::new();
    while !rest.is_empty() {
        if let Some((family, after)) = raise_dependency(rest) {
            known = Some(family);
            // Before a test of an address it goes without saying.
            if !matches!(after.first(), Some(Expression::Payload { .. })) {
                matches.push(Match::Family(family));
            }
            rest = after;
        } else {
            let (test, after) = raise_test(known, named, rest)?;
            matches.push(test);
            rest = after;
        }
    }
    Some(Rule { matches, counter, verdict })
}

/// What the last expressions of a rule decide, and those before them.
fn raise_verdict<'a>(
    table: TableFamily,
    named: &Named,
    list: &'a [Expression],
) -> Option<(Verdict, &'a [Expression])> {
    let plain = |verdict, rest| Some((verdict, rest));
    match list {
        [rest @ .., Expression::Accept] => plain(Verdict::Accept, rest),
        [rest @ .., Expression::Drop] => plain(Verdict::Drop, rest),
        [rest @ .., Expression::Return] => plain(Verdict::Return, rest),
        [rest @ .., Expression::Jump(chain)] => plain(Verdict::Jump(chain.clone()), rest),
        [rest @ .., Expression::Masquerade { flags: 0 }] => {
            plain(Verdict::Masquerade { fully_random: false }, rest)
        }
        [rest @ .., Expression::Masquerade { flags: FULLY_RANDOM }] => {
            plain(Verdict::Masquerade { fully_random: true }, rest)
        }
        [.., Expression::Translate { map }, Expression::Nat { kind: NatKind::Destination, .. }] => {
            let kind = *named.maps.get(map)?;
            let verdict = Verdict::Dnat { kind, map: map.clone() };
            Some((verdict.clone(), before(table, list, verdict)?))
        }
        [rest @ .., Expression::Meta(Meta::Mark), Expression::AddBits(bits), Expression::SetMark] => {
            plain(Verdict::AddMark(*bits), rest)
        }
        [.., Expression::Nat { kind: NatKind::Source, family, port: None }] => {
            let verdict = Verdict::KeepSource(*family);
            Some((verdict.clone(), before(table, list, verdict)?))
        }
        _ => None,
    }
}

/// What comes before a verdict that takes several expressions. Whether those begin with a test of the family depends on
/// what comes before.
fn before(table: TableFamily, list: &[Expression], verdict: Verdict) -> Option<&[Expression]> {
    let alone = |matches| lower(table, &Rule { matches, counter: false, verdict: verdict.clone() });
    let program = alone(Vec::new());
    list.strip_suffix(program.as_slice()).or_else(|| {
        let (_, rest) = raise_dependency(&program)?;
        list.strip_suffix(rest)
    })
}

fn raise_dependency(list: &[Expression]) -> Option<(Family, &[Expression])> {
    let [Expression::Meta(Meta::Protocol), Expression::Compare { equal: true, value }, rest @ ..] = list
    else {
        return None;
    };
    let family = [Family::V4, Family::V6].into_iter().find(|family| value == &[protocol_of(*family)])?;
    Some((family, rest))
}

fn raise_test<'a>(
    known: Option<Family>,
    named: &Named,
    list: &'a [Expression],
) -> Option<(Match, &'a [Expression])> {
    match list {
        [
            Expression::Payload { offset, length },
            Expression::Mask(mask),
            Expression::Compare { equal, value },
            rest @ ..,
        ] => {
            let (family, side) = place(known, *offset)?;
            let full = key_of(family).1 as usize;
            let sizes = (*length as usize, mask.len(), value.len());
            let prefix = (sizes == (full, full, full))
                .then(|| prefix_of(family, value, mask_length(mask)?))
                .flatten()?;
            Some((Match::Address { side, negated: !equal, prefix }, rest))
        }
        [Expression::Payload { offset, length }, Expression::Compare { equal, value }, rest @ ..] => {
            let (family, side) = place(known, *offset)?;
            let length = u8::try_from(*length).ok()?.checked_mul(8)?;
            let prefix = prefix_of(family, value, length)?;
            (value.len() * 8 == usize::from(length))
                .then_some((Match::Address { side, negated: !equal, prefix }, rest))
        }
        [Expression::Payload { offset, length }, Expression::Lookup { set, negated }, rest @ ..] => {
            let (family, side) = place(known, *offset)?;
            let right = *length == key_of(family).1 && named.sets.get(set) == Some(&family);
            right.then(|| (Match::AddressIn { side, negated: *negated, family, set: set.clone() }, rest))
        }
        [Expression::Meta(Meta::InputName), Expression::Compare { equal, value }, rest @ ..] => {
            Some((Match::Input { negated: !equal, link: link_of(value)? }, rest))
        }
        [Expression::Meta(Meta::OutputName), Expression::Compare { equal, value }, rest @ ..] => {
            Some((Match::Output { negated: !equal, link: link_of(value)? }, rest))
        }
        [
            Expression::Meta(Meta::Mark),
            Expression::Mask(mask),
            Expression::Compare { equal: true, value },
            rest @ ..,
        ] => Some((Match::Mark { mask: word(mask)?, value: word(value)? }, rest)),
        [Expression::Meta(Meta::Mark), Expression::Compare { equal: true, value }, rest @ ..] => {
            Some((Match::Mark { mask: u32::MAX, value: word(value)? }, rest))
        }
        _ => port_map::raise_test(list).or_else(|| encapsulation::raise_test(list)),
    }
}

/// Which address of a packet of the known family is at this place of its header.
pub(super) fn place(known: Option<Family>, at: u32) -> Option<(Family, Side)> {
    let family = known?;
    let side = [Side::Source, Side::Destination].into_iter().find(|side| offset(family, *side) == at)?;
    Some((family, side))
}

/// The prefix of which these are the first bytes.
fn prefix_of(family: Family, first: &[u8], length: u8) -> Option<Prefix> {
    let mut bytes = [0; 16];
    bytes.get_mut(..first.len())?.copy_from_slice(first);
    let base = match family {
        Family::V4 if first.len() <= 4 => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
        Family::V4 => return None,
        Family::V6 => IpAddr::V6(Ipv6Addr::from(bytes)),
    };
    Prefix::new(base, length).ok()
}

/// Length of a contiguous mask.
fn mask_length(mask: &[u8]) -> Option<u8> {
    let mut bytes = [0; 16];
    bytes.get_mut(..mask.len())?.copy_from_slice(mask);
    let bits = u128::from_be_bytes(bytes);
    (bits.leading_ones() == bits.count_ones()).then_some(bits.count_ones() as u8)
}

fn link_of(name: &[u8]) -> Option<LinkName> {
    const IFNAMSIZ: usize = 16;
    let end = name.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(name.get(..end)?).ok()?;
    (name.len() == IFNAMSIZ && name[end..].iter().all(|byte| *byte == 0))
        .then(|| LinkName::new(text).ok())
        .flatten()
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_with_holes_are_no_prefix() {
        assert_eq!(mask_length(&[255, 128, 0, 0]), Some(9));
        assert_eq!(mask_length(&[255, 0, 128, 0]), None);
        assert_eq!(mask_length(&[254, 128, 0, 0]), None);
        assert_eq!(mask_length(&[255, 64, 0, 0]), None);
        assert_eq!(mask_length(&[0; 4]), Some(0));
        assert_eq!(mask_length(&[255; 16]), Some(128));
    }

    #[test]
    fn an_interval_is_a_prefix_or_nothing() {
        let between = |first, last| prefix_between(Family::V4, first, last).map(|prefix| prefix.to_string());
        assert_eq!(between(0, 0xffff_ffff).as_deref(), Some("0.0.0.0/0"));
        assert_eq!(between(0x0a00_0000, 0x0a00_00ff).as_deref(), Some("10.0.0.0/24"));
        assert_eq!(between(0x0a00_0001, 0x0a00_0001).as_deref(), Some("10.0.0.1/32"));
        assert_eq!(between(0x0a00_0000, 0x0a00_00fe), None);
        assert_eq!(between(0x0a00_0001, 0x0a00_0100), None);
        assert_eq!(between(2, 1), None);
    }

    #[test]
    fn a_foreign_program_is_no_rule_of_ours() {
        let address =
            Match::Address { side: Side::Source, negated: true, prefix: "10.0.0.0/9".parse().unwrap() };
        let rule = Rule { matches: vec![address], counter: true, verdict: Verdict::Accept };
        let program = lower(TableFamily::Inet, &rule);
        let sets = Named::default();
        assert_eq!(raise(TableFamily::Inet, &sets, &program), Some(rule));
        assert_eq!(
            raise(TableFamily::Inet, &sets, &program[2..]),
            None,
            "no test of the family before the header"
        );
        assert_eq!(raise(TableFamily::Inet, &sets, &program[..program.len() - 1]), None, "no verdict");
        let mut holes = program;
        holes[3] = Expression::Mask(vec![255, 0, 255, 0]);
        assert_eq!(raise(TableFamily::Inet, &sets, &holes), None);
    }
}
