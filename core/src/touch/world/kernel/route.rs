//! Routes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::link::Request;
use super::netlink::{Refusal, Socket, attributes, ip_of, u32_at};
use crate::words::addr::{Family, Prefix};
use crate::words::fact::{Blackhole, Route, RouteExtras, RouteProtocol, RouteScope, RouteTable};

/// uapi/linux/rtnetlink.h
const RTM_NEWROUTE: u16 = 24;
/// `struct rtmsg`
const HEADER: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_METRICS: u16 = 8;
/// Inside RTA_METRICS.
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;

/// A route as the kernel shows it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) destination: Prefix,
    pub(super) via: Option<IpAddr>,
    /// Index of the interface; none for a route over several, and for one that leads nowhere.
    pub(super) index: Option<u32>,
    pub(super) metric: u32,
    pub(super) protocol: u8,
    pub(super) unicast: bool,
    pub(super) blackhole: bool,
    pub(super) scope: RouteScope,
    pub(super) extras: RouteExtras,
    onlink: bool,
    source: Option<IpAddr>,
}

/// What a dump is limited to, in the kernel.
#[derive(Clone, Copy, Default)]
pub(super) struct Filter {
    /// Leaving by the interface with this index.
    pub(super) index: Option<u32>,
    /// Carrying this protocol number.
    pub(super) protocol: Option<u8>,
    /// Unicast only.
    pub(super) unicast: bool,
    /// Those only that throw packets away.
    pub(super) blackhole: bool,
    /// Of this table.
    pub(super) table: RouteTable,
}

/// Routes of one table for which `take` returns something.
pub(super) fn dump<T>(
    socket: &mut Socket,
    family: Family,
    filter: Filter,
    mut take: impl FnMut(Seen) -> Option<T>,
) -> io::Result<Result<Vec<T>, Refusal>> {
    let mut message = RouteMessage::default();
    message.header.address_family = inet(family);
    set_table(&mut message, filter.table);
    message.header.protocol = filter.protocol.unwrap_or(0).into();
    if filter.unicast {
        message.header.kind = RouteType::Unicast;
    }
    if filter.blackhole {
        message.header.kind = RouteType::BlackHole;
    }
    message.attributes.extend(filter.index.map(RouteAttribute::Oif));
    let found = socket.dump(&RouteNetlinkMessage::GetRoute(message), |kind, body| {
        (kind == RTM_NEWROUTE).then(|| seen(family, filter.table, body)).flatten().and_then(&mut take)
    })?;
    Ok(match found {
        // A namespace that never had a route in a table has no such table; one without IPv6 has no IPv6 routes; and the interface
        // may be gone since it was looked up.
        Err(Refusal { errno: libc::ENOENT | libc::EOPNOTSUPP | libc::ENODEV, .. }) => Ok(Vec::new()),
        found => found,
    })
}

/// How the kernel would send a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Lookup {
    /// To an address of this host's own.
    pub(super) local: bool,
    pub(super) index: Option<u32>,
    pub(super) source: Option<IpAddr>,
}

/// What the kernel's routes say of packets to an address; none if they lead nowhere.
pub(super) fn lookup(socket: &mut Socket, to: IpAddr) -> io::Result<Result<Option<Lookup>, Refusal>> {
    let (mut message, destination) = (RouteMessage::default(), Prefix::host(to));
    message.header.address_family = inet(destination.family());
    message.header.destination_prefix_length = destination.len();
    message.attributes.push(RouteAttribute::Destination(match to {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }));
    let answers = socket.ask(&[RouteNetlinkMessage::GetRoute(message)], |kind, body| {
        if kind != RTM_NEWROUTE {
            return None;
        }
        let unicast = match *body.get(7)? {
            kind if kind == u8::from(RouteType::Unicast) => true,
            kind if kind == u8::from(RouteType::Local) => false,
            _ => return None,
        };
        let mut found = Lookup { local: !unicast, index: None, source: None };
        for (kind, value) in attributes(body.get(HEADER..)?) {
            match kind {
                RTA_OIF => found.index = u32_at(value, 0),
                RTA_PREFSRC => found.source = ip_of(value),
                _ => {}
            }
        }
        Some(found)
    })?;
    Ok(match answers.into_iter().next() {
        // No route, one that throws packets away (blackhole, unreachable, prohibit), or no such family.
        None
        | Some(Err(Refusal {
            errno:
                libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::EINVAL
                | libc::EACCES
                | libc::EAFNOSUPPORT
                | libc::EOPNOTSUPP,
            ..
        })) => Ok(None),
        Some(answer) => answer,
    })
}

