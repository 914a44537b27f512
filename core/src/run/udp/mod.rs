//! The data path of the udp backend: packets between a TUN device and UDP sockets, by threads of this process.
//!
//! **Shape** — a queue of the device and a socket make a lane, with one thread that takes turns at both ways. Out: read a batch,
//! look up the holder, cut what the kernel left uncut, send it as few messages. In: receive a batch, check that the sender holds
//! the source's subnet, put segments together, write. What the kernel cannot do is found by trying, at the start, and then done
//! without: one packet for each call in the end.
//! **Wire** — a datagram is exactly one IPv4 packet; its TTL is one less after either end (upstream pkg/backend/udp).
//! **Life** — device and sockets are open files and nothing else: whatever happens to this process, they go with it.

mod batch;
pub(super) mod device;
pub(super) mod gather;
pub(super) mod icmp;
mod inbound;
mod mmsg;
pub(super) mod offload;
mod outbound;
pub(super) mod packet;
mod route_table;
pub(super) mod shared;
pub(super) mod socket;
mod ways;

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::thread::JoinHandle;

use self::device::{CONTROL, Offload, Queue, Refused};
use self::route_table::RouteTable;
use self::shared::{Lane, Mode, Shared};
use crate::words::name::LinkName;
use crate::words::tunnel::Tunnel;
use crate::words::units::Port;

/// More queues than this were never measured to help.
const QUEUES_MAX: usize = 4;
/// Packets in a batch.
const READS: usize = 64;
const SLOTS: usize = 8;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(super) enum UdpError {
    /// The kernel gives no TUN device.
    #[error(
        "could not open {CONTROL}; load the module (modprobe tun), or let this program have the device file"
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
    #[error("could not receive on {address}; Backend.Port in the network config chooses the port")]
    Socket {
        /// Address and port.
        address: SocketAddrV4,
        /// What the system said.
        source: io::Error,
    },
    /// No thread.
    #[error("could not start the tunnel's threads")]
    Threads(#[source] io::Error),
}

/// The tunnel of a network, if it has one. Ends when dropped.
pub(super) struct Carrier {
    offload: bool,
    running: Option<Running>,
}

/// A tunnel that carries packets.
struct Running {
    device: LinkName,
    local: Ipv4Addr,
    port: Port,
    /// The first one.
    queue: Option<Arc<Queue>>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Carrier {
    /// None yet. Without `offload` every packet is one call, whatever the kernel has.
    pub(super) const fn new(offload: bool) -> Self {
        Self { offload, running: None }
    }

    /// Has a tunnel carry packets as it is wanted now. Changed leases are taken up at once; another address or port, or a
    /// device that somebody removed, need a new device.
    pub(super) fn carry(&mut self, tunnel: &Tunnel) -> Result<(), UdpError> {
        let table = RouteTable::of(tunnel);
        match &self.running {
            Some(running) if running.serves(tunnel) => running.shared.set_table(table),
            _ => {
                self.stop();
                self.running = Some(Running::start(tunnel, table, self.offload)?);
            }
        }
        Ok(())
    }

    /// Ends the tunnel, and with it the device.
    pub(super) fn stop(&mut self) {
        self.running = None;
    }
}

impl Running {
    fn start(tunnel: &Tunnel, table: RouteTable, offload: bool) -> Result<Self, UdpError> {
        let Tunnel { device, local, port, .. } = *tunnel;
        let address = SocketAddrV4::new(local, port.number());
        let queues = open_queues(device, if offload { queues() } else { 1 }, offload)?;
        let failed = |source| UdpError::Socket { address, source };
        let sockets = socket::open(address, queues.len()).map_err(failed)?;
        let mode = Mode {
            offload: queues
                .iter()
                .map(|queue| queue.offload(Offload::TcpAndUdp))
                .min()
                .unwrap_or(Offload::Nothing),
            gso: offload && sockets.iter().all(socket::has_gso),
            gro: offload && sockets.iter().all(|socket| socket::set_gro(socket).is_ok()),
            reads: if offload { READS } else { 1 },
            slots: if offload { SLOTS } else { 1 },
            queues: queues.len(),
        };
        tracing::info!(
            "udp tunnel {device} on {address}: {} queues, the device's offload: {:?}, segments out: {}, in: {}, batches of {}",
            mode.queues,
            mode.offload,
            mode.gso,
            mode.gro,
            mode.reads
        );
        let shared = Arc::new(Shared::new(table).map_err(|errno| UdpError::Threads(errno.into()))?);
        let lanes: Vec<Lane> = queues
            .into_iter()
            .zip(sockets)
            .map(|(queue, socket)| Lane {
                shared: shared.clone(),
                queue: Arc::new(queue),
                socket: Arc::new(socket),
                port: port.number(),
                mode,
            })
            .collect();
        let queue = lanes.first().map(|lane| lane.queue.clone());
        let mut running = Self { device, local, port, queue, shared, threads: Vec::new() };
        for (n, lane) in lanes.into_iter().enumerate() {
            running.thread(format!("udp-{n}"), move || ways::run(&lane))?;
        }
        Ok(running)
    }

    fn thread(&mut self, name: String, work: impl FnOnce() + Send + 'static) -> Result<(), UdpError> {
        let thread = std::thread::Builder::new().name(name).spawn(work).map_err(UdpError::Threads)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Whether this is the tunnel that is wanted, but for the leases, and its device is there.
    fn serves(&self, tunnel: &Tunnel) -> bool {
        let wanted = (tunnel.device, tunnel.local, tunnel.port);
        (self.device, self.local, self.port) == wanted
            && self.queue.as_ref().is_some_and(|queue| queue.is_attached())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.end();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing more to say.
            let _ = thread.join();
        }
    }
}

fn queues() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get().min(QUEUES_MAX))
}

/// Opens the device with as many queues as wanted and possible. What a kernel without them does not have is left out.
fn open_queues(device: LinkName, wanted: usize, headers: bool) -> Result<Vec<Queue>, UdpError> {
    let failed = |source: io::Error| match Refused::of(&source) {
        Refused::Control => UdpError::Control(source),
        Refused::Taken => UdpError::Taken(device),
        Refused::Other => UdpError::Device { device, source },
    };
    let first = match Queue::create(device, wanted > 1, headers) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let plain = Queue::create(device, false, false).map_err(failed)?;
            return Ok(vec![plain]);
        }
        first => first.map_err(failed)?,
    };
    let mut queues = vec![first];
    while queues.len() < wanted {
        match Queue::another(device, headers) {
            Ok(queue) => queues.push(queue),
            // A few less are no harm.
            Err(_) => break,
        }
    }
    Ok(queues)
}
