//! The store: where a network's config and leases live. Two kinds, one behaviour: [`etcd`] for a cluster, [`embedded`]
//! (a directory) for one machine.
//!
//! **Shape** — below a prefix, the default network has `config` and `subnets/<key>`, a network `web` has `web/config`
//! and `web/subnets/<key>`; keys and values are flannel's, byte for byte ([`words::lease`](crate::words::lease)).
//! **Writes** are compare-and-swap: a lease is created only where none is, and renewed only while it is still ours.
//! **Reading** is watching: whole values, newest wins. What cannot be read is a finding and never an empty set, and when
//! the store is away the last good value stays.

pub mod embedded;
pub mod etcd;
mod shelf;
pub mod sign;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

pub use self::embedded::EmbeddedStore;
pub use self::etcd::{EtcdSettings, EtcdStore};
use self::sign::{Hand, NodeMark, Signs};
use crate::run::health::Counters;
use crate::words::code::Code;
use crate::words::lease::{LeaseSet, LeaseValue, OwnLease, Subnets};
use crate::words::name::NetworkName;
use crate::words::report::Finding;

/// How long a lease lasts. Upstream's: other flannel nodes renew theirs by it.
pub const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a call may take, over all endpoints.
pub const CALL_DEADLINE: Duration = Duration::from_millis(2800);

/// First and last wait between attempts to reach a store that is away.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Why the store did not do what it was asked. None of the texts holds a password.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// What the operator gave cannot be used.
    #[error("{what}: {cause}")]
    Settings {
        /// Which setting, and its value unless secret.
        what: String,
        /// What is wrong with it.
        cause: String,
    },
    /// No endpoint answered.
    #[error("could not {tried}: etcd cannot be reached: {causes}")]
    Unreachable {
        /// What was to be done.
        tried: &'static str,
        /// Each endpoint with its cause.
        causes: String,
    },
    /// The server answered, and its answer is no.
    #[error("could not {tried}: etcd at {endpoint} refused: {cause}")]
    Refused {
        /// What was to be done.
        tried: &'static str,
        /// Who said it.
        endpoint: String,
        /// What it said.
        cause: String,
    },
    /// A file of the embedded store cannot be read or written.
    #[error("could not {tried} {path}: {source}")]
    File {
        /// What was to be done.
        tried: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The network still has leases.
    #[error("network {network} still has {leases} leases; stop its nodes or remove the leases first")]
    InUse {
        /// The network.
        network: NetworkName,
        /// How many.
        leases: usize,
    },
}

impl StoreError {
    /// For the operator: code and text.
    pub fn finding(&self) -> Finding {
        Finding::new(Code::STORE_DOWN, self.to_string())
    }
}

/// A store below one prefix: all its networks. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Store {
    /// An etcd cluster.
    Etcd(EtcdStore),
    /// A directory of this machine.
    Embedded(EmbeddedStore),
}

impl Store {
    /// An etcd cluster. Nothing is connected yet: a server that is down shows in the first call.
    pub fn etcd(settings: &EtcdSettings) -> Result<Self, StoreError> {
        EtcdStore::new(settings).map(Self::Etcd)
    }

    /// A directory, made if it is not there.
    pub fn embedded(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        EmbeddedStore::open(dir.into()).map(Self::Embedded)
    }

    /// Where calls to a cluster are counted from now on. A directory's are not worth it.
    pub fn counted_by(&self, counters: Counters) {
        match self {
            Self::Etcd(store) => store.counted_by(counters),
            Self::Embedded(_) => {}
        }
    }

    /// One of its networks, whether it exists yet or not.
    pub fn network(&self, name: &NetworkName) -> NetworkStore {
        NetworkStore { store: self.clone(), name: name.clone(), mark: None }
    }

    /// The networks that have a config, the default one included, with their documents.
    pub async fn networks(&self) -> Result<Vec<(NetworkName, String)>, StoreError> {
        match self {
            Self::Etcd(store) => store.networks().await,
            Self::Embedded(store) => store.networks().await,
        }
    }
}

