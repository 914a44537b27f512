//! The plugin's socket and the HTTP that engines speak on it.
//!
//! Engines send POST, no Content-Type, an empty `Host` (20.10) or a made-up one (later), and, when a connection broke after
//! a request was read, the same request again **with an empty body**: a method that needs a body refuses that, because
//! defaults would allocate something nobody asked for. An error is status 500 with both keys, since the network half of
//! an engine reads `Err` and the IPAM half `Error`.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::plugin::Plugin;
use crate::{ipam_driver, network_driver};

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

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Somebody answers on it.
    #[error("{socket} is served by another process: stop that one first, or give this one another --socket")]
    Served {
        /// The socket's path.
        socket: PathBuf,
    },
    /// Another plugin, with whatever socket, serves this host.
    #[error(
        "another flannel-docker-plugin already serves this host's networks (one per host, as a service or as a managed plugin): stop it first"
    )]
    Held,
    /// The system said no.
    #[error("could not {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The socket engines find us by; removed when dropped, unless somebody else has put his own there meanwhile.
pub(crate) struct Socket {
    path: PathBuf,
    inode: Option<u64>,
    listener: Option<UnixListener>,
    /// Held for as long as the process lives, so that a service and a managed plugin cannot both serve one host.
    _host_lock: UnixListener,
}

impl Socket {
    /// Takes the socket: a dead file in its place is replaced, a living owner is left alone.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        Self::bind_with(host_lock()?, path)
    }

    fn bind_with(host_lock: UnixListener, path: &Path) -> Result<Self, SocketError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| SocketError::Io { action, path, source }
        };
        if UnixStream::connect(path).is_ok() {
            return Err(SocketError::Served { socket: path.to_owned() });
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(failed("create the directory", dir))?;
        }
        // Bound under another name and moved: nobody sees a socket that does not listen yet. An engine treats every
        // `*.sock` in the directory as a plugin, so the name ends otherwise.
        let fresh = path.with_extension(format!("{}.tmp", std::process::id()));
        let _ = fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh).map_err(failed("bind", &fresh))?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).map_err(failed("restrict", &fresh))?;
        fs::rename(&fresh, path).map_err(failed("put the socket at", path))?;
        listener.set_nonblocking(true).map_err(failed("set up", path))?;
        Ok(Self {
            path: path.to_owned(),
            inode: inode(path),
            listener: Some(listener),
            _host_lock: host_lock,
        })
    }

    /// The listener, once.
    pub(crate) fn listener(&mut self) -> io::Result<tokio::net::UnixListener> {
        let listener =
            self.listener.take().ok_or_else(|| io::Error::other("the socket is already served"))?;
        tokio::net::UnixListener::from_std(listener)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.inode.is_some() && inode(&self.path) == self.inode {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    fs::symlink_metadata(path).ok().map(|found| found.ino())
}

/// An abstract socket of this network namespace: seen alike from the host and from inside a managed plugin, and gone with
/// the process however that ends.
pub(crate) fn host_lock() -> Result<UnixListener, SocketError> {
    lock("flannel-docker-plugin")
}

fn lock(name: &str) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError::Io { action: "take the lock", path: PathBuf::from(name), source };
    let address = SocketAddr::from_abstract_name(name).map_err(failed)?;
    UnixListener::bind_addr(&address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => SocketError::Held,
        _ => failed(error),
    })
}

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
        .route("/Plugin.Activate", post(activate))
        .merge(ipam_driver::routes())
        .merge(network_driver::routes())
        .fallback(unknown)
        .with_state(plugin)
}

async fn activate() -> Response {
    json_response(StatusCode::OK, &json!({"Implements": ["NetworkDriver", "IpamDriver"]}))
}

async fn unknown(uri: Uri) -> Response {
    let text = format!("{} is not a method of this plugin", uri.path());
    json_response(StatusCode::NOT_FOUND, &json!({"Err": text, "Error": text}))
}

/// A constant answer to a method whose body does not matter.
pub(crate) async fn constant(answer: serde_json::Value) -> Response {
    json_response(StatusCode::OK, &answer)
}

/// Runs one method: reads its body, calls it, and turns what it says into a response.
pub(crate) async fn call<Request, Answer, Called>(
    State(plugin): State<Arc<Plugin>>,
    uri: Uri,
    body: Bytes,
    method: impl FnOnce(Arc<Plugin>, Request) -> Called,
) -> Response
where
    Request: DeserializeOwned,
    Answer: Serialize,
    Called: Future<Output = Result<Answer, Refusal>>,
{
    let started = Instant::now();
    let name = uri.path().trim_start_matches('/');
    let request = match serde_json::from_slice::<Request>(&body) {
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
    let answer = method(plugin, request).await;
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

fn json_response(status: StatusCode, answer: &impl Serialize) -> Response {
    match serde_json::to_vec(answer) {
        Ok(body) => (status, [(header::CONTENT_TYPE, "application/json")], Body::from(body)).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// `{}`: what an engine wants to hear when there is nothing to say.
#[derive(Serialize)]
pub(crate) struct Nothing {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_file_is_replaced_and_removed_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugins/flannel.sock");
        fs::create_dir(dir.path().join("plugins")).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the dead file");
        // Not the real name: other test processes share this network namespace.
        let name = format!("flannel-docker-plugin-test-{}", std::process::id());
        let socket = Socket::bind_with(lock(&name).unwrap(), &path).unwrap();
        assert!(matches!(lock(&name), Err(SocketError::Held)));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }
}
