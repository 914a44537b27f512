//! A port of this host kept from other programs, as long as it is published: a socket that is bound and does nothing.
//!
//! The packet filter takes a published port's packets before any socket sees them, so a program that listened on the
//! same port would never hear anything and never know why. Where a port is taken already, it is not published.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt,
    shutdown, socket, sockopt,
};

use flannel_core::words::exposure::Transport;

/// Keeps the port; none for SCTP, whose kernel part would be loaded only for this.
///
/// # Errors
/// `AddrInUse` if another program has it, `AddrNotAvailable` if the address is not this host's.
pub(crate) fn keep(protocol: Transport, address: SocketAddr) -> io::Result<Option<OwnedFd>> {
    let kind = match protocol {
        Transport::Tcp => SockType::Stream,
        Transport::Udp => SockType::Datagram,
        Transport::Sctp => return Ok(None),
    };
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    if address.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    let listens = protocol == Transport::Tcp;
    // Connections that a program before us closed lately are not in the way.
    setsockopt(&fd, sockopt::ReuseAddr, &listens)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    match listens {
        true => {
            // Only a listener clashes with a listener. After that it need not listen: whoever gets here while the filter is
            // not there shall be refused, not kept waiting. The port stays bound, now against everybody.
            listen(&fd, Backlog::new(1)?)?;
            shutdown(fd.as_raw_fd(), Shutdown::Read)?;
            setsockopt(&fd, sockopt::ReuseAddr, &false)?;
        }
        // The kernel makes it as small as it can be.
        false => setsockopt(&fd, sockopt::RcvBuf, &0)?,
    }
    Ok(Some(fd))
}

/// Lets this process have as many sockets as the system allows it: one for each published port.
pub(crate) fn raise_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    /// A port that nothing uses now.
    fn free() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    #[test]
    fn a_kept_port_is_nobody_elses_and_refuses_connections() {
        let address = free();
        let kept = keep(Transport::Tcp, address).unwrap();
        assert_eq!(TcpListener::bind(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(keep(Transport::Tcp, address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(TcpStream::connect(address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        drop(kept);
        TcpListener::bind(address).unwrap();
    }

    #[test]
    fn a_port_that_somebody_listens_on_cannot_be_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = keep(Transport::Tcp, listener.local_addr().unwrap());
        assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = keep(Transport::Udp, socket.local_addr().unwrap());
        assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn connections_that_ended_lately_are_not_in_the_way() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        // Whoever closes first keeps the port in TIME_WAIT.
        drop(listener.accept().unwrap());
        drop((listener, client));
        keep(Transport::Tcp, address).unwrap();
    }

    #[test]
    fn an_address_of_another_host_is_refused() {
        let refused = keep(Transport::Tcp, "192.0.2.1:8080".parse().unwrap()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrNotAvailable);
    }
}
