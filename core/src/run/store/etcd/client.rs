//! The connection: one endpoint at a time, a deadline on every call, errors that name endpoint and cause.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, KvClient, TlsOptions};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};

use super::EtcdSettings;
use crate::run::health::Counters;
use crate::run::store::{CALL_DEADLINE, StoreError};

/// HTTP/2 ping: how often while a call or a watch is open, and how long until the path counts as dead. etcd closes
/// connections that ping more often than every 5 s.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// How long a TCP (and TLS) connection may take to come up.
const CONNECT: Duration = Duration::from_millis(1500);

/// The least an endpoint gets, however many there are.
const PATIENCE_MIN: Duration = Duration::from_millis(350);

/// Largest answer that is read. gRPC's default of 4 MiB ends at some 15,000 leases.
const ANSWER_MAX: usize = 256 << 20;

/// How rustls says that the server refused us, and how hyper says that it hung up.
const REJECTED: [&str; 2] = ["received fatal alert", "connection closed"];

/// gRPC codes (google.rpc.Code) that say "ask another one": unknown (broken transport), deadline exceeded, unavailable.
const ELSEWHERE: [i32; 3] = [2, 4, 14];

/// The endpoints of one cluster.
pub(super) struct Cluster {
    endpoints: Vec<Endpoint>,
    /// The one that answered last.
    current: AtomicUsize,
    /// Where calls are counted, if anywhere.
    counters: OnceLock<Counters>,
    /// Told when connections are given up: whoever waits on one begins anew.
    anew: watch::Sender<()>,
}

struct Endpoint {
    url: String,
    /// Whether we show no certificate on a connection that is TLS.
    anonymous: bool,
    options: ConnectOptions,
    client: Mutex<Option<Client>>,
}

impl std::fmt::Debug for Cluster {
    /// Only the addresses: the options hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.endpoints.iter().map(|endpoint| &endpoint.url)).finish()
    }
}

impl Cluster {
    pub(super) fn new(settings: &EtcdSettings) -> Result<Self, StoreError> {
        let tls = tls(settings)?;
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(PING.0, PING.1)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true);
        if let Some((user, password)) = &settings.user {
            options = options.with_user(user, password.reveal()).with_auto_token_refresh(true);
        }
        let endpoints: Vec<_> = settings
            .endpoints
            .iter()
            .map(|url| {
                let url = match url.contains("://") {
                    true => url.clone(),
                    false => format!("http://{url}"),
                };
                if url.contains('@') {
                    return Err(StoreError::Settings {
                        what: "etcd endpoints".into(),
                        cause: "one holds a user name; give it as --etcd-username and FLANNELD_ETCD_PASSWORD"
                            .into(),
                    });
                }
                let secure = url.starts_with("https://");
                if !secure && !url.starts_with("http://") {
                    let what = format!("etcd endpoint {url:?}");
                    return Err(StoreError::Settings {
                        what,
                        cause: "it must begin with http:// or https://".into(),
                    });
                }
                // As upstream: certificates given for a plain endpoint are not used.
                let options = match &tls {
                    Some(tls) if secure => options.clone().with_tls(tls.clone()),
                    _ => options.clone(),
                };
                let anonymous = secure && settings.certfile.is_none();
                Ok(Endpoint { url, anonymous, options, client: Mutex::new(None) })
            })
            .collect::<Result<_, _>>()?;
        match endpoints.is_empty() {
            true => Err(StoreError::Settings {
                what: "etcd endpoints".into(),
                cause: "none is given, for example http://127.0.0.1:2379".into(),
            }),
            false => Ok(Self {
                endpoints,
                current: AtomicUsize::new(0),
                counters: OnceLock::new(),
                anew: watch::Sender::new(()),
            }),
        }
    }

    /// Where calls are counted from now on; the first to say so counts.
    pub(super) fn counted_by(&self, counters: Counters) {
        let _ = self.counters.set(counters);
    }

    /// Gives up every connection.
    pub(super) async fn connect_anew(&self) {
        for endpoint in &self.endpoints {
            endpoint.forget().await;
        }
        self.anew.send_replace(());
    }

    /// Changes when connections were given up.
    pub(super) fn anew(&self) -> watch::Receiver<()> {
        self.anew.subscribe()
    }

    /// One call, on the endpoint that answered last or on the first of the others that does.
    pub(super) async fn call<T, F>(
        &self,
        tried: &'static str,
        call: impl Fn(Client) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let start = Instant::now();
        let answer = self.call_any(tried, call).await;
        if let Some(counters) = self.counters.get() {
            let outcome = match &answer {
                Ok(_) => "answered",
                Err(StoreError::Unreachable { .. }) => "unreachable",
                Err(_) => "refused",
            };
            counters.store_call(outcome, start.elapsed());
        }
        answer
    }

    async fn call_any<T, F>(&self, tried: &'static str, call: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let count = self.endpoints.len();
        let first = self.current.load(Ordering::Relaxed);
        let deadline = Instant::now() + CALL_DEADLINE;
        let mut causes = Vec::new();
        for step in 0..count {
            let at = (first + step) % count;
            // What those before it did not need is shared among those that are left.
            let left = u32::try_from(count - step).unwrap_or(u32::MAX);
            let patience = (deadline.saturating_duration_since(Instant::now()) / left).max(PATIENCE_MIN);
            let endpoint = &self.endpoints[at];
            let attempt = timeout(patience, async { call(endpoint.client().await?).await }).await;
            let cause = match attempt {
                Ok(Ok(answer)) => {
                    self.current.store(at, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(error)) if elsewhere(&error) => cause(&error),
                Ok(Err(error)) => {
                    let endpoint = endpoint.url.clone();
                    return Err(StoreError::Refused { tried, endpoint, cause: cause(&error) });
                }
                Err(_) => {
                    endpoint.forget().await;
                    format!("no answer within {:.1} s", patience.as_secs_f64())
                }
            };
            causes.push(endpoint.told(&cause));
        }
        Err(StoreError::Unreachable { tried, causes: causes.join(", ") })
    }
}

