//! The kernel of one network namespace.
//!
//! A [`Kernel`] is bound to the namespace it was opened in or for, and can never act on another. Interface indices are
//! looked up at the moment of use and never leave this directory.

mod address;
mod behind;
mod bridge_port;
mod device;
mod forward;
mod ipip;
mod iptables;
mod link;
mod neighbor;
mod netlink;
mod netns;
pub mod nftables;
mod own_routes;
mod policy;
mod port_vlan;
mod read;
mod route;
mod shaper;
mod sysctl;
mod traffic;
mod wireguard;
mod writer;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

pub use self::behind::Outlet;
pub use self::device::{Device, Turn};
use self::netlink::{Protocol, Refusal, Socket};
pub use self::netns::Namespace;
pub use self::nftables::Netfilter;
pub use self::read::{DefaultRoute, HostAddress, Interface, Way};
pub use self::shaper::{MadeFunnel, SeenBucket, SeenShaping};
use self::writer::Writer;
use super::{World, WorldError};
use crate::words::fact::{Address, Change, Fact, Facts, Forward, Neighbor, PortVlans, Rest, Sysctl, Tally};
use crate::words::name::LinkName;
use crate::words::territory::Territory;
use crate::words::wireguard::PublicKey;

/// In a host's namespace, with up to this many interfaces the kernel is asked about each of them; with more, about all,
/// and the answer is sifted here. A container's namespace is so small that asking about all is always less work.
const ASKED_SINGLY_MAX: usize = 4;

/// The kernel of one network namespace.
pub struct Kernel {
    socket: Socket,
    /// Opened when the first fact asks for it, and kept: closing it waits for the kernel to clear what was deleted.
    netfilter: Option<Netfilter>,
    /// NETLINK_XFRM, opened when policies are looked at; none inside where the kernel has no such thing.
    xfrm: Option<Option<Socket>>,
    /// Opened when the first device of the kind is seen or made.
    wireguard: Option<wireguard::Wireguard>,
    /// None: the namespace of the threads of this process.
    namespace: Option<Namespace>,
    /// Where veth peers are born that belong into the container.
    sandbox: Option<Namespace>,
    /// The host's routes as they were a moment ago, for the next look; none after any change.
    glanced: Option<Vec<route::Seen>>,
}

impl Kernel {
    /// The kernel as the calling thread sees it.
    pub fn open() -> Result<Self, WorldError> {
        let socket = Socket::open(Protocol::Route, None).map_err(|e| io_error("open a netlink socket", e))?;
        Ok(Self::with(socket, None))
    }

    /// The kernel of another namespace, given by path.
    pub fn open_in(path: &Path) -> Result<Self, WorldError> {
        let opened = Namespace::open(path).and_then(Self::inside);
        opened.map_err(|e| io_error(format!("open a netlink socket in the namespace {}", path.display()), e))
    }

    /// The kernel of another namespace.
    pub fn open_inside(namespace: Namespace) -> Result<Self, WorldError> {
        Self::inside(namespace).map_err(|e| io_error("open a netlink socket in another namespace", e))
    }

    fn inside(namespace: Namespace) -> io::Result<Self> {
        let socket = Socket::open(Protocol::Route, Some(&namespace))?;
        Ok(Self::with(socket, Some(namespace)))
    }

    fn with(socket: Socket, namespace: Option<Namespace>) -> Self {
        let (netfilter, xfrm, wireguard) = (None, None, None);
        Self { socket, netfilter, xfrm, wireguard, namespace, sandbox: None, glanced: None }
    }

    /// Says where the peers of veth pairs are born that belong into the container.
    pub fn set_sandbox(&mut self, sandbox: Namespace) {
        self.sandbox = Some(sandbox);
    }

    /// The number of the socket for links, addresses, neighbors and routes: notices of what it changed carry it. 0 before its first look.
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    /// The same of the socket for policies of IPsec.
    pub fn policy_port(&self) -> u32 {
        self.xfrm.as_ref().and_then(Option::as_ref).map_or(0, Socket::port)
    }

