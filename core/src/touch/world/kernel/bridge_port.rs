//! Interfaces on bridges: enslaving, hairpin and isolation, release.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoBridgePort, InfoPortData, InfoPortKind, LinkAttribute, LinkInfo, LinkMessage,
};

use super::link::{Request, Seen};
use crate::words::fact::BridgePort;
use crate::words::name::LinkName;

/// The fact, if the interface is a bridge's port.
pub(super) fn fact(seen: &Seen, name_of: impl Fn(u32) -> Option<LinkName>) -> Option<BridgePort> {
    let modes = seen.port?;
    let (hairpin, isolated) = (modes.hairpin, modes.isolated);
    Some(BridgePort { link: seen.name, bridge: name_of(seen.master?)?, hairpin, isolated })
}

/// Puts the interface on the bridge with this index.
pub(super) fn join(port: &BridgePort, bridge: u32) -> Request {
    controlled_by(port.link, bridge)
}

/// Sets the modes that are asked for. A second message: the kernel looks for the port's bridge before it enslaves
/// (net/core/rtnetlink.c `rtnl_newlink`).
pub(super) fn modes(port: &BridgePort) -> Option<Request> {
    let hairpin = port.hairpin.then_some(InfoBridgePort::HairpinMode(true));
    let isolated = port.isolated.then_some(InfoBridgePort::Isolated(true));
    let mut mode = named(port.link);
    mode.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(hairpin.into_iter().chain(isolated).collect())),
    ]));
    // Only NEWLINK looks at a port's attributes; without NLM_F_CREATE it changes what is there.
    (port.hairpin || port.isolated).then_some((RouteNetlinkMessage::NewLink(mode), 0))
}

/// Takes the interface off its bridge.
pub(super) fn leave(port: &BridgePort) -> Request {
    controlled_by(port.link, 0)
}

fn controlled_by(link: LinkName, bridge: u32) -> Request {
    let mut message = named(link);
    message.attributes.push(LinkAttribute::Controller(bridge));
    (RouteNetlinkMessage::SetLink(message), 0)
}

fn named(link: LinkName) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(link.to_string()));
    message
}
