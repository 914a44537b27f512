//! Ranges of addresses as host-local's configurations give them (containernetworking/plugins,
//! plugins/ipam/host-local/backend/allocator): an endpoint gets one address of every set, and a set is searched as if its ranges were one.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use crate::words::addr::{Family, InterfaceAddress, Prefix};

/// Why ranges cannot be, or why an address is none of theirs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RangeError {
    /// No room for a gateway and one endpoint.
    #[error(
        "Network {0} too small to allocate from: a gateway and at least one endpoint need a /30 (IPv6: a /126) or larger"
    )]
    TooSmall(Prefix),
    /// A bound of the range is not where it should be.
    #[error("{bound} {address} not in network {subnet}, or beyond the other end of the range")]
    Bound {
        /// `rangeStart` or `rangeEnd`.
        bound: &'static str,
        /// The address given.
        address: IpAddr,
        /// The subnet.
        subnet: Prefix,
    },
    /// The gateway speaks another protocol.
    #[error("gateway {gateway} cannot be that of {subnet}: they are of different families")]
    Gateway {
        /// The gateway.
        gateway: IpAddr,
        /// The subnet.
        subnet: Prefix,
    },
    /// Nothing is left of the range without gateway, network and broadcast address.
    #[error("range {0} has no address for an endpoint")]
    NoRoom(String),
    /// A set without ranges.
    #[error("empty range set")]
    Empty,
    /// IPv4 and IPv6 in one set.
    #[error("mixed address families")]
    Mixed,
    /// Two ranges share an address.
    #[error("subnets {0} and {1} overlap")]
    Overlap(String, String),
    /// Two sets share an address.
    #[error("range set {0} overlaps with {1}")]
    SetsOverlap(usize, usize),
    /// The address asked for is nobody's.
    #[error("requested ip {address} is subnet's {what}")]
    Reserved {
        /// The address.
        address: IpAddr,
        /// What it is.
        what: &'static str,
    },
    /// Every address has an owner.
    #[error("no free address: all {capacity} of {set} are taken")]
    Exhausted {
        /// The set, as it is shown.
        set: String,
        /// How many endpoints it has room for.
        capacity: u128,
    },
}

/// A part of a subnet, both ends included, and the gateway of its endpoints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    subnet: Prefix,
    gateway: IpAddr,
    /// As places in the subnet; both as given, whether an endpoint may have them or not.
    first: u128,
    last: u128,
}

/// A free address, or one that was asked for: what an endpoint's interface gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    /// With the length of its subnet.
    pub address: InterfaceAddress,
    /// The gateway of its range.
    pub gateway: IpAddr,
}

impl Range {
    /// All of a subnet; its gateway is the first address.
    pub fn whole(subnet: Prefix) -> Result<Self, RangeError> {
        Self::new(subnet, None, None, None)
    }

    /// From `start` to `end`; without them from the first to the last address that an interface may have. The gateway need not lie in the
    /// range, nor in the subnet.
    pub fn new(
        subnet: Prefix,
        start: Option<IpAddr>,
        end: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> Result<Self, RangeError> {
        let bits = subnet.family().bits() - subnet.len();
        let usable = 1u128.checked_shl(u32::from(bits)).unwrap_or(u128::MAX);
        let usable_last = match subnet.family() {
            Family::V4 => usable.saturating_sub(2),
            Family::V6 => usable - 1,
        };
        let (Some(first), false) = (subnet.nth(1), bits < 2) else {
            return Err(RangeError::TooSmall(subnet));
        };
        let place = |bound: &'static str, given: Option<IpAddr>, otherwise: u128| match given {
            None => Ok(otherwise),
            Some(address) => subnet.offset(address).ok_or(RangeError::Bound { bound, address, subnet }),
        };
        let range = Self {
            subnet,
            gateway: gateway.unwrap_or(first),
            first: place("rangeStart", start, 1)?,
            last: place("rangeEnd", end, usable_last)?,
        };
        if Family::of(range.gateway) != subnet.family() {
            return Err(RangeError::Gateway { gateway: range.gateway, subnet });
        }
        match (end, start) {
            (Some(address), _) if range.last < range.first => {
                Err(RangeError::Bound { bound: "rangeEnd", address, subnet })
            }
            (None, Some(address)) if range.last < range.first => {
                Err(RangeError::Bound { bound: "rangeStart", address, subnet })
            }
            _ if range.capacity() == 0 => Err(RangeError::NoRoom(range.to_string())),
            _ => Ok(range),
        }
    }

    /// The subnet it is a part of.
    pub fn subnet(&self) -> Prefix {
        self.subnet
    }

    /// The gateway of its endpoints.
    pub fn gateway(&self) -> IpAddr {
        self.gateway
    }

    /// The same as an interface holds it.
    pub fn gateway_address(&self) -> Option<InterfaceAddress> {
        InterfaceAddress::new(self.gateway, self.subnet.len()).ok()
    }

