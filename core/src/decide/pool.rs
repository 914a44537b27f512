//! The addresses of a node's subnet that endpoints may have, and which one is next.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::words::addr::{Family, InterfaceAddress, Prefix};

/// Why a pool cannot be, or why an address is none of its.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PoolError {
    /// No room for a gateway and one endpoint.
    #[error(
        "subnet {0} is too small: a gateway and at least one endpoint need a /30 (IPv6: a /126) or larger"
    )]
    TooSmall(Prefix),
    /// The gateway lies elsewhere, or on an address that no interface may have.
    #[error("{gateway} cannot be the gateway of {subnet}")]
    Gateway {
        /// The subnet.
        subnet: Prefix,
        /// The gateway asked for.
        gateway: IpAddr,
    },
    /// The address asked for is not in the subnet.
    #[error("{address} is not in this node's subnet {subnet}")]
    Outside {
        /// The subnet.
        subnet: Prefix,
        /// The address asked for.
        address: IpAddr,
    },
    /// The address asked for is the gateway's, or the network's or broadcast address.
    #[error("{address} cannot be an endpoint's address: it is the {what} of {subnet}")]
    Reserved {
        /// The subnet.
        subnet: Prefix,
        /// The address asked for.
        address: IpAddr,
        /// What it is.
        what: &'static str,
    },
    /// Every address has an owner.
    #[error("no free address: all {capacity} of {subnet} are taken")]
    Exhausted {
        /// The subnet.
        subnet: Prefix,
        /// How many endpoints it has room for.
        capacity: u128,
    },
}

/// A subnet with its gateway. The network address, the gateway and, for IPv4, the broadcast address are nobody else's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pool {
    subnet: Prefix,
    gateway: InterfaceAddress,
}

impl Pool {
    /// The pool of a node's subnet; its gateway is the first address.
    pub fn new(subnet: Prefix) -> Result<Self, PoolError> {
        let first = subnet.nth(1).ok_or(PoolError::TooSmall(subnet))?;
        Self::with_gateway(subnet, first)
    }

    /// The same with another gateway.
    pub fn with_gateway(subnet: Prefix, gateway: IpAddr) -> Result<Self, PoolError> {
        if subnet.family().bits() - subnet.len() < 2 {
            return Err(PoolError::TooSmall(subnet));
        }
        let wrong = PoolError::Gateway { subnet, gateway };
        let Ok(on_bridge) = InterfaceAddress::new(gateway, subnet.len()) else { return Err(wrong) };
        let pool = Self { subnet, gateway: on_bridge };
        if pool.position(gateway).is_none() { Err(wrong) } else { Ok(pool) }
    }

    /// The subnet.
    pub fn subnet(&self) -> Prefix {
        self.subnet
    }

    /// The gateway as the bridge holds it.
    pub fn gateway(&self) -> InterfaceAddress {
        self.gateway
    }

    /// How many endpoints it has room for.
    pub fn capacity(&self) -> u128 {
        self.span() - 1
    }

    /// The address as an endpoint's interface holds it, if an endpoint may have it.
    pub fn admit(&self, address: IpAddr) -> Result<InterfaceAddress, PoolError> {
        let subnet = self.subnet;
        let reserved = |what| Err(PoolError::Reserved { subnet, address, what });
        match address {
            _ if !subnet.contains(address) => Err(PoolError::Outside { subnet, address }),
            _ if address == self.gateway.address() => reserved("gateway"),
            _ if address == subnet.base() => reserved("network address"),
            _ if self.position(address).is_none() => reserved("broadcast address"),
            _ => InterfaceAddress::new(address, subnet.len())
                .map_err(|_| PoolError::Outside { subnet, address }),
        }
    }

    /// The next free address after `last`, round and round: an address that was given back rests for as long as others are free.
    /// Takes at most one step for each address taken, however large the subnet is.
    pub fn next(&self, last: Option<IpAddr>, taken: &BTreeSet<IpAddr>) -> Result<IpAddr, PoolError> {
        self.next_among((1, self.span()), last, taken)
            .ok_or_else(|| PoolError::Exhausted { subnet: self.subnet, capacity: self.capacity() })
    }

