//! /healthz, /readyz and /metrics.
//!
//! **Source** — upstream main.go `mustRunHealthz` for the first two, with their texts; /metrics is ours, in the
//! OpenMetrics text format.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::TcpListener;

use crate::words::extension::Occasion;
use crate::words::report::Made;

type Labels = Vec<(&'static str, String)>;

/// What the agents of this process count. Cheap to clone.
#[derive(Clone, Default)]
pub struct Counters(Arc<Inner>);

type Latencies = Family<Labels, Histogram, fn() -> Histogram>;

struct Inner {
    passes: Family<Labels, Counter>,
    repaired: Family<Labels, Counter>,
    failed: Family<Labels, Gauge>,
    leases: Family<Labels, Gauge>,
    peers: Family<Labels, Gauge>,
    store: Latencies,
    store_up: Family<Labels, Gauge>,
    strangers: Family<Labels, Counter>,
    commands: Family<Labels, Counter>,
    commands_failing: Family<Labels, Gauge>,
    ready: Mutex<BTreeMap<String, bool>>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            passes: Family::default(),
            repaired: Family::default(),
            failed: Family::default(),
            leases: Family::default(),
            peers: Family::default(),
            // 1 ms to 4 s: a call has 2.8 s.
            store: Latencies::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 13))),
            store_up: Family::default(),
            strangers: Family::default(),
            commands: Family::default(),
            commands_failing: Family::default(),
            ready: Mutex::default(),
        }
    }
}

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counters")
    }
}

impl Counters {
    /// A call to the store, what became of it, and how long it took.
    pub fn store_call(&self, outcome: &'static str, took: Duration) {
        let labels = vec![("outcome", outcome.to_owned())];
        self.0.store.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Whether a network's part of the store can be read.
    pub fn store_up(&self, network: &str, up: bool) {
        self.0.store_up.get_or_create(&vec![("network", network.to_owned())]).set(i64::from(up));
    }

    /// How many leases the network has.
    pub fn leases(&self, network: &str, leases: usize) {
        self.0.leases.get_or_create(&vec![("network", network.to_owned())]).set(leases as i64);
    }

    /// One more pass, and why it ran.
    pub fn pass(&self, network: &str, reason: &str) {
        self.0.passes.get_or_create(&labels(network, "reason", reason)).inc();
    }

    /// Facts that had been true, stopped being so and were made true again.
    pub fn repaired(&self, network: &str, made: &[Made]) {
        for made in made {
            self.0.repaired.get_or_create(&labels(network, "kind", made.kind)).inc();
        }
    }

    /// Changes that the kernel refuses now, and peers that are planned for.
    pub fn state(&self, network: &str, failed: usize, peers: usize) {
        let only = vec![("network", network.to_owned())];
        self.0.failed.get_or_create(&only).set(failed as i64);
        self.0.peers.get_or_create(&only).set(peers as i64);
    }

    /// Packets that the tunnels' guard has dropped since it was last asked.
    pub fn strangers(&self, network: &str, dropped: u64) {
        self.0.strangers.get_or_create(&vec![("network", network.to_owned())]).inc_by(dropped);
    }

    /// One more command of the extension backend has ended.
    pub fn command(&self, network: &str, occasion: Occasion, worked: bool) {
        let mut labels = labels(network, "command", &occasion.to_string());
        labels.push(("result", if worked { "worked" } else { "failed" }.to_owned()));
        self.0.commands.get_or_create(&labels).inc();
    }

    /// How many of them fail now.
    pub fn commands_failing(&self, network: &str, failing: usize) {
        self.0.commands_failing.get_or_create(&vec![("network", network.to_owned())]).set(failing as i64);
    }

    /// Whether a network's data path is as planned and its subnet file is written.
    pub fn ready(&self, network: &str, ready: bool) {
        self.0.ready.lock().unwrap_or_else(PoisonError::into_inner).insert(network.to_owned(), ready);
    }

    fn all_ready(&self) -> bool {
        let ready = self.0.ready.lock().unwrap_or_else(PoisonError::into_inner);
        !ready.is_empty() && ready.values().all(|ready| *ready)
    }

    fn text(&self) -> String {
        let mut registry = Registry::with_prefix("flannel");
        registry.register("passes", "Passes of the reconciler, by reason", self.0.passes.clone());
        registry.register(
            "drift_repaired",
            "Facts that had stopped being true in the kernel and were made true again, by kind",
            self.0.repaired.clone(),
        );
        registry.register("changes_failed", "Changes that the kernel refuses now", self.0.failed.clone());
        registry.register("leases", "Leases of the network, our own among them", self.0.leases.clone());
        registry.register("store_up", "Whether the store can be read", self.0.store_up.clone());
        registry.register_with_unit(
            "store_call",
            "How long calls to the store took, by outcome: answered, refused, unreachable",
            Unit::Seconds,
            self.0.store.clone(),
        );
        let ready = Family::<Labels, Gauge>::default();
        for (network, is) in self.0.ready.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            ready.get_or_create(&vec![("network", network.clone())]).set(i64::from(*is));
        }
        registry.register("ready", "Whether the data path is as planned and the subnet file written", ready);
        registry.register("build", "The program", Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
        registry.register("peers", "Leases of other nodes that are planned for", self.0.peers.clone());
        let (name, help) = (
            "tunnel_strangers_dropped",
            "Packets for the tunnel that were dropped because they came from an address that holds no lease",
        );
        registry.register(name, help, self.0.strangers.clone());
        let (name, help) = ("extension_commands", "Commands of the extension backend that have ended");
        registry.register(name, help, self.0.commands.clone());
        let (name, help) = ("extension_commands_failing", "Commands of the extension backend that fail now");
        registry.register(name, help, self.0.commands_failing.clone());
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = encode(&mut text, &registry);
        text
    }
}

fn labels(network: &str, key: &'static str, value: &str) -> Labels {
    vec![("network", network.to_owned()), (key, value.to_owned())]
}

/// Serves until the process ends. Bind errors are returned at once.
pub async fn serve(address: SocketAddr, counters: Counters) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    tracing::info!("health server listens on {}", listener.local_addr()?);
    let app = Router::new()
        .route("/healthz", axum::routing::any(async || "flanneld is running"))
        .route("/readyz", axum::routing::any(readyz))
        .route("/metrics", get(metrics))
        .with_state(counters);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!("the health server ended: {error}");
        }
    });
    Ok(())
}

