//! The guard of a network's tunnels: one table, the elements of whose sets are facts of their own.
//!
//! Rules and elements that change together are one transaction: a rule that drops whoever is not in a set is never there before
//! those who should be in it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::wire::{Attributes, Socket, attribute, attributes, error_code, kind, long, text};
use super::{Netfilter, decode, encode, packet};
use crate::touch::world::WorldError;
use crate::words::addr::{Family, Prefix};
use crate::words::fact::{Change, Fact, TunnelHost};
use crate::words::rule::{Set, Table, TableName};

impl Netfilter {
    /// How many packets a guard has dropped since its rules were written; none if there is no such table.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn strangers(&mut self, table: &TableName) -> Result<Option<u64>, WorldError> {
        if self.is_absent()? {
            return Ok(None);
        }
        let mut of_table = Attributes::default();
        of_table.text(1, &table.name);
        let what = format!("read the counters of table {table}");
        let rules = self.socket.dump(&what, kind::GET_RULE, packet::number_of(table.family), &of_table)?;
        let counted = rules.iter().filter_map(|rule| counted(attribute(rule, 4)?)).reduce(|a, b| a + b);
        Ok(counted)
    }
}

/// The packets that a rule has counted.
fn counted(expressions: &[u8]) -> Option<u64> {
    let mut counters = attributes(expressions).filter(|(_, element)| text(element, 1) == Some("counter"));
    counters.next().and_then(|(_, counter)| long(attribute(counter, 2)?, 2))
}

/// The table as it is planned, and what is in its sets.
pub(super) fn part(mut table: Table) -> (Table, Vec<TunnelHost>) {
    let name = Arc::new(table.name.clone());
    let mut hosts = Vec::new();
    for set in table.sets.values_mut() {
        let elements = std::mem::take(&mut set.elements).into_iter();
        hosts.extend(elements.map(|prefix| TunnelHost { table: name.clone(), address: prefix.base() }));
    }
    (table, hosts)
}

/// Changes of one guard.
#[derive(Default)]
pub(super) struct Group<'a> {
    /// Their places in the list.
    pub(super) places: Vec<usize>,
    table: Option<Change<'a>>,
    come: Vec<IpAddr>,
    go: Vec<IpAddr>,
}

/// Whether a change is about a guard.
pub(super) fn is_meant(change: &Change<'_>) -> bool {
    match change.fact() {
        Fact::Table(table) => TunnelHost::are_in(&table.name),
        Fact::TunnelHost(_) => true,
        _ => false,
    }
}

/// The changes about guards, by the guard's table.
pub(super) fn groups<'a>(changes: &[Change<'a>]) -> BTreeMap<TableName, Group<'a>> {
    let mut groups: BTreeMap<TableName, Group<'a>> = BTreeMap::new();
    for (place, change) in changes.iter().enumerate().filter(|(_, change)| is_meant(change)) {
        let name = match change.fact() {
            Fact::TunnelHost(host) => &*host.table,
            Fact::Table(table) => &table.name,
            _ => continue,
        };
        // Thousands have one table.
        let group = match groups.get_mut(name) {
            Some(group) => group,
            None => groups.entry(name.clone()).or_default(),
        };
        group.places.push(place);
        match (change, change.fact()) {
            (Change::Delete(_), Fact::TunnelHost(host)) => group.go.push(host.address),
            (_, Fact::TunnelHost(host)) => group.come.push(host.address),
            _ => group.table = Some(*change),
        }
    }
    groups
}

/// Makes the changes, in one transaction.
pub(super) fn change(socket: &mut Socket, name: &TableName, group: &Group<'_>) -> Result<(), WorldError> {
    let Group { table, come, go, .. } = group;
    let sets = || {
        let mut table = Table::new(name.clone());
        for family in [Family::V4, Family::V6] {
            table.sets.insert(TunnelHost::set(family).to_owned(), Set::of_addresses(family, []));
        }
        table
    };
    let quick = match table {
        Some(Change::Create(Fact::Table(new))) => encode::whole(&with(new, come)),
        Some(Change::Delete(_)) => match socket.commit(encode::gone(name)) {
            Err(error) if error_code(&error) == Some(libc::ENOENT) => return Ok(()),
            other => return other,
        },
        Some(Change::Replace { old: Fact::Table(old), new: Fact::Table(new) }) if old.strange.is_empty() => {
            encode::difference(&with(old, go), &with(new, come))
        }
        Some(_) => return anew(socket, name, group, None),
        None => encode::difference(&with(&sets(), go), &with(&sets(), come)),
    };
    match socket.commit(quick) {
        Ok(()) => Ok(()),
        // Somebody else was at it since we looked.
        Err(error) => anew(socket, name, group, Some(error)),
    }
}

/// The same from another look: what the sets hold by now stays, but for what goes. `cause` is why what was known was not enough.
fn anew(
    socket: &mut Socket,
    name: &TableName,
    group: &Group<'_>,
    cause: Option<WorldError>,
) -> Result<(), WorldError> {
    let have = decode::read(socket, name)?;
    let mut want = match (&group.table, &have, cause) {
        (Some(change), ..) => match change.fact() {
            Fact::Table(new) => Table::clone(new),
            _ => return Ok(()),
        },
        (None, Some(have), _) => have.clone(),
        // What should go is gone.
        (None, None, _) if group.come.is_empty() => return Ok(()),
        (None, None, cause) => return cause.map_or(Ok(()), Err),
    };
    for (set, known) in have.iter().flat_map(|have| &have.sets) {
        if let Some(set) = want.sets.get_mut(set).filter(|set| encode::alike(set, known)) {
            set.elements.extend(&known.elements);
        }
    }
    let go: BTreeSet<IpAddr> = group.go.iter().copied().collect();
    for set in want.sets.values_mut() {
        set.elements.retain(|prefix| !go.contains(&prefix.base()));
    }
    let want = with(&want, &group.come);
    match have.filter(|have| have.strange.is_empty()) {
        Some(have) => socket.commit(encode::difference(&have, &want)),
        None => {
            let want = Table { strange: Vec::new(), ..want };
            socket.commit(encode::whole(&want))
        }
    }
}

/// A table with these in its sets too.
fn with(table: &Table, addresses: &[IpAddr]) -> Table {
    let mut table = table.clone();
    for address in addresses {
        if let Some(set) = table.sets.get_mut(TunnelHost::set(Family::of(*address))) {
            set.elements.insert(Prefix::host(*address));
        }
    }
    table
}
