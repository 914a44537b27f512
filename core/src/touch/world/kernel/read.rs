//! Reads beside the facts: what planners need to know of the host, and single links.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use netlink_packet_route::address::AddressFlags;

use super::{Kernel, address, io_error, link, refused, route, settled, sysctl};
use crate::touch::world::{World as _, WorldError};
use crate::words::addr::{Family, InterfaceAddress, Mac};
use crate::words::fact::{Change, Fact, Guard, Link, RouteProtocol, RouteScope};
use crate::words::name::LinkName;
use crate::words::node::HostRoute;
use crate::words::territory::Territory;

/// An interface of the host with its addresses, in the kernel's order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// Name.
    pub name: LinkName,
    /// Largest packet in bytes; as the kernel says it, so it may be 0.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The interface of the host with itself.
    pub loopback: bool,
    /// Its addresses.
    pub addresses: Vec<HostAddress>,
}

/// An address of the host, with what the kernel knows about its fitness.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostAddress {
    /// The address with the length of its subnet.
    pub address: InterfaceAddress,
    /// Not leased for a time.
    pub permanent: bool,
    /// Not to be used for anything new.
    pub deprecated: bool,
    /// IPv6 privacy address: changes within a day.
    pub temporary: bool,
}

/// A default route of the main table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DefaultRoute {
    /// The interface; none if it goes over several.
    pub link: Option<LinkName>,
    /// Its metric; the lowest wins.
    pub metric: u32,
}

/// How the kernel would send packets to an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    /// The interface that they leave by.
    pub link: Option<LinkName>,
    /// The source they would get.
    pub source: Option<IpAddr>,
    /// The address is this host's own.
    pub local: bool,
}

impl Kernel {
    /// How packets to an address would leave this host; none if the host has no route to it.
    pub fn way_to(&mut self, address: IpAddr) -> Result<Option<Way>, WorldError> {
        const ACTION: &str = "look up a route";
        let answer = route::lookup(&mut self.socket, address).map_err(|error| io_error(ACTION, error))?;
        let Some(found) = answer.map_err(|refusal| refused(ACTION, refusal))? else { return Ok(None) };
        let names = self.names(found.index)?;
        let link = found.index.and_then(|index| names.get(&index).copied());
        Ok(Some(Way { link, source: found.source, local: found.local }))
    }

    /// Every interface with its addresses, in the order the kernel made them.
    pub fn interfaces(&mut self) -> Result<Vec<Interface>, WorldError> {
        let links = settled("look at the interfaces", link::all(&mut self.socket))?;
        let addresses = settled("look at the addresses", address::dump(&mut self.socket, None))?;
        let of = |index: u32| {
            let here = addresses.iter().filter(|seen| seen.index == index);
            here.map(|seen| HostAddress {
                address: seen.address,
                permanent: seen.flags.contains(AddressFlags::Permanent),
                deprecated: seen.flags.contains(AddressFlags::Deprecated),
                // The kernel marks IPv6 privacy addresses with the bit that means "secondary" for IPv4.
                temporary: seen.address.family() == Family::V6
                    && seen.flags.contains(AddressFlags::Secondary),
            })
            .collect()
        };
        Ok(links
            .iter()
            .map(|seen| Interface {
                name: seen.name,
                mtu: seen.mtu,
                up: seen.is_up(),
                loopback: seen.is_loopback(),
                addresses: of(seen.index),
            })
            .collect())
    }

    /// Whether the kernel has IPv6 at all.
    pub fn has_ipv6(&self) -> bool {
        sysctl::has_ipv6()
    }

    /// Whether an interface follows router advertisements only as long as the host does not forward IPv6 (`accept_ra` is 1
    /// and it does not): with the first packet forwarded its routes would be gone.
    pub fn loses_router_advertisements(&self, link: LinkName) -> Result<bool, WorldError> {
        let is = |setting: &str, value: &str| {
            let path = format!("net/ipv6/conf/{link}/{setting}");
            let failed = |error| io_error(format!("read the setting {path}"), error);
            Ok(sysctl::read(&path).map_err(failed)?.as_deref() == Some(value))
        };
        Ok(is("forwarding", "0")? && is("accept_ra", "1")?)
    }

    /// The default routes of a family, best first.
    pub fn default_routes(&mut self, family: Family) -> Result<Vec<DefaultRoute>, WorldError> {
        let filter = route::Filter { unicast: true, ..route::Filter::default() };
        let found = route::dump(&mut self.socket, family, filter, |seen| {
            seen.destination.is_default().then_some((seen.metric, seen.index))
        });
        let mut found = settled("look at the routes", found)?;
        found.sort_by_key(|(metric, _)| *metric);
        let names = self.names(found.iter().filter_map(|(_, index)| *index))?;
        let link = |index: Option<u32>| index.and_then(|index| names.get(&index).copied());
        Ok(found.into_iter().map(|(metric, index)| DefaultRoute { link: link(index), metric }).collect())
    }

