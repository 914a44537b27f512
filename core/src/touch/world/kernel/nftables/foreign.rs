//! Chains and rules that other programs made for one container and that nobody else takes away any more.
//!
//! A chain of iptables-nft is a chain of nftables like any other, so neither `iptables` nor `nft` has to be there.

use std::net::IpAddr;

use super::packet::{number_of, protocol_of};
use super::wire::{Attributes, Batch, Socket, attribute, attributes, error_code, kind, long, text};
use crate::touch::world::WorldError;
use crate::words::addr::Family;
use crate::words::rule::TableName;

/// Others may write rules between our look and our transaction; then we look again.
const TRIES_MAX: usize = 16;

/// Deletes a chain of iptables' table `nat`, what is in it, and every rule of that table that jumps there. False if there
/// is no such chain.
pub(super) fn remove_chain(socket: &mut Socket, family: Family, chain: &str) -> Result<bool, WorldError> {
    const TABLE: &str = "nat";
    let protocol = protocol_of(family);
    let what = format!("remove chain {chain} of table nat");
    again(&what, || {
        let mut wanted = Attributes::default();
        wanted.text(1, TABLE).text(3, chain);
        if socket.get(&what, kind::GET_CHAIN, protocol, &wanted)?.is_none() {
            return Ok(Some(false));
        }
        let generation = socket.generation()?;
        let mut batch = Batch::new(Some(generation));
        for rule in rules(socket, protocol, TABLE)?.iter().filter(|rule| jumps_to(rule, chain)) {
            delete_rule(&mut batch, protocol, TABLE, rule);
        }
        // Without a handle: all that is in the chain.
        batch.step(format!("empty chain {chain}"), (kind::DELETE_RULE, 0), protocol, |rule| {
            rule.text(1, TABLE).text(2, chain);
        });
        batch.step(format!("remove chain {chain}"), (kind::DELETE_CHAIN, 0), protocol, |old| {
            old.text(1, TABLE).text(3, chain);
        });
        commit(socket, batch).map(|done| done.then_some(true))
    })
}

/// Deletes the rules of a table whose comment is one of those meant, and says how many. None if there is no such table.
pub(super) fn remove_commented(
    socket: &mut Socket,
    table: &TableName,
    is_meant: &dyn Fn(&str) -> bool,
) -> Result<usize, WorldError> {
    let family = number_of(table.family);
    again(&format!("remove rules of table {table}"), || {
        let generation = socket.generation()?;
        let mut batch = Batch::new(Some(generation));
        for rule in rules(socket, family, &table.name)? {
            if comment(&rule).is_some_and(is_meant) {
                delete_rule(&mut batch, family, &table.name, &rule);
            }
        }
        let count = batch.len();
        commit(socket, batch).map(|done| done.then_some(count))
    })
}

/// Deletes the rules of a chain of iptables' table `filter` that test for this address alone, and says how many.
pub(super) fn remove_addressed(
    socket: &mut Socket,
    family: Family,
    chain: &str,
    address: IpAddr,
) -> Result<usize, WorldError> {
    const TABLE: &str = "filter";
    let protocol = protocol_of(family);
    let bytes = match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let what = format!("remove rules about {address} of chain {chain}");
    again(&what, || {
        let mut wanted = Attributes::default();
        wanted.text(1, TABLE).text(3, chain);
        if socket.get(&what, kind::GET_CHAIN, protocol, &wanted)?.is_none() {
            return Ok(Some(0));
        }
        let mut batch = Batch::new(Some(socket.generation()?));
        for rule in rules(socket, protocol, TABLE)? {
            if text(&rule, 2) == Some(chain) && compares_with(&rule, &bytes) {
                delete_rule(&mut batch, protocol, TABLE, &rule);
            }
        }
        let count = batch.len();
        commit(socket, batch).map(|done| done.then_some(count))
    })
}

/// Whether one of the rule's expressions compares with this value.
fn compares_with(rule: &[u8], value: &[u8]) -> bool {
    let compared = |expression: &[u8]| -> Option<bool> {
        // NFTA_CMP_DATA, NFTA_DATA_VALUE.
        let data = attribute(attribute(attribute(expression, 2)?, 3)?, 1)?;
        Some(text(expression, 1) == Some("cmp") && data == value)
    };
    attribute(rule, 4)
        .is_some_and(|list| attributes(list).any(|(_, expression)| compared(expression).unwrap_or(false)))
}

