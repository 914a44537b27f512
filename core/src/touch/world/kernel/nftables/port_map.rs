//! Port maps: how the kernel holds them, and how a rule asks them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::expression::{Connection, Expression, KeyPart, NatKind, address_at, depend};
use super::packet::octets;
use super::wire::{Attributes, attribute, attributes, number};
use crate::words::addr::Family;
use crate::words::exposure::Transport;
use crate::words::rule::{Match, OWNER_MAX, PortKey, PortMap, PortMapKind, PortTarget, Side};

/// Flag of a set: every element has a value.
pub(super) const MAP: u32 = 8;

/// nft's numbers of types (informational in the kernel); a concatenation has six bits for each.
const PROTOCOL_TYPE: u32 = 12;
const SERVICE_TYPE: u32 = 13;
/// Every part of a concatenation fills whole registers of this many bytes.
const REGISTER_BYTES: usize = 4;

const fn address_type(family: Family) -> (u32, usize) {
    match family {
        Family::V4 => (7, 4),
        Family::V6 => (8, 16),
    }
}

/// Type and length of a map's keys.
pub(super) const fn key_of(kind: PortMapKind) -> (u32, u32) {
    let (address, length) = address_type(kind.family);
    let (rest, two) = ((PROTOCOL_TYPE << 6) | SERVICE_TYPE, 2 * REGISTER_BYTES as u32);
    match kind.bound {
        true => ((address << 12) | rest, two + length as u32),
        false => (rest, two),
    }
}

/// Type and length of a map's values.
pub(super) const fn value_of(kind: PortMapKind) -> (u32, u32) {
    let (address, length) = address_type(kind.family);
    ((address << 6) | SERVICE_TYPE, (length + REGISTER_BYTES) as u32)
}

/// The kind of map that the kernel describes so; none if it is no port map.
pub(super) fn kind_of(set: &[u8]) -> Option<PortMapKind> {
    let found = (number(set, 4)?, number(set, 5)?, number(set, 6)?, number(set, 7)?);
    let kinds = [(Family::V4, false), (Family::V4, true), (Family::V6, false), (Family::V6, true)];
    kinds.into_iter().map(|(family, bound)| PortMapKind { family, bound }).find(|kind| {
        let ((key, key_length), (value, value_length)) = (key_of(*kind), value_of(*kind));
        found == (key, key_length, value, value_length)
    })
}

/// Writes an element; to delete one, its key is enough.
pub(super) fn write_element(out: &mut Attributes, key: &PortKey, value: Option<&PortTarget>) {
    const ELEMENT: u16 = 1;
    out.nest(ELEMENT, |out| {
        out.nest(1, |out| {
            out.bytes(1, &key_bytes(key));
        });
        if let Some(PortTarget { address, port, owner }) = value {
            out.nest(2, |out| {
                out.bytes(1, &[octets(*address).as_slice(), &padded(&port.to_be_bytes())].concat());
            });
            if let Some(owner) = owner {
                out.bytes(USER_DATA, &comment(owner));
            }
        }
    });
}

/// NFTA_SET_ELEM_USERDATA: what the kernel keeps for nft.
const USER_DATA: u16 = 6;
/// nft's attribute for a comment in it (libnftnl `NFTNL_UDATA_SET_ELEM_COMMENT`): type, length, text, NUL.
const COMMENT: u8 = 0;

fn comment(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(OWNER_MAX)];
    [&[COMMENT, text.len() as u8 + 1], text, &[0]].concat()
}

/// The comment of an element.
fn read_comment(element: &[u8]) -> Option<String> {
    let [COMMENT, length, rest @ ..] = attribute(element, USER_DATA)? else { return None };
    let text = rest.get(..usize::from(*length))?;
    String::from_utf8(text.strip_suffix(&[0]).unwrap_or(text).to_vec()).ok()
}

fn key_bytes(key: &PortKey) -> Vec<u8> {
    let mut bytes = key.address.map(octets).unwrap_or_default();
    bytes.extend(padded(&[key.protocol.number()]));
    bytes.extend(padded(&key.port.to_be_bytes()));
    bytes
}

fn padded(bytes: &[u8]) -> [u8; REGISTER_BYTES] {
    let mut out = [0; REGISTER_BYTES];
    out[..bytes.len()].copy_from_slice(bytes);
    out
}

/// The map whose elements the kernel lists so; none if one of them cannot be said here.
pub(super) fn read_elements(kind: PortMapKind, lists: &[Vec<u8>]) -> Option<PortMap> {
    let mut elements = BTreeMap::new();
    for list in lists {
        for (_, element) in attributes(attribute(list, 3).unwrap_or_default()) {
            if number(element, 3).unwrap_or(0) != 0 {
                return None;
            }
            let key = read_key(kind, attribute(attribute(element, 1)?, 1)?)?;
            let (address, port) = read_address(kind.family, attribute(attribute(element, 2)?, 1)?)?;
            let target = PortTarget { address, port: read_port(port)?, owner: read_comment(element) };
            elements.insert(key, target);
        }
    }
    Some(PortMap { kind, elements })
}

fn read_key(kind: PortMapKind, bytes: &[u8]) -> Option<PortKey> {
    let (address, rest) = match kind.bound {
        true => read_address(kind.family, bytes).map(|(address, rest)| (Some(address), rest))?,
        false => (None, bytes),
    };
    let (protocol, port) = rest.split_first_chunk::<REGISTER_BYTES>()?;
    Some(PortKey { address, protocol: Transport::of(protocol[0])?, port: read_port(port)? })
}

