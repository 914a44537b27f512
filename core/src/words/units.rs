//! Numbers with a legal range, checked once.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A number outside its range.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} {value} is outside {min}..={max}")]
pub struct OutOfRange {
    /// Name of the quantity.
    pub what: &'static str,
    /// The number given.
    pub value: u64,
    /// Smallest legal.
    pub min: u64,
    /// Largest legal.
    pub max: u64,
}

fn within(what: &'static str, value: u64, min: u64, max: u64) -> Result<u64, OutOfRange> {
    if (min..=max).contains(&value) { Ok(value) } else { Err(OutOfRange { what, value, min, max }) }
}

/// Largest IP packet a link carries, in bytes; 68 (RFC 791) to 65,535.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Mtu(u32);

impl Mtu {
    /// What Ethernet has, and a bridge and a veth pair without any other wish.
    pub const ETHERNET: Self = Self(1500);

    /// Checked.
    pub fn new(bytes: u64) -> Result<Self, OutOfRange> {
        within("MTU", bytes, 68, 65_535).map(|bytes| Self(bytes as u32))
    }

    /// In bytes.
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// What is left for the inner packet.
    pub fn less(self, overhead: Overhead) -> Result<Self, OutOfRange> {
        Self::new(u64::from(self.0.saturating_sub(overhead.0)))
    }
}

impl TryFrom<u64> for Mtu {
    type Error = OutOfRange;
    fn try_from(bytes: u64) -> Result<Self, OutOfRange> {
        Self::new(bytes)
    }
}

impl From<Mtu> for u64 {
    fn from(mtu: Mtu) -> Self {
        Self::from(mtu.0)
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Bytes an encapsulation adds to a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overhead(pub u32);

impl Overhead {
    /// Nothing is added.
    pub const NONE: Self = Self(0);
    /// Outer IPv4 20 (RFC 791, RFC 2003).
    pub const IPIP: Self = Self(20);
    /// UDP 8 (RFC 768), outer IPv4 20 (RFC 791).
    pub const UDP_OVER_V4: Self = Self(8 + 20);
    /// ESP in tunnel mode at its largest, as upstream counts it: outer IPv4 20 (RFC 791), SPI and sequence number 8, IV of AES-CBC 16,
    /// padding 15, its length and the next header 2 (RFC 4303), ICV of SHA-256 16 (RFC 4868).
    pub const ESP: Self = Self(20 + 8 + 16 + 15 + 2 + 16);
    /// As above in UDP 8 (RFC 3948).
    pub const ESP_IN_UDP: Self = Self(Self::ESP.0 + 8);
    /// Inner Ethernet 14 (IEEE 802.3), VXLAN 8 (RFC 7348), UDP 8 (RFC 768), outer IPv4 20 (RFC 791).
    pub const VXLAN_OVER_V4: Self = Self(14 + 8 + 8 + 20);
    /// As above with an outer IPv6 header of 40 (RFC 8200).
    pub const VXLAN_OVER_V6: Self = Self(14 + 8 + 8 + 40);
    /// WireGuard's header and tag 32 (its paper, §5.4.6), UDP 8, outer IPv6 header 40.
    pub const WIREGUARD: Self = Self(32 + 8 + 40);
}

/// A VXLAN network identifier: 24 bits (RFC 7348 §5).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Vni(u32);

impl Vni {
    /// What upstream takes when none is given.
    pub const ONE: Self = Self(1);

    /// Checked.
    pub fn new(id: u64) -> Result<Self, OutOfRange> {
        within("VNI", id, 0, (1 << 24) - 1).map(|id| Self(id as u32))
    }

    /// As a number.
    pub const fn id(self) -> u32 {
        self.0
    }
}

impl TryFrom<u64> for Vni {
    type Error = OutOfRange;
    fn try_from(id: u64) -> Result<Self, OutOfRange> {
        Self::new(id)
    }
}

impl From<Vni> for u64 {
    fn from(vni: Vni) -> Self {
        Self::from(vni.0)
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A UDP or TCP port that is really used: 1..=65,535.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Port(u16);

impl Port {
    /// The kernel's VXLAN port, older than the assigned 4789 (drivers/net/vxlan/vxlan_core.c `vxlan_port`).
    pub const VXLAN: Self = Self(8472);
    /// Upstream's port of the udp backend (pkg/backend/udp).
    pub const UDP_BACKEND: Self = Self(8285);
    /// Upstream's port of the wireguard backend (pkg/backend/wireguard), and of its second device for IPv6.
    pub const WIREGUARD: Self = Self(51_820);
    /// The second one.
    pub const WIREGUARD_V6: Self = Self(51_821);

    /// Checked.
    pub fn new(number: u64) -> Result<Self, OutOfRange> {
        within("port", number, 1, 65_535).map(|number| Self(number as u16))
    }

    /// As a number.
    pub const fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
