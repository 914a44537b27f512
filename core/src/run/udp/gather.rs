//! Packets on their way in: segments of one flow that follow each other become one large packet for the kernel.
//!
//! What comes out of the kernel's own cutting is the same packets again: everything in the headers must be equal but what a
//! sequence of segments changes. Packets of one flow never overtake each other.

use std::io::{self, IoSlice};
use std::ops::Range;

use super::device::{Offload, Queue};
use super::offload::{ACK, PSH, Transport, VNET_HEADER, is_sound, join, template, transport_len};
use super::packet::{HEADERS_MAX, Header, TCP, UDP, be16, be32};

/// So many flows may be open at once; a longer search would cost more than it saves.
const OPEN_MAX: usize = 8;
/// Largest packet that is put together, and most segments of it.
const TOTAL_MAX: usize = 65_535;
const SEGMENTS_MAX: usize = 128;

/// A packet, or several put together.
struct Entry {
    header: Header,
    /// Bytes of both headers, if the packet can be joined by others.
    heads: usize,
    joinable: Option<Joinable>,
    /// Where the packet, and then the payloads of those that joined it, lie in the buffer.
    first: Range<usize>,
    more: Vec<Range<usize>>,
    /// Bytes of all payloads.
    payload: usize,
    /// Whether one that joined is to be handed to the application at once (PSH).
    pushed: bool,
}

/// What the next one must be like.
#[derive(Clone, Copy)]
struct Joinable {
    transport: Transport,
    /// Bytes of payload of each but the last.
    size: usize,
    /// Sequence number of the next (TCP).
    next: u32,
    /// Whether another may follow: not after one with PSH, nor after a shorter one.
    open: bool,
}

/// What is written together.
pub(in crate::run) struct Gather {
    offload: Offload,
    entries: Vec<Entry>,
}

impl Gather {
    pub(in crate::run) fn new(offload: Offload) -> Self {
        Self { offload, entries: Vec::new() }
    }

    /// Takes a packet that lies in the buffer. Its TTL is right already.
    pub(in crate::run) fn push(&mut self, buffer: &[u8], place: Range<usize>, header: Header) {
        let packet = &buffer[place.clone()];
        let joinable = self.joinable(packet, &header);
        if let Some((new, heads)) = joinable
            && let Some(entry) = self.latest_of_flow(buffer, packet, &header)
            && entry.takes(buffer, packet, &header, &new, heads)
        {
            entry.join(place.start + heads..place.start + header.total, &new);
            return;
        }
        let (joinable, heads) = joinable.map_or((None, 0), |(joinable, heads)| (Some(joinable), heads));
        let payload = header.total - heads;
        let first = place.start..place.start + header.total;
        self.entries.push(Entry { header, heads, joinable, first, more: Vec::new(), payload, pushed: false });
    }

    /// The newest entry of the packet's flow, if it is not too far back.
    fn latest_of_flow(&mut self, buffer: &[u8], packet: &[u8], header: &Header) -> Option<&mut Entry> {
        let ports = packet.get(header.len..header.len + 4)?;
        self.entries.iter_mut().rev().take(OPEN_MAX).find(|entry| {
            let theirs = &buffer[entry.first.clone()];
            entry.header.source == header.source
                && entry.header.destination == header.destination
                && entry.header.protocol == header.protocol
                && theirs.get(entry.header.len..entry.header.len + 4) == Some(ports)
        })
    }

    /// Whether others may join a packet or it may join others.
    fn joinable(&self, packet: &[u8], header: &Header) -> Option<(Joinable, usize)> {
        let transport = match header.protocol {
            TCP if self.offload >= Offload::Tcp => Transport::Tcp,
            UDP if self.offload >= Offload::TcpAndUdp => Transport::Udp,
            _ => return None,
        };
        if header.is_fragment() || header.len != 20 {
            return None;
        }
        let heads = header.len + transport_len(packet, header, transport)?;
        let size = header.total - heads;
        let body = &packet[header.len..];
        let (next, open) = match transport {
            Transport::Tcp if body[13] & !PSH != ACK => return None,
            Transport::Tcp => (be32(body, 4).wrapping_add(size as u32), body[13] & PSH == 0),
            Transport::Udp if usize::from(be16(body, 4)) != header.total - header.len => return None,
            Transport::Udp => (0, true),
        };
        let joinable = Joinable { transport, size, next, open };
        (size > 0 && is_sound(packet, header)).then_some((joinable, heads))
    }

    /// Writes everything to the device. The first error is returned, after the rest was tried.
    pub(in crate::run) fn flush(&mut self, buffer: &[u8], queue: &Queue) -> io::Result<()> {
        let mut result = Ok(());
        for entry in self.entries.drain(..) {
            let written = entry.write(buffer, queue);
            result = result.and(written);
        }
        result
    }
}

