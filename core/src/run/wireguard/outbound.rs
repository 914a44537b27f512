//! From the device to the peers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use boringtun::noise::TunnResult;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::burst::Burst;
use super::engine::Engine;
use super::peer_table::{Peers, State};
use crate::run::udp::icmp::{self, Limiter, Trouble};
use crate::run::udp::offload::{Large, Request, Transport, VNET_HEADER, complete, template};
use crate::run::udp::packet::{HEADERS_MAX, Header};
use crate::run::udp::shared::Complaint;

/// The largest packet that is read, with what precedes it.
const READ_MAX: usize = VNET_HEADER + 65_536;
/// So many packets are read before what they became is sent.
const READS: usize = 64;

/// The way out.
pub(super) struct Outbound {
    engine: Arc<Engine>,
    buffer: Vec<u8>,
    /// One segment of a large packet.
    segment: Vec<u8>,
    burst: Burst,
    limiter: Limiter,
    unsent: Complaint,
}

impl Outbound {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self {
            engine,
            buffer: vec![0; READ_MAX],
            segment: Vec::with_capacity(2048),
            burst: Burst::new(),
            limiter: Limiter::new(Instant::now()),
            unsent: Complaint::new("wireguard: packets could not be sent"),
        }
    }

    /// Runs until the device is over.
    pub(super) fn run(mut self) {
        while !self.engine.is_over() {
            let (waits, timeout) = match self.turn() {
                Ok(false) => continue,
                Ok(true) => (true, PollTimeout::NONE),
                // The device is gone (EBADFD), or down (EIO): the next pass finds out and mends it.
                Err(_) => (false, PollTimeout::from(20u8)),
            };
            let over = PollFd::new(self.engine.over.as_fd(), PollFlags::POLLIN);
            let mut sources = vec![over];
            if waits {
                sources.push(PollFd::new(self.engine.queue.as_fd(), PollFlags::POLLIN));
            }
            // Errors and interruptions are seen by whoever reads next.
            let _ = poll(&mut sources, timeout);
        }
    }

    /// Reads what is there, and sends it; whether there was no more.
    fn turn(&mut self) -> io::Result<bool> {
        let peers = self.engine.peers();
        let mut ended = Ok(false);
        for _ in 0..READS {
            match self.engine.queue.read(&mut self.buffer) {
                Ok(len) => self.carry(&peers, len),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    ended = if error.kind() == io::ErrorKind::WouldBlock { Ok(true) } else { Err(error) };
                    break;
                }
            }
        }
        let sent = self.burst.send(&self.engine.way());
        self.complain(sent);
        ended
    }

    /// Takes one packet as it was read.
    fn carry(&mut self, peers: &Peers, len: usize) {
        let mut request = Request::Nothing;
        let mut start = 0;
        if self.engine.queue.headers {
            let Some(header) = self.buffer[..len].first_chunk::<VNET_HEADER>() else { return };
            // What we never asked for never comes.
            let Some(read) = Request::read(header) else { return };
            (request, start) = (read, VNET_HEADER);
        }
        let packet = &mut self.buffer[start..len];
        let Some(destination) = destination(packet) else { return };
        // Nobody's: router solicitations, for example.
        let Some(peer) = peers.holder(destination).cloned() else {
            return self.unreachable(peers, start..len);
        };
        let mut state = peer.state();
        let Some(to) = state.endpoint else { return };
        state.called = true;
        match request {
            Request::Nothing => self.send(&mut state, to, start..len),
            Request::Checksum { start: from, at } => {
                if complete(packet, from, at) {
                    self.send(&mut state, to, start..len);
                }
            }
            Request::Segments { transport, size } => self.cut(&mut state, to, start..len, (transport, size)),
        }
    }

    fn send(&mut self, state: &mut State, to: SocketAddr, place: std::ops::Range<usize>) {
        let sealed = state.session.encapsulate(&self.buffer[place], self.burst.room());
        if let TunnResult::WriteToNetwork(datagram) = sealed {
            let len = datagram.len();
            let pushed = self.burst.push(len, to, &self.engine.way());
            self.complain(pushed);
        }
    }

    /// A packet that is larger than what can be sent, as the segments that it stands for.
    fn cut(
        &mut self,
        state: &mut State,
        to: SocketAddr,
        place: std::ops::Range<usize>,
        (transport, size): (Transport, usize),
    ) {
        let packet = &self.buffer[place];
        let Some(header) = Header::read(packet) else { return };
        let Some(large) = Large::new(packet, header, transport, size) else { return };
        let whole = template(packet);
        for index in 0..large.count() {
            let payload = &packet[large.payload(index)];
            let mut head = [0; HEADERS_MAX];
            large.head(&whole, index, payload, &mut head[..large.heads]);
            self.segment.clear();
            self.segment.extend_from_slice(&head[..large.heads]);
            self.segment.extend_from_slice(payload);
            if let TunnResult::WriteToNetwork(datagram) =
                state.session.encapsulate(&self.segment, self.burst.room())
            {
                let len = datagram.len();
                let pushed = self.burst.push(len, to, &self.engine.way());
                if let Err(error) = pushed {
                    self.unsent.more(|| format!("the last one: {error}"));
                }
            }
        }
    }

    /// Tells the sender of a packet that it is for nobody, at most so often.
    fn unreachable(&mut self, peers: &Peers, place: std::ops::Range<usize>) {
        if let Some(address) = peers.address
            && let Some(error) = icmp::error(Trouble::NetUnreachable, address, &self.buffer[place])
            && self.limiter.allows(Instant::now())
        {
            // Nobody is left to be told if this fails.
            let _ = self.engine.queue.write(&error);
        }
    }

    fn complain(&mut self, sent: io::Result<()>) {
        if let Err(error) = sent {
            self.unsent.more(|| format!("the last one: {error}"));
        }
    }
}

/// Where a packet is for; none if it is no whole header of either family.
fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(Ipv4Addr::from(*packet.get(16..20)?.first_chunk::<4>()?).into()),
        6 => Some(Ipv6Addr::from(*packet.get(24..40)?.first_chunk::<16>()?).into()),
        _ => None,
    }
}
