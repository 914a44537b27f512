//! One agent per network and host: two loops with different plans would fight for ever.
//!
//! **Shape** — an flock on `<directory of the subnet file>/<network>.agent`, whose text says who holds it. The file
//! stays; the lock goes with the process. Of the default network, which further flanneld serve from other prefixes, the subnet file
//! says which: beside `subnet.env` it is `default.agent`, beside `hostgw.env` `hostgw.env.agent`.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::words::name::NetworkName;

/// The lock, held until dropped.
#[derive(Debug)]
pub struct Hold {
    lock: Flock<File>,
}

impl Hold {
    /// The lock's file.
    pub fn file(&self) -> &File {
        &self.lock
    }
}

/// Why the lock is not ours.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// Somebody has it.
    #[error("network {network} is served on this host by {holder}, which writes {subnet_file}")]
    Held {
        /// The network.
        network: NetworkName,
        /// Program and process id.
        holder: String,
        /// What both of them write.
        subnet_file: Box<str>,
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

/// The lock's file, open: whoever has it open is known to be one of our agents, also while another holds the lock.
#[derive(Debug)]
pub struct Door {
    network: NetworkName,
    path: PathBuf,
    file: File,
}

impl Door {
    /// Opens the lock of a network, without taking it.
    pub fn open(subnet_file: &Path, network: &NetworkName) -> Result<Self, HoldError> {
        let path = lock_file(subnet_file, network);
        let failed = |source| HoldError::Io { path: path.display().to_string(), source };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        Ok(Self { network: network.clone(), path, file })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Takes the lock, without waiting.
    pub fn take(self) -> Result<Hold, (Self, HoldError)> {
        let Self { network, path, file } = self;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // Only messages suffer if the name cannot be written.
                let _ = sign(&mut lock);
                Ok(Hold { lock })
            }
            Err((file, errno)) => {
                let door = Self { network, path, file };
                let error = match errno {
                    nix::errno::Errno::EWOULDBLOCK => door.held(),
                    other => HoldError::Io { path: door.path.display().to_string(), source: other.into() },
                };
                Err((door, error))
            }
        }
    }

    /// Who has the lock, if anybody has.
    pub fn holder(&self) -> Result<Option<String>, HoldError> {
        let failed = |source| HoldError::Io { path: self.path.display().to_string(), source };
        let file = self.file.try_clone().map_err(failed)?;
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            // Given back at once; whoever comes at this very moment tries again ([`take`]).
            Ok(lock) => lock.unlock().map(|_| None).map_err(|(_, errno)| failed(errno.into())),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(Some(self.signature())),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }

    /// Whether this still is the file at its place: who retires a network removes it.
    pub fn is_current(&self) -> bool {
        let place = std::fs::metadata(&self.path).map(|file| (file.dev(), file.ino()));
        let open = self.file.metadata().map(|file| (file.dev(), file.ino()));
        matches!((place, open), (Ok(place), Ok(open)) if place == open)
    }

    fn held(&self) -> HoldError {
        let subnet_file = subnet_file(&self.path).display().to_string().into();
        HoldError::Held { network: self.network.clone(), holder: self.signature(), subnet_file }
    }

    fn signature(&self) -> String {
        std::fs::read_to_string(&self.path).unwrap_or_default()
    }
}

fn sign(lock: &mut Flock<File>) -> io::Result<()> {
    let program = std::env::args().next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
    lock.set_len(0)?;
    lock.rewind()?;
    write!(lock, "{name} (process {})", std::process::id())
}

/// Takes the lock of a network. Waits only as long as somebody needs who looks whether it is free.
pub fn take(subnet_file: &Path, network: &NetworkName) -> Result<Hold, HoldError> {
    const LOOKS: u32 = 5;
    const LOOK: Duration = Duration::from_millis(2);
    let mut door = Door::open(subnet_file, network)?;
    for _ in 0..LOOKS {
        match door.take() {
            Ok(hold) => return Ok(hold),
            Err((back, HoldError::Held { .. })) => door = back,
            Err((_, error)) => return Err(error),
        }
        std::thread::sleep(LOOK);
    }
    door.take().map_err(|(_, error)| error)
}

/// Who has the lock of a network, if anybody has. Whoever may read its file may ask, and leaves no trace.
pub fn holder(subnet_file: &Path, network: &NetworkName) -> Result<Option<String>, HoldError> {
    let path = lock_file(subnet_file, network);
    match File::open(&path) {
        Ok(file) => Door { network: network.clone(), path, file }.holder(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(HoldError::Io { path: path.display().to_string(), source }),
    }
}

/// Removes the lock's file, when nothing of the network is to be left.
pub fn remove(subnet_file: &Path, network: &NetworkName) {
    let _ = std::fs::remove_file(lock_file(subnet_file, network));
}

fn lock_file(subnet_file: &Path, network: &NetworkName) -> PathBuf {
    let name = match (network.is_default(), subnet_file.file_name()) {
        (true, Some(name)) if name != "subnet.env" => name.to_string_lossy().into_owned(),
        (true, _) => NetworkName::default_network().to_string(),
        (false, _) => network.to_string(),
    };
    subnet_file.with_file_name(format!("{name}.agent"))
}

/// The subnet file whose lock this is.
fn subnet_file(lock_file: &Path) -> PathBuf {
    let file = lock_file.with_extension("");
    match file.file_name() {
        Some(name) if name == "default" => file.with_file_name("subnet.env"),
        Some(_) if file.extension().is_none() => file.with_extension("env"),
        _ => file,
    }
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
        // A further flanneld has a file of its own; whoever says that file means that one.
        let further = dir.path().join("flannel/hostgw.env");
        let other = take(&further, &NetworkName::of_subnet_file(&further)).unwrap();
        assert!(take(&further, &network).unwrap_err().to_string().ends_with("flannel/hostgw.env"));
        let held = take(&file, &NetworkName::of_subnet_file(&file)).unwrap_err().to_string();
        assert!(held.ends_with("flannel/subnet.env"), "{held}");
        drop(other);
        let nowhere = dir.path().join("nowhere/subnet.env");
        assert!(holder(&nowhere, &network).unwrap().is_none() && !dir.path().join("nowhere").exists());
        assert_eq!(holder(&file, &network).unwrap(), Door::open(&file, &network).unwrap().holder().unwrap());
        let door = Door::open(&file, &network).unwrap();
        assert!(door.holder().unwrap().is_some() && door.is_current());
        drop(first);
        assert_eq!(door.holder().unwrap(), None);
        let again = take(&file, &network).unwrap();
        remove(&file, &network);
        assert!(!door.is_current());
        drop(again);
        assert!(take(&file, &network).is_ok());
    }
}
