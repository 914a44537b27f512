//! Getting into an etcd: TLS with an authority alone, with the system's, with client certificates, and with files that are replaced;
//! users with a role for our prefix only, and their tokens; several endpoints of which not all answer. A real etcd on loopback for
//! each test.

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
use flannel_tests::{binaries, needs};
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
    peer: String,
    flags: Vec<String>,
    process: Child,
    data: TempDir,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.end();
    }
}

impl Etcd {
    async fn start(scheme: &str, more: &[&str]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let (url, peer) = (format!("{scheme}://{}", free_address()), format!("http://{}", free_address()));
        let flags: Vec<_> = more.iter().map(|&flag| flag.to_owned()).collect();
        let process = spawn(&data, &url, &peer, &flags);
        let etcd = Self { url, peer, flags, process, data };
        etcd.listens().await;
        etcd
    }

    async fn listens(&self) {
        let address = self.url.rsplit('/').next().unwrap();
        let start = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(start.elapsed() < START, "etcd did not start: {}", self.log());
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// With the files that its flags name as they are now.
    async fn restart(&mut self) {
        self.end();
        self.process = spawn(&self.data, &self.url, &self.peer, &self.flags);
        self.listens().await;
    }

    fn end(&mut self) {
        // `timeout` passes it on to etcd.
        let _ = i32::try_from(self.process.id()).map(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM));
        let _ = self.process.wait();
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

fn spawn(data: &TempDir, url: &str, peer: &str, flags: &[String]) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(data.path().join("log")).unwrap();
    Command::new("timeout")
        .args(["120", "etcd", "--name", "t", "--data-dir"])
        .arg(data.path().join("data"))
        .args(["--listen-client-urls", url, "--advertise-client-urls", url])
        .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
        .args(["--initial-cluster", &format!("t={peer}"), "--logger", "zap", "--unsafe-no-fsync"])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
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

/// An etcd with a certificate of the server only, and the directory with it and its authority.
async fn with_certificate() -> (tempfile::TempDir, Etcd) {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let file = |name: &str| text(dir.path().join(name));
    let flags = ["--cert-file", &file("server.pem"), "--key-file", &file("server.key")];
    let etcd = Etcd::start("https", &flags).await;
    (dir, etcd)
}

#[tokio::test]
async fn an_authority_alone_is_enough_for_tls_and_the_wrong_one_is_refused() {
    if !has(&["etcd", "openssl", "timeout"]) {
        return;
    }
    let (dir, etcd) = with_certificate().await;
    let settings = EtcdSettings { cafile: Some(dir.path().join("ca.pem")), ..etcd.settings() };
    whole_life(&settings).await;

    let other = tempfile::tempdir().unwrap();
    certificates(other.path());
    let wrong = EtcdSettings { cafile: Some(other.path().join("ca.pem")), ..etcd.settings() };
    let error = quick(network(&wrong).config()).await.unwrap_err().to_string();
    assert!(error.contains(&etcd.url) && error.contains("certificate"), "{error}");
    assert!(error.contains("--etcd-cafile"), "{error}");
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
    etcd.ctl(&["user", "add", "root:rootpw"]);
    etcd.ctl(&["user", "grant-role", "root", "root"]);
    add_user(&etcd);
    etcd.ctl(&["auth", "enable"]);
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

/// As an operator does it.
fn add_user(etcd: &Etcd) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/etcd/role.sh");
    let output = Command::new("sh")
        .arg(script)
        .env("ETCDCTL_API", "3")
        .env("ETCDCTL_ENDPOINTS", &etcd.url)
        .env("FLANNEL_PASSWORD", "hunter2")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn user(password: &str) -> Option<(String, Secret<String>)> {
    Some(("flannel".to_owned(), Secret::new(password.to_owned())))
}

#[tokio::test]
async fn a_user_may_be_given_before_etcd_asks_for_one_and_stay_afterwards() {
    if !has(&["etcd", "etcdctl", "timeout"]) {
        return;
    }
    let etcd = Etcd::start("http", &["--bcrypt-cost", "4"]).await;
    etcd.ctl(&["user", "add", "root:rootpw"]);
    etcd.ctl(&["user", "grant-role", "root", "root"]);
    add_user(&etcd);
    let settings = EtcdSettings { user: user("hunter2"), ..etcd.settings() };
    let store = network(&settings);
    assert_eq!(made(&store).await, Created::Made);
    let mut watch = store.watch();
    timeout(START, watch.wait_for(|snapshot| snapshot.known)).await.unwrap().unwrap();
    let held = claimed(&store).await;
    etcd.ctl(&["auth", "enable"]);
    // By the connection of before, and by a new one.
    let Renewal::Done(held) = store.renew(&held, &value(), TTL).await.unwrap() else { panic!("not renewed") };
    assert_eq!(network(&settings).config().await.unwrap().as_deref(), Some(CONFIG));
    etcd.ctl(&["--user", "root:rootpw", "auth", "disable"]);
    let Renewal::Done(_) = store.renew(&held, &value(), TTL).await.unwrap() else { panic!("not renewed") };
    store.connect_anew().await;
    store.release(&key(), &value()).await.unwrap();
    let gone = watch.wait_for(|snapshot| snapshot.known && snapshot.leases.leases.is_empty());
    timeout(START, gone).await.unwrap().unwrap();
}

#[tokio::test]
async fn tls_that_only_one_side_speaks_and_certificates_made_by_hand_are_explained() {
    if !has(&["etcd", "openssl", "timeout"]) {
        return;
    }
    let (dir, etcd) = with_certificate().await;
    let ca = Some(dir.path().join("ca.pem"));
    // Without a scheme the file says which.
    let bare = etcd.url.trim_start_matches("https://").to_owned();
    let settings = EtcdSettings { cafile: ca.clone(), endpoints: vec![bare.clone()], ..etcd.settings() };
    assert_eq!(made(&network(&settings)).await, Created::Made);
    let plain = EtcdSettings { endpoints: vec![bare], ..etcd.settings() };
    let error = quick(network(&plain).config()).await.unwrap_err().to_string();
    assert!(error.contains("begins with https://"), "{error}");

    // As many make one for a single server, and give it as its own authority.
    let flags = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=etcd"];
    for (name, constraint, advice) in
        [("ca", "CA:TRUE", Some("CA:FALSE")), ("own", "critical,CA:FALSE", None)]
    {
        let file = |what: &str| text(dir.path().join(format!("{name}-made.{what}")));
        let output = Command::new("openssl")
            .args(flags)
            .args([
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-addext",
                &format!("basicConstraints={constraint}"),
            ])
            .args(["-keyout", &file("key"), "-out", &file("pem")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let etcd = Etcd::start("https", &["--cert-file", &file("pem"), "--key-file", &file("key")]).await;
        let store = network(&EtcdSettings { cafile: Some(file("pem").into()), ..etcd.settings() });
        match advice {
            None => assert_eq!(made(&store).await, Created::Made),
            Some(advice) => {
                let error = quick(store.config()).await.unwrap_err().to_string();
                assert!(error.contains(advice), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn a_token_that_has_expired_is_got_anew() {
    if !has(&["etcd", "etcdctl", "timeout", "openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for args in ["genrsa -out jwt.key 2048", "rsa -in jwt.key -pubout -out jwt.pub"] {
        let output = Command::new("openssl").args(args.split(' ')).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let file = |name: &str| text(dir.path().join(name));
    // Signed tokens say of which state of users and roles they are; simple ones are forgotten by a server that restarts.
    let jwt =
        format!("jwt,pub-key={},priv-key={},sign-method=RS256,ttl=1s", file("jwt.pub"), file("jwt.key"));
    for token in [["--auth-token-ttl", "1"], ["--auth-token", &jwt]] {
        let flags = [&token[..], &["--bcrypt-cost", "4"]].concat();
        let mut etcd = Etcd::start("http", &flags).await;
        etcd.ctl(&["user", "add", "root:rootpw"]);
        etcd.ctl(&["user", "grant-role", "root", "root"]);
        add_user(&etcd);
        etcd.ctl(&["auth", "enable"]);
        let store = network(&EtcdSettings { user: user("hunter2"), ..etcd.settings() });
        assert_eq!(made(&store).await, Created::Made);
        let mut watch = store.watch();
        timeout(START, watch.wait_for(|snapshot| snapshot.known)).await.unwrap().unwrap();
        let held = claimed(&store).await;
        // Users change: what was signed before is of an old state.
        etcd.ctl(&["--user", "root:rootpw", "user", "add", "another:pw"]);
        let Renewal::Done(held) = store.renew(&held, &value(), TTL).await.unwrap() else {
            panic!("not renewed")
        };
        sleep(Duration::from_secs(2)).await;
        let Renewal::Done(held) = store.renew(&held, &value(), TTL).await.unwrap() else {
            panic!("not renewed")
        };
        // The watch is the one of before, and goes on.
        let start = Instant::now();
        while watch.borrow().revision < held.revision {
            assert!(start.elapsed() < START, "{:?}", *watch.borrow());
            sleep(Duration::from_millis(20)).await;
        }
        assert!(watch.borrow().down.is_none(), "{:?}", *watch.borrow());
        etcd.restart().await;
        made(&store).await;
        let Renewal::Done(_) = store.renew(&held, &value(), TTL).await.unwrap() else {
            panic!("not renewed")
        };
        store.release(&key(), &value()).await.unwrap();
        let gone = watch.wait_for(|snapshot| snapshot.down.is_none() && snapshot.leases.leases.is_empty());
        timeout(START, gone).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn certificates_that_are_replaced_are_used_without_a_restart() {
    if !has(&["etcd", "openssl", "timeout"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let file = |name: &str| text(dir.path().join(name));
    let ca = file("ca.pem");
    let server = (file("server.pem"), file("server.key"));
    let flags =
        ["--cert-file", &server.0, "--key-file", &server.1, "--client-cert-auth", "--trusted-ca-file", &ca];
    let mut etcd = Etcd::start("https", &flags).await;
    let settings = EtcdSettings {
        cafile: Some(ca.clone().into()),
        certfile: Some(file("client.pem").into()),
        keyfile: Some(file("client.key").into()),
        ..etcd.settings()
    };
    let store = network(&settings);
    assert_eq!(made(&store).await, Created::Made);
    let mut watch = store.watch();
    timeout(START, watch.wait_for(|snapshot| snapshot.known)).await.unwrap().unwrap();

    // Half of the new pair is no reason to stop: what was read before is used.
    let new = tempfile::tempdir().unwrap();
    certificates(new.path());
    let replace = |name: &str| {
        // In one step, as those do who rotate them.
        let fresh = dir.path().join("fresh");
        fs::copy(new.path().join(name), &fresh).unwrap();
        fs::rename(fresh, dir.path().join(name)).unwrap();
    };
    replace("client.pem");
    assert_eq!(quick(store.config()).await.unwrap().as_deref(), Some(CONFIG));
    // The whole of it, with another authority, on both sides.
    for name in ["client.key", "ca.pem", "server.pem", "server.key"] {
        replace(name);
    }
    etcd.restart().await;
    made(&store).await;
    claimed(&store).await;
    let seen = watch.wait_for(|snapshot| snapshot.leases.leases.contains_key(&key()));
    timeout(START, seen).await.unwrap().unwrap();

    // At a start there is nothing to go on from: it is said which files do not belong together.
    certificates(new.path());
    replace("client.key");
    let error = quick(network(&settings).config()).await.unwrap_err().to_string();
    for part in ["etcd-certfile", "client.pem", "etcd-keyfile", "client.key"] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

/// The binary, because the variable is a process's. It only lists.
#[tokio::test]
async fn without_an_authority_the_systems_are_asked() {
    let Ok(flanneld) = binaries::path("flanneld") else { panic!("flanneld is not built") };
    if !has(&["etcd", "openssl", "timeout"]) {
        return;
    }
    let (dir, etcd) = with_certificate().await;
    let ours = EtcdSettings { cafile: Some(dir.path().join("ca.pem")), ..etcd.settings() };
    made(&network(&ours)).await;
    claimed(&network(&ours)).await;
    let list = |authorities: Option<&str>| {
        let output = Command::new(&flanneld)
            .args(["--etcd-endpoints", &etcd.url, "--state-dir", dir.path().to_str().unwrap(), "leases"])
            .env_clear()
            .envs(authorities.map(|path| ("SSL_CERT_FILE", path)))
            .output()
            .unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let said = list(Some(&text(dir.path().join("ca.pem"))));
    assert!(said.contains("10.100.5.0/24"), "{said}");
    let said = list(None);
    for part in ["UnknownIssuer", "--etcd-cafile", "system"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    let said = list(Some("/nowhere/ca.pem"));
    assert!(said.contains("/nowhere/ca.pem"), "{said}");
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
