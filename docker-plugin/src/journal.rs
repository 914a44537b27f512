//! What engines told us and will not tell again, one JSON file per network, endpoint and pool.
//!
//! **Layout** — below `<state-dir>/docker`: `networks/<NetworkID>.json`, `endpoints/<EndpointID>.json`, and
//! `pools/<flannel network>.json`.
//! **Durability** — a record is in its file, synced, before the call that made it is answered, so a kill at any point
//! loses nothing that an engine believes. Files are replaced whole; a file that cannot be read is set aside, not trusted.
//! **Addresses** are not here: the ledger that CNI shares holds them, and outlives us as these files do.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use flannel_core::touch::whole_file;
use flannel_core::words::addr::{InterfaceAddress, Mac, Prefix};
use flannel_core::words::exposure::PublishedPort;
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::units::Mtu;

use crate::answer::Refusal;
use crate::half::Half;
use crate::options::NetworkOptions;
use crate::wire::CreateNetwork;

/// Shape of the records; a newer one is not guessed at.
const VERSION: u32 = 1;

/// Who hands out the addresses of a Docker network.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Ipam {
    /// Our IPAM driver.
    Flannel,
    /// The engine's own, with this node's subnet as `--subnet`.
    Engine,
    /// Nobody before CreateEndpoint, which answers with one (`--ipam-driver null`).
    Null,
}

/// A Docker network.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub(crate) struct NetworkRecord {
    pub(crate) version: u32,
    /// The flannel network behind it.
    pub(crate) network: NetworkName,
    /// All of the flannel network, for the route that containers get.
    pub(crate) cidr: Prefix,
    /// This node's subnet.
    pub(crate) pool: Prefix,
    /// Its first address, on the bridge.
    pub(crate) gateway: IpAddr,
    /// The same for IPv6, if the Docker network has that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) v6: Option<Half>,
    /// The node's bridge of the flannel network.
    pub(crate) bridge: LinkName,
    /// What fits through it.
    pub(crate) mtu: Mtu,
    /// Who hands out addresses.
    pub(crate) ipam: Ipam,
    /// What the request says with `-o` and `--internal`.
    #[serde(default)]
    pub(crate) options: NetworkOptions,
    /// As the engine sent it.
    pub(crate) request: CreateNetwork,
}

/// Where an endpoint is in its life.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Stage {
    /// Created, not joined: no veth.
    Created,
    /// Joined: its veth was made.
    Joined,
    /// The engine has deleted it; the veth may still be there.
    Deleted,
}

/// An endpoint.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct EndpointRecord {
    pub(crate) version: u32,
    /// The Docker network's id.
    pub(crate) docker_network: String,
    /// The flannel network, so that it can be cleaned up when the Docker network is gone.
    pub(crate) network: NetworkName,
    pub(crate) address: InterfaceAddress,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) address_v6: Option<InterfaceAddress>,
    pub(crate) mac: Mac,
    pub(crate) stage: Stage,
    /// Who handed the address out.
    pub(crate) ipam: Ipam,
    /// Ports of this host that lead to it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) ports: BTreeSet<PublishedPort>,
    /// The engine's name of its container's sandbox, once it has joined; endpoints of one container have the same.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) sandbox: String,
    /// When it was created, seconds since 1970.
    pub(crate) created: u64,
}

impl EndpointRecord {
    /// A record of now.
    pub(crate) fn new(
        docker_network: &str,
        record: &NetworkRecord,
        (address, address_v6): (InterfaceAddress, Option<InterfaceAddress>),
        mac: Mac,
    ) -> Self {
        Self {
            version: VERSION,
            docker_network: docker_network.to_owned(),
            network: record.network.clone(),
            address,
            address_v6,
            mac,
            stage: Stage::Created,
            ipam: record.ipam,
            ports: BTreeSet::new(),
            sandbox: String::new(),
            created: now(),
        }
    }

