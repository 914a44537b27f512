//! What the kernel leaves to us, and what we leave to it: checksums not yet written, and packets larger than the MTU.
//!
//! **Source** — virtio 1.2 §5.1.6 (`struct virtio_net_hdr`, in the host's byte order as TUN has it); uapi/linux/virtio_net.h.

use std::net::Ipv4Addr;
use std::ops::Range;

use super::packet::{HEADER_MIN, HEADERS_MAX, Header, TCP, UDP, be16, be32, fold, pseudo, put16, seal, sum};

/// Bytes before every packet on a TUN device with IFF_VNET_HDR.
pub(in crate::run) const VNET_HEADER: usize = 10;
/// What precedes a packet that asks for nothing.
pub(in crate::run) const NOTHING: [u8; VNET_HEADER] = [0; VNET_HEADER];

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const TCP_FLAGS: usize = 13;
const FIN: u8 = 0x01;
pub(in crate::run) const PSH: u8 = 0x08;
pub(in crate::run) const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

/// A transport that can be cut into segments and put together again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::run) enum Transport {
    Tcp,
    Udp,
}

/// What the header before a packet from the kernel asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::run) enum Request {
    /// Nothing: send it as it is.
    Nothing,
    /// Write the checksum of what begins at `start` to `at`, both counted from the packet's start.
    Checksum { start: usize, at: usize },
    /// Cut it into segments with `size` bytes of payload.
    Segments { transport: Transport, size: usize },
}

impl Request {
    /// Reads the header; none if it asks for something that we never offered.
    pub(in crate::run) fn read(header: &[u8; VNET_HEADER]) -> Option<Self> {
        let word = |at: usize| usize::from(u16::from_ne_bytes([header[at], header[at + 1]]));
        let transport = match header[1] & !GSO_ECN {
            GSO_NONE if header[0] & NEEDS_CHECKSUM == 0 => return Some(Self::Nothing),
            GSO_NONE => return Some(Self::Checksum { start: word(6), at: word(6) + word(8) }),
            GSO_TCPV4 => Transport::Tcp,
            GSO_UDP_L4 => Transport::Udp,
            _ => return None,
        };
        Some(Self::Segments { transport, size: word(4) }).filter(|_| word(4) > 0)
    }
}

/// Writes a checksum that the kernel left out; where it belongs there is the pseudo header's sum.
pub(in crate::run) fn complete(packet: &mut [u8], start: usize, at: usize) -> bool {
    let Some(covered) = packet.get(start..) else { return false };
    if at < start || at + 2 > packet.len() {
        return false;
    }
    let checksum = !fold(sum(covered));
    // Zero would say "no checksum" in UDP (RFC 768); to TCP both zeros are the same.
    put16(packet, at, if checksum == 0 { 0xffff } else { checksum });
    true
}

/// A packet that is larger than what can be sent, and how it is cut.
#[derive(Clone, Copy, Debug)]
pub(in crate::run) struct Large {
    header: Header,
    transport: Transport,
    /// Bytes of both headers.
    pub(in crate::run) heads: usize,
    /// Bytes of payload in each segment but the last.
    size: usize,
    payload: usize,
}

impl Large {
    /// None if the packet is not what it is said to be.
    pub(in crate::run) fn new(
        packet: &[u8],
        header: Header,
        transport: Transport,
        size: usize,
    ) -> Option<Self> {
        let protocol = match transport {
            Transport::Tcp => TCP,
            Transport::Udp => UDP,
        };
        if header.protocol != protocol || header.is_fragment() || size == 0 {
            return None;
        }
        let heads = header.len + transport_len(packet, &header, transport)?;
        Some(Self { header, transport, heads, size, payload: header.total.checked_sub(heads)? })
    }

    /// How many segments there will be.
    pub(in crate::run) fn count(&self) -> usize {
        self.payload.div_ceil(self.size)
    }

    /// Where the payload of a segment lies in the packet.
    pub(in crate::run) fn payload(&self, index: usize) -> Range<usize> {
        let start = self.heads + index * self.size;
        start..(start + self.size).min(self.heads + self.payload)
    }

