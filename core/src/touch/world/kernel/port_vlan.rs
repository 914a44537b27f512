//! The VLANs that ports of bridges are in.

use std::collections::BTreeMap;
use std::io;

use netlink_packet_route::link::{
    AfSpecBridge, BridgeVlanInfo, BridgeVlanInfoFlags, LinkAttribute, LinkExtentMask, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::link::Request;
use super::netlink::{Refusal, Socket, attributes, u32_at};
use crate::words::fact::{PortVlans, VlanMember};

/// uapi/linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
/// `struct ifinfomsg`
const HEADER: usize = 16;
/// uapi/linux/if_link.h and if_bridge.h
const IFLA_AF_SPEC: u16 = 26;
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;

/// A port and its VLANs as the kernel shows them.
pub(super) struct Seen {
    pub(super) index: u32,
    pub(super) members: BTreeMap<u16, VlanMember>,
}

/// The VLANs of every port of every bridge.
pub(super) fn dump(socket: &mut Socket) -> io::Result<Result<Vec<Seen>, Refusal>> {
    let mut message = LinkMessage::default();
    message.header.interface_family = AddressFamily::Bridge;
    let filter = vec![LinkExtentMask::BrvlanCompressed, LinkExtentMask::SkipStats];
    message.attributes.push(LinkAttribute::ExtMask(filter));
    let found = socket.dump(&RouteNetlinkMessage::GetLink(message), seen)?;
    Ok(match found {
        // A kernel without bridges, or without VLANs on them.
        Err(Refusal { errno: libc::EOPNOTSUPP, .. }) => Ok(Vec::new()),
        found => found,
    })
}

fn seen(kind: u16, body: &[u8]) -> Option<Seen> {
    if kind != RTM_NEWLINK {
        return None;
    }
    let index = u32_at(body, 4)?;
    let mut members = BTreeMap::new();
    let mut first = None;
    let (_, list) = attributes(body.get(HEADER..)?).find(|(kind, _)| *kind == IFLA_AF_SPEC)?;
    for (kind, value) in attributes(list) {
        if kind != IFLA_BRIDGE_VLAN_INFO {
            continue;
        }
        let [flags, vlan] =
            [value.get(0..2)?, value.get(2..4)?].map(|two| two.try_into().map(u16::from_ne_bytes));
        let (flags, vlan) = (BridgeVlanInfoFlags::from_bits_retain(flags.ok()?), vlan.ok()?);
        if flags.contains(BridgeVlanInfoFlags::RangeBegin) {
            first = Some(vlan);
            continue;
        }
        // All of a range are in it in the same way.
        let from = first.take().filter(|_| flags.contains(BridgeVlanInfoFlags::RangeEnd)).unwrap_or(vlan);
        members.extend((from..=vlan).map(|vlan| (vlan, member_of(flags))));
    }
    Some(Seen { index, members })
}

fn member_of(flags: BridgeVlanInfoFlags) -> VlanMember {
    let has = |flag| flags.contains(flag);
    match (has(BridgeVlanInfoFlags::Pvid), has(BridgeVlanInfoFlags::Untagged)) {
        (true, true) => VlanMember::Access,
        (true, false) => VlanMember::Native,
        (false, true) => VlanMember::Untagged,
        (false, false) => VlanMember::Tagged,
    }
}

fn flags_of(member: VlanMember) -> BridgeVlanInfoFlags {
    match member {
        VlanMember::Access => BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged,
        VlanMember::Native => BridgeVlanInfoFlags::Pvid,
        VlanMember::Untagged => BridgeVlanInfoFlags::Untagged,
        VlanMember::Tagged => BridgeVlanInfoFlags::empty(),
    }
}

/// Takes the port with this index out of the VLAN that it joined by itself, if it is not to be in it.
pub(super) fn leave_default(vlans: &PortVlans, index: u32) -> Option<Request> {
    let flags = BridgeVlanInfoFlags::empty();
    let default = BridgeVlanInfo { flags, vid: PortVlans::DEFAULT };
    let message = about(index, vec![default]);
    vlans.leaves_default().then_some((RouteNetlinkMessage::DelLink(message), 0))
}

/// Puts the port with this index into its VLANs; neighbors that are alike go as a range.
pub(super) fn join(vlans: &PortVlans, index: u32) -> Request {
    let mut list: Vec<BridgeVlanInfo> = Vec::new();
    let mut members = vlans.members.iter().map(|(vlan, member)| (*vlan, *member)).peekable();
    while let Some((first, member)) = members.next() {
        let mut last = first;
        // The kernel takes no range of what can be one VLAN only (net/bridge/br_netlink.c `br_process_vlan_info`).
        while member == VlanMember::Tagged
            && let Some((next, _)) =
                members.next_if(|(next, other)| *next == last + 1 && *other == VlanMember::Tagged)
        {
            last = next;
        }
        let flags = flags_of(member);
        match last == first {
            true => list.push(BridgeVlanInfo { flags, vid: first }),
            false => list.extend([
                BridgeVlanInfo { flags: flags | BridgeVlanInfoFlags::RangeBegin, vid: first },
                BridgeVlanInfo { flags: flags | BridgeVlanInfoFlags::RangeEnd, vid: last },
            ]),
        }
    }
    (RouteNetlinkMessage::SetLink(about(index, list)), 0)
}

/// Takes the port with this index out of these VLANs.
pub(super) fn leave(vlans: &PortVlans, index: u32) -> Request {
    let flags = BridgeVlanInfoFlags::empty();
    let list = vlans.members.keys().map(|vid| BridgeVlanInfo { flags, vid: *vid }).collect();
    (RouteNetlinkMessage::DelLink(about(index, list)), 0)
}

fn about(index: u32, list: Vec<BridgeVlanInfo>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.interface_family = AddressFamily::Bridge;
    // These messages are about an index; the kernel does not look at a name here.
    message.header.index = index;
    let list = list.into_iter().map(AfSpecBridge::VlanInfo).collect();
    message.attributes.push(LinkAttribute::AfSpecBridge(list));
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::name::LinkName;

    fn of(members: &[(u16, VlanMember)], not_default: bool) -> PortVlans {
        let members = members.iter().copied().collect();
        PortVlans { link: LinkName::new("v0").unwrap(), members, not_default }
    }

    #[test]
    fn runs_of_tagged_vlans_are_ranges() {
        let tagged = VlanMember::Tagged;
        let vlans = of(&[(5, tagged), (6, tagged), (7, tagged), (9, tagged), (10, VlanMember::Access)], true);
        let (RouteNetlinkMessage::SetLink(message), 0) = join(&vlans, 7) else { panic!("another message") };
        let LinkAttribute::AfSpecBridge(list) = &message.attributes[0] else { panic!("another attribute") };
        let list: Vec<(u16, u16)> = list
            .iter()
            .map(|one| match one {
                AfSpecBridge::VlanInfo(info) => (info.flags.bits(), info.vid),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(list, [(8, 5), (16, 7), (0, 9), (6, 10)]);
        assert_eq!((message.header.index, u8::from(message.header.interface_family)), (7, 7));
        assert!(leave_default(&vlans, 7).is_some());
        assert!(leave_default(&of(&[(1, VlanMember::Access)], true), 7).is_none(), "asked for by number");
    }

    #[test]
    fn ranges_are_read_back() {
        let mut body = vec![0; HEADER];
        body[4] = 7;
        let info = |flags: u16, vlan: u16| {
            let mut bytes = vec![8, 0, 2, 0];
            bytes.extend_from_slice(&flags.to_ne_bytes());
            bytes.extend_from_slice(&vlan.to_ne_bytes());
            bytes
        };
        let list = [info(6, 1), info(8, 5), info(16, 7), info(0, 9)].concat();
        body.extend_from_slice(&(list.len() as u16 + 4).to_ne_bytes());
        body.extend_from_slice(&IFLA_AF_SPEC.to_ne_bytes());
        body.extend(list);
        let seen = seen(RTM_NEWLINK, &body).unwrap();
        let tagged = VlanMember::Tagged;
        let expected = [(1, VlanMember::Access), (5, tagged), (6, tagged), (7, tagged), (9, tagged)];
        assert_eq!((seen.index, seen.members), (7, expected.into()));
    }
}
