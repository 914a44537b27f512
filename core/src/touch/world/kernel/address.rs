//! Addresses of interfaces.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::link::Request;
use super::netlink::{Refusal, Socket, attributes, ip_of, u32_at};
use crate::words::addr::InterfaceAddress;
use crate::words::fact::Address;

/// uapi/linux/rtnetlink.h
const RTM_NEWADDR: u16 = 20;
/// `struct ifaddrmsg`
const HEADER: usize = 8;
/// uapi/linux/if_addr.h
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;

/// An address as the kernel shows it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) index: u32,
    pub(super) address: InterfaceAddress,
    pub(super) flags: AddressFlags,
}

/// All addresses, or those of one interface.
pub(super) fn dump(socket: &mut Socket, index: Option<u32>) -> io::Result<Result<Vec<Seen>, Refusal>> {
    let mut message = AddressMessage::default();
    message.header.index = index.unwrap_or(0);
    let found = socket.dump(&RouteNetlinkMessage::GetAddress(message), seen)?;
    Ok(match found {
        // The interface went away since it was looked up.
        Err(Refusal { errno: libc::ENODEV, .. }) => Ok(Vec::new()),
        found => found,
    })
}

pub(super) fn seen(kind: u16, body: &[u8]) -> Option<Seen> {
    if kind != RTM_NEWADDR {
        return None;
    }
    let len = *body.get(1)?;
    let mut flags = u32::from(*body.get(2)?);
    let index = u32_at(body, 4)?;
    let (mut local, mut address) = (None, None);
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            // With a point-to-point peer IFA_ADDRESS is the peer's; IPv6 has no IFA_LOCAL otherwise.
            IFA_LOCAL => local = ip_of(value),
            IFA_ADDRESS => address = ip_of(value),
            IFA_FLAGS => flags = u32_at(value, 0)?,
            _ => {}
        }
    }
    let address = InterfaceAddress::new(local.or(address)?, len).ok()?;
    Some(Seen { index, address, flags: AddressFlags::from_bits_retain(flags) })
}

impl Seen {
    /// Not to be used yet.
    pub(super) fn tentative(&self) -> bool {
        self.flags.contains(AddressFlags::Tentative)
    }

    /// Not to be used at all: somebody else has it.
    pub(super) fn duplicate(&self) -> bool {
        self.flags.contains(AddressFlags::Dadfailed)
    }

    /// Whether the subnet's route was left to us.
    pub(super) fn no_prefix_route(&self) -> bool {
        self.flags.contains(AddressFlags::Noprefixroute)
    }
}

/// Adds an address, or sets its flags if it is there. An IPv6 address is usable at once unless asked otherwise: we know that
/// nobody else has it, and duplicate address detection would cost a second.
pub(super) fn add(address: &Address, index: u32) -> Request {
    let mut message = about(address, index);
    let mut flags = AddressFlags::empty();
    if address.no_prefix_route {
        flags |= AddressFlags::Noprefixroute;
    }
    match (address.address.address(), address.address.prefix().last()) {
        // Broadcast as `ip addr add ... brd +` and Go's netlink library set it.
        (IpAddr::V4(_), IpAddr::V4(last)) if address.address.len() < 31 => {
            message.attributes.push(AddressAttribute::Broadcast(last));
        }
        (IpAddr::V4(_), _) => {}
        (IpAddr::V6(_), _) if address.detect_duplicates => {}
        (IpAddr::V6(_), _) => flags |= AddressFlags::Nodad,
    }
    if !flags.is_empty() {
        message.attributes.push(AddressAttribute::Flags(flags));
    }
    (RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Deletes an address.
pub(super) fn delete(address: &Address, index: u32) -> Request {
    (RouteNetlinkMessage::DelAddress(about(address, index)), 0)
}

fn about(address: &Address, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    let ip = address.address.address();
    message.header.family = match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.prefix_len = address.address.len();
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(ip));
    message.attributes.push(AddressAttribute::Address(ip));
    message
}
