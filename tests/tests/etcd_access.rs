//! Getting into an etcd: TLS with an authority alone, with client certificates, users with a role for our prefix only, and
//! several endpoints of which not all answer. A real etcd on loopback for each test.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flannel_core::run::store::etcd::EtcdSettings;
use flannel_core::run::store::{Claim, Created, Held, NetworkStore, Renewal, Store, StoreError};
use flannel_core::words::lease::{LeaseValue, Subnets};
use flannel_core::words::name::NetworkName;
use flannel_core::words::secret::Secret;
use flannel_tests::needs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

const CONFIG: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const TTL: Duration = Duration::from_secs(60);

/// How long etcd may take to be ready, on a busy machine.
const START: Duration = Duration::from_secs(30);

/// What a user may wait for an answer, whatever the endpoints do.
const FAST: Duration = Duration::from_secs(3);

/// An etcd of this test; it ends with the test, and by itself after two minutes if the test is killed.
struct Etcd {
    url: String,
    process: Child,
    data: TempDir,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // `timeout` passes it on to etcd.
        let _ = i32::try_from(self.process.id()).map(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM));
        let _ = self.process.wait();
    }
}

impl Etcd {
    async fn start(scheme: &str, more: &[&str]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let (url, peer) = (format!("{scheme}://{}", free_address()), format!("http://{}", free_address()));
        let log = fs::File::create(data.path().join("log")).unwrap();
        let process = Command::new("timeout")
            .args(["120", "etcd", "--name", "t", "--data-dir"])
            .arg(data.path().join("data"))
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("t={peer}"), "--logger", "zap", "--unsafe-no-fsync"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let etcd = Self { url, process, data };
        let address = etcd.url.rsplit('/').next().unwrap().to_owned();
        let start = Instant::now();
        while TcpStream::connect(&address).is_err() {
            assert!(start.elapsed() < START, "etcd did not start: {}", etcd.log());
            sleep(Duration::from_millis(20)).await;
        }
        etcd
    }

    fn log(&self) -> String {
        fs::read_to_string(self.data.path().join("log")).unwrap_or_default()
    }

    fn ctl(&self, args: &[&str]) -> String {
        let output = Command::new("etcdctl")
            .args(["--endpoints", &self.url, "--dial-timeout", "5s"])
            .args(args)
            .env("ETCDCTL_API", "3")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    fn settings(&self) -> EtcdSettings {
        EtcdSettings { endpoints: vec![self.url.clone()], ..EtcdSettings::default() }
    }
}

/// An address on loopback that nobody listens on.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// An authority and what it signed: `ca.pem`, `server.pem`, `server.key`, `client.pem`, `client.key`.
fn certificates(dir: &Path) {
    let openssl = |args: &str| {
        let output = Command::new("openssl").args(args.split(' ')).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    };
    fs::write(dir.join("ext"), "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
        .unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!("req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=authority"));
    for name in ["server", "client"] {
        openssl(&format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2 -extfile ext"
        ));
    }
}

fn text(path: PathBuf) -> String {
    path.to_str().unwrap().to_owned()
}

fn has(programs: &[&str]) -> bool {
    programs.iter().all(|program| needs::require(program))
}

fn network(settings: &EtcdSettings) -> NetworkStore {
    Store::etcd(settings).unwrap().network(&NetworkName::default_network())
}

fn key() -> Subnets {
    Subnets::parse_key("10.100.5.0-24").unwrap()
}

