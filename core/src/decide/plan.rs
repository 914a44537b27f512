//! Everything that should be true on this node for one network, and what of the kernel it may touch for that.

use std::collections::BTreeSet;

use super::firewall::{self, FirewallScene, Range};
use super::publish::PublishScene;
use super::scene::{Draft, Scene};
use super::{backend, bridge, publish, tunnel_guard};
use crate::words::addr::{Family, InterfaceAddress, Prefix};
use crate::words::code::Code;
use crate::words::config::{BackendConfig, NetworkConfig};
use crate::words::exposure::Exposure;
use crate::words::extension::Errands;
use crate::words::fact::{Blackhole, BridgePort, Fact, Facts, Link, LinkKind, LinkModes, Sysctl, TunnelHost};
use crate::words::ipsec::Associations;
use crate::words::lease::{LeaseSet, OwnLease};
use crate::words::name::{LinkName, NetworkName};
use crate::words::node::{HostRoute, Node};
use crate::words::report::Finding;
use crate::words::territory::Territory;
use crate::words::tunnel::Tunnel;
use crate::words::units::{Mtu, OutOfRange};
use crate::words::wireguard::WireguardTunnel;

/// What a plan is made from: whole values, at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Which network.
    pub network: &'a NetworkName,
    /// Its configuration.
    pub config: &'a NetworkConfig,
    /// This host.
    pub node: &'a Node,
    /// Our lease.
    pub own: &'a OwnLease,
    /// Everybody's leases.
    pub leases: &'a LeaseSet,
    /// The bridge, if the agent keeps one, with the endpoints' ports on it.
    pub bridge: Option<LinkName>,
    /// Give what leaves the network the node's address (`--ip-masq`).
    pub masquerade: bool,
    /// Choose the source ports of that at random (not with `--ip-masq-fully-random-disable`).
    pub fully_random: bool,
    /// Accept what is forwarded from and to the network (`--iptables-forward-rules`).
    pub forward: bool,
    /// Take packets into the kernel's tunnels from holders of leases only (`--tunnel-guard`).
    pub guard: bool,
    /// Throw away what is sent to our own subnet while nothing here takes it (`--ip-blackhole-route`).
    pub blackhole: bool,
    /// CIDRs of this node's other networks, which this one must not reach.
    pub isolated_from: &'a BTreeSet<Prefix>,
    /// What is particular about this node's endpoints; none if that is another program's to say.
    pub exposure: Option<&'a Exposure>,
}

/// What should be true, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// What should be true.
    pub facts: Facts,
    /// The tunnel that this program itself should carry, before the facts can be true.
    pub tunnel: Option<Tunnel>,
    /// What charon should hold, beside the facts.
    pub associations: Option<Associations>,
    /// The WireGuard devices that this program itself should be, before the facts can be true.
    pub wireguard: Vec<WireguardTunnel>,
    /// What the operator's commands should be told, once the facts are true.
    pub errands: Option<Errands>,
    /// What may be looked at and deleted.
    pub territory: Territory,
    /// What the operator should know.
    pub findings: Vec<Finding>,
    /// Largest packet of a container: `FLANNEL_MTU`.
    pub mtu: Mtu,
    /// The network's ranges and our parts of them.
    pub ranges: Vec<Range>,
}

/// Why there is no plan at all.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// The encapsulation does not fit.
    #[error("backend {backend} leaves no room for a packet on {uplink}, whose MTU is {mtu}")]
    Mtu {
        /// The backend.
        backend: &'static str,
        /// The uplink.
        uplink: String,
        /// The uplink's MTU in bytes.
        mtu: Mtu,
        /// The number that came out.
        source: OutOfRange,
    },
}

/// Plans a node's part of a network. The same inputs give the same plan, in whatever order the leases came.
pub fn plan(inputs: &Inputs<'_>) -> Result<Plan, PlanError> {
    plan_among(inputs, 0)
}

