//! What the threads of a device share: its TUN device, its sockets, its peers.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::WireguardError;
use super::burst::Way;
use super::peer_table::{Own, Peers};
use super::sockets::Sockets;
use crate::run::udp::device::{Offload, Queue, Refused};
use crate::words::wireguard::{WireguardDevice, WireguardTunnel};

/// A device, seen from its threads.
pub(super) struct Engine {
    pub(super) own: Own,
    pub(super) queue: Queue,
    pub(super) offload: Offload,
    pub(super) sockets: Sockets,
    peers: RwLock<Arc<Peers>>,
    cuts: AtomicBool,
    /// Readable once it is over, and never read.
    pub(super) over: EventFd,
    is_over: AtomicBool,
}

impl Engine {
    /// Makes the device and opens its port.
    pub(super) fn open(tunnel: &WireguardTunnel) -> Result<Self, WireguardError> {
        let WireguardDevice { link, port, .. } = tunnel.device;
        let sockets =
            Sockets::open(port.number()).map_err(|source| WireguardError::Socket { port, source })?;
        let queue = Queue::create(link, false, true).map_err(|source| match Refused::of(&source) {
            Refused::Control => WireguardError::Control(source),
            Refused::Taken => WireguardError::Taken(link),
            Refused::Other => WireguardError::Device { device: link, source },
        })?;
        // Segments of UDP are not asked for: the kernel would hand over those of IPv6 too, and these are cut by nobody here.
        let offload = queue.offload(Offload::Tcp);
        tracing::info!(
            "userspace wireguard device {link} on UDP port {port}, the device's offload: {offload:?}"
        );
        let own = Own::new(tunnel);
        let peers = RwLock::new(Arc::new(Peers::of(tunnel, &Peers::default(), &own)));
        let over = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| WireguardError::Threads { device: link, source: io::Error::from(errno) })?;
        let (cuts, is_over) = (AtomicBool::new(true), AtomicBool::new(false));
        Ok(Self { own, queue, offload, sockets, peers, cuts, over, is_over })
    }

    /// The peers as they are now.
    pub(super) fn peers(&self) -> Arc<Peers> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes up the peers as they are wanted now. For one thread only.
    pub(super) fn set_peers(&self, tunnel: &WireguardTunnel) {
        let peers = Peers::of(tunnel, &self.peers(), &self.own);
        *self.peers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(peers);
    }

    pub(super) fn way(&self) -> Way<'_> {
        Way { sockets: &self.sockets, cuts: &self.cuts }
    }

    /// Ends all threads.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Release);
        // A counter of 64 bits is not full.
        let _ = self.over.write(1);
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }
}
