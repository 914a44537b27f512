//! Interfaces: what the kernel has, and the messages that make, change and delete them.

use std::io;
use std::os::fd::RawFd;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkHeader, LinkInfo, LinkMessage,
};

use super::ipip;
use super::netlink::{Refusal, Socket, attributes, ip_of, text_of, u32_at};
use crate::words::addr::Mac;
use crate::words::fact::{Ipip, Link, LinkKind, LinkModes, VethPeer, Vxlan};
use crate::words::name::LinkName;
use crate::words::units::{Mtu, Port, Vni};

/// uapi/linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
/// `struct ifinfomsg`
const HEADER: usize = 16;
/// uapi/linux/if_link.h: attributes of an interface...
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
/// ...of what kind it is, and of its place on another...
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_ISOLATED: u16 = 33;
/// ...of a bridge...
const IFLA_BR_VLAN_FILTERING: u16 = 7;
/// ...and of a VXLAN device.
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LINK: u16 = 3;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_LOCAL6: u16 = 17;
const IFLA_VXLAN_GBP: u16 = 23;

/// An interface as the kernel shows it. Indices stay in this directory.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) index: u32,
    pub(super) name: LinkName,
    pub(super) kind: SeenKind,
    pub(super) mtu: u32,
    mac: Option<Mac>,
    alias: Option<String>,
    flags: u32,
    /// Index of the bridge (or bond...) it is a port of.
    pub(super) master: Option<u32>,
    /// Of a bridge's port only.
    pub(super) port: Option<PortModes>,
}

/// How a bridge treats one of its ports.
#[derive(Clone, Copy, Debug)]
pub(super) struct PortModes {
    pub(super) hairpin: bool,
    pub(super) isolated: bool,
}

/// What a seen interface is.
#[derive(Clone, Debug)]
pub(super) enum SeenKind {
    Bridge { vlan_filtering: bool },
    Veth,
    Vxlan(SeenVxlan),
    Ipip(Ipip),
    Wireguard,
    Funnel,
    Other,
}

/// A VXLAN device as the kernel shows it.
#[derive(Clone, Debug, Default)]
pub(super) struct SeenVxlan {
    vni: u32,
    port: u16,
    local: Option<std::net::IpAddr>,
    pub(super) underlay: Option<u32>,
    learning: bool,
    gbp: bool,
}

impl Seen {
    pub(super) fn is_up(&self) -> bool {
        self.flags & LinkFlags::Up.bits() != 0
    }

    /// Whether it is an intermediate functional block device, which packets are sent through to be shaped.
    pub(super) const fn is_funnel(&self) -> bool {
        matches!(self.kind, SeenKind::Funnel)
    }

    pub(super) const fn is_veth(&self) -> bool {
        matches!(self.kind, SeenKind::Veth)
    }

    pub(super) fn alias(&self) -> Option<&str> {
        self.alias.as_deref()
    }

    pub(super) const fn mac(&self) -> Option<Mac> {
        self.mac
    }

    pub(super) fn is_loopback(&self) -> bool {
        self.flags & LinkFlags::Loopback.bits() != 0
    }

    /// The fact. `name_of` finds the name behind an index. A VXLAN device that we could not have made (without an
    /// underlay or source address) is none of the kinds we know.
    pub(super) fn fact(&self, name_of: impl Fn(u32) -> Option<LinkName>) -> Link {
        let kind = match &self.kind {
            SeenKind::Bridge { .. } => LinkKind::Bridge,
            SeenKind::Veth => LinkKind::Veth { peer: None },
            SeenKind::Vxlan(vxlan) => vxlan.fact(name_of).map_or(LinkKind::Given, LinkKind::Vxlan),
            SeenKind::Ipip(ipip) => LinkKind::Ipip(*ipip),
            SeenKind::Wireguard => LinkKind::Wireguard,
            SeenKind::Funnel | SeenKind::Other => LinkKind::Given,
        };
        Link {
            name: self.name,
            kind,
            mtu: Mtu::new(self.mtu.into()).ok(),
            mac: self.mac,
            alias: self.alias.clone(),
            up: self.is_up(),
            modes: LinkModes {
                promiscuous: self.flags & LinkFlags::Promisc.bits() != 0,
                vlan_filtering: matches!(self.kind, SeenKind::Bridge { vlan_filtering: true }),
            },
        }
    }
}