fn again<T>(what: &str, mut attempt: impl FnMut() -> Result<Option<T>, WorldError>) -> Result<T, WorldError> {
    for _ in 0..TRIES_MAX {
        if let Some(done) = attempt()? {
            return Ok(done);
        }
    }
    Err(WorldError::Unsupported {
        action: what.to_owned(),
        what: format!("others changed the rules of this host {TRIES_MAX} times meanwhile"),
    })
}

/// False if somebody else was faster.
fn commit(socket: &mut Socket, batch: Batch) -> Result<bool, WorldError> {
    match socket.commit(batch) {
        Err(error) if matches!(error_code(&error), Some(libc::ERESTART | libc::ENOENT)) => Ok(false),
        other => other.map(|()| true),
    }
}

fn rules(socket: &mut Socket, family: u8, table: &str) -> Result<Vec<Vec<u8>>, WorldError> {
    let mut wanted = Attributes::default();
    wanted.text(1, table);
    let mut found = socket.dump(&format!("read rules of table {table}"), kind::GET_RULE, family, &wanted)?;
    found.retain(|rule| text(rule, 1) == Some(table));
    Ok(found)
}

fn delete_rule(batch: &mut Batch, family: u8, table: &str, rule: &[u8]) {
    let (Some(chain), Some(handle)) = (text(rule, 2), long(rule, 3)) else { return };
    batch.step(format!("remove a rule of chain {chain}"), (kind::DELETE_RULE, 0), family, |old| {
        old.text(1, table).text(2, chain).long(3, handle);
    });
}

/// Whether one of the rule's expressions is a verdict that leads to the chain.
fn jumps_to(rule: &[u8], chain: &str) -> bool {
    let verdict = |expression: &[u8]| -> Option<bool> {
        // NFTA_IMMEDIATE_DATA, NFTA_DATA_VERDICT, NFTA_VERDICT_CHAIN.
        let verdict = attribute(attribute(attribute(expression, 2)?, 2)?, 2)?;
        Some(text(expression, 1) == Some("immediate") && text(verdict, 2) == Some(chain))
    };
    attribute(rule, 4)
        .is_some_and(|list| attributes(list).any(|(_, expression)| verdict(expression).unwrap_or(false)))
}

/// What `nft` shows as the rule's comment: in its user data, type 0, a length of one byte, and text with a NUL.
fn comment(rule: &[u8]) -> Option<&str> {
    const USER_DATA: u16 = 7;
    let mut bytes = attribute(rule, USER_DATA)?;
    while let [kind, length, rest @ ..] = bytes {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            return std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok();
        }
        bytes = rest.get(usize::from(*length)..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_is_found_among_other_user_data() {
        let with = |bytes: &[u8]| Attributes::default().bytes(7, bytes).as_bytes().to_vec();
        assert_eq!(comment(&with(b"\x00\x03ab\x00")), Some("ab"));
        assert_eq!(comment(&with(b"\x05\x02xy\x00\x01c")), Some("c"));
        assert_eq!(comment(&with(b"\x00\x09ab")), None, "cut off");
        assert_eq!(comment(&with(b"\x05\x00")), None);
        assert_eq!(comment(Attributes::default().text(1, "nat").as_bytes()), None);
    }

    #[test]
    fn a_jump_is_told_from_other_expressions() {
        let expression = |list: &mut Attributes, name: &str, chain: &str| {
            list.nest(1, |expression| {
                expression.text(1, name).nest(2, |data| {
                    data.nest(2, |value| {
                        value.nest(2, |verdict| {
                            verdict.number(1, 0).text(2, chain);
                        });
                    });
                });
            });
        };
        let to = |name: &str, chain: &str| {
            let mut rule = Attributes::default();
            rule.nest(4, |list| {
                expression(list, "counter", "");
                expression(list, name, chain);
            });
            rule.as_bytes().to_vec()
        };
        assert!(jumps_to(&to("immediate", "CNI-a"), "CNI-a"));
        assert!(!jumps_to(&to("immediate", "CNI-ab"), "CNI-a"));
        assert!(!jumps_to(&to("objref", "CNI-a"), "CNI-a"));
    }
}
