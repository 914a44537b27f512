//! What crashes of ours and of engines left behind, found and taken away while the plugin runs.
//!
//! **What no engine says again** — an engine killed inside RequestAddress or CreateEndpoint never asks for the address or the
//! endpoint back; one that could not reach us while a container ended believes that it did.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use flannel_core::words::name::LinkName;

use super::Plugin;
use crate::addresses::Addresses;
use crate::answer::Refusal;
use crate::journal::{EndpointRecord, Stage};
use crate::veth;

/// An endpoint that is created and never joined belongs to an engine that died in between.
const NEVER_JOINED_MAX: Duration = Duration::from_secs(600);

/// For so long an engine may be between CreateEndpoint and Join. It takes milliseconds, but for one that starts hundreds of
/// containers at once.
const BEING_CREATED: Duration = Duration::from_secs(10);

/// For so long it may leave both ends of a veth pair here before it takes one, and for so long an ended container's may be.
const BEING_TAKEN: Duration = Duration::from_secs(60);

impl Plugin {
    /// Whether the endpoint that holds an address leaves it to whoever asks for exactly that one: an engine that starts a
    /// container again after a crash of its own or of ours. The endpoint is gone then.
    pub(super) fn makes_way(&self, id: &str) -> bool {
        let Some(record) = self.journal.endpoints().get(id) else { return true };
        self.is_left_over(id, &record) && self.discard(id, &record)
    }

    /// Takes away what is left of an endpoint that no engine will ask to be deleted; false for any other.
    pub(super) fn take_away(&self, id: &str) -> bool {
        match self.journal.endpoints().get(id) {
            None => self.ports.release(id),
            Some(record) if self.is_left_over(id, &record) => {
                let gone = self.mark_deleted(id).and_then(|_| self.unplug(id, true));
                if let Err(Refusal(text)) = gone {
                    tracing::warn!(endpoint = %id, "not cleaned up yet: {text}");
                    return false;
                }
                tracing::info!(endpoint = %id, "made way: its engine forgot it");
            }
            Some(_) => return false,
        }
        true
    }

    fn is_left_over(&self, id: &str, record: &EndpointRecord) -> bool {
        match record.stage {
            Stage::Created => Duration::from_secs(record.age()) > BEING_CREATED,
            Stage::Joined => self.has_ended(id, record),
            Stage::Deleted => true,
        }
    }

    /// Whether an endpoint's address may be taken back or given to another, now that an engine says so. The endpoint is gone
    /// then.
    pub(super) fn gives_up(&self, id: &str) -> bool {
        let Some(record) = self.journal.endpoints().get(id) else { return true };
        match record.stage {
            Stage::Created => self.journal.endpoints().remove(id).is_ok(),
            // DeleteEndpoint did not reach us.
            Stage::Joined => self.has_ended(id, &record) && self.discard(id, &record),
            Stage::Deleted => true,
        }
    }

    /// Whether a joined endpoint's container has ended, and is not just being started.
    fn has_ended(&self, id: &str, record: &EndpointRecord) -> bool {
        let old = Duration::from_secs(record.age()) > BEING_TAKEN;
        old && veth::existing().is_ok_and(|links| is_dead(id, record, &links))
    }

    fn discard(&self, id: &str, record: &EndpointRecord) -> bool {
        let gone = veth::detach(id, &record.network).is_ok() && self.journal.endpoints().remove(id).is_ok();
        if gone {
            self.ports.release(id);
            self.networks.expose_changes();
            tracing::info!(endpoint = %id, address = %record.address, "made way: its engine forgot it");
        }
        gone
    }

    /// Endpoints that were being deleted, that never joined, or whose container has ended; claims that nobody confirmed;
    /// networks that nobody uses any more.
    pub(crate) fn sweep(&self) {
        self.reap();
        for (id, record) in self.journal.endpoints().all() {
            let abandoned =
                record.stage == Stage::Created && Duration::from_secs(record.age()) > NEVER_JOINED_MAX;
            if record.stage == Stage::Deleted || abandoned {
                match self.mark_deleted(&id).and_then(|_| self.unplug(&id, abandoned)) {
                    Ok(()) => tracing::info!(endpoint = %id, "cleaned up"),
                    Err(Refusal(text)) => tracing::warn!(endpoint = %id, "not cleaned up yet: {text}"),
                }
            }
        }
        self.sweep_ledgers();
        self.ports.retain(|endpoint| self.journal.endpoints().get(endpoint).is_some());
        self.networks.expose_changes();
        self.networks.let_go_of_stale();
    }

    fn sweep_ledgers(&self) {
        for (id, _) in self.journal.networks().all() {
            let _turn = self.turns.take(&id);
            let Some(record) = self.journal.networks().get(&id) else { continue };
            if let Err(Refusal(text)) = self.keep_auxiliary(&id, &record) {
                tracing::warn!(docker_network = %id, "auxiliary addresses: {text}");
            }
        }
        for (network, subnet) in self.networks.subnets_here() {
            let lives = |holder: &str| {
                let networks = self.journal.networks();
                self.journal.endpoints().get(holder).is_some() || networks.get(holder).is_some()
            };
            let sweep = |addresses: Addresses| addresses.sweep(lives).map_err(|error| Refusal::of(&error));
            let swept = self
                .addresses_if_any(&network, &[subnet])
                .and_then(|addresses| addresses.map_or(Ok(Vec::new()), sweep));
            match swept {
                Ok(freed) => {
                    for address in freed {
                        tracing::info!(%network, %address, "reclaimed: no endpoint came for it");
                    }
                }
                Err(Refusal(text)) => tracing::warn!(%network, "ledger not swept: {text}"),
            }
        }
    }

    /// Endpoints whose container ended while we were away: the veth pair is gone with the container's namespace, or both ends
    /// are back here, where an engine leaves them. It does not tell us again.
    fn reap(&self) {
        let links = match veth::existing() {
            Ok(links) => links,
            Err(Refusal(text)) => return tracing::warn!("the kernel's links are not known: {text}"),
        };
        let endpoints = self.journal.endpoints().all().into_iter();
        let dead = endpoints.filter(|(id, record)| is_dead(id, record, &links)).map(|(id, _)| id).collect();
        let confirmed =
            self.suspects.lock().unwrap_or_else(PoisonError::into_inner).look(dead, Instant::now());
        for id in confirmed {
            match self.mark_deleted(&id).and_then(|_| self.unplug(&id, true)) {
                Ok(()) => tracing::info!(endpoint = %id, "its container has ended: cleaned up"),
                Err(Refusal(text)) => tracing::warn!(endpoint = %id, "not cleaned up yet: {text}"),
            }
        }
    }
}

/// Whether a joined endpoint's veth pair is gone with its container's namespace, or is back here as a whole.
fn is_dead(id: &str, record: &EndpointRecord, links: &BTreeSet<LinkName>) -> bool {
    let (host, container) = veth::ends(id, &record.network);
    record.stage == Stage::Joined && (!links.contains(&host) || links.contains(&container))
}
