//! Whose packets go where, and come from where: replaced as a whole whenever the leases change.

use std::net::{IpAddr, Ipv4Addr};

use crate::words::addr::Prefix;
use crate::words::tunnel::Tunnel;

/// The tunnel's view of the leases.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct RouteTable {
    /// The device's address.
    pub(super) address: Option<Ipv4Addr>,
    own: Option<Range>,
    /// One group for each prefix length, the longest first.
    groups: Vec<Group>,
    /// Everybody who holds a lease, sorted.
    holders: Vec<Ipv4Addr>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Range {
    base: u32,
    mask: u32,
}

impl Range {
    fn of(prefix: &Prefix) -> Option<Self> {
        let IpAddr::V4(base) = prefix.base() else { return None };
        Some(Self { base: base.to_bits(), mask: mask(prefix.len()) })
    }

    fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask == self.base
    }
}

/// Subnets of one length, sorted by their base.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Group {
    mask: u32,
    subnets: Vec<(u32, Ipv4Addr)>,
}

fn mask(len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)
}

impl RouteTable {
    pub(super) fn of(tunnel: &Tunnel) -> Self {
        let mut table = Self {
            address: Some(tunnel.address),
            own: Range::of(&tunnel.own),
            groups: Vec::new(),
            holders: tunnel.peers.values().copied().collect(),
        };
        table.holders.sort_unstable();
        table.holders.dedup();
        for (subnet, holder) in &tunnel.peers {
            let Some(range) = Range::of(subnet) else { continue };
            let entry = (range.base, *holder);
            match table.groups.iter_mut().find(|group| group.mask == range.mask) {
                Some(group) => group.subnets.push(entry),
                None => table.groups.push(Group { mask: range.mask, subnets: vec![entry] }),
            }
        }
        table.groups.sort_unstable_by_key(|group| std::cmp::Reverse(group.mask));
        for group in &mut table.groups {
            group.subnets.sort_unstable();
        }
        table
    }

    /// The holder of the longest subnet that contains an address.
    pub(super) fn find(&self, address: Ipv4Addr) -> Option<Ipv4Addr> {
        self.groups.iter().find_map(|group| {
            let base = address.to_bits() & group.mask;
            let at = group.subnets.binary_search_by_key(&base, |(base, _)| *base).ok()?;
            group.subnets.get(at).map(|(_, holder)| *holder)
        })
    }

    /// Whether an address is in our own subnet.
    pub(super) fn is_own(&self, address: Ipv4Addr) -> bool {
        self.own.is_some_and(|own| own.contains(address))
    }

    /// Whether somebody with this public address holds a lease.
    pub(super) fn is_holder(&self, public: Ipv4Addr) -> bool {
        self.holders.binary_search(&public).is_ok()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::words::name::NetworkName;
    use crate::words::units::{Mtu, Port};

    pub(in crate::run::udp) fn table(own: &str, peers: &[(&str, &str)]) -> RouteTable {
        let own: Prefix = own.parse().unwrap();
        let IpAddr::V4(address) = own.base() else { panic!("IPv4 was wanted") };
        let parsed = |(subnet, holder): &(&str, &str)| (subnet.parse().unwrap(), holder.parse().unwrap());
        RouteTable::of(&Tunnel {
            device: NetworkName::default_network().tunnel(),
            address,
            mtu: Mtu::new(1472).unwrap(),
            local: Ipv4Addr::new(10, 77, 0, 11),
            port: Port::UDP_BACKEND,
            own,
            peers: peers.iter().map(parsed).collect(),
        })
    }

    #[test]
    fn the_longest_prefix_wins_wherever_it_stands() {
        let table = table(
            "10.100.1.0/24",
            &[
                ("10.100.0.0/16", "10.77.0.16"),
                ("10.100.2.0/24", "10.77.0.24"),
                ("10.100.2.128/25", "10.77.0.25"),
                ("10.100.3.0/24", "10.77.0.23"),
            ],
        );
        let find = |address: &str| table.find(address.parse().unwrap()).map(|holder| holder.octets()[3]);
        assert_eq!(find("10.100.2.127"), Some(24));
        assert_eq!(find("10.100.2.128"), Some(25));
        assert_eq!(find("10.100.3.255"), Some(23));
        assert_eq!(find("10.100.4.0"), Some(16));
        assert_eq!(find("10.101.2.1"), None);
        assert!(table.is_own("10.100.1.255".parse().unwrap()));
        assert!(!table.is_own("10.100.2.0".parse().unwrap()));
        assert!(table.is_holder(Ipv4Addr::new(10, 77, 0, 25)));
        assert!(!table.is_holder(Ipv4Addr::new(10, 77, 0, 26)));
    }

    #[test]
    fn an_empty_table_knows_nobody() {
        let nobody = RouteTable::default();
        assert_eq!(nobody.find(Ipv4Addr::UNSPECIFIED), None);
        assert!(!nobody.is_own(Ipv4Addr::UNSPECIFIED) && !nobody.is_holder(Ipv4Addr::UNSPECIFIED));
    }
}
