//! ICMP errors that a router owes to senders: no route, TTL at its end, packet too big.
//!
//! **Source** — RFC 792 (formats), RFC 1191 §4 (next-hop MTU), RFC 1122 §3.2.2 and RFC 1812 §4.3.2.7 (when not to send one).

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::packet::{HEADER_MIN, Header, ICMP, fold, put16, seal, sum};

/// What was wrong with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::run) enum Trouble {
    /// Nobody holds its destination: type 3, code 0.
    NetUnreachable,
    /// It would have to be fragmented and must not be: type 3, code 4. The largest packet that passes, in bytes.
    TooBig(u16),
    /// Its TTL is used up: type 11, code 0.
    TimeExceeded,
}

/// So much of the offender follows its header.
const QUOTED: usize = 8;
const TTL: u8 = 64;

/// The error for a packet, from `address`; none where none may be sent.
pub(in crate::run) fn error(trouble: Trouble, address: Ipv4Addr, offender: &[u8]) -> Option<Vec<u8>> {
    let header = Header::read(offender)?;
    if !deserves(&header, offender) {
        return None;
    }
    let quoted = &offender[..header.total.min(header.len + QUOTED)];
    let (kind, code, mtu) = match trouble {
        Trouble::NetUnreachable => (3, 0, 0),
        Trouble::TooBig(mtu) => (3, 4, mtu),
        Trouble::TimeExceeded => (11, 0, 0),
    };
    let total = HEADER_MIN + 8 + quoted.len();
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, TTL, ICMP, 0, 0];
    packet.extend(address.octets());
    packet.extend(header.source.octets());
    put16(&mut packet, 2, total as u16);
    seal(&mut packet);
    packet.extend([kind, code, 0, 0, 0, 0, 0, 0]);
    put16(&mut packet, HEADER_MIN + 6, mtu);
    packet.extend(quoted);
    let checksum = !fold(sum(&packet[HEADER_MIN..]));
    put16(&mut packet, HEADER_MIN + 2, checksum);
    Some(packet)
}

/// No error about an error, about a later fragment, about what was sent to many, or to nobody in particular.
fn deserves(header: &Header, offender: &[u8]) -> bool {
    const ERRORS: [u8; 5] = [3, 4, 5, 11, 12];
    let about_error =
        header.protocol == ICMP && offender.get(header.len).is_none_or(|kind| ERRORS.contains(kind));
    let to_many = header.destination.is_multicast() || header.destination.is_broadcast();
    let source = header.source;
    let from_one =
        !(source.is_unspecified() || source.is_loopback() || source.is_multicast() || source.is_broadcast());
    !about_error && header.offset == 0 && !to_many && from_one
}

/// Keeps the number of errors low (RFC 1812 §4.3.2.8): so many at once, and so many a second.
#[derive(Debug)]
pub(in crate::run) struct Limiter {
    left: u32,
    since: Instant,
}

impl Limiter {
    const BURST: u32 = 100;
    const SECOND: Duration = Duration::from_secs(1);

    pub(in crate::run) fn new(now: Instant) -> Self {
        Self { left: Self::BURST, since: now }
    }

    /// Whether one more may be sent.
    pub(in crate::run) fn allows(&mut self, now: Instant) -> bool {
        if now.duration_since(self.since) >= Self::SECOND {
            *self = Self::new(now);
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::{TCP, UDP, be16, tests::packet};
    use super::*;

    const TUN: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 0);

    #[test]
    fn errors_are_those_of_rfc_792_and_1191() {
        let offender = packet(TCP, 0x4000, &[9; 40]);
        for (trouble, kind, code, mtu) in [
            (Trouble::NetUnreachable, 3, 0, 0),
            (Trouble::TooBig(1372), 3, 4, 1372),
            (Trouble::TimeExceeded, 11, 0, 0),
        ] {
            let sent = error(trouble, TUN, &offender).unwrap();
            let header = Header::read(&sent).unwrap();
            assert_eq!((header.source, header.destination), (TUN, Ipv4Addr::new(10, 100, 1, 2)));
            assert_eq!((header.protocol, header.total), (ICMP, sent.len()));
            assert_eq!((sent[20], sent[21], be16(&sent, 26)), (kind, code, mtu));
            // The offender's header and the first 64 bits of what it carries.
            assert_eq!(sent[28..], offender[..28]);
            assert!(fold(sum(&sent[..20])) == 0xffff && fold(sum(&sent[20..])) == 0xffff);
        }
        // An offender shorter than that is quoted whole.
        assert_eq!(error(Trouble::TimeExceeded, TUN, &packet(UDP, 0, &[1, 2])).unwrap().len(), 20 + 8 + 22);
    }

    #[test]
    fn no_error_where_rfc_1122_forbids_it() {
        let about = |packet: &[u8]| error(Trouble::NetUnreachable, TUN, packet);
        for kind in [3, 4, 5, 11, 12] {
            assert_eq!(about(&packet(ICMP, 0, &[kind, 0, 0, 0])), None, "ICMP type {kind}");
        }
        assert!(about(&packet(ICMP, 0, &[8, 0, 0, 0])).is_some());
        assert_eq!(about(&packet(ICMP, 0, &[])), None);
        // The first fragment earns one, later ones do not.
        assert!(about(&packet(UDP, 0x2000, &[0; 16])).is_some());
        assert_eq!(about(&packet(UDP, 1, &[0; 16])), None);
        for (at, address) in [(16, [224, 0, 0, 5]), (16, [255; 4]), (12, [0; 4]), (12, [127, 0, 0, 1])] {
            let mut to_many = packet(UDP, 0, &[0; 8]);
            to_many[at..at + 4].copy_from_slice(&address);
            assert_eq!(about(&to_many), None, "{address:?} at {at}");
        }
        assert_eq!(about(b"no packet"), None);
    }

    #[test]
    fn a_flood_is_answered_a_hundred_times_a_second() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        assert_eq!((0..1000).filter(|_| limiter.allows(start)).count(), 100);
        assert_eq!((0..1000).filter(|_| limiter.allows(start + Duration::from_secs(1))).count(), 100);
    }
}
