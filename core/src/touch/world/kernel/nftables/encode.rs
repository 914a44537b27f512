//! From a table as we say it to the messages that make it so.

use std::net::IpAddr;

use super::encapsulation;
use super::expression::{Expression, Meta, address_at, depend};
use super::packet::{key_of, number_of, octets, offset};
use super::port_map;
use super::wire::{APPEND, Attributes, Batch, CREATE, NEW, kind};
use crate::words::addr::{Family, Prefix};
use crate::words::rule::{
    Base, Chain, ChainKind, Hook, Match, PortKey, PortMap, PortTarget, Rule, Set, Side, Table, TableFamily,
    TableName, Verdict,
};

/// Flag of an element: here the interval before ends.
pub(super) const INTERVAL_END: u32 = 1;
/// Flag of a set: elements are intervals.
pub(super) const INTERVAL: u32 = 4;
/// nft's mark on an interval without an end: type 1, length 4, value 1 (libnftnl `NFTNL_UDATA_SET_ELEM_FLAGS`).
const OPEN_INTERVAL: [u8; 6] = [1, 4, 1, 0, 0, 0];
/// nft's note that the key is in network order: type 0, length 4, value 2 (libnftnl `NFTNL_UDATA_SET_KEYBYTEORDER`).
const KEY_IN_NETWORK_ORDER: [u8; 6] = [0, 4, 2, 0, 0, 0];
/// The length of a nested attribute is 16 bits; one message carries at most this many bytes of elements.
const ELEMENTS_MAX: usize = 60_000;

/// The transaction that puts `table` in the place of whatever has its name now.
pub(super) fn whole(table: &Table) -> Batch {
    let mut batch = Batch::new(None);
    let to = Writer { table: &table.name };
    // NLM_F_CREATE alone takes an existing table as it is, so this deletes what was there without asking first;
    // DESTROYTABLE would need Linux 6.3.
    to.table(&mut batch, kind::NEW_TABLE, CREATE);
    to.table(&mut batch, kind::DELETE_TABLE, 0);
    to.table(&mut batch, kind::NEW_TABLE, CREATE);
    for (name, chain) in &table.chains {
        to.new_chain(&mut batch, name, chain);
    }
    for (name, set) in &table.sets {
        to.new_set(&mut batch, name, set);
    }
    for (name, map) in &table.maps {
        to.new_map(&mut batch, name, map);
    }
    for (name, chain) in &table.chains {
        to.fill(&mut batch, name, chain);
    }
    batch
}

/// The transaction that takes a table away.
pub(super) fn gone(table: &TableName) -> Batch {
    let mut batch = Batch::new(None);
    Writer { table }.table(&mut batch, kind::DELETE_TABLE, 0);
    batch
}

/// The transaction that turns `old` into `new`, touching only what differs: unchanged chains keep their counters, and a
/// set of thousands costs what its difference costs. Both have the same name, and nothing strange is in the old one.
pub(super) fn difference(old: &Table, new: &Table) -> Batch {
    let mut batch = Batch::new(None);
    let to = Writer { table: &new.name };
    // Rules first: what they refer to can go only after them.
    for (name, chain) in &old.chains {
        if new.chains.get(name) != Some(chain) && !chain.rules.is_empty() {
            to.flush(&mut batch, name);
        }
    }
    for (name, chain) in &old.chains {
        if new.chains.get(name).is_none_or(|wanted| wanted.base != chain.base) {
            to.delete_chain(&mut batch, name);
        }
    }
    for (name, set) in &old.sets {
        if new.sets.get(name).is_none_or(|wanted| !alike(wanted, set)) {
            to.delete_set(&mut batch, name);
        }
    }
    for (name, map) in &old.maps {
        if new.maps.get(name).is_none_or(|wanted| wanted.kind != map.kind) {
            to.delete_set(&mut batch, name);
        }
    }
    for (name, chain) in &new.chains {
        if old.chains.get(name).is_none_or(|had| had.base != chain.base) {
            to.new_chain(&mut batch, name, chain);
        }
    }
    for (name, set) in &new.sets {
        match old.sets.get(name).filter(|had| alike(had, set)) {
            None => to.new_set(&mut batch, name, set),
            Some(had) => {
                let (delete, add) = (kind::DELETE_ELEMENTS, kind::NEW_ELEMENTS);
                to.elements(&mut batch, delete, (name, set.single), had.elements.difference(&set.elements));
                to.elements(&mut batch, add, (name, set.single), set.elements.difference(&had.elements));
            }
        }
    }
    for (name, map) in &new.maps {
        match old.maps.get(name).filter(|had| had.kind == map.kind) {
            None => to.new_map(&mut batch, name, map),
            Some(had) => to.change_map(&mut batch, name, had, map),
        }
    }
    for (name, chain) in &new.chains {
        if old.chains.get(name) != Some(chain) {
            to.fill(&mut batch, name, chain);
        }
    }
    batch
}

