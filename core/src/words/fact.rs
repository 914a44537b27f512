//! The fact: one thing that is true of a kernel, or should be; and the difference between two sets of them.
//!
//! A fact prints as the iproute2 (or nft) line that would make it true. That one `Display` serves the golden tests, the
//! log, the documentation and `plan`.

mod display;
mod facts;
mod link;
mod policy;
mod port;
mod route;
pub mod shared_chain;
mod tally;
mod tunnel_host;

use std::net::IpAddr;
use std::sync::Arc;

use super::addr::{InterfaceAddress, Mac, Prefix};
use super::name::LinkName;
use super::rule::{Table, TableName};
use super::wireguard::{PublicKey, WireguardDevice, WireguardPeer};

pub use facts::{Change, Conflict, Facts, diff};
pub use link::{Ipip, Link, LinkKind, LinkModes, VethPeer, Vxlan};
pub use policy::{Policy, PolicyDirection};
pub use port::{BridgePort, Guard, PortVlans, VlanMember};
pub use route::{Blackhole, Route, RouteExtras, RouteProtocol, RouteScope, RouteTable};
use shared_chain::{ChainName, SharedChain};
pub use tally::{Rest, Tally};
pub use tunnel_host::TunnelHost;

/// One thing that is true of a kernel, or should be. Holds only fields that we set; a `None` in a desired fact means
/// that any value will do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fact {
    /// A kernel setting.
    Sysctl(Sysctl),
    /// An interface.
    Link(Box<Link>),
    /// An interface's place on a bridge.
    BridgePort(BridgePort),
    /// The VLANs that a bridge's port is in.
    PortVlans(PortVlans),
    /// Frames from a bridge's port carry one source MAC only.
    Guard(Guard),
    /// An address of an interface.
    Address(Address),
    /// A permanent neighbor entry.
    Neighbor(Neighbor),
    /// A forwarding database entry of a VXLAN device.
    Forward(Forward),
    /// Our rules in one of upstream's chains.
    SharedChain(Box<SharedChain>),
    /// What a WireGuard device is told about itself.
    WireguardDevice(WireguardDevice),
    /// A peer of a WireGuard device.
    WireguardPeer(Box<WireguardPeer>),
    /// An nftables table of ours.
    Table(Box<Table>),
    /// A tunnel takes packets from an address.
    TunnelHost(TunnelHost),
    /// Traffic from and to a network is accepted by the FORWARD chain that iptables keeps, through our chain
    /// FLANNEL-FWD in it: another table's accept does not outweigh a drop there.
    Accept(Accept),
    /// A policy of the kernel's IPsec.
    Policy(Policy),
    /// A route.
    Route(Route),
    /// Packets to a destination go nowhere, unless a better route takes them.
    Blackhole(Blackhole),
}

/// What a fact is about. **The order of the variants is the order in which the kernel wants them**: creation ascends,
/// deletion descends.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Key {
    /// A setting of the whole host, by path below /proc/sys. What makes the host forward (true) comes last: an uplink that
    /// follows router advertisements must be told before that to go on, or the host loses its default route.
    HostSysctl(bool, String),
    /// An interface by name.
    Link(LinkName),
    /// A setting of one interface.
    LinkSysctl(LinkName, String),
    /// An interface on a bridge.
    BridgePort(LinkName),
    /// VLANs of an interface on a bridge.
    PortVlans(LinkName),
    /// Source MAC of what comes from an interface on a bridge.
    Guard(LinkName),
    /// An address on an interface.
    Address(LinkName, InterfaceAddress),
    /// A neighbor on an interface.
    Neighbor(LinkName, IpAddr),
    /// A MAC behind a VXLAN device.
    Forward(LinkName, Mac),
    /// A chain of upstream's. Before the tables: whoever moves from one to the other is never without rules.
    SharedChain(ChainName),
    /// Key and port of a WireGuard device.
    WireguardDevice(LinkName),
    /// A peer of a WireGuard device.
    WireguardPeer(LinkName, PublicKey),
    /// A table.
    Table(TableName),
    /// An address in a tunnel's guard, by the guard's table. Before the routes: whoever is sent something may answer.
    TunnelHost(Arc<TableName>, IpAddr),
    /// A network in the FORWARD chain.
    Accept(Prefix),
    /// Packets of a direction, from a subnet to another.
    Policy(PolicyDirection, Prefix, Prefix),
    /// A route: the kernel tells routes apart by table, destination and metric. Connected routes (false) come before
    /// those through a gateway (true).
    Route(bool, RouteTable, Prefix, u32),
    /// A destination whose packets go nowhere.
    Blackhole(Prefix),
}

/// A kernel setting under /proc/sys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sysctl {
    /// The interface it belongs to, when it comes and goes with one.
    pub link: Option<LinkName>,
    /// Path below /proc/sys, like `net/ipv4/ip_forward`.
    pub path: String,
    /// Value as the kernel prints it.
    pub value: String,
}

