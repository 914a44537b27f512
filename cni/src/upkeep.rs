//! What GC and STATUS do for a network on this node, whoever describes it.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::time::SystemTime;

use flannel_core::act::life::{Life, Ports};
use flannel_core::act::pass::chain;
use flannel_core::decide::ranges::RangeSet;
use flannel_core::touch::ledger::{Entry, HeldLedger, Ledger};
use flannel_core::touch::world::kernel::{Kernel, Outlet};
use flannel_core::words::addr::InterfaceAddress;
use flannel_core::words::name::{Attachment, LinkName};

use crate::result::CniError;

/// A network of this node, as far as it has to be looked after.
pub(crate) struct Place<'a> {
    pub(crate) ledger: &'a Ledger,
    /// What the host's ends of its veth pairs are named after ([`Attachment::host_link`]).
    pub(crate) network: &'a str,
    pub(crate) bridge: LinkName,
    /// None where nobody can say now.
    pub(crate) sets: &'a [RangeSet],
}

/// What GC took back.
#[derive(Default)]
pub(crate) struct Collected {
    pub(crate) buried: Vec<Attachment>,
    pub(crate) freed: Vec<IpAddr>,
    /// Who holds addresses further on.
    pub(crate) left: Vec<Entry>,
    pub(crate) failed: Vec<String>,
}

/// Whether an entry may go that is not among the valid ones: others may share the ledger, whose runtime we did not hear.
pub(crate) type Mine<'a> = &'a dyn Fn(&mut Kernel, &Attachment) -> Result<bool, CniError>;

/// Takes back interfaces and addresses of attachments that are not valid. Goes on after a failure.
///
/// Whatever is younger than this call is spared. Interfaces are listed before the ledger: an ADD claims before it makes, so one whose
/// address the ledger does not know then has none.
pub(crate) fn collect(
    place: &Place<'_>,
    valid: &[Attachment],
    mine: Mine<'_>,
) -> Result<Collected, CniError> {
    let start = SystemTime::now();
    let mut host = Kernel::open()?;
    let outlets = host.outlets()?;
    let (entries, candidates) = {
        let held = place.ledger.lock()?;
        let entries = held.entries()?;
        let candidates = candidates(&held, &entries, valid, start)?;
        (entries, candidates)
    };
    let mut collected = Collected::default();
    let mut dead: Vec<&Entry> = Vec::new();
    // Deleting an interface takes the kernel long; nobody has to wait for the ledger meanwhile.
    for entry in &candidates {
        let buried = mine(&mut host, &entry.owner).and_then(|mine| {
            if mine {
                unlink(&mut host, place, &outlets, entry)?;
                dead.push(entry);
            }
            Ok(())
        });
        if let Err(error) = buried {
            collected.failed.push(format!("{}: {error}", entry.owner));
        }
    }
    for orphan in orphans(place, &outlets, &entries, valid) {
        if let Err(error) = host.delete_link(orphan) {
            collected.failed.push(chain(&error));
        }
    }
    let held = place.ledger.lock()?;
    for entry in dead {
        let freed = held.owner(entry.address).and_then(|owner| match owner.as_ref() == Some(&entry.owner) {
            true => held.release_address(entry.address),
            false => Ok(()),
        });
        match freed {
            Ok(()) => {
                collected.freed.push(entry.address);
                collected.buried.push(entry.owner.clone());
            }
            Err(error) => collected.failed.push(format!("{}: {error}", entry.address)),
        }
    }
    collected.left = held.entries()?;
    Ok(collected)
}

/// Entries that are neither valid nor Docker's nor in the making.
pub(crate) fn candidates(
    held: &HeldLedger<'_>,
    entries: &[Entry],
    valid: &[Attachment],
    start: SystemTime,
) -> Result<Vec<Entry>, CniError> {
    let mut found = Vec::new();
    for entry in entries.iter().filter(|entry| !entry.is_docker() && !valid.contains(&entry.owner)) {
        // Very old host-locals wrote no interface.
        let of_valid = |valid: &Attachment| valid.container == entry.owner.container;
        let spared = entry.owner.interface.is_empty() && valid.iter().any(of_valid);
        let young = held.since(entry.address).is_none_or(|since| since > start);
        if !spared && !young && held.begin_again(entry.address)?.is_some() {
            found.push(entry.clone());
        }
    }
    Ok(found)
}

/// Deletes the veth pair by its name, or, of a pair that others made, by what is behind it.
fn unlink(host: &mut Kernel, place: &Place<'_>, outlets: &[Outlet], entry: &Entry) -> Result<(), CniError> {
    if host.delete_link(entry.owner.host_link(place.network))? {
        return Ok(());
    }
    let leads_there = |outlet: &&Outlet| {
        outlet.bridge == Some(place.bridge)
            && outlet.inside.as_ref().is_some_and(|inside| inside.contains(&entry.address))
    };
    let mut found = outlets.iter().filter(leads_there);
    // Two interfaces of one container on the same bridge: who can say which of them it is.
    if let (Some(outlet), None) = (found.next(), found.next()) {
        host.delete_link(outlet.name)?;
    }
    Ok(())
}

