//! What is behind the host's veths: the addresses in the namespaces that their other ends are in.
//!
//! The kernel shows the id of the other end's namespace (`IFLA_LINK_NETNSID`), and lets who has it ask for the addresses there
//! (`IFA_TARGET_NETNSID`, Linux 5.0), without a path to the namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};

use super::netlink::{attributes, text_of, u32_at};
use super::{Kernel, address, settled};
use crate::touch::world::WorldError;
use crate::words::name::LinkName;

/// uapi/linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
/// `struct ifinfomsg`
const HEADER: usize = 16;
/// uapi/linux/if.h
const IFF_LOWER_UP: u32 = 1 << 16;
/// uapi/linux/if_link.h
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINK_NETNSID: u16 = 37;

/// An interface of the host that leads into another namespace, or is a bridge's port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outlet {
    /// Its name on the host.
    pub name: LinkName,
    /// The bridge it is a port of.
    pub bridge: Option<LinkName>,
    /// Whether the other end is up.
    pub carrier: bool,
    /// All addresses of the namespace behind it; none if there is no other namespace, or if it does not show them.
    pub inside: Option<BTreeSet<IpAddr>>,
}

struct Seen {
    index: u32,
    name: LinkName,
    master: Option<u32>,
    carrier: bool,
    namespace: Option<i32>,
}

impl Kernel {
    /// Every interface that leads into another namespace or is a bridge's port. Costs a question for each namespace, so it is
    /// for rare occasions.
    pub fn outlets(&mut self) -> Result<Vec<Outlet>, WorldError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let found = self.socket.dump(&RouteNetlinkMessage::GetLink(message), seen);
        let links = settled("look at the interfaces", found)?;
        let names: BTreeMap<u32, LinkName> = links.iter().map(|link| (link.index, link.name)).collect();
        let mut inside: BTreeMap<i32, Option<BTreeSet<IpAddr>>> = BTreeMap::new();
        for namespace in links.iter().filter_map(|link| link.namespace).collect::<BTreeSet<_>>() {
            inside.insert(namespace, self.addresses_behind(namespace)?);
        }
        let outlet = |link: &Seen| Outlet {
            name: link.name,
            bridge: link.master.and_then(|master| names.get(&master).copied()),
            carrier: link.carrier,
            inside: link.namespace.and_then(|namespace| inside.get(&namespace).cloned().flatten()),
        };
        Ok(links
            .iter()
            .filter(|link| link.namespace.is_some() || link.master.is_some())
            .map(outlet)
            .collect())
    }

    /// None if that namespace does not let us look, or is gone by now.
    fn addresses_behind(&mut self, namespace: i32) -> Result<Option<BTreeSet<IpAddr>>, WorldError> {
        let mut message = AddressMessage::default();
        message.attributes.push(AddressAttribute::TargetNetNsId(namespace));
        let found = self
            .socket
            .dump(&RouteNetlinkMessage::GetAddress(message), address::seen)
            .map_err(|error| super::io_error("look at the addresses in another namespace", error))?;
        let addresses = found.ok().map(|found| found.into_iter().map(|seen| seen.address.address()));
        Ok(addresses.map(Iterator::collect))
    }
}

fn seen(kind: u16, body: &[u8]) -> Option<Seen> {
    if kind != RTM_NEWLINK {
        return None;
    }
    let (index, flags) = (u32_at(body, 4)?, u32_at(body, 8)?);
    let (mut name, mut master, mut namespace) = (None, None, None);
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            IFLA_IFNAME => name = LinkName::new(&text_of(value)).ok(),
            IFLA_MASTER => master = u32_at(value, 0),
            // Negative where the kernel has none to give.
            IFLA_LINK_NETNSID => namespace = u32_at(value, 0).map(|id| id as i32).filter(|id| *id >= 0),
            _ => {}
        }
    }
    Some(Seen { index, name: name?, master, carrier: flags & IFF_LOWER_UP != 0, namespace })
}
