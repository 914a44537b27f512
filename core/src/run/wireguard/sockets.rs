//! The UDP sockets of a device: one for each family, on the same port, as the kernel's WireGuard has them.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn6,
    SockaddrStorage, bind, recvmsg, sendmsg, setsockopt, socket, sockopt,
};

/// Room for what arrives while the thread is elsewhere, and for what waits to leave: some milliseconds at 10 Gb/s.
const BUFFER_BYTES: usize = 8 << 20;

/// The sockets.
pub(super) struct Sockets {
    pub(super) v4: UdpSocket,
    /// None on a host without IPv6.
    pub(super) v6: Option<UdpSocket>,
}

/// A message that came: where from, how many bytes, and of how many bytes its datagrams are.
pub(super) struct Received {
    pub(super) from: SocketAddr,
    pub(super) len: usize,
    pub(super) segment: usize,
}

impl Sockets {
    pub(super) fn open(port: u16) -> io::Result<Self> {
        let v4 = UdpSocket::bind(("0.0.0.0", port))?;
        let v6 = match open_v6(port) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
                None
            }
            opened => Some(opened?),
        };
        let sockets = Self { v4, v6 };
        sockets.all().try_for_each(prepare)?;
        Ok(sockets)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &UdpSocket> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    fn to(&self, to: SocketAddr) -> io::Result<&UdpSocket> {
        match to.ip() {
            IpAddr::V4(_) => Ok(&self.v4),
            IpAddr::V6(_) => self.v6.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
        }
    }

    /// Sends one datagram.
    pub(super) fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.to(to)?.send_to(datagram, to).map(|_| ())
    }

    /// Sends datagrams of one size, the last perhaps shorter, as one message.
    pub(super) fn send_cut(&self, bytes: &[u8], segment: u16, to: SocketAddr) -> io::Result<()> {
        let cut = [ControlMessage::UdpGsoSegments(&segment)];
        let address = SockaddrStorage::from(to);
        let socket = self.to(to)?.as_raw_fd();
        sendmsg(socket, &[IoSlice::new(bytes)], &cut, MsgFlags::empty(), Some(&address))?;
        Ok(())
    }
}

/// Receives what is there, without waiting: one message, of several datagrams if the kernel put them together.
pub(super) fn receive(socket: &UdpSocket, buffer: &mut [u8], control: &mut [u8]) -> io::Result<Received> {
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let came = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(control), flags)?;
    let from = came.address.and_then(|from| {
        let v4 = from.as_sockaddr_in().map(|v4| SocketAddr::from((v4.ip(), v4.port())));
        v4.or_else(|| {
            from.as_sockaddr_in6().map(|v6: &SockaddrIn6| SocketAddr::from(std::net::SocketAddrV6::from(*v6)))
        })
    });
    let len = came.bytes;
    let segment = came.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok().filter(|size| *size > 0),
        _ => None,
    });
    let from = from.ok_or(io::ErrorKind::InvalidData)?;
    Ok(Received { from, len, segment: segment.unwrap_or_else(|| len.max(1)) })
}

/// Options that a socket needs before it is bound can be set through no interface of the standard library.
fn open_v6(port: u16) -> io::Result<UdpSocket> {
    let fd: OwnedFd = socket(AddressFamily::Inet6, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    let any = std::net::SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
    bind(fd.as_raw_fd(), &SockaddrIn6::from(any))?;
    Ok(fd.into())
}

fn prepare(socket: &UdpSocket) -> io::Result<()> {
    // Needs CAP_NET_ADMIN, as the device does; less is no reason to stop.
    let _ = setsockopt(socket, sockopt::RcvBufForce, &BUFFER_BYTES);
    let _ = setsockopt(socket, sockopt::SndBufForce, &BUFFER_BYTES);
    // Older kernels put nothing together.
    let _ = setsockopt(socket, sockopt::UdpGroSegment, &true);
    // As the kernel's WireGuard: what is too large for the path is fragmented, not refused.
    let v6 = socket.local_addr()?.is_ipv6();
    let (level, name) = match v6 {
        false => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        true => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    };
    crate::run::udp::socket::set_int(socket, level, name, libc::IP_PMTUDISC_DONT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_share_a_port_and_pieces_arrive_as_they_were_sent() {
        let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let sockets = Sockets::open(port).unwrap();
        assert!(Sockets::open(port).is_err(), "nobody else gets the port");
        let (mut buffer, mut control) = (vec![0; 65_536], nix::cmsg_space!(i32));
        let mut places = vec![(&sockets.v4, "127.0.0.1")];
        places.extend(sockets.v6.iter().map(|v6| (v6, "::1")));
        for (socket, host) in places {
            let to = SocketAddr::new(host.parse().unwrap(), port);
            sockets.send(b"one", to).unwrap();
            sockets.send_cut(&[7; 250], 100, to).unwrap();
            let mut sizes = Vec::new();
            while sizes.len() < 4 {
                let Ok(came) = receive(socket, &mut buffer, &mut control) else { continue };
                assert_eq!(came.from, to);
                sizes.extend(buffer[..came.len].chunks(came.segment).map(<[u8]>::len));
            }
            assert_eq!(sizes, [3, 100, 100, 50]);
        }
    }
}
