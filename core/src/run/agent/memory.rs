//! What an agent keeps on disk for a start without the store.
//!
//! A config or a lease of our own is kept before anything else happens. Leases of peers are many and change all the time: they are
//! kept when there is time, beside the work, and the larger they are the more rarely.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::run::cache::{self, LastGood};
use crate::words::lease::{LeaseSet, OwnLease};
use crate::words::name::NetworkName;

/// Between two times that peers are kept, and from a change until it is kept: at least this. The change itself is on its way into the
/// kernel then, and nothing should be in its way. Between two times also so much for each lease.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_PER_LEASE: Duration = Duration::from_millis(1);

/// What could not be written is tried again, and told again, after so long.
const AGAIN: Duration = Duration::from_secs(60);

/// What is on disk, or on its way there.
pub(super) struct Memory {
    state_dir: PathBuf,
    network: NetworkName,
    kept: Arc<LastGood>,
    written: Option<Instant>,
    due: Option<Instant>,
    writing: Option<JoinHandle<()>>,
    /// Whether what was written last is not on disk.
    failed: Arc<AtomicBool>,
}

impl Memory {
    /// What was kept by an earlier life, if anything.
    pub(super) fn read(state_dir: PathBuf, network: NetworkName) -> Self {
        let kept = Arc::new(cache::read(&state_dir, &network).unwrap_or_default());
        Self { state_dir, network, kept, written: None, due: None, writing: None, failed: Arc::default() }
    }

    /// What was true last.
    pub(super) fn last(&self) -> &LastGood {
        &self.kept
    }

    /// When there is something to write at the latest; far away if there is nothing.
    pub(super) fn due(&self) -> Instant {
        self.due.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600))
    }

    /// Keeps what is true now.
    pub(super) async fn keep(&mut self, config: &str, own: &OwnLease, leases: &Arc<LeaseSet>) {
        let same = self.kept.config == config && self.kept.own.as_ref() == Some(own);
        let failed = self.failed.load(Ordering::Relaxed);
        if same && !failed && Arc::ptr_eq(&self.kept.leases, leases) {
            return;
        }
        let now = Instant::now();
        if same {
            let usual = PAUSE.max(PAUSE_PER_LEASE * u32::try_from(leases.leases.len()).unwrap_or(u32::MAX));
            let pause = if failed { AGAIN } else { usual };
            let soonest = now + PAUSE;
            let due = self.written.map_or(soonest, |written| {
                written.checked_add(pause).map_or(soonest, |due| due.max(soonest))
            });
            let due = *self.due.get_or_insert(due);
            if due > now {
                return;
            }
        }
        self.settle().await;
        let kept = LastGood { config: config.to_owned(), own: Some(own.clone()), leases: leases.clone() };
        (self.due, self.written) = (None, Some(now));
        let known = *self.kept == kept;
        self.kept = Arc::new(kept);
        if known && !failed {
            return;
        }
        let (state_dir, network, kept) = (self.state_dir.clone(), self.network.clone(), self.kept.clone());
        let failed = self.failed.clone();
        let write = move || {
            let written = cache::write(&state_dir, &network, &kept);
            failed.store(written.is_err(), Ordering::Relaxed);
            if let Err(error) = written {
                let place = cache::directory(&state_dir, &network);
                tracing::warn!(%network, "the last known state could not be kept in {}: {error}", place.display());
            }
        };
        match same {
            true => self.writing = Some(tokio::task::spawn_blocking(write)),
            false => write(),
        }
    }

    /// Has the next [`keep`](Self::keep) write whatever waits.
    pub(super) fn hurry(&mut self) {
        self.due = self.due.map(|_| Instant::now());
    }

    /// Nothing can be kept now; the next [`keep`](Self::keep) begins anew.
    pub(super) fn postpone(&mut self) {
        self.due = None;
    }

    /// Waits for what is being written.
    pub(super) async fn settle(&mut self) {
        if let Some(writing) = self.writing.take() {
            // It has said itself what went wrong.
            let _ = writing.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::lease::{LeaseValue, Subnets};

    fn lease(n: u8) -> (Subnets, LeaseValue) {
        let value = format!(r#"{{"PublicIP":"192.0.2.{n}","PublicIPv6":null}}"#);
        (Subnets::parse_key(&format!("10.5.{n}.0-24")).unwrap(), LeaseValue::from_json(&value).unwrap())
    }

    fn set(numbers: std::ops::Range<u8>) -> Arc<LeaseSet> {
        Arc::new(LeaseSet {
            leases: numbers.map(lease).map(|(subnets, value)| (subnets, value.into())).collect(),
            ..LeaseSet::default()
        })
    }

    #[tokio::test]
    async fn our_own_is_kept_at_once_and_peers_soon() {
        let (dir, network) = (tempfile::tempdir().unwrap(), NetworkName::default_network());
        let mut memory = Memory::read(dir.path().to_owned(), network.clone());
        let (subnets, value) = lease(1);
        let own = OwnLease { subnets, value };
        let on_disk = || cache::read(dir.path(), &network).unwrap();
        memory.keep("{}", &own, &set(2..4)).await;
        assert_eq!((on_disk().leases.leases.len(), on_disk().own), (3, Some(own.clone())));
        let more = set(2..9);
        memory.keep("{}", &own, &more).await;
        assert_eq!(on_disk().leases.leases.len(), 3);
        assert!(memory.due() < Instant::now() + PAUSE);
        tokio::time::sleep_until(memory.due()).await;
        memory.keep("{}", &own, &more).await;
        memory.settle().await;
        assert_eq!(on_disk().leases.leases.len(), 8);
        memory.keep("{}", &own, &set(2..3)).await;
        memory.hurry();
        memory.keep("{}", &own, &set(2..3)).await;
        memory.settle().await;
        assert_eq!(on_disk().leases.leases.len(), 2);
    }
}
