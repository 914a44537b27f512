//! The connection: one endpoint at a time, a deadline on every call, errors that name endpoint and cause.

use std::error::Error as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error, KvClient};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};

use super::EtcdSettings;
use super::cause::{cause, refusal};
use super::endpoint;
use super::pulse::Pulse;
use super::tls::Tls;
use crate::run::health::Counters;
use crate::run::store::{CALL_DEADLINE, StoreError};
use crate::words::secret::Secret;

/// HTTP/2 ping: how often while a call or a watch is open, and how long until the path counts as dead. etcd closes
/// connections that ping more often than every 5 s.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// How long a TCP (and TLS) connection may take to come up.
const CONNECT: Duration = Duration::from_millis(1500);

/// The least an endpoint gets, however many there are.
const PATIENCE_MIN: Duration = Duration::from_millis(350);

/// Largest answer that is read. gRPC's default of 4 MiB ends at some 15,000 leases.
const ANSWER_MAX: usize = 256 << 20;

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
    options: ConnectOptions,
    user: Option<Arc<(String, Secret<String>)>>,
    /// Whether it was said that it asks for no user.
    open: AtomicBool,
    /// Whether it has ever given an answer.
    known: AtomicBool,
    /// For https.
    tls: Option<Arc<Tls>>,
    connection: Mutex<Option<Connection>>,
}

/// A client, and which of the certificates it has.
struct Connection {
    line: Line,
    generation: u64,
}

/// A connection, with what all who use it know of it.
#[derive(Clone)]
pub(super) struct Line {
    pub(super) client: Client,
    pub(super) pulse: Arc<Pulse>,
}

/// How etcd says that it asks nobody who he is.
const NO_USERS: &str = "authentication is not enabled";

/// Why a call on one endpoint failed.
enum Failure {
    Call(Error),
    /// What it takes to connect cannot be read.
    Settings(StoreError),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

impl std::fmt::Debug for Cluster {
    /// Only the addresses: the options hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.endpoints.iter().map(|endpoint| &endpoint.url)).finish()
    }
}

impl Cluster {
    pub(super) fn new(settings: &EtcdSettings) -> Result<Self, StoreError> {
        let urls = endpoint::urls(settings)?;
        let tls = Tls::new(settings, urls.iter().any(|url| endpoint::is_secure(url)))?.map(Arc::new);
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(PING.0, PING.1)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true);
        let user = settings.user.clone().map(Arc::new);
        let endpoints: Vec<_> = urls
            .into_iter()
            .map(|url| Endpoint {
                // As upstream: certificates given for a plain endpoint are not used.
                tls: tls.clone().filter(|_| endpoint::is_secure(&url)),
                url,
                options: options.clone(),
                user: user.clone(),
                open: AtomicBool::new(false),
                known: AtomicBool::new(false),
                connection: Mutex::new(None),
            })
            .collect();
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

    /// That the endpoint in use does not answer.
    pub(super) fn silent(&self, tried: &'static str, patience: Duration) -> StoreError {
        let endpoint = self.endpoints.get(self.current.load(Ordering::Relaxed));
        let cause = format!("no answer within {:.1} s", patience.as_secs_f64());
        StoreError::Unreachable { tried, causes: endpoint.map(|it| it.told(&cause)).unwrap_or(cause) }
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
        self.call_on(tried, |line| call(line.client)).await
    }

    /// The same for who stays on the connection.
    pub(super) async fn call_on<T, F>(
        &self,
        tried: &'static str,
        call: impl Fn(Line) -> F,
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

    async fn call_any<T, F>(&self, tried: &'static str, call: impl Fn(Line) -> F) -> Result<T, StoreError>
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
            let attempt = timeout(patience, endpoint.attempt(&call)).await;
            let cause = match attempt {
                Ok(Ok(answer)) => {
                    endpoint.known.store(true, Ordering::Relaxed);
                    self.current.store(at, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(Failure::Settings(error))) => return Err(error),
                Ok(Err(Failure::Call(error))) if elsewhere(&error) => cause(&error),
                Ok(Err(Failure::Call(error))) => {
                    let endpoint = endpoint.url.clone();
                    return Err(StoreError::Refused { tried, endpoint, cause: refusal(&error) });
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
    async fn attempt<T, F>(&self, call: &impl Fn(Line) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>>,
    {
        match call(self.line().await?).await {
            // Users or roles were changed since we got our token; the library asks for a new one only when it has expired. Or
            // whether one is needed has changed.
            Err(error) if self.wants_token(&error) => {
                self.forget().await;
                Ok(call(self.line().await?).await?)
            }
            answer => Ok(answer?),
        }
    }

    fn wants_token(&self, error: &Error) -> bool {
        // The last: it wants none any more, and the library has asked for a new one.
        const SAID: [&str; 3] = ["revision of auth store is old", "user name is empty", NO_USERS];
        let text = error.to_string();
        self.user.is_some() && SAID.iter().any(|said| text.contains(said))
    }

    /// With the user, if etcd asks for one: as with upstream he may be given before `etcdctl auth enable`, and stay after `disable`.
    async fn connect(&self, options: ConnectOptions) -> Result<Client, Error> {
        let Some(user) = &self.user else { return Client::connect([&self.url], Some(options)).await };
        let (name, password) = (&user.0, user.1.reveal());
        let known = options.clone().with_user(name, password).with_auto_token_refresh(true);
        match Client::connect([&self.url], Some(known)).await {
            Err(error) if error.to_string().contains(NO_USERS) => {
                if !self.open.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "etcd at {} asks for no user: --etcd-username is not used until it does",
                        self.url
                    );
                }
                Client::connect([&self.url], Some(options)).await
            }
            client => {
                self.open.store(false, Ordering::Relaxed);
                client
            }
        }
    }

    /// Lazy: without a user nothing is sent before the first call.
    async fn line(&self) -> Result<Line, Failure> {
        let mut options = self.options.clone();
        let mut generation = 0;
        if let Some(tls) = &self.tls {
            let (now, tls) = tls.current().await.map_err(Failure::Settings)?;
            (generation, options) = (now, options.with_tls(tls));
        }
        let mut connection = self.connection.lock().await;
        if let Some(Connection { line, .. }) =
            connection.as_ref().filter(|connection| connection.generation == generation)
        {
            return Ok(line.clone());
        }
        let client = self.connect(options).await?;
        let line = Line { client, pulse: Arc::new(Pulse::new()) };
        *connection = Some(Connection { line: line.clone(), generation });
        Ok(line)
    }

    /// The next call gets a new connection: this one may come from an address that this host has no more, and nobody would
    /// notice for as long as TCP repeats itself.
    async fn forget(&self) {
        *self.connection.lock().await = None;
    }

    /// The cause with its endpoint. A server that wants a certificate and gets none says so after the handshake of TLS 1.3,
    /// in an alert that may be lost with the connection.
    fn told(&self, cause: &str) -> String {
        let hint = match &self.tls {
            Some(tls) => tls.hint(cause),
            None if self.known.load(Ordering::Relaxed) => None,
            None => endpoint::hint(cause),
        };
        format!("{}: {cause}{}", self.url, hint.map(|hint| format!(" ({hint})")).unwrap_or_default())
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