impl Entry {
    /// Whether a packet is the next segment.
    fn takes(&self, buffer: &[u8], packet: &[u8], header: &Header, new: &Joinable, heads: usize) -> bool {
        let Some(state) = &self.joinable else { return false };
        let segments = self.more.len() + 1;
        let first = &buffer[self.first.clone()];
        let same_ip = first[1] == packet[1] // type of service, with its congestion bits
            && self.header.ttl == header.ttl
            && self.header.dont_fragment == header.dont_fragment
            // An identification means something only where there may be fragments (RFC 6864 §4.1).
            && (header.dont_fragment || header.id == self.header.id.wrapping_add(segments as u16));
        let same_transport = match state.transport {
            Transport::Tcp => {
                let (ours, theirs) = (&first[self.header.len..self.heads], &packet[header.len..heads]);
                let sequence = be32(theirs, 4) == state.next;
                // Acknowledgement, length and window; then options. Not the flags, of which PSH may differ.
                let same = ours[8..13] == theirs[8..13] && ours[14..16] == theirs[14..16];
                sequence && same && ours[18..] == theirs[18..]
            }
            Transport::Udp => true,
        };
        state.open
            && heads == self.heads
            && new.transport == state.transport
            && new.size <= state.size
            && segments < SEGMENTS_MAX
            && self.heads + self.payload + new.size <= TOTAL_MAX
            && same_ip
            && same_transport
    }

    fn join(&mut self, payload: Range<usize>, new: &Joinable) {
        self.payload += payload.len();
        self.more.push(payload);
        self.pushed |= !new.open;
        if let Some(state) = &mut self.joinable {
            state.next = new.next;
            state.open &= new.open && new.size == state.size;
        }
    }

