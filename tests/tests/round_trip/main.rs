//! Write a fact into a real kernel, read the same fact back; every test in a network namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod facts;
mod others;
mod policies;
mod ports;
mod scale;

use std::collections::BTreeSet;
use std::error::Error;

use anyhow::{Context as _, Result, ensure};
use flannel_core::act::pass::converge;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::touch::world::{World as _, WorldError};
use flannel_core::words::fact::{
    Address, Blackhole, BridgePort, Change, Fact, Facts, Link, LinkKind, LinkModes, Route, RouteProtocol,
    RouteScope, Sysctl, diff,
};
use flannel_core::words::territory::Territory;
use flannel_core::words::units::Mtu;
use flannel_tests::{alone, another_namespace, sh};

use self::facts::{address, bridge, forward, mac, name, neighbor, route, veth, vxlan};

/// An underlay: a bridge of the test's own, with an address and a route to the neighborhood.
pub(crate) fn underlay() -> Result<()> {
    sh("ip link add up0 type bridge && ip addr add 192.168.77.1/24 dev up0")?;
    sh("ip -6 addr add fd77::1/64 dev up0 nodad && ip link set up0 up").map(drop)
}

pub(crate) fn all<T>(results: Vec<std::result::Result<T, WorldError>>) -> Result<()> {
    for result in results {
        result?;
    }
    Ok(())
}

/// Everything written is read back, writing again changes nothing, and deleting leaves nothing.
fn there_and_back(kernel: &mut Kernel, territory: &Territory, facts: Vec<Fact>) -> Result<Facts> {
    let count = facts.len();
    let desired: Facts = facts.into_iter().collect();
    ensure!(desired.len() == count, "two facts of the test share a key");
    let before = kernel.observe(territory)?;
    let created = diff(&desired, &before);
    all(kernel.apply(&created))?;
    let seen = kernel.observe(territory)?;
    let left = diff(&desired, &seen);
    ensure!(left.is_empty(), "after writing, still to do: {left:#?}\nseen:\n{seen}");
    // Written once more, the kernel takes it and nothing changes.
    let again: Vec<_> = desired.iter().map(Change::Create).collect();
    all(kernel.apply(&again))?;
    ensure!(kernel.observe(territory)? == seen, "writing again changed something");
    let nothing = Facts::default();
    all(kernel.apply(&diff(&nothing, &seen)))?;
    let mut rest = kernel.observe(territory)?;
    rest.retain(|fact| !matches!(fact, Fact::Sysctl(_)));
    ensure!(rest.is_empty(), "after deleting, still there:\n{rest}");
    // Deleting what is gone is no error.
    all(kernel.apply(&diff(&nothing, &seen)))?;
    Ok(seen)
}

pub(crate) fn owned(links: &[&str]) -> Territory {
    Territory { links: links.iter().map(|link| name(link)).collect(), ..Territory::default() }
}

/// The same territory, looked at through the alias: one look at all interfaces.
pub(crate) fn aliased(links: &[&str]) -> Territory {
    Territory { alias: Some("flannel network default".into()), ..owned(links) }
}

#[test]
fn a_bridge_with_addresses_and_a_route() {
    alone(|| {
        for territory in [owned(&["cni0"]), aliased(&["cni0"]), aliased(&[])] {
            let mut kernel = Kernel::open()?;
            let connected = Route { onlink: false, ..route("cni0", "10.100.9.0/24", None, 0) };
            let seen = there_and_back(
                &mut kernel,
                &territory,
                vec![
                    bridge("cni0"),
                    address("cni0", "10.100.5.1/24"),
                    address("cni0", "10.100.6.1/32"),
                    address("cni0", "fd42:cafe:0:5::1/64"),
                    Fact::Address(Address {
                        link: name("cni0"),
                        address: "10.100.7.1/24".parse()?,
                        no_prefix_route: true,
                        detect_duplicates: false,
                    }),
                    Fact::Route(connected.clone()),
                    Fact::Route(Route {
                        scope: RouteScope::Link,
                        ..route("cni0", "10.100.10.0/24", None, 7)
                    }),
                    Fact::Route(Route {
                        source: Some("10.100.5.1".parse()?),
                        ..route("cni0", "10.0.0.0/8", None, 0)
                    }),
                    Fact::Route(route("cni0", "0.0.0.0/0", Some("10.100.5.9"), 0)),
                    Fact::Route(Route { onlink: false, ..route("cni0", "fd42:1::/64", None, 1024) }),
                    Fact::Route(Route {
                        protocol: RouteProtocol::FLANNEL,
                        ..route("cni0", "fd42:2::/64", Some("fd42:2::1"), 99)
                    }),
                ],
            )?;
            let text = seen.to_string();
            ensure!(text.contains("ip addr replace 10.100.7.1/24 dev cni0 noprefixroute\n"), "{text}");
            ensure!(text.contains("ip route replace default via 10.100.5.9 dev cni0 onlink\n"), "{text}");
        }
        Ok(())
    });
}