    /// The same of the socket for the packet filter.
    pub fn filter_port(&self) -> u32 {
        self.netfilter.as_ref().map_or(0, Netfilter::socket_number)
    }

    /// Does something in this kernel's namespace: here, or on a short-lived thread inside.
    fn here<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        match &self.namespace {
            None => Ok(work()),
            Some(namespace) => namespace.run(work),
        }
    }

    /// The packet filter of this kernel's namespace.
    pub fn netfilter(&mut self) -> Result<&mut Netfilter, WorldError> {
        let opened = match self.netfilter.take() {
            Some(netfilter) => netfilter,
            None => self.here(Netfilter::open).map_err(|e| io_error("enter the namespace", e))??,
        };
        Ok(self.netfilter.insert(opened))
    }

    /// Makes changes about tables and accepts, which are one transaction for each table.
    fn filter(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        match self.netfilter() {
            Ok(netfilter) => netfilter.apply(changes),
            Err(error) => {
                let text = error.to_string();
                let again =
                    || WorldError::Unsupported { action: "write firewall rules".into(), what: text.clone() };
                changes.iter().map(|_| Err(again())).collect()
            }
        }
    }

    /// The kernel's WireGuard; none if it has none. Asking loads the module, where there is one.
    fn wireguard(&mut self) -> Result<Option<&mut wireguard::Wireguard>, WorldError> {
        if self.wireguard.is_none() {
            let opened = wireguard::Wireguard::open(self.namespace.as_ref());
            self.wireguard = opened.map_err(|e| io_error("ask for the kernel's WireGuard", e))?;
        }
        Ok(self.wireguard.as_mut())
    }

    /// Whether this kernel has WireGuard.
    pub fn has_wireguard(&mut self) -> Result<bool, WorldError> {
        Ok(self.wireguard()?.is_some())
    }

    /// WireGuard peers that were sent something and never agreed on a session, when they were last looked at.
    pub fn silent_wireguard_peers(&self) -> &[(LinkName, PublicKey)] {
        self.wireguard.as_ref().map_or(&[], wireguard::Wireguard::silent)
    }

    fn observe_wireguard(&mut self, ours: &Ours, tally: &mut Tally<'_>) -> Result<(), WorldError> {
        let devices = ours.seen.iter().filter(|seen| matches!(seen.kind, link::SeenKind::Wireguard));
        let devices: Vec<_> = devices.map(|seen| (seen.index, seen.name)).collect();
        if devices.is_empty() {
            return Ok(());
        }
        match self.wireguard()? {
            Some(wireguard) => wireguard.observe(&devices, tally.few()),
            None => Ok(()),
        }
    }

    fn tell_wireguard(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        let what = match self.wireguard() {
            Ok(Some(wireguard)) => return wireguard.apply(changes),
            Ok(None) => "this kernel has no WireGuard".to_owned(),
            Err(error) => error.to_string(),
        };
        let unsupported =
            |change| Err(WorldError::Unsupported { action: action(change), what: what.clone() });
        changes.iter().map(unsupported).collect()
    }

    fn observe_sysctls(&self, territory: &Territory, tally: &mut Tally<'_>) -> Result<(), WorldError> {
        if territory.sysctls.is_empty() {
            return Ok(());
        }
        let read = || -> Result<Vec<Fact>, WorldError> {
            let mut found = Vec::new();
            for (link, path) in &territory.sysctls {
                let value =
                    sysctl::read(path).map_err(|e| io_error(format!("read the setting {path}"), e))?;
                found.extend(
                    value.map(|value| Fact::Sysctl(Sysctl { link: *link, path: path.clone(), value })),
                );
            }
            Ok(found)
        };
        let found = self.here(read).map_err(|e| io_error("enter the namespace", e))??;
        found.into_iter().for_each(|fact| tally.see(fact));
        Ok(())
    }

    /// Our interfaces, and the names behind the indices that facts about them need.
    fn look(&mut self, territory: &Territory) -> Result<Ours, WorldError> {
        let failed = |e| io_error("look at the interfaces", e);
        let socket = &mut self.socket;
        let mut names = HashMap::new();
        let seen = match territory.alias {
            Some(_) => {
                let all =
                    link::all(socket).map_err(failed)?.map_err(|r| refused("look at the interfaces", r))?;
                names.extend(all.iter().map(|seen| (seen.index, seen.name)));
                all
            }
            None => {
                let asked: Vec<_> = territory.links.iter().copied().collect();
                let found: Vec<_> =
                    link::by_name(socket, &asked).map_err(failed)?.into_iter().flatten().collect();
                names.extend(found.iter().map(|seen| (seen.index, seen.name)));
                let missing: BTreeSet<_> =
                    found.iter().flat_map(leads_to).filter(|index| !names.contains_key(index)).collect();
                let missing: Vec<_> = missing.into_iter().collect();
                let others = link::by_index(socket, &missing).map_err(failed)?;
                names.extend(others.into_iter().flatten().map(|seen| (seen.index, seen.name)));
                found
            }
        };
        let name_of = |index: u32| names.get(&index).copied();
        let seen: Vec<_> =
            seen.into_iter().filter(|seen| territory.holds_link(&seen.fact(name_of))).collect();
        let links = seen.iter().map(|seen| seen.name).collect();
        let singly = self.namespace.is_none() && seen.len() <= ASKED_SINGLY_MAX;
        Ok(Ours { seen, links, names, singly })
    }

    fn observe_addresses(
        &mut self,
        t: &Territory,
        ours: &Ours,
        tally: &mut Tally<'_>,
    ) -> Result<(), WorldError> {
        for index in ours.asked() {
            let found = address::dump(&mut self.socket, index);
            for seen in settled("look at the addresses", found)? {
                let Some(link) = ours.name(seen.index) else { continue };
                let no_prefix_route = seen.no_prefix_route();
                let detect_duplicates = seen.tentative();
                let address = Address { link, address: seen.address, no_prefix_route, detect_duplicates };
                if t.holds_address(&ours.links, &address) {
                    tally.see(Fact::Address(address));
                }
            }
        }
        Ok(())
    }

    fn observe_neighbors(&mut self, ours: &Ours, tally: &mut Tally<'_>) -> Result<(), WorldError> {
        for index in ours.asked() {
            let found = neighbor::dump(&mut self.socket, index);
            for neighbor::Seen { index, ip, mac } in settled("look at the neighbors", found)? {
                if let Some(link) = ours.name(index) {
                    tally.see(Fact::Neighbor(Neighbor { link, ip, mac }));
                }
            }
        }
        let vxlans = ours.seen.iter().filter(|seen| matches!(seen.kind, link::SeenKind::Vxlan(_)));
        for vxlan in vxlans {
            let found = forward::dump(&mut self.socket, vxlan.index);
            for forward::Seen { index, mac, remote } in settled("look at the forwarding entries", found)? {
                if index == vxlan.index {
                    tally.see(Fact::Forward(Forward { link: vxlan.name, mac, remote }));
                }
            }
        }
        Ok(())
    }

    fn observe_vlans(&mut self, t: &Territory, ours: &Ours, tally: &mut Tally<'_>) -> Result<(), WorldError> {
        if t.vlans.is_empty() {
            return Ok(());
        }
        let found = settled("look at the VLANs of the bridges' ports", port_vlan::dump(&mut self.socket))?;
        for port_vlan::Seen { index, members } in found {
            if let Some(link) = ours.names.get(&index).filter(|link| t.vlans.contains(link)) {
                let not_default = !members.contains_key(&PortVlans::DEFAULT);
                tally.see(Fact::PortVlans(PortVlans { link: *link, members, not_default }));
            }
        }
        Ok(())
    }

    /// Without the kernel's IPsec there are no policies to see.
    fn observe_policies(&mut self, t: &Territory, tally: &mut Tally<'_>) -> Result<(), WorldError> {
        if !t.policies || t.cidrs.is_empty() {
            return Ok(());
        }
        let namespace = self.namespace.as_ref();
        let socket = self.xfrm.get_or_insert_with(|| Socket::open(Protocol::Xfrm, namespace).ok());
        let Some(socket) = socket else { return Ok(()) };
        let found = settled("look at the policies of IPsec", policy::dump(socket))?;
        found.into_iter().filter(|policy| t.holds_policy(policy)).for_each(|p| tally.see(Fact::Policy(p)));
        Ok(())
    }

    fn write_policies(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        if let Some(Some(socket)) = &mut self.xfrm {
            return policy::apply(socket, changes);
        }
        let what = "this kernel has no IPsec (CONFIG_XFRM_USER): modprobe xfrm_user esp4";
        let unsupported =
            |change| Err(WorldError::Unsupported { action: action(change), what: what.to_owned() });
        // It may have come meanwhile.
        self.xfrm = None;
        changes.iter().map(unsupported).collect()
    }

    /// Shows everything that is true inside the territory.
    fn see(&mut self, territory: &Territory, tally: &mut Tally<'_>) -> Result<(), WorldError> {
        self.observe_sysctls(territory, tally)?;
        let mut ours = self.look(territory)?;
        for seen in &ours.seen {
            let name_of = |index| ours.names.get(&index).copied();
            tally.see(Fact::Link(Box::new(seen.fact(name_of))));
            if let Some(port) = bridge_port::fact(seen, name_of) {
                tally.see(Fact::BridgePort(port));
            }
        }
        self.observe_addresses(territory, &ours, tally)?;
        self.observe_neighbors(&ours, tally)?;
        self.observe_wireguard(&ours, tally)?;
        self.name_outsiders(territory, &mut ours)?;
        self.observe_routes(territory, &ours, tally)?;
        self.observe_policies(territory, tally)?;
        self.observe_vlans(territory, &ours, tally)?;
        let filtered = !territory.tables.is_empty() || territory.accepts || territory.shared_chains;
        if filtered || !territory.guards.is_empty() {
            self.netfilter()?.observe(territory, tally)?;
        }
        Ok(())
    }
}

