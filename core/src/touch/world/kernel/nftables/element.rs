//! A table that several programs write, each its own elements: nothing is read but what is asked for, and the rest is left alone.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::wire::{Attributes, error_code, kind, text};
use super::{Netfilter, decode, encode, packet, port_map};
use crate::touch::world::WorldError;
use crate::words::rule::{Chain, PortKey, PortMapKind, PortTarget, Table, TableFamily, TableName};

/// What came of an amendment. Whatever it was, it happened as a whole or not at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Amended {
    /// It is done.
    Done,
    /// A table, set or element that it speaks of is not there.
    Missing,
    /// A port that it adds is there already.
    Taken,
}

impl Netfilter {
    /// Makes of a part of a table what `new` says, by what differs from `old`: what neither names is not looked at.
    ///
    /// # Errors
    /// `Refused` for anything else than what the answer can say.
    pub fn amend(&mut self, old: &Table, new: &Table) -> Result<Amended, WorldError> {
        match self.socket.commit(encode::difference(old, new)) {
            Ok(()) => Ok(Amended::Done),
            Err(error) => match error_code(&error) {
                Some(libc::ENOENT) => Ok(Amended::Missing),
                Some(libc::EEXIST | libc::EBUSY) => Ok(Amended::Taken),
                _ => Err(error),
            },
        }
    }

    /// Puts the table in the place of whatever has its name.
    ///
    /// # Errors
    /// `Refused` if the kernel does not take it.
    pub fn put(&mut self, table: &Table) -> Result<(), WorldError> {
        self.socket.commit(encode::whole(table))
    }

    /// The table as it is, or none.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn table(&mut self, name: &TableName) -> Result<Option<Table>, WorldError> {
        if self.is_absent()? { Ok(None) } else { self.look(name) }
    }

    /// The chains of a table that has the sets and maps of `like`; only these are read.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn chains(&mut self, like: &Table) -> Result<BTreeMap<String, Chain>, WorldError> {
        decode::read_chains(&mut self.socket, &like.name, &decode::Named::of(like))
    }

    /// Names of the tables of a family.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn table_names(&mut self, family: TableFamily) -> Result<Vec<String>, WorldError> {
        let found = self.socket.dump(
            "list the tables of nftables",
            kind::GET_TABLE,
            packet::number_of(family),
            &Attributes::default(),
        );
        match found {
            Ok(found) => Ok(found.iter().filter_map(|table| text(table, 1)).map(str::to_owned).collect()),
            // A kernel without nf_tables.
            Err(error) if error_code(&error) == Some(libc::EINVAL) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Where a port leads, by a map of a table; none if there is no such port, map or table.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn port(
        &mut self,
        table: &TableName,
        (map, kind): (&str, PortMapKind),
        key: &PortKey,
    ) -> Result<Option<PortTarget>, WorldError> {
        let mut wanted = of_set(table, map);
        wanted.nest(3, |out| port_map::write_element(out, key, None));
        let what = format!("look for {key} in map {map} of table {table}");
        let found = self.socket.get(&what, kind::GET_ELEMENTS, packet::number_of(table.family), &wanted)?;
        let read = found.and_then(|list| port_map::read_elements(kind, &[list]));
        Ok(read.and_then(|mut map| map.elements.remove(key)))
    }

    /// All ports of a map of a table; none if there is no such map or table.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn ports(
        &mut self,
        table: &TableName,
        (map, kind): (&str, PortMapKind),
    ) -> Result<BTreeMap<PortKey, PortTarget>, WorldError> {
        let what = format!("read map {map} of table {table}");
        let family = packet::number_of(table.family);
        let lists = self.socket.dump(&what, kind::GET_ELEMENTS, family, &of_set(table, map))?;
        Ok(port_map::read_elements(kind, &lists).map(|map| map.elements).unwrap_or_default())
    }

    /// Whether a set of single addresses has this one.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn has_address(&mut self, table: &TableName, set: &str, address: IpAddr) -> Result<bool, WorldError> {
        let mut wanted = of_set(table, set);
        wanted.nest(3, |out| encode::write_element(out, &packet::octets(address), 0, false));
        let what = format!("look for {address} in set {set} of table {table}");
        let found = self.socket.get(&what, kind::GET_ELEMENTS, packet::number_of(table.family), &wanted)?;
        Ok(found.is_some())
    }
}

fn of_set(table: &TableName, set: &str) -> Attributes {
    let mut attributes = Attributes::default();
    attributes.text(1, &table.name).text(2, set);
    attributes
}
