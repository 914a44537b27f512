//! Network namespaces, and the only place where a thread enters one.
//!
//! No thread that lives on ever changes its namespace: a short-lived one enters, opens what is needed there (a socket
//! stays in the namespace it was opened in), and ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};

/// Stack of the thread that enters: it opens sockets and files, nothing deep.
const STACK_BYTES: usize = 256 * 1024;

/// A network namespace, kept alive for as long as this lives.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

impl Namespace {
    /// The namespace a path stands for: `/proc/PID/ns/net`, `/run/netns/NAME`, `/var/run/docker/netns/ID`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(File::open(path)?.into()))
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Another reference to the same namespace.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Whether both are the same namespace.
    pub fn is_same(&self, other: &Self) -> io::Result<bool> {
        let place = |namespace: &Self| -> io::Result<(u64, u64)> {
            let meta = File::from(namespace.0.try_clone()?).metadata()?;
            Ok((meta.dev(), meta.ino()))
        };
        Ok(place(self)? == place(other)?)
    }

    /// Does the work on a short-lived thread inside the namespace. Sockets opened there stay there; `/proc/sys/net` is
    /// that of the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let entered = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        thread::scope(|scope| {
            let builder = thread::Builder::new().name("netns".to_owned()).stack_size(STACK_BYTES);
            builder
                .spawn_scoped(scope, entered)?
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread inside the namespace panicked")))
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Namespace {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
