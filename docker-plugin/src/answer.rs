//! How a call is answered: a value, or a refusal that the person who typed the command reads.
//!
//! A method that needs a body refuses an empty one: engines repeat a call whose connection broke **with an empty body**, and
//! defaults would allocate something nobody asked for. An error is status 500 with both keys, since the network half of an
//! engine reads `Err` and the IPAM half `Error`.

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

/// Why a call is refused: a text for the person who typed the command, which engines show as it is.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refusal(pub(crate) String);

impl Refusal {
    /// From anything that explains itself, causes included.
    pub(crate) fn of(error: &dyn std::error::Error) -> Self {
        Self(flannel_core::act::pass::chain(error))
    }
}

impl From<&str> for Refusal {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<String> for Refusal {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// Runs what waits for a disk or for the kernel beside the runtime's one thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Refusal(format!("the call broke off: {error}"))))
}

/// A constant answer to a method whose body does not matter.
pub(crate) async fn constant(answer: serde_json::Value) -> Response {
    json_response(StatusCode::OK, &answer)
}

/// Runs one method: reads its body, calls it, and turns what it says into a response.
pub(crate) async fn call<Served, Request, Answer, Called>(
    State(state): State<Arc<Served>>,
    uri: Uri,
    body: Bytes,
    method: impl FnOnce(Arc<Served>, Request) -> Called,
) -> Response
where
    Request: DeserializeOwned,
    Answer: Serialize,
    Called: Future<Output = Result<Answer, Refusal>>,
{
    let started = Instant::now();
    let name = uri.path().trim_start_matches('/');
    let request = match of_object::<Request>(&body) {
        Ok(request) => request,
        Err(error) => {
            tracing::warn!(method = name, bytes = body.len(), %error, "request without a usable body");
            let text = match body.is_empty() {
                true => format!(
                    "{name} needs a body and got none (an engine does that when it repeats a call whose connection broke): try again"
                ),
                false => format!("{name}: the body cannot be read: {error}"),
            };
            return json_response(StatusCode::BAD_REQUEST, &json!({"Err": text, "Error": text}));
        }
    };
    let answer = method(state, request).await;
    let took = started.elapsed();
    match answer {
        Ok(answer) => {
            tracing::debug!(method = name, ?took, "answered");
            json_response(StatusCode::OK, &answer)
        }
        Err(Refusal(text)) => {
            tracing::warn!(method = name, ?took, "refused: {text}");
            json_response(StatusCode::INTERNAL_SERVER_ERROR, &json!({"Err": text, "Error": text}))
        }
    }
}

/// From a JSON object; serde alone would also take a list of its values.
fn of_object<Request: DeserializeOwned>(body: &[u8]) -> Result<Request, serde_json::Error> {
    if body.trim_ascii_start().first().is_some_and(|first| *first != b'{') {
        return Err(<serde_json::Error as serde::de::Error>::custom("it is not a JSON object"));
    }
    serde_json::from_slice(body)
}

pub(crate) fn json_response(status: StatusCode, answer: &impl Serialize) -> Response {
    match serde_json::to_vec(answer) {
        Ok(body) => (status, [(header::CONTENT_TYPE, "application/json")], Body::from(body)).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// `{}`: what an engine wants to hear when there is nothing to say.
#[derive(Serialize)]
pub(crate) struct Nothing {}
