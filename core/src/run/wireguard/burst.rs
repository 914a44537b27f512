//! Datagrams on their way out: those of one size to one peer, the last perhaps shorter, are one message to the kernel.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use super::sockets::Sockets;

/// The most that fits into a message, less than a datagram may have (65,507), and the kernel's most segments in one
/// (linux/udp.h `UDP_MAX_SEGMENTS`; kernels before 6.9 take no more than these).
const BYTES_MAX: usize = 65_000;
const SEGMENTS_MAX: usize = 64;
/// Room for one more datagram of any size.
pub(super) const ROOM: usize = 65_536 + 64;

/// What is sent together.
pub(super) struct Burst {
    bytes: Vec<u8>,
    fill: usize,
    count: usize,
    segment: usize,
    closed: bool,
    to: Option<SocketAddr>,
}

impl Burst {
    pub(super) fn new() -> Self {
        let bytes = vec![0; BYTES_MAX + ROOM];
        Self { bytes, fill: 0, count: 0, segment: 0, closed: false, to: None }
    }

    /// Where the next datagram may be written.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.fill..]
    }

    /// Takes the datagram of so many bytes that was written there. What it does not go with is sent first.
    pub(super) fn push(&mut self, len: usize, to: SocketAddr, way: &Way<'_>) -> io::Result<()> {
        let joins = self.to == Some(to)
            && !self.closed
            && len <= self.segment
            && self.count < SEGMENTS_MAX
            && self.fill + len <= BYTES_MAX
            && way.cuts.load(Ordering::Relaxed);
        let mut sent = Ok(());
        if !joins && self.count > 0 {
            let start = self.fill;
            sent = self.send(way);
            self.bytes.copy_within(start..start + len, 0);
        }
        if self.count == 0 {
            (self.to, self.segment, self.closed) = (Some(to), len, false);
        }
        self.closed |= len < self.segment;
        self.fill += len;
        self.count += 1;
        sent
    }

    /// Sends what there is. If the kernel cannot cut it, each datagram is sent by itself.
    pub(super) fn send(&mut self, way: &Way<'_>) -> io::Result<()> {
        let bytes = &self.bytes[..self.fill];
        let (count, segment) = (self.count, self.segment.max(1));
        (self.fill, self.count) = (0, 0);
        let Some(to) = self.to.take().filter(|_| count > 0) else { return Ok(()) };
        if count == 1 {
            return way.sockets.send(bytes, to);
        }
        let Err(error) = way.sockets.send_cut(bytes, segment as u16, to) else { return Ok(()) };
        if error.raw_os_error() == Some(libc::EIO) && way.cuts.swap(false, Ordering::Relaxed) {
            tracing::warn!(
                "the uplink computes no checksums, so the kernel cuts no datagrams for it: sending them one by one"
            );
        }
        let mut result = Ok(());
        for datagram in bytes.chunks(segment) {
            let sent = way.sockets.send(datagram, to);
            result = result.and(sent);
        }
        result
    }
}

/// Where datagrams go.
pub(super) struct Way<'a> {
    pub(super) sockets: &'a Sockets,
    /// Whether the kernel cuts messages into datagrams.
    pub(super) cuts: &'a AtomicBool,
}

#[cfg(test)]
mod tests {
    use super::super::sockets::receive;
    use super::*;

    #[test]
    fn what_goes_together_is_one_message_and_all_of_it_arrives() {
        let free = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (from, to) = (Sockets::open(free()).unwrap(), Sockets::open(free()).unwrap());
        let there = to.v4.local_addr().unwrap().port();
        let there = |host: &str| SocketAddr::new(host.parse().unwrap(), there);
        for cuts in [true, false] {
            let cuts = AtomicBool::new(cuts);
            let way = Way { sockets: &from, cuts: &cuts };
            let mut burst = Burst::new();
            // Three alike, a shorter one that ends them, another run, a longer one, one to elsewhere.
            let lens = [500, 500, 500, 20, 500, 500, 900, 500];
            for (n, len) in lens.into_iter().enumerate() {
                let host = if n == 7 { "127.0.0.2" } else { "127.0.0.1" };
                burst.room()[..len].fill(n as u8);
                burst.push(len, there(host), &way).unwrap();
            }
            burst.send(&way).unwrap();
            burst.send(&way).unwrap();
            let (mut buffer, mut control, mut seen) = (vec![0; 65_536], nix::cmsg_space!(i32), Vec::new());
            while seen.len() < lens.len() {
                let Ok(came) = receive(&to.v4, &mut buffer, &mut control) else { continue };
                seen.extend(buffer[..came.len].chunks(came.segment).map(|one| (one[0], one.len())));
            }
            assert_eq!(seen, lens.into_iter().enumerate().map(|(n, len)| (n as u8, len)).collect::<Vec<_>>());
        }
    }
}
