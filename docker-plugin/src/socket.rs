//! The socket engines find us by, and the lock that keeps a host to one plugin.

use std::os::fd::{FromRawFd, OwnedFd};
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
    /// systemd was told to pass something else than our one socket.
    #[error(
        "systemd passed {passed}, and --socket says {wanted}: the socket unit needs one line ListenStream={wanted}"
    )]
    Passed {
        /// What came.
        passed: String,
        /// What should have.
        wanted: PathBuf,
    },
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

/// The socket engines find us by. One that we made is removed when dropped, unless somebody else has put his own there
/// meanwhile; one that systemd made is systemd's.
pub(crate) struct Socket {
    path: PathBuf,
    /// Of the file that is ours to remove.
    inode: Option<u64>,
    listener: UnixListener,
}

impl Socket {
    /// Takes the socket that systemd listens on for us; without one, makes it.
    pub(crate) fn open(path: &Path) -> Result<Self, SocketError> {
        match inherited(path)? {
            Some(listener) => Self::of(listener, path, None),
            None => Self::bind(path),
        }
    }

    /// Makes the socket: a dead file in its place is replaced, a living owner is left alone.
    fn bind(path: &Path) -> Result<Self, SocketError> {
        if UnixStream::connect(path).is_ok() {
            return Err(SocketError::Served { socket: path.to_owned() });
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(io_error("create the directory", dir))?;
        }
        // Bound under another name and moved: nobody sees a socket that does not listen yet. An engine treats every
        // `*.sock` in the directory as a plugin, so the name ends otherwise.
        let fresh = path.with_extension(format!("{}.tmp", std::process::id()));
        let _ = fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh).map_err(io_error("bind", &fresh))?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))
            .map_err(io_error("restrict", &fresh))?;
        fs::rename(&fresh, path).map_err(io_error("put the socket at", path))?;
        Self::of(listener, path, inode(path))
    }

    fn of(listener: UnixListener, path: &Path, inode: Option<u64>) -> Result<Self, SocketError> {
        listener.set_nonblocking(true).map_err(io_error("set up", path))?;
        Ok(Self { path: path.to_owned(), inode, listener })
    }

    /// A listener on it. Those who connect while nobody accepts wait for the next one.
    pub(crate) fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.listener.try_clone()?)
    }
}

/// The socket that was passed to this process by systemd's protocol (LISTEN_FDS, and LISTEN_PID is ours), if any.
#[expect(unsafe_code, reason = "a passed descriptor is a bare number until somebody owns it")]
fn inherited(path: &Path) -> Result<Option<UnixListener>, SocketError> {
    let wrong = |passed: String| SocketError::Passed { passed, wanted: path.to_owned() };
    let mut passed = sd_notify::listen_fds().map_err(|error| wrong(format!("LISTEN_FDS ({error})")))?;
    let fd = match (passed.next(), passed.len()) {
        (None, _) => return Ok(None),
        (Some(fd), 0) => fd,
        (Some(_), more) => return Err(wrong(format!("{} sockets", more + 1))),
    };
    // SAFETY: LISTEN_FDS says that this descriptor was opened for this process, and it is asked only here, once.
    let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(fd) });
    match listener.local_addr() {
        Ok(address) if address.as_pathname() == Some(path) => Ok(Some(listener)),
        Ok(address) => Err(wrong(format!("{address:?}"))),
        Err(error) => Err(wrong(format!("something that is no unix socket ({error})"))),
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError + use<> {
    let path = path.to_owned();
    move |source| SocketError::Io { action, path, source }
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

/// Keeps a host to one plugin for as long as it is held, so that a service and a managed plugin cannot both serve it: an
/// abstract socket of this network namespace, seen alike from the host and from inside a managed plugin, and gone with the
/// process however that ends.
pub(crate) struct HostLock(#[expect(dead_code, reason = "held, never used")] UnixListener);

/// Takes the lock of this host.
pub(crate) fn host_lock() -> Result<HostLock, SocketError> {
    lock("flannel-docker-plugin")
}

fn lock(name: &str) -> Result<HostLock, SocketError> {
    let failed = |source| SocketError::Io { action: "take the lock", path: PathBuf::from(name), source };
    let address = SocketAddr::from_abstract_name(name).map_err(failed)?;
    UnixListener::bind_addr(&address).map(HostLock).map_err(|error| match error.kind() {
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
        let socket = Socket::open(&path).unwrap();
        assert!(matches!(Socket::open(&path), Err(SocketError::Served { .. })));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }
    #[test]
    fn a_host_has_one_plugin() {
        // Not the real name: other test processes share this network namespace.
        let name = format!("flannel-docker-plugin-test-{}", std::process::id());
        let held = lock(&name).unwrap();
        assert!(matches!(lock(&name), Err(SocketError::Held)));
        drop(held);
        assert!(lock(&name).is_ok());
    }
}
