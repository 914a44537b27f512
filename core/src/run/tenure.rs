//! Holding our lease: acquire it, renew it, notice its loss, acquire it again.
//!
//! Driven by whole values: what we offer (config and lease value) and what the store holds. Every change of either is looked
//! at anew, so a node that found no free subnet gets one as soon as there is one, without a restart.
//! Whoever writes over our key with our address, or with rubbish, is written over; whoever writes another holder into it has it,
//! and so has another node that has signed it ([`sign`](super::store::sign)). Who asks whether we live is answered at once.
//!
//! **Source** — upstream pkg/subnet/etcd/local_manager.go, `AcquireLease` and `CompleteLease`; the texts that operators grep for
//! are its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::store::sign::Hand;
use super::store::{Backoff, Claim, Held, LEASE_TTL, NetworkStore, Renewal, Snapshot, StoreError};
use crate::decide::allocate::{self, Choice};
use crate::words::addr::{Family, Prefix};
use crate::words::code::Code;
use crate::words::config::NetworkConfig;
use crate::words::lease::{LeaseSet, LeaseValue, OwnLease, Subnets};
use crate::words::report::Finding;

/// Lost races in a row after which the next try waits longer.
const RACES_MAX: u32 = 10;

/// How long to wait for the store's watch to show what a lost race was about.
const RACE_WAIT: Duration = Duration::from_millis(100);

/// After so long without one, the next foreign write into our key is answered at once again.
const PEACE: Duration = Duration::from_secs(60);

/// How long until a holder that lives, and has what would be ours, is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// What a node offers in exchange for a subnet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The network as it is configured now.
    pub config: Arc<NetworkConfig>,
    /// What the lease should say.
    pub value: LeaseValue,
    /// What we had before, if anything is known of it.
    pub previous: Option<Subnets>,
    /// What our lease of them said, if nobody but this host can have written it: it names an address that this host has.
    pub former: Option<LeaseValue>,
    /// No subnet is taken from these.
    pub avoid: Vec<Prefix>,
}

/// How the tenure stands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TenureState {
    /// What we hold.
    pub own: Option<OwnLease>,
    /// Why we hold nothing.
    pub waiting: Option<Finding>,
}

/// The task that holds a lease.
pub struct Tenure {
    store: NetworkStore,
    snapshots: watch::Receiver<Snapshot>,
    offers: watch::Receiver<Option<Offer>>,
    publish: watch::Sender<TenureState>,
    margin: Duration,
    ttl: Duration,
    held: Option<Held>,
    /// What we held last, before it was lost.
    last: Option<Subnets>,
    /// The state of the store that was seen last.
    seen: i64,
    /// Whether the store is not the one that we wrote our lease into.
    rewound: bool,
    races: u32,
    backoff: Backoff,
    next: Instant,
    /// Whether it was said that the lease cannot be renewed.
    late: bool,
    /// The lease of which it was said that it has ended.
    ended: Option<Subnets>,
    mending: Mending,
    /// Leases that looked like ours and whose holders live, and when they are asked again.
    answered: BTreeMap<Subnets, Instant>,
    /// What was asked for, when there was no answer: it may be ours.
    unsure: Option<Subnets>,
    /// Whether the last try to get a subnet failed: what it tries is not said every time.
    again: bool,
    /// Leases of ours that the config does not allow, as far as they were given back.
    given_back: BTreeSet<Subnets>,
    /// Those of them that are gone from the store, whatever an older snapshot shows.
    gone: BTreeSet<Subnets>,
}

/// What became of a subnet that was chosen.
enum Taken {
    Ours(Held),
    /// Somebody else has it.
    Faster,
    /// It looked like ours, and its holder lives.
    Answered(Subnets),
}

/// When what somebody wrote into our key is written over: at once, and later and later if he goes on (two hosts with one
/// public address would write as fast as they can).
struct Mending {
    backoff: Backoff,
    not_before: Instant,
}

impl Tenure {
    /// Starts the task; it ends when the receiver, the snapshots or the offers are dropped, and leaves the lease. When the offer
    /// is withdrawn (none, after there was one) the lease is given back. `margin` is how long before its end a lease is renewed.
    pub fn spawn(
        store: NetworkStore,
        snapshots: watch::Receiver<Snapshot>,
        offers: watch::Receiver<Option<Offer>>,
        margin: Duration,
    ) -> watch::Receiver<TenureState> {
        Self::spawn_with(store, snapshots, offers, margin, LEASE_TTL)
    }

