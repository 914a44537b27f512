//! The UDP sockets: one for each queue, on the same address and port.
//!
//! The kernel gives all datagrams of one peer to the same socket, by a hash over addresses and ports, so that no packet
//! overtakes another of its peer.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use nix::sys::socket::{setsockopt, sockopt};

/// Room for what arrives while the thread is elsewhere, and for what waits to leave: some milliseconds at 10 Gb/s.
const BUFFER_BYTES: usize = 8 << 20;

/// Opens them. Fails if anybody else has the port; none of ours keeps it from our own.
pub(super) fn open(address: SocketAddrV4, count: usize) -> io::Result<Vec<UdpSocket>> {
    let first = UdpSocket::bind(address)?;
    // Only now, so that the bind above tells whether the port was free.
    setsockopt(&first, sockopt::ReusePort, &true)?;
    let mut sockets = vec![first];
    while sockets.len() < count {
        sockets.push(another(address)?);
    }
    for socket in &sockets {
        prepare(socket)?;
    }
    Ok(sockets)
}

/// Options that a socket needs before it is bound can be set through no interface of the standard library.
fn another(address: SocketAddrV4) -> io::Result<UdpSocket> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, socket};
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReusePort, &true)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn::from(address))?;
    Ok(fd.into())
}

fn prepare(socket: &UdpSocket) -> io::Result<()> {
    // Needs CAP_NET_ADMIN, as the device does; less is no reason to stop.
    let _ = setsockopt(socket, sockopt::RcvBufForce, &BUFFER_BYTES);
    let _ = setsockopt(socket, sockopt::SndBufForce, &BUFFER_BYTES);
    // Datagrams are never fragmented on the way: whoever sends too much for the path is told (RFC 1191).
    set_int(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
}

/// Has the kernel put datagrams of a peer together.
pub(super) fn set_gro(socket: &UdpSocket) -> io::Result<()> {
    set_int(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Whether the kernel can cut what is sent: knows of UDP_SEGMENT (Linux 4.18).
pub(super) fn has_gso(socket: &UdpSocket) -> bool {
    set_int(socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
}

/// The largest IPv4 packet that the path to an address carries, as far as the kernel knows.
pub(super) fn path_mtu(to: Ipv4Addr, port: u16) -> io::Result<usize> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect((to, port))?;
    let mtu = get_int(&socket, libc::IPPROTO_IP, libc::IP_MTU)?;
    usize::try_from(mtu).map_err(io::Error::other)
}

pub(in crate::run) fn set_int(
    socket: &UdpSocket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    #[expect(unsafe_code, reason = "options that no safe interface has")]
    // SAFETY: the value is an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(socket),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn get_int(socket: &UdpSocket, level: libc::c_int, name: libc::c_int) -> io::Result<libc::c_int> {
    let (mut value, mut len) = (0 as libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
    #[expect(unsafe_code, reason = "options that no safe interface has")]
    // SAFETY: value and length outlive the call, and the length is the value's.
    let result = unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(socket),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_sockets_share_a_port_that_nobody_else_gets() {
        let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let sockets = open(address, 3).unwrap();
        assert_eq!(sockets.len(), 3);
        // Also not somebody who would share.
        assert_eq!(open(address, 3).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(sockets);
        assert!(open(address, 1).is_ok());
    }

    #[test]
    fn the_path_to_ourselves_is_the_loopbacks() {
        assert!(path_mtu(Ipv4Addr::LOCALHOST, 9).unwrap() >= 16_384);
    }
}
