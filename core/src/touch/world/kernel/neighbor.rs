//! Permanent neighbor entries.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::RouteType;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::link::Request;
use super::netlink::{Refusal, Socket, attributes, ip_of, u32_at};
use crate::words::addr::Mac;
use crate::words::fact::Neighbor;

/// uapi/linux/rtnetlink.h
pub(super) const RTM_NEWNEIGH: u16 = 28;
/// `struct ndmsg`
pub(super) const HEADER: usize = 12;
/// uapi/linux/neighbour.h
pub(super) const NDA_DST: u16 = 1;
pub(super) const NDA_LLADDR: u16 = 2;
pub(super) const NUD_PERMANENT: u16 = 0x80;

/// A neighbor as the kernel shows it.
pub(super) struct Seen {
    pub(super) index: u32,
    pub(super) ip: IpAddr,
    pub(super) mac: Mac,
}

/// The permanent entries of one interface, or of all.
pub(super) fn dump(socket: &mut Socket, index: Option<u32>) -> io::Result<Result<Vec<Seen>, Refusal>> {
    socket.dump(&question(AddressFamily::Unspec, index), seen)
}

/// A question for entries of a family; a strict dump takes the interface as an attribute only.
pub(super) fn question(family: AddressFamily, index: Option<u32>) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.attributes.extend(index.map(NeighbourAttribute::IfIndex));
    RouteNetlinkMessage::GetNeighbour(message)
}

fn seen(kind: u16, body: &[u8]) -> Option<Seen> {
    let (index, state) = (u32_at(body, 4)?, u16::from_ne_bytes(body.get(8..10)?.try_into().ok()?));
    if kind != RTM_NEWNEIGH || state & NUD_PERMANENT == 0 {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            NDA_DST => ip = ip_of(value),
            NDA_LLADDR => mac = <[u8; 6]>::try_from(value).ok().map(Mac),
            _ => {}
        }
    }
    Some(Seen { index, ip: ip?, mac: mac? })
}

/// Writes an entry, whatever was there for the address.
pub(super) fn write(neighbor: &Neighbor, index: u32) -> Request {
    let mut message = about(neighbor, index);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(neighbor.mac.0.to_vec()));
    (RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Deletes an entry.
pub(super) fn delete(neighbor: &Neighbor, index: u32) -> Request {
    (RouteNetlinkMessage::DelNeighbour(about(neighbor, index)), 0)
}

fn about(neighbor: &Neighbor, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match neighbor.ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = index;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(NeighbourAttribute::Destination(neighbor.ip.into()));
    message
}
