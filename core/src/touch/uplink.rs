//! Which interface carries us to our peers.
//!
//! **Source** — upstream pkg/ipmatch/match.go `LookupExtIface`, pkg/ip/iface.go `GetInterfaceIP4Addrs`: an interface is
//! named, or owns a given address, or the default route leaves by it; of its addresses a global one comes before a
//! link-local one and a permanent one before a leased one. IPv6 link-local addresses are left out: a peer's lease cannot say
//! by which interface they are meant.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::world::WorldError;
use super::world::kernel::{HostAddress, Interface, Kernel};
use crate::words::addr::{Family, InterfaceAddress};
use crate::words::name::{LinkName, NameError};
use crate::words::node::Uplink;
use crate::words::units::{Mtu, OutOfRange};

/// How the interface is found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum UplinkChoice {
    /// The default route leaves by it.
    DefaultRoute,
    /// The first of these that exists.
    Any(Vec<Wanted>),
}

/// What was said beforehand of the interface and of the addresses that peers reach us at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sought {
    /// Which interface.
    pub choice: UplinkChoice,
    /// How peers reach us by IPv4, if not by the interface's address (`--public-ip`).
    pub public_v4: Option<Ipv4Addr>,
    /// The same for IPv6 (`--public-ipv6`).
    pub public_v6: Option<Ipv6Addr>,
}

/// One way to say which.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// It has this name.
    Named(LinkName),
    /// It has this address.
    Address(IpAddr),
}

/// Why there is no uplink.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// The kernel could not be asked.
    #[error(transparent)]
    World(#[from] WorldError),
    /// Nothing that exists is what was asked for.
    #[error("no interface matches {wanted}; there are: {candidates}")]
    NoMatch {
        /// What was asked for.
        wanted: String,
        /// Every interface with its addresses.
        candidates: String,
    },
    /// There is no default route, or it leaves by several interfaces.
    #[error("{0}; say which interface with --iface; there are: {1}")]
    DefaultRoute(&'static str, String),
    /// It has no address that peers could use.
    #[error("interface {link} has no usable {family} address")]
    NoAddress {
        /// The interface.
        link: LinkName,
        /// Of this family.
        family: Family,
    },
    /// Its MTU cannot be.
    #[error("interface {link} cannot carry us")]
    Mtu {
        /// The interface.
        link: LinkName,
        /// What is wrong.
        source: OutOfRange,
    },
}

impl UplinkChoice {
    /// What `--iface` (repeated) and `--public-ip` say. Without an interface, a public address of this host's names its
    /// interface; one that no interface has (NAT) leaves the default route.
    pub fn of_flags(ifaces: &[String]) -> Result<Self, NameError> {
        let wanted = |iface: &String| match iface.parse() {
            Ok(address) => Ok(Wanted::Address(address)),
            Err(_) => LinkName::new(iface).map(Wanted::Named),
        };
        match ifaces {
            [] => Ok(Self::DefaultRoute),
            some => some.iter().map(wanted).collect::<Result<_, _>>().map(Self::Any),
        }
    }
}

impl Sought {
    /// What is to be found, and nothing more.
    pub fn by(choice: UplinkChoice) -> Self {
        Self { choice, public_v4: None, public_v6: None }
    }

    /// The address of a family at which peers reach us: the one that was said, else the interface's.
    pub fn public(&self, uplink: &Uplink, family: Family) -> Option<IpAddr> {
        self.said(family).or_else(|| uplink.address(family))
    }

    fn said(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.public_v4.map(Into::into),
            Family::V6 => self.public_v6.map(Into::into),
        }
    }

    /// Addresses that were named: the interface's own among them outweigh the order of preference.
    fn addresses(&self) -> Vec<IpAddr> {
        let wanted = match &self.choice {
            UplinkChoice::Any(wanted) => wanted.as_slice(),
            UplinkChoice::DefaultRoute => &[],
        };
        let address = |wanted: &Wanted| match wanted {
            Wanted::Address(address) => Some(*address),
            Wanted::Named(_) => None,
        };
        let public = Family::BOTH.into_iter().filter_map(|family| self.said(family));
        wanted.iter().filter_map(address).chain(public).collect()
    }
}

