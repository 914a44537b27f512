//! What an agent must know of its host before it can offer a lease: uplink, identity, overlaps.

use std::net::{IpAddr, Ipv4Addr};

use super::settings::AgentSettings;
use crate::act::pass::chain;
use crate::decide::{backend, plan};
use crate::touch::world::kernel::Kernel;
use crate::touch::{identity, uplink};
use crate::words::addr::Prefix;
use crate::words::code::Code;
use crate::words::config::NetworkConfig;
use crate::words::lease::LeaseValue;
use crate::words::name::LinkName;
use crate::words::node::{Identity, Node, Uplink};
use crate::words::report::Finding;
use crate::words::units::Mtu;

/// This host, as far as our lease depends on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Survey {
    /// The interface that carries us.
    pub(super) link: LinkName,
    /// What is made once and kept.
    pub(super) identity: Identity,
    /// What our lease should say.
    pub(super) value: LeaseValue,
    /// Largest packet of a container.
    pub(super) mtu: Mtu,
    /// Addresses that this host reaches elsewhere: no subnet is taken from them.
    pub(super) avoid: Vec<Prefix>,
}

/// Looks at the host. `known` is the interface in use: it is kept as long as it exists and has an address.
pub(super) fn take(
    settings: &AgentSettings,
    config: &NetworkConfig,
    known: Option<LinkName>,
) -> Result<Survey, Finding> {
    let absent = |error: &dyn std::error::Error| Finding::new(Code::UPLINK_ABSENT, chain(error));
    let mut kernel = Kernel::open().map_err(|error| absent(&error))?;
    let kept =
        known.and_then(|link| uplink::read(&mut kernel, link).ok()).filter(|uplink| uplink.v4.is_some());
    let uplink = match kept {
        Some(uplink) => uplink,
        None => uplink::choose(&mut kernel, &settings.uplink, settings.public_ip)
            .map_err(|error| absent(&error))?,
    };
    let public_v4 = settings
        .public_ip
        .or_else(|| v4(&uplink))
        .ok_or_else(|| Finding::new(Code::UPLINK_ABSENT, format!("{} has no IPv4 address", uplink.link)))?;
    let routes =
        kernel.routes_of_others(&plan::remains(&settings.network, config.cidrs())).map_err(|e| absent(&e))?;
    if let Some(finding) = plan::overlap(config, &routes) {
        return Err(finding);
    }
    let backend = backend::of(&config.backend);
    let identity = identity::load(&mut kernel, &settings.state_dir, &settings.network, backend.device())
        .map_err(|error| Finding::new(Code::CHANGE_FAILED, chain(&error)))?;
    let node = Node {
        public_v4: Some(public_v4),
        public_v6: None,
        identity,
        routes,
        forward_chains: Default::default(),
        ipv6: kernel.has_ipv6(),
        ports: Default::default(),
        uplink,
    };
    let mtu = backend
        .mtu(config, &node)
        .map_err(|error| Finding::new(Code::MTU_ABOVE_UPLINK, error.to_string()))?;
    Ok(Survey {
        link: node.uplink.link,
        value: LeaseValue {
            public_ip: public_v4,
            public_ipv6: None,
            advertisement: backend.advertise(config, &node),
        },
        mtu,
        avoid: elsewhere(&node),
        identity: node.identity,
    })
}

/// The uplink's IPv4 address.
pub(super) fn v4(uplink: &Uplink) -> Option<Ipv4Addr> {
    match uplink.v4?.address() {
        IpAddr::V4(v4) => Some(v4),
        IpAddr::V6(_) => None,
    }
}

/// What others hold on this host inside the network: bridges of their own.
fn elsewhere(node: &Node) -> Vec<Prefix> {
    node.routes.iter().filter(|route| route.via.is_none()).map(|route| route.destination).collect()
}