    /// Whether the address lies between its ends.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.subnet.offset(address).is_some_and(|place| (self.first..=self.last).contains(&place))
    }

    /// How many endpoints it has room for.
    pub fn capacity(&self) -> u128 {
        let reserved: BTreeSet<IpAddr> = [self.gateway, self.subnet.base(), self.subnet.last()]
            .into_iter()
            .filter(|address| self.contains(*address) && self.reserved(*address).is_some())
            .collect();
        (self.last - self.first + 1).saturating_sub(reserved.len() as u128)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let ends = |range: &Self| [range.subnet.nth(range.first), range.subnet.nth(range.last)];
        let holds =
            |range: &Self, other: &Self| ends(other).into_iter().flatten().any(|end| range.contains(end));
        holds(self, other) || holds(other, self)
    }

    /// What keeps an address of it from being an endpoint's.
    fn reserved(&self, address: IpAddr) -> Option<&'static str> {
        match address {
            _ if address == self.gateway => Some("gateway"),
            _ if address == self.subnet.base() => Some("network address"),
            IpAddr::V4(_) if address == self.subnet.last() => Some("broadcast address"),
            _ => None,
        }
    }

    fn offer(&self, address: IpAddr) -> Option<Offer> {
        let address = InterfaceAddress::new(address, self.subnet.len()).ok()?;
        Some(Offer { address, gateway: self.gateway })
    }

    /// Addresses between two places, both included.
    fn between(&self, first: u128, last: u128) -> impl Iterator<Item = Offer> + '_ {
        (first..=last)
            .filter_map(|place| self.subnet.nth(place))
            .filter(|address| self.reserved(*address).is_none())
            .filter_map(|address| self.offer(address))
    }
}

/// The subnet if it is all of it, else its two ends.
impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole =
            Self::whole(self.subnet).is_ok_and(|whole| (whole.first, whole.last) == (self.first, self.last));
        match (whole, self.subnet.nth(self.first), self.subnet.nth(self.last)) {
            (false, Some(first), Some(last)) => write!(f, "{first}-{last}"),
            _ => self.subnet.fmt(f),
        }
    }
}

/// Ranges of one family that do not overlap, of which an endpoint gets one address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RangeSet(Vec<Range>);

impl RangeSet {
    /// At least one, all of one family, no two with a common address.
    pub fn new(ranges: Vec<Range>) -> Result<Self, RangeError> {
        let Some(first) = ranges.first() else { return Err(RangeError::Empty) };
        if ranges.iter().any(|range| range.subnet.family() != first.subnet.family()) {
            return Err(RangeError::Mixed);
        }
        for (index, range) in ranges.iter().enumerate() {
            if let Some(other) = ranges.iter().skip(index + 1).find(|other| range.overlaps(other)) {
                return Err(RangeError::Overlap(range.to_string(), other.to_string()));
            }
        }
        Ok(Self(ranges))
    }

    /// All of a subnet.
    pub fn whole(subnet: Prefix) -> Result<Self, RangeError> {
        Self::new(vec![Range::whole(subnet)?])
    }

    /// Its ranges, in the order in which they are searched.
    pub fn ranges(&self) -> &[Range] {
        &self.0
    }

    /// The family of its addresses.
    pub fn family(&self) -> Family {
        self.0.first().map_or(Family::V4, |range| range.subnet.family())
    }

    /// Whether the address lies in one of its ranges.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|range| range.contains(address))
    }

    /// How many endpoints it has room for.
    pub fn capacity(&self) -> u128 {
        self.0.iter().fold(0, |all, range| all.saturating_add(range.capacity()))
    }

    /// How many of these addresses are of its endpoints.
    pub fn taken<'a>(&self, addresses: impl IntoIterator<Item = &'a IpAddr>) -> u128 {
        let here = |address: &&IpAddr| {
            self.0.iter().any(|range| range.contains(**address) && range.reserved(**address).is_none())
        };
        addresses.into_iter().filter(here).count() as u128
    }

    /// An address that was asked for; none if it is not of this set.
    pub fn admit(&self, address: IpAddr) -> Result<Option<Offer>, RangeError> {
        let Some(range) = self.0.iter().find(|range| range.contains(address)) else { return Ok(None) };
        match range.reserved(address) {
            Some(what) => Err(RangeError::Reserved { address, what }),
            None => Ok(range.offer(address)),
        }
    }

    /// The next free address after `last`, through all ranges and round: an address that was given back rests for as long as
    /// others are free. Takes at most one step for each address taken, however large the ranges are.
    pub fn next(&self, last: Option<IpAddr>, taken: &BTreeSet<IpAddr>) -> Result<Offer, RangeError> {
        let from = |last: IpAddr| {
            let (index, range) = self.0.iter().enumerate().find(|(_, range)| range.contains(last))?;
            Some((index, range, range.subnet.offset(last)?))
        };
        let free = |offer: &Offer| !taken.contains(&offer.address.address());
        let all = |ranges: &[Range]| {
            ranges.iter().find_map(|range| range.between(range.first, range.last).find(free))
        };
        let found = match last.and_then(from) {
            None => all(&self.0),
            Some((index, range, place)) => range
                .between(place + 1, range.last)
                .find(free)
                .or_else(|| all(self.0.get(index + 1..).unwrap_or_default()))
                .or_else(|| all(self.0.get(..index).unwrap_or_default()))
                .or_else(|| range.between(range.first, place).find(free)),
        };
        found.ok_or_else(|| RangeError::Exhausted { set: self.to_string(), capacity: self.capacity() })
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            write!(f, "{}{range}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// That no two sets share an address.
pub fn apart(sets: &[RangeSet]) -> Result<(), RangeError> {
    for (index, set) in sets.iter().enumerate() {
        let clash = |other: &RangeSet| set.0.iter().any(|range| other.0.iter().any(|r| r.overlaps(range)));
        if let Some(other) = sets.iter().skip(index + 1).position(clash) {
            return Err(RangeError::SetsOverlap(index, index + 1 + other));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
