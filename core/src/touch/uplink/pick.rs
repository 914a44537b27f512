//! The choice itself, from what the kernel showed.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::{Pattern, Sought, UplinkChoice, UplinkError, Wanted};
use crate::touch::world::kernel::{DefaultRoute, HostAddress, Interface, Way};
use crate::words::addr::{Family, InterfaceAddress};
use crate::words::name::LinkName;
use crate::words::node::Uplink;
use crate::words::units::Mtu;

/// What the choice follows from.
#[derive(Clone, Default, Debug)]
pub(super) struct Ground {
    /// Every interface, in the kernel's order.
    pub(super) interfaces: Vec<Interface>,
    /// Default routes, best first.
    pub(super) defaults: BTreeMap<Family, Vec<DefaultRoute>>,
    /// How the addresses that were named are reached.
    pub(super) ways: BTreeMap<IpAddr, Option<Way>>,
}

/// The interface that was chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pick {
    /// The interface.
    pub uplink: Uplink,
    /// Why this one.
    pub why: String,
    /// What was asked for before and does not fit, each with the reason.
    pub passed_over: Vec<String>,
    /// Every interface with its addresses.
    pub candidates: String,
}

/// Chooses. The interface has an address of at least one of the families.
pub(super) fn pick(ground: &Ground, sought: &Sought, families: &[Family]) -> Result<Pick, UplinkError> {
    let candidates = ground.list();
    let (link, why) = match &sought.choice {
        UplinkChoice::Any(wanted) => {
            let mut passed_over = Vec::new();
            for wanted in wanted {
                let found = ground.find(wanted, families).and_then(|(link, why)| {
                    let uplink = ground.uplink(link, sought, families).map_err(|error| error.to_string())?;
                    Ok((uplink, why))
                });
                match found {
                    Ok((uplink, why)) => return Ok(Pick { uplink, why, passed_over, candidates }),
                    Err(reason) => passed_over.push(format!("{wanted}: {reason}")),
                }
            }
            return Err(UplinkError::NoMatch { tried: passed_over.join("; "), candidates });
        }
        UplinkChoice::DefaultRoute => {
            let said = families.iter().filter_map(|family| sought.said(*family));
            let owned =
                |address| Some((ground.owner(address)?, format!("it has the public address {address}")));
            match said.into_iter().find_map(owned) {
                Some(found) => found,
                None => (ground.by_default_route(families)?, "the default route leaves by it".to_owned()),
            }
        }
    };
    let uplink = ground.uplink(link, sought, families)?;
    Ok(Pick { uplink, why, passed_over: Vec::new(), candidates })
}

impl Ground {
    /// The interface that this says, and why; or why there is none.
    fn find(&self, wanted: &Wanted, families: &[Family]) -> Result<(LinkName, String), String> {
        let found = match wanted {
            Wanted::Named(name) => self.interface(*name).ok_or("there is none of this name")?.name,
            Wanted::Address(address) => self.owner(*address).ok_or("no interface has this address")?,
            Wanted::Matching(pattern) => {
                self.matching(pattern, families).ok_or("it matches no interface's address or name")?
            }
            Wanted::Toward(address) => match self.ways.get(address) {
                Some(Some(Way { local: true, .. })) => return Err("it is this host's own address".to_owned()),
                Some(Some(Way { link: Some(link), .. })) => *link,
                _ => return Err("this host has no route to it".to_owned()),
            },
        };
        Ok((found, format!("by {wanted}")))
    }

    /// The first interface with an address of every family that matches; else the first whose name does.
    fn matching(&self, pattern: &Pattern, families: &[Family]) -> Option<LinkName> {
        let others = || self.interfaces.iter().filter(|interface| !interface.loopback);
        let by_address = |interface: &&Interface| {
            let has = |family: &Family| matched(pattern, interface).any(|own| own.family() == *family);
            !families.is_empty() && families.iter().all(has)
        };
        let by_name = |interface: &&Interface| pattern.matches(interface.name.as_str());
        let found = others().find(by_address).or_else(|| others().find(by_name))?;
        Some(found.name)
    }

