//! The key of this host's WireGuard devices: made once and kept, so that peers know us again after a reboot.
//!
//! **Shape** — 32 bytes in base64, as `wg genkey` prints them. Where `WIREGUARD_KEY_FILE` names a file, that one and no other. Else
//! `<state dir>/<network>/wireguard.key`; but while there is a key of Go flanneld's (`wgkey` beside the subnet file), that one counts and is kept
//! there, so that a host that changes over, or goes back and forth, stays who it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::whole_file;
use crate::words::name::NetworkName;
use crate::words::secret::Secret;
use crate::words::wireguard::{KEY_BYTES, SecretKey, key_text, secret_key};

/// Nobody but root reads it, and nobody writes into it.
const MODE: u32 = 0o400;
/// No key file is longer.
const TEXT_MAX: u64 = 4096;

/// Where keys are looked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KeyPlace {
    /// The operator named the file.
    Named(PathBuf),
    /// The state directory, and where Go flanneld keeps its own.
    Kept {
        /// Go flanneld's, if the network is one that it could serve.
        upstream: Option<PathBuf>,
    },
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// A file that holds something else.
    #[error("{path} is not a WireGuard key: 32 bytes in base64 were wanted, as `wg genkey` prints them")]
    Broken {
        /// The file.
        path: PathBuf,
    },
    /// A file that cannot be read or made.
    #[error("could not read or make {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The key; made now if there is none.
///
/// # Errors
/// A file that holds no key is never written over: peers know us by what it held.
pub fn load(place: &KeyPlace, state_dir: &Path, network: &NetworkName) -> Result<SecretKey, KeyFileError> {
    let upstream = match place {
        KeyPlace::Named(path) => return kept(path),
        KeyPlace::Kept { upstream } => upstream,
    };
    let path = state_dir.join(network.as_str()).join("wireguard.key");
    if let Some(upstream) = upstream
        && let Some(theirs) = read(upstream)?
    {
        if !matches!(read(&path), Ok(Some(ours)) if ours == theirs) {
            whole_file::write(&path, text(&theirs).as_bytes(), MODE)
                .map_err(|source| KeyFileError::Io { path, source })?;
        }
        return Ok(theirs);
    }
    kept(&path)
}

fn kept(path: &Path) -> Result<SecretKey, KeyFileError> {
    if let Some(key) = read(path)? {
        return Ok(key);
    }
    let failed = |source| KeyFileError::Io { path: path.to_owned(), source };
    publish(path, text(&random().map_err(failed)?).as_bytes()).map_err(failed)?;
    // Perhaps somebody else was faster.
    read(path)?.ok_or_else(|| failed(ErrorKind::NotFound.into()))
}

fn text(key: &SecretKey) -> String {
    format!("{}\n", key_text(key.reveal()))
}

fn read(path: &Path) -> Result<Option<SecretKey>, KeyFileError> {
    let failed = |source| KeyFileError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    if file.metadata().map_err(failed)?.mode() & 0o077 != 0 {
        tracing::warn!("others than root may read {0}: chmod 400 {0}", path.display());
    }
    let mut bytes = Vec::new();
    file.take(TEXT_MAX).read_to_end(&mut bytes).map_err(failed)?;
    let key = std::str::from_utf8(&bytes).ok().and_then(|text| secret_key(text).ok());
    key.map(clamped).map(Some).ok_or_else(|| KeyFileError::Broken { path: path.to_owned() })
}

/// As the kernel keeps it and shows it again (RFC 7748 §5).
fn clamped(key: SecretKey) -> SecretKey {
    let mut bytes = *key.reveal();
    bytes[0] &= 248;
    bytes[KEY_BYTES - 1] = (bytes[KEY_BYTES - 1] & 127) | 64;
    Secret::new(bytes)
}

fn random() -> io::Result<SecretKey> {
    let mut bytes = [0; KEY_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(clamped(Secret::new(bytes)))
}

/// Puts a file there whole, unless there is one.
fn publish(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(dir)?;
    let fresh = dir.join(format!(".wireguard.key.{}.{:08x}.new", std::process::id(), fastrand::u32(..)));
    let written = write_new(&fresh, content).and_then(|()| match fs::hard_link(&fresh, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    });
    let _ = fs::remove_file(&fresh);
    written?;
    File::open(dir)?.sync_all()
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_in(dir: &Path, upstream: Option<&Path>) -> Result<SecretKey, KeyFileError> {
        let upstream = upstream.map(Path::to_owned);
        load(&KeyPlace::Kept { upstream }, dir, &NetworkName::default_network())
    }

    #[test]
    fn a_key_is_made_once_and_read_by_root_alone() {
        let dir = tempfile::tempdir().unwrap();
        let first = load_in(dir.path(), None).unwrap();
        assert!(load_in(dir.path(), None).unwrap() == first);
        let path = dir.path().join("default/wireguard.key");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o400);
        assert_eq!(fs::read_dir(dir.path().join("default")).unwrap().count(), 1);
        let bytes = first.reveal();
        assert_eq!((bytes[0] & 7, bytes[31] & 0xc0), (0, 0x40));
        let other = tempfile::tempdir().unwrap();
        assert!(load_in(other.path(), None).unwrap() != first);
    }

    #[test]
    fn of_many_who_make_one_all_have_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let keys: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| kept(&path).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
        // Also who decided to make one before it was there.
        publish(&path, b"another").unwrap();
        assert!(kept(&path).unwrap() == keys[0]);
    }

    #[test]
    fn upstreams_key_counts_while_it_is_there_and_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (own, wgkey) = (load_in(dir.path(), None).unwrap(), dir.path().join("wgkey"));
        // Not clamped, and without a newline, as some tools write.
        fs::write(&wgkey, key_text(&[0xff; 32])).unwrap();
        let theirs = load_in(dir.path(), Some(&wgkey)).unwrap();
        assert!(theirs != own && theirs.reveal()[0] == 0xf8);
        fs::remove_file(&wgkey).unwrap();
        assert!(load_in(dir.path(), Some(&wgkey)).unwrap() == theirs);
        let named = KeyPlace::Named(dir.path().join("else/where"));
        let network = NetworkName::default_network();
        let elsewhere = load(&named, dir.path(), &network).unwrap();
        assert!(elsewhere != theirs && load(&named, dir.path(), &network).unwrap() == elsewhere);
    }

    #[test]
    fn what_is_no_key_is_said_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("default/wireguard.key");
        load_in(dir.path(), None).unwrap();
        fs::remove_file(&path).unwrap();
        for wrong in ["", "not a key", &"A".repeat(10_000)] {
            fs::write(&path, wrong).unwrap();
            let error = load_in(dir.path(), None).unwrap_err().to_string();
            assert!(
                error.contains("wireguard.key is not a WireGuard key") && !error.contains("not a key:"),
                "{error}"
            );
            assert_eq!(fs::read_to_string(&path).unwrap(), wrong);
        }
        assert!(matches!(load_in(&path, None), Err(KeyFileError::Io { .. })));
    }
}
