//! Whatever leases do, the peers that are known are those of the whole plan, and the kernel has them.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::decide::backend;
use crate::decide::delta::delta;
use crate::decide::plan::{self, plan};
use crate::touch::uplink::{Sought, UplinkChoice};
use crate::touch::world::WorldError;
use crate::words::addr::Mac;
use crate::words::config::NetworkConfig;
use crate::words::fact::Change;
use crate::words::lease::{LeaseValue, OwnLease, Subnets};
use crate::words::name::{LinkName, NetworkName};
use crate::words::node::{HostRoute, Identity, Uplink};
use crate::words::territory::Territory;
use crate::words::units::Mtu;

/// Enough that a few of them are planned by themselves.
const CROWD: usize = 520;

/// Takes everything that the kernel would.
#[derive(Default)]
struct Paper(Facts);

impl World for Paper {
    fn observe(&mut self, _: &Territory) -> Result<Facts, WorldError> {
        Ok(self.0.clone())
    }

    fn apply(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        for change in changes {
            match change {
                Change::Delete(fact) => drop(self.0.remove(&fact.key())),
                Change::Create(fact) | Change::Replace { new: fact, .. } => self.0.set((*fact).clone()),
            }
        }
        changes.iter().map(|_| Ok(())).collect()
    }
}

/// Something that happens to leases.
#[derive(Clone, Debug)]
enum Event {
    /// One comes, or moves: its number, its home, its MAC, the backend it says.
    Put(usize, u8, u16, bool),
    /// One goes.
    Gone(usize),
    /// One comes that covers others.
    Wide(usize, u8),
    /// That one goes.
    Narrow(usize, u8),
    /// Our own address is claimed.
    Impostor(usize),
    /// A host gets another subnet beside the one it has.
    Second(usize),
}

fn event() -> impl Strategy<Value = Event> {
    let number = || CROWD - 20..CROWD + 20;
    prop_oneof![
        8 => (number(), 1u8..5, 0u16..600, prop::bool::weighted(0.9)).prop_map(|(n, home, mac, same)| Event::Put(n, home, mac, same)),
        4 => number().prop_map(Event::Gone),
        1 => (number(), 18u8..24).prop_map(|(n, len)| Event::Wide(n, len)),
        1 => (number(), 18u8..24).prop_map(|(n, len)| Event::Narrow(n, len)),
        1 => number().prop_map(Event::Impostor),
        2 => number().prop_map(Event::Second),
    ]
}

fn key(n: usize) -> Subnets {
    Subnets::parse_key(&format!("10.{}.{}.0-24", 128 + n / 256, n % 256)).unwrap()
}

fn wide(n: usize, len: u8) -> Subnets {
    let base = [10, 128 + (n / 256) as u8, (n % 256) as u8, 0].into();
    Subnets::v4_only(crate::words::addr::Prefix::containing(base, len).unwrap())
}

fn value(backend: &str, public: &str, mac: u16) -> LeaseValue {
    let [high, low] = mac.to_be_bytes();
    let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:{high:02x}:{low:02x}"}}"#);
    let json = format!(
        r#"{{"PublicIP":"{public}","PublicIPv6":null,"BackendType":"{backend}","BackendData":{data}}}"#
    );
    LeaseValue::from_json(&json).unwrap()
}

impl Event {
    fn play(&self, backend: &str, set: &mut LeaseSet) {
        let leases = &mut set.leases;
        match self {
            Self::Put(n, home, mac, same) => {
                let public = format!("10.{}.{}.{}", 50 + home, n / 250, 1 + n % 250);
                let backend = if *same { backend } else { "extension" };
                leases.insert(key(*n), value(backend, &public, 1000 + *mac).into());
            }
            Self::Gone(n) => drop(leases.remove(&key(*n))),
            Self::Wide(n, len) => drop(leases.insert(wide(*n, *len), value(backend, "10.60.0.1", 9).into())),
            Self::Narrow(n, len) => drop(leases.remove(&wide(*n, *len))),
            Self::Impostor(n) => drop(leases.insert(key(*n), value(backend, "10.50.9.1", 8).into())),
            Self::Second(n) => {
                let first = leases.get(&key(*n)).cloned();
                leases.extend(first.map(|first| (key(n + 7), first)));
            }
        }
    }
}

/// With host-gw everybody is on its link, with vxlan those of one home are.
fn host(backend: &str) -> Node {
    let eth0 = LinkName::new("eth0").unwrap();
    let route = |destination: &str| HostRoute {
        destination: destination.parse().unwrap(),
        via: None,
        link: Some(eth0),
        bridge: false,
        protocol: crate::words::fact::RouteProtocol(2),
        scope_link: true,
    };
    Node {
        uplink: Uplink {
            link: eth0,
            mtu: Mtu::new(1500).unwrap(),
            v4: Some("10.50.9.1/8".parse().unwrap()),
            v6: None,
        },
        public_v4: Some("10.50.9.1".parse().unwrap()),
        public_v6: None,
        identity: Identity {
            vtep_mac: Mac([2, 0, 0, 9, 9, 9]),
            vtep_mac_v6: Mac([2, 0, 0, 9, 9, 8]),
            wireguard: None,
        },
        routes: vec![route(if backend == "vxlan" { "10.52.0.0/16" } else { "10.48.0.0/13" })],
        forward_chains: BTreeSet::new(),
        nftables: true,
        ipv6: false,
        ra_at_risk: false,
        ports: BTreeSet::new(),
        iptables: Default::default(),
        wireguard: false,
    }
}

