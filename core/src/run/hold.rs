//! One agent per network and host: two loops with different plans would fight for ever.
//!
//! **Shape** — an flock on `<directory of the subnet file>/<network>.agent`, whose text says who holds it. The file
//! stays; the lock goes with the process.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use crate::words::name::NetworkName;

/// The lock, held until dropped.
#[derive(Debug)]
pub struct Hold {
    _lock: Flock<File>,
}

/// Why the lock is not ours.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// Somebody has it.
    #[error("network {network} is served on this host by {holder}")]
    Held {
        /// The network.
        network: NetworkName,
        /// Program and process id.
        holder: String,
    },
    /// The file cannot be made or locked.
    #[error("could not lock {path}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Takes the lock of a network, without waiting.
pub fn take(subnet_file: &Path, network: &NetworkName) -> Result<Hold, HoldError> {
    let path = subnet_file.with_file_name(format!("{network}.agent"));
    let failed = |source| HoldError::Io { path: path.display().to_string(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            let program = std::env::args().next().unwrap_or_default();
            let name = Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
            lock.set_len(0).and_then(|()| lock.rewind()).map_err(failed)?;
            write!(lock, "{name} (process {})", std::process::id()).map_err(failed)?;
            Ok(Hold { _lock: lock })
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder).map_err(failed)?;
            Err(HoldError::Held { network: network.clone(), holder })
        }
        Err((_, errno)) => Err(failed(errno.into())),
    }
}

/// Removes the lock's file, when nothing of the network is to be left.
pub fn remove(subnet_file: &Path, network: &NetworkName) {
    let _ = std::fs::remove_file(subnet_file.with_file_name(format!("{network}.agent")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_learns_who_is_first() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("flannel/subnet.env");
        let network = NetworkName::default_network();
        let first = take(&file, &network).unwrap();
        let second = take(&file, &network).unwrap_err().to_string();
        assert!(second.contains(&format!("(process {})", std::process::id())), "{second}");
        assert!(take(&file, &NetworkName::new("web").unwrap()).is_ok());
        drop(first);
        assert!(take(&file, &network).is_ok());
    }
}
