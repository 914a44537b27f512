//! What an agent must know of its host before it can offer a lease: uplink, identity, overlaps.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::settings::AgentSettings;
use super::wireguard;
use crate::act::pass::chain;
use crate::decide::{backend, plan};
use crate::touch::identity;
use crate::touch::uplink::{self, Pick, Sought};
use crate::touch::world::kernel::Kernel;
use crate::words::addr::{Family, InterfaceAddress, Prefix};
use crate::words::code::Code;
use crate::words::config::{BackendConfig, NetworkConfig};
use crate::words::lease::LeaseValue;
use crate::words::name::{LinkName, NetworkName};
use crate::words::node::{Identity, Node, Uplink};
use crate::words::report::Finding;
use crate::words::units::Mtu;

/// This host, as far as our lease depends on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Survey {
    /// The interface that carries us.
    pub(super) uplink: Uplink,
    /// How it was chosen, if it was chosen anew.
    pub(super) chosen: Option<Pick>,
    /// What is made once and kept.
    pub(super) identity: Identity,
    /// What our lease should say.
    pub(super) value: LeaseValue,
    /// Largest packet of a container.
    pub(super) mtu: Mtu,
    /// Addresses that this host reaches elsewhere: no subnet is taken from them.
    pub(super) avoid: Vec<Prefix>,
    /// Every address of this host, on whatever interface.
    pub(super) addresses: BTreeSet<IpAddr>,
}

impl Survey {
    /// Says which interface it is, and why, with what was asked for and does not fit.
    pub(super) fn tell(&self, network: &NetworkName, sought: &Sought) {
        if let Some(Pick { passed_over, candidates, why, .. }) = &self.chosen {
            for reason in passed_over {
                tracing::warn!(%network, "Could not find valid interface matching {reason}");
            }
            tracing::info!(%network, "Using interface with name {}: {why}; there are: {candidates}", self.uplink.link);
        }
        let public = self.public();
        let own = |public: bool, address: Option<InterfaceAddress>| {
            address.filter(|_| public).map(|address| address.address())
        };
        let addresses = [
            ("address", own(public.v4.is_some(), self.uplink.v4)),
            ("v6 address", own(public.v6.is_some(), self.uplink.v6)),
        ];
        let addresses = addresses.iter().filter_map(|(what, own)| Some(format!("{what} {}", (*own)?)));
        let addresses = addresses.collect::<Vec<_>>().join(" and ");
        tracing::info!(%network, "Using interface with name {} and {addresses}", self.uplink.link);
        let unused = [
            ("--public-ip", sought.public_v4.is_some() && public.v4.is_none(), Family::V4),
            ("--public-ipv6", sought.public_v6.is_some() && public.v6.is_none(), Family::V6),
        ];
        for (flag, _, family) in unused.into_iter().filter(|(_, is_unused, _)| *is_unused) {
            tracing::warn!(%network, "{flag} is not used: the network config enables no {family}");
        }
        let externals = [("", public.v4.map(IpAddr::from)), ("v6 ", public.v6.map(IpAddr::from))];
        for (v6, external) in externals.into_iter().filter_map(|(v6, address)| Some((v6, address?))) {
            match sought.is_said(external) {
                true => tracing::info!(%network, "Using {external} as external {v6}address"),
                false => {
                    tracing::info!(%network, "Defaulting external {v6}address to interface address ({external})");
                }
            }
        }
    }

    /// Whether a lease names an address of this host.
    pub(super) fn is_of(&self, value: &LeaseValue) -> bool {
        let public = Family::BOTH.into_iter().find_map(|family| value.public(family));
        public.is_some_and(|public| self.addresses.contains(&public))
    }

    /// How peers reach us.
    pub(super) fn public(&self) -> Public {
        let v4 = Some(self.value.public_ip).filter(|v4| !v4.is_unspecified());
        Public { v4, v6: self.value.public_ipv6 }
    }
}

/// How peers reach a node, in the families of its network.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Public {
    pub(super) v4: Option<Ipv4Addr>,
    pub(super) v6: Option<Ipv6Addr>,
}

impl Public {
    /// As a look at the host found it.
    pub(super) fn of_node(node: &Node) -> Self {
        Self { v4: node.public_v4, v6: node.public_v6 }
    }

    /// What was said, else what the uplink has.
    pub(super) fn of(sought: &Sought, uplink: &Uplink, config: &NetworkConfig) -> Self {
        let mut public = Self::default();
        for family in config.families() {
            match sought.public(uplink, family) {
                Some(IpAddr::V4(v4)) => public.v4 = Some(v4),
                Some(IpAddr::V6(v6)) => public.v6 = Some(v6),
                None => {}
            }
        }
        public
    }

