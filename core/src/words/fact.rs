//! The fact: one thing that is true of a kernel, or should be; and the difference between two sets of them.
//!
//! A fact prints as the iproute2 (or nft) line that would make it true. That one `Display` serves the golden tests, the
//! log, the documentation and `plan`.

mod display;
mod port;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::IpAddr;

use super::addr::{InterfaceAddress, Mac, Prefix};
use super::name::LinkName;
use super::rule::{Table, TableName};
use super::units::{Mtu, Port, Vni};

pub use port::{BridgePort, Guard, PortVlans, VlanMember};

/// One thing that is true of a kernel, or should be. Holds only fields that we set; a `None` in a desired fact means
/// that any value will do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fact {
    /// A kernel setting.
    Sysctl(Sysctl),
    /// An interface.
    Link(Box<Link>),
    /// An interface's place on a bridge.
    BridgePort(BridgePort),
    /// The VLANs that a bridge's port is in.
    PortVlans(PortVlans),
    /// Frames from a bridge's port carry one source MAC only.
    Guard(Guard),
    /// An address of an interface.
    Address(Address),
    /// A permanent neighbor entry.
    Neighbor(Neighbor),
    /// A forwarding database entry of a VXLAN device.
    Forward(Forward),
    /// An nftables table of ours.
    Table(Box<Table>),
    /// Traffic from and to a network is accepted by the FORWARD chain that iptables keeps, through our chain
    /// FLANNEL-FWD in it: another table's accept does not outweigh a drop there.
    Accept(Accept),
    /// A route.
    Route(Route),
    /// Packets to a destination go nowhere, unless a better route takes them.
    Blackhole(Blackhole),
}

/// What a fact is about. **The order of the variants is the order in which the kernel wants them**: creation ascends,
/// deletion descends.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Key {
    /// A setting of the whole host, by path below /proc/sys. What makes the host forward (true) comes last: an uplink that
    /// follows router advertisements must be told before that to go on, or the host loses its default route.
    HostSysctl(bool, String),
    /// An interface by name.
    Link(LinkName),
    /// A setting of one interface.
    LinkSysctl(LinkName, String),
    /// An interface on a bridge.
    BridgePort(LinkName),
    /// VLANs of an interface on a bridge.
    PortVlans(LinkName),
    /// Source MAC of what comes from an interface on a bridge.
    Guard(LinkName),
    /// An address on an interface.
    Address(LinkName, InterfaceAddress),
    /// A neighbor on an interface.
    Neighbor(LinkName, IpAddr),
    /// A MAC behind a VXLAN device.
    Forward(LinkName, Mac),
    /// A table.
    Table(TableName),
    /// A network in the FORWARD chain.
    Accept(Prefix),
    /// A route: the kernel tells routes apart by table, destination and metric. Connected routes (false) come before
    /// those through a gateway (true).
    Route(bool, RouteTable, Prefix, u32),
    /// A destination whose packets go nowhere.
    Blackhole(Prefix),
}

/// A kernel setting under /proc/sys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sysctl {
    /// The interface it belongs to, when it comes and goes with one.
    pub link: Option<LinkName>,
    /// Path below /proc/sys, like `net/ipv4/ip_forward`.
    pub path: String,
    /// Value as the kernel prints it.
    pub value: String,
}

/// An interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Name.
    pub name: LinkName,
    /// What it is.
    pub kind: LinkKind,
    /// Largest packet.
    pub mtu: Option<Mtu>,
    /// Ethernet address.
    pub mac: Option<Mac>,
    /// Mark of the owner in the interface's alias; tells our old devices from those of others.
    pub alias: Option<String>,
    /// Administratively up.
    pub up: bool,
    /// What else it does.
    pub modes: LinkModes,
}

/// What an interface does only when asked to. A mode that is not asked for is let be.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct LinkModes {
    /// Takes frames that are not for it.
    pub promiscuous: bool,
    /// Of a bridge: keeps VLANs apart.
    pub vlan_filtering: bool,
}

/// Kinds of interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkKind {
    /// A bridge.
    Bridge,
    /// A VXLAN device with static entries only.
    Vxlan(Vxlan),
    /// One end of a veth pair.
    Veth {
        /// What the other end is made as, when we make the pair. Never read back: the other end may be in another
        /// namespace.
        peer: Option<VethPeer>,
    },
    /// Something that exists by itself in a namespace (`lo`) or by the program that holds it open (a TUN device): never
    /// created, only set up.
    Given,
}

