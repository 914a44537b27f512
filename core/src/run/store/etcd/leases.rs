//! Leases: claimed, renewed, taken over and given back, each by a transaction that fails if somebody else was faster.

use std::sync::PoisonError;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, KeyValue, LeaseGrantOptions, PutOptions, Txn, TxnOp};
use tokio::time::{Instant, sleep};

use super::{EtcdStore, Keys, found, revision, text};
use crate::decide::allocate::same_holder;
use crate::run::store::sign::{ASK, NodeMark, Sign};
use crate::run::store::{Claim, Held, NetworkStore, Renewal, StoreError};
use crate::words::lease::{LeaseValue, OwnLease, Subnets};

/// How often a guarded write is tried again when unrelated writes came in between.
const TRIES_MAX: usize = 10;

/// What a key without an end and with a value that cannot be read is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rubbish {
    /// Still the reservation that it was.
    Reserves,
    /// Somebody's slip: who writes by hand attaches no end.
    SaysNothing,
}

/// A write that another one may have overtaken.
enum Guarded {
    Done { revision: i64 },
    Overtaken(Option<KeyValue>),
}

/// What a node wants to be in the store.
struct Wish {
    key: String,
    own: OwnLease,
    ttl: Duration,
    mark: Option<NodeMark>,
}

impl Wish {
    /// With which the lease is signed.
    fn sign(&self) -> Sign {
        self.mark.map_or(Sign::Unsigned, Sign::Holds)
    }

    /// Whether this node has written it, if only to ask.
    fn is_ours(&self, sign: Sign) -> bool {
        matches!(sign, Sign::Holds(mark) | Sign::Asks(mark) if self.mark == Some(mark))
    }

    /// Whether another node holds it.
    fn is_anothers(&self, sign: Sign) -> bool {
        matches!(sign, Sign::Holds(mark) if self.mark.is_some_and(|ours| ours != mark))
    }

    /// Whether its holder may be another than this node, though it has our address or our mark, and can be asked.
    fn is_doubtful(&self, sign: Sign, holder: &LeaseValue) -> bool {
        let alike = same_holder(holder, &self.own.value);
        match sign {
            Sign::Unsigned => false,
            Sign::Asks(_) => self.mark.is_some(),
            Sign::Holds(_) => self.is_anothers(sign) || (self.is_ours(sign) && !alike),
        }
    }

    fn held(self, expires: Option<Instant>, revision: i64, grant: i64) -> Renewal {
        Renewal::Done(Held { own: self.own, expires, revision, grant })
    }
}

impl EtcdStore {
    fn wish(&self, who: &NetworkStore, subnets: &Subnets, value: &LeaseValue, ttl: Duration) -> Wish {
        let key = self.keys(&who.name).key(subnets);
        Wish { key, own: OwnLease { subnets: *subnets, value: value.clone() }, ttl, mark: who.mark }
    }