/// Whether one set can become the other by its elements.
pub(super) fn alike(one: &Set, other: &Set) -> bool {
    (one.family, one.single) == (other.family, other.single)
}

struct Writer<'a> {
    table: &'a TableName,
}

impl Writer<'_> {
    fn family(&self) -> u8 {
        number_of(self.table.family)
    }

    fn table(&self, batch: &mut Batch, kind: u8, flags: u16) {
        let verb = if kind == kind::DELETE_TABLE { "delete" } else { "write" };
        batch.step(format!("{verb} table {}", self.table), (kind, flags), self.family(), |out| {
            out.text(1, &self.table.name);
        });
    }

    fn new_chain(&self, batch: &mut Batch, name: &str, chain: &Chain) {
        let step = format!("write chain {name} of table {}", self.table);
        batch.step(step, (kind::NEW_CHAIN, CREATE), self.family(), |out| {
            out.text(1, &self.table.name).text(3, name);
            if let Some(base) = &chain.base {
                write_base(out, base);
            }
        });
    }

    fn delete_chain(&self, batch: &mut Batch, name: &str) {
        let step = format!("delete chain {name} of table {}", self.table);
        batch.step(step, (kind::DELETE_CHAIN, 0), self.family(), |out| {
            out.text(1, &self.table.name).text(3, name);
        });
    }

    /// Deletes all rules of a chain.
    fn flush(&self, batch: &mut Batch, name: &str) {
        let step = format!("flush chain {name} of table {}", self.table);
        batch.step(step, (kind::DELETE_RULE, 0), self.family(), |out| {
            out.text(1, &self.table.name).text(2, name);
        });
    }

    /// Writes all rules of a chain.
    fn fill(&self, batch: &mut Batch, name: &str, chain: &Chain) {
        for rule in &chain.rules {
            let step = format!("write rule `{rule}` into chain {name} of table {}", self.table);
            batch.step(step, (kind::NEW_RULE, CREATE | APPEND), self.family(), |out| {
                out.text(1, &self.table.name).text(2, name);
                write_expressions(out, &lower(self.table.family, rule));
            });
        }
    }

    fn new_set(&self, batch: &mut Batch, name: &str, set: &Set) {
        // Finds sets that have no name yet; we go by names, but it has to be there.
        let id = batch.len() as u32;
        let (kind_of_key, length) = key_of(set.family);
        let step = format!("write set {name} of table {}", self.table);
        batch.step(step, (kind::NEW_SET, CREATE), self.family(), |out| {
            out.text(1, &self.table.name)
                .text(2, name)
                .number(3, if set.single { 0 } else { INTERVAL })
                .number(4, kind_of_key)
                .number(5, length);
            out.number(10, id).bytes(13, &KEY_IN_NETWORK_ORDER);
        });
        self.elements(batch, kind::NEW_ELEMENTS, (name, set.single), &set.elements);
    }

    fn new_map(&self, batch: &mut Batch, name: &str, map: &PortMap) {
        let id = batch.len() as u32;
        let ((key, key_length), (value, value_length)) =
            (port_map::key_of(map.kind), port_map::value_of(map.kind));
        let step = format!("write map {name} of table {}", self.table);
        batch.step(step, (kind::NEW_SET, CREATE), self.family(), |out| {
            out.text(1, &self.table.name).text(2, name).number(3, port_map::MAP);
            out.number(4, key).number(5, key_length).number(6, value).number(7, value_length).number(10, id);
        });
        self.pairs(batch, kind::NEW_ELEMENTS, name, &map.elements);
    }

    /// An element with another value is deleted and added: the kernel takes both in one transaction.
    fn change_map(&self, batch: &mut Batch, name: &str, old: &PortMap, new: &PortMap) {
        let gone = old.elements.iter().filter(|(key, value)| new.elements.get(key) != Some(value));
        self.pairs(batch, kind::DELETE_ELEMENTS, name, gone);
        let come = new.elements.iter().filter(|(key, value)| old.elements.get(key) != Some(value));
        self.pairs(batch, kind::NEW_ELEMENTS, name, come);
    }

    fn delete_set(&self, batch: &mut Batch, name: &str) {
        let step = format!("delete set {name} of table {}", self.table);
        batch.step(step, (kind::DELETE_SET, 0), self.family(), |out| {
            out.text(1, &self.table.name).text(2, name);
        });
    }

    /// Adds or deletes prefixes.
    fn elements<'a>(
        &self,
        batch: &mut Batch,
        kind: u8,
        (set, single): (&str, bool),
        prefixes: impl IntoIterator<Item = &'a Prefix>,
    ) {
        self.in_messages(batch, (kind, CREATE), set, prefixes, |out, prefix| match single {
            true => write_element(out, &octets(prefix.base()), 0, false),
            false => write_interval(out, prefix),
        });
    }

    /// Adds or deletes ports.
    fn pairs<'a>(
        &self,
        batch: &mut Batch,
        kind: u8,
        map: &str,
        pairs: impl IntoIterator<Item = (&'a PortKey, &'a PortTarget)>,
    ) {
        // A port that somebody has is refused, also if it leads to the same place.
        self.in_messages(batch, (kind, CREATE | NEW), map, pairs, |out, (key, value)| {
            port_map::write_element(out, key, (kind == kind::NEW_ELEMENTS).then_some(value));
        });
    }

    /// Adds or deletes elements, in as many messages as it takes.
    fn in_messages<Element>(
        &self,
        batch: &mut Batch,
        (kind, flags): (u8, u16),
        set: &str,
        elements: impl IntoIterator<Item = Element>,
        write: impl Fn(&mut Attributes, Element),
    ) {
        let of_kind = (kind, if kind == kind::NEW_ELEMENTS { flags } else { 0 });
        let mut waiting = Attributes::default();
        for element in elements {
            write(&mut waiting, element);
            if waiting.as_bytes().len() > ELEMENTS_MAX {
                self.element_message(batch, of_kind, set, &waiting);
                waiting = Attributes::default();
            }
        }
        if !waiting.as_bytes().is_empty() {
            self.element_message(batch, of_kind, set, &waiting);
        }
    }

    fn element_message(&self, batch: &mut Batch, (kind, flags): (u8, u16), set: &str, elements: &Attributes) {
        let verb = if kind == kind::NEW_ELEMENTS { "add elements to" } else { "delete elements of" };
        batch.step(
            format!("{verb} set {set} of table {}", self.table),
            (kind, flags),
            self.family(),
            |out| {
                out.text(1, &self.table.name).text(2, set);
                out.nest(3, |out| {
                    out.append(elements.as_bytes());
                });
            },
        );
    }
}

