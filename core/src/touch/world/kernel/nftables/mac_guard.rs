//! The source MACs that guarded ports of bridges may use.
//!
//! ```text
//! table bridge flannel_cni {
//!     set guarded { type ifname; }
//!     set sources { type ifname . ether_addr; }
//!     chain prerouting {
//!         type filter hook prerouting priority dstnat; policy accept;
//!         iifname @guarded iifname . ether saddr != @sources drop
//!     }
//! }
//! ```
//! One rule for the whole host; a port is two elements, put in and taken out by the port's name. Nobody plans the table as a
//! whole, because nobody knows the ports of others.

use std::collections::{BTreeMap, BTreeSet};

use super::wire::{Attributes, Batch, CREATE, Socket, attribute, attributes, error_code, kind};
use crate::touch::world::WorldError;
use crate::words::addr::Mac;
use crate::words::fact::Guard;
use crate::words::name::LinkName;

/// NFPROTO_BRIDGE (uapi/linux/netfilter.h).
const BRIDGE: u8 = 7;
/// NLM_F_EXCL: an error if it is there.
const EXCLUSIVE: u16 = 0x200;
const TABLE: &str = "flannel_cni";
const GUARDED: &str = "guarded";
const SOURCES: &str = "sources";
const CHAIN: &str = "prerouting";
/// Bytes of an interface's name in a key.
const NAME: usize = 16;
/// Bytes of a MAC in a concatenated key: whole registers.
const SOURCE: usize = 8;
/// nft's numbers of the types `ifname` and `ether_addr`, and how it puts two into one (informational in the kernel).
const TYPE_NAME: u32 = 41;
const TYPE_MAC: u32 = 9;
const TYPE_BITS: u32 = 6;
/// Two processes may make the table at once; then one of them finds it made.
const TRIES_MAX: usize = 3;

/// Guards a port: what it may have been allowed before goes.
pub(super) fn put(socket: &mut Socket, guard: &Guard) -> Result<(), WorldError> {
    let mut last = None;
    for _ in 0..TRIES_MAX {
        let mut batch = Batch::new(None);
        let stale = sources(socket)?.remove(&guard.link).unwrap_or_default();
        let stale: Vec<_> = stale.into_iter().filter(|mac| *mac != guard.mac).collect();
        change(&mut batch, kind::DELETE_ELEMENTS, SOURCES, stale.iter().map(|mac| source(guard.link, *mac)));
        put_elements(&mut batch, guard);
        match socket.commit(batch) {
            Err(error) if error_code(&error) == Some(libc::ENOENT) => {}
            other => return other,
        }
        let mut batch = whole();
        put_elements(&mut batch, guard);
        match socket.commit(batch) {
            Err(error) if error_code(&error) == Some(libc::EEXIST) => last = Some(error),
            other => return other,
        }
    }
    last.map_or(Ok(()), Err)
}

