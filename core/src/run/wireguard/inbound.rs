//! From the peers to the device, and the peers' clocks.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, TunnResult};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::engine::Engine;
use super::peer_table::{Peer, Peers};
use super::sockets::receive;
use crate::run::udp::gather::Gather;
use crate::run::udp::packet::Header;
use crate::run::udp::shared::Complaint;

/// How often the peers' clocks are turned.
const TICK: Duration = Duration::from_millis(250);
/// What is counted against floods begins anew.
const COUNTING: Duration = Duration::from_secs(1);
/// So many messages are received before the other socket and the clocks have their turn.
const MESSAGES: usize = 16;
/// The largest message, and what comes out of one.
const MESSAGE_MAX: usize = 65_536;
const PLAIN_MAX: usize = 2 * MESSAGE_MAX;
/// Kinds of message (its paper, §5.4): the two of a handshake, and who is too busy for one.
const FIRST: u8 = 1;
const ANSWER: u8 = 2;
const COOKIE: u8 = 3;
/// What a handshake, a cookie or a keepalive takes.
const ANSWER_MAX: usize = 2048;

/// The way in.
pub(super) struct Inbound {
    engine: Arc<Engine>,
    cipher: Vec<u8>,
    control: Vec<u8>,
    plain: Plain,
    answer: Vec<u8>,
    spoofed: Complaint,
    broken: Complaint,
    unsent: Complaint,
}

/// Packets that were decrypted and not yet written.
struct Plain {
    bytes: Vec<u8>,
    fill: usize,
    gather: Gather,
    /// Where packets lie that nothing joins: those of IPv6.
    whole: Vec<Range<usize>>,
    refused: Complaint,
}

/// What became of a datagram.
enum Came {
    /// It was sound, and is answered with this many bytes in the buffer for that.
    Answered(usize),
    /// It was sound, and brought nothing: the peer has a session now.
    Empty,
    /// It was sound, and nothing more is to be done.
    Taken,
    /// It was dropped.
    Dropped,
}

