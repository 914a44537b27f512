//! Ports of a network's bridge on this host.

use std::collections::BTreeSet;
use std::path::Path;

use super::Place;
use crate::touch::ledger::{Ledger, ledger_marker};
use crate::touch::marker;
use crate::touch::world::WorldError;
use crate::touch::world::kernel::Kernel;
use crate::words::name::{Attachment, LinkName};

/// The host's ends of this network's endpoints that exist now: whoever is in the ledger, by its derived name.
pub(super) fn ports(kernel: &mut Kernel, place: &Place) -> Result<BTreeSet<LinkName>, WorldError> {
    // Whoever keeps no bridge has no ports to keep.
    if place.bridge.is_none() {
        return Ok(BTreeSet::new());
    }
    let existing = kernel.existing_links("veth")?;
    if existing.is_empty() {
        return Ok(existing);
    }
    let network = place.network.as_str();
    let planned: BTreeSet<LinkName> =
        holders(&place.subnet_file).iter().map(|owner| owner.host_link(network)).collect();
    Ok(existing.intersection(&planned).copied().collect())
}

/// Who is in the ledger. A ledger that cannot be read now is read again at the next pass.
fn holders(subnet_file: &Path) -> Vec<Attachment> {
    let Ok(Some(dir)) = marker::read(&ledger_marker(subnet_file)) else { return Vec::new() };
    // Not locked: a pass holds nobody up, and must not bring back a ledger that is just being removed.
    let entries = Ledger::at(dir).look().unwrap_or_default();
    entries.into_iter().map(|entry| entry.owner).collect()
}