    pub(in crate::run::store) async fn claim(
        &self,
        who: &NetworkStore,
        subnets: &Subnets,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Claim, StoreError> {
        let keys = self.keys(&who.name);
        let Wish { key, own, .. } = self.wish(who, subnets, value, ttl);
        let sign = who.mark.map_or(Sign::Unsigned, Sign::Holds);
        self.revoke_doubtful().await?;
        let (grant, expires) = self.grant(ttl, sign).await?;
        let claimed = self.claim_with(&keys, subnets, value, grant).await;
        match claimed {
            Ok(Some(revision)) => Ok(Claim::Made(Held { own, expires: Some(expires), revision, grant })),
            Ok(None) => {
                tracing::debug!("{key} was taken by somebody else first");
                self.revoke(grant).await;
                Ok(Claim::Taken)
            }
            Err(error) => {
                // Without an answer the key may have been made, or be made later.
                self.doubtful.lock().unwrap_or_else(PoisonError::into_inner).insert(grant);
                let _ = self.revoke_doubtful().await;
                Err(error)
            }
        }
    }

    /// The revision, or none if somebody has the subnet or a part of it.
    async fn claim_with(
        &self,
        keys: &Keys,
        subnets: &Subnets,
        value: &LeaseValue,
        grant: i64,
    ) -> Result<Option<i64>, StoreError> {
        let key = keys.key(subnets);
        for _ in 0..TRIES_MAX {
            let mut when = vec![Compare::create_revision(key.clone(), CompareOp::Equal, 0)];
            if let Some(v4) = subnets.v4() {
                // Nobody with the same IPv4 subnet and another IPv6 one either.
                let any = keys.key(&Subnets::v4_only(v4));
                when.push(Compare::create_revision(any, CompareOp::Equal, 0).with_prefix());
            }
            let fence = match subnets.v6() {
                None => None,
                Some(_) => {
                    // A key begins with its IPv4 subnet, so no range holds "everybody with this IPv6 subnet": look at all of
                    // them, and let the write fail if one was created since.
                    let (seen, kvs) = self.list("look for a free subnet", &keys.subnets).await?;
                    if kvs.iter().any(|kv| overlaps(keys, kv, subnets)) {
                        return Ok(None);
                    }
                    Some(
                        Compare::create_revision(keys.subnets.clone(), CompareOp::Less, seen + 1)
                            .with_prefix(),
                    )
                }
            };
            let fenced = fence.is_some();
            when.extend(fence);
            let txn = Txn::new()
                .when(when)
                .and_then([TxnOp::put(
                    key.clone(),
                    value.to_json(),
                    Some(PutOptions::new().with_lease(grant)),
                )])
                .or_else([TxnOp::get(key.clone(), None)]);
            let answer = self.txn("create our lease", txn).await?;
            if answer.succeeded() {
                return Ok(Some(revision(&answer)));
            }
            match found(&answer) {
                // Ours: the first answer got lost on the way, and the call was repeated on another endpoint.
                Some(kv) if kv.lease() == grant => return Ok(Some(kv.mod_revision())),
                None if fenced => {}
                Some(_) | None => return Ok(None),
            }
        }
        Ok(None)
    }

    pub(in crate::run::store) async fn renew(
        &self,
        who: &NetworkStore,
        held: &Held,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Renewal, StoreError> {
        let wish = self.wish(who, &held.own.subnets, value, ttl);
        // If somebody wrote to it and it still carries the address that we published, or nothing that can be read, it is
        // still ours; not if another node has it now.
        let (known, mark) = (held.own.value.clone(), who.mark);
        let ours = move |found: Option<&LeaseValue>, sign: Sign| {
            let anothers = matches!(sign, Sign::Holds(theirs) if mark.is_some_and(|ours| ours != theirs));
            !anothers && found.is_none_or(|found| same_holder(found, &known))
        };
        if held.expires.is_none() {
            let found = self.get_one("read our lease", &wish.key).await?;
            return self.take_over(wish, ours, Rubbish::Reserves, found).await;
        }
        let (grant, expires) = self.grant(ttl, wish.sign()).await?;
        match self.put_guarded(&wish.key, held.revision, value.to_json(), grant).await {
            Ok(Guarded::Done { revision }) => {
                self.revoke(held.grant).await;
                Ok(wish.held(Some(expires), revision, grant))
            }
            Ok(Guarded::Overtaken(found)) => {
                self.revoke(grant).await;
                let renewal = self.take_over(wish, ours, Rubbish::SaysNothing, found).await;
                if renewal.is_ok() {
                    self.revoke_if_unused(held.grant).await;
                }
                renewal
            }
            Err(error) => {
                self.abandon(grant, &error).await;
                Err(error)
            }
        }
    }

    pub(in crate::run::store) async fn adopt(
        &self,
        who: &NetworkStore,
        subnets: &Subnets,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Renewal, StoreError> {
        let wish = self.wish(who, subnets, value, ttl);
        let found = self.get_one("read our lease", &wish.key).await?;
        let (known, mark) = (value.clone(), who.mark);
        let ours = move |found: Option<&LeaseValue>, sign: Sign| {
            let signed = matches!(sign, Sign::Holds(theirs) if mark == Some(theirs));
            found.is_some_and(|found| signed || same_holder(found, &known))
        };
        let doubtful = found.as_ref().and_then(|kv| {
            let (holder, sign) = (LeaseValue::from_json(&text(kv.value())).ok()?, Sign::of(kv.lease()));
            let ours = ours(Some(&holder), sign) || wish.is_ours(sign);
            (ours && wish.is_doubtful(sign, &holder)).then(|| (kv.clone(), holder))
        });
        if let Some((kv, holder)) = doubtful {
            return self.ask(wish, &kv, holder).await;
        }
        self.take_over(wish, ours, Rubbish::SaysNothing, found).await
    }

    /// Asks the holder of a lease whether it lives: the key is written as it is, so that no peer sees a difference, and signed
    /// as a question. It is taken over if nobody answers.
    async fn ask(&self, wish: Wish, found: &KeyValue, holder: LeaseValue) -> Result<Renewal, StoreError> {
        const LOOK: Duration = Duration::from_millis(100);
        let Some(mark) = wish.mark else { return Ok(Renewal::Lost(Some(holder))) };
        tracing::info!("{} is signed by another node, asking whether it lives", wish.own.subnets);
        let (question, _) = self.grant(wish.ttl, Sign::Asks(mark)).await?;
        let asked = self.put_guarded(&wish.key, found.mod_revision(), found.value(), question).await;
        let asked = match asked {
            Ok(Guarded::Done { revision }) => revision,
            Ok(Guarded::Overtaken(_)) => {
                self.revoke(question).await;
                return Ok(Renewal::Lost(Some(holder)));
            }
            Err(error) => {
                self.abandon(question, &error).await;
                return Err(error);
            }
        };
        let until = Instant::now() + ASK;
        while Instant::now() < until {
            sleep(LOOK).await;
            let now = self.get_one("read our lease", &wish.key).await?;
            if now.as_ref().is_none_or(|kv| kv.mod_revision() != asked) {
                self.revoke_if_unused(question).await;
                return Ok(now.map_or(Renewal::Lost(None), |_| Renewal::Answered(holder)));
            }
        }
        let (grant, expires) = self.grant(wish.ttl, wish.sign()).await?;
        match self.put_guarded(&wish.key, asked, wish.own.value.to_json(), grant).await {
            Ok(Guarded::Done { revision }) => {
                tracing::info!("{}: nobody answered within {ASK:?}", wish.own.subnets);
                self.revoke(question).await;
                self.revoke_if_unused(found.lease()).await;
                Ok(wish.held(Some(expires), revision, grant))
            }
            Ok(Guarded::Overtaken(_)) => {
                self.revoke(grant).await;
                self.revoke_if_unused(question).await;
                Ok(Renewal::Answered(holder))
            }
            Err(error) => {
                self.abandon(grant, &error).await;
                Err(error)
            }
        }
    }

    /// Takes over a key, as it was `found`, if it is `ours` by its value (none: one that cannot be read) and its sign.
    async fn take_over(
        &self,
        wish: Wish,
        ours: impl Fn(Option<&LeaseValue>, Sign) -> bool + Sync,
        rubbish: Rubbish,
        mut found: Option<KeyValue>,
    ) -> Result<Renewal, StoreError> {
        for _ in 0..TRIES_MAX {
            let Some(kv) = &found else { return Ok(Renewal::Lost(None)) };
            let holder = LeaseValue::from_json(&text(kv.value())).ok();
            if !ours(holder.as_ref(), Sign::of(kv.lease())) {
                return Ok(Renewal::Lost(holder));
            }
            let reservation = kv.lease() == 0 && (holder.is_some() || rubbish == Rubbish::Reserves);
            if reservation && holder.as_ref() == Some(&wish.own.value) {
                return Ok(wish.held(None, kv.mod_revision(), 0));
            }
            let (grant, expires) = match reservation {
                true => (0, None),
                false => {
                    self.grant(wish.ttl, wish.sign()).await.map(|(grant, expires)| (grant, Some(expires)))?
                }
            };
            let value = wish.own.value.to_json();
            match self.put_guarded(&wish.key, kv.mod_revision(), value, grant).await {
                Ok(Guarded::Done { revision }) => {
                    self.revoke_if_unused(kv.lease()).await;
                    return Ok(wish.held(expires, revision, grant));
                }
                Ok(Guarded::Overtaken(now)) => {
                    self.revoke(grant).await;
                    found = now;
                }
                Err(error) => {
                    self.abandon(grant, &error).await;
                    return Err(error);
                }
            }
        }
        Ok(Renewal::Lost(None))
    }

    pub(in crate::run::store) async fn release(
        &self,
        who: &NetworkStore,
        subnets: &Subnets,
        value: &LeaseValue,
    ) -> Result<bool, StoreError> {
        const TRIED: &str = "remove our lease";
        let wish = self.wish(who, subnets, value, Duration::ZERO);
        let key = &wish.key;
        for _ in 0..TRIES_MAX {
            let Some(kv) = self.get_one(TRIED, key).await? else { return Ok(true) };
            let holder = LeaseValue::from_json(&text(kv.value())).ok();
            let sign = Sign::of(kv.lease());
            let ours = wish.is_ours(sign) || holder.is_some_and(|holder| same_holder(&holder, value));
            if kv.lease() == 0 || wish.is_anothers(sign) || !ours {
                return Ok(false);
            }
            let txn = Txn::new()
                .when([Compare::mod_revision(key.as_str(), CompareOp::Equal, kv.mod_revision())])
                .and_then([TxnOp::delete(key.as_str(), None)]);
            if self.txn(TRIED, txn).await?.succeeded() {
                self.revoke_if_unused(kv.lease()).await;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Puts a value if the key is still as it was at a revision; `grant` 0 attaches it to no lease.
    async fn put_guarded(
        &self,
        key: &str,
        revision_seen: i64,
        value: impl Into<Vec<u8>>,
        grant: i64,
    ) -> Result<Guarded, StoreError> {
        let put = TxnOp::put(key, value, Some(PutOptions::new().with_lease(grant)));
        let txn = Txn::new()
            .when([Compare::mod_revision(key, CompareOp::Equal, revision_seen)])
            .and_then([put])
            .or_else([TxnOp::get(key, None)]);
        let answer = self.txn("write our lease", txn).await?;
        if answer.succeeded() {
            return Ok(Guarded::Done { revision: revision(&answer) });
        }
        Ok(match found(&answer) {
            // Our own write, whose answer got lost.
            Some(kv) if grant != 0 && kv.lease() == grant => Guarded::Done { revision: kv.mod_revision() },
            kv => Guarded::Overtaken(kv),
        })
    }

    /// A new grant and when it ends, counted from before the call: never later than etcd's own count.
    async fn grant(&self, ttl: Duration, sign: Sign) -> Result<(i64, Instant), StoreError> {
        /// Of 65,536 numbers that a node has, it uses two or three.
        const NUMBERS: u32 = 5;
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).max(1);
        let mut tried = 1;
        loop {
            let start = Instant::now();
            let number = sign.number();
            let answer = self
                .cluster
                .call("get a grant for our lease", |mut client| async move {
                    let options = number.map(|number| LeaseGrantOptions::new().with_id(number));
                    client.lease_grant(seconds, options).await
                })
                .await;
            match answer {
                Ok(answer) => {
                    let granted = Duration::from_secs(u64::try_from(answer.ttl()).unwrap_or(0));
                    return Ok((answer.id(), start + granted));
                }
                Err(StoreError::Refused { cause, .. })
                    if cause.contains("lease already exists") && tried < NUMBERS =>
                {
                    tried += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives a grant back. If that fails, it ends by itself.
    async fn revoke(&self, grant: i64) {
        if grant == 0 {
            return;
        }
        let revoked =
            self.cluster
                .call("give a grant back", |mut client| async move {
                    client.lease_revoke(grant).await.map(|_| ())
                })
                .await;
        if let Err(error) = revoked {
            tracing::debug!("grant {grant:x} is left to end by itself: {error}");
        }
    }

    /// Makes sure that no claim of before is made any more: with its grant a key goes, and cannot come. Nothing is claimed until that
    /// is certain, or this node could have two leases.
    async fn revoke_doubtful(&self) -> Result<(), StoreError> {
        let doubtful = self.doubtful.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for grant in doubtful {
            let revoked = self
                .cluster
                .call("give a grant back", |mut client| async move {
                    client.lease_revoke(grant).await.map(|_| ())
                })
                .await;
            match revoked {
                Ok(()) => {}
                // It has ended, or was never made.
                Err(StoreError::Refused { cause, .. }) if cause.contains("not found") => {}
                Err(error) => return Err(error),
            }
            self.doubtful.lock().unwrap_or_else(PoisonError::into_inner).remove(&grant);
        }
        Ok(())
    }

    /// Gives back a grant after a write that failed. Without an answer the write may have been made all the same, and then
    /// our lease would go with the grant: it is left to end by itself.
    async fn abandon(&self, grant: i64, error: &StoreError) {
        if !matches!(error, StoreError::Unreachable { .. }) {
            self.revoke_if_unused(grant).await;
        }
    }

    /// Gives back a grant that may be in use: only if no key hangs on it any more, for they would all go.
    async fn revoke_if_unused(&self, grant: i64) {
        if grant == 0 {
            return;
        }
        let options = etcd_client::LeaseTimeToLiveOptions::new().with_keys();
        let alive = self
            .cluster
            .call("look at a grant", |mut client| {
                let options = options.clone();
                async move { client.lease_time_to_live(grant, Some(options)).await }
            })
            .await;
        if alive.is_ok_and(|answer| answer.ttl() > 0 && answer.keys().is_empty()) {
            self.revoke(grant).await;
        }
    }
}

/// Whether a key other than this very one shares addresses with these subnets.
fn overlaps(keys: &Keys, kv: &KeyValue, subnets: &Subnets) -> bool {
    let key = text(kv.key());
    let found = key.strip_prefix(&keys.subnets).and_then(|key| Subnets::parse_key(key).ok());
    found.is_some_and(|found| found != *subnets && found.overlap(subnets))
}
