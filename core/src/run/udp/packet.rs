//! IPv4 headers and the Internet checksum: what the tunnel reads of a packet, and the little that it changes.
//!
//! **Source** — RFC 791 (IPv4), RFC 1071 (checksum), RFC 1624 (its incremental update).

use std::net::Ipv4Addr;

/// Shortest header, and the only length without options.
pub(in crate::run) const HEADER_MIN: usize = 20;
/// Longest header with a transport header: both have at most 60 bytes.
pub(in crate::run) const HEADERS_MAX: usize = 120;
/// Protocol numbers (RFC 790).
pub(in crate::run) const ICMP: u8 = 1;
pub(in crate::run) const TCP: u8 = 6;
pub(in crate::run) const UDP: u8 = 17;

const TTL: usize = 8;
const CHECKSUM: usize = 10;
const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;

/// What an IPv4 header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::run) struct Header {
    /// Bytes of the header with its options.
    pub(in crate::run) len: usize,
    /// Bytes of the whole packet.
    pub(in crate::run) total: usize,
    pub(in crate::run) id: u16,
    pub(in crate::run) dont_fragment: bool,
    pub(in crate::run) more_fragments: bool,
    /// Where this fragment begins, in units of eight bytes.
    pub(in crate::run) offset: u16,
    pub(in crate::run) ttl: u8,
    pub(in crate::run) protocol: u8,
    pub(in crate::run) source: Ipv4Addr,
    pub(in crate::run) destination: Ipv4Addr,
}

impl Header {
    /// Reads the header of a packet; none if these bytes are no whole IPv4 packet. Its checksum is the receiver's to verify.
    pub(in crate::run) fn read(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; HEADER_MIN] = packet.first_chunk()?;
        let len = usize::from(fixed[0] & 0x0f) * 4;
        let total = usize::from(be16(fixed, 2));
        if fixed[0] >> 4 != 4 || len < HEADER_MIN || total < len || total > packet.len() {
            return None;
        }
        let fragment = be16(fixed, 6);
        Some(Self {
            len,
            total,
            id: be16(fixed, 4),
            dont_fragment: fragment & DONT_FRAGMENT != 0,
            more_fragments: fragment & MORE_FRAGMENTS != 0,
            offset: fragment & OFFSET,
            ttl: fixed[TTL],
            protocol: fixed[9],
            source: address(fixed, 12),
            destination: address(fixed, 16),
        })
    }

    /// Whether the packet is one of several fragments.
    pub(in crate::run) fn is_fragment(&self) -> bool {
        self.more_fragments || self.offset != 0
    }
}

/// Two bytes in the order of the network.
pub(in crate::run) fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|two| two.try_into().ok()).map_or(0, u16::from_be_bytes)
}

/// Four bytes in the order of the network.
pub(in crate::run) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// Puts two bytes in the order of the network; bytes that are not there are let be.
pub(in crate::run) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(two) = bytes.get_mut(at..at + 2) {
        two.copy_from_slice(&value.to_be_bytes());
    }
}

fn address(bytes: &[u8], at: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(be32(bytes, at))
}