/// Finds the interface for a network of these families. It has an address of at least one of them.
pub fn choose(kernel: &mut Kernel, sought: &Sought, families: &[Family]) -> Result<Uplink, UplinkError> {
    let interfaces = kernel.interfaces()?;
    let find = |wanted: Wanted| interfaces.iter().find(|interface| matches(interface, wanted));
    let interface = match &sought.choice {
        UplinkChoice::Any(wanted) => {
            let none = || UplinkError::NoMatch { wanted: names(wanted), candidates: list(&interfaces) };
            wanted.iter().find_map(|wanted| find(*wanted)).ok_or_else(none)?
        }
        UplinkChoice::DefaultRoute => {
            let said = families.iter().filter_map(|family| sought.said(*family));
            match said.into_iter().find_map(|address| find(Wanted::Address(address))) {
                Some(interface) => interface,
                None => by_default_route(kernel, &interfaces, families)?,
            }
        }
    };
    uplink(interface, &sought.addresses(), families)
}

/// The interface of this name as it is now.
pub fn read(
    kernel: &mut Kernel,
    link: LinkName,
    sought: &Sought,
    families: &[Family],
) -> Result<Uplink, UplinkError> {
    let interfaces = kernel.interfaces()?;
    let Some(interface) = interfaces.iter().find(|interface| interface.name == link) else {
        return Err(UplinkError::NoMatch { wanted: link.to_string(), candidates: list(&interfaces) });
    };
    uplink(interface, &sought.addresses(), families)
}

/// The first family decides; the other one's packets to peers on the same link need no default route.
fn by_default_route<'a>(
    kernel: &mut Kernel,
    interfaces: &'a [Interface],
    families: &[Family],
) -> Result<&'a Interface, UplinkError> {
    let family = families.first().copied().unwrap_or(Family::V4);
    let Some(route) = kernel.default_routes(family)?.into_iter().next() else {
        let text = match family {
            Family::V4 => "there is no default route",
            Family::V6 => "there is no IPv6 default route",
        };
        return Err(UplinkError::DefaultRoute(text, list(interfaces)));
    };
    let several =
        || UplinkError::DefaultRoute("the default route leaves by several interfaces", list(interfaces));
    interfaces.iter().find(|interface| Some(interface.name) == route.link).ok_or_else(several)
}

fn matches(interface: &Interface, wanted: Wanted) -> bool {
    match wanted {
        Wanted::Named(name) => interface.name == name,
        Wanted::Address(address) => interface.addresses.iter().any(|own| own.address.address() == address),
    }
}

/// `asked` are addresses that were named, which outweigh the order of preference.
fn uplink(interface: &Interface, asked: &[IpAddr], families: &[Family]) -> Result<Uplink, UplinkError> {
    let link = interface.name;
    let mtu = Mtu::new(u64::from(interface.mtu)).map_err(|source| UplinkError::Mtu { link, source })?;
    let named = |family| {
        let own = || interface.addresses.iter().map(|own| own.address).filter(|own| own.family() == family);
        asked.iter().find_map(|asked| own().find(|own| own.address() == *asked))
    };
    let of = |family| named(family).or_else(|| best(&interface.addresses, family));
    let uplink = Uplink { link, mtu, v4: of(Family::V4), v6: of(Family::V6) };
    match families.iter().find(|family| uplink.address(**family).is_some()) {
        Some(_) => Ok(uplink),
        None => Err(UplinkError::NoAddress { link, family: families.first().copied().unwrap_or(Family::V4) }),
    }
}

