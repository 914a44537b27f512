//! Address families, prefixes, interface addresses and MACs: v4 and v6 as one thing.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};

/// An address family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Both, IPv4 first.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// Bits in an address: 32 or 128.
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// What is wrong with a written prefix or interface address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddrError {
    /// Not `address/length` at all.
    #[error("{0:?} is not an address with a prefix length (like 10.100.0.0/16)")]
    Syntax(String),
    /// The length does not fit the family.
    #[error("prefix length {len} is longer than {max} bits")]
    Length {
        /// The length given.
        len: u8,
        /// The most the family allows.
        max: u8,
    },
    /// A network was wanted, and the address has bits set behind the prefix.
    #[error("{given} has host bits set; the network is {network}")]
    HostBits {
        /// As given.
        given: String,
        /// The network it lies in.
        network: Prefix,
    },
    /// Not six colon-separated octets.
    #[error("{0:?} is not a MAC address (like 02:42:0a:64:05:02)")]
    Mac(String),
}

/// A network: a base address with no host bits, and a length. Prints as `10.100.0.0/16`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix(IpNetwork);

impl Prefix {
    /// The network with exactly this base; host bits are an error.
    pub fn new(base: IpAddr, len: u8) -> Result<Self, AddrError> {
        let network = Self::containing(base, len)?;
        if network.base() != base {
            return Err(AddrError::HostBits { given: format!("{base}/{len}"), network });
        }
        Ok(network)
    }

    /// The network of this length that `address` lies in; host bits are masked off.
    pub fn containing(address: IpAddr, len: u8) -> Result<Self, AddrError> {
        let max = Family::of(address).bits();
        if len > max {
            return Err(AddrError::Length { len, max });
        }
        let base = from_bits(Family::of(address), to_bits(address) & mask(Family::of(address), len));
        Ok(Self(network_of(base, len)))
    }

    /// The network of one address: /32 or /128.
    pub fn host(address: IpAddr) -> Self {
        Self(network_of(address, Family::of(address).bits()))
    }

    /// All multicast addresses: 224.0.0.0/4 (RFC 5771), ff00::/8 (RFC 4291).
    pub fn multicast(family: Family) -> Self {
        match family {
            Family::V4 => Self(network_of(IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 4)),
            Family::V6 => Self(network_of(IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), 8)),
        }
    }

    /// All addresses by which a host reaches only itself: 127.0.0.0/8 (RFC 1122), ::1 (RFC 4291).
    pub fn loopback(family: Family) -> Self {
        match family {
            Family::V4 => Self(network_of(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8)),
            Family::V6 => Self::host(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        }
    }

    /// Where hosts of one link find each other: fe80::/10 (RFC 4291). IPv4 needs none.
    pub fn link_local(family: Family) -> Option<Self> {
        let base = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0));
        (family == Family::V6).then(|| Self(network_of(base, 10)))
    }

    /// Lowest address.
    pub fn base(&self) -> IpAddr {
        self.0.ip()
    }

    /// Length of the prefix in bits.
    #[expect(clippy::len_without_is_empty, reason = "the length of a prefix is not a count of elements")]
    pub fn len(&self) -> u8 {
        self.0.prefix()
    }

    /// True for 0.0.0.0/0 and ::/0, the default route's destination.
    pub fn is_default(&self) -> bool {
        self.len() == 0
    }

    /// Address family.
    pub fn family(&self) -> Family {
        Family::of(self.base())
    }

    /// Highest address: the broadcast address of an IPv4 subnet.
    pub fn last(&self) -> IpAddr {
        let family = self.family();
        from_bits(family, to_bits(self.base()) | (!mask(family, self.len()) & full(family)))
    }

    /// The n-th address, counted from the base; none outside the network.
    pub fn nth(&self, n: u128) -> Option<IpAddr> {
        let address = from_bits_checked(self.family(), to_bits(self.base()).checked_add(n)?)?;
        self.contains(address).then_some(address)
    }

    /// How far an address of this network lies behind the base; none outside the network.
    pub fn offset(&self, address: IpAddr) -> Option<u128> {
        self.contains(address).then(|| to_bits(address) - to_bits(self.base()))
    }

    /// Whether the address lies in this network.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(address)
    }

    /// Whether every address of `other` lies in this network.
    pub fn covers(&self, other: &Self) -> bool {
        self.len() <= other.len() && self.contains(other.base())
    }

    /// Whether the two share an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// The network of the same length `steps` further on; none past the end of the address space.
    pub fn step(&self, steps: u128) -> Option<Self> {
        let family = self.family();
        let size = 1u128.checked_shl(u32::from(family.bits() - self.len()))?;
        let base = from_bits_checked(family, to_bits(self.base()).checked_add(size.checked_mul(steps)?)?)?;
        Some(Self(network_of(base, self.len())))
    }

    /// How many steps of [`Self::step`] lead to `other`; none if it lies before this one or is of another length or family.
    pub fn steps_to(&self, other: &Self) -> Option<u128> {
        if self.len() != other.len() || self.family() != other.family() {
            return None;
        }
        let distance = to_bits(other.base()).checked_sub(to_bits(self.base()))?;
        // Shifting by all 128 bits is only asked for ::/0, which is 0 steps from itself.
        Some(distance.checked_shr(u32::from(self.family().bits() - self.len())).unwrap_or(0))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base(), self.len())
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Prefix {
    type Err = AddrError;

    /// Strict: `address/length` without host bits.
    fn from_str(text: &str) -> Result<Self, AddrError> {
        let (address, len) = split(text)?;
        Self::new(address, len)
    }
}