impl SeenVxlan {
    fn fact(&self, name_of: impl Fn(u32) -> Option<LinkName>) -> Option<Vxlan> {
        Some(Vxlan {
            vni: Vni::new(self.vni.into()).ok()?,
            port: Port::new(self.port.into()).ok()?,
            local: self.local?,
            underlay: name_of(self.underlay?)?,
            learning: self.learning,
            gbp: self.gbp,
        })
    }
}

/// Every interface of the namespace.
pub(super) fn all(socket: &mut Socket) -> io::Result<Result<Vec<Seen>, Refusal>> {
    socket.dump(&question(0, None), seen)
}

/// The interfaces of these names; none in the place of one that does not exist.
pub(super) fn by_name(socket: &mut Socket, names: &[LinkName]) -> io::Result<Vec<Option<Seen>>> {
    let questions: Vec<_> = names.iter().map(|name| question(0, Some(*name))).collect();
    let found = one_each(socket, &questions)?;
    // The kernel also finds an interface by an alternative name; that one is not the one asked for.
    Ok(found.into_iter().zip(names).map(|(seen, name)| seen.filter(|seen| seen.name == *name)).collect())
}

/// The interfaces with these indices.
pub(super) fn by_index(socket: &mut Socket, indices: &[u32]) -> io::Result<Vec<Option<Seen>>> {
    let questions: Vec<_> = indices.iter().map(|index| question(*index, None)).collect();
    one_each(socket, &questions)
}

fn one_each(socket: &mut Socket, questions: &[RouteNetlinkMessage]) -> io::Result<Vec<Option<Seen>>> {
    socket
        .ask(questions, seen)?
        .into_iter()
        .map(|answer| match answer {
            Ok(seen) => Ok(seen),
            Err(Refusal { errno: libc::ENODEV, .. }) => Ok(None),
            Err(refusal) => Err(io::Error::from_raw_os_error(refusal.errno)),
        })
        .collect()
}

fn question(index: u32, name: Option<LinkName>) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    // Counters are most of an answer, and nobody here reads them.
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    message.attributes.extend(name.map(|name| LinkAttribute::IfName(name.to_string())));
    RouteNetlinkMessage::GetLink(message)
}

fn seen(kind: u16, body: &[u8]) -> Option<Seen> {
    if kind != RTM_NEWLINK {
        return None;
    }
    let index = u32_at(body, 4)?;
    let flags = u32_at(body, 8)?;
    let (mut name, mut mtu, mut mac, mut alias) = (None, 0, None, None);
    let (mut master, mut place) = (None, Place::default());
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            IFLA_IFNAME => name = LinkName::new(&text_of(value)).ok(),
            IFLA_MTU => mtu = u32_at(value, 0)?,
            IFLA_ADDRESS => mac = <[u8; 6]>::try_from(value).ok().map(Mac),
            IFLA_IFALIAS => alias = Some(text_of(value)).filter(|alias| !alias.is_empty()),
            IFLA_MASTER => master = u32_at(value, 0),
            IFLA_LINKINFO => place = Place::read(value),
            _ => {}
        }
    }
    let Place { kind, port } = place;
    Some(Seen { index, name: name?, kind, mtu, mac, alias, flags, master, port })
}

/// What IFLA_LINKINFO says.
struct Place {
    kind: SeenKind,
    port: Option<PortModes>,
}

impl Default for Place {
    fn default() -> Self {
        Self { kind: SeenKind::Other, port: None }
    }
}

