//! Scenes: a host with a past, and the plan it should come to. One generator for the fake kernel and the real one.

mod keeps;
pub(crate) mod peers;

use std::collections::BTreeSet;
use std::net::IpAddr;

use flannel_core::decide::backend;
use flannel_core::decide::plan::{Inputs, Plan, plan, remains};
use flannel_core::touch::world::World;
use flannel_core::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use flannel_core::words::config::NetworkConfig;
use flannel_core::words::fact::{
    Address, Change, Fact, Facts, Forward, Key, Link, LinkKind, LinkModes, Neighbor, Route, RouteExtras,
    RouteProtocol, RouteScope, VethPeer, Vxlan, shared_chain::Home,
};
use flannel_core::words::lease::{LeaseSet, LeaseValue, OwnLease, Subnets};
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::node::{HostRoute, Identity, Node, Uplink};
use flannel_core::words::territory::Territory;
use flannel_core::words::units::{Mtu, Port, Vni};
use flannel_tests::fake::FakeWorld;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use self::keeps::{Keeps, keeps};

/// A world whose interfaces somebody else can set up and down.
pub(crate) trait Bench: World {
    fn set_link(&mut self, name: LinkName, up: bool);
}

impl Bench for FakeWorld {
    fn set_link(&mut self, name: LinkName, up: bool) {
        Self::set_link(self, name, up);
    }
}

/// A configuration and who else is there.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    backend: &'static str,
    network: u8,
    own: u8,
    peers: Vec<Other>,
}

/// Another host.
#[derive(Clone, Debug)]
pub(crate) struct Other {
    subnet: u8,
    host: u8,
    mac: u8,
    far: bool,
}

/// Something done to a host behind our back.
#[derive(Clone, Debug)]
pub(crate) enum Mischief {
    /// A fact is knocked out.
    Knock(Index),
    /// A fact is bent: another MAC, another destination, another gateway.
    Bend(Index),
    /// A link that belongs to us goes down, perhaps up again.
    Down(Index, bool),
    /// The uplink flaps.
    Flap,
    /// A device with our alias and the new plan's VNI, under another name.
    Squat,
    /// A bridge has the name of the new plan's device.
    Impostor,
    /// Junk on a device of ours: an address, a neighbor, a route.
    Junk(Index),
}

/// A host with a past: what an earlier configuration made of it, what happened to that, and what should be now.
#[derive(Clone, Debug)]
pub(crate) struct Scene {
    name: &'static str,
    past: Option<Wish>,
    mischief: Vec<Mischief>,
    now: Wish,
    keeps: Keeps,
    reverse: bool,
}

const BACKENDS: &[&str] = &[
    r#"{"Type":"vxlan"}"#,
    r#"{"Type":"vxlan","VNI":2}"#,
    r#"{"Type":"vxlan","VNI":2,"Port":4789,"MTU":1400}"#,
    r#"{"Type":"vxlan","Learning":true}"#,
    r#"{"Type":"vxlan","DirectRouting":true}"#,
    r#"{"Type":"host-gw"}"#,
    r#"{"Type":"alloc"}"#,
];

fn other() -> impl Strategy<Value = Other> {
    (1u8..9, 2u8..12, 2u8..12, any::<bool>()).prop_map(|(subnet, host, mac, far)| Other {
        subnet,
        host,
        mac,
        far,
    })
}

fn wish() -> impl Strategy<Value = Wish> {
    (0..BACKENDS.len(), 0u8..2, 1u8..9, vec(other(), 0..7)).prop_map(|(backend, network, own, peers)| Wish {
        backend: BACKENDS[backend],
        network,
        own,
        peers,
    })
}