    /// Routes of the main table that are not in the territory, of both families: what the host had before us. Routes that
    /// leave by an interface of ours are left out whoever made them, and so are IPv6 link-local ones.
    pub fn routes_of_others(&mut self, territory: &Territory) -> Result<Vec<HostRoute>, WorldError> {
        self.sift_routes(territory, |_| {})
    }

    /// The same for a look at the kernel that follows at once: the routes, which may be thousands, are dumped for both. What is
    /// changed meanwhile by others the kernel tells, and there is another look.
    pub fn glance_at_routes(&mut self, territory: &Territory) -> Result<Vec<HostRoute>, WorldError> {
        let mut glanced = Vec::new();
        let others = self.sift_routes(territory, |seen| {
            if seen.may_be_ours() {
                glanced.push(seen.clone());
            }
        })?;
        self.glanced = Some(glanced);
        Ok(others)
    }

    fn sift_routes(
        &mut self,
        territory: &Territory,
        mut passes: impl FnMut(&route::Seen),
    ) -> Result<Vec<HostRoute>, WorldError> {
        let links = settled("look at the interfaces", link::all(&mut self.socket))?;
        let names: HashMap<u32, LinkName> = links.iter().map(|seen| (seen.index, seen.name)).collect();
        let name_of = |index: u32| names.get(&index).copied();
        let ours: BTreeSet<LinkName> = links
            .iter()
            .filter(|seen| territory.holds_link(&seen.fact(name_of)))
            .map(|seen| seen.name)
            .collect();
        let bridges: BTreeSet<LinkName> = links
            .iter()
            .filter(|seen| matches!(seen.kind, link::SeenKind::Bridge { .. }))
            .map(|seen| seen.name)
            .collect();
        let mut routes = Vec::new();
        for family in [Family::V4, Family::V6] {
            let found = route::dump(&mut self.socket, family, route::Filter::default(), |seen| {
                passes(&seen);
                let link = seen.index.filter(|_| seen.unicast).and_then(name_of);
                let held = seen.fact(name_of).is_some_and(|route| territory.holds_route(&ours, &route));
                // What throws packets away inside of our network takes them from nobody: Go's flanneld leaves one for its
                // own subnet (`--ip-blackhole-route`), and so do we.
                let nowhere =
                    seen.blackhole && territory.cidrs.iter().any(|cidr| cidr.covers(&seen.destination));
                if held
                    || nowhere
                    || link.is_some_and(|link| ours.contains(&link))
                    || is_link_local(seen.destination.base())
                {
                    return None;
                }
                Some(HostRoute {
                    destination: seen.destination,
                    via: seen.via,
                    link,
                    bridge: link.is_some_and(|link| bridges.contains(&link)),
                    protocol: RouteProtocol(seen.protocol),
                    scope_link: seen.scope == RouteScope::Link,
                })
            });
            routes.extend(settled("look at the routes", found)?);
        }
        Ok(routes)
    }

    /// Waits until every IPv6 address of an interface may be used: duplicate address detection is done. At most this
    /// long.
    ///
    /// # Errors
    /// `Unsupported` if somebody else has one of them, or if it takes longer.
    pub fn await_addresses(&mut self, name: LinkName, at_most: Duration) -> Result<(), WorldError> {
        const PAUSE: Duration = Duration::from_millis(20);
        let action = || format!("use the addresses of {name}");
        let failed = |e| io_error(action(), e);
        let found = link::by_name(&mut self.socket, &[name]).map_err(failed)?;
        let Some(seen) = found.into_iter().flatten().next() else {
            return Err(WorldError::NoLink { action: action(), link: name.to_string() });
        };
        let since = Instant::now();
        loop {
            let here = settled("look at the addresses", address::dump(&mut self.socket, Some(seen.index)))?;
            // An address that failed stays tentative.
            let pending = here.iter().any(|address| address.tentative() && !address.duplicate());
            // The one that somebody chose says more than the link's own, which may fail first.
            let mut taken: Vec<_> = here.iter().filter(|address| address.duplicate()).collect();
            taken.sort_by_key(|address| is_link_local(address.address.address()));
            if let Some(first) = taken.first()
                && (!pending || !is_link_local(first.address.address()))
            {
                let what = format!("{} is in use on this link already", first.address.address());
                return Err(WorldError::Unsupported { action: action(), what });
            }
            if !pending {
                return Ok(());
            }
            if since.elapsed() >= at_most {
                let what = format!("they are not known to be free after {} s", at_most.as_secs());
                return Err(WorldError::Unsupported { action: action(), what });
            }
            sleep(PAUSE);
        }
    }