    /// The first family decides; the other one's packets to peers on the same link need no default route.
    fn by_default_route(&self, families: &[Family]) -> Result<LinkName, UplinkError> {
        let family = families.first().copied().unwrap_or(Family::V4);
        let Some(route) = self.defaults.get(&family).and_then(|routes| routes.first()) else {
            let text = match family {
                Family::V4 => "there is no default route",
                Family::V6 => "there is no IPv6 default route",
            };
            return Err(UplinkError::DefaultRoute(text, self.list()));
        };
        let several =
            || UplinkError::DefaultRoute("the default route leaves by several interfaces", self.list());
        route.link.filter(|link| self.interface(*link).is_some()).ok_or_else(several)
    }

    /// An interface of this name as an uplink.
    pub(super) fn uplink(
        &self,
        link: LinkName,
        sought: &Sought,
        families: &[Family],
    ) -> Result<Uplink, UplinkError> {
        let gone = || UplinkError::Gone { link, candidates: self.list() };
        let interface = self.interface(link).ok_or_else(gone)?;
        let mtu = Mtu::new(u64::from(interface.mtu)).map_err(|source| UplinkError::Mtu { link, source })?;
        let asked = self.asked(interface, sought);
        let named = |family| {
            let own =
                || interface.addresses.iter().map(|own| own.address).filter(|own| own.family() == family);
            asked.iter().find_map(|asked| own().find(|own| own.address() == *asked))
        };
        let of = |family| named(family).or_else(|| best(&interface.addresses, family));
        let uplink = Uplink { link, mtu, v4: of(Family::V4), v6: of(Family::V6) };
        match families.iter().find(|family| uplink.address(**family).is_some()) {
            Some(_) => Ok(uplink),
            None => {
                Err(UplinkError::NoAddress { link, family: families.first().copied().unwrap_or(Family::V4) })
            }
        }
    }

    /// Addresses that were asked for, which outweigh the order of preference among the interface's own.
    fn asked(&self, interface: &Interface, sought: &Sought) -> Vec<IpAddr> {
        let mut asked = Vec::new();
        for wanted in sought.choice.wanted() {
            match wanted {
                Wanted::Named(_) => {}
                Wanted::Address(address) => asked.push(*address),
                Wanted::Matching(pattern) => {
                    asked.extend(matched(pattern, interface).map(|own| own.address()));
                }
                Wanted::Toward(address) => {
                    let way = self.ways.get(address).copied().flatten();
                    let way = way.filter(|way| !way.local && way.link == Some(interface.name));
                    asked.extend(way.and_then(|way| way.source));
                }
            }
        }
        asked.extend(Family::BOTH.into_iter().filter_map(|family| sought.said(family)));
        asked
    }

    fn interface(&self, name: LinkName) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }

    fn owner(&self, address: IpAddr) -> Option<LinkName> {
        let owns =
            |interface: &&Interface| interface.addresses.iter().any(|own| own.address.address() == address);
        self.interfaces.iter().find(owns).map(|interface| interface.name)
    }

    /// Every interface with its addresses, for people.
    fn list(&self) -> String {
        let one = |interface: &Interface| {
            let addresses: Vec<_> = interface.addresses.iter().map(|own| own.address.to_string()).collect();
            format!("{} [{}]", interface.name, addresses.join(" "))
        };
        self.interfaces.iter().filter(|interface| !interface.loopback).map(one).collect::<Vec<_>>().join(", ")
    }
}

/// The addresses of an interface that match and can be used, best first.
fn matched(pattern: &Pattern, interface: &Interface) -> impl Iterator<Item = InterfaceAddress> {
    let usable = ranked(&interface.addresses);
    usable.into_iter().filter(|own| pattern.matches(&own.address().to_string()))
}

/// The best address of a family.
fn best(addresses: &[HostAddress], family: Family) -> Option<InterfaceAddress> {
    ranked(addresses).into_iter().find(|own| own.family() == family)
}

