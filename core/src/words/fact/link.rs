//! Interfaces.

use std::net::{IpAddr, Ipv4Addr};

use super::super::addr::Mac;
use super::super::name::LinkName;
use super::super::units::{Mtu, Port, Vni};

/// An interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Name.
    pub name: LinkName,
    /// What it is.
    pub kind: LinkKind,
    /// Largest packet.
    pub mtu: Option<Mtu>,
    /// Ethernet address.
    pub mac: Option<Mac>,
    /// Mark of the owner in the interface's alias; tells our old devices from those of others.
    pub alias: Option<String>,
    /// Administratively up.
    pub up: bool,
    /// What else it does.
    pub modes: LinkModes,
}

/// What an interface does only when asked to. A mode that is not asked for is let be.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct LinkModes {
    /// Takes frames that are not for it.
    pub promiscuous: bool,
    /// Of a bridge: keeps VLANs apart.
    pub vlan_filtering: bool,
}

/// Kinds of interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkKind {
    /// A bridge.
    Bridge,
    /// A VXLAN device with static entries only.
    Vxlan(Vxlan),
    /// An IPIP device.
    Ipip(Ipip),
    /// One end of a veth pair.
    Veth {
        /// What the other end is made as, when we make the pair. Never read back: the other end may be in another
        /// namespace.
        peer: Option<VethPeer>,
    },
    /// A WireGuard device.
    Wireguard,
    /// Something that exists by itself in a namespace (`lo`) or by the program that holds it open (a TUN device): never
    /// created, only set up.
    Given,
}

/// A VXLAN device's fixed attributes: a change of any of them needs a new device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vxlan {
    /// Network identifier.
    pub vni: Vni,
    /// Destination port.
    pub port: Port,
    /// Outer source address.
    pub local: IpAddr,
    /// The interface encapsulated packets leave by.
    pub underlay: LinkName,
    /// Learn addresses from traffic.
    pub learning: bool,
    /// Carry group policy (RFC draft-smith-vxlan-group-policy).
    pub gbp: bool,
}

/// An IPIP device (RFC 2003) that sends to the gateway of each route: no fixed remote address, TTL of the inner packet, no
/// path MTU discovery of its own (the outer packet has "don't fragment" where the inner one has it).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ipip {
    /// Outer source address. None stands for a device that has any of the above otherwise, which we never make.
    pub local: Option<Ipv4Addr>,
}

/// The other end of a veth pair, as it is born.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VethPeer {
    /// Name.
    pub name: LinkName,
    /// Ethernet address.
    pub mac: Option<Mac>,
    /// Largest packet.
    pub mtu: Option<Mtu>,
    /// Born in the container's namespace rather than beside its peer.
    pub in_sandbox: bool,
}

impl Link {
    pub(super) fn satisfied_by(&self, have: &Self) -> bool {
        self.kind.same_device(&have.kind)
            && self.name == have.name
            && (self.mtu.is_none() || self.mtu == have.mtu)
            && (self.mac.is_none() || self.mac == have.mac)
            && (self.alias.is_none() || self.alias == have.alias)
            && (!self.up || have.up)
            && (!self.modes.promiscuous || have.modes.promiscuous)
            && (!self.modes.vlan_filtering || have.modes.vlan_filtering)
    }

    /// Whether the two cannot exist at the same time although their names differ: the kernel refuses a second VXLAN
    /// device with the same VNI and port (drivers/net/vxlan/vxlan_core.c `vxlan_vni_in_use`), and a second IPIP device with
    /// the same local and remote address (net/ipv4/ip_tunnel.c `ip_tunnel_find`).
    pub fn excludes(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (LinkKind::Vxlan(a), LinkKind::Vxlan(b)) => {
                self.name != other.name
                    && a.vni == b.vni
                    && a.port == b.port
                    && a.local.is_ipv4() == b.local.is_ipv4()
            }
            (LinkKind::Ipip(a), LinkKind::Ipip(b)) => {
                self.name != other.name && a.local.is_some() && a.local == b.local
            }
            _ => false,
        }
    }
}

impl LinkKind {
    /// Whether a device of the kind `have` can become this one without being made anew.
    pub fn same_device(&self, have: &Self) -> bool {
        match (self, have) {
            (Self::Veth { .. }, Self::Veth { .. }) | (Self::Given, _) => true,
            (want, have) => want == have,
        }
    }
}