impl Endpoint {
    /// Lazy: without a user nothing is sent before the first call.
    async fn client(&self) -> Result<Client, Error> {
        let mut client = self.client.lock().await;
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let made = Client::connect([&self.url], Some(self.options.clone())).await?;
        Ok(client.insert(made).clone())
    }

    /// The next call gets a new connection: this one may come from an address that this host has no more, and nobody would
    /// notice for as long as TCP repeats itself.
    async fn forget(&self) {
        *self.client.lock().await = None;
    }

    /// The cause with its endpoint. A server that wants a certificate and gets none says so after the handshake of TLS 1.3,
    /// in an alert that may be lost with the connection.
    fn told(&self, cause: &str) -> String {
        let hint = match self.anonymous && REJECTED.iter().any(|rejected| cause.contains(rejected)) {
            true => " (if it asks for client certificates, give --etcd-certfile and --etcd-keyfile)",
            false => "",
        };
        format!("{}: {cause}{hint}", self.url)
    }
}

/// Its key-value half, for answers of any size.
pub(super) fn kv(client: &Client) -> KvClient {
    client.kv_client().max_decoding_message_size(ANSWER_MAX)
}

/// Its watching half, for answers of any size.
pub(super) fn watches(client: &Client) -> etcd_client::WatchClient {
    client.watch_client().max_decoding_message_size(ANSWER_MAX)
}

fn elsewhere(error: &Error) -> bool {
    match error {
        // A status with a cause was made on our side, out of a connection that broke, whatever its code says; a server's
        // has only a text.
        Error::GRpcStatus(status) => {
            status.source().is_some() || ELSEWHERE.contains(&i32::from(status.code()))
        }
        Error::TransportError(_) | Error::IoError(_) => true,
        _ => false,
    }
}

/// The innermost cause, in a few words.
pub(super) fn cause(error: &Error) -> String {
    let outer = match error {
        Error::GRpcStatus(status) => {
            let mut inner = status.source();
            while let Some(next) = inner.and_then(std::error::Error::source) {
                inner = Some(next);
            }
            return inner.map_or_else(|| status.message().to_owned(), ToString::to_string);
        }
        Error::TransportError(error) => error.source(),
        _ => None,
    };
    let mut inner = outer;
    while let Some(next) = inner.and_then(std::error::Error::source) {
        inner = Some(next);
    }
    inner.map_or_else(|| error.to_string(), ToString::to_string)
}

/// Certificates. An authority alone is enough; our own certificate needs its key.
fn tls(settings: &EtcdSettings) -> Result<Option<TlsOptions>, StoreError> {
    let EtcdSettings { cafile, certfile, keyfile, endpoints, .. } = settings;
    let mut tls = TlsOptions::new();
    let secure = endpoints.iter().any(|url| url.starts_with("https://"));
    if let Some(path) = cafile {
        tls = tls.ca_certificate(Certificate::from_pem(read("etcd-cafile", path)?));
    } else if secure {
        let roots = system_roots(std::env::var_os("SSL_CERT_FILE").map(PathBuf::from))?;
        tls = tls.ca_certificate(Certificate::from_pem(read("the system's authorities", &roots)?));
    }
    match (certfile, keyfile) {
        (Some(cert), Some(key)) => {
            tls = tls.identity(Identity::from_pem(read("etcd-certfile", cert)?, read("etcd-keyfile", key)?));
        }
        (None, None) => {}
        (Some(_), None) | (None, Some(_)) => {
            return Err(StoreError::Settings {
                what: "etcd-certfile and etcd-keyfile".into(),
                cause: "one is given without the other".into(),
            });
        }
    }
    Ok((cafile.is_some() || secure).then_some(tls))
}

