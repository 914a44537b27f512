//! Datagrams on their way out: several of one size to one peer are one message to the kernel.
//!
//! The buffer has room for the heads of segments first, then for packets as they were read. A datagram is a head and a
//! payload, or a packet as it is; nothing is copied but heads.

use std::net::Ipv4Addr;
use std::ops::Range;

use super::mmsg::{DATAGRAM_MAX, Message, Part};
use super::offload::VNET_HEADER;

/// Room for heads: four times those of a packet of 64 KiB in segments of 1,400 bytes.
const HEADS: usize = 16 * 1024;
/// The largest packet that is read, with what precedes it.
pub(super) const READ_MAX: usize = VNET_HEADER + 65_536;
/// Room for packets.
const PACKETS: usize = 4 * READ_MAX;
/// Most segments in a message (linux/udp.h `UDP_MAX_SEGMENTS`; kernels before 6.9 take no more than these).
const SEGMENTS_MAX: usize = 64;
/// Most messages and parts in a batch.
const MESSAGES_MAX: usize = 64;
const PARTS_MAX: usize = 1024;

/// What is sent together.
pub(super) struct Batch {
    pub(super) buffer: Vec<u8>,
    heads: usize,
    fill: usize,
    pub(super) parts: Vec<Part>,
    pub(super) messages: Vec<Message>,
}

impl Batch {
    pub(super) fn new() -> Self {
        let (parts, messages) = (Vec::with_capacity(PARTS_MAX), Vec::with_capacity(MESSAGES_MAX));
        Self { buffer: vec![0; HEADS + PACKETS], heads: 0, fill: HEADS, parts, messages }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.sent();
        self.fill = HEADS;
    }

    /// Forgets what was sent; packets that were read stay where they are.
    pub(super) fn sent(&mut self) {
        self.heads = 0;
        self.parts.clear();
        self.messages.clear();
    }

    /// Where the next packet is read to; none while there is no room for the largest.
    pub(super) fn room(&self) -> Option<Range<usize>> {
        Some(self.fill..self.fill + READ_MAX).filter(|room| room.end <= self.buffer.len())
    }

    /// So many bytes were read there.
    pub(super) fn filled(&mut self, bytes: usize) {
        self.fill += bytes.min(READ_MAX);
    }

    /// Whether one more datagram with a head of so many bytes can be taken before what is there must be sent.
    pub(super) fn takes(&self, head: usize) -> bool {
        self.messages.len() < MESSAGES_MAX && self.parts.len() + 2 <= PARTS_MAX && self.heads + head <= HEADS
    }

    /// Room for the head of the datagram that is pushed next.
    pub(super) fn reserve_head(&mut self, len: usize) -> Range<usize> {
        let start = self.heads;
        self.heads += len;
        start..self.heads
    }

    /// The heads, and the packets with the place in the buffer of the first of their bytes.
    pub(super) fn split(&mut self) -> (&mut [u8], usize, &mut [u8]) {
        let (heads, packets) = self.buffer.split_at_mut(HEADS);
        (heads, HEADS, packets)
    }

    /// Takes a datagram for a peer: one or two places in the buffer. With `together` it joins the message before it
    /// where the kernel can tell them apart again: all of one size, only the last one shorter.
    pub(super) fn push(&mut self, to: Ipv4Addr, places: &[Range<usize>], together: bool) {
        let size: usize = places.iter().map(ExactSizeIterator::len).sum();
        let first = self.parts.len();
        self.parts.extend(places.iter().map(|place| Part { start: place.start, len: place.len() }));
        let end = self.parts.len();
        if let Some(last) = self.messages.last_mut()
            && together
            && last.to == to
            && last.size == last.count * last.segment
            && size <= last.segment
            && size > 0
            && last.count < SEGMENTS_MAX
            && last.size + size <= DATAGRAM_MAX
        {
            (last.parts.end, last.size, last.count) = (end, last.size + size, last.count + 1);
            return;
        }
        self.messages.push(Message { to, parts: first..end, size, count: 1, segment: size });
    }

    /// The bytes of a datagram of a message, in one piece.
    pub(super) fn datagram(&self, message: &Message, index: usize) -> Vec<u8> {
        let whole: Vec<u8> = self.parts[message.parts.clone()]
            .iter()
            .flat_map(|part| &self.buffer[part.start..part.start + part.len])
            .copied()
            .collect();
        whole.chunks(message.segment.max(1)).nth(index).map(<[u8]>::to_vec).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 12);
    const B: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 13);

    fn pushed(sizes: &[(Ipv4Addr, usize)], together: bool) -> Vec<(u8, usize, usize, usize)> {
        let mut batch = Batch::new();
        for (to, size) in sizes {
            assert!(batch.takes(0));
            let place = HEADS..HEADS + size;
            batch.push(*to, std::slice::from_ref(&place), together);
        }
        let shown = |m: &Message| (m.to.octets()[3], m.count, m.segment, m.size);
        batch.messages.iter().map(shown).collect()
    }

    #[test]
    fn datagrams_of_one_size_to_one_peer_go_together() {
        assert_eq!(
            pushed(&[(A, 100), (A, 100), (A, 60), (A, 60), (B, 60), (A, 70)], true),
            [(12, 3, 100, 260), (12, 1, 60, 60), (13, 1, 60, 60), (12, 1, 70, 70)]
        );
        assert_eq!(pushed(&[(A, 100), (A, 100)], false), [(12, 1, 100, 100), (12, 1, 100, 100)]);
        // The kernel's limits: so many datagrams, so many bytes.
        assert_eq!(pushed(&[(A, 10); 65], true), [(12, 64, 10, 640), (12, 1, 10, 10)]);
        assert_eq!(pushed(&[(A, 1472); 45], true), [(12, 44, 1472, 64_768), (12, 1, 1472, 1472)]);
    }

    #[test]
    fn a_datagram_can_be_had_back() {
        let mut batch = Batch::new();
        for (n, byte) in batch.buffer.iter_mut().enumerate() {
            *byte = n as u8;
        }
        let head = batch.reserve_head(3);
        batch.push(A, &[head, 20_000..20_004], true);
        let head = batch.reserve_head(3);
        batch.push(A, &[head, 20_004..20_006], true);
        let message = batch.messages[0].clone();
        assert_eq!(batch.datagram(&message, 0), [0, 1, 2, 32, 33, 34, 35]);
        assert_eq!(batch.datagram(&message, 1), [3, 4, 5, 36, 37]);
        batch.clear();
        assert!(batch.messages.is_empty() && batch.parts.is_empty());
    }

    #[test]
    fn room_ends_where_the_largest_packet_would_not_fit() {
        let mut batch = Batch::new();
        let mut reads = 0;
        while batch.room().is_some() {
            batch.filled(READ_MAX);
            reads += 1;
        }
        assert_eq!(reads, 4);
        batch.clear();
        assert!(batch.room().is_some());
    }
}