    /// The same with leases that last `ttl`.
    pub fn spawn_with(
        store: NetworkStore,
        snapshots: watch::Receiver<Snapshot>,
        offers: watch::Receiver<Option<Offer>>,
        margin: Duration,
        ttl: Duration,
    ) -> watch::Receiver<TenureState> {
        let (publish, receiver) = watch::channel(TenureState::default());
        let tenure = Self {
            store,
            snapshots,
            offers,
            publish,
            margin: margin.min(ttl / 2),
            ttl,
            held: None,
            last: None,
            seen: 0,
            rewound: false,
            races: 0,
            backoff: Backoff::new(),
            next: Instant::now(),
            late: false,
            ended: None,
            mending: Mending { backoff: Backoff::new(), not_before: Instant::now() },
            answered: BTreeMap::new(),
            unsure: None,
            again: false,
            given_back: BTreeSet::new(),
            gone: BTreeSet::new(),
        };
        tokio::spawn(tenure.run());
        receiver
    }

    async fn run(mut self) {
        loop {
            let offer = self.offers.borrow_and_update().clone();
            let snapshot = self.snapshots.borrow_and_update().clone();
            self.compare(&snapshot);
            match offer {
                Some(offer) => self.step(&offer, &snapshot).await,
                None => {
                    self.withdraw().await;
                    self.next = Instant::now() + self.ttl;
                }
            }
            tokio::select! {
                changed = self.offers.changed() => if changed.is_err() { return },
                changed = self.snapshots.changed() => if changed.is_err() { return },
                () = sleep_until(self.next) => {}
                () = self.publish.closed() => return,
            }
        }
    }

    /// A store that counts from further back than before was restored from a backup, or begun anew: what we know of it is worth
    /// nothing, and what it knows of our lease neither.
    fn compare(&mut self, snapshot: &Snapshot) {
        if !snapshot.known {
            return;
        }
        if std::mem::replace(&mut self.seen, snapshot.revision) > snapshot.revision
            && let Some(held) = &mut self.held
        {
            tracing::warn!(
                "lease {}: the store is another, or an older one, than it was written to",
                held.own.subnets
            );
            held.revision = 0;
            self.rewound = true;
        }
    }

    /// Nothing is offered any more, so nothing is held.
    async fn withdraw(&mut self) {
        if let Some(held) = self.held.take() {
            self.give_back(&held.own.subnets, &held.own.value).await;
            self.tell(TenureState::default());
        }
    }

    /// If the store can be reached, the key is gone afterwards, or it is a reservation: that is said and tried once.
    async fn give_back(&mut self, subnets: &Subnets, value: &LeaseValue) {
        match self.store.release(subnets, value).await {
            Ok(gone) => {
                self.given_back.insert(*subnets);
                self.gone.extend(gone.then_some(*subnets));
            }
            Err(error) => tracing::warn!("the lease {subnets} stays until it expires: {error}"),
        }
    }

    /// Looks at what is offered and what is there, and does what follows.
    async fn step(&mut self, offer: &Offer, snapshot: &Snapshot) {
        if let Some(held) = self.held.take() {
            self.keep(held, offer, snapshot).await;
        }
        // While the store is away there is nothing to be had; that it is back is a snapshot.
        if self.held.is_none() && snapshot.known && snapshot.down.is_none() {
            self.acquire(offer, snapshot).await;
        }
    }