#[test]
fn settings_of_the_host_and_of_an_interface() {
    alone(|| {
        let set = |link: Option<&str>, path: &str, value: &str| {
            let (link, path, value) = (link.map(name), path.to_owned(), value.to_owned());
            Fact::Sysctl(Sysctl { link, path, value })
        };
        let accept = set(Some("cni0"), "net/ipv6/conf/cni0/accept_ra", "0");
        let facts = vec![
            set(None, "net/ipv4/ip_forward", "1"),
            set(None, "net/ipv4/ip_local_port_range", "20000 60000"),
            bridge("cni0"),
            accept.clone(),
        ];
        let territory = Territory::of(&facts);
        there_and_back(&mut Kernel::open()?, &territory, facts)?;
        let forward = sh("sysctl -n net.ipv4.ip_forward")?;
        ensure!(forward == "1\n", "a setting is set, never unset: {forward}");
        let results = Kernel::open()?.apply(&[Change::Create(&accept)]);
        let text = results[0].as_ref().unwrap_err().to_string();
        ensure!(text == "could not add sysctl (`sysctl -w net.ipv6.conf.cni0.accept_ra=0`)", "{text}");
        Ok(())
    });
}

#[test]
fn a_vxlan_device_is_what_go_flannel_makes() {
    alone(|| {
        underlay()?;
        let mut kernel = Kernel::open()?;
        for (device, local) in [("flannel.1", "192.168.77.1"), ("flannel-v6.1", "fd77::1")] {
            all(kernel.apply(&[Change::Create(&vxlan(device, 1, local))]))?;
            let shown = sh(&format!("ip -d link show {device}"))?;
            let zero = if local.contains(':') { " local fd77::1" } else { " local 192.168.77.1" };
            ensure!(
                shown.contains(&format!(
                    "vxlan id 1{zero} dev up0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300"
                )),
                "{shown}"
            );
            ensure!(shown.contains("udpcsum noudp6zerocsumtx noudp6zerocsumrx"), "{shown}");
            ensure!(shown.contains("mtu 1430") && shown.contains("link/ether 76:e6:39:1b:26:de"), "{shown}");
            ensure!(shown.contains("alias flannel network default"), "{shown}");
        }
        Ok(())
    });
}

#[test]
fn peers_behind_vxlan_as_iproute2_shows_them() {
    alone(|| {
        underlay()?;
        let mut kernel = Kernel::open()?;
        for territory in [owned(&["flannel.1", "flannel-v6.1"]), aliased(&[])] {
            let facts = vec![
                vxlan("flannel.1", 1, "192.168.77.1"),
                vxlan("flannel-v6.1", 1, "fd77::1"),
                address("flannel.1", "10.100.5.0/32"),
                address("flannel-v6.1", "fd42:cafe:0:5::/128"),
                neighbor("flannel.1", "10.100.68.0", "76:e6:39:1b:26:d1"),
                forward("flannel.1", "76:e6:39:1b:26:d1", "192.168.77.2"),
                Fact::Route(route("flannel.1", "10.100.68.0/24", Some("10.100.68.0"), 0)),
                neighbor("flannel-v6.1", "fd42:cafe:0:1::", "76:e6:39:1b:26:d2"),
                forward("flannel-v6.1", "76:e6:39:1b:26:d2", "fd77::2"),
                Fact::Route(route("flannel-v6.1", "fd42:cafe:0:1::/64", Some("fd42:cafe:0:1::"), 1024)),
            ];
            let desired: Facts = facts.iter().cloned().collect();
            all(kernel.apply(&diff(&desired, &kernel_sees(&territory)?)))?;
            let routes = sh("ip route show dev flannel.1")? + &sh("ip -6 route show dev flannel-v6.1")?;
            ensure!(routes.contains("10.100.68.0/24 via 10.100.68.0 onlink"), "{routes}");
            ensure!(routes.contains("fd42:cafe:0:1::/64 via fd42:cafe:0:1:: metric 1024 onlink"), "{routes}");
            let fdb = sh("bridge fdb show dev flannel.1")? + &sh("bridge fdb show dev flannel-v6.1")?;
            ensure!(fdb.contains("76:e6:39:1b:26:d1 dst 192.168.77.2 self permanent"), "{fdb}");
            ensure!(fdb.contains("76:e6:39:1b:26:d2 dst fd77::2 self permanent"), "{fdb}");
            let neighbors = sh("ip neigh show dev flannel.1")?;
            ensure!(neighbors.contains("10.100.68.0 lladdr 76:e6:39:1b:26:d1 PERMANENT"), "{neighbors}");
            there_and_back(&mut kernel, &territory, facts)?;
        }
        Ok(())
    });
}

