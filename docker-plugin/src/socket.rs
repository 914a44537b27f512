//! The socket engines find us by, and the lock that keeps a host to one plugin.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Somebody answers on it.
    #[error("{socket} is served by another process: stop that one first, or give this one another --socket")]
    Served {
        /// The socket's path.
        socket: PathBuf,
    },
    /// Another plugin, with whatever socket, serves this host.
    #[error(
        "another flannel-docker-plugin already serves this host's networks (one per host, as a service or as a managed plugin): stop it first"
    )]
    Held,
    /// The system said no.
    #[error("could not {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The socket engines find us by; removed when dropped, unless somebody else has put his own there meanwhile.
pub(crate) struct Socket {
    path: PathBuf,
    inode: Option<u64>,
    listener: Option<UnixListener>,
    /// Held for as long as the process lives, so that a service and a managed plugin cannot both serve one host.
    _host_lock: UnixListener,
}

impl Socket {
    /// Takes the socket: a dead file in its place is replaced, a living owner is left alone.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        Self::bind_with(host_lock()?, path)
    }

    fn bind_with(host_lock: UnixListener, path: &Path) -> Result<Self, SocketError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| SocketError::Io { action, path, source }
        };
        if UnixStream::connect(path).is_ok() {
            return Err(SocketError::Served { socket: path.to_owned() });
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(failed("create the directory", dir))?;
        }
        // Bound under another name and moved: nobody sees a socket that does not listen yet. An engine treats every
        // `*.sock` in the directory as a plugin, so the name ends otherwise.
        let fresh = path.with_extension(format!("{}.tmp", std::process::id()));
        let _ = fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh).map_err(failed("bind", &fresh))?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).map_err(failed("restrict", &fresh))?;
        fs::rename(&fresh, path).map_err(failed("put the socket at", path))?;
        listener.set_nonblocking(true).map_err(failed("set up", path))?;
        Ok(Self {
            path: path.to_owned(),
            inode: inode(path),
            listener: Some(listener),
            _host_lock: host_lock,
        })
    }

    /// The listener, once.
    pub(crate) fn listener(&mut self) -> io::Result<tokio::net::UnixListener> {
        let listener =
            self.listener.take().ok_or_else(|| io::Error::other("the socket is already served"))?;
        tokio::net::UnixListener::from_std(listener)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.inode.is_some() && inode(&self.path) == self.inode {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    fs::symlink_metadata(path).ok().map(|found| found.ino())
}

/// An abstract socket of this network namespace: seen alike from the host and from inside a managed plugin, and gone with
/// the process however that ends.
pub(crate) fn host_lock() -> Result<UnixListener, SocketError> {
    lock("flannel-docker-plugin")
}

fn lock(name: &str) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError::Io { action: "take the lock", path: PathBuf::from(name), source };
    let address = SocketAddr::from_abstract_name(name).map_err(failed)?;
    UnixListener::bind_addr(&address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => SocketError::Held,
        _ => failed(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_file_is_replaced_and_removed_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugins/flannel.sock");
        fs::create_dir(dir.path().join("plugins")).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the dead file");
        // Not the real name: other test processes share this network namespace.
        let name = format!("flannel-docker-plugin-test-{}", std::process::id());
        let socket = Socket::bind_with(lock(&name).unwrap(), &path).unwrap();
        assert!(matches!(lock(&name), Err(SocketError::Held)));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }
}