fn value() -> LeaseValue {
    LeaseValue::from_json(r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#).unwrap()
}

async fn claimed(store: &NetworkStore) -> Held {
    match store.claim(&key(), &value(), TTL).await.unwrap() {
        Claim::Made(held) => held,
        Claim::Taken => panic!("taken"),
    }
}

/// An answer, good or bad, in the time that a user waits.
async fn quick<T>(answer: impl Future<Output = T>) -> T {
    timeout(FAST, answer).await.expect("no answer in time")
}

/// Tries until the server, which already listens, also serves.
async fn made(store: &NetworkStore) -> Created {
    let start = Instant::now();
    loop {
        match store.create_config(CONFIG).await {
            Ok(created) => return created,
            Err(error) => assert!(start.elapsed() < START, "{error}"),
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Everything that a node does with its store.
async fn whole_life(settings: &EtcdSettings) {
    let store = network(settings);
    assert_eq!(made(&store).await, Created::Made);
    assert_eq!(store.create_config("{}").await.unwrap(), Created::Exists(CONFIG.into()));
    let networks = Store::etcd(settings).unwrap().networks().await.unwrap();
    assert_eq!(networks, [(NetworkName::default_network(), CONFIG.to_owned())]);
    let mut watch = store.watch();
    let held = claimed(&store).await;
    let Renewal::Done(_) = store.renew(&held, &value(), TTL).await.unwrap() else { panic!("not renewed") };
    let Renewal::Done(_) = store.adopt(&key(), &value(), TTL).await.unwrap() else { panic!("not adopted") };
    let seen = watch.wait_for(|snapshot| snapshot.leases.leases.contains_key(&key()));
    assert_eq!(timeout(START, seen).await.unwrap().unwrap().config.as_deref(), Some(CONFIG));
    assert!(matches!(store.remove().await.unwrap_err(), StoreError::InUse { leases: 1, .. }));
    store.release(&key(), &value()).await.unwrap();
    let gone = watch.wait_for(|snapshot| snapshot.known && snapshot.leases.leases.is_empty());
    timeout(START, gone).await.unwrap().unwrap();
    store.remove().await.unwrap();
    assert_eq!(store.config().await.unwrap(), None);
}

#[tokio::test]
async fn an_authority_alone_is_enough_for_tls_and_the_wrong_one_is_refused() {
    if !has(&["etcd", "openssl", "timeout"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let file = |name: &str| text(dir.path().join(name));
    let etcd =
        Etcd::start("https", &["--cert-file", &file("server.pem"), "--key-file", &file("server.key")]).await;
    let settings = EtcdSettings { cafile: Some(dir.path().join("ca.pem")), ..etcd.settings() };
    whole_life(&settings).await;

    let other = tempfile::tempdir().unwrap();
    certificates(other.path());
    let wrong = EtcdSettings { cafile: Some(other.path().join("ca.pem")), ..etcd.settings() };
    let error = quick(network(&wrong).config()).await.unwrap_err().to_string();
    assert!(error.contains(&etcd.url) && error.contains("certificate"), "{error}");
}

#[tokio::test]
async fn a_client_certificate_opens_an_etcd_that_asks_for_one() {
    if !has(&["etcd", "openssl", "timeout"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let file = |name: &str| text(dir.path().join(name));
    let flags = ["--cert-file", &file("server.pem"), "--key-file", &file("server.key"), "--client-cert-auth"];
    let ca = file("ca.pem");
    let etcd = Etcd::start("https", &[&flags[..], &["--trusted-ca-file", &ca]].concat()).await;
    let without = EtcdSettings { cafile: Some(ca.into()), ..etcd.settings() };
    let with = EtcdSettings {
        certfile: Some(file("client.pem").into()),
        keyfile: Some(file("client.key").into()),
        ..without.clone()
    };
    whole_life(&with).await;
    let error = quick(network(&without).config()).await.unwrap_err().to_string();
    assert!(error.contains(&etcd.url) && error.contains("--etcd-certfile"), "{error}");
}

#[tokio::test]
async fn a_role_for_our_prefix_is_all_that_a_node_needs() {
    if !has(&["etcd", "etcdctl", "timeout"]) {
        return;
    }
    let etcd = Etcd::start("http", &[]).await;
    let prefix = "/coreos.com/network/";
    for args in [
        &["user", "add", "root:rootpw"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "flannel"],
        &["role", "grant-permission", "flannel", "readwrite", prefix, "--prefix"],
        &["user", "add", "flannel:hunter2"],
        &["user", "grant-role", "flannel", "flannel"],
        &["auth", "enable"],
    ] {
        etcd.ctl(args);
    }
    let user = |password: &str| Some(("flannel".to_owned(), Secret::new(password.to_owned())));
    let settings = EtcdSettings { user: user("hunter2"), ..etcd.settings() };
    whole_life(&settings).await;

    let wrong = EtcdSettings { user: user("hunter3"), ..etcd.settings() };
    let error = quick(network(&wrong).config()).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("invalid user ID or password"), "{error}");
    assert!(!format!("{error} {error:?}").contains("hunter3"));

    let nobody = quick(network(&etcd.settings()).config()).await.unwrap_err();
    assert!(nobody.to_string().contains("user name is empty"), "{nobody}");

    let elsewhere = EtcdSettings { prefix: "/elsewhere".into(), ..settings };
    let error = quick(network(&elsewhere).config()).await.unwrap_err();
    assert!(error.to_string().contains("permission denied"), "{error}");
    let mut watch = network(&elsewhere).watch();
    let said = watch.wait_for(|snapshot| snapshot.down.is_some());
    let said = timeout(START, said).await.unwrap().unwrap().down.clone().unwrap();
    assert!(said.text.contains("permission denied"), "{said}");
}

/// A server that takes every connection and closes it at once; it ends with the test's process.
fn hangs_up() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    format!("http://{address}")
}

#[tokio::test]
async fn one_endpoint_of_several_is_enough() {
    if !has(&["etcd", "timeout"]) {
        return;
    }
    let etcd = Etcd::start("http", &[]).await;
    made(&network(&etcd.settings())).await;
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = format!("http://{}", mute.local_addr().unwrap());
    let dead = format!("http://{}", free_address());
    for first in [dead, hangs_up(), mute] {
        let endpoints = vec![first, etcd.url.clone()];
        let store = network(&EtcdSettings { endpoints, ..etcd.settings() });
        assert_eq!(quick(store.config()).await.unwrap().as_deref(), Some(CONFIG));
        // The one that answered is asked first from now on.
        let start = Instant::now();
        store.config().await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        let mut watch = store.watch();
        let known = watch.wait_for(|snapshot| snapshot.known);
        assert_eq!(timeout(FAST, known).await.unwrap().unwrap().config.as_deref(), Some(CONFIG));
    }
}