    /// Its address of each family.
    pub(crate) fn addresses(&self) -> Vec<InterfaceAddress> {
        [self.address].into_iter().chain(self.address_v6).collect()
    }

    /// The subnets that they are of.
    pub(crate) fn subnets(&self) -> Vec<Prefix> {
        self.addresses().iter().map(InterfaceAddress::prefix).collect()
    }

    /// Seconds since it was created.
    pub(crate) fn age(&self) -> u64 {
        now().saturating_sub(self.created)
    }
}

impl NetworkRecord {
    /// The shape of records written now.
    pub(crate) const VERSION: u32 = VERSION;

    /// This node's subnet of each family.
    pub(crate) fn subnets(&self) -> Vec<Prefix> {
        [self.pool].into_iter().chain(self.v6.map(|half| half.subnet)).collect()
    }

    /// What must not be handed out (`--aux-address`).
    pub(crate) fn auxiliary_addresses(&self) -> Result<BTreeSet<IpAddr>, Refusal> {
        let pools = self.request.ipv4_data.iter().chain(&self.request.ipv6_data);
        let given = pools.flat_map(|pool| &pool.aux_addresses);
        given
            .map(|(name, cidr)| {
                let address = cidr.parse::<InterfaceAddress>().map(|address| address.address());
                address.map_err(|error| Refusal(format!("--aux-address {name}={cidr}: {error}")))
            })
            .collect()
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A flannel network whose pool an engine asked for. It says which network a pool belongs to when CreateNetwork comes after
/// a restart, and keeps the network running between the two calls.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct PoolRecord {
    pub(crate) version: u32,
    pub(crate) network: NetworkName,
    /// What was answered; none while the lease was still awaited.
    pub(crate) subnet: Option<Prefix>,
    /// The config document, if it was made for that request.
    pub(crate) defined: Option<String>,
    /// When it was asked for last, seconds since 1970.
    pub(crate) requested: u64,
    /// How many requests no CreateNetwork has followed yet, and no ReleasePool.
    #[serde(default = "one")]
    pub(crate) outstanding: u32,
    /// Addresses that were ever asked for by name (`--ip`): a container that is stopped, or that its engine has not started yet
    /// again, wants its own back.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) chosen: BTreeSet<IpAddr>,
}

fn one() -> u32 {
    1
}

impl PoolRecord {
    /// An engine follows RequestPool by CreateNetwork within milliseconds; after this it has died in between.
    const FRESH_MAX: u64 = 120;

    /// Of a network that nobody has asked for yet.
    pub(crate) fn new(network: &NetworkName) -> Self {
        let network = network.clone();
        Self {
            version: VERSION,
            network,
            subnet: None,
            defined: None,
            requested: 0,
            outstanding: 0,
            chosen: BTreeSet::new(),
        }
    }

    /// An engine asks for it, now.
    pub(crate) fn ask(&mut self) {
        let earlier = if self.is_fresh() { self.outstanding } else { 0 };
        (self.requested, self.outstanding) = (now(), earlier.saturating_add(1));
    }

    /// Somebody asks for exactly this address.
    pub(crate) fn choose(&mut self, address: IpAddr) {
        /// Containers with a fixed address on one host are some.
        const CHOSEN_MAX: usize = 4096;
        if self.chosen.len() < CHOSEN_MAX {
            self.chosen.insert(address);
        }
    }

    /// A network was made of what was asked for, or the engine gave it back.
    pub(crate) fn follow(&mut self) {
        self.outstanding = self.outstanding.saturating_sub(1);
    }

    /// Whether CreateNetwork may still come.
    pub(crate) fn is_fresh(&self) -> bool {
        self.outstanding > 0 && now().saturating_sub(self.requested) < Self::FRESH_MAX
    }
}

/// Why something could not be recorded. An id that is not shaped like one never becomes a path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// Not an engine's id.
    #[error("{0:?} is no id of an engine: 1 to 128 letters, digits, \"-\", \"_\" or \".\" were wanted")]
    Id(String),
    /// The disk.
    #[error("could not {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A record that does not become JSON.
    #[error("could not write the record of {id}")]
    Json {
        /// Whose.
        id: String,
        /// Why.
        source: serde_json::Error,
    },
}