impl Inbound {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        let gather = Gather::new(engine.offload);
        let refused = Complaint::new("wireguard: packets that the device did not take");
        Self {
            engine,
            cipher: vec![0; MESSAGE_MAX],
            control: nix::cmsg_space!(i32),
            plain: Plain { bytes: vec![0; PLAIN_MAX], fill: 0, gather, whole: Vec::new(), refused },
            answer: vec![0; ANSWER_MAX],
            spoofed: Complaint::new("wireguard: packets dropped that are not from their sender's subnets"),
            broken: Complaint::new(
                "wireguard: answers that could not be decrypted (does that host have another PSK?)",
            ),
            unsent: Complaint::new("wireguard: answers could not be sent"),
        }
    }

    /// Runs until the device is over.
    pub(super) fn run(mut self) {
        let (mut tick, mut second) = (Instant::now(), Instant::now());
        while !self.engine.is_over() {
            let now = Instant::now();
            if now >= tick {
                self.tick(now);
                tick = now + TICK;
            }
            if now >= second {
                self.engine.own.limiter.reset_count();
                second = now + COUNTING;
            }
            if !self.turn() {
                self.wait(tick);
            }
        }
    }

    fn wait(&self, until: Instant) {
        let over = PollFd::new(self.engine.over.as_fd(), PollFlags::POLLIN);
        let mut sources = vec![over];
        sources
            .extend(self.engine.sockets.all().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up, or the last millisecond would be spent asking. Errors are seen by whoever reads next.
        let left = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        let _ = poll(&mut sources, PollTimeout::from(left));
    }

    /// Receives what is there; whether there was anything.
    fn turn(&mut self) -> bool {
        let engine = self.engine.clone();
        let peers = engine.peers();
        let mut any = false;
        for socket in engine.sockets.all() {
            for _ in 0..MESSAGES {
                let mut cipher = std::mem::take(&mut self.cipher);
                let received = receive(socket, &mut cipher, &mut self.control);
                if let Ok(received) = &received {
                    any = true;
                    for datagram in cipher[..received.len].chunks(received.segment) {
                        self.take(&peers, datagram, received.from);
                    }
                    self.plain.write(&engine);
                }
                self.cipher = cipher;
                match received {
                    // Errors that the network reported for what was sent earlier are read away.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    _ => {}
                }
            }
        }
        any
    }

    fn take(&mut self, peers: &Peers, datagram: &[u8], from: SocketAddr) {
        let Some(peer) = self.sender(peers, datagram, from) else { return };
        match self.open(peers, &peer, datagram, from) {
            Came::Dropped | Came::Taken => {}
            Came::Empty => self.send_waiting(&peer, from),
            Came::Answered(len) => {
                self.send(len, from);
                self.send_waiting(&peer, from);
            }
        }
    }

    /// Whose datagram it says it is. A first message is opened for that, if it was made for us.
    fn sender(&mut self, peers: &Peers, datagram: &[u8], from: SocketAddr) -> Option<Arc<Peer>> {
        let own = &self.engine.own;
        let mut cookie = [0; 64];
        let packet = match own.limiter.verify_packet(Some(from.ip()), datagram, &mut cookie) {
            Ok(packet) => packet,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                let sent = self.engine.sockets.send(cookie, from);
                self.complain(sent);
                return None;
            }
            // Noise, or not for our key.
            Err(_) => return None,
        };
        match packet {
            Packet::HandshakeInit(init) => {
                let half = parse_handshake_anon(&own.secret, &own.public, &init).ok()?;
                let peer = peers.of_key(&half.peer_static_public).cloned();
                if peer.is_none() {
                    // Who has just joined may be faster than its lease.
                    tracing::debug!("wireguard: a handshake of nobody who holds a lease, from {from}");
                }
                peer
            }
            Packet::HandshakeResponse(response) => peers.of_session(response.receiver_idx).cloned(),
            Packet::PacketCookieReply(reply) => peers.of_session(reply.receiver_idx).cloned(),
            Packet::PacketData(data) => peers.of_session(data.receiver_idx).cloned(),
        }
    }

    /// Opens a datagram of a peer. A sound one says where the peer is now.
    fn open(&mut self, peers: &Peers, peer: &Arc<Peer>, datagram: &[u8], from: SocketAddr) -> Came {
        if self.plain.bytes.len() - self.plain.fill < datagram.len().max(ANSWER_MAX) {
            self.plain.write(&self.engine);
        }
        let start = self.plain.fill;
        let kind = datagram.first().copied().unwrap_or_default();
        let mut state = peer.state();
        let opened = state.session.decapsulate(Some(from.ip()), datagram, &mut self.plain.bytes[start..]);
        let (came, source) = match opened {
            TunnResult::Done => (Came::Empty, None),
            TunnResult::WriteToNetwork(answer) => {
                self.answer[..answer.len()].copy_from_slice(answer);
                (Came::Answered(answer.len()), None)
            }
            TunnResult::WriteToTunnelV4(packet, source) => {
                (Came::Taken, Some((packet.len(), IpAddr::from(source))))
            }
            TunnResult::WriteToTunnelV6(packet, source) => {
                (Came::Taken, Some((packet.len(), IpAddr::from(source))))
            }
            TunnResult::Err(error) => {
                // Data of a session that is over, or that came twice, is no news.
                if kind == ANSWER && matches!(error, WireGuardError::InvalidAeadTag) {
                    self.broken.more(|| format!("the last one: {from}"));
                }
                return Came::Dropped;
            }
        };
        // One that only says who is too busy to answer proves nothing.
        let busy = matches!(came, Came::Answered(_)) && self.answer.first() == Some(&COOKIE);
        if !busy && kind != COOKIE {
            state.endpoint = Some(from);
            // A first message comes from who knows our key, not from who knows what is shared.
            state.met |= kind != FIRST;
        }
        drop(state);
        if let Some((len, source)) = source {
            match peers.holder(source) {
                Some(holder) if Arc::ptr_eq(holder, peer) => self.plain.push(len),
                _ => self.spoofed.more(|| format!("the last one: {source}, by {from}")),
            }
        }
        came
    }

    /// What waited for a session is sent, now that there is one.
    fn send_waiting(&mut self, peer: &Peer, to: SocketAddr) {
        loop {
            let sealed =
                match peer.state().session.decapsulate(None, &[], &mut self.plain.bytes[self.plain.fill..]) {
                    TunnResult::WriteToNetwork(datagram) => self.engine.sockets.send(datagram, to),
                    _ => return,
                };
            self.complain(sealed);
        }
    }

    fn send(&mut self, len: usize, to: SocketAddr) {
        let sent = self.engine.sockets.send(&self.answer[..len], to);
        self.complain(sent);
    }

    fn tick(&mut self, now: Instant) {
        let peers = self.engine.peers();
        for peer in peers.all() {
            if let Some((packet, to)) = peer.tick(now, &mut self.answer) {
                let sent = self.engine.sockets.send(packet, to);
                self.complain(sent);
            }
        }
    }

    fn complain(&mut self, sent: io::Result<()>) {
        if let Err(error) = sent {
            self.unsent.more(|| format!("the last one: {error}"));
        }
    }
}