    /// Keeps what we hold, unless it is lost or the config does not allow it any more.
    async fn keep(&mut self, held: Held, offer: &Offer, snapshot: &Snapshot) {
        let subnets = held.own.subnets;
        if !allocate::compatible(&offer.config, &subnets) {
            tracing::info!("lease {subnets} is not compatible with the current config, giving it back");
            self.give_back(&subnets, &held.own.value).await;
            // A part of it may still do.
            self.last = self.gone.contains(&subnets).then_some(subnets);
            return;
        }
        let (mut mend, mut asked) = (false, false);
        // A snapshot of a time before our last write does not know of it.
        if snapshot.known && snapshot.revision >= held.revision {
            match snapshot.leases.leases.get(&subnets).map(|value| &**value) {
                None if snapshot.leases.blocked.contains(&subnets) => mend = true,
                None => return self.lost(subnets, GONE),
                Some(value) if !allocate::same_holder(value, &held.own.value) => {
                    return self.lost(subnets, &taken_by(value, &held.own.value));
                }
                Some(value) => match self.store.hand(snapshot, &subnets) {
                    Some(Hand::Another) => return self.lost(subnets, TWIN),
                    Some(Hand::Asking) => asked = true,
                    // A key without an end is a reservation from now on, and one of another's grant would end with that.
                    Some(Hand::Unsigned) => mend = held.expires.is_some() || *value != held.own.value,
                    Some(Hand::Ours) | None => mend = *value != held.own.value,
                },
            }
        }
        let now = Instant::now();
        let rewound = std::mem::take(&mut self.rewound);
        let due = rewound || self.renewal(&held).is_some_and(|due| due <= now);
        if asked {
            tracing::warn!(
                "lease {subnets}: another host asks whether this one lives; has it the same public address?"
            );
        }
        if due || asked || held.own.value != offer.value {
            self.renew(held, offer).await;
        } else if mend && self.mending.not_before <= now {
            tracing::warn!("lease {subnets}: somebody has written into its key, writing our value again");
            self.mending.count(now);
            self.renew(held, offer).await;
        } else {
            self.hold(held);
            if mend {
                self.next = self.next.min(self.mending.not_before);
            }
        }
    }

    async fn renew(&mut self, held: Held, offer: &Offer) {
        let subnets = held.own.subnets;
        match self.store.renew(&held, &offer.value, self.ttl).await {
            Ok(Renewal::Done(held)) => {
                match held.expires {
                    Some(_) => tracing::info!("Lease renewed, new expiration: in {:?}", self.ttl),
                    None => tracing::info!("lease {subnets} is a reservation, it does not expire"),
                }
                self.late = false;
                self.ended = None;
                self.backoff.reset();
                self.hold(held);
            }
            Ok(Renewal::Lost(None)) => self.lost(subnets, GONE),
            Ok(Renewal::Lost(Some(value)) | Renewal::Answered(value)) => {
                self.lost(subnets, &taken_by(&value, &offer.value));
            }
            Err(error) => {
                let wait = self.backoff.wait();
                self.tell_of_end(&held);
                match std::mem::replace(&mut self.late, true) {
                    false => tracing::error!("Error renewing lease (trying again until it works): {error}"),
                    true => tracing::debug!("Error renewing lease (trying again in {wait:?}): {error}"),
                }
                self.held = Some(held);
                self.next = Instant::now() + wait;
            }
        }
    }

    /// Says once that our lease has ended because the store could not be reached. What is in the kernel stays.
    fn tell_of_end(&mut self, held: &Held) {
        let ended = held.expires.is_some_and(|end| end <= Instant::now());
        if ended && self.ended.replace(held.own.subnets) != Some(held.own.subnets) {
            tracing::error!(
                "lease {} has ended, because it could not be renewed; another host may get this subnet until etcd is back",
                held.own.subnets
            );
        }
    }

    fn lost(&mut self, subnets: Subnets, how: &str) {
        let finding = Finding::new(Code::LEASE_LOST, format!("{subnets}: {how}"));
        tracing::error!("{finding}");
        self.last = Some(subnets);
        self.rewound = false;
        self.wait_for(finding);
    }

    async fn acquire(&mut self, offer: &Offer, snapshot: &Snapshot) {
        let signed = self.signed(snapshot);
        self.return_outdated(offer, snapshot, &signed).await;
        let leases = self.current(&snapshot.leases, &offer.value);
        if let Some((subnets, again)) = self.twin(&leases, offer) {
            self.wait_for(twin(&subnets, &offer.value));
            self.next = again;
            return;
        }
        if self.follow(offer, &leases).await {
            return;
        }
        let previous = self.last.as_ref().or(offer.previous.as_ref());
        let random = fastrand::u64(..);
        let choice =
            allocate::choose(&offer.config, &leases, &offer.value, &signed, previous, &offer.avoid, random);
        match choice {
            Ok(choice) => match self.take(&choice, offer).await {
                Ok(Taken::Ours(held)) => {
                    self.races = 0;
                    self.backoff.reset();
                    self.tell_of_exchange(&held.own.subnets, offer);
                    self.hold(held);
                }
                Ok(Taken::Faster) => self.lost_race(),
                Ok(Taken::Answered(subnets)) => {
                    self.answered.insert(subnets, Instant::now() + ASK_AGAIN);
                    self.next = Instant::now();
                }
                Err(error) => {
                    let (Choice::Adopt(subnets) | Choice::Reclaim(subnets) | Choice::Claim(subnets)) = choice;
                    (self.unsure, self.again) = (Some(subnets), true);
                    self.wait_for(error.finding());
                    self.next = Instant::now() + self.backoff.wait();
                }
            },
            Err(none) => {
                // The next snapshot or config may have one; a slow look catches what was missed.
                self.wait_for(none.finding());
                self.next = Instant::now() + Duration::from_secs(30);
            }
        }
    }