    /// The same within a part of the subnet; none if all of that is taken, or if it is no part of it.
    pub fn next_in(&self, part: Prefix, last: Option<IpAddr>, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
        let first = self.subnet.covers(&part).then(|| self.subnet.offset(part.base())).flatten()?;
        let bits = u32::from(part.family().bits() - part.len());
        let end = first.saturating_add(1u128.checked_shl(bits).unwrap_or(u128::MAX) - 1);
        self.next_among((first.max(1), end.min(self.span())), last, taken)
    }

    /// By positions, both ends included.
    fn next_among(
        &self,
        (first, end): (u128, u128),
        last: Option<IpAddr>,
        taken: &BTreeSet<IpAddr>,
    ) -> Option<IpAddr> {
        let last = last.and_then(|last| self.subnet.offset(last)).filter(|last| (first..end).contains(last));
        let start = last.map_or(first, |last| last + 1);
        (start..=end)
            .chain(first..start)
            .filter_map(|position| self.subnet.nth(position))
            .find(|address| *address != self.gateway.address() && !taken.contains(address))
    }

    /// Addresses that an interface may have, the gateway among them.
    fn span(&self) -> u128 {
        let bits = self.subnet.family().bits() - self.subnet.len();
        let size = 1u128.checked_shl(u32::from(bits)).unwrap_or(u128::MAX);
        match self.subnet.family() {
            Family::V4 => size - 2,
            Family::V6 => size - 1,
        }
    }