fn mischief() -> impl Strategy<Value = Mischief> {
    prop_oneof![
        6 => any::<Index>().prop_map(Mischief::Knock),
        6 => any::<Index>().prop_map(Mischief::Bend),
        2 => (any::<Index>(), any::<bool>()).prop_map(|(index, up)| Mischief::Down(index, up)),
        1 => Just(Mischief::Flap),
        1 => Just(Mischief::Squat),
        1 => Just(Mischief::Impostor),
        3 => any::<Index>().prop_map(Mischief::Junk),
    ]
}

pub(crate) fn scene() -> impl Strategy<Value = Scene> {
    (proptest::option::of(wish()), vec(mischief(), 0..8), wish(), keeps()).prop_map(
        |(past, mischief, now, keeps)| Scene { name: "default", past, mischief, now, keeps, reverse: false },
    )
}

impl Wish {
    fn config(&self) -> NetworkConfig {
        let network = 100 + self.network;
        let text = format!(
            r#"{{"Network":"10.{network}.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:{network}::/48","Backend":{}}}"#,
            self.backend
        );
        NetworkConfig::parse(&text).unwrap().config
    }

    fn subnets(&self, n: u8) -> Subnets {
        let network = 100 + self.network;
        Subnets::parse_key(&format!("10.{network}.{n}.0-24&fd42:{network}:0:{n:x}::-64")).unwrap()
    }

    fn plan(&self, name: &'static str, keeps: &Keeps, reverse: bool) -> Plan {
        let (network, config, mut node) = (NetworkName::new(name).unwrap(), self.config(), node());
        let backend = backend::of(&config.backend);
        let own = OwnLease {
            subnets: self.subnets(self.own),
            value: LeaseValue {
                public_ip: node.public_v4.unwrap(),
                public_ipv6: node.public_v6,
                advertisement: backend.advertise(&config, &node),
            },
        };
        let mut leases = LeaseSet::default();
        leases.leases.insert(own.subnets, own.value.clone().into());
        let mut peers: Vec<_> = self.peers.iter().filter(|peer| peer.subnet != self.own).collect();
        // Of two leases for one subnet there is only one in any store: the first here.
        peers.sort_by_key(|peer| peer.subnet);
        peers.dedup_by_key(|peer| peer.subnet);
        if reverse {
            peers.reverse();
            node.routes.reverse();
        }
        for peer in peers {
            leases.leases.insert(self.subnets(peer.subnet), peer.lease(&config).into());
        }
        if network.is_default() && keeps.bridge {
            node.ports.insert(link_name(PORT));
        }
        if keeps.chains {
            node.forward_chains.extend([Family::V4, Family::V6]);
            node.iptables.dropping.insert((Family::V6, Home::IptablesLegacy));
        }
        let isolated_from = BTreeSet::from(["10.222.0.0/16".parse().unwrap()]);
        plan(&Inputs {
            network: &network,
            config: &config,
            node: &node,
            own: &own,
            leases: &leases,
            bridge: keeps.bridge.then(|| network.bridge()),
            masquerade: keeps.masquerade,
            fully_random: true,
            forward: keeps.forward,
            guard: keeps.guard,
            blackhole: false,
            isolated_from: &isolated_from,
            exposure: None,
        })
        .unwrap()
    }
}

