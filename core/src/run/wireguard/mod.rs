//! WireGuard devices of this program's own, for kernels that have none: packets between a TUN device and UDP sockets, by threads of
//! this process.
//!
//! **Shape** — a TUN device with the name and the address that the kernel's would have. One thread takes packets out of it, finds
//! the peer, encrypts, and sends many at once; another receives, decrypts, checks that the sender may send from where it does,
//! puts segments together and writes; it also turns the peers' clocks. The protocol is the crate boringtun's; everything that touches the
//! system is here and in the udp backend's files, whose device it shares.
//! **Wire** — WireGuard as the kernel speaks it: hosts with and without the module understand each other.
//! **Life** — device, sockets and sessions go with this process. A new one greets every peer at once, so that packets flow again
//! before the first of them is missed.

mod burst;
mod engine;
mod inbound;
mod memory;
mod outbound;
mod peer_table;
mod running;
mod sockets;

use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

use boringtun::x25519;

use self::memory::{Memory, peers};
use self::running::Running;
use super::settings::AgentSettings;
use super::udp::device::CONTROL;
use crate::act::pass::chain;
use crate::decide::plan::Plan;
use crate::touch::wireguard_key;
use crate::touch::world::WorldError;
use crate::touch::world::kernel::Kernel;
use crate::words::code::Code;
use crate::words::config::{BackendConfig, NetworkConfig};
use crate::words::fact::Facts;
use crate::words::name::LinkName;
use crate::words::report::Finding;
use crate::words::units::Port;
use crate::words::wireguard::{KeyPair, PublicKey, SecretKey, WireguardTunnel};

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireguardError {
    /// The kernel gives no TUN device.
    #[error(
        "this kernel has no WireGuard, and {CONTROL} cannot be opened: load a module (modprobe wireguard, or modprobe tun)"
    )]
    Control(#[source] io::Error),
    /// Somebody else has a device of this name.
    #[error("there is another interface {0}; if nobody uses it: ip link del {0}")]
    Taken(LinkName),
    /// The device cannot be made.
    #[error("could not make the TUN device {device}")]
    Device {
        /// Its name.
        device: LinkName,
        /// What the system said.
        source: io::Error,
    },
    /// The port cannot be had.
    #[error(
        "could not receive on UDP port {port}; Backend.ListenPort and ListenPortV6 in the network config choose the ports"
    )]
    Socket {
        /// The port.
        port: Port,
        /// What the system said.
        source: io::Error,
    },
    /// No thread.
    #[error("could not start the threads of {device}")]
    Threads {
        /// The device.
        device: LinkName,
        /// What the system said.
        source: io::Error,
    },
}

/// This host's keys, made now if there are none.
pub(super) fn keys(settings: &AgentSettings) -> Result<KeyPair, Finding> {
    wireguard_key::load(&settings.wireguard_key, &settings.state_dir, &settings.network)
        .map(|secret| KeyPair { public: public_key(&secret), secret })
        .map_err(|error| Finding::new(Code::WIREGUARD_KEY_BROKEN, chain(&error)))
}

/// What peers know the owner of a secret key by.
fn public_key(secret: &SecretKey) -> PublicKey {
    let secret = x25519::StaticSecret::from(*secret.reveal());
    PublicKey(x25519::PublicKey::from(&secret).to_bytes())
}

/// What of a network is WireGuard's, from one pass to the next.
#[derive(Default)]
pub(super) struct Wireguard {
    carrier: Carrier,
    memory: Memory,
    /// Whether the kernel has WireGuard: asked once, because a change of that needs other devices.
    in_kernel: Option<bool>,
}

impl Wireguard {
    /// Whether the kernel has WireGuard, if that is wanted: asking loads a module.
    pub(super) fn is_in(&mut self, kernel: &mut Kernel, config: &NetworkConfig) -> Result<bool, WorldError> {
        if !matches!(config.backend, BackendConfig::Wireguard(_)) {
            return Ok(false);
        }
        match self.in_kernel {
            Some(known) => Ok(known),
            None => Ok(*self.in_kernel.insert(kernel.has_wireguard()?)),
        }
    }

    /// Has this program's devices be as a plan wants them, before its facts can be true; and lets peers of the kernel's be where they
    /// have gone to.
    pub(super) fn carry(&mut self, plan: &mut Plan) -> Result<(), WireguardError> {
        self.carrier.carry(&plan.wireguard)?;
        self.memory.let_roam(&mut plan.facts);
        Ok(())
    }

    /// Ends the devices that a plan does not want, once its facts are true.
    pub(super) fn keep_only(&mut self, plan: &Plan) {
        self.carrier.keep_only(&plan.wireguard);
    }

    /// A plan's facts are in the kernel: remembers what that was told, and adds to the findings who does not answer.
    pub(super) fn told(&mut self, kernel: &Kernel, facts: &Facts, plan: &mut Plan) {
        self.memory.told(facts);
        let mut silent = self.carrier.silent();
        silent.extend(kernel.silent_wireguard_peers());
        let tunnels = plan.wireguard.iter().flat_map(|tunnel| &tunnel.peers);
        let findings = self.memory.findings(peers(facts).chain(tunnels), &silent, Instant::now());
        plan.findings.extend(findings);
    }

    /// Ends all devices.
    pub(super) fn stop(&mut self) {
        self.carrier.keep_only(&[]);
    }
}

/// The devices of a network that this program is, if any. They end when this is dropped.
#[derive(Default)]
struct Carrier {
    running: BTreeMap<LinkName, Running>,
    told: bool,
}

impl Carrier {
    /// Has the devices be as they are wanted now. What changed of the peers is taken up at once, and who stays keeps its session; another
    /// key or port, or a device that somebody removed, need a new device.
    fn carry(&mut self, tunnels: &[WireguardTunnel]) -> Result<(), WireguardError> {
        for tunnel in tunnels {
            let link = tunnel.device.link;
            if let Some(running) = self.running.get(&link).filter(|running| running.serves(tunnel)) {
                running.set_peers(tunnel);
                continue;
            }
            if !std::mem::replace(&mut self.told, true) {
                tracing::warn!(
                    "this kernel has no WireGuard: this program encrypts by itself, slower, and while it runs; better: modprobe wireguard, \
                     then restart"
                );
            }
            self.running.remove(&link);
            self.running.insert(link, Running::start(tunnel)?);
        }
        Ok(())
    }

    /// Ends the devices that are not wanted any more.
    fn keep_only(&mut self, tunnels: &[WireguardTunnel]) {
        self.running.retain(|link, _| tunnels.iter().any(|tunnel| tunnel.device.link == *link));
    }

    /// Peers that were sent something and never agreed on a session.
    fn silent(&self) -> Vec<(LinkName, PublicKey)> {
        let all = self.running.iter();
        all.flat_map(|(link, running)| running.silent().into_iter().map(|key| (*link, key))).collect()
    }
}
