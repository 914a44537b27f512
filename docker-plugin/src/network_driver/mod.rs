//! `NetworkDriver.*`: Docker networks on this node's bridges.
//!
//! Calls that take something away succeed when there is nothing to take away: engines repeat them after crashes.

mod connectivity;
mod endpoints;
mod networks;

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::Uri;
use axum::routing::post;
use serde_json::json;

use crate::answer::{call, constant};
use crate::plugin::Plugin;

/// What an engine asks first; the answer is always the same.
pub(crate) fn introduction() -> Router {
    Router::new()
        // Scope local: every host has its own pool. Connectivity global: a swarm's names then resolve on every host.
        .route(
            "/NetworkDriver.GetCapabilities",
            post(|| constant(json!({"Scope": "local", "ConnectivityScope": "global"}))),
        )
}

pub(crate) fn routes() -> Router<Arc<Plugin>> {
    type Here = State<Arc<Plugin>>;
    let nothing = || post(|| constant(json!({})));
    Router::new()
        .route(
            "/NetworkDriver.CreateNetwork",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, networks::create_network)),
        )
        .route(
            "/NetworkDriver.DeleteNetwork",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, networks::delete_network)),
        )
        .route(
            "/NetworkDriver.CreateEndpoint",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, endpoints::create_endpoint)),
        )
        .route(
            "/NetworkDriver.DeleteEndpoint",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, endpoints::delete_endpoint)),
        )
        .route(
            "/NetworkDriver.EndpointOperInfo",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, endpoints::endpoint_oper_info)),
        )
        .route("/NetworkDriver.Join", post(|s: Here, u: Uri, b: Bytes| call(s, u, b, endpoints::join)))
        .route("/NetworkDriver.Leave", post(|s: Here, u: Uri, b: Bytes| call(s, u, b, endpoints::leave)))
        .route(
            "/NetworkDriver.ProgramExternalConnectivity",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, connectivity::program_external_connectivity)),
        )
        .route(
            "/NetworkDriver.RevokeExternalConnectivity",
            post(|s: Here, u: Uri, b: Bytes| call(s, u, b, connectivity::revoke_external_connectivity)),
        )
        // Nodes of a swarm come and go; the store tells us more of them.
        .route("/NetworkDriver.DiscoverNew", nothing())
        .route("/NetworkDriver.DiscoverDelete", nothing())
}