fn kernel_sees(territory: &Territory) -> Result<Facts> {
    Ok(Kernel::open()?.observe(territory)?)
}

#[test]
fn what_iproute2_writes_from_a_fact_is_the_fact() {
    alone(|| {
        underlay()?;
        let facts: Facts = vec![
            bridge("cni0"),
            vxlan("flannel.1", 1, "192.168.77.1"),
            Fact::BridgePort(BridgePort {
                link: name("v0"),
                bridge: name("cni0"),
                hairpin: true,
                isolated: true,
            }),
            veth("v0", "c0", false),
            address("cni0", "10.100.5.1/24"),
            address("flannel.1", "10.100.5.0/32"),
            neighbor("flannel.1", "10.100.68.0", "76:e6:39:1b:26:d1"),
            forward("flannel.1", "76:e6:39:1b:26:d1", "192.168.77.2"),
            Fact::Route(route("flannel.1", "10.100.68.0/24", Some("10.100.68.0"), 0)),
            Fact::Route(Route {
                protocol: RouteProtocol::FLANNEL,
                metric: 5,
                ..route("up0", "10.100.69.0/24", Some("192.168.77.9"), 0)
            }),
        ]
        .into_iter()
        .collect();
        for fact in facts.iter() {
            sh(&fact.to_string())?;
        }
        let mut territory = owned(&["cni0", "flannel.1", "v0"]);
        territory.cidrs.insert("10.100.0.0/16".parse()?);
        let seen = kernel_sees(&territory)?;
        let left = diff(&facts, &seen);
        ensure!(left.is_empty(), "iproute2 made something else: {left:#?}\n{seen}");
        Ok(())
    });
}

