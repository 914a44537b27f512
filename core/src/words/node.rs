//! This host as the planners see it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::addr::{Family, InterfaceAddress, Mac, Prefix};
use super::fact::RouteProtocol;
use super::fact::shared_chain::Home;
use super::name::LinkName;
use super::units::Mtu;
use super::wireguard::KeyPair;

/// The interface that carries us to our peers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Uplink {
    /// Name.
    pub link: LinkName,
    /// Largest packet.
    pub mtu: Mtu,
    /// Its IPv4 address with the length of its subnet.
    pub v4: Option<InterfaceAddress>,
    /// Its IPv6 address with the length of its subnet.
    pub v6: Option<InterfaceAddress>,
}

impl Uplink {
    /// Its address of a family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
        .map(|address| address.address())
    }
}

/// What is made once and kept: a restart must change nothing on the wire.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// MAC of our IPv4 VXLAN device.
    pub vtep_mac: Mac,
    /// MAC of our IPv6 VXLAN device.
    pub vtep_mac_v6: Mac,
    /// Keys of our WireGuard devices; only with that backend.
    pub wireguard: Option<Box<KeyPair>>,
}

/// A route of the main table that is not ours.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostRoute {
    /// Destination.
    pub destination: Prefix,
    /// Gateway; none if directly connected.
    pub via: Option<IpAddr>,
    /// Interface; none for multipath and for blackholes.
    pub link: Option<LinkName>,
    /// Whether that interface is a bridge.
    pub bridge: bool,
    /// Who made it.
    pub protocol: RouteProtocol,
    /// True for `RT_SCOPE_LINK`.
    pub scope_link: bool,
}

/// The iptables of this host.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Iptables {
    /// Which tables the commands `iptables` and `ip6tables` write; nothing where there is no such command.
    pub written: BTreeMap<Family, Home>,
    /// Whose chain FORWARD may drop what it does not know: by its policy, or by a rule of somebody else's.
    pub dropping: BTreeSet<(Family, Home)>,
    /// Whether they know `--random-fully` (1.6.2).
    pub fully_random: bool,
}

/// This host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// The interface that carries us.
    pub uplink: Uplink,
    /// How peers reach us; may differ from the uplink's address (NAT).
    pub public_v4: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub public_v6: Option<Ipv6Addr>,
    /// What we keep.
    pub identity: Identity,
    /// Routes of others, for direct routing and for overlaps.
    pub routes: Vec<HostRoute>,
    /// The families whose packets pass a FORWARD chain of iptables: where it drops, no accept of ours elsewhere helps.
    pub forward_chains: BTreeSet<Family>,
    /// Its iptables.
    pub iptables: Iptables,
    /// Whether the kernel has nf_tables.
    pub nftables: bool,
    /// Whether the kernel has IPv6 at all (`/proc/sys/net/ipv6/conf` exists: it does not after `ipv6.disable=1`).
    pub ipv6: bool,
    /// Whether the uplink follows router advertisements and would stop doing so when the host begins to forward IPv6.
    pub ra_at_risk: bool,
    /// Whether the kernel has WireGuard. Where it has none, this program is the device.
    pub wireguard: bool,
    /// Host ends of our endpoints of this network that exist now.
    pub ports: BTreeSet<LinkName>,
}

impl Node {
    /// Whether packets to `address` leave by the uplink without a gateway: longest prefix of the host's own routes.
    pub fn reaches_directly(&self, address: IpAddr) -> bool {
        self.routes
            .iter()
            .filter(|route| route.destination.contains(address))
            .max_by_key(|route| route.destination.len())
            .is_some_and(|route| route.via.is_none() && route.link == Some(self.uplink.link))
    }
}