impl Other {
    fn lease(&self, config: &NetworkConfig) -> LeaseValue {
        let (host, mac, lan) = (self.host, self.mac, if self.far { 200 } else { 100 });
        let kind = config.backend.name();
        let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:00:{mac:02x}"}}"#);
        let rest = match kind {
            "alloc" => String::new(),
            "vxlan" => format!(r#","BackendType":"vxlan","BackendData":{data},"BackendV6Data":{data}"#),
            kind => format!(r#","BackendType":"{kind}""#),
        };
        let json =
            format!(r#"{{"PublicIP":"192.168.{lan}.{host}","PublicIPv6":"fd00:{lan}::{host:x}"{rest}}}"#);
        LeaseValue::from_json(&json).unwrap()
    }
}

impl Scene {
    fn of(backend: usize) -> Self {
        let peer = |n: u8| Other { subnet: n, host: n, mac: n, far: false };
        let now =
            Wish { backend: BACKENDS[backend], network: 0, own: 1, peers: vec![peer(2), peer(3), peer(4)] };
        let keeps = Keeps { bridge: true, masquerade: true, forward: true, chains: false, guard: true };
        Self { name: "default", past: None, mischief: Vec::new(), now, keeps, reverse: false }
    }

    /// vxlan with three peers, on a host where nothing happened yet.
    pub(crate) fn plain() -> Self {
        Self::of(0)
    }

    /// The same with host-gw.
    pub(crate) fn host_gw() -> Self {
        Self::of(5)
    }

    /// The same inputs in another order.
    pub(crate) fn reversed(&self) -> Self {
        Self { reverse: true, ..self.clone() }
    }

    /// The same on a host without a FORWARD chain of iptables.
    pub(crate) fn without_chains(mut self) -> Self {
        self.keeps.chains = false;
        self
    }

    /// The same host, before anything happened on it.
    pub(crate) fn ground_only(self) -> Self {
        Self { past: None, mischief: Vec::new(), ..self }
    }

    /// Another network on the same host: its own CIDR, VNI and name.
    pub(crate) fn second_network(&self) -> Self {
        let backend = r#"{"Type":"vxlan","VNI":77,"DirectRouting":true}"#;
        let now = Wish { backend, network: 50, ..self.now.clone() };
        Self { name: "web", past: None, mischief: Vec::new(), now, ..self.clone() }
    }

    /// What should be true in the end; what the past left outside of today's CIDR belongs to it.
    pub(crate) fn plan(&self) -> Plan {
        let mut plan = self.now.plan(self.name, &self.keeps, self.reverse);
        plan.territory
            .cidrs
            .extend(self.past.iter().flat_map(|past| past.config().cidrs().collect::<Vec<_>>()));
        plan
    }

    /// The same network when it leaves the host: its territory, by name and CIDRs alone, and nothing in it.
    pub(crate) fn retired(&self) -> Plan {
        let (network, plan) = (NetworkName::new(self.name).unwrap(), self.plan());
        let mut territory = remains(&network, plan.territory.cidrs);
        territory.links.extend(self.keeps.bridge.then(|| network.bridge()));
        Plan { facts: Facts::default(), territory, ..plan }
    }

    /// Makes the host: the ground, other people's things, our past, and what happened to it.
    pub(crate) fn play(&self, world: &mut dyn Bench) {
        for fact in ground().iter().chain(&others()) {
            let result = world.apply(&[Change::Create(fact)]).remove(0);
            result.unwrap_or_else(|error| panic!("{fact}: {error:?}"));
            if fact.key() == Key::Link(link_name("eth0")) {
                // The wire's other end: without it eth0 has no carrier.
                world.set_link(link_name("far0"), true);
            }
        }
        let past = self.past.as_ref().map(|past| past.plan(self.name, &self.keeps, false));
        // The endpoint is somebody else's; it is on the ground already.
        let endpoint =
            |fact: &Fact| matches!(fact, Fact::Link(link) if matches!(link.kind, LinkKind::Veth { .. }));
        let planned = past.iter().flat_map(|past| past.facts.iter());
        let facts: Vec<Fact> = planned.filter(|fact| !endpoint(fact)).cloned().collect();
        for fact in &facts {
            let result = world.apply(&[Change::Create(fact)]).remove(0);
            result.unwrap_or_else(|error| panic!("{fact}: {error:?}"));
        }
        // Some of it cannot be done any more after what was done before; that is a past, too.
        for mischief in &self.mischief {
            self.act(mischief, &facts, world);
        }
    }

    fn act(&self, mischief: &Mischief, past: &[Fact], world: &mut dyn Bench) {
        let links: Vec<LinkName> = past
            .iter()
            .filter_map(|f| if let Fact::Link(link) = f { Some(link.name) } else { None })
            .collect();
        let force = |world: &mut dyn Bench, fact: &Fact| drop(world.apply(&[Change::Create(fact)]));
        match mischief {
            Mischief::Knock(index) if !past.is_empty() => {
                world.apply(&[Change::Delete(index.get(past))]);
            }
            Mischief::Bend(index) if !past.is_empty() => {
                let old = index.get(past);
                if let Some(new) = bent(old) {
                    world.apply(&[Change::Replace { old, new: &new }]);
                }
            }
            Mischief::Down(index, up) if !links.is_empty() => {
                world.set_link(*index.get(&links), false);
                if *up {
                    world.set_link(*index.get(&links), true);
                }
            }
            Mischief::Flap => flap(world),
            Mischief::Squat => {
                let alias = Territory::alias_of(&NetworkName::new(self.name).unwrap());
                let squatter = squatter(&self.now.plan(self.name, &self.keeps, false), Some(&alias));
                force(world, &Fact::Link(Box::new(squatter)));
            }
            Mischief::Impostor => {
                let link = Link { kind: LinkKind::Bridge, ..vxlan("flannel.1", 1, None) };
                force(world, &Fact::Link(Box::new(link)));
            }
            Mischief::Junk(index) if !links.is_empty() => {
                let link = *index.get(&links);
                for fact in junk(link) {
                    force(world, &fact);
                }
            }
            _ => {}
        }
    }
}

/// What should still be there of the ground and of other people's things, and is not.
pub(crate) fn harmed(world: &mut dyn Bench) -> Vec<String> {
    let facts: Vec<Fact> = ground().into_iter().chain(others()).collect();
    let territory = Territory::of(&facts);
    let there = world.observe(&territory).unwrap();
    let lost = |fact: &&Fact| !there.get(&fact.key()).is_some_and(|have| fact.satisfied_by(have));
    facts.iter().filter(lost).map(Fact::to_string).collect()
}

/// Routes marked as ours and devices with our alias that a plan does not hold: what was left behind anywhere, whether or
/// not the plan's territory would look there.
pub(crate) fn strays(world: &FakeWorld, plan: &Plan) -> Vec<String> {
    let both: [Prefix; 2] = ["10.100.0.0/15".parse().unwrap(), "fd42:100::/31".parse().unwrap()];
    let stray = |fact: &&Fact| match fact {
        Fact::Link(link) => link.alias.as_deref() == Some("flannel network default"),
        Fact::Route(route) => {
            route.protocol == RouteProtocol::FLANNEL
                && both.iter().any(|cidr| cidr.covers(&route.destination))
        }
        _ => false,
    };
    let wanted = |fact: &&Fact| plan.facts.get(&fact.key()).is_none();
    world.everything().iter().filter(stray).filter(wanted).map(Fact::to_string).collect()
}

/// The uplink goes down and comes back, and whoever looks after it brings its IPv6 addresses and routes back.
pub(crate) fn flap(world: &mut dyn Bench) {
    world.set_link(link_name("eth0"), false);
    world.set_link(link_name("eth0"), true);
    for fact in ground().iter().chain(&others()).filter(|fact| !matches!(fact, Fact::Link(_))) {
        world.apply(&[Change::Create(fact)]);
    }
}

/// The same key with another value, where a fact has one.
fn bent(fact: &Fact) -> Option<Fact> {
    let mac = Mac([2, 9, 9, 9, 9, 9]);
    match fact.clone() {
        Fact::Link(mut link) => {
            link.mtu = Mtu::new(1300).ok();
            link.mac = Some(mac);
            Some(Fact::Link(link))
        }
        Fact::Neighbor(neighbor) => Some(Fact::Neighbor(Neighbor { mac, ..neighbor })),
        Fact::Forward(forward) => {
            let remote = if forward.remote.is_ipv4() { "192.168.100.99" } else { "fd00:100::99" };
            Some(Fact::Forward(Forward { remote: ip(remote), ..forward }))
        }
        Fact::Route(route) if route.onlink => {
            let via = if route.destination.base().is_ipv4() { "10.9.9.9" } else { "fd99::9" };
            Some(Fact::Route(Route { via: Some(ip(via)), ..route }))
        }
        _ => None,
    }
}

/// What does not belong on a device of ours.
fn junk(link: LinkName) -> Vec<Fact> {
    vec![
        Fact::Address(Address {
            link,
            address: address("10.66.0.1/24"),
            no_prefix_route: false,
            detect_duplicates: false,
        }),
        Fact::Neighbor(Neighbor { link, ip: ip("10.66.0.9"), mac: Mac([2, 6, 6, 0, 0, 9]) }),
        route("10.67.0.0/16".parse().unwrap(), None, link, 4),
    ]
}

/// The host's end of an endpoint that somebody attached to the default network.
const PORT: &str = "veth0123456789a";

/// A host with an uplink: eth0 in two families, a default route, and one endpoint.
pub(crate) fn ground() -> Vec<Fact> {
    let eth0 = link_name("eth0");
    let link = |name: &str, mac: u8, kind: LinkKind| {
        let mac = Some(Mac([2, 3, 0, 0, 0, mac]));
        Fact::Link(Box::new(Link {
            name: link_name(name),
            kind,
            mtu: None,
            mac,
            alias: None,
            up: true,
            modes: LinkModes::default(),
        }))
    };
    let pair = |peer: &str, mac: u8| {
        let mac = Some(Mac([2, 3, 0, 0, 0, mac]));
        LinkKind::Veth { peer: Some(VethPeer { name: link_name(peer), mac, mtu: None, in_sandbox: false }) }
    };
    vec![
        link("eth0", 1, pair("far0", 2)),
        link(PORT, 3, pair("container0", 4)),
        Fact::Address(Address {
            link: eth0,
            address: address("192.168.100.1/24"),
            no_prefix_route: false,
            detect_duplicates: false,
        }),
        Fact::Address(Address {
            link: eth0,
            address: address("fd00:100::1/64"),
            no_prefix_route: false,
            detect_duplicates: false,
        }),
        route("0.0.0.0/0".parse().unwrap(), Some(ip("192.168.100.254")), eth0, 4),
        route("::/0".parse().unwrap(), Some(ip("fd00:100::fe")), eth0, 4),
    ]
}

/// Things of others that look as much like ours as they can without being ours.
pub(crate) fn others() -> Vec<Fact> {
    let (eth0, docker0, theirs) = (link_name("eth0"), link_name("docker0"), link_name("vxlan.calico"));
    let onlink = Route {
        destination: "10.200.7.0/24".parse().unwrap(),
        via: Some(ip("10.200.7.0")),
        link: theirs,
        onlink: true,
        metric: 0,
        scope: RouteScope::Global,
        source: None,
        protocol: RouteProtocol(80),
        extras: RouteExtras::default(),
    };
    vec![
        Fact::Link(Box::new(Link { kind: LinkKind::Bridge, ..vxlan("docker0", 0, None) })),
        Fact::Link(Box::new(vxlan("vxlan.calico", 4096, Some("flannel network other")))),
        Fact::Address(Address {
            link: docker0,
            address: address("172.17.0.1/16"),
            no_prefix_route: false,
            detect_duplicates: false,
        }),
        Fact::Address(Address {
            link: theirs,
            address: address("10.200.1.0/32"),
            no_prefix_route: false,
            detect_duplicates: false,
        }),
        Fact::Address(Address {
            link: eth0,
            address: address("192.168.101.50/24"),
            no_prefix_route: false,
            detect_duplicates: false,
        }),
        Fact::Neighbor(Neighbor { link: theirs, ip: ip("10.200.7.0"), mac: Mac([2, 7, 7, 7, 7, 7]) }),
        Fact::Neighbor(Neighbor { link: eth0, ip: ip("192.168.100.254"), mac: Mac([2, 7, 7, 7, 7, 8]) }),
        Fact::Forward(Forward { link: theirs, mac: Mac([2, 7, 7, 7, 7, 7]), remote: ip("192.168.100.7") }),
        Fact::Route(onlink),
        // In our CIDR but not marked as ours; marked as ours but not in our CIDR.
        route("10.100.200.0/24".parse().unwrap(), Some(ip("192.168.100.77")), eth0, 4),
        route("172.20.0.0/16".parse().unwrap(), Some(ip("192.168.100.77")), eth0, 70),
    ]
}

/// A device that takes the VNI of a plan's device under another name.
pub(crate) fn squatter(plan: &Plan, alias: Option<&str>) -> Link {
    let planned = plan.facts.iter().find_map(|fact| match fact {
        Fact::Link(link) if matches!(link.kind, LinkKind::Vxlan(_)) => Some((**link).clone()),
        _ => None,
    });
    let planned = planned.unwrap_or_else(|| vxlan("flannel.1", 1, None));
    Link { name: link_name("flannel-old"), alias: alias.map(str::to_owned), ..planned }
}

pub(crate) fn vxlan(link: &str, vni: u64, alias: Option<&str>) -> Link {
    Link {
        name: link_name(link),
        kind: LinkKind::Vxlan(Vxlan {
            vni: Vni::new(vni).unwrap(),
            port: Port::VXLAN,
            local: ip("192.168.100.1"),
            underlay: link_name("eth0"),
            learning: false,
            gbp: false,
        }),
        mtu: None,
        mac: Some(Mac([2, 4, 0, 0, 0, vni as u8])),
        alias: alias.map(str::to_owned),
        up: true,
        modes: LinkModes::default(),
    }
}

pub(crate) fn route(destination: Prefix, via: Option<IpAddr>, link: LinkName, protocol: u8) -> Fact {
    let scope =
        if via.is_none() && destination.base().is_ipv4() { RouteScope::Link } else { RouteScope::Global };
    Fact::Route(Route {
        destination,
        via,
        link,
        onlink: false,
        metric: if destination.base().is_ipv4() { 0 } else { 1024 },
        scope,
        source: None,
        protocol: RouteProtocol(protocol),
        extras: RouteExtras::default(),
    })
}

pub(crate) fn link_name(text: &str) -> LinkName {
    LinkName::new(text).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn address(text: &str) -> InterfaceAddress {
    text.parse().unwrap()
}

fn node() -> Node {
    let route = |destination: &str, via: Option<&str>| HostRoute {
        destination: destination.parse().unwrap(),
        via: via.map(ip),
        link: Some(link_name("eth0")),
        bridge: false,
        protocol: RouteProtocol::BOOT,
        scope_link: via.is_none(),
    };
    let (v4, v6) = (Some(address("192.168.100.1/24")), Some(address("fd00:100::1/64")));
    let (vtep_mac, vtep_mac_v6) = (Mac([2, 0, 0, 4, 0, 1]), Mac([2, 0, 0, 6, 0, 1]));
    Node {
        uplink: Uplink { link: link_name("eth0"), mtu: Mtu::ETHERNET, v4, v6 },
        public_v4: "192.168.100.1".parse().ok(),
        public_v6: "fd00:100::1".parse().ok(),
        identity: Identity { vtep_mac, vtep_mac_v6, wireguard: None },
        routes: vec![
            route("0.0.0.0/0", Some("192.168.100.254")),
            route("192.168.100.0/24", None),
            route("::/0", Some("fd00:100::fe")),
            route("fd00:100::/64", None),
        ],
        forward_chains: Default::default(),
        iptables: Default::default(),
        ipv6: true,
        nftables: true,
        ra_at_risk: false,
        wireguard: true,
        ports: Default::default(),
    }
}
