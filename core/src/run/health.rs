//! /healthz, /readyz and /metrics.
//!
//! **Source** — upstream main.go `mustRunHealthz` for the first two, with their texts; /metrics is ours, in the
//! OpenMetrics text format.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::words::report::Made;

type Labels = Vec<(&'static str, String)>;

/// What the agents of this process count. Cheap to clone.
#[derive(Clone, Default)]
pub struct Counters(Arc<Inner>);

#[derive(Default)]
struct Inner {
    passes: Family<Labels, Counter>,
    repaired: Family<Labels, Counter>,
    failed: Family<Labels, Gauge>,
    peers: Family<Labels, Gauge>,
    ready: Mutex<BTreeMap<String, bool>>,
}

impl Counters {
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
        registry.register("peers", "Leases of other nodes that are planned for", self.0.peers.clone());
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