impl Place {
    fn read(bytes: &[u8]) -> Self {
        let (mut kind, mut data, mut port_kind, mut port_data) = (&[][..], &[][..], &[][..], &[][..]);
        for (attribute, value) in attributes(bytes) {
            match attribute {
                IFLA_INFO_KIND => kind = value,
                IFLA_INFO_DATA => data = value,
                IFLA_INFO_SLAVE_KIND => port_kind = value,
                IFLA_INFO_SLAVE_DATA => port_data = value,
                _ => {}
            }
        }
        let is_on = |data, mode: u16| {
            let found = attributes(data).find(|(attribute, _)| *attribute == mode);
            found.is_some_and(|(_, value)| value.first().is_some_and(|on| *on != 0))
        };
        let hairpin = is_on(port_data, IFLA_BRPORT_MODE);
        let modes = PortModes { hairpin, isolated: is_on(port_data, IFLA_BRPORT_ISOLATED) };
        Self {
            kind: match kind.strip_suffix(b"\0").unwrap_or(kind) {
                b"bridge" => SeenKind::Bridge { vlan_filtering: is_on(data, IFLA_BR_VLAN_FILTERING) },
                b"veth" => SeenKind::Veth,
                b"vxlan" => SeenKind::Vxlan(vxlan_of(data)),
                b"ipip" => SeenKind::Ipip(ipip::read(data)),
                b"wireguard" => SeenKind::Wireguard,
                b"ifb" => SeenKind::Funnel,
                _ => SeenKind::Other,
            },
            port: (port_kind.strip_suffix(b"\0").unwrap_or(port_kind) == b"bridge").then_some(modes),
        }
    }
}

fn vxlan_of(bytes: &[u8]) -> SeenVxlan {
    let mut vxlan = SeenVxlan::default();
    for (kind, value) in attributes(bytes) {
        match kind {
            IFLA_VXLAN_ID => vxlan.vni = u32_at(value, 0).unwrap_or(0),
            IFLA_VXLAN_LINK => vxlan.underlay = u32_at(value, 0).filter(|index| *index != 0),
            IFLA_VXLAN_LOCAL | IFLA_VXLAN_LOCAL6 => vxlan.local = ip_of(value),
            IFLA_VXLAN_LEARNING => vxlan.learning = value.first().is_some_and(|on| *on != 0),
            IFLA_VXLAN_PORT => {
                vxlan.port = <[u8; 2]>::try_from(value).map(u16::from_be_bytes).unwrap_or(0);
            }
            IFLA_VXLAN_GBP => vxlan.gbp = true,
            _ => {}
        }
    }
    vxlan
}

/// A message and its flags.
pub(super) type Request = (RouteNetlinkMessage, u16);

/// Makes an interface, up or not as wanted. A bridge's MTU and every alias come by the message after (`settle`).
/// `underlay` is the index of a VXLAN device's underlay, `sandbox` the namespace its veth peer is born in.
pub(super) fn create(link: &Link, underlay: Option<u32>, sandbox: Option<RawFd>) -> Request {
    let mut message = named(link);
    message.attributes.extend(link.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    if !matches!(link.kind, LinkKind::Bridge) {
        message.attributes.extend(link.mtu.map(|mtu| LinkAttribute::Mtu(mtu.bytes())));
    }
    let (kind, data) = match &link.kind {
        LinkKind::Bridge => (InfoKind::Bridge, vlan_filtering(link)),
        LinkKind::Vxlan(vxlan) => (InfoKind::Vxlan, Some(InfoData::Vxlan(vxlan_attributes(vxlan, underlay)))),
        LinkKind::Ipip(ipip) => (InfoKind::IpIp, Some(ipip::data(ipip))),
        LinkKind::Veth { peer } => {
            let peer = peer.as_ref().map(|peer| InfoVeth::Peer(peer_message(peer, sandbox)));
            (InfoKind::Veth, peer.map(InfoData::Veth))
        }
        LinkKind::Wireguard => (InfoKind::Wireguard, None),
        // Never asked for: a given link is only settled.
        LinkKind::Given => (InfoKind::Other(String::new()), None),
    };
    let mut place = vec![LinkInfo::Kind(kind)];
    place.extend(data.map(LinkInfo::Data));
    message.attributes.push(LinkAttribute::LinkInfo(place));
    (RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Whether creation leaves something for `settle`.
pub(super) fn needs_settling(link: &Link) -> bool {
    link.alias.is_some() || (matches!(link.kind, LinkKind::Bridge) && link.mtu.is_some())
}

/// Sets what is wanted of an interface that exists: MTU, MAC, alias, up.
///
/// A bridge's MTU is set here even right after it was made, because only a set MTU stays when ports with other MTUs
/// come (net/bridge/br_if.c `br_mtu_auto_adjust`).
pub(super) fn settle(link: &Link, what: Settle) -> Request {
    let mut message = named(link);
    let everything = what == Settle::Everything;
    if everything {
        message.attributes.extend(link.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    } else {
        // Up already.
        message.header = LinkHeader::default();
    }
    if everything || matches!(link.kind, LinkKind::Bridge) {
        message.attributes.extend(link.mtu.map(|mtu| LinkAttribute::Mtu(mtu.bytes())));
    }
    message.attributes.extend(link.alias.as_ref().map(|alias| LinkAttribute::IfAlias(alias.clone())));
    (RouteNetlinkMessage::SetLink(message), 0)
}

/// The module that makes interfaces of a kind, and what the kernel's configuration calls it.
pub(super) fn module(kind: &LinkKind) -> Option<(&'static str, &'static str)> {
    match kind {
        LinkKind::Bridge => Some(("bridge", "CONFIG_BRIDGE")),
        LinkKind::Vxlan(_) => Some(("vxlan", "CONFIG_VXLAN")),
        LinkKind::Ipip(_) => Some(("ipip", "CONFIG_NET_IPIP")),
        LinkKind::Veth { .. } => Some(("veth", "CONFIG_VETH")),
        LinkKind::Wireguard => Some(("wireguard", "CONFIG_WIREGUARD")),
        LinkKind::Given => None,
    }
}

/// What `settle` sets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Settle {
    /// Only what creation cannot set.
    AfterCreation,
    /// All that is wanted.
    Everything,
}

/// Makes a bridge that exists keep VLANs apart, if that is wanted. Only NEWLINK looks at what is peculiar to a kind.
pub(super) fn settle_kind(link: &Link) -> Option<Request> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(link.name.to_string()));
    let data = vlan_filtering(link)?;
    message
        .attributes
        .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)]));
    Some((RouteNetlinkMessage::NewLink(message), 0))
}

