//! nftables as values: a table is one whole value that is compared and written at once.
//!
//! Only what we plan can be said here; everything that can be said prints as `nft` would list it, is encoded for the
//! kernel and read back from it, so that a table read equals the table written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use super::addr::{Family, Prefix};
use super::exposure::Transport;
use super::name::LinkName;
use super::units::{Port, Vni};

/// The family of a table. `Inet` sees both IPv4 and IPv6.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum TableFamily {
    /// `ip`
    Ip,
    /// `ip6`
    Ip6,
    /// `inet`
    Inet,
}

impl fmt::Display for TableFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Inet => "inet",
        })
    }
}

/// A table's family and name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TableName {
    /// Family.
    pub family: TableFamily,
    /// Name, at most 31 bytes.
    pub name: String,
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// A table with everything in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    /// Which.
    pub name: TableName,
    /// Sets by name.
    pub sets: BTreeMap<String, Set>,
    /// Port maps by name; the kernel has one space of names for these and sets.
    pub maps: BTreeMap<String, PortMap>,
    /// Chains by name.
    pub chains: BTreeMap<String, Chain>,
    /// What was found in it that cannot be said here, in a few words each. No plan has any, so a table that somebody
    /// else wrote into never equals the planned one and is replaced.
    pub strange: Vec<String>,
}

impl Table {
    /// A table with nothing in it.
    pub const fn new(name: TableName) -> Self {
        Self {
            name,
            sets: BTreeMap::new(),
            maps: BTreeMap::new(),
            chains: BTreeMap::new(),
            strange: Vec::new(),
        }
    }
}

/// A named set of prefixes (`flags interval`), or of single addresses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Set {
    /// Family of the elements.
    pub family: Family,
    /// Whether it holds single addresses only: those the kernel finds by hash, one costs as much as among thousands.
    pub single: bool,
    /// The elements; disjoint, as the kernel wants interval sets.
    pub elements: BTreeSet<Prefix>,
}

impl Set {
    /// The prefixes of that family, without those that another one covers.
    pub fn of(family: Family, prefixes: impl IntoIterator<Item = Prefix>) -> Self {
        let all: BTreeSet<Prefix> = prefixes.into_iter().filter(|prefix| prefix.family() == family).collect();
        let mut elements: BTreeSet<Prefix> = BTreeSet::new();
        // Ascending by base, then by length: whatever covers a prefix comes before it, and so do all that this one covers.
        for prefix in all {
            if !elements.last().is_some_and(|last| last.covers(&prefix)) {
                elements.insert(prefix);
            }
        }
        Self { family, single: false, elements }
    }

    /// The addresses of that family.
    pub fn of_addresses(family: Family, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let elements = addresses.into_iter().filter(|address| Family::of(*address) == family);
        Self { family, single: true, elements: elements.map(Prefix::host).collect() }
    }
}

/// A named map from a port of this host to a port of a container, for [`Verdict::Dnat`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortMap {
    /// How its keys are made.
    pub kind: PortMapKind,
    /// The elements. Every key has an address exactly if the kind says so, and all addresses are of its family.
    pub elements: BTreeMap<PortKey, PortTarget>,
}

/// Where a port map leads to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortTarget {
    /// The container's address.
    pub address: IpAddr,
    /// The port there.
    pub port: u16,
    /// Whose it is, where several programs share a map: the element's comment, at most [`OWNER_MAX`] bytes.
    pub owner: Option<String>,
}

/// Longest comment of an element, in bytes: its length and that of all attributes of nft's own have one byte
/// (libnftnl `NFT_USERDATA_MAXLEN`).
pub const OWNER_MAX: usize = 250;

/// How the keys of a port map are made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PortMapKind {
    /// Family of all addresses in it.
    pub family: Family,
    /// Whether the destination address is part of the key.
    pub bound: bool,
}

/// What a port map is asked for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PortKey {
    /// The destination address, if it is part of the key.
    pub address: Option<IpAddr>,
    /// Protocol.
    pub protocol: Transport,
    /// Destination port.
    pub port: u16,
}

/// A chain: hooked into the packet path if it has a base.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain {
    /// Where it is hooked in; none for a chain that is only jumped to.
    pub base: Option<Base>,
    /// Rules in order.
    pub rules: Vec<Rule>,
}

/// Type of a base chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChainKind {
    /// `filter`
    Filter,
    /// `nat`
    Nat,
}

/// Netfilter hook (uapi/linux/netfilter.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// To this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
    /// After routing.
    Postrouting,
}