impl TryFrom<String> for Prefix {
    type Error = AddrError;
    fn try_from(text: String) -> Result<Self, AddrError> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.to_string()
    }
}

/// An address as an interface holds it, with the length of its subnet: `10.100.5.1/24`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceAddress(IpNetwork);

impl InterfaceAddress {
    /// From an address and the length of its subnet in bits.
    pub fn new(address: IpAddr, len: u8) -> Result<Self, AddrError> {
        let max = Family::of(address).bits();
        if len > max {
            return Err(AddrError::Length { len, max });
        }
        Ok(Self(network_of(address, len)))
    }

    /// The address itself.
    pub fn address(&self) -> IpAddr {
        self.0.ip()
    }

    /// Length of the subnet's prefix in bits.
    #[expect(clippy::len_without_is_empty, reason = "the length of a prefix is not a count of elements")]
    pub fn len(&self) -> u8 {
        self.0.prefix()
    }

    /// The subnet it lies in.
    pub fn prefix(&self) -> Prefix {
        let family = self.family();
        Prefix(network_of(from_bits(family, to_bits(self.address()) & mask(family, self.len())), self.len()))
    }

    /// Address family.
    pub fn family(&self) -> Family {
        Family::of(self.address())
    }
}

impl fmt::Display for InterfaceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address(), self.len())
    }
}

impl fmt::Debug for InterfaceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for InterfaceAddress {
    type Err = AddrError;
    fn from_str(text: &str) -> Result<Self, AddrError> {
        let (address, len) = split(text)?;
        Self::new(address, len)
    }
}

impl TryFrom<String> for InterfaceAddress {
    type Error = AddrError;
    fn try_from(text: String) -> Result<Self, AddrError> {
        text.parse()
    }
}

impl From<InterfaceAddress> for String {
    fn from(address: InterfaceAddress) -> Self {
        address.to_string()
    }
}

/// An Ethernet address. Prints in lower case with colons, as lease values hold it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The MAC of a container or gateway with this address: `0a:58` and the IPv4 address, or `0a:58` and a
    /// fold of the IPv6 address. An address that is used again keeps its MAC, so no neighbour cache is wrong.
    pub fn for_address(address: IpAddr) -> Self {
        let [a, b, c, d] = match address {
            IpAddr::V4(v4) => v4.octets(),
            IpAddr::V6(v6) => {
                let bits = v6.to_bits();
                ((bits ^ (bits >> 32) ^ (bits >> 64) ^ (bits >> 96)) as u32).to_be_bytes()
            }
        };
        Self([0x0a, 0x58, a, b, c, d])
    }

    /// A locally administered unicast MAC out of six random bytes (upstream: pkg/mac/mac.go).
    pub const fn locally_administered(mut random: [u8; 6]) -> Self {
        random[0] = (random[0] & 0xfe) | 0x02;
        Self(random)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = AddrError;
    fn from_str(text: &str) -> Result<Self, AddrError> {
        let wrong = || AddrError::Mac(text.to_owned());
        let mut octets = [0u8; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self(octets))
    }
}

