//! Who may send into a tunnel.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::words::addr::Family;
use crate::words::name::NetworkName;
use crate::words::rule::{TableFamily, TableName};

/// The guard of a network's tunnels takes packets from this address: an element of a set in the guard's table. The table's own
/// fact has the sets without their elements, so that a host that comes or goes among thousands costs one element.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TunnelHost {
    /// The guard's table.
    pub table: Arc<TableName>,
    /// The outer source address.
    pub address: IpAddr,
}

impl TunnelHost {
    /// What such a fact is called in counters, and what its table is.
    pub const KIND: &'static str = "tunnel_host";
    /// The table.
    pub const TABLE_KIND: &'static str = "tunnel_guard";

    /// The table of a network's guard.
    pub fn table_of(network: &NetworkName) -> TableName {
        TableName { family: TableFamily::Inet, name: network.tunnel_table() }
    }

    /// Whether the elements of a table's sets are facts of their own.
    pub fn are_in(table: &TableName) -> bool {
        let default = NetworkName::default_network().tunnel_table();
        let rest = table.name.strip_prefix(&default);
        table.family == TableFamily::Inet && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }

    /// The set for addresses of a family.
    pub const fn set(family: Family) -> &'static str {
        match family {
            Family::V4 => "hosts",
            Family::V6 => "hosts6",
        }
    }
}

impl fmt::Display for TunnelHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = Self::set(Family::of(self.address));
        write!(f, "nft 'add element {} {set} {{ {} }}'", self.table, self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_are_told_by_their_names() {
        let long = NetworkName::new("a-name-that-is-too-long-for-a-table").unwrap();
        for network in [NetworkName::default_network(), NetworkName::new("web").unwrap(), long] {
            assert!(TunnelHost::are_in(&TunnelHost::table_of(&network)), "{network}");
        }
        for other in ["flannel", "flannel-web", "flannel_tunnels", "flannel_endpoints"] {
            let name = TableName { family: TableFamily::Inet, name: other.to_owned() };
            assert!(!TunnelHost::are_in(&name), "{other}");
        }
    }
}