/// A VXLAN device's fixed attributes: a change of any of them needs a new device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vxlan {
    /// Network identifier.
    pub vni: Vni,
    /// Destination port.
    pub port: Port,
    /// Outer source address.
    pub local: IpAddr,
    /// The interface encapsulated packets leave by.
    pub underlay: LinkName,
    /// Learn addresses from traffic.
    pub learning: bool,
    /// Carry group policy (RFC draft-smith-vxlan-group-policy).
    pub gbp: bool,
}

/// The other end of a veth pair, as it is born.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VethPeer {
    /// Name.
    pub name: LinkName,
    /// Ethernet address.
    pub mac: Option<Mac>,
    /// Largest packet.
    pub mtu: Option<Mtu>,
    /// Born in the container's namespace rather than beside its peer.
    pub in_sandbox: bool,
}

/// An address of an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    /// The interface.
    pub link: LinkName,
    /// Address and prefix length.
    pub address: InterfaceAddress,
    /// Ask the kernel not to make the subnet's route by itself. Counts at creation only.
    pub no_prefix_route: bool,
    /// IPv6: not to be used before nobody objects (duplicate address detection). Counts at creation only.
    pub detect_duplicates: bool,
}

/// A permanent neighbor entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Neighbor {
    /// The interface.
    pub link: LinkName,
    /// Whose.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// A VXLAN forwarding entry: frames for `mac` go to `remote`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forward {
    /// The VXLAN device.
    pub link: LinkName,
    /// Inner destination.
    pub mac: Mac,
    /// Outer destination.
    pub remote: IpAddr,
}

/// Accept a network in FORWARD of iptables (ip6tables for an IPv6 network).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Accept {
    /// The network's CIDR.
    pub cidr: Prefix,
}

/// A route that throws packets away. Its metric is so high that any other route to the same destination comes first: the
/// bridge's, while it is up. Marked with our protocol number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blackhole {
    /// Where to.
    pub destination: Prefix,
}

impl Blackhole {
    /// Its metric.
    pub const METRIC: u32 = 65_535;
}

/// Who put a route there (rtm_protocol).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RouteProtocol(pub u8);

impl RouteProtocol {
    /// `RTPROT_BOOT`, what upstream and a plain `ip route add` write.
    pub const BOOT: Self = Self(3);
    /// Ours: marks routes that do not leave by a device of ours (docs/adr: route protocol number).
    pub const FLANNEL: Self = Self(70);
}

/// Scope of a route.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RouteScope {
    /// `RT_SCOPE_UNIVERSE`
    Global,
    /// `RT_SCOPE_LINK`
    Link,
    /// Any other, by its number.
    Other(u8),
}

impl RouteScope {
    const LINK: u8 = 253;

    /// That of a number (uapi/linux/rtnetlink.h `rt_scope_t`).
    pub const fn of(number: u8) -> Self {
        match number {
            0 => Self::Global,
            Self::LINK => Self::Link,
            other => Self::Other(other),
        }
    }

    /// Its number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Global => 0,
            Self::Link => Self::LINK,
            Self::Other(number) => number,
        }
    }
}

/// A table of routes, by number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RouteTable(pub u32);

impl RouteTable {
    /// The one that is looked at without further rules (`RT_TABLE_MAIN`).
    pub const MAIN: Self = Self(254);
}

impl Default for RouteTable {
    fn default() -> Self {
        Self::MAIN
    }
}

/// What few routes have.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RouteExtras {
    /// Its table.
    pub table: RouteTable,
    /// Largest packet to there, in bytes. None is let be.
    pub mtu: Option<u32>,
    /// Largest TCP segment that is announced to there, in bytes. None is let be.
    pub advmss: Option<u32>,
}

/// A unicast route.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// Destination.
    pub destination: Prefix,
    /// Gateway; none for a directly connected destination.
    pub via: Option<IpAddr>,
    /// Interface.
    pub link: LinkName,
    /// Take the gateway for reachable without a route to it.
    pub onlink: bool,
    /// Metric; 0 is none for IPv4. IPv6 always has one, and the kernel fills in 1024 (uapi/linux/ipv6_route.h).
    pub metric: u32,
    /// Scope.
    pub scope: RouteScope,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Owner.
    pub protocol: RouteProtocol,
    /// What few routes have.
    pub extras: RouteExtras,
}

