//! Notices from the kernel that something of interest may have changed. They only wake the reconciler: what really
//! changed it finds by looking.
//!
//! The reconciler's own changes are no news: most notices carry the number of the socket that made the change
//! ([`OwnWrites`]).

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols};
use tokio::sync::Notify;

pub use self::own::OwnWrites;

mod own;

/// Multicast groups of NETLINK_ROUTE (uapi/linux/rtnetlink.h `enum rtnetlink_groups`), as a bit mask.
const ROUTE_GROUPS: u32 = 1 // RTNLGRP_LINK
    | 1 << 2 // RTNLGRP_NEIGH: neighbors and forwarding entries
    | 1 << 4 // RTNLGRP_IPV4_IFADDR
    | 1 << 6 // RTNLGRP_IPV4_ROUTE
    | 1 << 8 // RTNLGRP_IPV6_IFADDR
    | 1 << 10; // RTNLGRP_IPV6_ROUTE

/// NFNLGRP_NFTABLES of NETLINK_NETFILTER (uapi/linux/netfilter/nfnetlink.h), as a bit mask.
const NFTABLES_GROUP: u32 = 1 << 6;

/// Bytes that may wait to be read. Taken only while they do.
const ROOM: usize = 8 << 20;

/// Bytes of a notice that are read. One that is longer is not understood, and so of interest.
const NOTICE_MAX: usize = 16 * 1024;

/// NETLINK_XFRM and its XFRMNLGRP_POLICY (uapi/linux/netlink.h, uapi/linux/xfrm.h), the latter as a bit mask.
const NETLINK_XFRM: isize = 6;
const POLICY_GROUP: u32 = 1 << 3;

/// Wakes `wake` whenever a notice of interest arrives, until dropped. Call inside a tokio runtime.
pub struct KernelEvents {
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl KernelEvents {
    /// Subscribes in the network namespace of the calling thread. What `own` is about wakes nobody.
    pub fn subscribe(wake: Arc<Notify>, own: Arc<OwnWrites>) -> io::Result<Self> {
        let route = open(protocols::NETLINK_ROUTE, ROUTE_GROUPS)?;
        // Thousands of forwarding entries are told one by one. Where this is not allowed, some may be lost, and that is a notice too.
        let _ = setsockopt(route.socket_ref(), sockopt::RcvBufForce, &ROOM);
        own.routes.listen(route.socket_ref().as_fd().try_clone_to_owned()?);
        let nftables = open(protocols::NETLINK_NETFILTER, NFTABLES_GROUP)?;
        own.rules.listen(nftables.socket_ref().as_fd().try_clone_to_owned()?);
        let mut tasks = vec![
            tokio::spawn(listen(route, wake.clone(), {
                let own = own.clone();
                move |datagram: &[u8]| of_interest(datagram, &own)
            })),
            tokio::spawn(listen(nftables, wake.clone(), {
                let own = own.clone();
                move |datagram: &[u8]| any(datagram, |_, sender, _| !own.rules.is(sender))
            })),
        ];
        // Not every kernel has IPsec.
        if let Ok(policies) = open(NETLINK_XFRM, POLICY_GROUP) {
            let foreign = move |datagram: &[u8]| any(datagram, |_, sender, _| !own.made_policy(sender));
            tasks.push(tokio::spawn(listen(policies, wake, foreign)));
        }
        Ok(Self { tasks })
    }
}

impl Drop for KernelEvents {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

fn open(protocol: isize, groups: u32) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
    Ok(socket)
}

/// An overrun (ENOBUFS) means that notices were lost: reason enough to look.
async fn listen(socket: TokioSocket, wake: Arc<Notify>, interest: impl Fn(&[u8]) -> bool) {
    let mut datagram = Vec::with_capacity(NOTICE_MAX);
    loop {
        datagram.clear();
        match socket.recv(&mut datagram).await {
            Ok(()) => {
                if interest(&datagram) {
                    wake.notify_one();
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => wake.notify_one(),
            Err(error) => {
                tracing::warn!("kernel notices ended ({error}); only the regular looks are left");
                return;
            }
        }
    }
}

/// Whether one of the messages may concern us. A busy host sends many that cannot: every container that comes or
/// goes, every neighbor that is confirmed.
fn of_interest(datagram: &[u8], own: &OwnWrites) -> bool {
    any(datagram, |kind, sender, body| message_of_interest(kind, body) && !own.made(sender, kind, body))
}

/// Whether one of the messages is as the test wants it, which is shown the type, the sender and the body; or is not understood.
fn any(datagram: &[u8], mut wanted: impl FnMut(u16, u32, &[u8]) -> bool) -> bool {
    let mut rest = datagram;
    while let Some(header) = rest.first_chunk::<16>() {
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let sender = u32::from_ne_bytes([header[12], header[13], header[14], header[15]]);
        let Some(body) = rest.get(16..len) else { return true };
        if wanted(kind, sender, body) {
            return true;
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// Whether a message may concern us. A busy host sends many that cannot: every container that comes or goes, every neighbor
/// that is confirmed.
fn message_of_interest(kind: u16, body: &[u8]) -> bool {
    match kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            !link_name(body).is_some_and(|name| name.starts_with(b"veth"))
        }
        // struct rtmsg: the table is the fifth byte.
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => body.get(4) == Some(&libc::RT_TABLE_MAIN),
        // struct ndmsg: family, then the state at offset 8.
        libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => {
            let bridge = body.first() == Some(&(libc::AF_BRIDGE as u8));
            let permanent = body.get(8).is_some_and(|state| u16::from(*state) & libc::NUD_PERMANENT != 0);
            permanent || (kind == libc::RTM_DELNEIGH && !bridge)
        }
        _ => true,
    }
}

/// IFLA_IFNAME of a link message: attributes follow the 16 bytes of struct ifinfomsg.
fn link_name(body: &[u8]) -> Option<&[u8]> {
    attribute(body.get(16..)?, libc::IFLA_IFNAME)
}

/// The value of the first attribute of a kind.
fn attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = attributes;
    while let Some(header) = rest.first_chunk::<4>() {
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let value = rest.get(4..len)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
    None
}