/// Where distributions keep the authorities that they trust, in one file; as Go looks for them.
const SYSTEM_ROOTS: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The file with the system's authorities; `named` (SSL_CERT_FILE) outweighs the usual places.
fn system_roots(named: Option<PathBuf>) -> Result<PathBuf, StoreError> {
    let usual = || SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.exists());
    named.or_else(usual).ok_or_else(|| StoreError::Settings {
        what: "etcd endpoints".into(),
        cause: "https without --etcd-cafile needs the system's authorities, and there are none (on Debian: package \
                ca-certificates)"
            .into(),
    })
}

fn read(flag: &str, path: &Path) -> Result<Vec<u8>, StoreError> {
    std::fs::read(path).map_err(|source| StoreError::Settings {
        what: format!("{flag} {}", PathBuf::from(path).display()),
        cause: source.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::secret::Secret;

    fn refused(settings: EtcdSettings) -> String {
        Cluster::new(&settings).unwrap_err().to_string()
    }

    #[test]
    fn wrong_settings_are_named() {
        let with =
            |endpoint: &str| EtcdSettings { endpoints: vec![endpoint.into()], ..EtcdSettings::default() };
        assert!(refused(with("unix:///x")).contains("http://"));
        let userinfo = refused(with("https://root:hunter2@a:1"));
        assert!(userinfo.contains("--etcd-username") && !userinfo.contains("hunter2"), "{userinfo}");
        assert_eq!(system_roots(Some("/x/ca.pem".into())).unwrap(), PathBuf::from("/x/ca.pem"));
        let missing = EtcdSettings { cafile: Some("/nowhere/ca.pem".into()), ..with("https://a:1") };
        assert!(refused(missing).starts_with("etcd-cafile /nowhere/ca.pem: "));
        assert!(
            refused(EtcdSettings { endpoints: vec![], ..EtcdSettings::default() }).contains("none is given")
        );
    }

    #[test]
    fn the_password_is_in_no_debug_text() {
        let settings = EtcdSettings {
            user: Some(("root".into(), Secret::new("hunter2".into()))),
            ..EtcdSettings::default()
        };
        let cluster = Cluster::new(&settings).unwrap();
        assert!(!format!("{settings:?} {cluster:?}").contains("hunter2"));
    }

    #[tokio::test]
    async fn a_server_that_is_down_is_named_with_its_cause_at_once() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", socket.local_addr().unwrap());
        drop(socket);
        let cluster =
            Cluster::new(&EtcdSettings { endpoints: vec![url.clone()], ..EtcdSettings::default() }).unwrap();
        let start = std::time::Instant::now();
        let answer = cluster.call("read x", |mut client| async move { client.get("x", None).await }).await;
        let error = answer.unwrap_err().to_string();
        assert!(error.starts_with(&format!("could not read x: etcd cannot be reached: {url}: ")), "{error}");
        assert!(error.contains("Connection refused"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(1));
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_is_not_used_again() {
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", socket.local_addr().unwrap());
        let cluster =
            Cluster::new(&EtcdSettings { endpoints: vec![url], ..EtcdSettings::default() }).unwrap();
        let mut kept = Vec::new();
        for connections in 1..=2 {
            let call = cluster.call("read x", |mut client| async move { client.get("x", None).await });
            let (answer, accepted) = tokio::join!(call, timeout(Duration::from_secs(2), socket.accept()));
            assert!(answer.is_err());
            kept.push(accepted.unwrap_or_else(|_| panic!("no connection {connections}")).unwrap());
        }
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_costs_no_more_than_the_deadline() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", socket.local_addr().unwrap());
        let cluster =
            Cluster::new(&EtcdSettings { endpoints: vec![url], ..EtcdSettings::default() }).unwrap();
        let start = std::time::Instant::now();
        let answer = cluster.call("read x", |mut client| async move { client.get("x", None).await }).await;
        assert!(answer.unwrap_err().to_string().contains("no answer within 2.8 s"));
        assert!(start.elapsed() < Duration::from_secs(3));
    }
}