/// Lets a port be. One that is not guarded is no error.
pub(super) fn lift(socket: &mut Socket, link: LinkName) -> Result<(), WorldError> {
    let stale = sources(socket)?.remove(&link).unwrap_or_default();
    let mut batch = Batch::new(None);
    change(&mut batch, kind::DELETE_ELEMENTS, SOURCES, stale.iter().map(|mac| source(link, *mac)));
    if guarded(socket)?.contains(&link) {
        change(&mut batch, kind::DELETE_ELEMENTS, GUARDED, [name(link)]);
    }
    match socket.commit(batch) {
        Err(error) if error_code(&error) == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// The guards that are in force on these ports.
pub(super) fn look(socket: &mut Socket, links: &BTreeSet<LinkName>) -> Result<Vec<Guard>, WorldError> {
    let mut of_table = Attributes::default();
    of_table.text(1, TABLE);
    // Elements without the rule keep nobody from anything.
    if socket.dump("read the rule that guards ports", kind::GET_RULE, BRIDGE, &of_table)?.is_empty() {
        return Ok(Vec::new());
    }
    let (guarded, mut sources) = (guarded(socket)?, sources(socket)?);
    let of = |link: &LinkName| match sources.remove(link)?.as_slice() {
        [mac] => Some(Guard { link: *link, mac: *mac }),
        _ => None,
    };
    Ok(links.intersection(&guarded).filter_map(of).collect())
}

/// Every port that is guarded.
pub(super) fn all(socket: &mut Socket) -> Result<BTreeSet<LinkName>, WorldError> {
    let mut all = guarded(socket)?;
    all.extend(sources(socket)?.into_keys());
    Ok(all)
}

fn put_elements(batch: &mut Batch, guard: &Guard) {
    change(batch, kind::NEW_ELEMENTS, SOURCES, [source(guard.link, guard.mac)]);
    change(batch, kind::NEW_ELEMENTS, GUARDED, [name(guard.link)]);
}

fn guarded(socket: &mut Socket) -> Result<BTreeSet<LinkName>, WorldError> {
    Ok(keys(socket, GUARDED)?.iter().filter_map(|key| link_of(key)).collect())
}

fn sources(socket: &mut Socket) -> Result<BTreeMap<LinkName, Vec<Mac>>, WorldError> {
    let mut found: BTreeMap<LinkName, Vec<Mac>> = BTreeMap::new();
    for key in keys(socket, SOURCES)? {
        let mac = key.get(NAME..).and_then(<[u8]>::first_chunk::<6>);
        if let (Some(link), Some(mac)) = (link_of(&key), mac) {
            found.entry(link).or_default().push(Mac(*mac));
        }
    }
    Ok(found)
}

fn keys(socket: &mut Socket, set: &str) -> Result<Vec<Vec<u8>>, WorldError> {
    let mut of_set = Attributes::default();
    of_set.text(1, TABLE).text(2, set);
    let lists = socket.dump(
        &format!("read set {set} of table bridge {TABLE}"),
        kind::GET_ELEMENTS,
        BRIDGE,
        &of_set,
    )?;
    let elements = lists.iter().flat_map(|list| attributes(attribute(list, 3).unwrap_or_default()));
    Ok(elements.filter_map(|(_, element)| Some(attribute(attribute(element, 1)?, 1)?.to_vec())).collect())
}

fn link_of(key: &[u8]) -> Option<LinkName> {
    let name = key.get(..NAME)?;
    let end = name.iter().position(|byte| *byte == 0)?;
    LinkName::new(std::str::from_utf8(name.get(..end)?).ok()?).ok()
}

fn name(link: LinkName) -> Vec<u8> {
    let mut key = link.as_str().as_bytes().to_vec();
    key.resize(NAME, 0);
    key
}

fn source(link: LinkName, mac: Mac) -> Vec<u8> {
    let mut key = name(link);
    key.extend_from_slice(&mac.0);
    key.resize(NAME + SOURCE, 0);
    key
}

/// Adds or deletes elements.
fn change(batch: &mut Batch, kind: u8, set: &str, keys: impl IntoIterator<Item = Vec<u8>>) {
    const ELEMENT: u16 = 1;
    let keys: Vec<_> = keys.into_iter().collect();
    if keys.is_empty() {
        return;
    }
    let flags = if kind == kind::NEW_ELEMENTS { CREATE } else { 0 };
    batch.step(format!("change set {set} of table bridge {TABLE}"), (kind, flags), BRIDGE, |out| {
        out.text(1, TABLE).text(2, set).nest(3, |out| {
            for key in &keys {
                out.nest(ELEMENT, |out| {
                    out.nest(1, |out| {
                        out.bytes(1, key);
                    });
                });
            }
        });
    });
}

/// The transaction that makes the table; it fails if there is one.
fn whole() -> Batch {
    const POLICY_ACCEPT: u32 = 1;
    /// Hook and priority: before anything else of a bridge looks at the frame, as upstream's.
    const PREROUTING: u32 = 0;
    const DSTNAT: i32 = -300;
    let mut batch = Batch::new(None);
    let step = || format!("write table bridge {TABLE}");
    batch.step(step(), (kind::NEW_TABLE, CREATE | EXCLUSIVE), BRIDGE, |out| {
        out.text(1, TABLE);
    });
    batch.step(step(), (kind::NEW_CHAIN, CREATE), BRIDGE, |out| {
        out.text(1, TABLE).text(3, CHAIN);
        out.nest(4, |out| {
            out.number(1, PREROUTING).number(2, DSTNAT as u32);
        });
        out.number(5, POLICY_ACCEPT).text(7, "filter");
    });
    let concatenated = (TYPE_NAME << TYPE_BITS) | TYPE_MAC;
    for (id, (set, of, length)) in
        [(GUARDED, TYPE_NAME, NAME), (SOURCES, concatenated, NAME + SOURCE)].into_iter().enumerate()
    {
        batch.step(step(), (kind::NEW_SET, CREATE), BRIDGE, |out| {
            out.text(1, TABLE).text(2, set).number(3, 0).number(4, of).number(5, length as u32);
            out.number(10, id as u32 + 1);
        });
    }
    batch.step(step(), (kind::NEW_RULE, CREATE), BRIDGE, |out| {
        out.text(1, TABLE).text(2, CHAIN).nest(4, write_rule);
    });
    batch
}

/// `iifname @guarded iifname . ether saddr != @sources drop` (uapi/linux/netfilter/nf_tables.h).
fn write_rule(out: &mut Attributes) {
    const NAME_REGISTER: u32 = 1;
    const SOURCE_REGISTER: u32 = 2;
    const INPUT_NAME: u32 = 6;
    const LINK_HEADER: u32 = 0;
    const SOURCE_AT: (u32, u32) = (6, 6);
    const INVERTED: u32 = 1;
    const DROP: u32 = 0;
    let mut expression = |name: &str, write: &dyn Fn(&mut Attributes)| {
        out.nest(1, |out| {
            out.text(1, name).nest(2, |out| write(out));
        });
    };
    let load_name = |out: &mut Attributes| {
        out.number(1, NAME_REGISTER).number(2, INPUT_NAME);
    };
    expression("meta", &load_name);
    expression("lookup", &|out| {
        out.text(1, GUARDED).number(2, NAME_REGISTER);
    });
    expression("meta", &load_name);
    expression("payload", &|out| {
        let (offset, length) = SOURCE_AT;
        out.number(1, SOURCE_REGISTER).number(2, LINK_HEADER).number(3, offset).number(4, length);
    });
    expression("lookup", &|out| {
        out.text(1, SOURCES).number(2, NAME_REGISTER).number(5, INVERTED);
    });
    expression("immediate", &|out| {
        out.number(1, 0).nest(2, |out| {
            out.nest(2, |out| {
                out.number(1, DROP);
            });
        });
    });
}
