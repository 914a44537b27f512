//! A device that runs: its TUN device, its sockets, its two threads.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::WireguardError;
use super::burst::Way;
use super::inbound::Inbound;
use super::outbound::Outbound;
use super::peer_table::{Own, Peers};
use super::sockets::Sockets;
use crate::run::udp::device::{Offload, Queue, Refused};
use crate::words::wireguard::{PublicKey, WireguardDevice, WireguardTunnel};

/// What the threads of a device share.
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
    /// The peers as they are now.
    pub(super) fn peers(&self) -> Arc<Peers> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn way(&self) -> Way<'_> {
        Way { sockets: &self.sockets, cuts: &self.cuts }
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }
}

/// A device that runs until it is dropped.
pub(super) struct Running {
    device: WireguardDevice,
    engine: Arc<Engine>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    pub(super) fn start(tunnel: &WireguardTunnel) -> Result<Self, WireguardError> {
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
        let peers = Peers::of(tunnel, &Peers::default(), &own);
        let failed = |source| WireguardError::Threads { device: link, source };
        let over = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| failed(errno.into()))?;
        let engine = Arc::new(Engine {
            own,
            queue,
            offload,
            sockets,
            peers: RwLock::new(Arc::new(peers)),
            cuts: AtomicBool::new(true),
            over,
            is_over: AtomicBool::new(false),
        });
        let mut running = Self { device: tunnel.device.clone(), engine: engine.clone(), threads: Vec::new() };
        let (out, into) = (engine.clone(), engine);
        running.thread("wg-out", move || Outbound::new(out).run()).map_err(failed)?;
        running.thread("wg-in", move || Inbound::new(into).run()).map_err(failed)?;
        Ok(running)
    }

    fn thread(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(std::thread::Builder::new().name(name.into()).spawn(work)?);
        Ok(())
    }

    /// Whether this is the device that is wanted, but for its peers, and it is there.
    pub(super) fn serves(&self, tunnel: &WireguardTunnel) -> bool {
        self.device == tunnel.device && self.engine.queue.is_attached()
    }

    /// Takes up the peers as they are wanted now.
    pub(super) fn set_peers(&self, tunnel: &WireguardTunnel) {
        // Only this thread writes.
        let before = self.engine.peers();
        let peers = Peers::of(tunnel, &before, &self.engine.own);
        *self.engine.peers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(peers);
    }

    pub(super) fn silent(&self) -> Vec<PublicKey> {
        let peers = self.engine.peers();
        peers.all().filter(|peer| peer.is_silent()).map(|peer| peer.told.key).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.engine.is_over.store(true, Ordering::Release);
        // A counter of 64 bits is not full.
        let _ = self.engine.over.write(1);
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing more to say.
            let _ = thread.join();
        }
    }
}
