//! Watching a network: read everything once, then every change from there on; read everything again when that breaks.

use std::time::Duration;

use etcd_client::{
    Client, Error, EventType, GetOptions, KeyValue, Txn, TxnOp, WatchOptions, WatchResponse, WatchStream,
};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::cause::cause;
use super::client::Line;
use super::pulse::Path;
use super::{EtcdStore, Keys, all_found, client, revision, text};
use crate::run::store::shelf::{Shelf, publish_down};
use crate::run::store::sign::Sign;
use crate::run::store::{Backoff, Snapshot, StoreError};
use crate::words::name::NetworkName;

/// Changes that come this close together are told as one: a thousand nodes that start are a few snapshots. One that comes alone is told at
/// once.
const GATHER: Duration = Duration::from_millis(3);

/// For how long changes are gathered at most.
const GATHER_MAX: Duration = Duration::from_millis(30);

/// A connection by which nothing has come for so long is asked whether anything still does...
const QUIET: Duration = Duration::from_secs(3);

/// ...and so long is waited for an answer, before etcd counts as away. Together less than the 5 s after which the operator is told.
/// Every host of a cluster asks, again and again: so what is left over is not given to the waiting.
const ANSWER: Duration = Duration::from_millis(1500);

/// A watch that lived this long was a good one: the next failure is a new trouble, not the same.
const GOOD: Duration = Duration::from_secs(10);

/// Why a watch ended.
enum Ended {
    /// The server forgot what we have not seen yet.
    Compacted { horizon: i64 },
    /// The stream broke.
    Broken(String),
}

impl EtcdStore {
    /// Keeps the receivers up to date until the last one is dropped.
    pub(in crate::run::store) async fn follow(self, network: NetworkName, sender: watch::Sender<Snapshot>) {
        let mut backoff = Backoff::new();
        let mut anew = self.cluster.anew();
        loop {
            let start = Instant::now();
            tokio::select! {
                () = sender.closed() => return,
                // Nobody has told this stream that nothing comes by it any more.
                Ok(()) = anew.changed() => continue,
                () = self.session(&network, &sender) => {}
            }
            if start.elapsed() > GOOD {
                backoff.reset();
            }
            tokio::select! {
                () = sender.closed() => return,
                () = sleep(backoff.wait()) => {}
            }
        }
    }

    /// One round: list, watch, until something breaks.
    async fn session(&self, network: &NetworkName, sender: &watch::Sender<Snapshot>) {
        let ended = match self.list_and_watch(network, sender).await {
            Ok(ended) => ended,
            Err(error) => return tell_down(network, sender, &error),
        };
        match ended {
            Ended::Compacted { horizon } => tracing::info!(
                "network {network}: the watch fell behind compaction horizon (compact rev {horizon}), re-listing and resuming"
            ),
            Ended::Broken(cause) => {
                tracing::info!("network {network}: etcd watch closed ({cause}), reconnecting");
            }
        }
    }

    async fn list_and_watch(
        &self,
        network: &NetworkName,
        sender: &watch::Sender<Snapshot>,
    ) -> Result<Ended, StoreError> {
        let keys = self.keys(network);
        let (mut shelf, mut seen_to) = self.read(&keys).await?;
        tell_up(network, &mut shelf, sender, seen_to);
        let (mut stream, line) = self.open(&keys, seen_to + 1).await?;
        let mut told = Instant::now();
        loop {
            let next = loop {
                tokio::select! {
                    next = stream.message() => break next,
                    path = line.pulse.after(QUIET, self.ask_path(network, &line.client)) => match path {
                        Path::Carries => tell_up(network, &mut shelf, sender, seen_to),
                        Path::Silent => {
                            tell_down(network, sender, &self.cluster.silent("watch the network", ANSWER));
                        }
                        Path::Unclear => {}
                    }
                }
            };
            let mut seen = match next {
                Ok(Some(message)) => {
                    line.pulse.beat();
                    message
                }
                Ok(None) => return Ok(Ended::Broken("the server closed it".into())),
                Err(error) => return Ok(Ended::Broken(cause(&error))),
            };
            let gathered = Instant::now();
            let pause = if gathered - told > GATHER_MAX { Duration::ZERO } else { GATHER };
            loop {
                if seen.canceled() {
                    return match seen.compact_revision() {
                        0 => Err(StoreError::Refused {
                            tried: "watch the network",
                            endpoint: format!("{:?}", self.cluster),
                            cause: seen.cancel_reason().to_owned(),
                        }),
                        horizon => Ok(Ended::Compacted { horizon }),
                    };
                }
                seen_to = apply(&keys, &mut shelf, &seen).max(seen_to);
                if gathered.elapsed() > GATHER_MAX {
                    break;
                }
                match within(pause, stream.message()).await {
                    Some(Ok(Some(message))) => seen = message,
                    // The end of the stream is seen again in the next round, after what came before it was told.
                    Some(Ok(None) | Err(_)) | None => break,
                }
            }
            tell_up(network, &mut shelf, sender, seen_to);
            told = Instant::now();
        }
    }