impl Plain {
    /// Takes the packet of so many bytes that was written at the end.
    fn push(&mut self, len: usize) {
        let place = self.fill..self.fill + len;
        match Header::read(&self.bytes[place.clone()]) {
            Some(header) => self.gather.push(&self.bytes, place.clone(), header),
            None => self.whole.push(place.clone()),
        }
        self.fill = place.end;
    }

    /// Hands everything to the device.
    fn write(&mut self, engine: &Engine) {
        let mut written = self.gather.flush(&self.bytes, &engine.queue);
        for place in self.whole.drain(..) {
            let one = engine.queue.write(&self.bytes[place]);
            written = written.and(one);
        }
        if let Err(error) = written {
            self.refused.more(|| format!("the last one: {error}"));
        }
        self.fill = 0;
    }
}

#[cfg(test)]
mod tests {
    use boringtun::noise::Tunn;
    use boringtun::x25519;

    use super::super::peer_table::tests::tunnel;
    use super::super::peer_table::{Own, Peers};
    use super::*;
    use crate::words::secret::Secret;

    /// Two devices without a TUN device or sockets: what the one's peer says is what the other's hears.
    fn shake_hands(shared: [Option<[u8; 32]>; 2]) -> (Arc<Peer>, bool) {
        let mut told = tunnel(1, &[(2, "192.0.2.2:51820", &["10.100.2.0/24"])]);
        told.peers[0].shared = shared[0].map(Secret::new);
        let own = Own::new(&told);
        let peers = Peers::of(&told, &Peers::default(), &own);
        let peer = peers.all().next().unwrap().clone();
        let secret = x25519::StaticSecret::from([2; 32]);
        let mut other = Tunn::new(secret, own.public, shared[1], None, 7, None);
        let (mut buffer, mut answer, mut last) =
            (vec![0; ANSWER_MAX], vec![0; ANSWER_MAX], vec![0; ANSWER_MAX]);
        let (first, to) = peer.tick(Instant::now(), &mut buffer).unwrap();
        assert_eq!((first[0], to.to_string().as_str()), (FIRST, "192.0.2.2:51820"));
        let TunnResult::WriteToNetwork(second) = other.decapsulate(None, first, &mut answer) else {
            panic!("no answer");
        };
        let met = matches!(
            peer.state().session.decapsulate(None, second, &mut last),
            TunnResult::WriteToNetwork(_)
        );
        (peer, met)
    }

    #[test]
    fn a_new_peer_is_greeted_and_the_same_psk_makes_a_session() {
        assert!(shake_hands([None, None]).1);
        assert!(shake_hands([Some([5; 32]), Some([5; 32])]).1);
        assert!(!shake_hands([Some([5; 32]), Some([6; 32])]).1);
        assert!(!shake_hands([Some([5; 32]), None]).1);
    }

    #[test]
    fn greetings_end_and_silence_is_of_those_who_were_called() {
        let (peer, _) = shake_hands([Some([5; 32]), None]);
        let mut buffer = vec![0; ANSWER_MAX];
        let start = Instant::now();
        let greeted =
            |after: u64, buffer: &mut [u8]| peer.tick(start + Duration::from_millis(after), buffer).is_some();
        assert!(!greeted(100, &mut buffer));
        assert_eq!((1..20).filter(|n| greeted(n * 1100, &mut buffer)).count(), 4);
        assert!(!peer.is_silent());
        peer.state().called = true;
        assert!(peer.is_silent());
        peer.state().met = true;
        assert!(!peer.is_silent());
    }
}