fn plays(backend: &str, guard: bool, steps: &[Vec<Event>]) -> Result<usize, TestCaseError> {
    let document = format!(
        r#"{{"Network":"10.128.0.0/9","SubnetLen":24,"Backend":{{"Type":"{backend}","DirectRouting":true}}}}"#
    );
    let config = Arc::new(NetworkConfig::parse(&document).unwrap().config);
    let (network, node, none) = (NetworkName::default_network(), Arc::new(host(backend)), BTreeSet::new());
    let advertisement = backend::of(&config.backend).advertise(&config, &node);
    let own = OwnLease {
        subnets: Subnets::parse_key("10.255.0.0-24").unwrap(),
        value: LeaseValue { public_ip: node.public_v4.unwrap(), public_ipv6: None, advertisement },
    };
    let mut leases = LeaseSet::default();
    (0..CROWD).for_each(|n| Event::Put(n, 0, n as u16, true).play(backend, &mut leases));
    let inputs = |leases: &LeaseSet| Inputs {
        config: config.clone(),
        own: own.clone(),
        leases: Arc::new(leases.clone()),
        uplink: node.uplink.link,
        sought: Sought {
            choice: UplinkChoice::DefaultRoute,
            public_v4: None,
            public_v6: None,
            never: Vec::new(),
        },
        identity: node.identity.clone(),
        isolated_from: BTreeSet::new(),
        former: BTreeSet::new(),
    };
    let mut now = inputs(&leases);
    let scene = |now: &Inputs| {
        plan(&plan::Inputs {
            leases: &now.leases,
            guard,
            ..planned(&network, &config, &node, &own, &none, &now.leases)
        })
        .unwrap()
    };
    let mut whole = scene(&now);
    let mut world = Paper(whole.facts.clone());
    let rest = Known::rest(&whole.facts);
    let facts = std::mem::take(&mut whole.facts);
    let mut known = Known::after(&now, host(backend), rest, facts, (whole, Vec::new()));
    let mut by_themselves = 0;
    for step in steps {
        step.iter().for_each(|event| event.play(backend, &mut leases));
        now = inputs(&leases);
        prop_assert!(known.node(&now).is_some());
        let given = plan::Inputs { guard, ..planned(&network, &config, &node, &own, &none, &now.leases) };
        let before = plan::Inputs { leases: &known.inputs.leases, ..given };
        let whole = scene(&now);
        let mut told = whole.clone();
        let few = delta(&before, &now.leases).filter(|(old, new)| known.fits(old, new));
        let followed = match few {
            Some((old, new)) => {
                by_themselves += 1;
                let write = |gone: &Facts, come: &Facts| pass::step(&mut world, gone, come);
                known.shift(&now.leases, old, new, write).map(|(known, plan, report)| {
                    told = plan;
                    (known, report)
                })
            }
            None => known.follow(&mut world, &now, &mut told),
        };
        let Some((next, report)) = followed else { return Err(TestCaseError::fail("not followed")) };
        known = next;
        prop_assert_eq!(&peers_of(whole.facts.clone()), &known.peers);
        prop_assert_eq!(&world.0, &whole.facts);
        prop_assert_eq!(&told.findings, &whole.findings);
        prop_assert_eq!(report.desired, known.peers.len());
        prop_assert_eq!(known.clone().again(&now, &node), Some(whole));
    }
    Ok(by_themselves)
}

fn planned<'a>(
    network: &'a NetworkName,
    config: &'a NetworkConfig,
    node: &'a Node,
    own: &'a OwnLease,
    isolated_from: &'a BTreeSet<crate::words::addr::Prefix>,
    leases: &'a LeaseSet,
) -> plan::Inputs<'a> {
    plan::Inputs {
        network,
        config,
        node,
        own,
        leases,
        bridge: None,
        masquerade: true,
        fully_random: true,
        forward: true,
        guard: true,
        blackhole: false,
        isolated_from,
        exposure: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_leases_do_the_plan_is_that_of_all_of_them(
        steps in prop::collection::vec(prop::collection::vec(event(), 1..4), 1..8),
        vxlan in any::<bool>(),
        guard in any::<bool>(),
    ) {
        plays(if vxlan { "vxlan" } else { "host-gw" }, guard, &steps)?;
    }
}

#[test]
fn single_leases_are_planned_by_themselves() {
    let steps: Vec<Vec<Event>> = vec![
        vec![Event::Put(CROWD + 1, 1, 590, true)],
        vec![Event::Put(CROWD + 1, 2, 591, true)],
        vec![Event::Gone(CROWD + 1)],
        // One that covers others is everybody's business, and so is one with a MAC that another one has.
        vec![Event::Wide(CROWD, 20)],
        vec![Event::Narrow(CROWD, 20)],
        vec![Event::Put(CROWD + 2, 1, 3, true)],
    ];
    assert_eq!(plays("vxlan", true, &steps[..3]).unwrap(), 3);
    assert_eq!(plays("vxlan", true, &steps).unwrap(), 3);
    assert_eq!(plays("host-gw", true, &steps[..3]).unwrap(), 3);
}

#[test]
fn what_two_subnets_of_a_host_share_goes_with_the_second() {
    let put = vec![Event::Put(CROWD + 1, 1, 590, true)];
    let steps =
        [put, vec![Event::Second(CROWD + 1)], vec![Event::Gone(CROWD + 1)], vec![Event::Gone(CROWD + 8)]];
    for guard in [false, true] {
        plays("vxlan", guard, &steps).unwrap();
    }
}