fn read_address(family: Family, bytes: &[u8]) -> Option<(IpAddr, &[u8])> {
    match family {
        Family::V4 => {
            bytes.split_first_chunk::<4>().map(|(address, rest)| (Ipv4Addr::from(*address).into(), rest))
        }
        Family::V6 => {
            bytes.split_first_chunk::<16>().map(|(address, rest)| (Ipv6Addr::from(*address).into(), rest))
        }
    }
}

fn read_port(bytes: &[u8]) -> Option<u16> {
    let bytes: [u8; REGISTER_BYTES] = bytes.try_into().ok()?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// Registers behind the first, as the kernel names them: those of 4 bytes are 8 and up, those of 16 bytes that begin at the
/// same place 1 to 4.
const fn register_behind(family: Family) -> u32 {
    match family {
        Family::V4 => 9,
        Family::V6 => 2,
    }
}

/// Looks a packet's destination up in a map and rewrites it.
pub(super) fn lower_dnat(
    out: &mut Vec<Expression>,
    known: &mut Option<Family>,
    kind: PortMapKind,
    map: &str,
) {
    let family = kind.family;
    let (protocol, port) = match (kind.bound, family) {
        (false, _) => (1, 9),
        (true, Family::V4) => (9, 10),
        (true, Family::V6) => (2, 13),
    };
    if kind.bound {
        depend(out, known, family);
        out.push(address_at(family, Side::Destination));
    }
    out.push(Expression::KeyPart { part: KeyPart::Protocol, register: protocol });
    out.push(Expression::KeyPart { part: KeyPart::Port, register: port });
    out.push(Expression::Translate { map: map.to_owned() });
    let port = Some(register_behind(family));
    out.push(Expression::Nat { kind: NatKind::Destination, family, port });
}

/// Rewrites the source by itself.
pub(super) fn lower_keep_source(out: &mut Vec<Expression>, known: &mut Option<Family>, family: Family) {
    depend(out, known, family);
    out.push(address_at(family, Side::Source));
    out.push(Expression::Nat { kind: NatKind::Source, family, port: None });
}

/// The bits of a connection's state that mean `established,related`, and of its status that mean `dnat`
/// (uapi/linux/netfilter/nf_conntrack_common.h).
const ESTABLISHED_RELATED: u32 = 2 | 4;
const TRANSLATED: u32 = 1 << 5;
/// RTN_LOCAL (uapi/linux/rtnetlink.h).
const LOCAL: u32 = 2;

/// A test of the packet's connection, or of its destination's kind; nothing for any other.
pub(super) fn lower_test(out: &mut Vec<Expression>, test: &Match) {
    let (key, bits, negated) = match test {
        Match::LocalDestination => {
            out.push(Expression::DestinationType);
            return out.push(Expression::Compare { equal: true, value: LOCAL.to_ne_bytes().to_vec() });
        }
        Match::Established { negated } => (Connection::State, ESTABLISHED_RELATED, *negated),
        Match::Translated { negated } => (Connection::Status, TRANSLATED, *negated),
        _ => return,
    };
    out.push(Expression::Connection(key));
    out.push(Expression::Mask(bits.to_ne_bytes().to_vec()));
    out.push(Expression::Compare { equal: negated, value: vec![0; 4] });
}

/// The same, read back.
pub(super) fn raise_test(list: &[Expression]) -> Option<(Match, &[Expression])> {
    match list {
        [Expression::DestinationType, Expression::Compare { equal: true, value }, rest @ ..] => {
            (value == &LOCAL.to_ne_bytes()).then_some((Match::LocalDestination, rest))
        }
        [
            Expression::Connection(key),
            Expression::Mask(bits),
            Expression::Compare { equal: negated, value },
            rest @ ..,
        ] if value.iter().all(|byte| *byte == 0) => {
            let is = |known: u32| bits == &known.to_ne_bytes();
            let test = match key {
                Connection::State if is(ESTABLISHED_RELATED) => Match::Established { negated: *negated },
                Connection::Status if is(TRANSLATED) => Match::Translated { negated: *negated },
                _ => return None,
            };
            Some((test, rest))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_are_read_as_written() {
        for (family, address) in [(Family::V4, "10.1.2.3"), (Family::V6, "fd00::3")] {
            let address: IpAddr = address.parse().unwrap();
            for bound in [false, true] {
                let kind = PortMapKind { family, bound };
                let key =
                    PortKey { address: bound.then_some(address), protocol: Transport::Sctp, port: 8080 };
                for owner in [None, Some("cbr0 c1 eth0".to_owned()), Some("x".repeat(OWNER_MAX))] {
                    let target = PortTarget { address, port: 80, owner };
                    let mut out = Attributes::default();
                    out.nest(3, |out| write_element(out, &key, Some(&target)));
                    let read = read_elements(kind, &[out.as_bytes().to_vec()]).unwrap();
                    assert_eq!(read.elements, BTreeMap::from([(key, target)]));
                }
                assert_eq!(key_bytes(&key).len(), key_of(kind).1 as usize);
            }
        }
    }

    #[test]
    fn a_key_of_another_length_or_protocol_is_not_guessed_at() {
        let kind = PortMapKind { family: Family::V4, bound: false };
        assert!(read_key(kind, &[6, 0, 0, 0, 0, 80, 0, 0]).is_some());
        assert!(read_key(kind, &[6, 0, 0, 0, 0, 80, 0]).is_none());
        assert!(read_key(kind, &[1, 0, 0, 0, 0, 80, 0, 0]).is_none());
        assert!(read_key(PortMapKind { bound: true, ..kind }, &[6, 0, 0, 0, 0, 80, 0, 0]).is_none());
    }
}
