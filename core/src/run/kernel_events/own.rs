//! What the reconciler writes itself, so that it is not woken to look at its own work: after a lease that came, and after the thousands of
//! a start.
//!
//! The kernel tells routes, neighbors and rules with the number of the socket that changed them. Two kinds of notices carry none: those of
//! a VXLAN device's forwarding entries (drivers/net/vxlan/vxlan_core.c `vxlan_fdb_notify`), and the last word about a neighbor that
//! was deleted (net/core/neighbour.c `neigh_cleanup_and_release`). These are expected one by one.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::attribute;
use crate::touch::world::kernel::Kernel;
use crate::touch::world::{World, WorldError};
use crate::words::addr::Mac;
use crate::words::fact::{Change, Fact, Facts, Rest};
use crate::words::territory::Territory;

/// More than this are never expected: some were lost, or were never sent.
const EXPECTED_MAX: usize = 100_000;

/// uapi/linux/neighbour.h
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// `struct ndmsg`
const NEIGHBOR_HEADER: usize = 12;

/// What one writer changes.
#[derive(Default)]
pub struct OwnWrites {
    /// Links, addresses, neighbors, routes.
    pub(super) routes: Signature,
    /// nf_tables.
    pub(super) rules: Signature,
    /// The number of its socket for policies of IPsec; 0 while it has none.
    policies: AtomicU32,
    expected: Mutex<HashSet<Unsigned>>,
}

/// By what a part of the kernel tells whose change a notice is about.
#[derive(Default)]
pub(super) struct Signature {
    /// The number of the writer's socket; 0 while it has none.
    socket: AtomicU32,
    /// Where notices come in.
    listener: OnceLock<OwnedFd>,
}

impl Signature {
    /// Notices of our own are to be kept from this socket.
    pub(super) fn listen(&self, listener: OwnedFd) {
        let _ = self.listener.set(listener);
    }

    /// Whether the number is that of the writer's socket.
    pub(super) fn is(&self, sender: u32) -> bool {
        sender != 0 && sender == self.socket.load(Ordering::Relaxed)
    }

    fn sign(&self, socket: u32) {
        if self.socket.swap(socket, Ordering::Relaxed) == socket || socket == 0 {
            return;
        }
        // Without the filter they are read and passed over.
        if let Some(listener) = self.listener.get()
            && let Err(error) = turn_away(listener, socket)
        {
            tracing::debug!("notices of our own changes cannot be kept away: {error}");
        }
    }
}

/// A notice that does not say whose change it is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Unsigned {
    ForwardCame(Mac, IpAddr),
    ForwardWent(Mac, IpAddr),
    NeighborWent(IpAddr),
}

impl OwnWrites {
    /// The kernel, with everything noted that is changed through it.
    pub fn signed<'a>(&'a self, kernel: &'a mut Kernel) -> Signed<'a> {
        Signed { kernel, own: self }
    }

    /// Whether a notice is about a change of the writer's own. Says so once.
    pub(super) fn made(&self, sender: u32, kind: u16, body: &[u8]) -> bool {
        if self.routes.is(sender) {
            return true;
        }
        Unsigned::read(kind, body).is_some_and(|notice| self.expected().remove(&notice))
    }

    /// Whether a notice about a policy of IPsec is about a change of the writer's own.
    pub(super) fn made_policy(&self, sender: u32) -> bool {
        sender != 0 && sender == self.policies.load(Ordering::Relaxed)
    }

