//! A store to test, and the operator who looks into it and writes to it behind its back.

use std::fmt::Debug;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flannel_core::run::store::{Claim, EtcdSettings, Held, NetworkStore, Renewal, Snapshot, Store};
use flannel_core::words::lease::{LeaseValue, Subnets};
use flannel_core::words::name::NetworkName;
use flannel_tests::needs::require;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::timeout;

pub(crate) const PREFIX: &str = "/coreos.com/network";
pub(crate) const HOUR: Duration = Duration::from_secs(3600);
/// For what takes milliseconds when nobody else uses the machine.
pub(crate) const SOON: Duration = Duration::from_secs(8);

/// A real etcd on loopback, with its data in a directory that goes with it.
pub(crate) struct Etcd {
    child: Child,
    dir: TempDir,
    port: u16,
    peer: u16,
}

impl Etcd {
    /// None, and the skip is reported by name, where the machine has none.
    pub(crate) fn start() -> Option<Self> {
        if !["etcd", "etcdctl", "setpriv"].iter().all(|program| require(program)) {
            return None;
        }
        // Somebody else may take a port between our look and etcd's: then it ends, and others are tried.
        for _ in 0..5 {
            let (dir, port, peer) = (tempfile::tempdir().unwrap(), free_port(), free_port());
            let mut etcd = Self { child: spawn(dir.path(), port, peer), dir, port, peer };
            if etcd.came_up() {
                return Some(etcd);
            }
        }
        panic!("etcd does not start");
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn settings(&self) -> EtcdSettings {
        EtcdSettings { endpoints: vec![self.url()], ..EtcdSettings::default() }
    }

    /// A crash.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.dir.path(), self.port, self.peer);
        assert!(self.came_up(), "{}", self.log());
    }

    /// With nothing in it, as if its disk had been replaced.
    pub(crate) fn restart_empty(&mut self) {
        self.kill();
        fs::remove_dir_all(self.path("data")).unwrap();
        self.restart();
    }

    fn came_up(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return false;
            }
            if self.healthy() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("etcd says nothing\n{}", self.log())
    }

    fn healthy(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return false };
        let mut answer = String::new();
        stream.set_read_timeout(Some(Duration::from_secs(1))).is_ok()
            && stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").is_ok()
            && stream.read_to_string(&mut answer).is_ok()
            && answer.contains(r#""health":"true""#)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn ctl(&self, args: &[&str]) -> String {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(self.url()).args(args);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "etcdctl {args:?}: {output:?}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// One key as etcd tells it: value, lease, revisions.
    pub(crate) fn entry(&self, key: &str) -> Option<Value> {
        let answer: Value = serde_json::from_str(&self.ctl(&["get", key, "-w", "json"])).unwrap();
        answer["kvs"].get(0).cloned()
    }

    /// How many leases (grants) there are.
    pub(crate) fn grants(&self) -> usize {
        let answer: Value = serde_json::from_str(&self.ctl(&["lease", "list", "-w", "json"])).unwrap();
        answer["leases"].as_array().map_or(0, Vec::len)
    }

    pub(crate) fn compact(&self) {
        let entry: Value = serde_json::from_str(&self.ctl(&["get", "x", "-w", "json"])).unwrap();
        self.ctl(&["compact", &entry["header"]["revision"].to_string()]);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Not one of those that the kernel gives to connections: somebody could have it by the time etcd is started again.
fn free_port() -> u16 {
    loop {
        let random = RandomState::new().build_hasher().finish();
        let port = 20_000 + u16::try_from(random % 10_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Short elections, for a quick start. When the test is killed, the kernel kills it.
fn spawn(dir: &Path, port: u16, peer: u16) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).unwrap();
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer}"));
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "etcd", "--name", "test", "--data-dir"])
        .arg(dir.join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("test={peer}"), "--logger", "zap"])
        // A crash is the process's here, not the machine's.
        .args(["--heartbeat-interval", "10", "--election-timeout", "100", "--unsafe-no-fsync"])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// A store of either kind.
pub(crate) enum Fixture {
    Etcd(Etcd),
    Directory(TempDir),
}

impl Fixture {
    pub(crate) fn etcd() -> Option<Self> {
        Etcd::start().map(Self::Etcd)
    }

    pub(crate) fn directory() -> Self {
        Self::Directory(tempfile::tempdir().unwrap())
    }