    fn has(&self, family: Family) -> bool {
        match family {
            Family::V4 => self.v4.is_some(),
            Family::V6 => self.v6.is_some(),
        }
    }
}

/// Looks at the host. `known` is the interface in use: it is kept as long as it exists and has the addresses it needs.
/// `printed` is what the extension backend's command says of this host.
pub(super) fn take(
    settings: &AgentSettings,
    config: &NetworkConfig,
    known: Option<LinkName>,
    printed: Option<String>,
) -> Result<Survey, Finding> {
    let absent = |error: &dyn std::error::Error| Finding::new(Code::UPLINK_ABSENT, chain(error));
    let mut kernel = Kernel::open().map_err(|error| absent(&error))?;
    if config.v6.is_some() && !kernel.has_ipv6() {
        let text = "EnableIPv6 is true, and this kernel has no IPv6 (is it started with ipv6.disable=1?)";
        return Err(Finding::new(Code::CONFIG_BROKEN, text));
    }
    let families = config.families();
    let sought = &settings.uplink;
    let lacks = |uplink: &Uplink| {
        let public = Public::of(sought, uplink, config);
        families.iter().copied().find(|family| !public.has(*family))
    };
    let kept = known
        .and_then(|link| uplink::read(&mut kernel, link, sought, &families).ok())
        .filter(|uplink| lacks(uplink).is_none());
    let (uplink, chosen) = match kept {
        Some(uplink) => (uplink, None),
        None => {
            let pick = uplink::choose(&mut kernel, sought, &families).map_err(|error| absent(&error))?;
            (pick.uplink.clone(), Some(pick))
        }
    };
    if let Some(family) = lacks(&uplink) {
        return Err(no_address(uplink.link, family));
    }
    let public = Public::of(sought, &uplink, config);
    let interfaces = kernel.interfaces().map_err(|error| absent(&error))?;
    let addresses = interfaces.iter().flat_map(|interface| &interface.addresses);
    let addresses = addresses.map(|found| found.address.address()).collect();
    let routes =
        kernel.routes_of_others(&plan::remains(&settings.network, config.cidrs())).map_err(|e| absent(&e))?;
    // Behind a bridge may be containers; behind the one that leads to the peers is everybody.
    let mut judged = routes.clone();
    judged.iter_mut().for_each(|route| route.bridge &= route.link != Some(uplink.link));
    if let Some(finding) = plan::overlap(config, &judged) {
        return Err(finding);
    }
    let backend = backend::of(&config.backend);
    let mut identity = identity::load(&mut kernel, &settings.state_dir, &settings.network, backend.device())
        .map_err(|error| Finding::new(Code::CHANGE_FAILED, chain(&error)))?;
    if matches!(config.backend, BackendConfig::Wireguard(_)) {
        identity.wireguard = Some(Box::new(wireguard::keys(settings)?));
    }
    let node = Node {
        public_v4: public.v4,
        public_v6: public.v6,
        identity,
        routes,
        forward_chains: Default::default(),
        iptables: Default::default(),
        nftables: true,
        ipv6: kernel.has_ipv6(),
        ra_at_risk: false,
        // What is advertised does not depend on it.
        wireguard: true,
        ports: Default::default(),
        uplink,
    };
    let mtu = backend
        .mtu(config, &node)
        .map_err(|error| Finding::new(Code::MTU_ABOVE_UPLINK, error.to_string()))?;
    let mut advertisement = backend.advertise(config, &node);
    if let Some(printed) = printed {
        // A text always serializes.
        advertisement.data = serde_json::value::to_raw_value(&printed).ok();
    }
    Ok(Survey {
        chosen,
        value: LeaseValue {
            public_ip: public.v4.unwrap_or(Ipv4Addr::UNSPECIFIED),
            public_ipv6: public.v6,
            advertisement,
        },
        mtu,
        avoid: elsewhere(&node),
        addresses,
        identity: node.identity,
        uplink: node.uplink,
    })
}

fn no_address(link: LinkName, family: Family) -> Finding {
    let (key, flag) = match family {
        Family::V4 => ("EnableIPv4", "--public-ip"),
        Family::V6 => ("EnableIPv6", "--public-ipv6"),
    };
    let text = format!(
        "{key} is true, and interface {link} has no {family} address that peers could use; give it one, or say {flag}"
    );
    Finding::new(Code::UPLINK_ABSENT, text)
}

/// What others hold on this host inside the network: bridges of their own.
fn elsewhere(node: &Node) -> Vec<Prefix> {
    node.routes.iter().filter(|route| route.via.is_none()).map(|route| route.destination).collect()
}