    /// Writes the headers of a segment to `head` (as long as both headers), from those of the whole packet.
    pub(in crate::run) fn head(
        &self,
        whole: &[u8; HEADERS_MAX],
        index: usize,
        payload: &[u8],
        head: &mut [u8],
    ) {
        head.copy_from_slice(&whole[..self.heads]);
        let (ip, transport) = head.split_at_mut(self.header.len);
        put16(ip, 2, (self.heads + payload.len()) as u16);
        put16(ip, 4, self.header.id.wrapping_add(index as u16));
        seal(ip);
        let length = transport.len() + payload.len();
        let checksum = match self.transport {
            Transport::Tcp => {
                let sequence = be32(transport, 4).wrapping_add((index * self.size) as u32);
                transport[4..8].copy_from_slice(&sequence.to_be_bytes());
                // What says "this is the end" belongs to the last, what says "I have slowed down" to the first (RFC 3168 §6.1.2).
                if index + 1 < self.count() {
                    transport[TCP_FLAGS] &= !(FIN | PSH);
                }
                if index > 0 {
                    transport[TCP_FLAGS] &= !CWR;
                }
                TCP_CHECKSUM
            }
            Transport::Udp => {
                put16(transport, 4, length as u16);
                UDP_CHECKSUM
            }
        };
        put16(transport, checksum, 0);
        let Header { source, destination, protocol, .. } = self.header;
        let all = pseudo(source, destination, protocol, length) + sum(transport) + sum(payload);
        let value = !fold(all);
        put16(transport, checksum, if value == 0 { 0xffff } else { value });
    }
}

/// Bytes of the transport's header; none if it is not all there.
pub(in crate::run) fn transport_len(packet: &[u8], header: &Header, transport: Transport) -> Option<usize> {
    let body = packet.get(header.len..header.total)?;
    let len = match transport {
        Transport::Tcp => usize::from(body.get(12)? >> 4) * 4,
        Transport::Udp => 8,
    };
    let least = if transport == Transport::Tcp { 20 } else { 8 };
    (len >= least && len <= body.len()).then_some(len)
}

/// Makes the headers of several segments those of one large packet, and returns what to put before it: the checksum field has
/// the pseudo header's sum, and the kernel does the rest if anybody needs it.
pub(in crate::run) fn join(
    heads: &mut [u8],
    ip: usize,
    transport: Transport,
    total: usize,
    size: usize,
) -> [u8; 10] {
    put16(heads, 2, total as u16);
    let (address, length) = (|at: usize| Ipv4Addr::from_bits(be32(heads, at)), total - ip);
    let sum = pseudo(address(12), address(16), heads[9], length);
    let (kind, at) = match transport {
        Transport::Tcp => (GSO_TCPV4, TCP_CHECKSUM),
        Transport::Udp => {
            put16(heads, ip + 4, length as u16);
            (GSO_UDP_L4, UDP_CHECKSUM)
        }
    };
    put16(heads, ip + at, fold(sum));
    seal(&mut heads[..ip]);
    let mut before = NOTHING;
    (before[0], before[1]) = (NEEDS_CHECKSUM, kind);
    for (place, value) in [(2, heads.len()), (4, size), (6, ip), (8, at)] {
        before[place..place + 2].copy_from_slice(&(value as u16).to_ne_bytes());
    }
    before
}

/// Whether a packet's transport checksum is right, and there.
pub(in crate::run) fn is_sound(packet: &[u8], header: &Header) -> bool {
    let Some(body) = packet.get(header.len..header.total) else { return false };
    if header.protocol == UDP && be16(body, UDP_CHECKSUM) == 0 {
        return false;
    }
    let start = pseudo(header.source, header.destination, header.protocol, body.len());
    fold(start + sum(body)) == 0xffff && fold(sum(&packet[..header.len])) == 0xffff
}

/// The longest head there can be, from the packet's start.
pub(in crate::run) fn template(packet: &[u8]) -> [u8; HEADERS_MAX] {
    let mut template = [0; HEADERS_MAX];
    let len = packet.len().min(HEADERS_MAX);
    template[..len].copy_from_slice(&packet[..len]);
    template
}

const _: () = assert!(HEADER_MIN * 6 == HEADERS_MAX);

#[cfg(test)]
pub(in crate::run) mod tests {
    use super::super::packet::tests::packet;
    use super::*;