/// The ones' complement sum of 16-bit words, folded to 16 bits and not complemented; an odd last byte is padded. Sums of
/// parts that begin at even places may be added.
pub(in crate::run) fn sum(bytes: &[u8]) -> u32 {
    // The order of the bytes within a word does not matter before the end (RFC 1071 §2 B), nor does the width of the
    // words: lanes of 32 bits with room for the carries are what compilers turn into vector instructions.
    let mut lanes = [0u64; 8];
    let mut blocks = bytes.chunks_exact(32);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(4)) {
            *lane += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        }
    }
    let mut total: u64 = lanes.iter().sum();
    let mut words = blocks.remainder().chunks_exact(2);
    for word in &mut words {
        total += u64::from(u16::from_ne_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u32::from(u16::from_be(total as u16))
}

/// A sum of sums, folded and not complemented.
pub(in crate::run) fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum of the pseudo header that TCP and UDP checksums cover (RFC 9293 §3.1, RFC 768).
pub(in crate::run) fn pseudo(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, length: usize) -> u32 {
    sum(&source.octets()) + sum(&destination.octets()) + u32::from(protocol) + length as u32
}

/// Writes the header's checksum.
pub(in crate::run) fn seal(header: &mut [u8]) {
    put16(header, CHECKSUM, 0);
    let checksum = !fold(sum(header));
    put16(header, CHECKSUM, checksum);
}

/// Takes one from the TTL, and brings the checksum along (RFC 1624: HC' = ~(~HC + ~m + m')).
pub(in crate::run) fn age(packet: &mut [u8]) {
    let (old, checksum) = (be16(packet, TTL), be16(packet, CHECKSUM));
    let new = old.wrapping_sub(0x0100);
    put16(packet, TTL, new);
    put16(packet, CHECKSUM, !fold(u32::from(!checksum) + u32::from(!old) + u32::from(new)));
}

/// Cuts a packet that may be cut into fragments of at most `mtu` bytes (RFC 791 §3.2). Options stay with the first one only as far
/// as their copied flag says; packets with options are rare enough to be cut without that care, and get all of them.
pub(in crate::run) fn fragments(packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
    let Some(header) = Header::read(packet) else { return Vec::new() };
    let room = mtu.saturating_sub(header.len) / 8 * 8;
    if room == 0 {
        return Vec::new();
    }
    let (head, payload) = (&packet[..header.len], &packet[header.len..header.total]);
    let count = payload.len().div_ceil(room);
    let cut = |(n, part): (usize, &[u8])| {
        let mut fragment = [head, part].concat();
        let total = fragment.len() as u16;
        put16(&mut fragment, 2, total);
        let more = if header.more_fragments || n + 1 < count { MORE_FRAGMENTS } else { 0 };
        put16(&mut fragment, 6, more | (header.offset + (n * room / 8) as u16));
        seal(&mut fragment[..header.len]);
        fragment
    };
    payload.chunks(room).enumerate().map(cut).collect()
}

#[cfg(test)]
pub(in crate::run) mod tests {
    use super::*;

    /// A sound packet of a protocol from 10.100.1.2 to 10.100.2.2, its body starting with the transport header.
    pub(in crate::run) fn packet(protocol: u8, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
        packet.extend([10, 100, 1, 2, 10, 100, 2, 2]);
        let total = (packet.len() + body.len()) as u16;
        put16(&mut packet, 2, total);
        put16(&mut packet, 6, flags);
        seal(&mut packet);
        packet.extend(body);
        packet
    }

    fn sound(packet: &[u8]) -> bool {
        let header = Header::read(packet).unwrap();
        header.total == packet.len() && fold(sum(&packet[..header.len])) == 0xffff
    }

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        // §3: "Consider ... 00 01 f2 03 f4 f5 f6 f7": the sum is 2ddf0, which folds to ddf2.
        let example = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&example)), 0xddf2);
        // An odd byte is padded with zero, as §4.1 does.
        assert_eq!(fold(sum(&[0x01, 0x02, 0x03])), 0x0402);
        assert_eq!(sum(&[]), 0);
        // Longer than a block of lanes, against the definition.
        for len in [31, 32, 33, 64, 1471, 65_535] {
            let bytes: Vec<u8> = (0..len).map(|n| (n * 7 + 3) as u8).collect();
            let plain = bytes.chunks(2).fold(0u32, |sum, two| {
                let sum = sum + (u32::from(two[0]) << 8) + u32::from(*two.get(1).unwrap_or(&0));
                (sum & 0xffff) + (sum >> 16)
            });
            assert_eq!(fold(sum(&bytes)), plain as u16, "{len} bytes");
        }
    }

    #[test]
    fn ageing_keeps_the_checksum_right_down_to_zero() {
        let mut aged = packet(UDP, 0, &[0; 8]);
        for ttl in (0..64).rev() {
            age(&mut aged);
            assert!(sound(&aged) && Header::read(&aged).unwrap().ttl == ttl);
        }
        // RFC 1624 §3: the case that the earlier formula gets wrong.
        let (old_checksum, old, new) = (0xdd2fu16, 0x5555u16, 0x3285u16);
        assert_eq!(!fold(u32::from(!old_checksum) + u32::from(!old) + u32::from(new)), 0x0000);
    }

    #[test]
    fn what_is_no_packet_is_not_read() {
        let good = packet(UDP, 0, &[0; 8]);
        assert_eq!(Header::read(&good).unwrap().destination, Ipv4Addr::new(10, 100, 2, 2));
        let broken = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            Header::read(&bytes)
        };
        assert_eq!(broken(0, 0x65), None); // IPv6
        assert_eq!(broken(0, 0x44), None); // a header of 16 bytes
        assert_eq!(broken(3, 19), None); // shorter than its header
        assert_eq!(broken(3, 29), None); // longer than what came
        for len in 0..good.len() {
            assert_eq!(Header::read(&good[..len]), None, "{len} bytes");
        }
        // What follows the packet is not part of it.
        assert_eq!(Header::read(&[&good[..], b"tail"].concat()).unwrap().total, 28);
    }

    #[test]
    fn fragments_are_put_together_to_the_same_packet() {
        let body: Vec<u8> = (0..2000).map(|n| n as u8).collect();
        for (flags, mtu) in [(0, 596), (MORE_FRAGMENTS | 100, 1372), (7, 28)] {
            let whole = packet(UDP, flags, &body);
            let cut = fragments(&whole, mtu);
            let mut seen: Vec<u8> = Vec::new();
            for (n, fragment) in cut.iter().enumerate() {
                let header = Header::read(fragment).unwrap();
                assert!(sound(fragment) && fragment.len() <= mtu);
                assert_eq!(usize::from(header.offset), usize::from(flags & OFFSET) + seen.len() / 8);
                assert_eq!(header.more_fragments, n + 1 < cut.len() || flags & MORE_FRAGMENTS != 0);
                assert_eq!((header.id, header.source), (0x1234, Ipv4Addr::new(10, 100, 1, 2)));
                seen.extend(&fragment[20..]);
            }
            assert!(seen == body && cut.len() > 1);
        }
        assert_eq!(fragments(&packet(UDP, 0, &body), 27), Vec::<Vec<u8>>::new());
    }
}
