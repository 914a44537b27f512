//! What can be turned on an interface that others made: address, MTU, queue, what it receives; and whose other end it is.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage};

use super::netlink::{Batch, Refusal, attributes, u32_at};
use super::{Kernel, io_error, link, refused};
use crate::touch::world::WorldError;
use crate::words::addr::Mac;
use crate::words::name::LinkName;

/// uapi/linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
/// `struct ifinfomsg`
const HEADER: usize = 16;
/// uapi/linux/if_link.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_TXQLEN: u16 = 13;
const IFLA_PROMISCUITY: u16 = 30;

/// An interface as it is set now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Device {
    /// Ethernet address.
    pub mac: Option<Mac>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Receives what is not for it, for whatever reason.
    pub promiscuous: bool,
    /// Receives every multicast.
    pub all_multicast: bool,
    /// Packets that may wait to be sent.
    pub queue: u32,
    /// Administratively up.
    pub up: bool,
    /// Index of its other end (of a veth pair), in whatever namespace that is.
    other_end: Option<u32>,
}

/// What to turn; what is None stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Turn {
    /// Ethernet address.
    pub mac: Option<Mac>,
    /// Largest packet in bytes.
    pub mtu: Option<u32>,
    /// Receive what is not for it.
    pub promiscuous: Option<bool>,
    /// Receive every multicast.
    pub all_multicast: Option<bool>,
    /// Packets that may wait to be sent.
    pub queue: Option<u32>,
    /// Administratively up.
    pub up: Option<bool>,
}

impl Kernel {
    /// How an interface is set now; none if there is none of that name.
    pub fn device(&mut self, name: LinkName) -> Result<Option<Device>, WorldError> {
        let failed = |e| io_error(format!("look at the interface {name}"), e);
        let mut message = named(name);
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let answers = self.socket.ask(&[RouteNetlinkMessage::GetLink(message)], seen).map_err(failed)?;
        match answers.into_iter().next() {
            Some(Ok(device)) => Ok(device),
            None | Some(Err(Refusal { errno: libc::ENODEV, .. })) => Ok(None),
            Some(Err(refusal)) => Err(refused(format!("look at the interface {name}"), refusal)),
        }
    }

    /// Sets an interface, all at once.
    pub fn turn(&mut self, name: LinkName, turn: &Turn) -> Result<(), WorldError> {
        let action = || format!("set the interface {name}");
        let mut message = named(name);
        for (flag, wanted) in [
            (LinkFlags::Promisc, turn.promiscuous),
            (LinkFlags::Allmulti, turn.all_multicast),
            (LinkFlags::Up, turn.up),
        ] {
            let Some(on) = wanted else { continue };
            message.header.change_mask |= flag;
            if on {
                message.header.flags |= flag;
            }
        }
        message.attributes.extend(turn.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
        message.attributes.extend(turn.mtu.map(LinkAttribute::Mtu));
        message.attributes.extend(turn.queue.map(LinkAttribute::TxQueueLen));
        let mut batch = Batch::default();
        batch.push(&RouteNetlinkMessage::SetLink(message), 0);
        let refusals = self.socket.write(&mut batch).map_err(|e| io_error(action(), e))?;
        match refusals.into_iter().next() {
            None => Ok(()),
            Some((_, refusal)) => Err(refused(action(), refusal)),
        }
    }

    /// The end in this namespace of a veth pair whose other end was seen in another; none if it is not here.
    pub fn other_end(&mut self, device: &Device) -> Result<Option<LinkName>, WorldError> {
        let Some(index) = device.other_end else { return Ok(None) };
        let failed = |e: io::Error| io_error("look at the interfaces", e);
        let found = link::by_index(&mut self.socket, &[index]).map_err(failed)?;
        // By chance another interface may have that number here.
        Ok(found.into_iter().flatten().find(link::Seen::is_veth).map(|seen| seen.name))
    }
}

fn named(name: LinkName) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_string()));
    message
}

fn seen(kind: u16, body: &[u8]) -> Option<Device> {
    if kind != RTM_NEWLINK {
        return None;
    }
    let flags = u32_at(body, 8)?;
    let is_on = |flag: LinkFlags| flags & flag.bits() != 0;
    let mut device = Device {
        mac: None,
        mtu: 0,
        promiscuous: is_on(LinkFlags::Promisc),
        all_multicast: is_on(LinkFlags::Allmulti),
        queue: 0,
        up: is_on(LinkFlags::Up),
        other_end: None,
    };
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            IFLA_ADDRESS => device.mac = <[u8; 6]>::try_from(value).ok().map(Mac),
            IFLA_MTU => device.mtu = u32_at(value, 0)?,
            IFLA_LINK => device.other_end = u32_at(value, 0).filter(|index| *index != 0),
            IFLA_TXQLEN => device.queue = u32_at(value, 0)?,
            IFLA_PROMISCUITY => device.promiscuous |= u32_at(value, 0)? != 0,
            _ => {}
        }
    }
    Some(device)
}
