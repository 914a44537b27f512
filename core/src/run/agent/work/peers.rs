//! The leases to plan with: those of the store, and for a time those that vanished from it all at once
//! ([`vanished`](crate::decide::vanished)).

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::decide::vanished::Vanished;
use crate::run::store::Snapshot;
use crate::words::lease::{LeaseSet, Subnets};

/// How long hosts have to write their leases again. The slowest looks at the store every five seconds while that is away.
const GRACE: Duration = Duration::from_secs(60);

/// An instant that never comes while anybody waits.
const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// What the store showed last, and what is kept beside it.
#[derive(Default)]
pub(super) struct Peers {
    seen: Arc<LeaseSet>,
    revision: i64,
    vanished: Vanished,
    until: Option<Instant>,
}

impl Peers {
    /// What was known before the store was read: a start from disk.
    pub(super) fn restored(&mut self, leases: &Arc<LeaseSet>) {
        self.seen = leases.clone();
    }

    /// The leases to plan with, by the newest snapshot. `own` is what this host has, if it has anything that fits the config: what
    /// does not, every host gives back by itself.
    pub(super) fn newest(&mut self, snapshot: &Snapshot, own: Option<&Subnets>) -> Arc<LeaseSet> {
        let rewound = snapshot.revision < self.revision;
        self.revision = snapshot.revision;
        if let Some(own) = own
            && !Arc::ptr_eq(&self.seen, &snapshot.leases)
            && self.vanished.follow(&self.seen, &snapshot.leases, own, rewound)
        {
            self.until = Some(Instant::now() + GRACE);
        }
        self.seen = snapshot.leases.clone();
        if self.until.is_some_and(|until| until <= Instant::now()) {
            self.until = None;
            match self.vanished.give_up() {
                0 => {}
                count => tracing::warn!(
                    "{count} hosts whose leases had vanished have not written them again; they are gone"
                ),
            }
        }
        self.vanished.with(&snapshot.leases)
    }

    /// When the time of those that are kept is over.
    pub(super) fn due(&self) -> Instant {
        self.until.unwrap_or_else(|| Instant::now() + NEVER)
    }
}
