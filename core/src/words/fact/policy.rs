//! Policies of the kernel's IPsec: what must be encrypted, and between whom.

use std::fmt;
use std::net::Ipv4Addr;

use crate::words::addr::Prefix;
use crate::words::ipsec::REQID;

/// Which packets a policy is about (uapi/linux/xfrm.h `XFRM_POLICY_IN` and so on).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PolicyDirection {
    /// What comes for this host itself.
    In,
    /// What leaves it.
    Out,
    /// What comes to be forwarded.
    Forward,
}

/// Packets between two subnets travel in ESP, in tunnel mode, with keys that carry our mark. IPv4.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Which packets.
    pub direction: PolicyDirection,
    /// Where they come from.
    pub source: Prefix,
    /// Where they go.
    pub destination: Prefix,
    /// Which host wraps them.
    pub from: Ipv4Addr,
    /// Which host unwraps them.
    pub to: Ipv4Addr,
}

impl fmt::Display for PolicyDirection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::In => "in",
            Self::Out => "out",
            Self::Forward => "fwd",
        })
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { direction, source, destination, from, to } = self;
        write!(f, "ip xfrm policy update src {source} dst {destination} dir {direction}")?;
        write!(f, " tmpl src {from} dst {to} proto esp reqid {REQID} mode tunnel")
    }
}