/// Hook, policy and type of a base chain.
pub(super) fn write_base(out: &mut Attributes, base: &Base) {
    const POLICY_ACCEPT: u32 = 1;
    out.nest(4, |out| {
        out.number(1, hook_number(base.hook)).number(2, base.priority as u32);
    });
    out.number(5, POLICY_ACCEPT).text(7, kind_name(base.kind));
}

/// Netfilter's number of a hook (uapi/linux/netfilter.h `nf_inet_hooks`).
pub(super) const fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

/// nf_tables' name for a type of chain.
pub(super) const fn kind_name(kind: ChainKind) -> &'static str {
    match kind {
        ChainKind::Filter => "filter",
        ChainKind::Nat => "nat",
    }
}

/// A list of expressions as a rule holds it.
pub(super) fn write_expressions(out: &mut Attributes, expressions: &[Expression]) {
    out.nest(4, |out| expressions.iter().for_each(|expression| expression.write(out)));
}

/// The two elements that stand for a prefix: where it begins, and the first address behind it.
fn write_interval(out: &mut Attributes, prefix: &Prefix) {
    let end = next(prefix.last());
    write_element(out, &octets(prefix.base()), 0, end.is_none());
    if let Some(end) = end {
        write_element(out, &octets(end), INTERVAL_END, false);
    }
}

pub(super) fn write_element(out: &mut Attributes, key: &[u8], flags: u32, open: bool) {
    const ELEMENT: u16 = 1;
    out.nest(ELEMENT, |out| {
        if flags != 0 {
            out.number(3, flags);
        }
        out.nest(1, |out| {
            out.bytes(1, key);
        });
        if open {
            out.bytes(6, &OPEN_INTERVAL);
        }
    });
}

fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => v4.to_bits().checked_add(1).map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(v6) => v6.to_bits().checked_add(1).map(|bits| IpAddr::V6(bits.into())),
    }
}

/// masq flag `fully-random` (uapi/linux/netfilter/nf_nat.h NF_NAT_RANGE_PROTO_RANDOM_FULLY).
pub(super) const FULLY_RANDOM: u32 = 0x10;