impl Fact {
    /// What this fact is about.
    pub fn key(&self) -> Key {
        match self {
            Self::Sysctl(Sysctl { link: None, path, .. }) => {
                Key::HostSysctl(path.ends_with("/forwarding"), path.clone())
            }
            Self::Sysctl(Sysctl { link: Some(link), path, .. }) => Key::LinkSysctl(*link, path.clone()),
            Self::Link(link) => Key::Link(link.name),
            Self::BridgePort(port) => Key::BridgePort(port.link),
            Self::PortVlans(vlans) => Key::PortVlans(vlans.link),
            Self::Guard(guard) => Key::Guard(guard.link),
            Self::Address(address) => Key::Address(address.link, address.address),
            Self::Neighbor(neighbor) => Key::Neighbor(neighbor.link, neighbor.ip),
            Self::Forward(forward) => Key::Forward(forward.link, forward.mac),
            Self::Table(table) => Key::Table(table.name.clone()),
            Self::Accept(accept) => Key::Accept(accept.cidr),
            Self::Route(route) => {
                Key::Route(route.via.is_some(), route.extras.table, route.destination, route.metric)
            }
            Self::Blackhole(blackhole) => Key::Blackhole(blackhole.destination),
        }
    }

    /// The interface without which the fact cannot be true, if any.
    pub fn link(&self) -> Option<LinkName> {
        match self {
            Self::Sysctl(sysctl) => sysctl.link,
            Self::Link(link) => Some(link.name),
            Self::BridgePort(port) => Some(port.link),
            Self::PortVlans(vlans) => Some(vlans.link),
            Self::Guard(guard) => Some(guard.link),
            Self::Address(address) => Some(address.link),
            Self::Neighbor(neighbor) => Some(neighbor.link),
            Self::Forward(forward) => Some(forward.link),
            Self::Route(route) => Some(route.link),
            Self::Table(_) | Self::Accept(_) | Self::Blackhole(_) => None,
        }
    }

    /// A short word for the kind, for counters: `route`, `link`...
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Sysctl(_) => "sysctl",
            Self::Link(_) => "link",
            Self::BridgePort(_) => "bridge_port",
            Self::PortVlans(_) => "port_vlans",
            Self::Guard(_) => "guard",
            Self::Address(_) => "address",
            Self::Neighbor(_) => "neighbor",
            Self::Forward(_) => "forward",
            Self::Table(_) => "table",
            Self::Accept(_) => "accept",
            Self::Route(_) => "route",
            Self::Blackhole(_) => "blackhole",
        }
    }

    /// Whether what was observed under the same key is what this desired fact asks for.
    pub fn satisfied_by(&self, observed: &Self) -> bool {
        match (self, observed) {
            (Self::Link(want), Self::Link(have)) => want.satisfied_by(have),
            (Self::Address(want), Self::Address(have)) => {
                want.link == have.link && want.address == have.address
            }
            (Self::BridgePort(want), Self::BridgePort(have)) => want.satisfied_by(have),
            (Self::PortVlans(want), Self::PortVlans(have)) => want.satisfied_by(have),
            (Self::Route(want), Self::Route(have)) => want.satisfied_by(have),
            (want, have) => want == have,
        }
    }
}

impl Link {
    fn satisfied_by(&self, have: &Self) -> bool {
        self.kind.same_device(&have.kind)
            && self.name == have.name
            && (self.mtu.is_none() || self.mtu == have.mtu)
            && (self.mac.is_none() || self.mac == have.mac)
            && (self.alias.is_none() || self.alias == have.alias)
            && (!self.up || have.up)
            && (!self.modes.promiscuous || have.modes.promiscuous)
            && (!self.modes.vlan_filtering || have.modes.vlan_filtering)
    }

    /// Whether the two cannot exist at the same time although their names differ: the kernel refuses a second VXLAN
    /// device with the same VNI and port (drivers/net/vxlan/vxlan_core.c `vxlan_vni_in_use`).
    pub fn excludes(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (LinkKind::Vxlan(a), LinkKind::Vxlan(b)) => {
                self.name != other.name
                    && a.vni == b.vni
                    && a.port == b.port
                    && a.local.is_ipv4() == b.local.is_ipv4()
            }
            _ => false,
        }
    }
}

impl Route {
    fn satisfied_by(&self, have: &Self) -> bool {
        let RouteExtras { mtu, advmss, .. } = have.extras;
        let extras = RouteExtras {
            mtu: self.extras.mtu.or(mtu),
            advmss: self.extras.advmss.or(advmss),
            ..self.extras
        };
        Self { extras, ..self.clone() } == *have
    }

    /// Whether the old route must go before this one can come: the kernel refuses an IPv6 gateway as on-link while a route
    /// to it leaves by another link (net/ipv6/route.c `ip6_route_check_nh_onlink`), and the route to a peer's
    /// subnet is a route to the gateway in it.
    pub fn makes_way(&self, old: &Self) -> bool {
        self.onlink
            && self.link != old.link
            && self.via.is_some_and(|via| via.is_ipv6() && old.destination.contains(via))
    }
}