impl TryFrom<String> for Mac {
    type Error = AddrError;
    fn try_from(text: String) -> Result<Self, AddrError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

fn split(text: &str) -> Result<(IpAddr, u8), AddrError> {
    let wrong = || AddrError::Syntax(text.to_owned());
    let (address, len) = text.split_once('/').ok_or_else(wrong)?;
    if len.is_empty() || !len.bytes().all(|b| b.is_ascii_digit()) || (len.len() > 1 && len.starts_with('0')) {
        return Err(wrong());
    }
    Ok((address.parse().map_err(|_| wrong())?, len.parse().map_err(|_| wrong())?))
}

fn to_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn full(family: Family) -> u128 {
    match family {
        Family::V4 => u128::from(u32::MAX),
        Family::V6 => u128::MAX,
    }
}

fn mask(family: Family, len: u8) -> u128 {
    full(family) & !full(family).checked_shr(u32::from(len)).unwrap_or(0)
}

fn from_bits(family: Family, bits: u128) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(bits as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(bits)),
    }
}

fn from_bits_checked(family: Family, bits: u128) -> Option<IpAddr> {
    (bits <= full(family)).then(|| from_bits(family, bits))
}

/// The caller has checked the length, so the fallback (the host's own network) is never taken.
fn network_of(address: IpAddr, len: u8) -> IpNetwork {
    match address {
        IpAddr::V4(v4) => Ipv4Network::new(v4, len).map_or_else(|_| IpNetwork::from(address), IpNetwork::V4),
        IpAddr::V6(v6) => Ipv6Network::new(v6, len).map_or_else(|_| IpNetwork::from(address), IpNetwork::V6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn a_prefix_is_strict_about_host_bits_and_syntax() {
        assert_eq!(
            "10.5.1.7/24".parse::<Prefix>().unwrap_err().to_string(),
            "10.5.1.7/24 has host bits set; the network is 10.5.1.0/24"
        );
        for wrong in
            ["10.5.0.0", "10.5.0.0/", "10.5.0.0/33", "10.5.0.0/016", "010.5.0.0/16", "x/8", "10.5.0.0/+8"]
        {
            assert!(wrong.parse::<Prefix>().is_err(), "{wrong}");
        }
        assert_eq!(prefix("fd42:cafe::/48").to_string(), "fd42:cafe::/48");
    }

    #[test]
    fn arithmetic_stays_inside_the_address_space() {
        assert_eq!(prefix("10.5.0.0/16").last(), "10.5.255.255".parse::<IpAddr>().unwrap());
        assert_eq!(prefix("10.5.1.0/24").nth(1), Some("10.5.1.1".parse().unwrap()));
        assert_eq!(prefix("10.5.1.0/24").nth(256), None);
        assert_eq!(prefix("255.255.255.0/24").step(1), None);
        assert_eq!(prefix("10.5.1.0/24").step(2), Some(prefix("10.5.3.0/24")));
        assert_eq!(
            prefix("::/0").last(),
            "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff".parse::<IpAddr>().unwrap()
        );
        assert_eq!(prefix("::/0").step(1), None);
    }

    #[test]
    fn overlap_is_symmetric_and_by_family() {
        assert!(prefix("10.0.0.0/8").overlaps(&prefix("10.5.0.0/16")));
        assert!(prefix("10.5.0.0/16").overlaps(&prefix("10.0.0.0/8")));
        assert!(!prefix("10.5.0.0/16").overlaps(&prefix("10.6.0.0/16")));
        assert!(!prefix("0.0.0.0/0").overlaps(&prefix("fd00::/8")));
    }

    #[test]
    fn a_mac_follows_from_the_address() {
        assert_eq!(Mac::for_address("10.100.5.2".parse().unwrap()).to_string(), "0a:58:0a:64:05:02");
        assert_eq!("76:E6:39:1b:26:de".parse::<Mac>().unwrap().to_string(), "76:e6:39:1b:26:de");
        assert!("76:e6:39:1b:26".parse::<Mac>().is_err());
        assert_eq!(Mac::locally_administered([0xff; 6]).0[0], 0xfe);
    }
}