/// Type, hook and priority of a base chain; the policy is always accept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Base {
    /// Type.
    pub kind: ChainKind,
    /// Hook.
    pub hook: Hook,
    /// Priority: 0 is `filter`, 100 `srcnat`, -100 `dstnat`.
    pub priority: i32,
}

/// A rule: all matches must hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Tests, in order.
    pub matches: Vec<Match>,
    /// Whether packets and bytes are counted. The counts themselves are not part of the value.
    pub counter: bool,
    /// What happens.
    pub verdict: Verdict,
}

/// Source or destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// `saddr`
    Source,
    /// `daddr`
    Destination,
}

/// One test of a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Match {
    /// `ip saddr [!=] 10.1.0.0/16`
    Address {
        /// Which address.
        side: Side,
        /// True for `!=`.
        negated: bool,
        /// The prefix.
        prefix: Prefix,
    },
    /// `ip saddr [!=] @set`
    AddressIn {
        /// Which address.
        side: Side,
        /// True for `!=`.
        negated: bool,
        /// Family of the set.
        family: Family,
        /// Name of a set of the same table.
        set: String,
    },
    /// `iifname [!=] "cni0"`
    Input {
        /// True for `!=`.
        negated: bool,
        /// The interface the packet came in by.
        link: LinkName,
    },
    /// `oifname [!=] "cni0"`
    Output {
        /// True for `!=`.
        negated: bool,
        /// The interface the packet leaves by.
        link: LinkName,
    },
    /// `meta nfproto ipv4`. Needless before a test of an address, which implies it.
    Family(Family),
    /// What a tunnel's packets look like when they arrive.
    Encapsulated(Encapsulation),
    /// `fib daddr type local`: the destination is an address of this host.
    LocalDestination,
    /// `ct state [!] established,related`: of a connection that is known, or that belongs to one.
    Established {
        /// True for `!`.
        negated: bool,
    },
    /// `ct status [!] dnat`: of a connection whose destination was translated, in either direction.
    Translated {
        /// True for `!`.
        negated: bool,
    },
    /// `meta mark and MASK == VALUE`
    Mark {
        /// Bits looked at.
        mask: u32,
        /// What they must be.
        value: u32,
    },
}

/// How packets of a tunnel are wrapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encapsulation {
    /// `udp dport PORT @th,96,24 VNI`: VXLAN of one network identifier (RFC 7348 §5).
    Vxlan {
        /// The UDP port.
        port: Port,
        /// The network identifier: others may have the port for theirs.
        vni: Vni,
    },
    /// `meta l4proto ipencap`: IPv4 in IP (RFC 2003).
    Ipip,
}

/// What happens to a packet that matched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Let it pass this chain.
    Accept,
    /// Throw it away.
    Drop,
    /// Go on in the calling chain.
    Return,
    /// Go on in that chain.
    Jump(String),
    /// Give it the outgoing interface's address.
    Masquerade {
        /// Choose the port at random (`fully-random`).
        fully_random: bool,
    },
    /// Send it where a map says for its destination port, or go on if the map has nothing for it.
    Dnat {
        /// Kind of the map.
        kind: PortMapKind,
        /// Name of a map of the same table.
        map: String,
    },
    /// Give it its own source address, so that nobody gives it another.
    KeepSource(Family),
    /// Set these bits of its mark and go on.
    AddMark(u32),
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = |negated: &bool| if *negated { "!= " } else { "" };
        let no = |negated: &bool| if *negated { "! " } else { "" };
        match self {
            Self::Address { side, negated, prefix } => {
                write!(f, "{} {side} {}{}", ip(prefix.family()), not(negated), operand(prefix))
            }
            Self::AddressIn { side, negated, family, set } => {
                write!(f, "{} {side} {}@{set}", ip(*family), not(negated))
            }
            Self::Input { negated, link } => write!(f, "iifname {}\"{link}\"", not(negated)),
            Self::Output { negated, link } => write!(f, "oifname {}\"{link}\"", not(negated)),
            Self::Family(Family::V4) => f.write_str("meta nfproto ipv4"),
            Self::Family(Family::V6) => f.write_str("meta nfproto ipv6"),
            Self::Encapsulated(Encapsulation::Vxlan { port, vni }) => {
                write!(f, "udp dport {port} @th,96,24 {:#x}", vni.id())
            }
            Self::Encapsulated(Encapsulation::Ipip) => f.write_str("meta l4proto ipencap"),
            Self::LocalDestination => f.write_str("fib daddr type local"),
            Self::Established { negated } => write!(f, "ct state {}established,related", no(negated)),
            Self::Translated { negated } => write!(f, "ct status {}dnat", no(negated)),
            Self::Mark { mask: u32::MAX, value } => write!(f, "meta mark {value:#010x}"),
            Self::Mark { mask, value } => write!(f, "meta mark & {mask:#010x} == {value:#010x}"),
        }
    }
}