/// The same where the leases are some of a crowd: of so many peers at least.
pub(super) fn plan_among(inputs: &Inputs<'_>, crowd: usize) -> Result<Plan, PlanError> {
    let Inputs { network, config, node, own, leases, .. } = *inputs;
    let backend = backend::of(&config.backend);
    let mtu = backend.mtu(config, node).map_err(|source| PlanError::Mtu {
        backend: config.backend.name(),
        uplink: node.uplink.link.to_string(),
        mtu: node.uplink.mtu,
        source,
    })?;
    let mut draft = Draft::default();
    let advertised = backend.advertise(config, node).backend;
    let mut scene = Scene::new(network, config, node, own, leases, &advertised, &mut draft);
    scene.crowd = crowd;
    plan_uplink(&scene, &mut draft);
    backend.plan(&scene, &mut draft);
    if inputs.guard && node.nftables {
        tunnel_guard::plan(&scene, leases, &mut draft);
    }
    let ranges = ranges(inputs, scene.families());
    plan_firewall(inputs, &ranges, &mut draft);
    if let Some(bridge) = inputs.bridge {
        plan_bridge(bridge, mtu, &scene, &mut draft);
    }

    if inputs.blackhole {
        for Range { subnet, .. } in &ranges {
            draft.add(Fact::Blackhole(Blackhole { destination: *subnet }));
        }
    }

    let Draft { facts, findings, tunnel, associations, wireguard, errands } = draft;
    let territory = territory(inputs, &facts);
    Ok(Plan { facts, tunnel, associations, wireguard, errands, territory, findings, mtu, ranges })
}

/// A host that forwards does not follow router advertisements any more, unless it is told to: 2 instead of 1
/// (Documentation/networking/ip-sysctl.rst, `accept_ra`). It stays so; nothing is lost by it.
fn plan_uplink(scene: &Scene<'_>, draft: &mut Draft) {
    if scene.node.ra_at_risk && scene.families().any(|family| family == Family::V6) {
        let path = format!("net/ipv6/conf/{}/accept_ra", scene.node.uplink.link);
        draft.add(Fact::Sysctl(Sysctl { link: None, path, value: "2".to_owned() }));
    }
}

fn plan_firewall(inputs: &Inputs<'_>, ranges: &[Range], draft: &mut Draft) {
    draft.join(firewall::plan(&FirewallScene {
        network: inputs.network,
        ranges,
        masquerade: inputs.masquerade,
        fully_random: inputs.fully_random,
        forward: inputs.forward,
        isolated_from: inputs.isolated_from,
        forward_chains: &inputs.node.forward_chains,
        iptables: &inputs.node.iptables,
        nftables: inputs.config.nftables,
    }));
    if let Some(exposure) = inputs.exposure {
        let bridge = inputs.bridge;
        draft.join(publish::plan(&PublishScene { network: inputs.network, ranges, exposure, bridge }));
    }
}

/// The network's ranges and our parts of them.
fn ranges(inputs: &Inputs<'_>, families: impl Iterator<Item = Family>) -> Vec<Range> {
    let range = |family: Family| {
        let (range, subnet) = (inputs.config.range(family)?, inputs.own.subnets.of(family)?);
        Some(Range { cidr: range.cidr, subnet })
    };
    families.filter_map(range).collect()
}

fn plan_bridge(name: LinkName, mtu: Mtu, scene: &Scene<'_>, draft: &mut Draft) {
    let gateway = |subnet: Prefix| InterfaceAddress::new(subnet.nth(1)?, subnet.len()).ok();
    let subnets = scene.families().filter_map(|family| scene.own.subnets.of(family));
    bridge_and_ports(name, subnets.filter_map(gateway).collect(), mtu, &scene.node.ports, draft);
}