async fn readyz(State(counters): State<Counters>) -> impl IntoResponse {
    match counters.all_ready() {
        true => (StatusCode::OK, "flanneld is ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "flanneld is not ready yet"),
    }
}

async fn metrics(State(counters): State<Counters>) -> impl IntoResponse {
    const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, OPENMETRICS)], counters.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_counted_is_shown() {
        let counters = Counters::default();
        assert!(!counters.all_ready(), "nothing is served yet");
        counters.pass("default", "leases");
        let made = Made { kind: "route", verb: "added", text: String::new() };
        counters.repaired("default", &[made]);
        counters.state("default", 1, 2);
        counters.leases("default", 3);
        counters.store_up("default", true);
        counters.store_call("answered", Duration::from_millis(3));
        counters.ready("default", true);
        let text = counters.text();
        for line in [
            "flannel_passes_total{network=\"default\",reason=\"leases\"} 1",
            "flannel_drift_repaired_total{network=\"default\",kind=\"route\"} 1",
            "flannel_changes_failed{network=\"default\"} 1",
            "flannel_peers{network=\"default\"} 2",
            "flannel_leases{network=\"default\"} 3",
            "flannel_store_up{network=\"default\"} 1",
            "flannel_store_call_seconds_bucket{le=\"0.004\",outcome=\"answered\"} 1",
            "flannel_store_call_seconds_bucket{le=\"0.002\",outcome=\"answered\"} 0",
            "flannel_store_call_seconds_count{outcome=\"answered\"} 1",
            "flannel_ready{network=\"default\"} 1",
            "flannel_build_info{version=",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(counters.all_ready());
        counters.ready("web", false);
        assert!(!counters.all_ready(), "all networks");
    }
}
