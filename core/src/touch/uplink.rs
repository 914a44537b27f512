//! Which interface carries us to our peers.
//!
//! **Shape** — what was asked for is tried in order, and the first that fits is taken; `pick` does so from what the
//! kernel showed and touches nothing.
//! **Source** — upstream pkg/ipmatch/match.go `LookupExtIface`, pkg/ip/iface.go `GetInterfaceIP4Addrs`: an interface is
//! named, owns a given address, matches an expression, is the way to an address, or the default route leaves by it; of its
//! addresses a global one comes before a link-local one and a permanent one before a leased one. IPv6 link-local addresses
//! are left out: a peer's lease cannot say by which interface they are meant.

mod pick;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

pub use self::pick::Pick;
use self::pick::{Ground, pick};
use super::world::WorldError;
use super::world::kernel::Kernel;
use crate::words::addr::{Family, Prefix};
use crate::words::name::{LinkName, NameError};
use crate::words::node::Uplink;
use crate::words::units::OutOfRange;

/// How the interface is found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum UplinkChoice {
    /// The default route leaves by it.
    DefaultRoute,
    /// The first of these that exists and has an address.
    Any(Vec<Wanted>),
}

/// What was said beforehand of the interface and of the addresses that peers reach us at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sought {
    /// Which interface.
    pub choice: UplinkChoice,
    /// How peers reach us by IPv4, if not by the interface's address (`--public-ip`).
    pub public_v4: Option<Ipv4Addr>,
    /// The same for IPv6 (`--public-ipv6`).
    pub public_v6: Option<Ipv6Addr>,
    /// This host's subnets: addresses in them are our devices' and containers' bridges', no way to a peer, whatever an expression matches.
    pub never: Vec<Prefix>,
}

/// One way to say which. Prints as the flag that says it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// It has this name.
    Named(LinkName),
    /// It has this address.
    Address(IpAddr),
    /// An address of it, or else its name, matches.
    Matching(Pattern),
    /// Packets to this address leave by it.
    Toward(IpAddr),
}

/// A regular expression. What it matches is found out by whoever made it: programs that take none need no engine for it.
#[derive(Clone)]
pub struct Pattern {
    text: Arc<str>,
    matches: Arc<dyn Fn(&str) -> bool + Send + Sync>,
}

impl Pattern {
    /// An expression and what it means.
    pub fn new(text: &str, matches: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self { text: text.into(), matches: Arc::new(matches) }
    }

    /// Whether a text, or a part of it, is meant.
    pub fn matches(&self, text: &str) -> bool {
        (self.matches)(text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pattern").field(&self.text).finish()
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => write!(f, "--iface {name}"),
            Self::Address(address) => write!(f, "--iface {address}"),
            Self::Matching(pattern) => write!(f, "--iface-regex {}", pattern.text),
            Self::Toward(address) => write!(f, "--iface-can-reach {address}"),
        }
    }
}

/// A name or an address, as `--iface` takes them.
impl FromStr for Wanted {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.parse() {
            Ok(address) => Ok(Self::Address(address)),
            Err(_) => LinkName::new(text).map(Self::Named),
        }
    }
}

/// Why there is no uplink.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// The kernel could not be asked.
    #[error(transparent)]
    World(#[from] WorldError),
    /// Nothing that exists is what was asked for.
    #[error("no interface fits what was asked for: {tried}; there are: {candidates}")]
    NoMatch {
        /// What was asked for, each with the reason why it does not fit.
        tried: String,
        /// Every interface with its addresses.
        candidates: String,
    },
    /// There is no default route, or it leaves by several interfaces.
    #[error("{0}; say which interface with --iface; there are: {1}")]
    DefaultRoute(&'static str, String),
    /// The interface in use is not there any more.
    #[error("interface {link} is gone; there are: {candidates}")]
    Gone {
        /// The interface.
        link: LinkName,
        /// Every interface with its addresses.
        candidates: String,
    },
    /// It has no address that peers could use.
    #[error("interface {link} has no usable {family} address")]
    NoAddress {
        /// The interface.
        link: LinkName,
        /// Of this family.
        family: Family,
    },
    /// Its MTU cannot be.
    #[error("interface {link} cannot carry us")]
    Mtu {
        /// The interface.
        link: LinkName,
        /// What is wrong.
        source: OutOfRange,
    },
}

impl UplinkChoice {
    /// What the flags say: `--iface` and `--iface-regex` (both repeated), `--iface-can-reach`; in this order. If none is
    /// given, a public address of this host's names its interface; one that no interface has (NAT) leaves the default route.
    pub fn of_flags(ifaces: &[Wanted], patterns: &[Pattern], toward: Option<IpAddr>) -> Self {
        let patterns = patterns.iter().cloned().map(Wanted::Matching);
        let toward = toward.into_iter().map(Wanted::Toward);
        let wanted: Vec<_> = ifaces.iter().cloned().chain(patterns).chain(toward).collect();
        match wanted.is_empty() {
            true => Self::DefaultRoute,
            false => Self::Any(wanted),
        }
    }

    fn wanted(&self) -> &[Wanted] {
        match self {
            Self::DefaultRoute => &[],
            Self::Any(wanted) => wanted,
        }
    }
}

impl Sought {
    /// What is to be found, and nothing more.
    pub fn by(choice: UplinkChoice) -> Self {
        Self { choice, public_v4: None, public_v6: None, never: Vec::new() }
    }

    /// The address of a family at which peers reach us: the one that was said, else the interface's.
    pub fn public(&self, uplink: &Uplink, family: Family) -> Option<IpAddr> {
        self.said(family).or_else(|| uplink.address(family))
    }

    /// Whether peers are to use this address because somebody said so.
    pub fn is_said(&self, address: IpAddr) -> bool {
        self.said(Family::of(address)) == Some(address)
    }

    fn said(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.public_v4.map(Into::into),
            Family::V6 => self.public_v6.map(Into::into),
        }
    }
}

/// Finds the interface for a network of these families. It has an address of at least one of them.
pub fn choose(kernel: &mut Kernel, sought: &Sought, families: &[Family]) -> Result<Pick, UplinkError> {
    let mut ground = ground(kernel, sought)?;
    if sought.choice == UplinkChoice::DefaultRoute {
        for family in families {
            ground.defaults.insert(*family, kernel.default_routes(*family)?);
        }
    }
    pick(&ground, sought, families)
}

/// The interface of this name as it is now.
pub fn read(
    kernel: &mut Kernel,
    link: LinkName,
    sought: &Sought,
    families: &[Family],
) -> Result<Uplink, UplinkError> {
    ground(kernel, sought)?.uplink(link, sought, families)
}

fn ground(kernel: &mut Kernel, sought: &Sought) -> Result<Ground, WorldError> {
    let mut ground = Ground { interfaces: kernel.interfaces()?, ..Ground::default() };
    let is_containers = |address: IpAddr| sought.never.iter().any(|prefix| prefix.contains(address));
    for interface in &mut ground.interfaces {
        interface.addresses.retain(|own| !is_containers(own.address.address()));
    }
    for wanted in sought.choice.wanted() {
        if let Wanted::Toward(address) = wanted {
            ground.ways.insert(*address, kernel.way_to(*address)?);
        }
    }
    Ok(ground)
}
