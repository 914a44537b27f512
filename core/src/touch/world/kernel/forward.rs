//! Forwarding database entries of VXLAN devices: which host is behind a MAC.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::link::Request;
use super::neighbor::{HEADER, NDA_DST, NDA_LLADDR, NUD_PERMANENT, RTM_NEWNEIGH, question};
use super::netlink::{Refusal, Socket, attributes, ip_of, u32_at};
use crate::words::addr::Mac;
use crate::words::fact::Forward;

/// An entry as the kernel shows it.
pub(super) struct Seen {
    pub(super) index: u32,
    pub(super) mac: Mac,
    pub(super) remote: IpAddr,
}

/// The permanent entries of one VXLAN device; `bridge fdb ... permanent` sets NUD_NOARP as well.
pub(super) fn dump(socket: &mut Socket, index: u32) -> io::Result<Result<Vec<Seen>, Refusal>> {
    socket.dump(&question(AddressFamily::Bridge, Some(index)), seen)
}

fn seen(kind: u16, body: &[u8]) -> Option<Seen> {
    let (family, index) = (*body.first()?, u32_at(body, 4)?);
    let state = u16::from_ne_bytes(body.get(8..10)?.try_into().ok()?);
    if kind != RTM_NEWNEIGH || i32::from(family) != libc::AF_BRIDGE || state & NUD_PERMANENT == 0 {
        return None;
    }
    let (mut remote, mut mac) = (None, None);
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            NDA_DST => remote = ip_of(value),
            NDA_LLADDR => mac = <[u8; 6]>::try_from(value).ok().map(Mac),
            _ => {}
        }
    }
    Some(Seen { index, mac: mac?, remote: remote? })
}

/// Writes an entry, whatever was there for the MAC.
pub(super) fn write(entry: &Forward, index: u32) -> Request {
    (RouteNetlinkMessage::NewNeighbour(about(entry, index)), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Deletes an entry.
pub(super) fn delete(entry: &Forward, index: u32) -> Request {
    (RouteNetlinkMessage::DelNeighbour(about(entry, index)), 0)
}

fn about(entry: &Forward, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    // NTF_SELF: the device's own table, not that of a bridge it may be on.
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(entry.mac.0.to_vec()));
    message.attributes.push(NeighbourAttribute::Destination(entry.remote.into()));
    message
}