fn seen(asked: Family, asked_table: RouteTable, body: &[u8]) -> Option<Seen> {
    let [family, len, _, _, table, protocol, scope, kind] = *body.first_chunk::<8>()?;
    let flags = u32_at(body, 8)?;
    // Without IPv6 the kernel answers for other families.
    if family != u8::from(inet(asked)) || flags & RouteFlags::Cloned.bits() != 0 {
        return None;
    }
    let (mut destination, mut via, mut index, mut metric) = (unspecified(asked), None, None, 0);
    let (mut source, mut several) = (None, false);
    let mut extras = RouteExtras { table: RouteTable(table.into()), ..RouteExtras::default() };
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            RTA_DST => destination = ip_of(value)?,
            RTA_GATEWAY => via = ip_of(value),
            // Family first, then the address: an IPv4 route through an IPv6 gateway.
            RTA_VIA => via = ip_of(value.get(2..)?),
            RTA_OIF => index = u32_at(value, 0),
            RTA_PRIORITY => metric = u32_at(value, 0)?,
            RTA_PREFSRC => source = ip_of(value),
            RTA_TABLE => extras.table = RouteTable(u32_at(value, 0)?),
            RTA_METRICS => {
                for (kind, value) in attributes(value) {
                    match kind {
                        RTAX_MTU => extras.mtu = u32_at(value, 0),
                        RTAX_ADVMSS => extras.advmss = u32_at(value, 0),
                        _ => {}
                    }
                }
            }
            RTA_MULTIPATH => several = true,
            _ => {}
        }
    }
    if extras.table != asked_table {
        return None;
    }
    Some(Seen {
        destination: Prefix::new(destination, len).ok()?,
        via,
        index: index.filter(|_| !several),
        metric,
        protocol,
        unicast: kind == u8::from(RouteType::Unicast),
        blackhole: kind == u8::from(RouteType::BlackHole),
        scope: RouteScope::of(scope),
        extras,
        onlink: flags & RouteFlags::Onlink.bits() != 0,
        source,
    })
}

impl Seen {
    /// Whether it can be ours in any territory: those that the kernel made are nobody's.
    pub(super) fn may_be_ours(&self) -> bool {
        (self.unicast || self.blackhole) && self.protocol != RouteProtocol::KERNEL.0
    }

    /// The fact; none if it is not a unicast route out of one interface. IPv6 routes have no scope (the kernel keeps
    /// and shows global).
    pub(super) fn fact(
        &self,
        name_of: impl Fn(u32) -> Option<crate::words::name::LinkName>,
    ) -> Option<Route> {
        Some(Route {
            destination: self.destination,
            via: self.via,
            link: name_of(self.index.filter(|_| self.unicast)?)?,
            onlink: self.onlink,
            metric: self.metric,
            scope: self.scope,
            source: self.source,
            protocol: RouteProtocol(self.protocol),
            extras: self.extras,
        })
    }
}

/// Writes a route, whatever was there for the same destination and metric.
pub(super) fn write(route: &Route, index: u32) -> Request {
    (RouteNetlinkMessage::NewRoute(about(route, index)), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Deletes exactly this route.
pub(super) fn delete(route: &Route, index: u32) -> Request {
    (RouteNetlinkMessage::DelRoute(about(route, index)), 0)
}

/// Writes a route that throws packets away.
pub(super) fn write_blackhole(destination: Prefix) -> Request {
    (RouteNetlinkMessage::NewRoute(blackhole(destination)), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Deletes a route that throws packets away.
pub(super) fn delete_blackhole(destination: Prefix) -> Request {
    (RouteNetlinkMessage::DelRoute(blackhole(destination)), 0)
}

fn blackhole(destination: Prefix) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = inet(destination.family());
    message.header.destination_prefix_length = destination.len();
    set_table(&mut message, RouteTable::MAIN);
    message.header.protocol = RouteProtocol::FLANNEL.0.into();
    message.header.kind = RouteType::BlackHole;
    message.attributes.push(RouteAttribute::Destination(destination.base().into()));
    message.attributes.push(RouteAttribute::Priority(Blackhole::METRIC));
    message
}

fn about(route: &Route, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = inet(route.destination.family());
    message.header.destination_prefix_length = route.destination.len();
    set_table(&mut message, route.extras.table);
    message.header.protocol = route.protocol.0.into();
    message.header.kind = RouteType::Unicast;
    message.header.scope = route.scope.number().into();
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    message.attributes.push(RouteAttribute::Destination(route.destination.base().into()));
    message.attributes.push(RouteAttribute::Oif(index));
    message.attributes.extend(route.via.map(|via| RouteAttribute::Gateway(RouteAddress::from(via))));
    message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    if route.metric != 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    let mtu = route.extras.mtu.map(RouteMetric::Mtu);
    let metrics: Vec<_> = mtu.into_iter().chain(route.extras.advmss.map(RouteMetric::Advmss)).collect();
    if !metrics.is_empty() {
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    message
}

/// A table's number in the header, or beside it where that has only a byte.
fn set_table(message: &mut RouteMessage, table: RouteTable) {
    match u8::try_from(table.0) {
        Ok(number) => message.header.table = number,
        Err(_) => {
            message.header.table = RouteHeader::RT_TABLE_UNSPEC;
            message.attributes.push(RouteAttribute::Table(table.0));
        }
    }
}

fn inet(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}