/// The best address of a family: usable, then global, permanent, lasting; then in the kernel's order.
fn best(addresses: &[HostAddress], family: Family) -> Option<InterfaceAddress> {
    addresses
        .iter()
        .filter(|own| own.address.family() == family && !own.deprecated)
        .filter(|own| is_usable(own.address.address()))
        .min_by_key(|own| (is_link_local(own.address.address()), !own.permanent, own.temporary))
        .map(|own| own.address)
}

fn is_usable(address: IpAddr) -> bool {
    let v6_link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    !address.is_loopback() && !address.is_multicast() && !v6_link_local
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn names(wanted: &[Wanted]) -> String {
    let name = |wanted: &Wanted| match wanted {
        Wanted::Named(name) => name.to_string(),
        Wanted::Address(address) => address.to_string(),
    };
    wanted.iter().map(name).collect::<Vec<_>>().join(" or ")
}

fn list(interfaces: &[Interface]) -> String {
    let one = |interface: &Interface| {
        let addresses: Vec<_> = interface.addresses.iter().map(|own| own.address.to_string()).collect();
        format!("{} [{}]", interface.name, addresses.join(" "))
    };
    interfaces.iter().filter(|interface| !interface.loopback).map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(address: &str) -> HostAddress {
        HostAddress {
            address: address.parse().unwrap(),
            permanent: true,
            deprecated: false,
            temporary: false,
        }
    }

    #[test]
    fn of_several_addresses_the_global_permanent_one_is_taken() {
        let leased = HostAddress { permanent: false, ..own("192.0.2.9/24") };
        let old = HostAddress { deprecated: true, ..own("192.0.2.8/24") };
        let addresses = [own("169.254.1.1/16"), old, leased, own("192.0.2.1/24"), own("192.0.2.2/24")];
        assert_eq!(best(&addresses, Family::V4), Some("192.0.2.1/24".parse().unwrap()));
        assert_eq!(best(&addresses[..1], Family::V4), Some("169.254.1.1/16".parse().unwrap()));
        assert_eq!(best(&addresses[1..2], Family::V4), None);
        assert_eq!(best(&addresses, Family::V6), None);
        let private = HostAddress { temporary: true, ..own("2001:db8::2/64") };
        let addresses = [own("fe80::1/64"), private, own("2001:db8::1/64")];
        assert_eq!(best(&addresses, Family::V6), Some("2001:db8::1/64".parse().unwrap()));
        assert_eq!(best(&addresses[..1], Family::V6), None);
    }

    #[test]
    fn an_address_that_was_asked_for_outweighs_the_order() {
        let interface = Interface {
            name: LinkName::new("eth0").unwrap(),
            mtu: 1500,
            up: true,
            loopback: false,
            addresses: vec![own("192.0.2.1/24"), own("192.0.2.2/24")],
        };
        let asked = uplink(&interface, &["192.0.2.2".parse().unwrap()], &Family::BOTH).unwrap();
        assert_eq!(asked.v4, Some("192.0.2.2/24".parse().unwrap()));
        assert_eq!(uplink(&interface, &[], &Family::BOTH).unwrap().v4, Some("192.0.2.1/24".parse().unwrap()));
        // One family of two is enough to be looked at; of the only one there must be an address.
        let error = uplink(&interface, &[], &[Family::V6]).unwrap_err();
        assert_eq!(error.to_string(), "interface eth0 has no usable IPv6 address");
    }

    #[test]
    fn flags_name_interfaces_and_addresses() {
        let choice = UplinkChoice::of_flags(&["eth1".into(), "10.0.0.1".into()]).unwrap();
        let eth1 = Wanted::Named(LinkName::new("eth1").unwrap());
        assert_eq!(choice, UplinkChoice::Any(vec![eth1, Wanted::Address("10.0.0.1".parse().unwrap())]));
        assert_eq!(UplinkChoice::of_flags(&[]).unwrap(), UplinkChoice::DefaultRoute);
        assert!(UplinkChoice::of_flags(&["an interface".into()]).is_err());
    }
}
