//! Tables of nftables, and the FORWARD chain of iptables, over netlink: no `nft` binary, no library.
//!
//! A table is compared and written as one value. Every write is one transaction of the kernel, so packets see the old
//! rules or the new ones, never none. What we compare is what the kernel executes, read back expression by expression.

pub mod conntrack;
mod decode;
mod element;
mod encapsulation;
mod encode;
mod expression;
mod foreign;
mod forward_chain;
mod iptables_rule;
mod mac_guard;
mod packet;
mod port_map;
mod revise;
mod shared_chain;
mod tunnel_guard;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::io;

pub use self::element::Amended;
use self::wire::{Socket, error_code};
use super::iptables::{Commands, Legacy};
use crate::touch::world::WorldError;
use crate::words::addr::{Family, Prefix};
use crate::words::fact::shared_chain::{ChainName, Home, Job};
use crate::words::fact::{Accept, Change, Fact, Facts, Tally, TunnelHost};
use crate::words::name::LinkName;
use crate::words::node::Iptables;
use crate::words::rule::{Table, TableName};
use crate::words::territory::Territory;

/// A look is several dumps; if others change rules between them we look again, this often. After that we take what we
/// have: a wrong look makes one needless write, and the look after it is right.
const LOOKS_MAX: usize = 4;

/// The packet filter of one network namespace.
pub struct Netfilter {
    socket: Socket,
    legacy: Legacy,
    commands: Commands,
    /// To connection tracking; opened when it is first asked for.
    connections: Option<Socket>,
}

impl Netfilter {
    /// That of the calling thread's namespace, also when it is used from another thread later.
    ///
    /// # Errors
    /// `Io` if the kernel has no netfilter sockets.
    pub fn open() -> Result<Self, WorldError> {
        Ok(Self {
            socket: Socket::open()?,
            legacy: Legacy::here()?,
            commands: Commands::default(),
            connections: None,
        })
    }