impl LinkKind {
    /// Whether a device of the kind `have` can become this one without being made anew.
    pub fn same_device(&self, have: &Self) -> bool {
        match (self, have) {
            (Self::Veth { .. }, Self::Veth { .. }) | (Self::Given, _) => true,
            (want, have) => want == have,
        }
    }
}

/// Two planners want different things of one key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("two plans disagree: one wants `{kept}`, another `{refused}`")]
pub struct Conflict {
    /// What was there first.
    pub kept: Box<Fact>,
    /// What did not get in.
    pub refused: Box<Fact>,
}

/// A set of facts, at most one about each key, in the kernel's order.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Facts(BTreeMap<Key, Fact>);

impl Facts {
    /// Puts a fact in. Two planners may ask for the same fact, never for two different ones about one key.
    pub fn add(&mut self, fact: Fact) -> Result<(), Conflict> {
        match self.0.entry(fact.key()) {
            Entry::Vacant(free) => {
                free.insert(fact);
                Ok(())
            }
            Entry::Occupied(kept) if *kept.get() == fact => Ok(()),
            Entry::Occupied(kept) => {
                Err(Conflict { kept: Box::new(kept.get().clone()), refused: Box::new(fact) })
            }
        }
    }

    /// Puts a fact in, or in the place of the one about the same key: what was seen last is true.
    pub fn set(&mut self, fact: Fact) {
        self.0.insert(fact.key(), fact);
    }

    /// Every fact of both.
    pub fn join(&mut self, other: Self) -> Result<(), Conflict> {
        other.0.into_values().try_for_each(|fact| self.add(fact))
    }

    /// The fact about a key.
    pub fn get(&self, key: &Key) -> Option<&Fact> {
        self.0.get(key)
    }

    /// Takes the fact about a key out.
    pub fn remove(&mut self, key: &Key) -> Option<Fact> {
        self.0.remove(key)
    }

    /// In the kernel's order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Fact> {
        self.0.values()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keeps the facts that the test holds for.
    pub fn retain(&mut self, mut keep: impl FnMut(&Fact) -> bool) {
        self.0.retain(|_, fact| keep(fact));
    }
}

impl IntoIterator for Facts {
    type Item = Fact;
    type IntoIter = std::collections::btree_map::IntoValues<Key, Fact>;

    /// In the kernel's order.
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_values()
    }
}

impl FromIterator<Fact> for Facts {
    fn from_iter<I: IntoIterator<Item = Fact>>(facts: I) -> Self {
        Self(facts.into_iter().map(|fact| (fact.key(), fact)).collect())
    }
}

/// One step from what is to what should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change<'a> {
    /// Nothing is there yet.
    Create(&'a Fact),
    /// Something else is there; replaced in one step where the kernel can.
    Replace {
        /// What is there.
        old: &'a Fact,
        /// What should be.
        new: &'a Fact,
    },
    /// Nothing should be there.
    Delete(&'a Fact),
}

impl<'a> Change<'a> {
    /// The fact this is about: the new one, or the one that goes.
    pub fn fact(&self) -> &'a Fact {
        match self {
            Self::Create(fact) | Self::Replace { new: fact, .. } | Self::Delete(fact) => fact,
        }
    }

    /// `added`, `replaced` or `removed`.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Create(_) => "added",
            Self::Replace { .. } => "replaced",
            Self::Delete(_) => "removed",
        }
    }
}

/// What is left to do: first the deletion of links that stand in the way of new ones, then creations and replacements
/// in the kernel's order, then all other deletions in reverse. Sysctls are set, never unset.
pub fn diff<'a>(desired: &'a Facts, observed: &'a Facts) -> Vec<Change<'a>> {
    let mut changes = Vec::new();
    let mut ahead: Vec<&Key> = Vec::new();
    for (key, fact) in &observed.0 {
        if let Fact::Link(old) = fact
            && !desired.0.contains_key(key)
            && desired.iter().any(|new| matches!(new, Fact::Link(new) if new.excludes(old)))
        {
            ahead.push(key);
            changes.push(Change::Delete(fact));
        }
    }
    for (key, new) in &desired.0 {
        match observed.0.get(key) {
            None => changes.push(Change::Create(new)),
            Some(old) if !new.satisfied_by(old) => changes.push(Change::Replace { old, new }),
            Some(_) => {}
        }
    }
    for (key, fact) in observed.0.iter().rev() {
        if !desired.0.contains_key(key) && !ahead.contains(&key) && !matches!(fact, Fact::Sysctl(_)) {
            changes.push(Change::Delete(fact));
        }
    }
    changes
}
