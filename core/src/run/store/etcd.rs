//! The etcd store, version 3 of the API, in flannel's exact layout.
//!
//! **Calls** go to one endpoint, the last one that answered, and to the next when it does not; each has a deadline, and
//! HTTP/2 pings notice a path that died silently while only the watch is open.
//! **Source** — upstream pkg/subnet/etcd/registry.go. What differs is in what it does not do: no TTL call per key, no
//! unconditional put, no set emptied by one bad key, no grants left behind.

mod client;
mod follow;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
};
use tokio::time::Instant;

use self::client::Cluster;
use super::{Claim, Created, Held, Renewal, StoreError};
use crate::decide::allocate::same_holder;
use crate::run::cli::DEFAULT_ENDPOINTS;
use crate::run::health::Counters;
use crate::words::lease::{LeaseValue, OwnLease, Subnets};
use crate::words::name::NetworkName;
use crate::words::secret::Secret;

/// Where upstream keeps the default network.
pub const DEFAULT_PREFIX: &str = "/coreos.com/network";

/// How often a guarded write is tried again when unrelated writes came in between.
const TRIES_MAX: usize = 10;

/// How to reach a cluster.
#[derive(Clone, Debug)]
pub struct EtcdSettings {
    /// URLs, or `host:port` for plain HTTP.
    pub endpoints: Vec<String>,
    /// Where the networks live; slashes are tidied as upstream does.
    pub prefix: String,
    /// Authority that signed the servers' certificates (PEM).
    pub cafile: Option<PathBuf>,
    /// Our certificate (PEM); together with the key.
    pub certfile: Option<PathBuf>,
    /// Our private key (PEM).
    pub keyfile: Option<PathBuf>,
    /// User and password, where the cluster asks for them.
    pub user: Option<(String, Secret<String>)>,
}

impl Default for EtcdSettings {
    fn default() -> Self {
        Self {
            endpoints: split_endpoints(DEFAULT_ENDPOINTS),
            prefix: DEFAULT_PREFIX.to_owned(),
            cafile: None,
            certfile: None,
            keyfile: None,
            user: None,
        }
    }
}

/// Cuts a comma-separated list of endpoints.
pub fn split_endpoints(list: &str) -> Vec<String> {
    list.split(',').map(str::trim).filter(|url| !url.is_empty()).map(str::to_owned).collect()
}

/// A cluster and a prefix in it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EtcdStore {
    cluster: Arc<Cluster>,
    prefix: String,
}

/// The keys of one network.
#[derive(Clone, Debug)]
struct Keys {
    config: String,
    /// With its final slash, so that `subnets-old` is not in it.
    subnets: String,
}

impl Keys {
    fn key(&self, subnets: &Subnets) -> String {
        format!("{}{}", self.subnets, subnets.key())
    }
}

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

impl EtcdStore {
    /// Checks the settings. Nothing is connected yet.
    pub fn new(settings: &EtcdSettings) -> Result<Self, StoreError> {
        let cluster = Arc::new(Cluster::new(settings)?);
        Ok(Self { cluster, prefix: tidy(&settings.prefix) })
    }

    pub(super) fn counted_by(&self, counters: Counters) {
        self.cluster.counted_by(counters);
    }

    pub(super) async fn connect_anew(&self) {
        self.cluster.connect_anew().await;
    }

    fn keys(&self, network: &NetworkName) -> Keys {
        let base = match network.is_default() {
            true => self.prefix.clone(),
            false => format!("{}/{network}", self.prefix),
        };
        Keys { config: format!("{base}/config"), subnets: format!("{base}/subnets/") }
    }

    pub(super) async fn config(&self, network: &NetworkName) -> Result<Option<String>, StoreError> {
        let key = self.keys(network).config;
        self.get_text("read the network config", key).await
    }

    async fn get_text(&self, tried: &'static str, key: String) -> Result<Option<String>, StoreError> {
        let answer = self
            .cluster
            .call(tried, |mut client| {
                let key = key.clone();
                async move { client.get(key, None).await }
            })
            .await?;
        Ok(answer.kvs().first().map(|kv| text(kv.value())))
    }