    /// Adds the tables of the territory that exist, and the accepts that FORWARD has for its networks.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn observe(&mut self, territory: &Territory, tally: &mut Tally<'_>) -> Result<(), WorldError> {
        let asked = !territory.tables.is_empty() || territory.accepts || !territory.guards.is_empty();
        if !asked && !territory.shared_chains {
            return Ok(());
        }
        let absent = self.is_absent()?;
        if territory.shared_chains {
            self.observe_shared_chains(territory, absent, tally.few())?;
        }
        if absent {
            return Ok(());
        }
        if !territory.guards.is_empty() {
            let guards = mac_guard::look(&mut self.socket, &territory.guards)?;
            guards.into_iter().for_each(|guard| tally.see(Fact::Guard(guard)));
        }
        for name in &territory.tables {
            let Some(table) = self.look(name)? else { continue };
            if !TunnelHost::are_in(name) {
                tally.see(Fact::Table(Box::new(table)));
                continue;
            }
            let (table, hosts) = tunnel_guard::part(table);
            tally.see(Fact::Table(Box::new(table)));
            hosts.into_iter().for_each(|host| tally.see(Fact::TunnelHost(host)));
        }
        if territory.accepts {
            for family in [Family::V4, Family::V6] {
                for cidr in self.accepted(family, territory)? {
                    tally.see(Fact::Accept(Accept { cidr }));
                }
            }
        }
        Ok(())
    }

    /// Whether the kernel has nf_tables.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn is_present(&mut self) -> Result<bool, WorldError> {
        Ok(!self.is_absent()?)
    }

    /// The number of the socket: notices of what it changed carry it.
    pub fn socket_number(&self) -> u32 {
        self.socket.number()
    }

    /// A kernel without nf_tables refuses every question about it (net/netfilter/nfnetlink.c `nfnetlink_rcv_msg`): there
    /// is nothing to see then, and only a plan that wants a table fails.
    fn is_absent(&mut self) -> Result<bool, WorldError> {
        match self.socket.generation() {
            Err(error) if error_code(&error) == Some(libc::EINVAL) => Ok(true),
            other => other.map(|_| false),
        }
    }

    fn look(&mut self, name: &TableName) -> Result<Option<Table>, WorldError> {
        let mut before = self.socket.generation()?;
        for _ in 1..LOOKS_MAX {
            let table = decode::read(&mut self.socket, name)?;
            let after = self.socket.generation()?;
            if after == before {
                return Ok(table);
            }
            before = after;
        }
        decode::read(&mut self.socket, name)
    }

    /// Accepted by every FORWARD chain that is there.
    fn accepted(&mut self, family: Family, territory: &Territory) -> Result<Vec<Prefix>, WorldError> {
        let cidrs = &territory.cidrs;
        let nft = match forward_chain::exists(&mut self.socket, family)? {
            true => Some(forward_chain::accepted(&mut self.socket, family, cidrs)?),
            false => None,
        };
        let legacy = match cidrs.iter().any(|cidr| cidr.family() == family) {
            true => self.legacy.accepted(family, cidrs)?,
            false => None,
        };
        let by = |accepted: &Option<BTreeSet<Prefix>>, cidr| {
            accepted.as_ref().is_none_or(|accepted| accepted.contains(cidr))
        };
        let somewhere = nft.is_some() || legacy.is_some();
        let of_family = cidrs.iter().filter(|cidr| cidr.family() == family);
        Ok(of_family.filter(|cidr| somewhere && by(&nft, cidr) && by(&legacy, cidr)).copied().collect())
    }

    /// The families whose packets pass a FORWARD chain of iptables here, in nftables or in the older tables.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn forward_chains(&mut self) -> Result<BTreeSet<Family>, WorldError> {
        let mut families = BTreeSet::new();
        let absent = self.is_absent()?;
        for family in [Family::V4, Family::V6] {
            let nft = !absent && forward_chain::exists(&mut self.socket, family)?;
            if nft || self.legacy.is_writable(family) {
                families.insert(family);
            }
        }
        Ok(families)
    }

    fn observe_shared_chains(
        &mut self,
        territory: &Territory,
        absent: bool,
        facts: &mut Facts,
    ) -> Result<(), WorldError> {
        for name in chains() {
            let chain = match name.home {
                Home::IptablesLegacy => self.legacy.observe_shared(name, &territory.cidrs)?,
                _ if absent => None,
                Home::IptablesNft | Home::Nftables => {
                    shared_chain::observe(&mut self.socket, name, &territory.cidrs)?
                }
            };
            chain.into_iter().for_each(|chain| facts.set(Fact::SharedChain(Box::new(chain))));
        }
        Ok(())
    }

    /// The iptables of this host, and what its FORWARD chains may do.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn iptables(&mut self) -> Result<Iptables, WorldError> {
        let mut found = Iptables { fully_random: true, ..Iptables::default() };
        let absent = self.is_absent()?;
        for family in [Family::V4, Family::V6] {
            if let Some(kind) =
                self.commands.kind(family).filter(|kind| !absent || kind.home == Home::IptablesLegacy)
            {
                found.written.insert(family, kind.home);
                found.fully_random &= kind.fully_random;
            }
            if !absent && shared_chain::may_drop(&mut self.socket, family)? {
                found.dropping.insert((family, Home::IptablesNft));
            }
            if self.legacy.may_drop(family)? {
                found.dropping.insert((family, Home::IptablesLegacy));
            }
        }
        Ok(found)
    }

    /// Forgets the connections that a change of published ports makes wrong, and says how many; in the namespace of the thread
    /// that asks first.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn forget(&mut self, changed: &conntrack::Changed<'_>) -> Result<usize, WorldError> {
        let opened = match self.connections.take() {
            Some(socket) => socket,
            None => Socket::open_to(conntrack::SUBSYSTEM)?,
        };
        conntrack::forget(self.connections.insert(opened), changed)
    }

    /// Deletes a chain of iptables' table `nat` of either family, with every rule that jumps there: in nftables, and in the older
    /// tables where they are in use. False if there was none.
    ///
    /// # Errors
    /// `Refused` if the kernel or `iptables-legacy-restore` says no.
    pub fn remove_foreign_chain(&mut self, chain: &str) -> Result<bool, WorldError> {
        let mut found = false;
        let absent = self.is_absent()?;
        for family in [Family::V4, Family::V6] {
            found |= !absent && foreign::remove_chain(&mut self.socket, family, chain)?;
            found |= self.legacy.remove_nat_chain(family, chain)?;
        }
        Ok(found)
    }

    /// Deletes the rules about one address in a chain that another program keeps in iptables' table `filter`, and says how
    /// many there were.
    ///
    /// # Errors
    /// `Refused` if the kernel says no.
    pub fn remove_rules_about(
        &mut self,
        chain: &str,
        address: std::net::IpAddr,
    ) -> Result<usize, WorldError> {
        let family = Family::of(address);
        let found = match self.is_absent()? {
            true => 0,
            false => foreign::remove_addressed(&mut self.socket, family, chain, address)?,
        };
        Ok(found + self.legacy.remove_rules_about(chain, address)?)
    }

    /// Deletes the rules of another program's table whose comment is meant, and says how many there were.
    ///
    /// # Errors
    /// `Refused` if the kernel says no.
    pub fn remove_foreign_rules(
        &mut self,
        table: &TableName,
        is_meant: &dyn Fn(&str) -> bool,
    ) -> Result<usize, WorldError> {
        if self.is_absent()? {
            return Ok(0);
        }
        foreign::remove_commented(&mut self.socket, table, is_meant)
    }

    /// The ports of bridges that are held to one source MAC.
    ///
    /// # Errors
    /// `Refused` if the kernel does not let us look.
    pub fn guarded(&mut self) -> Result<BTreeSet<LinkName>, WorldError> {
        if self.is_absent()? { Ok(BTreeSet::new()) } else { mac_guard::all(&mut self.socket) }
    }

    /// What the operator should know: a FORWARD chain is there that we cannot write.
    pub fn hint(&self) -> Option<String> {
        self.legacy.hint()
    }

    /// Makes the changes about tables, guards and accepts, one transaction for each table and one for all accepts of a family.
    /// The answer has one entry per change.
    pub fn apply(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        let mut results: Vec<Result<(), WorldError>> = changes.iter().map(|_| Ok(())).collect();
        // What comes before what goes: rules that move between a chain of upstream's and a table of ours are never missing.
        let leaving = |(_, wanted): &Group<'_>| wanted.iter().all(|(_, wanted, _)| wanted.is_none());
        let (last, first): (Vec<_>, Vec<_>) =
            shared_changes(changes).into_iter().partition(|(_, group)| leaving(group));
        self.apply_shared_chains(first, &mut results);
        for (change, result) in changes.iter().zip(&mut results) {
            if !matches!(change.fact(), Fact::SharedChain(_)) && !tunnel_guard::is_meant(change) {
                *result = self.apply_alone(change);
            }
        }
        for (name, group) in tunnel_guard::groups(changes) {
            if let Err(error) = tunnel_guard::change(&mut self.socket, &name, &group) {
                share(&error, &group.places, &mut results);
            }
        }
        self.apply_shared_chains(last, &mut results);
        for family in [Family::V4, Family::V6] {
            let (mut add, mut remove) = (Vec::new(), Vec::new());
            let mut places = Vec::new();
            for (place, change) in changes.iter().enumerate() {
                match (change, change.fact()) {
                    (_, Fact::Accept(accept)) if accept.cidr.family() != family => continue,
                    (Change::Delete(_), Fact::Accept(accept)) => remove.push(accept.cidr),
                    (Change::Create(_) | Change::Replace { .. }, Fact::Accept(accept)) => {
                        add.push(accept.cidr)
                    }
                    _ => continue,
                }
                places.push(place);
            }
            if places.is_empty() {
                continue;
            }
            if let Err(error) = self.change_accepts(family, &add, &remove) {
                share(&error, &places, &mut results);
            }
        }
        results
    }

    fn apply_shared_chains(
        &mut self,
        groups: Vec<(Option<Family>, Group<'_>)>,
        results: &mut [Result<(), WorldError>],
    ) {
        for (group, (places, wanted)) in groups {
            let result = match group {
                None => shared_chain::change(&mut self.socket, &wanted),
                Some(family) => self.legacy.change_shared(family, &wanted),
            };
            if let Err(error) = result {
                share(&error, &places, results);
            }
        }
    }

    fn apply_alone(&mut self, change: &Change<'_>) -> Result<(), WorldError> {
        match change {
            Change::Create(Fact::Guard(guard)) | Change::Replace { new: Fact::Guard(guard), .. } => {
                mac_guard::put(&mut self.socket, guard)
            }
            Change::Delete(Fact::Guard(guard)) => mac_guard::lift(&mut self.socket, guard.link),
            Change::Create(Fact::Table(new)) => self.socket.commit(encode::whole(new)),
            Change::Replace { old: Fact::Table(old), new: Fact::Table(new) } => self.replace(old, new),
            Change::Delete(Fact::Table(old)) => match self.socket.commit(encode::gone(&old.name)) {
                Err(error) if error_code(&error) == Some(libc::ENOENT) => Ok(()),
                other => other,
            },
            _ => Ok(()),
        }
    }

    /// By what differs, as long as the table is what we think it is; else by writing all of it.
    fn replace(&mut self, old: &Table, new: &Table) -> Result<(), WorldError> {
        if old.strange.is_empty() && self.socket.commit(encode::difference(old, new)).is_ok() {
            return Ok(());
        }
        self.socket.commit(encode::whole(new))
    }

    fn change_accepts(
        &mut self,
        family: Family,
        add: &[Prefix],
        remove: &[Prefix],
    ) -> Result<(), WorldError> {
        let legacy = self.legacy.is_writable(family);
        if !legacy || forward_chain::exists(&mut self.socket, family)? {
            forward_chain::change(&mut self.socket, family, add, remove)?;
        }
        if legacy { self.legacy.change(family, add, remove) } else { Ok(()) }
    }
}

