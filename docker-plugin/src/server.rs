//! The HTTP that engines speak on the socket: POST, no Content-Type, an empty `Host` (20.10) or a made-up one (later).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, Uri};
use axum::response::Response;
use axum::routing::post;
use serde_json::json;

use crate::answer::{constant, json_response};
use crate::plugin::Plugin;
use crate::socket::Socket;
use crate::{ipam_driver, network_driver};

/// Answers engines until `stop` resolves; calls that are under way then get a few seconds to finish.
pub(crate) async fn serve(
    socket: &mut Socket,
    plugin: Arc<Plugin>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    /// Longer than the longest call may take.
    const GRACE: Duration = Duration::from_secs(5);
    let listener = socket.listener()?;
    let stopped = Arc::new(tokio::sync::Notify::new());
    let stopping = Arc::clone(&stopped);
    let server = axum::serve(listener, router(plugin)).with_graceful_shutdown(async move {
        stop.await;
        stopping.notify_one();
    });
    tokio::select! {
        served = server.into_future() => served,
        () = async { stopped.notified().await; tokio::time::sleep(GRACE).await } => Ok(()),
    }
}

fn router(plugin: Arc<Plugin>) -> Router {
    Router::new()
        .route("/Plugin.Activate", post(|| constant(json!({"Implements": ["NetworkDriver", "IpamDriver"]}))))
        .merge(ipam_driver::routes())
        .merge(network_driver::routes())
        .fallback(unknown)
        .with_state(plugin)
}

async fn unknown(uri: Uri) -> Response {
    let text = format!("{} is not a method of this plugin", uri.path());
    json_response(StatusCode::NOT_FOUND, &json!({"Err": text, "Error": text}))
}