/// A rule as the kernel executes it, the way nft says it too.
pub(super) fn lower(table: TableFamily, rule: &Rule) -> Vec<Expression> {
    let mut out = Vec::new();
    let mut known = match table {
        TableFamily::Ip => Some(Family::V4),
        TableFamily::Ip6 => Some(Family::V6),
        TableFamily::Inet => None,
    };
    for test in &rule.matches {
        match test {
            Match::Address { side, negated, prefix } => {
                depend(&mut out, &mut known, prefix.family());
                prefix_test(&mut out, *side, *negated, prefix);
            }
            Match::AddressIn { side, negated, family, set } => {
                depend(&mut out, &mut known, *family);
                out.push(address_at(*family, *side));
                out.push(Expression::Lookup { set: set.clone(), negated: *negated });
            }
            Match::Input { negated, link } => name_test(&mut out, Meta::InputName, *negated, link.as_str()),
            Match::Output { negated, link } => name_test(&mut out, Meta::OutputName, *negated, link.as_str()),
            Match::Family(family) => depend(&mut out, &mut known, *family),
            Match::LocalDestination | Match::Established { .. } | Match::Translated { .. } => {
                port_map::lower_test(&mut out, test);
            }
            Match::Encapsulated(encapsulation) => encapsulation::lower_test(&mut out, *encapsulation),
            Match::Mark { mask, value } => {
                out.push(Expression::Meta(Meta::Mark));
                if *mask != u32::MAX {
                    out.push(Expression::Mask(mask.to_ne_bytes().to_vec()));
                }
                out.push(Expression::Compare { equal: true, value: value.to_ne_bytes().to_vec() });
            }
        }
    }
    if rule.counter {
        out.push(Expression::Counter);
    }
    match &rule.verdict {
        Verdict::Accept => out.push(Expression::Accept),
        Verdict::Drop => out.push(Expression::Drop),
        Verdict::Return => out.push(Expression::Return),
        Verdict::Jump(chain) => out.push(Expression::Jump(chain.clone())),
        Verdict::Masquerade { fully_random } => {
            out.push(Expression::Masquerade { flags: if *fully_random { FULLY_RANDOM } else { 0 } });
        }
        Verdict::Dnat { kind, map } => port_map::lower_dnat(&mut out, &mut known, *kind, map),
        Verdict::KeepSource(family) => port_map::lower_keep_source(&mut out, &mut known, *family),
        Verdict::AddMark(bits) => {
            out.extend([Expression::Meta(Meta::Mark), Expression::AddBits(*bits), Expression::SetMark]);
        }
    }
    out
}

/// Whole bytes are compared as they are; a prefix that ends inside a byte takes a mask.
pub(super) fn prefix_test(out: &mut Vec<Expression>, side: Side, negated: bool, prefix: &Prefix) {
    let family = prefix.family();
    let mut value = octets(prefix.base());
    let whole = prefix.len() > 0 && prefix.len().is_multiple_of(8);
    if whole {
        value.truncate(usize::from(prefix.len() / 8));
    }
    out.push(Expression::Payload { offset: offset(family, side), length: value.len() as u32 });
    if !whole {
        out.push(Expression::Mask(mask(family, prefix.len())));
    }
    out.push(Expression::Compare { equal: !negated, value });
}

fn mask(family: Family, length: u8) -> Vec<u8> {
    let bytes = usize::from(family.bits() / 8);
    (0..bytes)
        .map(|n| match usize::from(length).saturating_sub(n * 8) {
            bits @ 0..8 => !(0xffu8 >> bits),
            _ => 0xff,
        })
        .collect()
}

fn name_test(out: &mut Vec<Expression>, meta: Meta, negated: bool, name: &str) {
    const IFNAMSIZ: usize = 16;
    let mut value = name.as_bytes().to_vec();
    value.resize(IFNAMSIZ, 0);
    out.push(Expression::Meta(meta));
    out.push(Expression::Compare { equal: !negated, value });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_contiguous() {
        assert_eq!(mask(Family::V4, 0), [0, 0, 0, 0]);
        assert_eq!(mask(Family::V4, 17), [255, 255, 128, 0]);
        assert_eq!(mask(Family::V4, 32), [255; 4]);
        assert_eq!(mask(Family::V6, 49)[..8], [255, 255, 255, 255, 255, 255, 128, 0]);
    }

    #[test]
    fn a_table_that_is_right_is_left_alone() {
        let mut table = Table::new(TableName { family: TableFamily::Inet, name: "flannel".into() });
        table.chains.insert("forward".into(), Chain { base: None, rules: Vec::new() });
        let prefixes = ["10.0.0.0/8".parse().unwrap(), "0.0.0.0/8".parse().unwrap()];
        table.sets.insert("nets".into(), Set::of(Family::V4, prefixes));
        assert!(difference(&table, &table).is_empty());
        assert!(!difference(&Table::new(table.name.clone()), &table).is_empty());
    }
}
