//! Connections that the kernel remembers and that a change of published ports makes wrong.
//!
//! The kernel looks at the rules for the first packet of a connection only. A sender that goes on from one port, as many UDP clients
//! do, would keep talking to a container that is gone, or would never get to one that came. TCP ends such
//! connections by itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::packet::protocol_of;
use super::wire::{Attributes, Socket, attribute, error_code};
use crate::touch::world::WorldError;
use crate::words::addr::Family;
use crate::words::exposure::{PublishedPort, Transport};

/// Subsystem of connection tracking (uapi/linux/netfilter/nfnetlink.h NFNL_SUBSYS_CTNETLINK).
pub(super) const SUBSYSTEM: u16 = 1;
/// IPCTNL_MSG_CT_GET and _DELETE.
const GET: u8 = 1;
const DELETE: u8 = 2;
/// CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ID: u16 = 12;

/// Which ports changed.
#[derive(Clone, Copy, Debug)]
pub struct Changed<'a> {
    /// Ports that lead nowhere now, or elsewhere.
    pub gone: &'a [PublishedPort],
    /// Ports that lead somewhere now.
    pub come: &'a [PublishedPort],
    /// This host's addresses.
    pub local: &'a [IpAddr],
}

/// Source and destination of a connection's packets in one direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Tuple {
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
    protocol: Transport,
}

impl Changed<'_> {
    fn families(&self) -> impl Iterator<Item = Family> {
        let ports = || self.gone.iter().chain(self.come).filter(|port| port.protocol != Transport::Tcp);
        let [four, six] = [Family::V4, Family::V6].map(|family| ports().any(|port| port.family() == family));
        [(Family::V4, four), (Family::V6, six)].into_iter().filter(|(_, any)| *any).map(|(family, _)| family)
    }

    /// Whether a connection is not as the ports now say.
    fn makes_wrong(&self, original: &Tuple, reply: &Tuple) -> bool {
        let (address, port) = original.destination;
        let meant = |published: &&PublishedPort| {
            published.protocol == original.protocol
                && published.protocol != Transport::Tcp
                && published.host_port == port
                && published.host_ip.is_none_or(|ip| ip == address)
        };
        let leads = |published: &PublishedPort| reply.source == (published.address, published.port);
        let here = || address.is_loopback() || self.local.contains(&address);
        self.gone.iter().filter(meant).any(leads)
            || self.come.iter().filter(meant).any(|published| !leads(published) && here())
    }
}

/// Forgets the connections that a change makes wrong, and says how many. Without connection tracking there are none.
pub(super) fn forget(socket: &mut Socket, changed: &Changed<'_>) -> Result<usize, WorldError> {
    let mut forgotten = 0;
    for family in changed.families() {
        let what = "list the connections that the kernel tracks";
        let found = match socket.dump(what, GET, protocol_of(family), &Attributes::default()) {
            Err(error) if is_absent(&error) => return Ok(0),
            found => found?,
        };
        for entry in &found {
            let tuple = |kind| attribute(entry, kind).and_then(read_tuple);
            let (Some(original), Some(reply)) = (tuple(ORIGINAL), tuple(REPLY)) else { continue };
            if changed.makes_wrong(&original, &reply) {
                let mut which = Attributes::default();
                for kind in [ORIGINAL, ID] {
                    if let Some(value) = attribute(entry, kind) {
                        which.bytes(if kind == ID { kind } else { kind | NESTED }, value);
                    }
                }
                socket.tell("forget a connection", DELETE, protocol_of(family), &which)?;
                forgotten += 1;
            }
        }
    }
    Ok(forgotten)
}

/// NLA_F_NESTED.
const NESTED: u16 = 0x8000;

/// What the kernel says when it has no such subsystem (net/netfilter/nfnetlink.c `nfnetlink_rcv_msg`).
fn is_absent(error: &WorldError) -> bool {
    matches!(error_code(error), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT))
}

fn read_tuple(tuple: &[u8]) -> Option<Tuple> {
    let (ip, proto) = (attribute(tuple, 1)?, attribute(tuple, 2)?);
    let address = |v4: u16| match attribute(ip, v4) {
        Some(bytes) => <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
        None => <[u8; 16]>::try_from(attribute(ip, v4 + 2)?).ok().map(|bytes| Ipv6Addr::from(bytes).into()),
    };
    let port = |kind| Some(u16::from_be_bytes(attribute(proto, kind)?.try_into().ok()?));
    Some(Tuple {
        source: (address(1)?, port(2)?),
        destination: (address(2)?, port(3)?),
        protocol: Transport::of(*attribute(proto, 1)?.first()?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(text: &str) -> (IpAddr, u16) {
        let at: std::net::SocketAddr = text.parse().unwrap();
        (at.ip(), at.port())
    }

    fn tuple(source: &str, destination: &str) -> Tuple {
        Tuple { source: end(source), destination: end(destination), protocol: Transport::Udp }
    }

    #[test]
    fn only_connections_that_are_wrong_now_are_forgotten() {
        let port = PublishedPort {
            protocol: Transport::Udp,
            host_ip: None,
            host_port: 53,
            address: "10.100.5.2".parse().unwrap(),
            port: 5353,
        };
        let local = ["192.0.2.1".parse().unwrap()];
        let come = Changed { gone: &[], come: &[port], local: &local };
        let gone = Changed { gone: &[port], come: &[], local: &local };
        let asked = tuple("192.0.2.9:4000", "192.0.2.1:53");
        let led = tuple("10.100.5.2:5353", "192.0.2.9:4000");
        let stray = tuple("192.0.2.1:53", "192.0.2.9:4000");
        assert!(come.makes_wrong(&asked, &stray) && !come.makes_wrong(&asked, &led));
        assert!(gone.makes_wrong(&asked, &led) && !gone.makes_wrong(&asked, &stray));
        // A question to somebody else's port 53 passes through this host.
        let elsewhere =
            (tuple("10.100.5.9:4000", "198.51.100.2:53"), tuple("198.51.100.2:53", "192.0.2.1:4000"));
        assert!(!come.makes_wrong(&elsewhere.0, &elsewhere.1));
        let tcp = [PublishedPort { protocol: Transport::Tcp, ..port }];
        assert_eq!(Changed { gone: &tcp, come: &tcp, local: &local }.families().count(), 0);
    }
}