#[test]
fn a_veth_is_born_with_its_other_end_in_the_container() {
    alone(|| {
        let sandbox = another_namespace()?;
        let mut kernel = Kernel::open()?;
        kernel.set_sandbox(sandbox.try_clone()?);
        let port = Fact::BridgePort(BridgePort {
            link: name("veth0"),
            bridge: name("cni0"),
            hairpin: true,
            isolated: true,
        });
        let facts = [bridge("cni0"), veth("veth0", "eth0", true), port.clone()];
        let mut desired: Facts = facts.iter().cloned().collect();
        all(kernel.apply(&diff(&desired, &Facts::default())))?;

        let mut container = Kernel::open_inside(sandbox.in_place()?)?;
        let inner = container.link(name("eth0"))?.context("eth0 was not born in the container")?;
        ensure!(
            inner.mac == Some(mac("0a:58:0a:64:05:02")) && inner.mtu == Some(Mtu::new(1450)?) && !inner.up
        );
        ensure!(container.link(name("veth0"))?.is_none() && kernel.link(name("eth0"))?.is_none());
        let shown = sh("bridge -d link show dev veth0")?;
        ensure!(
            shown.contains("master cni0") && shown.contains("hairpin on") && shown.contains("isolated on"),
            "{shown}"
        );

        // Hairpin is repaired where it is asked for and let be where it is not; then off the bridge.
        let territory = owned(&["cni0", "veth0"]);
        sh("bridge link set dev veth0 hairpin off")?;
        let seen = kernel.observe(&territory)?;
        ensure!(matches!(diff(&desired, &seen)[..], [Change::Replace { .. }]), "{seen}");
        all(kernel.apply(&diff(&desired, &seen)))?;
        ensure!(sh("bridge -d link show dev veth0")?.contains("hairpin on"));
        let plain = Fact::BridgePort(BridgePort {
            link: name("veth0"),
            bridge: name("cni0"),
            hairpin: false,
            isolated: false,
        });
        all(kernel.apply(&[Change::Create(&plain)]))?;
        ensure!(sh("bridge -d link show dev veth0")?.contains("hairpin on"));
        desired.set(plain);
        ensure!(diff(&desired, &kernel.observe(&territory)?).is_empty());
        desired.remove(&port.key());
        let seen = kernel.observe(&territory)?;
        all(kernel.apply(&diff(&desired, &seen)))?;
        ensure!(!sh("ip link show veth0")?.contains("master"));

        // Inside: name, address and routes; and the setting of an interface there, not here.
        let accept = Sysctl {
            link: Some(name("eth0")),
            path: "net/ipv4/conf/eth0/arp_notify".into(),
            value: "1".into(),
        };
        let inside = vec![
            Fact::Link(Box::new(Link { alias: None, kind: LinkKind::Given, up: true, ..inner })),
            Fact::Link(Box::new(Link {
                name: name("lo"),
                kind: LinkKind::Given,
                mtu: None,
                mac: None,
                alias: None,
                up: true,
                modes: LinkModes::default(),
            })),
            address("eth0", "10.100.5.2/24"),
            Fact::Route(Route { onlink: false, ..route("eth0", "0.0.0.0/0", Some("10.100.5.1"), 0) }),
            Fact::Sysctl(accept),
        ];
        let territory = Territory { links: [name("eth0"), name("lo")].into(), ..Territory::of(&inside) };
        let desired: Facts = inside.into_iter().collect();
        let report = converge(&mut container, &territory, &desired)?;
        ensure!(report.clean && report.failed.is_empty(), "{report:#?}");
        all(kernel.apply(&[Change::Delete(&veth("veth0", "eth0", true))]))?;
        ensure!(container.link(name("eth0"))?.is_none(), "the other end goes too");
        Ok(())
    });
}

#[test]
fn a_veth_without_a_container_is_refused_in_words() {
    alone(|| {
        let mut kernel = Kernel::open()?;
        let wanted = veth("veth0", "eth0", true);
        let results = kernel.apply(&[Change::Create(&wanted)]);
        let text = results[0].as_ref().unwrap_err().to_string();
        ensure!(text.contains("no container namespace was given"), "{text}");
        Ok(())
    });
}

#[test]
fn a_changed_link_is_changed_in_place_and_a_different_one_made_anew() {
    alone(|| {
        underlay()?;
        let mut kernel = Kernel::open()?;
        let territory = owned(&["flannel.1"]);
        let desired: Facts = [vxlan("flannel.1", 1, "192.168.77.1")].into_iter().collect();
        all(kernel.apply(&diff(&desired, &Facts::default())))?;
        let index = || sh("ip -o link show flannel.1");
        let number = |text: &str| text.split(':').next().unwrap_or_default().to_owned();
        let first = index()?;

        // MTU, MAC, up and alias are changed on the device...
        sh("ip link set flannel.1 down mtu 1300 address 76:00:00:00:00:01")?;
        sh("ip link set flannel.1 alias other")?;
        let seen = kernel.observe(&territory)?;
        all(kernel.apply(&diff(&desired, &seen)))?;
        ensure!(diff(&desired, &kernel.observe(&territory)?).is_empty());
        ensure!(number(&index()?) == number(&first), "the device was made anew");

        // ...another VNI or another kind needs another device.
        let other: Facts = [vxlan("flannel.1", 2, "192.168.77.1")].into_iter().collect();
        let seen = kernel.observe(&territory)?;
        all(kernel.apply(&diff(&other, &seen)))?;
        ensure!(diff(&other, &kernel.observe(&territory)?).is_empty());
        ensure!(number(&index()?) != number(&first));
        sh("ip link del flannel.1")?;
        sh("ip link add flannel.1 type bridge")?;
        let seen = kernel.observe(&territory)?;
        all(kernel.apply(&diff(&desired, &seen)))?;
        ensure!(diff(&desired, &kernel.observe(&territory)?).is_empty());
        Ok(())
    });
}

