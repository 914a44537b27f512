//! The etcd store, version 3 of the API, in flannel's exact layout.
//!
//! **Calls** go to one endpoint, the last one that answered, and to the next when it does not; each has a deadline, and
//! HTTP/2 pings notice a path that died silently while only the watch is open.
//! **Source** — upstream pkg/subnet/etcd/registry.go. What differs is in what it does not do: no TTL call per key, no
//! unconditional put, no set emptied by one bad key, no grants left behind.

mod cause;
mod client;
mod endpoint;
mod follow;
mod leases;
mod pulse;
mod tls;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use etcd_client::{Client, Compare, CompareOp, GetOptions, KeyValue, Txn, TxnOp, TxnOpResponse, TxnResponse};

use self::client::Cluster;
use super::{Created, StoreError};
use crate::run::cli::DEFAULT_ENDPOINTS;
use crate::run::health::Counters;
use crate::words::lease::Subnets;
use crate::words::name::NetworkName;
use crate::words::secret::Secret;

/// Where upstream keeps the default network.
pub const DEFAULT_PREFIX: &str = "/coreos.com/network";

/// How to reach a cluster.
#[derive(Clone, Debug)]
pub struct EtcdSettings {
    /// URLs, or `host:port`: plain HTTP, or TLS if one of the files is given.
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
    /// Grants of claims that were not answered.
    doubtful: Arc<Mutex<BTreeSet<i64>>>,
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

impl EtcdStore {
    /// Checks the settings. Nothing is connected yet.
    pub fn new(settings: &EtcdSettings) -> Result<Self, StoreError> {
        let cluster = Arc::new(Cluster::new(settings)?);
        Ok(Self { cluster, prefix: tidy(&settings.prefix), doubtful: Arc::default() })
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