    pub(super) async fn create_config(
        &self,
        network: &NetworkName,
        document: &str,
    ) -> Result<Created, StoreError> {
        let key = self.keys(network).config;
        let txn = Txn::new()
            .when([Compare::create_revision(key.clone(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.clone(), document, None)])
            .or_else([TxnOp::get(key, None)]);
        let answer = self.txn("create the network config", txn).await?;
        Ok(match found(&answer) {
            None => Created::Made,
            Some(kv) => Created::Exists(text(kv.value())),
        })
    }

    pub(super) async fn remove(&self, network: &NetworkName) -> Result<(), StoreError> {
        let Keys { config, subnets } = self.keys(network);
        let txn = Txn::new()
            .when([Compare::create_revision(subnets.clone(), CompareOp::Equal, 0).with_prefix()])
            .and_then([TxnOp::delete(config, None)])
            .or_else([TxnOp::get(subnets, Some(GetOptions::new().with_prefix().with_keys_only()))]);
        let answer = self.txn("remove the network config", txn).await?;
        match answer.succeeded() {
            true => Ok(()),
            false => Err(StoreError::InUse { network: network.clone(), leases: all_found(&answer).len() }),
        }
    }

    /// The names are found by their `config` keys. The default network's leases, which may be thousands, are not read.
    pub(super) async fn networks(&self) -> Result<Vec<(NetworkName, String)>, StoreError> {
        const TRIED: &str = "list the networks";
        let range = |from: &str, to: &str| {
            let options = GetOptions::new().with_range(format!("{}{to}", self.prefix)).with_keys_only();
            TxnOp::get(format!("{}{from}", self.prefix), Some(options))
        };
        // '0' is the byte after '/': the end of everything below a directory.
        let txn = Txn::new().and_then([range("/", "/subnets/"), range("/subnets0", "0")]);
        let answer = self.txn(TRIED, txn).await?;
        let mut networks = Vec::new();
        for key in all_found(&answer) {
            let Some(name) = self.network_of(&text(key.key())) else { continue };
            if let Some(document) = self.get_text(TRIED, self.keys(&name).config).await? {
                networks.push((name, document));
            }
        }
        networks.sort();
        Ok(networks)
    }

    /// The network whose config this key is.
    fn network_of(&self, key: &str) -> Option<NetworkName> {
        let rest = key.strip_prefix(&self.prefix)?.strip_prefix('/')?;
        match rest.strip_suffix("config")? {
            "" => Some(NetworkName::default_network()),
            // A network called "default" would be a second name for the default one, at another place.
            name => NetworkName::new(name.strip_suffix('/')?).ok().filter(|name| !name.is_default()),
        }
    }

    pub(super) async fn claim(
        &self,
        network: &NetworkName,
        subnets: &Subnets,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Claim, StoreError> {
        let keys = self.keys(network);
        let key = keys.key(subnets);
        let (grant, expires) = self.grant(ttl).await?;
        let claimed = self.claim_with(&keys, subnets, value, grant).await;
        match claimed {
            Ok(Some(revision)) => {
                let own = OwnLease { subnets: *subnets, value: value.clone() };
                Ok(Claim::Made(Held { own, expires: Some(expires), revision, grant }))
            }
            Ok(None) => {
                tracing::debug!("{key} was taken by somebody else first");
                self.revoke(grant).await;
                Ok(Claim::Taken)
            }
            Err(error) => {
                self.abandon(grant, &error).await;
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

    pub(super) async fn renew(
        &self,
        network: &NetworkName,
        held: &Held,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Renewal, StoreError> {
        let key = self.keys(network).key(&held.own.subnets);
        let own = OwnLease { subnets: held.own.subnets, value: value.clone() };
        // If somebody wrote to it and it still carries the address that we published, or nothing that can be read, it is
        // still ours.
        let ours = |found: Option<&LeaseValue>| found.is_none_or(|found| same_holder(found, &held.own.value));
        if held.expires.is_none() {
            let found = self.get_one("read our lease", &key).await?;
            return self.take_over(&key, own, ours, Rubbish::Reserves, found, ttl).await;
        }
        let (grant, expires) = self.grant(ttl).await?;
        match self.put_guarded(&key, held.revision, value, grant).await {
            Ok(Guarded::Done { revision }) => {
                self.revoke(held.grant).await;
                Ok(Renewal::Done(Held { own, expires: Some(expires), revision, grant }))
            }
            Ok(Guarded::Overtaken(found)) => {
                self.revoke(grant).await;
                let renewal = self.take_over(&key, own, ours, Rubbish::SaysNothing, found, ttl).await;
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

    pub(super) async fn adopt(
        &self,
        network: &NetworkName,
        subnets: &Subnets,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Renewal, StoreError> {
        let key = self.keys(network).key(subnets);
        let found = self.get_one("read our lease", &key).await?;
        let ours = |found: Option<&LeaseValue>| found.is_some_and(|found| same_holder(found, value));
        let own = OwnLease { subnets: *subnets, value: value.clone() };
        self.take_over(&key, own, ours, Rubbish::SaysNothing, found, ttl).await
    }

    /// Takes over a key, as it was `found`, if it is `ours` by its value (none: one that cannot be read).
    async fn take_over(
        &self,
        key: &str,
        own: OwnLease,
        ours: impl Fn(Option<&LeaseValue>) -> bool + Sync,
        rubbish: Rubbish,
        mut found: Option<KeyValue>,
        ttl: Duration,
    ) -> Result<Renewal, StoreError> {
        for _ in 0..TRIES_MAX {
            let Some(kv) = &found else { return Ok(Renewal::Lost(None)) };
            let holder = LeaseValue::from_json(&text(kv.value())).ok();
            if !ours(holder.as_ref()) {
                return Ok(Renewal::Lost(holder));
            }
            let reservation = kv.lease() == 0 && (holder.is_some() || rubbish == Rubbish::Reserves);
            if reservation && holder.as_ref() == Some(&own.value) {
                let revision = kv.mod_revision();
                return Ok(Renewal::Done(Held { own, expires: None, revision, grant: 0 }));
            }
            let (grant, expires) = match reservation {
                true => (0, None),
                false => self.grant(ttl).await.map(|(grant, expires)| (grant, Some(expires)))?,
            };
            match self.put_guarded(key, kv.mod_revision(), &own.value, grant).await {
                Ok(Guarded::Done { revision }) => {
                    self.revoke_if_unused(kv.lease()).await;
                    return Ok(Renewal::Done(Held { own, expires, revision, grant }));
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

    pub(super) async fn release(
        &self,
        network: &NetworkName,
        subnets: &Subnets,
        value: &LeaseValue,
    ) -> Result<bool, StoreError> {
        const TRIED: &str = "remove our lease";
        let key = self.keys(network).key(subnets);
        for _ in 0..TRIES_MAX {
            let Some(kv) = self.get_one(TRIED, &key).await? else { return Ok(true) };
            let holder = LeaseValue::from_json(&text(kv.value())).ok();
            if kv.lease() == 0 || !holder.is_some_and(|holder| same_holder(&holder, value)) {
                return Ok(false);
            }
            let txn = Txn::new()
                .when([Compare::mod_revision(key.clone(), CompareOp::Equal, kv.mod_revision())])
                .and_then([TxnOp::delete(key.clone(), None)]);
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
        value: &LeaseValue,
        grant: i64,
    ) -> Result<Guarded, StoreError> {
        let put = TxnOp::put(key, value.to_json(), Some(PutOptions::new().with_lease(grant)));
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

    async fn txn(&self, tried: &'static str, txn: Txn) -> Result<TxnResponse, StoreError> {
        self.cluster
            .call(tried, |client: Client| {
                let txn = txn.clone();
                async move { client::kv(&client).txn(txn).await }
            })
            .await
    }

    async fn get_one(&self, tried: &'static str, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let answer =
            self.cluster.call(tried, |mut client| async move { client.get(key, None).await }).await?;
        Ok(answer.kvs().first().cloned())
    }

    /// All keys below one, and the revision at which they were read.
    async fn list(&self, tried: &'static str, below: &str) -> Result<(i64, Vec<KeyValue>), StoreError> {
        let mut answer = self
            .cluster
            .call(tried, |client: Client| async move {
                client::kv(&client).get(below, Some(GetOptions::new().with_prefix())).await
            })
            .await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok((revision, answer.take_kvs()))
    }

    /// A new grant and when it ends, counted from before the call: never later than etcd's own count.
    async fn grant(&self, ttl: Duration) -> Result<(i64, Instant), StoreError> {
        let start = Instant::now();
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).max(1);
        let answer =
            self.cluster
                .call("get a grant for our lease", |mut client| async move {
                    client.lease_grant(seconds, None).await
                })
                .await?;
        let granted = Duration::from_secs(u64::try_from(answer.ttl()).unwrap_or(0));
        Ok((answer.id(), start + granted))
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

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn revision(answer: &TxnResponse) -> i64 {
    answer.header().map_or(0, |header| header.revision())
}

/// Every key that the gets of a transaction returned.
fn all_found(answer: &TxnResponse) -> Vec<KeyValue> {
    let mut found = Vec::new();
    for response in answer.op_responses() {
        if let TxnOpResponse::Get(mut got) = response {
            found.append(&mut got.take_kvs());
        }
    }
    found
}

/// The key that the only get of a transaction returned.
fn found(answer: &TxnResponse) -> Option<KeyValue> {
    all_found(answer).into_iter().next()
}

/// Upstream joins with Go's `path.Join`: no double and no final slash; a missing first one stays missing.
fn tidy(prefix: &str) -> String {
    let parts: Vec<_> = prefix.split('/').filter(|part| !part.is_empty()).collect();
    let root = if prefix.starts_with('/') && !parts.is_empty() { "/" } else { "" };
    format!("{root}{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(prefix: &str) -> EtcdStore {
        EtcdStore::new(&EtcdSettings { prefix: prefix.into(), ..EtcdSettings::default() }).unwrap()
    }

    #[tokio::test]
    async fn keys_are_upstreams() {
        let keys = store("/coreos.com//network/").keys(&NetworkName::default_network());
        assert_eq!(keys.config, "/coreos.com/network/config");
        let subnets = Subnets::parse_key("10.5.29.0-24").unwrap();
        assert_eq!(keys.key(&subnets), "/coreos.com/network/subnets/10.5.29.0-24");
        assert_eq!(store("/").keys(&NetworkName::default_network()).config, "/config");
        let web = store("kv").keys(&NetworkName::new("web").unwrap());
        assert_eq!((web.config.as_str(), web.subnets.as_str()), ("kv/web/config", "kv/web/subnets/"));
    }

    #[tokio::test]
    async fn only_configs_name_networks() {
        let store = store("/p");
        let name = |key: &str| store.network_of(key).map(String::from);
        assert_eq!(name("/p/config"), Some("default".into()));
        assert_eq!(name("/p/web/config"), Some("web".into()));
        for other in [
            "/p/web/subnets/10.5.1.0-24",
            "/p/webconfig",
            "/p/web/x/config",
            "/p/Web/config",
            "/p/default/config",
            "/px/config",
            "/p/subnets/config",
        ] {
            assert_eq!(name(other), None, "{other}");
        }
    }

    #[test]
    fn endpoints_are_a_comma_list() {
        assert_eq!(split_endpoints("http://a:1, http://b:2,"), ["http://a:1", "http://b:2"]);
        assert_eq!(EtcdSettings::default().endpoints.len(), 2);
    }
}