#[test]
fn a_link_that_somebody_else_was_faster_to_make_is_taken_or_named() {
    alone(|| {
        let mut kernel = Kernel::open()?;
        let wanted = bridge("cni0");
        all(kernel.apply(&[Change::Create(&wanted)]))?;
        all(kernel.apply(&[Change::Create(&wanted)]))?;
        sh("ip link add other0 type veth peer name other1")?;
        let wrong = bridge("other0");
        let results = kernel.apply(&[Change::Create(&wrong), Change::Create(&wanted)]);
        let text = results[0].as_ref().unwrap_err().to_string();
        ensure!(text.contains("another interface of this name") && text.contains("type veth"), "{text}");
        ensure!(results[1].is_ok());
        Ok(())
    });
}

#[test]
fn a_vni_that_is_in_use_is_said_in_the_kernels_words() {
    alone(|| {
        underlay()?;
        sh("ip link add other0 type vxlan id 1 local 192.168.77.1 dev up0 dstport 8472")?;
        let wanted = vxlan("flannel.1", 1, "192.168.77.1");
        let results = Kernel::open()?.apply(&[Change::Create(&wanted)]);
        let text = results[0].as_ref().unwrap_err().to_string();
        ensure!(text.contains("A VXLAN device with the specified VNI already exists"), "{text}");
        Ok(())
    });
}

#[test]
fn a_name_taken_inside_the_container_is_said() {
    alone(|| {
        let sandbox = another_namespace()?;
        sandbox.run(|| sh("ip link add eth0 type bridge"))??;
        let mut kernel = Kernel::open()?;
        kernel.set_sandbox(sandbox);
        let wanted = veth("veth0", "eth0", true);
        let results = kernel.apply(&[Change::Create(&wanted)]);
        let text = results[0].as_ref().unwrap_err().to_string();
        ensure!(text.contains("the name of its other end is taken"), "{text}");
        Ok(())
    });
}

#[test]
fn a_route_that_gets_or_loses_its_gateway_is_there_all_the_time() {
    alone(|| {
        underlay()?;
        let mut kernel = Kernel::open()?;
        let look = move || -> Result<Facts> {
            let mut seen = Kernel::open()?.observe(&owned(&["up0"]))?;
            seen.retain(|fact| matches!(fact, Fact::Route(_)));
            Ok(seen)
        };
        let ours =
            |route: Route| Fact::Route(Route { protocol: RouteProtocol::FLANNEL, onlink: false, ..route });
        let through: Facts = [
            ours(route("up0", "10.1.0.0/16", Some("192.168.77.2"), 0)),
            ours(route("up0", "fd42:1::/64", Some("fd77::2"), 1024)),
        ]
        .into_iter()
        .collect();
        let connected: Facts =
            [ours(route("up0", "10.1.0.0/16", None, 0)), ours(route("up0", "fd42:1::/64", None, 1024))]
                .into_iter()
                .collect();
        all(kernel.apply(&diff(&through, &Facts::default())))?;
        for desired in [&connected, &through, &connected] {
            let seen = look()?;
            let changes = diff(desired, &seen);
            ensure!(changes.len() == 4, "{changes:#?}");
            all(kernel.apply(&changes))?;
            // In one step: no second round has to bring anything back.
            let now = look()?;
            ensure!(now == *desired, "{now}");
        }
        Ok(())
    });
}

