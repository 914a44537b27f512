//! Routes, to somewhere and to nowhere.

use std::net::IpAddr;

use super::super::addr::Prefix;
use super::super::name::LinkName;

/// A route that throws packets away. Its metric is so high that any other route to the same destination comes first: the
/// bridge's, while it is up. Marked with our protocol number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blackhole {
    /// Where to.
    pub destination: Prefix,
}

impl Blackhole {
    /// Its metric.
    pub const METRIC: u32 = 65_535;
}

/// Who put a route there (rtm_protocol).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RouteProtocol(pub u8);

impl RouteProtocol {
    /// `RTPROT_KERNEL`: it came with an address, and goes with that.
    pub const KERNEL: Self = Self(2);
    /// `RTPROT_BOOT`, what upstream and a plain `ip route add` write.
    pub const BOOT: Self = Self(3);
    /// Ours: marks routes that do not leave by a device of ours (docs/adr: route protocol number).
    pub const FLANNEL: Self = Self(70);
}

/// Scope of a route.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RouteScope {
    /// `RT_SCOPE_UNIVERSE`
    Global,
    /// `RT_SCOPE_LINK`
    Link,
    /// Any other, by its number.
    Other(u8),
}

impl RouteScope {
    const LINK: u8 = 253;

    /// That of a number (uapi/linux/rtnetlink.h `rt_scope_t`).
    pub const fn of(number: u8) -> Self {
        match number {
            0 => Self::Global,
            Self::LINK => Self::Link,
            other => Self::Other(other),
        }
    }

    /// Its number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Global => 0,
            Self::Link => Self::LINK,
            Self::Other(number) => number,
        }
    }
}

/// A table of routes, by number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RouteTable(pub u32);

impl RouteTable {
    /// The one that is looked at without further rules (`RT_TABLE_MAIN`).
    pub const MAIN: Self = Self(254);
}

impl Default for RouteTable {
    fn default() -> Self {
        Self::MAIN
    }
}

/// What few routes have.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RouteExtras {
    /// Its table.
    pub table: RouteTable,
    /// Largest packet to there, in bytes. None is let be.
    pub mtu: Option<u32>,
    /// Largest TCP segment that is announced to there, in bytes. None is let be.
    pub advmss: Option<u32>,
}

/// A unicast route.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// Destination.
    pub destination: Prefix,
    /// Gateway; none for a directly connected destination.
    pub via: Option<IpAddr>,
    /// Interface.
    pub link: LinkName,
    /// Take the gateway for reachable without a route to it.
    pub onlink: bool,
    /// Metric; 0 is none for IPv4. IPv6 always has one, and the kernel fills in 1024 (uapi/linux/ipv6_route.h).
    pub metric: u32,
    /// Scope.
    pub scope: RouteScope,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Owner.
    pub protocol: RouteProtocol,
    /// What few routes have.
    pub extras: RouteExtras,
}

impl Route {
    pub(super) fn satisfied_by(&self, have: &Self) -> bool {
        let RouteExtras { mtu, advmss, .. } = have.extras;
        let extras = RouteExtras {
            mtu: self.extras.mtu.or(mtu),
            advmss: self.extras.advmss.or(advmss),
            ..self.extras
        };
        Self { extras, ..self.clone() } == *have
    }

    /// Whether the old route must go before this one can come: the kernel refuses an IPv6 gateway as on-link while a route
    /// to it leaves by another link (net/ipv6/route.c `ip6_route_check_nh_onlink`), and the route to a peer's
    /// subnet is a route to the gateway in it.
    pub fn makes_way(&self, old: &Self) -> bool {
        self.onlink
            && self.link != old.link
            && self.via.is_some_and(|via| via.is_ipv6() && old.destination.contains(via))
    }
}