/// One network's part of a store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NetworkStore {
    store: Store,
    name: NetworkName,
    /// Who we are; leases are not signed without.
    mark: Option<NodeMark>,
}

impl NetworkStore {
    /// Whether only this machine's root can have written what it says.
    pub(super) const fn is_local(&self) -> bool {
        matches!(self.store, Store::Embedded(_))
    }

    /// The same, for a node that signs its leases where that is possible: in etcd.
    pub fn signed_by(self, mark: NodeMark) -> Self {
        let mark = (!self.is_local()).then_some(mark);
        Self { mark, ..self }
    }

    /// Who has written a lease last, as far as that can be told: not in a directory, and not by a node that does not sign itself.
    pub fn hand(&self, snapshot: &Snapshot, subnets: &Subnets) -> Option<Hand> {
        let mark = self.mark?;
        Some(snapshot.signs.get(subnets).map_or(Hand::Unsigned, |sign| sign.hand(mark)))
    }

    /// The leases that this node has signed.
    pub fn signed_here(&self, snapshot: &Snapshot) -> BTreeSet<Subnets> {
        let Some(mark) = self.mark else { return BTreeSet::new() };
        let ours = snapshot.signs.iter().filter(|(_, sign)| sign.hand(mark) == Hand::Ours);
        ours.map(|(subnets, _)| *subnets).collect()
    }
}

/// A network as last read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    /// Whether the store has been read at all; while it has not, config and leases say nothing.
    pub known: bool,
    /// The config document, as it stands there.
    pub config: Option<String>,
    /// Every lease, and a finding for each key that is none and for leases that overlap.
    pub leases: Arc<LeaseSet>,
    /// Who has signed them.
    pub signs: Arc<Signs>,
    /// Up to which write of leases this is read. Compare with [`Held::revision`] only.
    pub revision: i64,
    /// Why the store cannot be read now. The rest is then what was read last.
    pub down: Option<Finding>,
}

/// What became of a config that was to be created.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Created {
    /// It is there now.
    Made,
    /// There was one already: this.
    Exists(String),
}

/// A lease of ours, and what it takes to renew it only while nobody else has written to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// The lease.
    pub own: OwnLease,
    /// When it ends unless renewed. None for a reservation (a key that never expires).
    pub expires: Option<Instant>,
    /// State of the store in which it was written last: a [`Snapshot`] of an earlier one does not know of it.
    pub revision: i64,
    /// The etcd lease the key is attached to; 0 for none.
    grant: i64,
}

impl Held {
    /// One that was found: nothing is known of it but what it says.
    pub fn found(own: OwnLease) -> Self {
        Self { own, expires: None, revision: 0, grant: 0 }
    }
}

/// What became of a subnet that was asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Claim {
    /// It is ours.
    Made(Held),
    /// Somebody else has it.
    Taken,
}

/// What became of a lease that was to be renewed or taken over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Renewal {
    /// It is ours.
    Done(Held),
    /// It is not ours: gone (none), or somebody else's.
    Lost(Option<LeaseValue>),
    /// It looked like ours, but its holder lives: it was asked, and has answered.
    Answered(LeaseValue),
}

impl NetworkStore {
    /// Which network this is.
    pub fn name(&self) -> &NetworkName {
        &self.name
    }

    /// Gives up the connections to the store: this host's address is another, and nobody would notice that nothing comes by the
    /// old ones until TCP had repeated itself for long enough.
    pub async fn connect_anew(&self) {
        if let Store::Etcd(store) = &self.store {
            store.connect_anew().await;
        }
    }

    /// The config document, if there is one.
    pub async fn config(&self) -> Result<Option<String>, StoreError> {
        match &self.store {
            Store::Etcd(store) => store.config(&self.name).await,
            Store::Embedded(store) => store.config(&self.name).await,
        }
    }