fn vlan_filtering(link: &Link) -> Option<InfoData> {
    link.modes.vlan_filtering.then(|| InfoData::Bridge(vec![InfoBridge::VlanFiltering(true)]))
}

/// Deletes an interface.
pub(super) fn delete(name: LinkName) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_string()));
    (RouteNetlinkMessage::DelLink(message), 0)
}

/// A message about an interface by name, that sets it up if wanted.
fn named(link: &Link) -> LinkMessage {
    let mut message = LinkMessage::default();
    let up = if link.up { LinkFlags::Up } else { LinkFlags::empty() };
    let promiscuous = if link.modes.promiscuous { LinkFlags::Promisc } else { LinkFlags::empty() };
    message.header.flags = up | promiscuous;
    message.header.change_mask = message.header.flags;
    message.attributes.push(LinkAttribute::IfName(link.name.to_string()));
    message
}

/// The attributes that Go flannel's netlink library sends (upstream: pkg/backend/vxlan/device.go), so that the device
/// is the same, and either of the two finds the other's compatible.
fn vxlan_attributes(vxlan: &Vxlan, underlay: Option<u32>) -> Vec<InfoVxlan> {
    let mut attributes = vec![InfoVxlan::Id(vxlan.vni.id())];
    attributes.extend(underlay.map(InfoVxlan::Link));
    attributes.push(match vxlan.local {
        std::net::IpAddr::V4(v4) => InfoVxlan::Local(v4),
        std::net::IpAddr::V6(v6) => InfoVxlan::Local6(v6),
    });
    attributes.extend([
        InfoVxlan::Ttl(0),
        InfoVxlan::Tos(0),
        InfoVxlan::Learning(vxlan.learning),
        InfoVxlan::Proxy(false),
        InfoVxlan::Rsc(false),
        InfoVxlan::L2Miss(false),
        InfoVxlan::L3Miss(false),
        InfoVxlan::UDPZeroCsumTX(false),
        InfoVxlan::UDPZeroCsumRX(false),
        InfoVxlan::Port(vxlan.port.number()),
    ]);
    if vxlan.gbp {
        attributes.push(InfoVxlan::Gbp);
    }
    attributes
}

/// The peer must not be set up in the message that makes it: the kernel answers ENOTCONN.
fn peer_message(peer: &VethPeer, sandbox: Option<RawFd>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(peer.name.to_string()));
    message.attributes.extend(peer.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    message.attributes.extend(peer.mtu.map(|mtu| LinkAttribute::Mtu(mtu.bytes())));
    if peer.in_sandbox {
        message.attributes.extend(sandbox.map(LinkAttribute::NetNsFd));
    }
    message
}