    /// A store value of its own, as another process would have it.
    pub(crate) fn store(&self) -> Store {
        match self {
            Self::Etcd(etcd) => Store::etcd(&etcd.settings()).unwrap(),
            Self::Directory(dir) => Store::embedded(dir.path().join("store")).unwrap(),
        }
    }

    pub(crate) fn network(&self) -> NetworkStore {
        self.store().network(&NetworkName::default_network())
    }

    fn file(&self, key: &str) -> PathBuf {
        let Self::Directory(dir) = self else { unreachable!("only a directory has files") };
        // The default network has a name there.
        let key = if key.starts_with("subnets/") || key == "config" {
            format!("default/{key}")
        } else {
            key.into()
        };
        dir.path().join("store").join(key)
    }

    /// Writes a key as an operator does: without an end. `key` is relative to the prefix.
    pub(crate) fn put(&self, key: &str, value: &str) {
        match self {
            Self::Etcd(etcd) => {
                etcd.ctl(&["put", &format!("{PREFIX}/{key}"), "--", value]);
            }
            Self::Directory(_) => {
                let path = self.file(key);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, value).unwrap();
            }
        }
    }

    /// Removes a key as an operator does.
    pub(crate) fn delete(&self, key: &str) {
        match self {
            Self::Etcd(etcd) => assert_eq!(etcd.ctl(&["del", &format!("{PREFIX}/{key}")]).trim(), "1"),
            Self::Directory(_) => fs::remove_file(self.file(key)).unwrap(),
        }
    }

    /// The bytes of a key.
    pub(crate) fn get(&self, key: &str) -> Option<String> {
        match self {
            Self::Etcd(etcd) => {
                let text = etcd.ctl(&["get", &format!("{PREFIX}/{key}"), "--print-value-only"]);
                // etcdctl adds a line end.
                (!text.is_empty()).then(|| text.strip_suffix('\n').unwrap().to_owned())
            }
            Self::Directory(_) => fs::read_to_string(self.file(key)).ok(),
        }
    }

    /// Whether a key never ends.
    pub(crate) fn is_reservation(&self, key: &str) -> bool {
        match self {
            Self::Etcd(etcd) => etcd.entry(&format!("{PREFIX}/{key}")).unwrap().get("lease").is_none(),
            Self::Directory(_) => {
                self.get(key).is_some() && !self.file(&key.replace("subnets/", "default/expires/")).exists()
            }
        }
    }

    /// How often a key was written since it was created. Only etcd counts; a directory counts all its writes.
    pub(crate) fn writes(&self, key: &str) -> i64 {
        match self {
            Self::Etcd(etcd) => etcd.entry(&format!("{PREFIX}/{key}")).unwrap()["version"].as_i64().unwrap(),
            Self::Directory(_) => {
                fs::read_to_string(self.file("default/revision")).unwrap().trim().parse().unwrap()
            }
        }
    }
}

pub(crate) fn subnets(key: &str) -> Subnets {
    Subnets::parse_key(key).unwrap()
}

pub(crate) fn value(ip: &str) -> LeaseValue {
    LeaseValue::from_json(&text(ip)).unwrap()
}

/// A lease value as it stands in the store.
pub(crate) fn text(ip: &str) -> String {
    format!(
        r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"76:e6:39:1b:26:de"}}}}"#
    )
}

pub(crate) async fn claim(store: &NetworkStore, key: &str, ip: &str, ttl: Duration) -> Held {
    match store.claim(&subnets(key), &value(ip), ttl).await.unwrap() {
        Claim::Made(held) => held,
        Claim::Taken => panic!("{key} is taken"),
    }
}

pub(crate) fn done(renewal: Renewal) -> Held {
    match renewal {
        Renewal::Done(held) => held,
        Renewal::Lost(holder) => panic!("lost to {holder:?}"),
        Renewal::Answered(holder) => panic!("{holder:?} lives"),
    }
}

/// Waits until the newest value is as wanted, and returns it.
pub(crate) async fn until<T: Clone + Debug>(
    receiver: &mut watch::Receiver<T>,
    what: &str,
    wanted: impl FnMut(&T) -> bool,
) -> T {
    let seen = timeout(SOON, receiver.wait_for(wanted)).await.map(|seen| seen.unwrap().clone());
    match seen {
        Ok(seen) => seen,
        Err(_) => panic!("waited {SOON:?} for: {what}\nlast seen: {:#?}", *receiver.borrow()),
    }
}

/// The keys of the leases in a snapshot.
pub(crate) fn keys(snapshot: &Snapshot) -> Vec<String> {
    snapshot.leases.leases.keys().map(Subnets::key).collect()
}