    /// A TCP segment with a sound checksum.
    pub(in crate::run) fn tcp(sequence: u32, flags: u8, id: u16, payload: &[u8]) -> Vec<u8> {
        let mut body = vec![0x9c, 0x40, 0x14, 0x51];
        body.extend(sequence.to_be_bytes());
        body.extend([0, 0, 0, 7, 0x80, flags, 1, 0, 0, 0, 0, 0]);
        body.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]); // timestamps, as Linux sends them
        body.extend(payload);
        closed(packet(TCP, 0x4000, &body), id, 16)
    }

    /// A UDP datagram with a sound checksum.
    pub(in crate::run) fn udp(id: u16, payload: &[u8]) -> Vec<u8> {
        let mut body = vec![0x9c, 0x40, 0x14, 0x51, 0, 0, 0, 0];
        put16(&mut body, 4, 8 + payload.len() as u16);
        body.extend(payload);
        closed(packet(UDP, 0, &body), id, 6)
    }

    fn closed(mut packet: Vec<u8>, id: u16, checksum: usize) -> Vec<u8> {
        put16(&mut packet, 4, id);
        seal(&mut packet[..20]);
        let header = Header::read(&packet).unwrap();
        let start = pseudo(header.source, header.destination, header.protocol, packet.len() - 20);
        put16(&mut packet, 20 + checksum, fold(start));
        assert!(complete(&mut packet, 20, 20 + checksum));
        packet
    }

    fn cut(packet: &[u8], transport: Transport, size: usize) -> Vec<Vec<u8>> {
        let large = Large::new(packet, Header::read(packet).unwrap(), transport, size).unwrap();
        let whole = template(packet);
        let segment = |index: usize| {
            let payload = &packet[large.payload(index)];
            let mut head = vec![0; large.heads];
            large.head(&whole, index, payload, &mut head);
            [&head[..], payload].concat()
        };
        (0..large.count()).map(segment).collect()
    }

    #[test]
    fn segments_are_what_the_sender_would_have_sent() {
        let payload: Vec<u8> = (0..5000u32).map(|n| (n % 251) as u8).collect();
        let whole = tcp(u32::MAX - 1000, ACK | PSH | FIN | CWR, 0xffff, &payload);
        let segments = cut(&whole, Transport::Tcp, 1420);
        assert_eq!(segments.iter().map(Vec::len).collect::<Vec<_>>(), [1472, 1472, 1472, 792]);
        for (n, segment) in segments.iter().enumerate() {
            let header = Header::read(segment).unwrap();
            assert!(is_sound(segment, &header) && header.total == segment.len() && header.dont_fragment);
            let flags = match n {
                0 => ACK | CWR,
                3 => ACK | PSH | FIN,
                _ => ACK,
            };
            // The same headers as if each had been sent by itself.
            let start = n * 1420;
            let sequence = (u32::MAX - 1000).wrapping_add(start as u32);
            let id = 0xffffu16.wrapping_add(n as u16);
            assert_eq!(segment, &tcp(sequence, flags, id, &payload[start..(start + 1420).min(5000)]));
        }
        let whole = udp(5, &payload);
        let datagrams = cut(&whole, Transport::Udp, 1000);
        for (n, datagram) in datagrams.iter().enumerate() {
            assert_eq!(datagram, &udp(5 + n as u16, &payload[n * 1000..(n + 1) * 1000]));
        }
        assert_eq!(datagrams.len(), 5);
    }

    #[test]
    fn what_is_no_large_packet_is_not_cut() {
        let refused = |packet: &[u8], transport| {
            Large::new(packet, Header::read(packet).unwrap(), transport, 1000).is_none()
        };
        assert!(refused(&udp(1, &[0; 99]), Transport::Tcp));
        assert!(refused(&packet(TCP, 0x2000, &tcp(1, ACK, 1, &[0; 99])[20..]), Transport::Tcp));
        let mut short = tcp(1, ACK, 1, &[0; 99]);
        short[32] = 0x40; // a TCP header of 16 bytes
        assert!(refused(&short, Transport::Tcp));
        short[32] = 0xf0;
        assert!(!refused(&short, Transport::Tcp));
        assert!(refused(&packet(TCP, 0, &tcp(1, ACK, 1, &[])[20..39]), Transport::Tcp));
    }

    #[test]
    fn requests_are_read_as_virtio_has_them() {
        let header = |flags: u8, kind: u8, size: u16, start: u16, offset: u16| {
            let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0];
            for (at, value) in [(4, size), (6, start), (8, offset)] {
                header[at..at + 2].copy_from_slice(&value.to_ne_bytes());
            }
            Request::read(&header)
        };
        assert_eq!(header(0, 0, 0, 0, 0), Some(Request::Nothing));
        assert_eq!(header(1, 0, 0, 20, 16), Some(Request::Checksum { start: 20, at: 36 }));
        let segments = |transport| Some(Request::Segments { transport, size: 1420 });
        assert_eq!(header(1, 1, 1420, 20, 16), segments(Transport::Tcp));
        assert_eq!(header(1, 0x81, 1420, 20, 16), segments(Transport::Tcp));
        assert_eq!(header(1, 5, 1420, 20, 6), segments(Transport::Udp));
        assert_eq!(header(1, 1, 0, 20, 16), None);
        assert_eq!(header(1, 4, 1420, 40, 16), None); // TCP over IPv6
        let mut short = udp(1, &[1]);
        assert!(!complete(&mut short, 20, 28) && !complete(&mut short, 30, 20));
    }
}
