//! The kernel of one network namespace.

mod iptables;
pub mod nftables;
