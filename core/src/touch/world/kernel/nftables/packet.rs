//! Netfilter's numbers for families, and where addresses are in a packet.

use std::net::IpAddr;

use crate::words::addr::Family;
use crate::words::rule::{Side, TableFamily};

/// Netfilter's number of a table's family (uapi/linux/netfilter.h `NFPROTO_*`).
pub(super) const fn number_of(family: TableFamily) -> u8 {
    match family {
        TableFamily::Inet => 1,
        TableFamily::Ip => 2,
        TableFamily::Ip6 => 10,
    }
}

/// Netfilter's number of an address family, which is also what `meta nfproto` loads.
pub(super) const fn protocol_of(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// Type (`nft`'s own number for it, informational in the kernel) and length of a set's key.
pub(super) const fn key_of(family: Family) -> (u32, u32) {
    match family {
        Family::V4 => (7, 4),
        Family::V6 => (8, 16),
    }
}

/// An address in network order.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Where an address is in its network header.
pub(super) const fn offset(family: Family, side: Side) -> u32 {
    match (family, side) {
        (Family::V4, Side::Source) => 12,
        (Family::V4, Side::Destination) => 16,
        (Family::V6, Side::Source) => 8,
        (Family::V6, Side::Destination) => 24,
    }
}
