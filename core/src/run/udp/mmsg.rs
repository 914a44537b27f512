//! Many datagrams in one call, and many segments in one datagram: sendmmsg and recvmmsg with UDP_SEGMENT and UDP_GRO, for
//! which no safe interface lets every message have a segment size of its own.
//!
//! **Source** — sendmmsg(2), recvmmsg(2), udp(7); uapi/linux/udp.h.

use std::io;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::ops::Range;
use std::os::fd::AsRawFd;

/// The most that one UDP datagram carries over IPv4, also when it is several for the kernel to cut.
pub(super) const DATAGRAM_MAX: usize = 65_535 - 28;
/// Where a datagram, or several put together by the kernel, are received.
pub(super) const SLOT: usize = 65_536;

/// A piece of a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Part {
    pub(super) start: usize,
    pub(super) len: usize,
}

/// One or more datagrams for a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Message {
    pub(super) to: Ipv4Addr,
    /// Which of the parts.
    pub(super) parts: Range<usize>,
    /// Bytes of all datagrams.
    pub(super) size: usize,
    /// How many datagrams.
    pub(super) count: usize,
    /// Bytes of each but the last.
    pub(super) segment: usize,
}

/// One or more datagrams from a peer, in a slot of the buffer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Received {
    pub(super) from: Ipv4Addr,
    pub(super) bytes: Range<usize>,
    /// Bytes of each datagram but the last; if there is only one, at least its own.
    pub(super) segment: usize,
}

/// A control message with a number of two bytes or four, laid out as CMSG_SPACE has it.
#[repr(C)]
struct Control {
    head: libc::cmsghdr,
    value: [u8; 8],
}

impl Control {
    /// Room for one to be received.
    const EMPTY: Self =
        Self { head: libc::cmsghdr { cmsg_len: 0, cmsg_level: 0, cmsg_type: 0 }, value: [0; 8] };

    /// Cut what is sent into datagrams of so many bytes.
    fn segment(size: usize) -> Self {
        let [a, b] = (size as u16).to_ne_bytes();
        let len = size_of::<libc::cmsghdr>() + size_of::<u16>();
        let head =
            libc::cmsghdr { cmsg_len: len as _, cmsg_level: libc::SOL_UDP, cmsg_type: libc::UDP_SEGMENT };
        Self { head, value: [a, b, 0, 0, 0, 0, 0, 0] }
    }

    /// The size of the datagrams that the kernel put together, if it did.
    fn received(&self) -> Option<usize> {
        let [a, b, c, d, ..] = self.value;
        let is_size = self.head.cmsg_level == libc::SOL_UDP && self.head.cmsg_type == libc::UDP_GRO;
        usize::try_from(i32::from_ne_bytes([a, b, c, d])).ok().filter(|size| is_size && *size > 0)
    }
}

/// What the kernel is shown; kept from call to call, so that nothing is allocated on the way.
pub(super) struct Headers {
    heads: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    addresses: Vec<libc::sockaddr_in>,
    controls: Vec<Control>,
}

fn zeroed_head() -> libc::mmsghdr {
    #[expect(
        unsafe_code,
        reason = "a C struct with private padding on some targets; all zeros is its empty value"
    )]
    // SAFETY: mmsghdr holds integers and pointers, for which zero is a valid value.
    unsafe {
        mem::zeroed()
    }
}

fn socket_address(ip: Ipv4Addr, port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: ip.to_bits().to_be() },
        sin_zero: [0; 8],
    }
}

impl Headers {
    pub(super) fn new() -> Self {
        Self { heads: Vec::new(), vectors: Vec::new(), addresses: Vec::new(), controls: Vec::new() }
    }

    fn clear(&mut self) {
        self.heads.clear();
        self.vectors.clear();
        self.addresses.clear();
        self.controls.clear();
    }

    /// Points the headers at their parts, which do not move any more.
    fn link(&mut self, counts: impl Iterator<Item = (usize, bool)>) {
        let mut vector = 0;
        for (n, (count, control)) in counts.enumerate() {
            let mut head = zeroed_head();
            head.msg_hdr.msg_name = (&raw mut self.addresses[n]).cast();
            head.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            head.msg_hdr.msg_iov = &raw mut self.vectors[vector];
            head.msg_hdr.msg_iovlen = count as _;
            if control {
                head.msg_hdr.msg_control = (&raw mut self.controls[n]).cast();
                head.msg_hdr.msg_controllen = size_of::<Control>() as _;
            }
            vector += count;
            self.heads.push(head);
        }
    }