/// The bridge and its ports. Neither carries the network's alias: an agent that keeps no bridge would take one that does
/// for a leftover, and with it the containers that another program attached to it.
pub(super) fn bridge_and_ports(
    name: LinkName,
    gateways: Vec<InterfaceAddress>,
    mtu: Mtu,
    ports: &BTreeSet<LinkName>,
    draft: &mut Draft,
) {
    draft.join(bridge::plan(&bridge::BridgeSpec {
        name,
        gateways,
        mtu,
        alias: None,
        options: bridge::BridgeOptions::default(),
    }));
    for port in ports {
        draft.add(Fact::Link(Box::new(Link {
            name: *port,
            kind: LinkKind::Veth { peer: None },
            mtu: None,
            mac: None,
            alias: None,
            up: true,
            modes: LinkModes::default(),
        })));
        draft.add(Fact::BridgePort(BridgePort {
            link: *port,
            bridge: name,
            hairpin: false,
            isolated: false,
        }));
    }
}

/// The territory of a network of which nothing is known any more but its name and, perhaps, its CIDRs: what an agent that
/// does not run left behind. The bridge is not in it, because the name alone does not say what it is called.
pub fn remains(network: &NetworkName, cidrs: impl IntoIterator<Item = Prefix>) -> Territory {
    Territory {
        alias: Some(Territory::alias_of(network)),
        cidrs: cidrs.into_iter().collect(),
        tables: BTreeSet::from([
            firewall::table_name(network),
            publish::table_name(network),
            TunnelHost::table_of(network),
        ]),
        accepts: !network.is_default(),
        policies: true,
        shared_chains: network.is_default(),
        ..Territory::default()
    }
}

fn territory(inputs: &Inputs<'_>, facts: &Facts) -> Territory {
    let planned = Territory::of(facts.iter());
    let mut rest = remains(inputs.network, inputs.config.cidrs());
    if inputs.exposure.is_none() {
        rest.tables.remove(&publish::table_name(inputs.network));
    }
    Territory { links: planned.links, ipip: planned.ipip, sysctls: planned.sysctls, ..rest }
}

/// Whether a network would take addresses that this host already reaches elsewhere. Such a network is refused before
/// anything is planned: it could cut the host off.
///
/// No conflict are default routes, routes of flannel devices, and what lies inside the network with at least a subnet's
/// length and leaves by a bridge or through a gateway: `docker0` with `--bip`, `cni0`, the peer routes that Go's
/// host-gw left behind. A bridge may still have a subnet of any length that this network's can have: that of a time before
/// `SubnetLen` was changed. What others have there is not routed past it ([`Scene`]).
pub fn overlap(config: &NetworkConfig, routes: &[HostRoute]) -> Option<Finding> {
    // Its commands make routes of any kind there, which a restart finds.
    let commands = matches!(config.backend, BackendConfig::Extension(_));
    // A packet must have a route before a policy takes it.
    let routed = |route: &HostRoute| {
        matches!(config.backend, BackendConfig::Ipsec(_))
            && config.cidrs().any(|cidr| cidr == route.destination)
    };
    let ranges = || config.v4.iter().chain(config.v6.iter());
    let (route, range) = routes.iter().flat_map(|route| ranges().map(move |range| (route, range))).find(
        |(route, range)| {
            let least = if route.bridge && route.via.is_none() {
                // A network has room for four of them.
                range.cidr.len() + 2
            } else {
                range.subnet_len()
            };
            let part = range.cidr.covers(&route.destination)
                && route.destination.len() >= least
                && (route.bridge || route.via.is_some());
            let part = part || (commands && range.cidr.covers(&route.destination));
            let flannels = route.link.is_some_and(|link| link.as_str().starts_with("flannel"));
            range.cidr.overlaps(&route.destination)
                && !route.destination.is_default()
                && !flannels
                && !part
                && !routed(route)
        },
    )?;
    let link = route.link.map(|link| format!(" dev {link}")).unwrap_or_default();
    let via = route.via.map(|via| format!(" via {via}")).unwrap_or_default();
    let text =
        format!("the network is {}, this host has the route {}{via}{link}", range.cidr, route.destination);
    Some(Finding::new(Code::NETWORK_OVERLAP, text))
}