    /// Place of an address among those an interface may have, counted from 1.
    fn position(&self, address: IpAddr) -> Option<u128> {
        self.subnet.offset(address).filter(|offset| (1..=self.span()).contains(offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(subnet: &str) -> Pool {
        Pool::new(subnet.parse().unwrap()).unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn next(pool: &Pool, last: Option<&str>, taken: &[&str]) -> String {
        let taken = taken.iter().map(|address| ip(address)).collect();
        pool.next(last.map(ip), &taken).map_or_else(|error| error.to_string(), |address| address.to_string())
    }

    #[test]
    fn the_search_goes_on_after_the_last_one_and_round() {
        let pool = pool("10.5.1.0/29");
        assert_eq!(next(&pool, None, &[]), "10.5.1.2");
        assert_eq!(next(&pool, Some("10.5.1.2"), &["10.5.1.2"]), "10.5.1.3");
        assert_eq!(next(&pool, Some("10.5.1.3"), &["10.5.1.2"]), "10.5.1.4", "a freed one rests");
        assert_eq!(next(&pool, Some("10.5.1.6"), &["10.5.1.6"]), "10.5.1.2");
        assert_eq!(next(&pool, Some("10.5.1.4"), &["10.5.1.5", "10.5.1.6", "10.5.1.2"]), "10.5.1.3");
        assert_eq!(next(&pool, Some("10.9.9.9"), &[]), "10.5.1.2", "a last one from elsewhere means nothing");
    }

    #[test]
    fn a_full_pool_says_how_many_there_are() {
        let pool = pool("10.5.1.0/29");
        let all = ["10.5.1.2", "10.5.1.3", "10.5.1.4", "10.5.1.5", "10.5.1.6"];
        assert_eq!(next(&pool, Some("10.5.1.4"), &all), "no free address: all 5 of 10.5.1.0/29 are taken");
        assert_eq!(pool.capacity(), 5);
    }

    #[test]
    fn ipv6_has_no_broadcast_address_and_no_long_walks() {
        let small = pool("fd00::/126");
        assert_eq!(next(&small, None, &["fd00::2"]), "fd00::3");
        let large = pool("fd00:0:0:1::/64");
        assert_eq!(next(&large, Some("fd00:0:0:1:ffff:ffff:ffff:ffff"), &["fd00:0:0:1::2"]), "fd00:0:0:1::3");
        assert_eq!(large.capacity(), (1 << 64) - 2);
    }

    #[test]
    fn a_part_is_searched_alone_however_large_it_is() {
        let pool = pool("10.5.1.0/28");
        let next = |part: &str, last: Option<&str>, taken: &[&str]| {
            let taken = taken.iter().map(|address| ip(address)).collect();
            pool.next_in(part.parse().unwrap(), last.map(ip), &taken).map(|address| address.to_string())
        };
        let found = |address: &str| Some(address.to_owned());
        assert_eq!(next("10.5.1.4/30", None, &[]), found("10.5.1.4"));
        assert_eq!(next("10.5.1.4/30", Some("10.5.1.4"), &["10.5.1.4"]), found("10.5.1.5"));
        assert_eq!(next("10.5.1.4/30", Some("10.5.1.7"), &["10.5.1.4"]), found("10.5.1.5"));
        assert_eq!(next("10.5.1.4/30", Some("10.5.1.9"), &[]), found("10.5.1.4"));
        assert_eq!(
            next("10.5.1.0/30", None, &["10.5.1.2"]),
            found("10.5.1.3"),
            "gateway and base are nobody's"
        );
        assert_eq!(
            next("10.5.1.12/30", Some("10.5.1.14"), &[]),
            found("10.5.1.12"),
            "nor the broadcast address"
        );
        assert_eq!(next("10.5.1.8/31", None, &["10.5.1.8", "10.5.1.9"]), None);
        assert_eq!(next("10.5.2.0/30", None, &[]), None);
        assert_eq!(next("10.5.1.0/24", None, &[]), None);
        let large = self::pool("fd00:0:0:1::/64");
        let part = "fd00:0:0:1:8000::/65".parse().unwrap();
        let last = Some(ip("fd00:0:0:1:ffff:ffff:ffff:fffe"));
        assert_eq!(large.next_in(part, last, &BTreeSet::new()), Some(ip("fd00:0:0:1:ffff:ffff:ffff:ffff")));
        let last = Some(ip("fd00:0:0:1:ffff:ffff:ffff:ffff"));
        assert_eq!(large.next_in(part, last, &BTreeSet::new()), Some(ip("fd00:0:0:1:8000::")));
    }

    #[test]
    fn some_addresses_are_nobodys() {
        let pool = pool("10.5.1.0/24");
        assert_eq!(pool.gateway().to_string(), "10.5.1.1/24");
        for (address, reason) in [
            ("10.5.1.1", "it is the gateway of 10.5.1.0/24"),
            ("10.5.1.0", "network address"),
            ("10.5.1.255", "broadcast address"),
            ("10.5.2.1", "not in this node's subnet 10.5.1.0/24"),
            ("fd00::1", "not in this node's subnet"),
        ] {
            let error = pool.admit(ip(address)).unwrap_err().to_string();
            assert!(error.contains(reason), "{address}: {error}");
        }
        assert_eq!(pool.admit(ip("10.5.1.254")).unwrap().to_string(), "10.5.1.254/24");
    }

    #[test]
    fn a_gateway_elsewhere_leaves_the_first_address_to_endpoints() {
        let pool = Pool::with_gateway("10.5.1.0/29".parse().unwrap(), ip("10.5.1.6")).unwrap();
        assert_eq!(next(&pool, None, &[]), "10.5.1.1");
        assert_eq!(next(&pool, Some("10.5.1.5"), &[]), "10.5.1.1");
        assert!(Pool::with_gateway("10.5.1.0/29".parse().unwrap(), ip("10.5.1.7")).is_err());
    }

    #[test]
    fn subnets_without_room_are_refused() {
        for small in ["10.5.1.0/31", "10.5.1.0/32", "fd00::/127", "fd00::/128"] {
            assert!(Pool::new(small.parse().unwrap()).is_err(), "{small}");
        }
        assert_eq!(next(&pool("10.5.1.0/30"), None, &[]), "10.5.1.2");
    }
}