#[test]
fn a_refused_route_is_explained_in_the_kernels_words() {
    alone(|| {
        underlay()?;
        let mut kernel = Kernel::open()?;
        let good = Fact::Route(route("up0", "10.1.0.0/16", Some("192.168.77.2"), 0));
        let bad = Fact::Route(Route { onlink: false, ..route("up0", "10.2.0.0/16", Some("10.99.0.1"), 0) });
        let lost = Fact::Route(route("nowhere", "10.3.0.0/16", Some("192.168.77.2"), 0));
        let last = Fact::Route(route("up0", "10.4.0.0/16", Some("192.168.77.2"), 0));
        let results = kernel.apply(&[&good, &bad, &lost, &last].map(Change::Create));
        ensure!(results[0].is_ok() && results[3].is_ok(), "{results:?}");
        let error = results[1].as_ref().unwrap_err();
        let text = error.to_string();
        ensure!(text.contains("Nexthop has invalid gateway"), "{text}");
        ensure!(text.contains("add route (`ip route replace 10.2.0.0/16 via 10.99.0.1 dev up0`)"), "{text}");
        ensure!(error.source().is_some_and(|e| e.to_string().contains("unreachable")), "{error:?}");
        let text = results[2].as_ref().unwrap_err().to_string();
        ensure!(text.contains("there is no interface nowhere"), "{text}");
        let shown = sh("ip route show")?;
        ensure!(shown.contains("10.1.0.0/16") && shown.contains("10.4.0.0/16"), "{shown}");
        Ok(())
    });
}

#[test]
fn an_alternative_name_is_not_the_name() {
    alone(|| {
        sh("ip link add real0 type bridge")?;
        sh("ip link property add dev real0 altname cni0")?;
        ensure!(Kernel::open()?.link(name("cni0"))?.is_none());
        Ok(())
    });
}

#[test]
fn a_namespace_without_anything_is_an_empty_look() {
    alone(|| {
        let mut territory = owned(&["cni0", "flannel.1"]);
        territory.cidrs.insert("10.100.0.0/16".parse()?);
        territory.sysctls.insert((Some(name("cni0")), "net/ipv6/conf/cni0/accept_ra".into()));
        ensure!(kernel_sees(&territory)?.is_empty());
        ensure!(Kernel::open()?.routes_of_others(&territory)?.is_empty());
        Ok(())
    });
}

#[test]
fn a_subnet_that_leads_nowhere_while_no_bridge_has_it() {
    alone(|| {
        sh("ip link set lo up; ip link add cni9 type bridge; ip link set cni9 up
            ip route add blackhole 10.100.8.0/24
            ip route add blackhole 10.101.8.0/24 proto 70")?;
        let mut kernel = Kernel::open()?;
        let cidrs = BTreeSet::from(["10.100.0.0/16".parse()?, "fd00:100::/48".parse()?]);
        let territory = Territory { cidrs, ..aliased(&[]) };
        let facts = ["10.100.5.0/24", "fd00:100:0:5::/64"]
            .map(|destination| Fact::Blackhole(Blackhole { destination: destination.parse().unwrap() }));
        let desired: Facts = facts.clone().into_iter().collect();
        all(kernel.apply(&diff(&desired, &Facts::default())))?;
        let shown = sh("ip route show type blackhole; ip -6 route show type blackhole")?;
        ensure!(shown.contains("blackhole 10.100.5.0/24 proto 70 metric 65535"), "{shown}");
        ensure!(shown.contains("blackhole fd00:100:0:5::/64 dev lo proto 70 metric 65535"), "{shown}");
        // The bridge's own route comes first, and is found beside it.
        sh("ip addr add 10.100.5.1/24 dev cni9")?;
        let way = sh("ip route get 10.100.5.9")?;
        ensure!(way.contains("dev cni9"), "{way}");
        sh("ip link del cni9")?;
        let way = kernel.way_to("10.100.5.9".parse()?)?;
        ensure!(way.is_none(), "{way:?}");
        // What another put there is neither an obstacle nor ours; what we put there is no route of others.
        let others = kernel.routes_of_others(&territory)?;
        let others: Vec<_> = others.iter().map(|route| route.destination.to_string()).collect();
        ensure!(others.contains(&"10.101.8.0/24".to_owned()), "{others:?}");
        ensure!(
            !others.iter().any(|other| other.starts_with("10.100.") || other.starts_with("fd00:100")),
            "{others:?}"
        );
        let seen = kernel.observe(&territory)?;
        all(kernel.apply(&diff(&Facts::default(), &seen)))?;
        there_and_back(&mut kernel, &territory, facts.to_vec())?;
        let left = sh("ip route show type blackhole; ip -6 route show type blackhole")?;
        ensure!(left.lines().count() == 2 && left.contains("blackhole 10.100.8.0/24"), "{left}");
        Ok(())
    });
}