    fn write(&self, buffer: &[u8], queue: &Queue) -> io::Result<()> {
        let first = &buffer[self.first.clone()];
        let Some((state, false)) = self.joinable.map(|state| (state, self.more.is_empty())) else {
            return queue.write(first);
        };
        let (heads, before) = self.joined_heads(first, &state);
        let mut parts = Vec::with_capacity(3 + self.more.len());
        parts.extend([IoSlice::new(&before), IoSlice::new(&heads[..self.heads])]);
        parts.push(IoSlice::new(&first[self.heads..]));
        parts.extend(self.more.iter().map(|payload| IoSlice::new(&buffer[payload.clone()])));
        match queue.write_parts(&parts) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.write_singly(buffer, queue),
            written => written,
        }
    }

    /// The headers of all in one, and what precedes them.
    fn joined_heads(&self, first: &[u8], state: &Joinable) -> ([u8; HEADERS_MAX], [u8; VNET_HEADER]) {
        let mut heads = template(first);
        if self.pushed && state.transport == Transport::Tcp {
            heads[self.header.len + 13] |= PSH;
        }
        let total = self.heads + self.payload;
        let before = join(&mut heads[..self.heads], self.header.len, state.transport, total, state.size);
        (heads, before)
    }

    /// As they came: the headers of those that joined still precede their payloads.
    fn write_singly(&self, buffer: &[u8], queue: &Queue) -> io::Result<()> {
        let mut result = queue.write(&buffer[self.first.clone()]);
        for payload in &self.more {
            let written = queue.write(&buffer[payload.start - self.heads..payload.end]);
            result = result.and(written);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::super::offload::Large;
    use super::super::offload::tests::{tcp, udp};
    use super::super::packet::{fold, put16, seal, sum};
    use super::*;

    const FIN: u8 = 1;

    /// What comes out for what went in, as whole packets; large ones cut again as the kernel would.
    fn through(offload: Offload, packets: &[Vec<u8>]) -> (usize, Vec<Vec<u8>>) {
        let buffer = packets.concat();
        let mut gather = Gather::new(offload);
        let mut start = 0;
        for packet in packets {
            gather.push(&buffer, start..start + packet.len(), Header::read(packet).unwrap());
            start += packet.len();
        }
        let cut = |entry: &Entry| -> Vec<Vec<u8>> {
            let first = &buffer[entry.first.clone()];
            let Some(state) = entry.joinable.filter(|_| !entry.more.is_empty()) else {
                return vec![first.to_vec()];
            };
            let (heads, before) = entry.joined_heads(first, &state);
            let mut whole = heads[..entry.heads].to_vec();
            whole.extend(&first[entry.heads..]);
            whole.extend(entry.more.iter().flat_map(|payload| &buffer[payload.clone()]));
            assert_eq!(fold(sum(&whole[..20])), 0xffff);
            assert_eq!(before[0], 1);
            let header = Header::read(&whole).unwrap();
            assert_eq!(header.total, whole.len());
            let large = Large::new(&whole, header, state.transport, state.size).unwrap();
            let all = template(&whole);
            let segment = |index: usize| {
                let payload = &whole[large.payload(index)];
                let mut head = vec![0; large.heads];
                large.head(&all, index, payload, &mut head);
                [&head[..], payload].concat()
            };
            (0..large.count()).map(segment).collect()
        };
        let out: Vec<_> = gather.entries.iter().map(cut).collect();
        (out.len(), out.concat())
    }

    #[test]
    fn segments_in_sequence_become_one_and_come_apart_the_same() {
        let data = [7u8; 1000];
        let run = [
            tcp(100, ACK, 1, &data),
            tcp(1100, ACK, 2, &data),
            tcp(2100, ACK, 3, &data),
            tcp(3100, ACK | PSH, 4, &data[..10]),
        ];
        assert_eq!(through(Offload::Tcp, &run), (1, run.to_vec()));
        assert_eq!(through(Offload::Checksums, &run), (4, run.to_vec()));
        let run = [udp(1, &data), udp(2, &data), udp(3, &data[..7])];
        assert_eq!(through(Offload::TcpAndUdp, &run), (1, run.to_vec()));
        assert_eq!(through(Offload::Tcp, &run), (3, run.to_vec()));
    }

    #[test]
    fn what_differs_in_more_than_sequence_stays_apart() {
        let data = [7u8; 100];
        let first = tcp(100, ACK, 1, &data);
        let changed = |at: usize, to: u8| {
            let mut next = tcp(200, ACK, 2, &data);
            let old = next[at];
            next[at] = to;
            // The checksums follow.
            seal(&mut next[..20]);
            if at >= 20 {
                let word =
                    |byte: u8| if at.is_multiple_of(2) { u32::from(byte) << 8 } else { u32::from(byte) };
                let sum = u32::from(!be16(&next, 36)) + u32::from(!(word(old) as u16)) + word(to);
                put16(&mut next, 36, !fold(sum));
            }
            assert!(is_sound(&next, &Header::read(&next).unwrap()), "byte {at}");
            next
        };
        let followers = [
            ("a gap", tcp(201, ACK, 2, &data)),
            ("a retransmission", tcp(100, ACK, 2, &data)),
            ("the end", tcp(200, ACK | FIN, 2, &data)),
            ("no acknowledgement", tcp(200, 0, 2, &data)),
            ("no payload", tcp(200, ACK, 2, &[])),
            ("a longer one", tcp(200, ACK, 2, &[7; 101])),
            ("type of service", changed(1, 2)),
            ("TTL", changed(8, 63)),
            ("fragments allowed", changed(6, 0)),
            ("a port", changed(21, 0x41)),
            ("acknowledgement", changed(31, 9)),
            ("window", changed(34, 2)),
            ("timestamps", changed(47, 9)),
        ];
        for (why, next) in followers {
            let both = [first.clone(), next];
            assert_eq!(through(Offload::TcpAndUdp, &both), (2, both.to_vec()), "{why}");
        }
        // The control: unchanged it joins.
        let both = [first.clone(), changed(8, 64)];
        assert_eq!(through(Offload::TcpAndUdp, &both), (1, both.to_vec()));
        // A broken checksum is carried on for the receiver to see.
        let mut broken = tcp(200, ACK, 2, &data);
        broken[60] ^= 1;
        let both = [first, broken];
        assert_eq!(through(Offload::TcpAndUdp, &both), (2, both.to_vec()));
        // UDP without a checksum, and one whose identification jumps where it counts.
        let mut unsummed = udp(2, &data);
        put16(&mut unsummed, 26, 0);
        for next in [unsummed, udp(9, &data)] {
            let both = [udp(1, &data), next];
            assert_eq!(through(Offload::TcpAndUdp, &both), (2, both.to_vec()));
        }
    }

    #[test]
    fn flows_join_across_each_other_and_none_is_overtaken_by_itself() {
        let data = [7u8; 100];
        let other = |sequence: u32, id: u16| {
            let mut packet = tcp(sequence, ACK, id, &data);
            // Two bytes whose sum stays the same: another source, another port.
            (packet[15], packet[21]) = (packet[15] + 1, packet[21] - 1);
            seal(&mut packet[..20]);
            packet
        };
        let mixed = [tcp(100, ACK, 1, &data), other(500, 1), tcp(200, ACK, 2, &data), other(600, 2)];
        let (count, out) = through(Offload::Tcp, &mixed);
        assert_eq!(count, 2);
        assert_eq!(out, [mixed[0].clone(), mixed[2].clone(), mixed[1].clone(), mixed[3].clone()]);
        // What follows a packet that could not join does not go past it.
        let closed = [
            tcp(100, ACK, 1, &data),
            tcp(200, ACK | FIN, 2, &[]),
            tcp(200, ACK, 3, &data),
            tcp(300, ACK, 4, &data),
        ];
        let (count, out) = through(Offload::Tcp, &closed);
        assert_eq!((count, out), (3, closed.to_vec()));
    }

    #[test]
    fn nothing_grows_beyond_a_packet() {
        let data = [7u8; 1420];
        let long: Vec<_> = (0..100u16).map(|n| tcp(u32::from(n) * 1420, ACK, n, &data)).collect();
        let (count, out) = through(Offload::Tcp, &long);
        assert_eq!((count, out == long), (3, true));
        let small: Vec<_> = (0..200u16).map(|n| tcp(u32::from(n), ACK, n, &[1])).collect();
        assert_eq!(through(Offload::Tcp, &small).0, 2);
    }
}
