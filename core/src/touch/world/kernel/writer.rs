//! Changes on their way into the kernel: many in one send, each answered for by itself.

use std::collections::{HashMap, HashSet};
use std::os::fd::RawFd;

use super::link::{Request, Settle};
use super::netlink::{Batch, Refusal, Socket};
use super::{
    action, address, again, bridge_port, forward, io_error, link, neighbor, port_vlan, refused, route,
};
use crate::touch::world::WorldError;
use crate::words::addr::Prefix;
use crate::words::fact::{Change, Fact, Link, LinkKind, Route};
use crate::words::name::LinkName;
use crate::words::territory::Territory;

/// What a message may fail with although its change is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pardon {
    Nothing,
    /// What should go is gone.
    Absence,
    /// What should be made is there; whether it is the right one is looked up at the end.
    Existence,
}

impl Pardon {
    fn covers(self, errno: i32) -> bool {
        match self {
            Self::Nothing => false,
            Self::Absence => {
                matches!(errno, libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL | libc::ENXIO)
            }
            Self::Existence => errno == libc::EEXIST,
        }
    }
}

/// Writes the changes of one `apply`.
pub(super) struct Writer<'a> {
    socket: &'a mut Socket,
    changes: &'a [Change<'a>],
    sandbox: Option<RawFd>,
    batch: Batch,
    /// For each message of the batch: the change it belongs to, and what it may fail with.
    owners: Vec<(usize, Pardon)>,
    results: Vec<Result<(), WorldError>>,
    /// Indices looked up during this `apply`; none for an interface that is not there.
    indices: HashMap<LinkName, Option<u32>>,
    /// Links that the batch not yet sent makes or deletes: their indices are not known before it is sent.
    unsettled: HashSet<LinkName>,
    /// Changes that found their link made already, as the kernel put it.
    taken: Vec<(usize, Refusal)>,
    /// Who wrote the route to a destination with a metric; kept only while routes are also deleted.
    routes: Option<HashMap<(Prefix, u32), usize>>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(socket: &'a mut Socket, changes: &'a [Change<'a>], sandbox: Option<RawFd>) -> Self {
        Self {
            socket,
            changes,
            sandbox,
            batch: Batch::default(),
            owners: Vec::new(),
            results: changes.iter().map(|_| Ok(())).collect(),
            indices: HashMap::new(),
            unsettled: HashSet::new(),
            taken: Vec::new(),
            routes: changes.iter().any(deletes_route).then(HashMap::new),
        }
    }

    /// Writes them all, in order, and returns what became of each.
    pub(super) fn write(mut self) -> Vec<Result<(), WorldError>> {
        for (place, change) in self.changes.iter().enumerate() {
            if let Err(error) = self.translate(place, change) {
                self.record(place, Err(error));
            }
            if self.socket.is_full(&self.batch) {
                self.flush();
            }
        }
        self.flush();
        for (place, refusal) in std::mem::take(&mut self.taken) {
            let result = self.verify_taken(place, refusal);
            self.record(place, result);
        }
        self.results
    }

    /// The first failure of a change is the one that counts.
    fn record(&mut self, place: usize, result: Result<(), WorldError>) {
        if let Some(slot) = self.results.get_mut(place)
            && slot.is_ok()
        {
            *slot = result;
        }
    }

    fn translate(&mut self, place: usize, change: &Change<'_>) -> Result<(), WorldError> {
        let delete = matches!(change, Change::Delete(_));
        let pardon = if delete { Pardon::Absence } else { Pardon::Nothing };
        match change.fact() {
            Fact::Link(link) => return self.link(place, change, link),
            Fact::BridgePort(port) if delete => self.push(place, &bridge_port::leave(port), pardon),
            Fact::BridgePort(port) => {
                let bridge = self.index(change, port.bridge)?;
                self.push(place, &bridge_port::join(port, bridge), pardon);
                if let Some(request) = bridge_port::modes(port) {
                    self.push(place, &request, pardon);
                }
            }
            Fact::PortVlans(vlans) => {
                let Some(index) = self.index_or_gone(change, vlans.link, delete)? else { return Ok(()) };
                if delete {
                    self.push(place, &port_vlan::leave(vlans, index), pardon);
                    return Ok(());
                }
                if let Some(request) = port_vlan::leave_default(vlans, index) {
                    self.push(place, &request, Pardon::Absence);
                }
                self.push(place, &port_vlan::join(vlans, index), pardon);
            }
            Fact::Address(address) => {
                let Some(index) = self.index_or_gone(change, address.link, delete)? else { return Ok(()) };
                let request =
                    if delete { address::delete(address, index) } else { address::add(address, index) };
                self.push(place, &request, pardon);
            }
            Fact::Neighbor(neighbor) => {
                let Some(index) = self.index_or_gone(change, neighbor.link, delete)? else { return Ok(()) };
                let request =
                    if delete { neighbor::delete(neighbor, index) } else { neighbor::write(neighbor, index) };
                self.push(place, &request, pardon);
            }
            Fact::Forward(entry) => {
                let Some(index) = self.index_or_gone(change, entry.link, delete)? else { return Ok(()) };
                let request =
                    if delete { forward::delete(entry, index) } else { forward::write(entry, index) };
                self.push(place, &request, pardon);
            }
            Fact::Route(route) => {
                if delete && self.is_replaced(route) {
                    return Ok(());
                }
                let Some(index) = self.index_or_gone(change, route.link, delete)? else { return Ok(()) };
                if let Change::Replace { old: Fact::Route(old), .. } = change
                    && route.makes_way(old)
                    && let Some(index) = self.index_or_gone(change, old.link, true)?
                {
                    self.push(place, &route::delete(old, index), Pardon::Absence);
                }
                let request = if delete { route::delete(route, index) } else { route::write(route, index) };
                self.push(place, &request, pardon);
                if let (Some(routes), false) = (&mut self.routes, delete) {
                    routes.insert((route.destination, route.metric), place);
                }
            }
            Fact::Blackhole(blackhole) => {
                let destination = blackhole.destination;
                let request = if delete {
                    route::delete_blackhole(destination)
                } else {
                    route::write_blackhole(destination)
                };
                self.push(place, &request, pardon);
            }
            // Not rtnetlink's: the kernel's other parts answer for these.
            Fact::Sysctl(_)
            | Fact::SharedChain(_)
            | Fact::Table(_)
            | Fact::TunnelHost(_)
            | Fact::Accept(_)
            | Fact::Guard(_)
            | Fact::Policy(_)
            | Fact::WireguardDevice(_)
            | Fact::WireguardPeer(_) => {}
        }
        Ok(())
    }

    /// Whether another route to the same destination took this one's place. The kernel keeps one for each metric, and
    /// would take the new one for the old one if that had no gateway (net/ipv4/fib_semantics.c `fib_nh_match`).
    fn is_replaced(&mut self, route: &Route) -> bool {
        let by =
            self.routes.as_ref().and_then(|routes| routes.get(&(route.destination, route.metric)).copied());
        let Some(place) = by else { return false };
        self.flush();
        self.results.get(place).is_some_and(Result::is_ok)
    }

    fn link(&mut self, place: usize, change: &Change<'_>, link: &Link) -> Result<(), WorldError> {
        match change {
            Change::Delete(_) => self.delete_link(place, link.name),
            Change::Create(_) => self.create_link(place, change, link, Pardon::Existence)?,
            Change::Replace { old: Fact::Link(old), .. } if link.kind.same_device(&old.kind) => {
                // With a MAC, even the same one, the kernel forgets the neighbors (net/core/neighbour.c `neigh_changeaddr`).
                let changed = Link { mac: link.mac.filter(|mac| old.mac != Some(*mac)), ..link.clone() };
                self.push(place, &link::settle(&changed, Settle::Everything), Pardon::Nothing);
                if !old.modes.vlan_filtering
                    && let Some(request) = link::settle_kind(link)
                {
                    self.push(place, &request, Pardon::Nothing);
                }
            }
            Change::Replace { .. } => {
                // The delete may find that somebody else was faster.
                self.delete_link(place, link.name);
                self.create_link(place, change, link, Pardon::Nothing)?;
            }
        }
        Ok(())
    }

    fn create_link(
        &mut self,
        place: usize,
        change: &Change<'_>,
        link: &Link,
        pardon: Pardon,
    ) -> Result<(), WorldError> {
        let mut underlay = None;
        match &link.kind {
            LinkKind::Given => return Err(no_link(change, link.name)),
            LinkKind::Veth { peer: None } if self.is_other_end(place, link.name) => {
                self.push(place, &link::settle(link, Settle::Everything), Pardon::Nothing);
                return Ok(());
            }
            LinkKind::Veth { peer: None } => {
                return Err(unsupported(
                    change,
                    "a veth pair is made with both its ends, and the plan has one",
                ));
            }
            LinkKind::Veth { peer: Some(peer) } if peer.in_sandbox && self.sandbox.is_none() => {
                return Err(unsupported(change, "no container namespace was given for its other end"));
            }
            LinkKind::Ipip(_) | LinkKind::Wireguard => self.refuse_taken_name(change, link)?,
            LinkKind::Veth { .. } | LinkKind::Bridge => {}
            LinkKind::Vxlan(vxlan) => {
                self.refuse_taken_name(change, link)?;
                underlay = Some(self.index(change, vxlan.underlay)?);
            }
        }
        self.push(place, &link::create(link, underlay, self.sandbox), pardon);
        if link::needs_settling(link) {
            self.push(place, &link::settle(link, Settle::AfterCreation), Pardon::Nothing);
        }
        self.unsettled.insert(link.name);
        Ok(())
    }

    /// A device does not take the place of another network's, nor an IPIP device that of what somebody else gave its name to; and nothing is
    /// to be put on those.
    fn refuse_taken_name(&mut self, change: &Change<'_>, link: &Link) -> Result<(), WorldError> {
        self.flush();
        let found = link::by_name(self.socket, &[link.name]).map_err(|e| io_error(action(change), e))?;
        let Some(seen) = found.into_iter().flatten().next() else { return Ok(()) };
        let name = link.name;
        let other = seen.alias().filter(|alias| link.alias.as_deref() != Some(*alias));
        let what = match other.and_then(Territory::network_of_alias) {
            Some(network) => {
                let own = match link.kind {
                    LinkKind::Vxlan(_) => "each network needs a Backend.VNI of its own; ",
                    _ => "",
                };
                format!(
                    "this is network {network}'s device: {own}if nobody serves that one any more: ip link del {name}"
                )
            }
            None if matches!(link.kind, LinkKind::Ipip(_))
                && !matches!(seen.kind, link::SeenKind::Ipip(_)) =>
            {
                format!(
                    "there is another interface of this name that is no ipip device; rename or remove it: ip link del {name}"
                )
            }
            None => return Ok(()),
        };
        self.indices.insert(name, None);
        Err(unsupported(change, &what))
    }

    /// Whether an earlier change makes a pair with this other end here.
    fn is_other_end(&self, place: usize, name: LinkName) -> bool {
        self.changes.iter().take(place).any(|change| match change.fact() {
            Fact::Link(link) => match &link.kind {
                LinkKind::Veth { peer: Some(peer) } => peer.name == name && !peer.in_sandbox,
                _ => false,
            },
            _ => false,
        })
    }

    fn delete_link(&mut self, place: usize, name: LinkName) {
        self.push(place, &link::delete(name), Pardon::Absence);
        self.unsettled.insert(name);
    }

    fn push(&mut self, place: usize, (message, flags): &Request, pardon: Pardon) {
        self.batch.push(message, *flags);
        self.owners.push((place, pardon));
    }

    /// Sends what is in the batch and records what the kernel refused.
    fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let owners = std::mem::take(&mut self.owners);
        match self.socket.write(&mut self.batch) {
            Ok(refusals) => {
                for (at, refusal) in refusals {
                    if let Some((place, pardon)) = owners.get(at) {
                        self.refusal(*place, *pardon, refusal);
                    }
                }
            }
            // Nobody knows what became of these; the next look will tell.
            Err(error) => {
                self.batch = Batch::default();
                for (place, _) in owners {
                    let Some(change) = self.changes.get(place) else { continue };
                    self.record(place, Err(io_error(action(change), again(&error))));
                }
            }
        }
        for name in self.unsettled.drain() {
            self.indices.remove(&name);
        }
    }

    fn refusal(&mut self, place: usize, pardon: Pardon, refusal: Refusal) {
        // What follows on a link that something stood in the way of is judged with it, at the end.
        if self.taken.iter().any(|(taken, _)| *taken == place) {
            return;
        }
        if pardon.covers(refusal.errno) {
            if pardon == Pardon::Existence {
                self.taken.push((place, refusal));
            }
        } else if let Some(change) = self.changes.get(place) {
            let detail = lacking(change, &refusal).or_else(|| refusal.detail.clone());
            self.record(place, Err(refused(action(change), Refusal { detail, ..refusal })));
        }
    }

    /// The index of an interface the change needs.
    fn index(&mut self, change: &Change<'_>, name: LinkName) -> Result<u32, WorldError> {
        if self.unsettled.contains(&name) {
            self.flush();
        }
        let index = match self.indices.get(&name) {
            Some(index) => *index,
            None => {
                let found = link::by_name(self.socket, &[name]).map_err(|e| io_error(action(change), e))?;
                let index = found.into_iter().flatten().map(|seen| seen.index).next();
                self.indices.insert(name, index);
                index
            }
        };
        index.ok_or_else(|| no_link(change, name))
    }

    /// The same; none if the change deletes something that went with its interface.
    fn index_or_gone(
        &mut self,
        change: &Change<'_>,
        name: LinkName,
        delete: bool,
    ) -> Result<Option<u32>, WorldError> {
        match self.index(change, name) {
            Err(WorldError::NoLink { .. }) if delete => Ok(None),
            other => other.map(Some),
        }
    }

    /// Something is in the way of a link. It may be the link itself: made between our look and our write by another
    /// process with the same plan.
    fn verify_taken(&mut self, place: usize, refusal: Refusal) -> Result<(), WorldError> {
        let Some(change) = self.changes.get(place) else { return Ok(()) };
        let Fact::Link(want) = change.fact() else { return Ok(()) };
        let tried = || action(change);
        let found = link::by_name(self.socket, &[want.name]).map_err(|e| io_error(tried(), e))?;
        let Some(seen) = found.into_iter().flatten().next() else {
            let guess = match want.kind {
                LinkKind::Veth { .. } => Some("the name of its other end is taken"),
                LinkKind::Ipip(_) => Some(
                    "another ipip device has this local address and no remote one: ip -d link show type ipip",
                ),
                _ => None,
            };
            let guess = guess.map(str::to_owned);
            return Err(refused(tried(), Refusal { detail: refusal.detail.or(guess), ..refusal }));
        };
        let underlay = match &seen.kind {
            link::SeenKind::Vxlan(vxlan) => vxlan.underlay,
            _ => None,
        };
        let names = link::by_index(self.socket, underlay.as_slice()).map_err(|e| io_error(tried(), e))?;
        let have =
            seen.fact(|index| names.iter().flatten().find(|seen| seen.index == index).map(|seen| seen.name));
        if change.fact().satisfied_by(&Fact::Link(Box::new(have.clone()))) {
            return Ok(());
        }
        let detail = Some(format!("there is another interface of this name, made as `{have}`"));
        Err(refused(tried(), Refusal { detail, ..refusal }))
    }
}

/// What the kernel has no devices of, and what to type.
fn lacking(change: &Change<'_>, refusal: &Refusal) -> Option<String> {
    let Fact::Link(link) = change.fact() else { return None };
    let (module, option) = link::module(&link.kind).filter(|_| refusal.errno == libc::EOPNOTSUPP)?;
    Some(format!(
        "this kernel has no {module} devices; load the module: modprobe {module} (it comes with kernels built with {option})"
    ))
}

fn deletes_route(change: &Change<'_>) -> bool {
    matches!(change, Change::Delete(Fact::Route(_)))
}

fn no_link(change: &Change<'_>, name: LinkName) -> WorldError {
    WorldError::NoLink { action: action(change), link: name.to_string() }
}

fn unsupported(change: &Change<'_>, what: &str) -> WorldError {
    WorldError::Unsupported { action: action(change), what: what.to_owned() }
}