    /// Whether the path to etcd still carries anything: one that drops packets without a word breaks no connection for a long time.
    /// The server answers from what it has, without asking the others. Nothing is done about it but that it is told: a server that
    /// is only slow is not to be asked for everything again by thousands of nodes, and a connection that is dead is found out by pings.
    async fn ask_path(&self, network: &NetworkName, client: &Client) -> Path {
        let options = GetOptions::new().with_serializable().with_count_only();
        let key = self.keys(network).config;
        match timeout(ANSWER, client.kv_client().get(key, Some(options))).await {
            Ok(Ok(_)) => Path::Carries,
            // A refusal is an answer; a broken connection breaks the watch, too.
            Ok(Err(_)) => Path::Unclear,
            Err(_) => Path::Silent,
        }
    }

    /// Config and leases at one revision.
    async fn read(&self, keys: &Keys) -> Result<(Shelf, i64), StoreError> {
        let Keys { config, subnets } = keys.clone();
        let all = Some(GetOptions::new().with_prefix());
        let txn = Txn::new().and_then([TxnOp::get(config, None), TxnOp::get(subnets, all)]);
        let answer = self.txn("read the network", txn).await?;
        let mut shelf = Shelf::new();
        for kv in &all_found(&answer) {
            put(keys, &mut shelf, kv);
        }
        Ok((shelf, revision(&answer)))
    }

    /// One stream with two watches: the config, and the leases.
    async fn open(&self, keys: &Keys, from: i64) -> Result<(WatchStream, Line), StoreError> {
        let options = WatchOptions::new().with_start_revision(from);
        let prefix = options.clone().with_prefix();
        self.cluster
            .call_on("watch the network", |line: Line| {
                let (options, prefix) = (options.clone(), prefix.clone());
                async move {
                    let mut stream =
                        client::watches(&line.client).watch(keys.subnets.as_str(), Some(prefix)).await?;
                    stream.watch(keys.config.as_str(), Some(options)).await?;
                    Ok::<_, Error>((stream, line))
                }
            })
            .await
    }
}

fn tell_down(network: &NetworkName, sender: &watch::Sender<Snapshot>, error: &StoreError) {
    let was_up = sender.borrow().down.is_none();
    if publish_down(sender, error) {
        match was_up {
            true => tracing::warn!("network {network}: {error}"),
            // Still away, for another reason.
            false => tracing::debug!("network {network}: {error}"),
        }
    }
}

fn tell_up(network: &NetworkName, shelf: &mut Shelf, sender: &watch::Sender<Snapshot>, seen_to: i64) {
    if sender.borrow().down.is_some() {
        tracing::info!("network {network}: etcd is reachable again");
    }
    shelf.publish(sender, seen_to);
}

/// What comes within a time. Without any, what is there already: the runtime's timer would sleep for up to two milliseconds, and a
/// sleeper on a busy host is late.
async fn within<T>(time: Duration, what: impl Future<Output = T>) -> Option<T> {
    if !time.is_zero() {
        return timeout(time, what).await.ok();
    }
    tokio::select! {
        biased;
        come = what => Some(come),
        () = std::future::ready(()) => None,
    }
}

fn put(keys: &Keys, shelf: &mut Shelf, kv: &KeyValue) {
    let key = text(kv.key());
    match key.strip_prefix(&keys.subnets) {
        Some(lease) => shelf.put(lease, kv.value(), Sign::of(kv.lease())),
        None if key == keys.config => shelf.config(Some(kv.value())),
        None => {}
    }
}

/// Applies the events of a message; the highest revision among those of the leases. The config's are told by a watch of its
/// own, which may be ahead of the other one: they say nothing about how fresh the leases are.
fn apply(keys: &Keys, shelf: &mut Shelf, message: &WatchResponse) -> i64 {
    let mut last = 0;
    for event in message.events() {
        let Some(kv) = event.kv() else { continue };
        if kv.key().starts_with(keys.subnets.as_bytes()) {
            last = last.max(kv.mod_revision());
        }
        match event.event_type() {
            EventType::Put => put(keys, shelf, kv),
            EventType::Delete => {
                let key = text(kv.key());
                match key.strip_prefix(&keys.subnets) {
                    Some(lease) => shelf.delete(lease),
                    None if key == keys.config => shelf.config(None),
                    None => {}
                }
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_time_there_is_what_is_there() {
        assert_eq!(within(Duration::ZERO, std::future::ready(7)).await, Some(7));
        assert_eq!(within(Duration::ZERO, std::future::pending::<u8>()).await, None);
        let start = Instant::now();
        assert_eq!(within(GATHER, std::future::pending::<u8>()).await, None);
        assert!(start.elapsed() >= GATHER);
    }
}