    fn expect(&self, changes: &[Change<'_>]) {
        let mut expected = self.expected();
        if expected.is_empty() {
            expected.shrink_to(64);
        }
        for change in changes {
            if expected.len() >= EXPECTED_MAX {
                expected.clear();
            }
            expected.extend(Unsigned::of(change));
        }
    }

    fn expected(&self) -> MutexGuard<'_, HashSet<Unsigned>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Unsigned {
    fn of(change: &Change<'_>) -> Option<Self> {
        let goes = matches!(change, Change::Delete(_));
        match change.fact() {
            Fact::Forward(entry) if goes => Some(Self::ForwardWent(entry.mac, entry.remote)),
            Fact::Forward(entry) => Some(Self::ForwardCame(entry.mac, entry.remote)),
            Fact::Neighbor(neighbor) if goes => Some(Self::NeighborWent(neighbor.ip)),
            _ => None,
        }
    }

    fn read(kind: u16, body: &[u8]) -> Option<Self> {
        let goes = match kind {
            libc::RTM_NEWNEIGH => false,
            libc::RTM_DELNEIGH => true,
            _ => return None,
        };
        let attributes = body.get(NEIGHBOR_HEADER..)?;
        let ip = address(attribute(attributes, NDA_DST)?)?;
        match (body.first() == Some(&(libc::AF_BRIDGE as u8)), goes) {
            (true, _) => {
                let mac = Mac(attribute(attributes, NDA_LLADDR)?.try_into().ok()?);
                Some(if goes { Self::ForwardWent(mac, ip) } else { Self::ForwardCame(mac, ip) })
            }
            (false, true) => Some(Self::NeighborWent(ip)),
            (false, false) => None,
        }
    }
}

/// Has the kernel keep from a socket what another one has sent: thousands of notices need not even be read.
fn turn_away(listener: &OwnedFd, sender: u32) -> io::Result<()> {
    /// Offset of `nlmsg_pid` (uapi/linux/netlink.h).
    const SENDER: u32 = 12;
    let (load, equal, end) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    // It reads numbers as a wire has them.
    let sender = u32::from_be_bytes(sender.to_ne_bytes());
    let mut steps =
        [step(load, 0, 0, SENDER), step(equal, 0, 1, sender), step(end, 0, 0, 0), step(end, 0, 0, u32::MAX)];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    #[expect(unsafe_code, reason = "nix has no name for this option")]
    // SAFETY: program and steps outlive the call, which copies them, and their lengths are what they say.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            std::ptr::from_ref(&program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn address(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(Into::into),
        _ => <[u8; 16]>::try_from(value).ok().map(Into::into),
    }
}

/// A kernel whose changes are noted.
pub struct Signed<'a> {
    kernel: &'a mut Kernel,
    own: &'a OwnWrites,
}

impl World for Signed<'_> {
    fn observe(&mut self, territory: &Territory) -> Result<Facts, WorldError> {
        self.kernel.observe(territory)
    }

    fn compare<'b>(&mut self, territory: &Territory, wanted: &'b Facts) -> Result<Rest<'b>, WorldError> {
        self.kernel.compare(territory, wanted)
    }

    fn apply(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        self.own.routes.sign(self.kernel.port());
        self.own.rules.sign(self.kernel.filter_port());
        self.own.policies.store(self.kernel.policy_port(), Ordering::Relaxed);
        self.own.expect(changes);
        self.kernel.apply(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::fact::{Forward, Neighbor};
    use crate::words::name::LinkName;

    fn notice(family: u8, ip: [u8; 4], mac: Option<[u8; 6]>) -> Vec<u8> {
        let mut body = vec![0; NEIGHBOR_HEADER];
        body[0] = family;
        body.extend([8, 0, NDA_DST as u8, 0]);
        body.extend(ip);
        if let Some(mac) = mac {
            body.extend([10, 0, NDA_LLADDR as u8, 0]);
            body.extend(mac);
            body.extend([0, 0]);
        }
        body
    }

    #[test]
    fn each_notice_of_our_own_is_passed_over_once_and_nobody_elses() {
        let own = OwnWrites::default();
        let (link, mac) = (LinkName::new("flannel.1").unwrap(), [2, 0, 0, 0, 0, 7]);
        let forward = Fact::Forward(Forward { link, mac: Mac(mac), remote: [10, 0, 0, 7].into() });
        let neighbor = Fact::Neighbor(Neighbor { link, ip: [10, 5, 7, 0].into(), mac: Mac(mac) });
        own.expect(&[Change::Create(&forward), Change::Delete(&neighbor)]);
        let bridge = libc::AF_BRIDGE as u8;
        let came = notice(bridge, [10, 0, 0, 7], Some(mac));
        // Gone, or elsewhere: not what we did.
        assert!(!own.made(0, libc::RTM_DELNEIGH, &came));
        assert!(!own.made(0, libc::RTM_NEWNEIGH, &notice(bridge, [10, 0, 0, 8], Some(mac))));
        assert!(own.made(0, libc::RTM_NEWNEIGH, &came));
        assert!(!own.made(0, libc::RTM_NEWNEIGH, &came));
        let went = notice(libc::AF_INET as u8, [10, 5, 7, 0], None);
        assert!(!own.made(0, libc::RTM_NEWNEIGH, &went));
        assert!(own.made(0, libc::RTM_DELNEIGH, &went));
        assert!(!own.made(0, libc::RTM_DELNEIGH, &went));
        // Nobody has number 0.
        assert!(!own.made(0, libc::RTM_NEWROUTE, &[]));
        own.routes.socket.store(77, Ordering::Relaxed);
        assert!(own.made(77, libc::RTM_NEWROUTE, &[]) && !own.made(78, libc::RTM_NEWROUTE, &[]));
        assert!(!own.made_policy(0) && !own.made_policy(77));
        own.policies.store(88, Ordering::Relaxed);
        assert!(own.made_policy(88) && !own.made_policy(77) && !own.made_policy(0));
    }
}