/// An address of an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    /// The interface.
    pub link: LinkName,
    /// Address and prefix length.
    pub address: InterfaceAddress,
    /// Ask the kernel not to make the subnet's route by itself. Counts at creation only.
    pub no_prefix_route: bool,
    /// IPv6: not to be used before nobody objects (duplicate address detection). Counts at creation only.
    pub detect_duplicates: bool,
}

/// A permanent neighbor entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Neighbor {
    /// The interface.
    pub link: LinkName,
    /// Whose.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// A VXLAN forwarding entry: frames for `mac` go to `remote`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forward {
    /// The VXLAN device.
    pub link: LinkName,
    /// Inner destination.
    pub mac: Mac,
    /// Outer destination.
    pub remote: IpAddr,
}

/// Accept a network in FORWARD of iptables (ip6tables for an IPv6 network).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Accept {
    /// The network's CIDR.
    pub cidr: Prefix,
}

impl Fact {
    /// What this fact is about.
    pub fn key(&self) -> Key {
        match self {
            Self::Sysctl(Sysctl { link: None, path, .. }) => {
                Key::HostSysctl(path.ends_with("/forwarding"), path.clone())
            }
            Self::Sysctl(Sysctl { link: Some(link), path, .. }) => Key::LinkSysctl(*link, path.clone()),
            Self::Link(link) => Key::Link(link.name),
            Self::BridgePort(port) => Key::BridgePort(port.link),
            Self::PortVlans(vlans) => Key::PortVlans(vlans.link),
            Self::Guard(guard) => Key::Guard(guard.link),
            Self::Address(address) => Key::Address(address.link, address.address),
            Self::Neighbor(neighbor) => Key::Neighbor(neighbor.link, neighbor.ip),
            Self::Forward(forward) => Key::Forward(forward.link, forward.mac),
            Self::SharedChain(chain) => Key::SharedChain(chain.name),
            Self::WireguardDevice(device) => Key::WireguardDevice(device.link),
            Self::WireguardPeer(peer) => Key::WireguardPeer(peer.link, peer.key),
            Self::Table(table) => Key::Table(table.name.clone()),
            Self::TunnelHost(host) => Key::TunnelHost(host.table.clone(), host.address),
            Self::Accept(accept) => Key::Accept(accept.cidr),
            Self::Policy(policy) => Key::Policy(policy.direction, policy.source, policy.destination),
            Self::Route(route) => {
                Key::Route(route.via.is_some(), route.extras.table, route.destination, route.metric)
            }
            Self::Blackhole(blackhole) => Key::Blackhole(blackhole.destination),
        }
    }

    /// The interface without which the fact cannot be true, if any.
    pub fn link(&self) -> Option<LinkName> {
        match self {
            Self::Sysctl(sysctl) => sysctl.link,
            Self::Link(link) => Some(link.name),
            Self::BridgePort(port) => Some(port.link),
            Self::PortVlans(vlans) => Some(vlans.link),
            Self::Guard(guard) => Some(guard.link),
            Self::Address(address) => Some(address.link),
            Self::Neighbor(neighbor) => Some(neighbor.link),
            Self::Forward(forward) => Some(forward.link),
            Self::WireguardDevice(device) => Some(device.link),
            Self::WireguardPeer(peer) => Some(peer.link),
            Self::Route(route) => Some(route.link),
            Self::SharedChain(_)
            | Self::Table(_)
            | Self::TunnelHost(_)
            | Self::Accept(_)
            | Self::Policy(_)
            | Self::Blackhole(_) => None,
        }
    }

    /// A short word for the kind, for counters: `route`, `link`...
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Sysctl(_) => "sysctl",
            Self::Link(_) => "link",
            Self::BridgePort(_) => "bridge_port",
            Self::PortVlans(_) => "port_vlans",
            Self::Guard(_) => "guard",
            Self::Address(_) => "address",
            Self::Neighbor(_) => "neighbor",
            Self::Forward(_) => "forward",
            Self::SharedChain(_) => "chain",
            Self::WireguardDevice(_) => "wireguard_device",
            Self::WireguardPeer(_) => "wireguard_peer",
            Self::Table(table) if TunnelHost::are_in(&table.name) => TunnelHost::TABLE_KIND,
            Self::Table(_) => "table",
            Self::TunnelHost(_) => TunnelHost::KIND,
            Self::Accept(_) => "accept",
            Self::Policy(_) => "policy",
            Self::Route(_) => "route",
            Self::Blackhole(_) => "blackhole",
        }
    }

    /// Whether what was observed under the same key is what this desired fact asks for.
    pub fn satisfied_by(&self, observed: &Self) -> bool {
        match (self, observed) {
            (Self::Link(want), Self::Link(have)) => want.satisfied_by(have),
            (Self::Address(want), Self::Address(have)) => {
                want.link == have.link && want.address == have.address
            }
            (Self::BridgePort(want), Self::BridgePort(have)) => want.satisfied_by(have),
            (Self::PortVlans(want), Self::PortVlans(have)) => want.satisfied_by(have),
            (Self::Route(want), Self::Route(have)) => want.satisfied_by(have),
            (Self::WireguardPeer(want), Self::WireguardPeer(have)) => want.satisfied_by(have),
            (want, have) => want == have,
        }
    }
}