    /// The interface of this name.
    pub fn link(&mut self, name: LinkName) -> Result<Option<Link>, WorldError> {
        let failed = |e| io_error(format!("look at the interface {name}"), e);
        let found = link::by_name(&mut self.socket, &[name]).map_err(failed)?;
        let Some(seen) = found.into_iter().flatten().next() else { return Ok(None) };
        let underlay = match &seen.kind {
            link::SeenKind::Vxlan(vxlan) => vxlan.underlay,
            link::SeenKind::Bridge { .. }
            | link::SeenKind::Veth
            | link::SeenKind::Wireguard
            | link::SeenKind::Funnel
            | link::SeenKind::Ipip(_)
            | link::SeenKind::Other => None,
        };
        let names = self.names(underlay)?;
        Ok(Some(seen.fact(|index| names.get(&index).copied())))
    }

    /// Whether an interface that is not in the territory is in the place of one of these: under its name, or with what only one
    /// can have.
    pub fn is_taken(&mut self, territory: &Territory, wanted: &[&Link]) -> Result<bool, WorldError> {
        let mut in_place = true;
        for link in wanted {
            let have = self.link(link.name)?;
            in_place &=
                have.is_some_and(|have| territory.holds_link(&have) && link.kind.same_device(&have.kind));
        }
        // Where ours are, nobody else can be.
        if in_place {
            return Ok(false);
        }
        let links = settled("look at the interfaces", link::all(&mut self.socket))?;
        let names: HashMap<u32, LinkName> = links.iter().map(|seen| (seen.index, seen.name)).collect();
        let facts = links.iter().map(|seen| seen.fact(|index| names.get(&index).copied()));
        let mut others = facts.filter(|link| !territory.holds_link(link));
        Ok(others.any(|other| wanted.iter().any(|link| link.name == other.name || link.excludes(&other))))
    }

    /// Whether there is an interface of this name.
    pub fn link_exists(&mut self, name: LinkName) -> Result<bool, WorldError> {
        let failed = |e| io_error(format!("look at the interface {name}"), e);
        Ok(link::by_name(&mut self.socket, &[name]).map_err(failed)?.into_iter().flatten().next().is_some())
    }

    /// The interfaces whose names begin so.
    pub fn existing_links(&mut self, prefix: &str) -> Result<BTreeSet<LinkName>, WorldError> {
        let links = settled("look at the interfaces", link::all(&mut self.socket))?;
        Ok(links.into_iter().map(|seen| seen.name).filter(|name| name.as_str().starts_with(prefix)).collect())
    }

    /// Lets ports be that are guarded and do not exist any more.
    pub fn lift_stray_guards(&mut self) -> Result<(), WorldError> {
        // In this order: a port is there before it is guarded.
        let guarded = self.netfilter()?.guarded()?;
        let mut lost = Vec::new();
        for link in guarded {
            if !self.link_exists(link)? {
                lost.push(Fact::Guard(Guard { link, mac: Mac([0; 6]) }));
            }
        }
        let changes: Vec<_> = lost.iter().map(Change::Delete).collect();
        self.apply(&changes).into_iter().collect()
    }

    /// Deletes an interface; false if there was none.
    pub fn delete_link(&mut self, name: LinkName) -> Result<bool, WorldError> {
        let action = || format!("delete the interface {name}");
        let (message, flags) = link::delete(name);
        let mut batch = super::netlink::Batch::default();
        batch.push(&message, flags);
        let refusals = self.socket.write(&mut batch).map_err(|e| io_error(action(), e))?;
        match refusals.into_iter().next() {
            None => Ok(true),
            Some((_, refusal)) if refusal.errno == libc::ENODEV => Ok(false),
            Some((_, refusal)) => Err(super::refused(action(), refusal)),
        }
    }

    fn names(
        &mut self,
        indices: impl IntoIterator<Item = u32>,
    ) -> Result<HashMap<u32, LinkName>, WorldError> {
        let indices: Vec<u32> = indices.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
        let found =
            link::by_index(&mut self.socket, &indices).map_err(|e| io_error("look at the interfaces", e))?;
        Ok(found.into_iter().flatten().map(|seen| (seen.index, seen.name)).collect())
    }
}

fn is_link_local(address: std::net::IpAddr) -> bool {
    match address {
        std::net::IpAddr::V4(_) => false,
        std::net::IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}
