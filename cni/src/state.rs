//! What one call of the plugin leaves for the next: `/run/flannel/cni/NETWORK/CONTAINER:INTERFACE.json`.
//!
//! Only what can be found in no other way is written, so most containers have no file. It is void after a reboot, and /run is empty
//! then. All files change under one lock; that also keeps the calls that write the packet filter from each other.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use flannel_core::words::hostport::Holding;
use flannel_core::words::name::{Attachment, LinkName};
use serde::{Deserialize, Serialize};

use crate::result::CniError;

const ROOT: &str = "/run/flannel/cni";
/// Whoever holds the lock is done in milliseconds, or stuck.
const LOCK_DEADLINE: Duration = Duration::from_secs(10);

/// What is remembered of an attachment.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Its ports.
    pub(crate) ports: Holding,
    /// The host's end of its interface: while that is there, the attachment lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) host_link: Option<LinkName>,
}

/// All records of this node, while nobody else can change them.
pub(crate) struct State {
    root: PathBuf,
    _lock: File,
}

/// Whether something is remembered of an attachment; without waiting for anybody.
pub(crate) fn knows(network: &str, owner: &Attachment) -> bool {
    fs::symlink_metadata(place(Path::new(ROOT), network, owner)).is_ok()
}

/// Whether anything was ever remembered since this host started.
pub(crate) fn knows_root() -> bool {
    fs::symlink_metadata(ROOT).is_ok()
}

/// An interface name has no colon, so no two attachments share a file.
fn place(root: &Path, network: &str, owner: &Attachment) -> PathBuf {
    root.join(network).join(format!("{}:{}.json", owner.container, owner.interface))
}

impl State {
    /// Waits until nobody else has it.
    pub(crate) fn lock() -> Result<Self, CniError> {
        Self::lock_at(Path::new(ROOT), LOCK_DEADLINE)
    }

    fn lock_at(root: &Path, deadline: Duration) -> Result<Self, CniError> {
        const PAUSE: Duration = Duration::from_millis(1);
        let path = root.join("lock");
        let failed = |action| move |error: io::Error| failure(action, &root.join("lock"), &error);
        let open = || OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = match open() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make_dir(root).map_err(failed("make the directory of"))?;
                open()
            }
            other => other,
        }
        .map_err(failed("open"))?;
        let start = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Self { root: root.to_owned(), _lock: lock }),
                Err(TryLockError::Error(error)) => return Err(failed("lock")(error)),
                Err(TryLockError::WouldBlock) if start.elapsed() < deadline => sleep(PAUSE),
                Err(TryLockError::WouldBlock) => {
                    let msg = format!(
                        "{} is locked since {} s by another call",
                        path.display(),
                        deadline.as_secs()
                    );
                    return Err(CniError::new(CniError::TRY_AGAIN, msg).with_details(
                        "`fuser -v` with that file shows by which; it is given another try later",
                    ));
                }
            }
        }
    }

    /// What is remembered of an attachment. A file that cannot be read is as good as none.
    pub(crate) fn read(&self, network: &str, owner: &Attachment) -> Option<Record> {
        read(&place(&self.root, network, owner))
    }

    /// Remembers, in the place of what was remembered before.
    pub(crate) fn write(&self, record: &Record) -> Result<(), CniError> {
        let path = place(&self.root, &record.ports.network, &record.ports.owner);
        let dir = path.parent().unwrap_or(&self.root);
        let draft = dir.join(".draft");
        let text = serde_json::to_vec(record)
            .map_err(|error| CniError::new(CniError::INPUT, format!("could not write a record: {error}")))?;
        let open = || OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft);
        let written = match open() {
            Err(error) if error.kind() == ErrorKind::NotFound => make_dir(dir).and_then(|()| open()),
            other => other,
        }
        .and_then(|mut file| file.write_all(&text))
        .and_then(|()| fs::rename(&draft, &path));
        written.map_err(|error| failure("write", &path, &error))
    }

    /// Forgets an attachment; the directory of a network goes with the last one.
    pub(crate) fn remove(&self, network: &str, owner: &Attachment) -> Result<(), CniError> {
        let path = place(&self.root, network, owner);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(failure("remove", &path, &error));
            }
            _ => {}
        }
        // Fails while there are others.
        let _ = fs::remove_dir(self.root.join(network));
        Ok(())
    }

    /// Everything that is remembered of a network's attachments.
    pub(crate) fn of_network(&self, network: &str) -> Vec<Record> {
        let files = fs::read_dir(self.root.join(network)).into_iter().flatten().flatten();
        let paths = files.map(|file| file.path());
        paths
            .filter(|path| path.extension().is_some_and(|end| end == "json"))
            .filter_map(|path| read(&path))
            .collect()
    }

    /// Everything that is remembered.
    pub(crate) fn all(&self) -> Vec<Record> {
        let networks = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let names = networks.filter_map(|network| network.file_name().into_string().ok());
        names.flat_map(|network| self.of_network(&network)).collect()
    }
}

fn read(path: &Path) -> Option<Record> {
    let text = fs::read(path).ok()?;
    serde_json::from_slice(&text)
        .inspect_err(|error| say!("flannel: {} cannot be used: {error}", path.display()))
        .ok()
}

fn make_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(dir)
}

fn failure(action: &str, path: &Path, error: &io::Error) -> CniError {
    CniError::new(CniError::INPUT, format!("could not {action} {}", path.display()))
        .with_details(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use flannel_core::words::hostport::CallerMasquerade;

    use super::*;

    fn record(network: &str, container: &str, interface: &str) -> Record {
        Record {
            ports: Holding {
                network: network.to_owned(),
                owner: Attachment { container: container.to_owned(), interface: interface.to_owned() },
                addresses: vec!["10.244.1.5/24".parse().unwrap()],
                ports: BTreeSet::new(),
                masquerade: CallerMasquerade::Always,
            },
            host_link: Some(LinkName::new("veth1").unwrap()),
        }
    }

    #[test]
    fn records_are_read_as_written_and_go_with_their_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("cni");
        let state = State::lock_at(&root, Duration::ZERO).unwrap();
        let records = [record("cbr0", "a", "b-c"), record("cbr0", "a-b", "c"), record("web", "a", "b-c")];
        records.iter().for_each(|record| state.write(record).unwrap());
        for one in &records {
            assert_eq!(state.read(&one.ports.network, &one.ports.owner).as_ref(), Some(one));
        }
        assert_eq!((state.of_network("cbr0").len(), state.all().len()), (2, 3));
        for one in &records {
            state.remove(&one.ports.network, &one.ports.owner).unwrap();
            state.remove(&one.ports.network, &one.ports.owner).unwrap();
        }
        let left: Vec<_> = fs::read_dir(&root).unwrap().map(|file| file.unwrap().file_name()).collect();
        assert_eq!(left, ["lock"]);
    }

    #[test]
    fn a_broken_record_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::lock_at(dir.path(), Duration::ZERO).unwrap();
        let one = record("cbr0", "a", "eth0");
        state.write(&one).unwrap();
        fs::write(place(dir.path(), "cbr0", &one.ports.owner), "{").unwrap();
        assert_eq!((state.read("cbr0", &one.ports.owner), state.all()), (None, Vec::new()));
    }

    #[test]
    fn who_waits_too_long_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let _held = State::lock_at(dir.path(), Duration::ZERO).unwrap();
        let error = State::lock_at(dir.path(), Duration::from_millis(20)).map(drop).unwrap_err();
        assert_eq!(error.code, CniError::TRY_AGAIN, "{error}");
    }
}
