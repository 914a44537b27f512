//! Network namespaces, and the only place where a thread enters one.
//!
//! In a process with several threads none that lives on ever changes its namespace: a short-lived one enters, opens what
//! is needed there (a socket stays in the namespace it was opened in), and ends. A process with one thread may enter and
//! come back, which saves two waits for the scheduler: half of an attach on a busy machine.

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
pub struct Namespace {
    fd: OwnedFd,
    /// The namespace to come back to, where entering is done by the calling thread.
    home: Option<OwnedFd>,
}

impl Namespace {
    /// The namespace a path stands for: `/proc/PID/ns/net`, `/run/netns/NAME`, `/var/run/docker/netns/ID`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { fd: File::open(path)?.into(), home: None })
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Another reference to the same namespace.
    pub fn try_clone(&self) -> io::Result<Self> {
        let home = self.home.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Self { fd: self.fd.try_clone()?, home })
    }

    /// The same namespace, entered by the calling thread itself, which comes back. Only for a process that has one
    /// thread, as the CNI binary: another thread could be started meanwhile, and would stay inside.
    pub fn in_place(self) -> io::Result<Self> {
        let home = Self::current()?.fd;
        Ok(Self { home: Some(home), ..self })
    }

    /// Whether both are the same namespace.
    pub fn is_same(&self, other: &Self) -> io::Result<bool> {
        let place = |namespace: &Self| -> io::Result<(u64, u64)> {
            let meta = File::from(namespace.fd.try_clone()?).metadata()?;
            Ok((meta.dev(), meta.ino()))
        };
        Ok(place(self)? == place(other)?)
    }

    /// Does the work inside the namespace. Sockets opened there stay there; `/proc/sys/net` is that of the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let entered = || {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        if let Some(home) = &self.home {
            let _back = ComeBack(home.as_fd());
            return entered();
        }
        thread::scope(|scope| {
            thread::Builder::new()
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, entered)?
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread inside the namespace panicked")))
        })
    }
}

/// Takes the thread back to where it came from, also when the work panics.
struct ComeBack<'a>(BorrowedFd<'a>);

impl Drop for ComeBack<'_> {
    fn drop(&mut self) {
        if setns(self.0, CloneFlags::CLONE_NEWNET).is_err() {
            // Whatever came next would be done to the wrong namespace.
            std::process::abort();
        }
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Namespace {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_enters_in_place_comes_back() {
        // Its own namespace entered once more: needs no privilege to make another, but the entering itself does.
        let here = Namespace::current().unwrap();
        let there = Namespace::current().unwrap().in_place().unwrap();
        match there.run(|| Namespace::current().unwrap().is_same(&here).unwrap()) {
            Ok(same) => assert!(same),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                println!("skipped: a_thread_that_enters_in_place_comes_back: needs CAP_SYS_ADMIN");
            }
            Err(error) => panic!("{error}"),
        }
        assert!(Namespace::current().unwrap().is_same(&here).unwrap());
    }
}