impl World for Kernel {
    fn observe(&mut self, territory: &Territory) -> Result<Facts, WorldError> {
        let nothing = Facts::default();
        let mut tally = Tally::new(&nothing);
        self.see(territory, &mut tally)?;
        Ok(tally.close().found)
    }

    fn compare<'a>(&mut self, territory: &Territory, wanted: &'a Facts) -> Result<Rest<'a>, WorldError> {
        let mut tally = Tally::new(wanted);
        self.see(territory, &mut tally)?;
        Ok(tally.close())
    }

    fn apply(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        self.glanced = None;
        let mut results = Vec::with_capacity(changes.len());
        // Neighbors in the list that the same part of the kernel answers for go to it together.
        for run in changes.chunk_by(|a, b| Part::of(a) == Part::of(b)) {
            match run.first().map(Part::of) {
                Some(Part::Rtnetlink) => {
                    let sandbox = self.sandbox.as_ref().map(AsRawFd::as_raw_fd);
                    results.extend(Writer::new(&mut self.socket, run, sandbox).write());
                }
                Some(Part::Xfrm) => results.extend(self.write_policies(run)),
                Some(Part::Netfilter) => results.extend(self.filter(run)),
                Some(Part::Wireguard) => results.extend(self.tell_wireguard(run)),
                Some(Part::Settings) => {
                    let write = || run.iter().map(write_setting).collect::<Vec<_>>();
                    let written = self.here(write);
                    results.extend(written.unwrap_or_else(|error| {
                        let failed = |change| Err(io_error(action(change), again(&error)));
                        run.iter().map(failed).collect()
                    }));
                }
                None => {}
            }
        }
        results
    }
}