    /// Sends messages to the same port of their peers. Says how many the kernel took, and why it took no more.
    pub(super) fn send(
        &mut self,
        socket: &UdpSocket,
        port: u16,
        buffer: &[u8],
        parts: &[Part],
        messages: &[Message],
    ) -> (usize, Option<io::Error>) {
        self.clear();
        for message in messages {
            self.addresses.push(socket_address(message.to, port));
            self.controls.push(Control::segment(message.segment));
            self.vectors.extend(parts[message.parts.clone()].iter().map(|part| {
                let bytes = &buffer[part.start..part.start + part.len];
                // The kernel only reads; the struct serves both directions.
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
            }));
        }
        self.link(messages.iter().map(|message| (message.parts.len(), message.count > 1)));
        let mut sent = 0;
        while let rest @ [_, ..] = &mut self.heads[sent..] {
            #[expect(unsafe_code, reason = "no safe sendmmsg has a segment size for each message")]
            // SAFETY: every header points at vectors, an address and a control message that outlive the call, and every
            // vector at bytes of `buffer`.
            let result = unsafe {
                libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), rest.len() as libc::c_uint, 0)
            };
            match result {
                n if n > 0 => sent += n as usize,
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return (sent, Some(error)),
                },
            }
        }
        (sent, None)
    }

    /// Receives what is there, without waiting: at most as many messages as the buffer has slots.
    pub(super) fn receive(
        &mut self,
        socket: &UdpSocket,
        buffer: &mut [u8],
        received: &mut Vec<Received>,
    ) -> io::Result<()> {
        self.clear();
        received.clear();
        for slot in buffer.chunks_exact_mut(SLOT) {
            self.addresses.push(socket_address(Ipv4Addr::UNSPECIFIED, 0));
            self.controls.push(Control::EMPTY);
            self.vectors.push(libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() });
        }
        let slots = self.vectors.len();
        self.link((0..slots).map(|_| (1, true)));
        #[expect(unsafe_code, reason = "no safe recvmmsg gives control messages without allocating")]
        // SAFETY: every header points at one vector, an address and room for a control message that outlive the call, and
        // the vectors at slots of `buffer` that do not overlap.
        let result = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.heads.as_mut_ptr(),
                slots as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        for (n, head) in self.heads.iter().take(result as usize).enumerate() {
            let len = (head.msg_len as usize).min(SLOT);
            let controlled = head.msg_hdr.msg_controllen >= size_of::<libc::cmsghdr>() + 4;
            let segment = if controlled { self.controls[n].received() } else { None };
            received.push(Received {
                from: Ipv4Addr::from_bits(u32::from_be(self.addresses[n].sin_addr.s_addr)),
                bytes: n * SLOT..n * SLOT + len,
                segment: segment.unwrap_or(SLOT),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn socket() -> (UdpSocket, u16) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        (socket, port)
    }

    fn received(socket: &UdpSocket, wanted: usize) -> Vec<(Received, Vec<u8>)> {
        let (mut headers, mut buffer, mut all) = (Headers::new(), vec![0; 4 * SLOT], Vec::new());
        for _ in 0..500 {
            let mut some = Vec::new();
            match headers.receive(socket, &mut buffer, &mut some) {
                Ok(()) => all.extend(some.into_iter().map(|r| (r.clone(), buffer[r.bytes.clone()].to_vec()))),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            let bytes: usize = all.iter().map(|(_, bytes)| bytes.len()).sum();
            if bytes >= wanted {
                return all;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("of {wanted} bytes came {all:?}");
    }

    #[test]
    fn parts_arrive_as_datagrams_of_their_own() {
        let ((from, _), (to, port)) = (socket(), socket());
        let buffer: Vec<u8> = (0..100).collect();
        let parts = [Part { start: 0, len: 3 }, Part { start: 50, len: 2 }, Part { start: 99, len: 1 }];
        let message = |parts, size| Message { to: Ipv4Addr::LOCALHOST, parts, size, count: 1, segment: size };
        let (sent, error) =
            Headers::new().send(&from, port, &buffer, &parts, &[message(0..2, 5), message(2..3, 1)]);
        assert!(sent == 2 && error.is_none(), "{sent} {error:?}");
        let all = received(&to, 6);
        assert_eq!(
            all.iter().map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>(),
            [vec![0, 1, 2, 50, 51], vec![99]]
        );
        assert!(all.iter().all(|(one, _)| one.from == Ipv4Addr::LOCALHOST && one.segment == SLOT));
    }

    #[test]
    fn a_message_of_segments_is_cut_and_what_is_put_together_says_so() {
        let ((from, _), (to, port)) = (socket(), socket());
        let buffer: Vec<u8> = (0..250).collect();
        let parts = [Part { start: 0, len: 250 }];
        let message = Message { to: Ipv4Addr::LOCALHOST, parts: 0..1, size: 250, count: 3, segment: 100 };
        let (sent, error) = Headers::new().send(&from, port, &buffer, &parts, std::slice::from_ref(&message));
        assert!(sent == 1 && error.is_none(), "{sent} {error:?}");
        let sizes: Vec<_> = received(&to, 250).iter().map(|(_, bytes)| bytes.len()).collect();
        assert_eq!(sizes, [100, 100, 50]);

        super::super::socket::set_gro(&to).unwrap();
        let (sent, error) = Headers::new().send(&from, port, &buffer, &parts, &[message]);
        assert!(sent == 1 && error.is_none(), "{sent} {error:?}");
        let all = received(&to, 250);
        assert!(all.iter().all(|(one, _)| one.segment == 100), "{all:?}");
    }

    #[test]
    fn what_the_kernel_refuses_is_said_with_its_place() {
        let (from, _) = socket();
        let parts = [Part { start: 0, len: 1 }];
        let message = |to| Message { to, parts: 0..1, size: 1, count: 1, segment: 1 };
        // Broadcast needs a permission that this socket does not have.
        let messages = [message(Ipv4Addr::LOCALHOST), message(Ipv4Addr::BROADCAST)];
        let (sent, error) = Headers::new().send(&from, 9, &[0], &parts, &messages);
        assert_eq!((sent, error.is_some()), (1, true));
    }
}
