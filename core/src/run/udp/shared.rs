//! What the threads of a tunnel share, and how they wait.

use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::device::{Offload, Queue};
use super::route_table::RouteTable;

/// What a tunnel uses of what the kernel has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mode {
    /// What the device hands over uncut, and takes.
    pub(super) offload: Offload,
    /// Several datagrams of one size are one message out...
    pub(super) gso: bool,
    /// ...and in.
    pub(super) gro: bool,
    /// Most packets read from the device before they are sent.
    pub(super) reads: usize,
    /// Most messages received at once.
    pub(super) slots: usize,
    /// Queues.
    pub(super) queues: usize,
}

/// One for all queues of a tunnel.
pub(super) struct Shared {
    table: RwLock<Arc<RouteTable>>,
    /// Readable once the tunnel is over, and never read.
    over: EventFd,
    is_over: AtomicBool,
    cuts: AtomicBool,
}

impl Shared {
    pub(super) fn new(table: RouteTable) -> nix::Result<Self> {
        let over = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self {
            table: RwLock::new(Arc::new(table)),
            over,
            is_over: AtomicBool::new(false),
            cuts: AtomicBool::new(true),
        })
    }

    /// The leases as they are now.
    pub(super) fn table(&self) -> Arc<RouteTable> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another table in the place of the one there is, if it differs.
    pub(super) fn set_table(&self, table: RouteTable) {
        if *self.table() != table {
            *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        }
    }

    /// Ends all threads.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Release);
        // A counter of 64 bits is not full.
        let _ = self.over.write(1);
    }

    /// Readable once the tunnel is over.
    pub(super) fn over(&self) -> BorrowedFd<'_> {
        self.over.as_fd()
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// Whether the kernel cuts messages into datagrams.
    pub(super) fn cuts(&self) -> bool {
        self.cuts.load(Ordering::Relaxed)
    }

    /// It does not on this uplink.
    pub(super) fn cut_no_more(&self) {
        if self.cuts.swap(false, Ordering::Relaxed) {
            tracing::warn!(
                "the uplink computes no checksums, so the kernel cuts no datagrams for it: sending them one by one"
            );
        }
    }
}

/// What one thread works on.
#[derive(Clone)]
pub(super) struct Lane {
    pub(super) shared: Arc<Shared>,
    pub(super) queue: Arc<Queue>,
    pub(super) socket: Arc<UdpSocket>,
    pub(super) port: u16,
    pub(super) mode: Mode,
}

/// What comes after a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// There may be more.
    Again,
    /// There was no more.
    Wait,
    /// Nothing can be read now.
    Failed,
}

/// Something that may happen a million times and is told once a minute.
pub(in crate::run) struct Complaint {
    what: &'static str,
    count: u64,
    told: Option<Instant>,
}

impl Complaint {
    const EVERY: Duration = Duration::from_secs(60);

    pub(in crate::run) const fn new(what: &'static str) -> Self {
        Self { what, count: 0, told: None }
    }

    /// It happened once more.
    pub(in crate::run) fn more(&mut self, detail: impl FnOnce() -> String) {
        self.count += 1;
        if self.told.is_none_or(|told| told.elapsed() >= Self::EVERY) {
            tracing::warn!(count = self.count, "{}; {}", self.what, detail());
            (self.count, self.told) = (0, Some(Instant::now()));
        }
    }
}