    /// Goes on with the lease that this host had when peers reached it at another of its addresses (`--iface`, `--public-ip`): its
    /// containers keep theirs.
    async fn follow(&mut self, offer: &Offer, leases: &LeaseSet) -> bool {
        let (Some(subnets), Some(former)) = (offer.previous, &offer.former) else { return false };
        let found = leases.leases.get(&subnets).is_some_and(|found| allocate::same_holder(found, former));
        if !found
            || !allocate::compatible(&offer.config, &subnets)
            || !allocate::ours(leases, &offer.value, &BTreeSet::new()).is_empty()
        {
            return false;
        }
        let (was, is) = (allocate::holder(former), allocate::holder(&offer.value));
        tracing::info!("Found lease ({}) for this host's address {was}, reusing for {is}", told(&subnets));
        let held = Held::found(OwnLease { subnets, value: former.clone() });
        match self.store.renew(&held, &offer.value, self.ttl).await {
            Ok(Renewal::Done(held)) => self.hold(held),
            Ok(Renewal::Lost(_) | Renewal::Answered(_)) => self.lost_race(),
            Err(error) => {
                self.wait_for(error.finding());
                self.next = Instant::now() + self.backoff.wait();
            }
        }
        true
    }

    /// Gives back what is ours and does not fit the config.
    async fn return_outdated(&mut self, offer: &Offer, snapshot: &Snapshot, signed: &BTreeSet<Subnets>) {
        for subnets in allocate::outdated(&offer.config, &snapshot.leases, &offer.value, signed) {
            if self.given_back.contains(&subnets) {
                continue;
            }
            tracing::info!(
                "Found lease ({subnets}) for current IP ({}) but not compatible with current config, deleting",
                allocate::holder(&offer.value)
            );
            self.give_back(&subnets, &offer.value).await;
        }
    }

    /// What we have signed, but for what a copy of this host has signed with our mark and holds.
    fn signed(&self, snapshot: &Snapshot) -> BTreeSet<Subnets> {
        let now = Instant::now();
        let mut signed = self.store.signed_here(snapshot);
        signed.retain(|subnets| self.answered.get(subnets).is_none_or(|again| *again <= now));
        signed
    }

    /// A lease with our public address whose holder has answered: two hosts have one address, and the second gets nothing.
    fn twin(&mut self, leases: &LeaseSet, offer: &Offer) -> Option<(Subnets, Instant)> {
        let now = Instant::now();
        self.answered.retain(|subnets, again| *again > now && leases.leases.contains_key(subnets));
        let alike = |subnets: &Subnets| {
            leases.leases.get(subnets).is_some_and(|lease| allocate::same_holder(lease, &offer.value))
        };
        self.answered.iter().find(|(subnets, _)| alike(subnets)).map(|(subnets, again)| (*subnets, *again))
    }

    /// Another subnet than before is something to do for the operator. A family that comes or goes changes nothing for the other.
    fn tell_of_exchange(&self, now: &Subnets, offer: &Offer) {
        let Some(before) = self.last.or(offer.previous) else { return };
        if let Some(lost) = before.without(now) {
            tracing::warn!(
                "this host has {now} instead of {before}: containers that still have addresses of {lost} reach each other, \
                 and no other host; start them again"
            );
        }
    }

    /// The leases without those of ours that are gone since.
    fn current(&self, leases: &Arc<LeaseSet>, value: &LeaseValue) -> Arc<LeaseSet> {
        let mut leases = leases.clone();
        for subnets in &self.gone {
            if leases.leases.get(subnets).is_some_and(|lease| allocate::same_holder(lease, value)) {
                Arc::make_mut(&mut leases).leases.remove(subnets);
            }
        }
        leases
    }

