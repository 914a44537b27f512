//! A device that runs: what its threads share, and the two of them.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::WireguardError;
use super::engine::Engine;
use super::inbound::Inbound;
use super::outbound::Outbound;
use crate::words::wireguard::{PublicKey, WireguardDevice, WireguardTunnel};

/// A device that runs until it is dropped.
pub(super) struct Running {
    device: WireguardDevice,
    engine: Arc<Engine>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    pub(super) fn start(tunnel: &WireguardTunnel) -> Result<Self, WireguardError> {
        let engine = Arc::new(Engine::open(tunnel)?);
        let (out, into) = (engine.clone(), engine.clone());
        let mut running = Self { device: tunnel.device.clone(), engine, threads: Vec::new() };
        let failed = |source| WireguardError::Threads { device: tunnel.device.link, source };
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
        self.engine.set_peers(tunnel);
    }

    pub(super) fn silent(&self) -> Vec<PublicKey> {
        let peers = self.engine.peers();
        peers.all().filter(|peer| peer.is_silent()).map(|peer| peer.told.key).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.engine.end();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing more to say.
            let _ = thread.join();
        }
    }
}
