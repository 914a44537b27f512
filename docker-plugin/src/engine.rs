//! A client of HTTP on a unix socket: the engine's API, and this plugin's own `/status`.
//!
//! Never used while an engine waits for an answer of ours: it would wait for us while we wait for it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// More than an engine with thousands of containers says at once.
const ANSWER_MAX: usize = 32 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    /// Nobody listens, or not for us.
    #[error("{socket} cannot be reached: {cause}")]
    Absent {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// It is asked and says nothing that can be understood.
    #[error("no usable answer from {socket} to {path}: {cause}")]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What was asked for.
        path: String,
        /// Why.
        cause: String,
    },
    /// It said no.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// What it said.
        message: String,
    },
}

impl EngineError {
    /// Whether what was asked for does not exist, by the engine's own word.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: StatusCode::NOT_FOUND, .. })
    }
}

/// Who is asked.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    socket: PathBuf,
}

impl Engine {
    /// Whoever listens on that socket.
    pub(crate) fn at(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Asks for something.
    ///
    /// # Errors
    /// `Absent` if nobody listens, `Refused` for a status other than 2xx, `Broken` for everything else.
    pub(crate) async fn get<Answer: DeserializeOwned>(&self, path: &str) -> Result<Answer, EngineError> {
        self.ask(Method::GET, path, Bytes::new()).await
    }

    /// Tells it something.
    ///
    /// # Errors
    /// As [`Engine::get`].
    pub(crate) async fn post<Answer: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Answer, EngineError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(path, &error))?;
        self.ask(Method::POST, path, body.into()).await
    }

    async fn ask<Answer: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Answer, EngineError> {
        let asked = tokio::time::timeout(PATIENCE, self.exchange(method, path, body)).await;
        let (status, answer) = asked
            .unwrap_or_else(|_| Err(self.broken(path, &format!("none within {} s", PATIENCE.as_secs()))))?;
        if !status.is_success() {
            return Err(EngineError::Refused { status, message: message(&answer) });
        }
        serde_json::from_slice(&answer).map_err(|error| self.broken(path, &error))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), EngineError> {
        let absent = |cause| EngineError::Absent { socket: self.socket.clone(), cause };
        let stream = UnixStream::connect(&self.socket).await.map_err(absent)?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(path, &error))?;
        // It ends with the stream, when `sender` is dropped.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "docker")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(path, &error))?;
        let answer = sender.send_request(request).await.map_err(|error| self.broken(path, &error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
        Ok((status, body.map_err(|error| self.broken(path, &error))?.to_bytes()))
    }

    fn broken(&self, path: &str, cause: &(impl std::fmt::Display + ?Sized)) -> EngineError {
        EngineError::Broken { socket: self.socket.clone(), path: path.to_owned(), cause: cause.to_string() }
    }
}

/// An engine's error is `{"message": …}`; whatever else there is, is shown as it is.
fn message(answer: &[u8]) -> String {
    let parsed: Option<serde_json::Value> = serde_json::from_slice(answer).ok();
    let message = parsed.as_ref().and_then(|value| value.get("message")?.as_str());
    message.map_or_else(|| String::from_utf8_lossy(answer).trim().to_owned(), str::to_owned)
}