/// Everything recorded, in memory and on disk.
pub(crate) struct Journal {
    networks: Shelf<NetworkRecord>,
    pools: Shelf<PoolRecord>,
    endpoints: Shelf<EndpointRecord>,
}

impl Journal {
    /// Opens the journal of a state directory and reads it.
    pub(crate) fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let dir = state_dir.join("docker");
        Ok(Self {
            networks: Shelf::open(dir.join("networks"))?,
            pools: Shelf::open(dir.join("pools"))?,
            endpoints: Shelf::open(dir.join("endpoints"))?,
        })
    }

    /// Docker networks.
    pub(crate) fn networks(&self) -> &Shelf<NetworkRecord> {
        &self.networks
    }

    /// Flannel networks whose pool was asked for, by their names.
    pub(crate) fn pools(&self) -> &Shelf<PoolRecord> {
        &self.pools
    }

    /// Endpoints, those being deleted included.
    pub(crate) fn endpoints(&self) -> &Shelf<EndpointRecord> {
        &self.endpoints
    }
}

/// Records of one kind, by id.
pub(crate) struct Shelf<Record> {
    dir: PathBuf,
    records: Mutex<BTreeMap<String, Record>>,
}

impl<Record: Serialize + DeserializeOwned + Clone> Shelf<Record> {
    fn open(dir: PathBuf) -> Result<Self, JournalError> {
        let failed = |action| {
            let path = dir.clone();
            move |source| JournalError::Io { action, path, source }
        };
        fs::create_dir_all(&dir).map_err(failed("create the directory"))?;
        let mut records = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed("list"))? {
            let path = entry.map_err(failed("list"))?.path();
            let Some(id) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json")) else {
                continue;
            };
            match read(&path) {
                Ok(record) => drop(records.insert(id.to_owned(), record)),
                Err(error) => {
                    let aside = path.with_extension("unreadable");
                    tracing::error!(path = %path.display(), %error, "record set aside as {}", aside.display());
                    let _ = fs::rename(&path, &aside);
                }
            }
        }
        Ok(Self { dir, records: Mutex::new(records) })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Record>> {
        // A panic while the lock was held cannot leave the map half changed: it changes after the file does.
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One record.
    pub(crate) fn get(&self, id: &str) -> Option<Record> {
        self.lock().get(id).cloned()
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<(String, Record)> {
        self.lock().iter().map(|(id, record)| (id.clone(), record.clone())).collect()
    }

    /// Shows every record.
    pub(crate) fn each(&self, mut see: impl FnMut(&str, &Record)) {
        self.lock().iter().for_each(|(id, record)| see(id, record));
    }

    /// The first record for which something holds.
    pub(crate) fn find(&self, mut holds: impl FnMut(&str, &Record) -> bool) -> Option<(String, Record)> {
        self.lock()
            .iter()
            .find(|(id, record)| holds(id, record))
            .map(|(id, record)| (id.clone(), record.clone()))
    }

    /// Writes a record, durably, and then remembers it.
    pub(crate) fn put(&self, id: &str, record: Record) -> Result<(), JournalError> {
        self.write(&mut self.lock(), id, record)
    }

    /// Changes a record that is there, durably; nothing happens if it is not.
    pub(crate) fn update(&self, id: &str, change: impl FnOnce(&mut Record)) -> Result<(), JournalError> {
        let mut records = self.lock();
        let Some(mut record) = records.get(id).cloned() else { return Ok(()) };
        change(&mut record);
        self.write(&mut records, id, record)
    }

    /// Changes a record, durably; one that is not there is `made` first.
    pub(crate) fn upsert(
        &self,
        id: &str,
        made: impl FnOnce() -> Record,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), JournalError> {
        let mut records = self.lock();
        let mut record = records.get(id).cloned().unwrap_or_else(made);
        change(&mut record);
        self.write(&mut records, id, record)
    }

    fn write(
        &self,
        records: &mut BTreeMap<String, Record>,
        id: &str,
        record: Record,
    ) -> Result<(), JournalError> {
        let path = self.path(id)?;
        let text = serde_json::to_vec_pretty(&record)
            .map_err(|source| JournalError::Json { id: id.to_owned(), source })?;
        whole_file::write(&path, &text, 0o600).map_err(|source| JournalError::Io {
            action: "write",
            path,
            source,
        })?;
        records.insert(id.to_owned(), record);
        Ok(())
    }

    /// Forgets a record, durably; one that is not there is forgotten already.
    pub(crate) fn remove(&self, id: &str) -> Result<Option<Record>, JournalError> {
        let path = self.path(id)?;
        let mut records = self.lock();
        match fs::remove_file(&path) {
            Ok(()) => sync_dir(&self.dir).map_err(|source| JournalError::Io {
                action: "sync the directory of",
                path,
                source,
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(JournalError::Io { action: "remove", path, source }),
        }
        Ok(records.remove(id))
    }

    fn path(&self, id: &str) -> Result<PathBuf, JournalError> {
        let shaped = (1..=128).contains(&id.len())
            && !id.starts_with('.')
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        match shaped {
            true => Ok(self.dir.join(format!("{id}.json"))),
            false => Err(JournalError::Id(id.to_owned())),
        }
    }
}

fn read<Record: DeserializeOwned>(path: &Path) -> Result<Record, io::Error> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let text = fs::read(path)?;
    let Versioned { version } = serde_json::from_slice(&text)?;
    if version != VERSION {
        return Err(io::Error::other(format!(
            "version {version} of the record, this software reads {VERSION}"
        )));
    }
    Ok(serde_json::from_slice(&text)?)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> EndpointRecord {
        EndpointRecord {
            version: VERSION,
            docker_network: "n1".into(),
            network: NetworkName::default_network(),
            address: "10.100.5.2/24".parse().unwrap(),
            address_v6: None,
            mac: "0a:58:0a:64:05:02".parse().unwrap(),
            stage: Stage::Created,
            ipam: Ipam::Flannel,
            ports: BTreeSet::new(),
            sandbox: String::new(),
            created: 7,
        }
    }

    #[test]
    fn a_reopened_journal_holds_what_was_put_and_not_what_was_removed() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.endpoints().put("kept", endpoint()).unwrap();
        journal.endpoints().put("gone", endpoint()).unwrap();
        journal.endpoints().remove("gone").unwrap();
        assert!(journal.endpoints().remove("never").unwrap().is_none());
        let again = Journal::open(dir.path()).unwrap();
        assert_eq!(again.endpoints().all(), [("kept".to_owned(), endpoint())]);
    }

    #[test]
    fn ids_never_become_paths() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        for id in ["", "../x", "a/b", ".a", &"a".repeat(129)] {
            assert!(matches!(journal.endpoints().put(id, endpoint()), Err(JournalError::Id(_))), "{id:?}");
        }
    }

    #[test]
    fn half_a_file_and_a_file_of_tomorrow_are_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let endpoints = dir.path().join("docker/endpoints");
        fs::create_dir_all(&endpoints).unwrap();
        fs::write(endpoints.join("half.json"), "{\"version\":1,").unwrap();
        fs::write(endpoints.join("tomorrow.json"), "{\"version\":2}").unwrap();
        fs::write(endpoints.join("x.tmp"), "{").unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert!(journal.endpoints().all().is_empty());
        assert!(endpoints.join("half.unreadable").exists() && endpoints.join("tomorrow.unreadable").exists());
    }
}