/// A prefix as nft lists it: a whole address without its length.
fn operand(prefix: &Prefix) -> String {
    match prefix.len() == prefix.family().bits() {
        true => prefix.base().to_string(),
        false => prefix.to_string(),
    }
}

fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "saddr",
            Self::Destination => "daddr",
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Masquerade { fully_random: true } => f.write_str("masquerade fully-random"),
            Self::Masquerade { fully_random: false } => f.write_str("masquerade"),
            Self::Dnat { kind: PortMapKind { family, bound }, map } => {
                let ip = ip(*family);
                let address = if *bound { format!("{ip} daddr . ") } else { String::new() };
                write!(f, "dnat {ip} to {address}meta l4proto . th dport map @{map}")
            }
            Self::KeepSource(family) => write!(f, "snat {0} to {0} saddr", ip(*family)),
            Self::AddMark(bits) => write!(f, "meta mark set meta mark | {bits:#010x}"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for test in &self.matches {
            write!(f, "{test} ")?;
        }
        if self.counter {
            f.write_str("counter ")?;
        }
        write!(f, "{}", self.verdict)
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        };
        let hook = match self.hook {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        };
        write!(f, "type {kind} hook {hook} priority {}; policy accept;", self.priority_by_name())
    }
}

impl Base {
    /// The priority as nft lists it: by the nearest name that is valid at the hook, if one is within 10.
    fn priority_by_name(&self) -> String {
        let dstnat = matches!(self.hook, Hook::Prerouting).then_some(("dstnat", -100));
        let srcnat = matches!(self.hook, Hook::Postrouting).then_some(("srcnat", 100));
        let everywhere = [("raw", -300), ("mangle", -150), ("filter", 0), ("security", 50)];
        for (name, value) in everywhere.into_iter().chain(dstnat).chain(srcnat) {
            match i64::from(self.priority) - i64::from(value) {
                0 => return name.to_owned(),
                above @ 1..=10 => return format!("{name} + {above}"),
                below @ -10..=-1 => return format!("{name} - {}", -below),
                _ => {}
            }
        }
        self.priority.to_string()
    }
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{address} . ")?;
        }
        write!(f, "{} . {}", self.protocol, self.port)
    }
}

/// As it follows its key.
impl fmt::Display for PortTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(owner) = &self.owner {
            write!(f, " comment \"{owner}\"")?;
        }
        write!(f, " : {} . {}", self.address, self.port)
    }
}

impl fmt::Display for PortMapKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = address_type(self.family);
        if self.bound {
            write!(f, "{address} . ")?;
        }
        write!(f, "inet_proto . inet_service : {address} . inet_service")
    }
}

fn address_type(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4_addr",
        Family::V6 => "ipv6_addr",
    }
}

/// The table as a ruleset that `nft -f` accepts.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {{", self.name)?;
        for (name, set) in &self.sets {
            let kind = address_type(set.family);
            let elements = set.elements.iter().map(operand).collect::<Vec<_>>().join(", ");
            let flags = if set.single { "" } else { "flags interval; " };
            write!(f, "\tset {name} {{ type {kind}; {flags}")?;
            if !elements.is_empty() {
                write!(f, "elements = {{ {elements} }}; ")?;
            }
            writeln!(f, "}}")?;
        }
        for (name, map) in &self.maps {
            let one = |(key, target): (&PortKey, &PortTarget)| format!("{key}{target}");
            let elements = map.elements.iter().map(one).collect::<Vec<_>>().join(", ");
            write!(f, "\tmap {name} {{ type {}; ", map.kind)?;
            if !elements.is_empty() {
                write!(f, "elements = {{ {elements} }}; ")?;
            }
            writeln!(f, "}}")?;
        }
        for (name, chain) in &self.chains {
            writeln!(f, "\tchain {name} {{")?;
            if let Some(base) = &chain.base {
                writeln!(f, "\t\t{base}")?;
            }
            for rule in &chain.rules {
                writeln!(f, "\t\t{rule}")?;
            }
            writeln!(f, "\t}}")?;
        }
        for thing in &self.strange {
            writeln!(f, "\t# {thing}")?;
        }
        f.write_str("}")
    }
}
