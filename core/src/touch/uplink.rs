//! Which interface carries us to our peers.
//!
//! **Source** — upstream pkg/ipmatch/match.go `LookupExtIface`, pkg/ip/iface.go `GetInterfaceIP4Addrs`: an interface is
//! named, or owns a given address, or the default route leaves by it; of its addresses a global one comes before a
//! link-local one and a permanent one before a leased one.

use std::net::{IpAddr, Ipv4Addr};

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
    #[error("interface {link} has no usable IPv4 address")]
    NoAddress {
        /// The interface.
        link: LinkName,
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

/// Finds the interface.
pub fn choose(
    kernel: &mut Kernel,
    choice: &UplinkChoice,
    public_ip: Option<Ipv4Addr>,
) -> Result<Uplink, UplinkError> {
    let interfaces = kernel.interfaces()?;
    let find = |wanted: Wanted| interfaces.iter().find(|interface| matches(interface, wanted));
    let (interface, address) = match choice {
        UplinkChoice::Any(wanted) => {
            let found = wanted.iter().find_map(|wanted| find(*wanted).map(|interface| (interface, *wanted)));
            let Some((interface, wanted)) = found else {
                return Err(UplinkError::NoMatch { wanted: names(wanted), candidates: list(&interfaces) });
            };
            let address = match wanted {
                Wanted::Address(address) => Some(address),
                Wanted::Named(_) => None,
            };
            (interface, address)
        }
        UplinkChoice::DefaultRoute => {
            let own = public_ip.and_then(|ip| find(Wanted::Address(ip.into())));
            match own {
                Some(interface) => (interface, public_ip.map(Into::into)),
                None => (by_default_route(kernel, &interfaces)?, None),
            }
        }
    };
    uplink(interface, address)
}

/// The interface of this name as it is now.
pub fn read(kernel: &mut Kernel, link: LinkName) -> Result<Uplink, UplinkError> {
    let interfaces = kernel.interfaces()?;
    let Some(interface) = interfaces.iter().find(|interface| interface.name == link) else {
        return Err(UplinkError::NoMatch { wanted: link.to_string(), candidates: list(&interfaces) });
    };
    uplink(interface, None)
}

fn by_default_route<'a>(
    kernel: &mut Kernel,
    interfaces: &'a [Interface],
) -> Result<&'a Interface, UplinkError> {
    let Some(route) = kernel.default_routes(Family::V4)?.into_iter().next() else {
        return Err(UplinkError::DefaultRoute("there is no default route", list(interfaces)));
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

/// `address` is the one that was asked for, which outweighs the order of preference.
fn uplink(interface: &Interface, address: Option<IpAddr>) -> Result<Uplink, UplinkError> {
    let link = interface.name;
    let mtu = Mtu::new(u64::from(interface.mtu)).map_err(|source| UplinkError::Mtu { link, source })?;
    let asked = |family| {
        let own = interface.addresses.iter().map(|own| own.address);
        own.filter(|own| own.family() == family).find(|own| Some(own.address()) == address)
    };
    let of = |family| asked(family).or_else(|| best(&interface.addresses, family));
    let v4 = of(Family::V4).ok_or(UplinkError::NoAddress { link })?;
    Ok(Uplink { link, mtu, v4: Some(v4), v6: of(Family::V6) })
}

/// The best address of a family: usable, then global, permanent, lasting; then in the kernel's order.
fn best(addresses: &[HostAddress], family: Family) -> Option<InterfaceAddress> {
    addresses
        .iter()
        .filter(|own| own.address.family() == family && !own.deprecated)
        .filter(|own| !own.address.address().is_loopback() && !own.address.address().is_multicast())
        .min_by_key(|own| (is_link_local(own.address.address()), !own.permanent, own.temporary))
        .map(|own| own.address)
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
        let asked = uplink(&interface, Some("192.0.2.2".parse().unwrap())).unwrap();
        assert_eq!(asked.v4, Some("192.0.2.2/24".parse().unwrap()));
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
