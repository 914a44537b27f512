//! The HTTP that engines speak on the socket: POST, no Content-Type, an empty `Host` (20.10) or a made-up one (later).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody as _, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, post};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::answer::{blocking, constant, json_response};
use crate::connections::Limited;
use crate::plugin::Plugin;
use crate::socket::Socket;
use crate::{ipam_driver, network_driver};

/// The longest body that is read: a container with some 15,000 published ports.
const BODY_MAX: usize = 2 * 1024 * 1024;

/// Bodies up to this size are read as they come; of larger ones, and of those that do not say, [`LARGE_AT_A_TIME`].
const SMALL_BODY_MAX: u64 = 64 * 1024;
const LARGE_AT_A_TIME: usize = 8;

/// How long a body may take to arrive. An engine writes it together with its header.
const BODY_PATIENCE: Duration = Duration::from_secs(10);

/// Answers engines until `stop` resolves; calls that are under way then get a few seconds to finish.
pub(crate) async fn serve(
    socket: &Socket,
    plugin: Arc<Plugin>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let methods = ipam_driver::routes().merge(network_driver::routes()).route("/status", get(status));
    let methods = introduction().merge(methods.with_state(plugin)).fallback(unknown);
    listen(socket, methods.method_not_allowed_fallback(not_posted), stop).await
}

/// Says to engines who we are, and refuses everything else with the reason, until `stop` resolves. An engine that is told
/// nothing waits for ever, and 20.10 does not outlive a managed plugin that is not there when the engine starts.
pub(crate) async fn refuse(
    socket: &Socket,
    reason: &str,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let reason = reason.to_owned();
    let refused = move || async move { answer(StatusCode::INTERNAL_SERVER_ERROR, &reason) };
    listen(socket, introduction().fallback(refused), stop).await
}

/// What an engine asks first, and once: a driver that fails here is unknown to the engine for the rest of its life.
fn introduction() -> Router {
    Router::new()
        .route("/Plugin.Activate", post(|| constant(json!({"Implements": ["NetworkDriver", "IpamDriver"]}))))
        .merge(ipam_driver::introduction())
        .merge(network_driver::introduction())
}

async fn listen(
    socket: &Socket,
    methods: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    /// Longer than the longest call may take.
    const GRACE: Duration = Duration::from_secs(5);
    let listener = socket.listener()?;
    let bounded = methods.layer(from_fn_with_state(Arc::new(Semaphore::new(LARGE_AT_A_TIME)), whole));
    let stopped = Arc::new(tokio::sync::Notify::new());
    let stopping = Arc::clone(&stopped);
    let server = axum::serve(Limited::new(listener), bounded).with_graceful_shutdown(async move {
        stop.await;
        stopping.notify_one();
    });
    tokio::select! {
        served = server.into_future() => served,
        () = async { stopped.notified().await; tokio::time::sleep(GRACE).await } => Ok(()),
    }
}

/// For the command `status`; engines never ask.
async fn status(State(plugin): State<Arc<Plugin>>) -> Response {
    match blocking(move || Ok(plugin.status())).await {
        Ok(status) => json_response(StatusCode::OK, &status),
        Err(refusal) => json_response(StatusCode::INTERNAL_SERVER_ERROR, &json!({"message": refusal.0})),
    }
}

/// Hands a request on when its body is there, and never more than [`BODY_MAX`] of it.
async fn whole(State(large): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let announced = body.size_hint().exact();
    if announced.is_some_and(|length| length > BODY_MAX as u64) {
        return too_long();
    }
    let read = async {
        let _turn = match announced.is_some_and(|length| length <= SMALL_BODY_MAX) {
            true => None,
            false => large.acquire().await.ok(),
        };
        to_bytes(body, BODY_MAX).await
    };
    match timeout(BODY_PATIENCE, read).await {
        Ok(Ok(body)) => next.run(Request::from_parts(parts, Body::from(body))).await,
        // Or it broke off: then nobody hears the answer.
        Ok(Err(_)) => too_long(),
        Err(_) => {
            let text = format!("the request's body did not arrive within {} s", BODY_PATIENCE.as_secs());
            answer(StatusCode::REQUEST_TIMEOUT, &text)
        }
    }
}

fn too_long() -> Response {
    let text = format!("a request's body may have {} KiB, this one is longer", BODY_MAX / 1024);
    answer(StatusCode::PAYLOAD_TOO_LARGE, &text)
}

async fn unknown(uri: Uri) -> Response {
    answer(StatusCode::NOT_FOUND, &format!("{} is not a method of this plugin", uri.path()))
}

async fn not_posted(method: Method, uri: Uri) -> Response {
    answer(StatusCode::METHOD_NOT_ALLOWED, &format!("{} is called with POST, not with {method}", uri.path()))
}

/// A refusal of this floor; both halves of an engine find its text.
fn answer(status: StatusCode, text: &str) -> Response {
    tracing::warn!(status = status.as_u16(), "{text}");
    json_response(status, &json!({"Err": text, "Error": text}))
}