/// Usable ones; global, permanent, lasting ones first; then in the kernel's order.
fn ranked(addresses: &[HostAddress]) -> Vec<InterfaceAddress> {
    let usable = |own: &&HostAddress| !own.deprecated && is_usable(own.address.address());
    let mut usable: Vec<_> = addresses.iter().filter(usable).collect();
    usable.sort_by_key(|own| (is_link_local(own.address.address()), !own.permanent, own.temporary));
    usable.into_iter().map(|own| own.address).collect()
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

    fn interface(name: &str, addresses: &[&str]) -> Interface {
        Interface {
            name: LinkName::new(name).unwrap(),
            mtu: 1500,
            up: true,
            loopback: name == "lo",
            addresses: addresses.iter().map(|address| own(address)).collect(),
        }
    }

    /// A host with two interfaces, and a bridge whose address begins like theirs.
    fn ground() -> Ground {
        let eth1 = LinkName::new("eth1").unwrap();
        let way = |local, link| Some(Way { local, link, source: Some("10.1.0.6".parse().unwrap()) });
        Ground {
            interfaces: vec![
                interface("lo", &["127.0.0.1/8", "10.9.9.9/32"]),
                interface("eth0", &["192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64", "fe80::1/64"]),
                interface("eth1", &["10.1.0.5/24", "10.1.0.6/24", "2001:db8:1::5/64"]),
                interface("eth2", &[]),
                interface("docker0", &["10.1.7.1/24"]),
            ],
            defaults: [(Family::V4, vec![DefaultRoute { link: Some(eth1), metric: 0 }])].into(),
            ways: [
                ("10.1.0.99".parse().unwrap(), way(false, Some(eth1))),
                ("192.0.2.1".parse().unwrap(), way(true, None)),
                ("198.51.100.1".parse().unwrap(), None),
            ]
            .into(),
        }
    }

    fn text(pattern: &'static str) -> Wanted {
        Wanted::Matching(Pattern::new(pattern, move |text| text.contains(pattern)))
    }

    fn any(wanted: &[Wanted]) -> Sought {
        Sought::by(UplinkChoice::Any(wanted.to_vec()))
    }

    fn chosen(sought: &Sought, families: &[Family]) -> (String, String) {
        let pick = pick(&ground(), sought, families).unwrap();
        let own = |own: Option<InterfaceAddress>| own.map_or_else(String::new, |own| own.to_string());
        let Uplink { link, v4, v6, .. } = pick.uplink;
        let addresses = families.iter().map(|family| match family {
            Family::V4 => own(v4),
            Family::V6 => own(v6),
        });
        (format!("{link} {}", addresses.collect::<Vec<_>>().join(" ")), pick.why)
    }

    #[test]
    fn names_and_addresses_come_before_expressions_and_these_before_the_way_to_an_address() {
        let all = UplinkChoice::of_flags(
            &["eth9".parse().unwrap(), "192.0.2.2".parse().unwrap()],
            &[Pattern::new("10.1", |_| true)],
            Some("10.1.0.99".parse().unwrap()),
        );
        let pick = pick(&ground(), &Sought::by(all), &[Family::V4]).unwrap();
        assert_eq!(pick.passed_over, ["--iface eth9: there is none of this name"]);
        assert_eq!(pick.why, "by --iface 192.0.2.2");
        assert_eq!(pick.uplink.v4, Some("192.0.2.2/24".parse().unwrap()));
        assert!(pick.candidates.starts_with("eth0 [192.0.2.1/24 192.0.2.2/24 "), "{}", pick.candidates);
        assert_eq!(UplinkChoice::of_flags(&[], &[], None), UplinkChoice::DefaultRoute);
    }

    #[test]
    fn an_expression_is_held_against_addresses_first_and_then_against_names() {
        let v4 = [Family::V4];
        assert_eq!(chosen(&any(&[text("10.1.")]), &v4).0, "eth1 10.1.0.5/24");
        // Which of its addresses matched is the one that is used.
        assert_eq!(chosen(&any(&[text("0.6")]), &v4).0, "eth1 10.1.0.6/24");
        assert_eq!(
            chosen(&any(&[text("eth1")]), &v4),
            ("eth1 10.1.0.5/24".into(), "by --iface-regex eth1".into())
        );
        assert_eq!(chosen(&any(&[text("docker")]), &v4).0, "docker0 10.1.7.1/24");
        // Nothing that only this host can reach, and no link-local address.
        for nowhere in ["127.0", "10.9.9.9", "fe80"] {
            assert!(pick(&ground(), &any(&[text(nowhere)]), &Family::BOTH).is_err(), "{nowhere}");
        }
        // Of the families that the network has.
        assert!(pick(&ground(), &any(&[text("2001:db8:1:")]), &v4).is_err());
        assert_eq!(chosen(&any(&[text("2001:db8:1:")]), &[Family::V6]).0, "eth1 2001:db8:1::5/64");
        // Both must match one expression; a name is for both.
        assert!(pick(&ground(), &any(&[text("2001:db8:1:")]), &Family::BOTH).is_err());
        assert_eq!(chosen(&any(&[text("1")]), &Family::BOTH).0, "eth0 192.0.2.1/24 2001:db8::1/64");
        assert_eq!(chosen(&any(&[text("eth1")]), &Family::BOTH).0, "eth1 10.1.0.5/24 2001:db8:1::5/64");
    }

    #[test]
    fn the_way_to_an_address_names_the_interface_and_the_source() {
        let toward = |address: &str| any(&[Wanted::Toward(address.parse().unwrap())]);
        let found = chosen(&toward("10.1.0.99"), &Family::BOTH);
        assert_eq!(found.0, "eth1 10.1.0.6/24 2001:db8:1::5/64");
        assert_eq!(found.1, "by --iface-can-reach 10.1.0.99");
        let error = |address| pick(&ground(), &toward(address), &[Family::V4]).unwrap_err().to_string();
        assert!(error("192.0.2.1").contains("--iface-can-reach 192.0.2.1: it is this host's own address"));
        assert!(
            error("198.51.100.1").contains("--iface-can-reach 198.51.100.1: this host has no route to it")
        );
    }

    #[test]
    fn what_was_tried_and_what_there_is_is_said() {
        let wanted = any(&[
            "eth9".parse().unwrap(),
            "203.0.113.1".parse().unwrap(),
            text("wlan"),
            "eth2".parse().unwrap(),
        ]);
        let error = pick(&ground(), &wanted, &[Family::V4]).unwrap_err().to_string();
        assert_eq!(
            error,
            "no interface fits what was asked for: --iface eth9: there is none of this name; --iface 203.0.113.1: no \
             interface has this address; --iface-regex wlan: it matches no interface's address or name; --iface eth2: \
             interface eth2 has no usable IPv4 address; there are: eth0 [192.0.2.1/24 192.0.2.2/24 2001:db8::1/64 \
             fe80::1/64], eth1 [10.1.0.5/24 10.1.0.6/24 2001:db8:1::5/64], eth2 [], docker0 [10.1.7.1/24]"
        );
    }

    #[test]
    fn a_public_address_names_its_interface_and_one_behind_nat_leaves_the_default_route() {
        let public = |address: &str| Sought {
            public_v4: Some(address.parse().unwrap()),
            ..Sought::by(UplinkChoice::DefaultRoute)
        };
        let own = chosen(&public("192.0.2.2"), &[Family::V4]);
        assert_eq!(own, ("eth0 192.0.2.2/24".into(), "it has the public address 192.0.2.2".into()));
        let nat = chosen(&public("203.0.113.9"), &[Family::V4]);
        assert_eq!(nat, ("eth1 10.1.0.5/24".into(), "the default route leaves by it".into()));
        // What is asked for by name outweighs it.
        let both = Sought { choice: any(&["eth1".parse().unwrap()]).choice, ..public("192.0.2.2") };
        assert_eq!(chosen(&both, &[Family::V4]).0, "eth1 10.1.0.5/24");
        assert_eq!(
            both.public(&pick(&ground(), &both, &[Family::V4]).unwrap().uplink, Family::V4),
            "192.0.2.2".parse().ok()
        );
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
}