    async fn take(&self, choice: &Choice, offer: &Offer) -> Result<Taken, StoreError> {
        let ip = allocate::holder(&offer.value);
        if !self.again {
            say(choice, offer);
        }
        match choice {
            Choice::Adopt(subnets) => match self.store.adopt(subnets, &offer.value, self.ttl).await? {
                Renewal::Done(held) => Ok(Taken::Ours(held)),
                Renewal::Lost(_) => Ok(Taken::Faster),
                Renewal::Answered(_) => Ok(Taken::Answered(*subnets)),
            },
            Choice::Reclaim(subnets) | Choice::Claim(subnets) => {
                match self.store.claim(subnets, &offer.value, self.ttl).await? {
                    Claim::Made(held) => {
                        tracing::info!("Allocated lease ({}) to current node ({ip}) ", told(subnets));
                        Ok(Taken::Ours(held))
                    }
                    Claim::Taken => Ok(Taken::Faster),
                }
            }
        }
    }

    /// Somebody was faster: look again, soon; later and later if that goes on.
    fn lost_race(&mut self) {
        self.races = self.races.saturating_add(1);
        self.again = true;
        let wait = match self.races {
            ..RACES_MAX => RACE_WAIT.mul_f64(fastrand::f64()),
            RACES_MAX.. => self.backoff.wait(),
        };
        tracing::debug!("lost the race for a subnet, trying again in {wait:?}");
        self.next = Instant::now() + wait;
    }

    fn hold(&mut self, held: Held) {
        self.next = self.renewal(&held).unwrap_or_else(|| Instant::now() + self.ttl);
        let state = TenureState { own: Some(held.own.clone()), waiting: None };
        self.last = Some(held.own.subnets);
        self.again = false;
        self.given_back.clear();
        self.gone.clear();
        self.held = Some(held);
        self.tell(state);
    }

    fn wait_for(&mut self, finding: Finding) {
        self.tell(TenureState { own: None, waiting: Some(finding) });
    }

    fn tell(&self, state: TenureState) {
        self.publish.send_if_modified(|current| {
            let news = *current != state;
            *current = state;
            news
        });
    }

    /// When to renew: a margin before the end, and up to a tenth of it earlier, by subnet, so that nodes which started
    /// together do not renew together. None for a reservation.
    fn renewal(&self, held: &Held) -> Option<Instant> {
        let spread = fastrand::Rng::with_seed(seed(&held.own.subnets)).f64();
        let early = self.margin.mul_f64(1.0 + spread / 10.0);
        held.expires?.checked_sub(early)
    }
}

impl Mending {
    fn count(&mut self, now: Instant) {
        if self.not_before + PEACE < now {
            self.backoff.reset();
        }
        self.not_before = now + self.backoff.wait();
    }
}

const GONE: &str = "its key is gone from the store";

const TWIN: &str = "another host with this host's public address has it";

fn taken_by(value: &LeaseValue, ours: &LeaseValue) -> String {
    match allocate::same_holder(value, ours) {
        true => TWIN.to_owned(),
        false => format!("{} has written itself into it", allocate::holder(value)),
    }
}

fn twin(subnets: &Subnets, ours: &LeaseValue) -> Finding {
    let text = format!(
        "{subnets} is held with {}, this host's public address, by another host, which lives: it was asked and has answered. \
         This host gets no subnet, and asks again every {} s",
        allocate::holder(ours),
        ASK_AGAIN.as_secs()
    );
    Finding::new(Code::PUBLIC_IP_SHARED, text)
}

fn seed(subnets: &Subnets) -> u64 {
    subnets.key().bytes().fold(7, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)))
}

fn say(choice: &Choice, offer: &Offer) {
    match choice {
        Choice::Adopt(subnets) => tracing::info!(
            "Found lease ({}) for current IP ({}), reusing",
            told(subnets),
            allocate::holder(&offer.value)
        ),
        Choice::Reclaim(subnets) => tracing::info!("Found previously leased subnet ({subnets}), reusing"),
        Choice::Claim(_) => picking(&offer.config),
    }
}

fn picking(config: &NetworkConfig) {
    for (range, what) in [(config.v4, "subnet"), (config.v6, "ipv6 subnet")] {
        if let Some(range) = range {
            tracing::info!("Picking {what} in range {} ... {}", range.first.base(), range.last.base());
        }
    }
}

/// As upstream's log has it: an absent family is `::/0`.
fn told(subnets: &Subnets) -> String {
    let part =
        |family, none: &str| subnets.of(family).map_or_else(|| none.to_owned(), |subnet| subnet.to_string());
    format!("ip: {} ipv6: {}", part(Family::V4, "0.0.0.0/0"), part(Family::V6, "::/0"))
}