/// The part of the kernel that answers for a fact.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Rtnetlink,
    Netfilter,
    Xfrm,
    Wireguard,
    Settings,
}

impl Part {
    fn of(change: &Change<'_>) -> Self {
        match change.fact() {
            Fact::Sysctl(_) => Self::Settings,
            Fact::SharedChain(_)
            | Fact::Table(_)
            | Fact::TunnelHost(_)
            | Fact::Accept(_)
            | Fact::Guard(_) => Self::Netfilter,
            Fact::Policy(_) => Self::Xfrm,
            Fact::WireguardDevice(_) | Fact::WireguardPeer(_) => Self::Wireguard,
            Fact::Link(_)
            | Fact::BridgePort(_)
            | Fact::PortVlans(_)
            | Fact::Address(_)
            | Fact::Neighbor(_)
            | Fact::Forward(_)
            | Fact::Route(_)
            | Fact::Blackhole(_) => Self::Rtnetlink,
        }
    }
}

/// Settings are set, never unset.
fn write_setting(change: &Change<'_>) -> Result<(), WorldError> {
    match (change, change.fact()) {
        (Change::Create(_) | Change::Replace { .. }, Fact::Sysctl(setting)) => {
            sysctl::write(setting).map_err(|e| io_error(action(change), e))
        }
        _ => Ok(()),
    }
}