/// Changes that are made together: their places in the list, and what they ask for.
type Group<'a> = (Vec<usize>, Vec<shared_chain::Wanted<'a>>);

/// Changes of upstream's chains, with their places in the list: those in nftables are one transaction (none), those of the older
/// tables one for each family.
fn shared_changes<'a>(changes: &[Change<'a>]) -> BTreeMap<Option<Family>, Group<'a>> {
    let mut groups: BTreeMap<Option<Family>, Group<'a>> = BTreeMap::new();
    for (place, change) in changes.iter().enumerate() {
        let (wanted, old) = match change {
            Change::Create(Fact::SharedChain(new)) => (Some(&**new), None),
            Change::Replace { old: Fact::SharedChain(old), new: Fact::SharedChain(new) } => {
                (Some(&**new), Some(&**old))
            }
            Change::Delete(Fact::SharedChain(old)) => (None, Some(&**old)),
            _ => continue,
        };
        let both = || wanted.into_iter().chain(old);
        let Some(name) = both().map(|chain| chain.name).next() else { continue };
        let cidrs: BTreeSet<Prefix> = both().flat_map(|chain| chain.cidrs()).collect();
        let group = (name.home == Home::IptablesLegacy).then_some(name.family);
        let (places, chains) = groups.entry(group).or_default();
        places.push(place);
        chains.push((name, wanted, cidrs));
    }
    groups
}

fn chains() -> impl Iterator<Item = ChainName> {
    let families = [Family::V4, Family::V6];
    Home::ALL.into_iter().flat_map(move |home| {
        families.into_iter().flat_map(move |family| Job::ALL.map(|job| ChainName { home, family, job }))
    })
}

/// One transaction failed: every change in it did.
fn share(error: &WorldError, places: &[usize], results: &mut [Result<(), WorldError>]) {
    for place in places {
        if let Some(result) = results.get_mut(*place) {
            *result = Err(copy(error));
        }
    }
}

fn copy(error: &WorldError) -> WorldError {
    let copied = |source: &io::Error| match source.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(source.kind(), source.to_string()),
    };
    match error {
        WorldError::Io { action, source } => {
            WorldError::Io { action: action.clone(), source: copied(source) }
        }
        WorldError::Refused { action, detail, source } => {
            WorldError::Refused { action: action.clone(), detail: detail.clone(), source: copied(source) }
        }
        WorldError::NoLink { action, link } => {
            WorldError::NoLink { action: action.clone(), link: link.clone() }
        }
        WorldError::Unsupported { action, what } => {
            WorldError::Unsupported { action: action.clone(), what: what.clone() }
        }
    }
}
