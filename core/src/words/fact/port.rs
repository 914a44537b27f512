//! Interfaces on bridges: where they are, in which VLANs, and what may come from them.

use std::collections::BTreeMap;

use super::super::addr::Mac;
use super::super::name::LinkName;

/// An interface's place on a bridge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BridgePort {
    /// The port.
    pub link: LinkName,
    /// The bridge.
    pub bridge: LinkName,
    /// Frames may leave by the port they came in by. When not asked for, it is let be.
    pub hairpin: bool,
    /// Frames do not go between this port and others that are isolated. When not asked for, it is let be.
    pub isolated: bool,
}

/// The VLANs that a bridge's port is in; others that it is in are let be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortVlans {
    /// The port.
    pub link: LinkName,
    /// The VLANs by number, 1 to 4094.
    pub members: BTreeMap<u16, VlanMember>,
    /// Not in VLAN 1, which every port joins by itself.
    pub not_default: bool,
}

/// How a port is in a VLAN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VlanMember {
    /// Frames come and go without a tag, and untagged ones belong to this VLAN (`pvid untagged`).
    Access,
    /// Frames go without a tag (`untagged`).
    Untagged,
    /// Untagged frames that come belong to it, and they go with a tag (`pvid`).
    Native,
    /// Frames come and go with a tag.
    Tagged,
}

/// Frames that come from a bridge's port are dropped unless this is their source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Guard {
    /// The port.
    pub link: LinkName,
    /// The only source it may use.
    pub mac: Mac,
}

impl BridgePort {
    /// Whoever made the port chose its modes; only a plan that needs one asks.
    pub(super) fn satisfied_by(&self, have: &Self) -> bool {
        let modes = (have.hairpin || !self.hairpin) && (have.isolated || !self.isolated);
        self.link == have.link && self.bridge == have.bridge && modes
    }
}

impl PortVlans {
    /// The VLAN that every port of a bridge joins by itself.
    pub const DEFAULT: u16 = 1;

    pub(super) fn satisfied_by(&self, have: &Self) -> bool {
        let inside = |(vlan, member): (&u16, &VlanMember)| have.members.get(vlan) == Some(member);
        self.link == have.link
            && self.members.iter().all(inside)
            && (!self.leaves_default() || !have.members.contains_key(&Self::DEFAULT))
    }

    /// Whether the port has to leave the VLAN that it joined by itself.
    pub fn leaves_default(&self) -> bool {
        self.not_default && !self.members.contains_key(&Self::DEFAULT)
    }
}