/// Ports of the bridge by names of ours, with addresses of the network's of which the ledger knows nothing: somebody tidied it up by
/// hand, and the next container would get one of them.
fn orphans(place: &Place<'_>, outlets: &[Outlet], entries: &[Entry], valid: &[Attachment]) -> Vec<LinkName> {
    let owners = entries.iter().map(|entry| &entry.owner).chain(valid);
    let names: BTreeSet<LinkName> = owners.map(|owner| owner.host_link(place.network)).collect();
    let known = |address: &IpAddr| entries.iter().any(|entry| entry.address == *address);
    let here = |address: &IpAddr| place.sets.iter().any(|set| set.contains(*address));
    let lost = |outlet: &&Outlet| {
        let Some(inside) = &outlet.inside else { return false };
        outlet.bridge == Some(place.bridge)
            && is_ours(outlet.name)
            && !names.contains(&outlet.name)
            && inside.iter().any(here)
            && !inside.iter().any(known)
    };
    outlets.iter().filter(lost).map(|outlet| outlet.name).collect()
}

/// Whether a name is of the form that the host's ends of our veth pairs have.
fn is_ours(name: LinkName) -> bool {
    let digits = name.as_str().strip_prefix("veth").unwrap_or_default();
    digits.len() == 11 && digits.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
}

/// Results that libcni keeps for attachments of other configurations (libcni/api.go: `NAME-CONTAINER-INTERFACE`).
pub(crate) struct CachedElsewhere(Vec<String>);

impl CachedElsewhere {
    pub(crate) fn read(name: &str) -> Self {
        const RESULTS: &str = "/var/lib/cni/results";
        let ours = format!("{name}-");
        let files = fs::read_dir(RESULTS).into_iter().flatten().flatten();
        let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
        Self(names.filter(|name| !name.starts_with(&ours)).collect())
    }

    pub(crate) fn holds(&self, owner: &Attachment) -> bool {
        let result = format!("-{}-{}", owner.container, owner.interface);
        self.0.iter().any(|name| name.ends_with(&result))
    }
}

/// Whether an ADD would get an address: else 50, with the reason.
pub(crate) fn has_room(
    ledger: &Ledger,
    sets: &[RangeSet],
    life: &mut dyn Life,
) -> Result<Vec<Entry>, CniError> {
    let unavailable = |error: CniError| CniError { code: CniError::UNAVAILABLE, ..error };
    let held = ledger.lock().map_err(|error| unavailable(error.into()))?;
    let entries = held.entries().map_err(|error| unavailable(error.into()))?;
    for set in sets {
        let here: Vec<Entry> = entries.iter().filter(|entry| set.contains(entry.address)).cloned().collect();
        let full = set.taken(here.iter().map(|entry| &entry.address)) >= set.capacity();
        // The next ADD takes theirs.
        if full && life.dead(&held, &here).is_ok_and(|dead| dead.is_empty()) {
            return Err(CniError::new(
                CniError::UNAVAILABLE,
                format!("no free address: all {} of {set} are taken", set.capacity()),
            ));
        }
    }
    Ok(entries)
}

/// STATUS: 50 if no ADD can succeed, 51 if containers that are there have lost their bridge or their gateway.
///
/// The next ADD makes both again, but the bridge without its ports: these containers do not come back by themselves.
pub(crate) fn status(place: &Place<'_>) -> Result<(), CniError> {
    let mut life = Ports { network: place.network, bridge: place.bridge };
    let entries = has_room(place.ledger, place.sets, &mut life)?;
    let mut host = Kernel::open()?;
    let interfaces = host.interfaces()?;
    let bridge = interfaces.iter().find(|interface| interface.name == place.bridge);
    let has = |gateway: &InterfaceAddress| {
        bridge.is_some_and(|bridge| bridge.addresses.iter().any(|there| there.address == *gateway))
    };
    let ranges = || place.sets.iter().flat_map(RangeSet::ranges);
    let lost = ranges().find(|range| range.gateway_address().is_some_and(|gateway| !has(&gateway)));
    let trouble = match (bridge, lost) {
        (None, _) => format!("the bridge {} is gone", place.bridge),
        (Some(bridge), _) if !bridge.up => format!("ip link set {} up", place.bridge),
        (Some(_), Some(range)) => {
            format!("ip address add {}/{} dev {}", range.gateway(), range.subnet().len(), place.bridge)
        }
        (Some(_), None) => return Ok(()),
    };
    // Of those whose gateway is missing, if the bridge is there.
    let concerned = |entry: &&Entry| match (bridge, lost) {
        (Some(bridge), Some(range)) if bridge.up => range.contains(entry.address),
        _ => true,
    };
    let is_there = |name: LinkName| interfaces.iter().any(|interface| interface.name == name);
    let attached = |entry: &&Entry| !entry.is_docker() && is_there(entry.owner.host_link(place.network));
    match entries.iter().filter(concerned).filter(attached).count() {
        0 => Ok(()),
        count => {
            let msg = format!("{count} containers of this network are cut off on this node");
            Err(CniError::new(CniError::LIMITED, msg).with_details(trouble))
        }
    }
}