/// The same error once more, for the next of several changes that failed together.
fn again(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

/// Our interfaces as they were at one look.
struct Ours {
    seen: Vec<link::Seen>,
    links: BTreeSet<LinkName>,
    names: HashMap<u32, LinkName>,
    /// Whether the kernel is asked about each of ours, or about all interfaces.
    singly: bool,
}

impl Ours {
    /// What to ask about: each of our interfaces, or (none) all interfaces at once.
    fn asked(&self) -> impl Iterator<Item = Option<u32>> {
        let each = self.seen.iter().filter(|_| self.singly).map(|seen| Some(seen.index));
        let all = !self.singly && !self.seen.is_empty();
        each.chain(all.then_some(None))
    }

    /// The name of one of ours.
    fn name(&self, index: u32) -> Option<LinkName> {
        self.names.get(&index).copied().filter(|name| self.links.contains(name))
    }
}

/// Indices that facts about this interface name.
fn leads_to(seen: &link::Seen) -> impl Iterator<Item = u32> + use<> {
    let underlay = match &seen.kind {
        link::SeenKind::Vxlan(vxlan) => vxlan.underlay,
        link::SeenKind::Bridge { .. }
        | link::SeenKind::Veth
        | link::SeenKind::Ipip(_)
        | link::SeenKind::Wireguard
        | link::SeenKind::Funnel
        | link::SeenKind::Other => None,
    };
    underlay.into_iter().chain(seen.master)
}

/// What a change is called in an error.
fn action(change: &Change<'_>) -> String {
    let verb = match change {
        Change::Create(_) => "add",
        Change::Replace { .. } => "replace",
        Change::Delete(_) => "remove",
    };
    let fact = change.fact();
    format!("{verb} {} (`{fact}`)", fact.kind().replace('_', " "))
}

fn io_error(action: impl Into<String>, source: io::Error) -> WorldError {
    WorldError::Io { action: action.into(), source }
}

fn refused(action: impl Into<String>, refusal: Refusal) -> WorldError {
    let source = io::Error::from_raw_os_error(refusal.errno);
    WorldError::Refused { action: action.into(), detail: refusal.detail, source }
}

/// The answer to a dump.
fn settled<T>(action: &str, answer: io::Result<Result<Vec<T>, Refusal>>) -> Result<Vec<T>, WorldError> {
    answer.map_err(|e| io_error(action, e))?.map_err(|refusal| refused(action, refusal))
}