    /// Puts a config there if there is none; of several that try at once one succeeds, and the others learn its text.
    pub async fn create_config(&self, text: &str) -> Result<Created, StoreError> {
        match &self.store {
            Store::Etcd(store) => store.create_config(&self.name, text).await,
            Store::Embedded(store) => store.create_config(&self.name, text).await,
        }
    }

    /// Removes the config of a network without leases; with leases it is refused. Nothing to remove is success.
    pub async fn remove(&self) -> Result<(), StoreError> {
        match &self.store {
            Store::Etcd(store) => store.remove(&self.name).await,
            Store::Embedded(store) => store.remove(&self.name).await,
        }
    }

    /// Config and leases, from now on: a task that ends when the last receiver is dropped.
    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        let (sender, receiver) = watch::channel(Snapshot::default());
        match &self.store {
            Store::Etcd(store) => tokio::spawn(store.clone().follow(self.name.clone(), sender)),
            Store::Embedded(store) => tokio::spawn(store.clone().follow(self.name.clone(), sender)),
        };
        receiver
    }

    /// Creates a lease where there is none. A lease of another length that overlaps is looked for where that costs nothing
    /// (a directory, IPv6); whoever asks chooses from a [`Snapshot`] and so knows of it, but for the moment of a race.
    pub async fn claim(
        &self,
        subnets: &Subnets,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Claim, StoreError> {
        match &self.store {
            Store::Etcd(store) => store.claim(self, subnets, value, ttl).await,
            Store::Embedded(store) => store.claim(&self.name, subnets, value, ttl).await,
        }
    }

    /// Renews our lease and writes its value, if it is still as we left it or at least still carries our public address, or
    /// rubbish.
    /// A reservation stays one: its value is written only if it changed.
    pub async fn renew(&self, held: &Held, value: &LeaseValue, ttl: Duration) -> Result<Renewal, StoreError> {
        match &self.store {
            Store::Etcd(store) => store.renew(self, held, value, ttl).await,
            Store::Embedded(store) => store.renew(&self.name, held, value, ttl).await,
        }
    }

    /// Takes over an existing lease that carries the public address of `value`, or that this node has signed. A reservation
    /// stays one. If another node has signed it, or the address is another, its holder is asked first whether it lives, for
    /// [`ASK`](sign::ASK) at most.
    pub async fn adopt(
        &self,
        subnets: &Subnets,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Renewal, StoreError> {
        match &self.store {
            Store::Etcd(store) => store.adopt(self, subnets, value, ttl).await,
            Store::Embedded(store) => store.adopt(&self.name, subnets, value, ttl).await,
        }
    }

    /// Removes a lease that carries the public address of `value`, or that this node has signed; anybody else's stays. Reservations stay too: they
    /// are the operator's. True if there is no such key now.
    pub async fn release(&self, subnets: &Subnets, value: &LeaseValue) -> Result<bool, StoreError> {
        match &self.store {
            Store::Etcd(store) => store.release(self, subnets, value).await,
            Store::Embedded(store) => store.release(&self.name, subnets, value).await,
        }
    }
}

/// Waits between attempts: doubling, with jitter, so that a store that returns is not met by everybody at once.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) const fn new() -> Self {
        Self { next: BACKOFF.0 }
    }

    pub(crate) const fn reset(&mut self) {
        self.next = BACKOFF.0;
    }

    /// Between half of the step and the whole step.
    pub(crate) fn wait(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(BACKOFF.1);
        step.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_five_seconds_and_are_never_the_same_for_all() {
        let mut backoff = Backoff::new();
        let waits: Vec<_> = (0..20).map(|_| backoff.wait()).collect();
        assert!(waits[0] >= BACKOFF.0 / 2 && waits[0] <= BACKOFF.0);
        assert!(waits[10..].iter().all(|wait| *wait >= BACKOFF.1 / 2 && *wait <= BACKOFF.1));
        backoff.reset();
        assert!(backoff.wait() <= BACKOFF.0);
    }
}
