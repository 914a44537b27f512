//! From any mess to the plan: the properties that make "the next pass" the answer to everything.
//!
//! The same scenes run on the fake kernel, thousands of times, and on the real one in a fresh namespace. The fake is compared
//! with the kernel on random scripts, so what it says can be trusted.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic where it stands")]

mod scenes;

use std::process::Command;

use flannel_core::act::pass::{ROUNDS_MAX, converge, step};
use flannel_core::decide::plan::Plan;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::touch::world::{World, WorldError};
use flannel_core::words::addr::{Mac, Prefix};
use flannel_core::words::fact::{
    Address, BridgePort, Change, Fact, Facts, Forward, Link, LinkKind, Neighbor, Route, diff,
};
use flannel_core::words::name::LinkName;
use flannel_core::words::report::Report;
use flannel_core::words::territory::Territory;
use flannel_core::words::units::Mtu;
use flannel_tests::fake::FakeWorld;
use flannel_tests::needs::require_root_and_namespaces;
use nix::sched::{CloneFlags, unshare};
use proptest::collection::vec;
use proptest::prelude::*;

use scenes::peers::peers;
use scenes::{
    Bench, Other, Scene, flap, ground, harmed, link_name, others, route, scene, squatter, strays, vxlan,
};

/// The cases each property is tried with; every one is a host with another past.
const CASES: u32 = 400;

/// The same on a real kernel, which takes its time to make and to unmake namespaces.
const KERNEL_CASES: u32 = 40;

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Brings a world to the plan, and holds it to everything a pass promises.
fn reaches(world: &mut dyn Bench, plan: &Plan) -> Result<Report, TestCaseError> {
    let report = converge(world, &plan.territory, &plan.facts).unwrap();
    let observed = world.observe(&plan.territory).unwrap();
    let left: Vec<_> = diff(&plan.facts, &observed).iter().map(Change::to_string).collect();
    prop_assert!(left.is_empty(), "left to do: {left:#?}\nreport: {report:#?}");
    prop_assert!(report.clean && report.failed.is_empty(), "{report:#?}");
    prop_assert!(report.looks <= ROUNDS_MAX + 1, "{report:#?}");
    let again = converge(world, &plan.territory, &plan.facts).unwrap();
    prop_assert!(again.clean && again.looks == 1 && again.made.is_empty(), "second pass: {again:#?}");
    Ok(report)
}

/// Brings a world from plan to plan by their differences alone: after each, a look finds nothing to do, and nothing but what is about
/// peers has changed.
fn follows(world: &mut dyn Bench, scene: &Scene, changes: Vec<Vec<Other>>) -> Result<(), TestCaseError> {
    let mut plan = scene.plan();
    reaches(world, &plan)?;
    for peers in changes {
        let next = scene.among(peers).plan();
        let report = step(world, &plan.facts, &next.facts);
        prop_assert!(report.clean && report.failed.is_empty() && report.looks == 0, "{report:#?}");
        let kinds = ["neighbor", "forward", "tunnel_host", "route"];
        prop_assert!(report.made.iter().all(|made| kinds.contains(&made.kind)), "{report:#?}");
        let look = converge(world, &next.territory, &next.facts).unwrap();
        prop_assert!(look.clean && look.made.is_empty(), "{look:#?}");
        plan = next;
    }
    Ok(())
}

/// A fake kernel with the scene played on it.
fn fake(scene: &Scene) -> FakeWorld {
    let mut world = FakeWorld::new();
    scene.play(&mut world);
    world
}

proptest! {
    #![proptest_config(cases(CASES))]

    #[test]
    fn any_mess_becomes_the_plan_and_nothing_else_is_touched(scene in scene()) {
        let (mut world, plan) = (fake(&scene), scene.plan());
        let before = world.outside(&plan.territory);
        reaches(&mut world, &plan)?;
        prop_assert_eq!(before.to_string(), world.outside(&plan.territory).to_string());
        // The territory itself may be wrong; these do not ask it.
        prop_assert_eq!(harmed(&mut world), [""; 0]);
        prop_assert_eq!(strays(&world, &plan), [""; 0]);
    }

    #[test]
    fn the_order_of_the_inputs_does_not_matter(scene in scene()) {
        prop_assert_eq!(scene.plan(), scene.reversed().plan());
    }

    #[test]
    fn a_change_that_fails_is_made_by_the_next_pass(scene in scene(), from in 0usize..40, lasting in any::<bool>()) {
        let (mut world, plan) = (fake(&scene), scene.plan());
        let before = world.outside(&plan.territory);
        let start = world.changes() + from;
        world.refuse(move |number, _| if lasting { number >= start } else { number == start });
        let hurt = converge(&mut world, &plan.territory, &plan.facts).unwrap();
        prop_assert!(hurt.failed.len() <= plan.facts.len() + 64);
        world.refuse_nothing();
        reaches(&mut world, &plan)?;
        prop_assert_eq!(before.to_string(), world.outside(&plan.territory).to_string());
    }

    #[test]
    fn leases_that_change_are_followed_without_a_look(scene in scene(), changes in vec(peers(), 1..8)) {
        let mut world = fake(&scene);
        follows(&mut world, &scene, changes)?;
        prop_assert_eq!(harmed(&mut world), [""; 0]);
    }

    #[test]
    fn a_retired_network_leaves_nothing_behind(scene in scene()) {
        let (mut world, plan) = (fake(&scene), scene.plan());
        reaches(&mut world, &plan)?;
        let retired = scene.retired();
        reaches(&mut world, &retired)?;
        let left: Vec<_> = world.observe(&retired.territory).unwrap().iter()
            .filter(|fact| !matches!(fact, Fact::Sysctl(_))).map(Fact::to_string).collect();
        prop_assert!(left.is_empty(), "{left:#?}");
prop_assert_eq!(harmed(&mut world), [""; 0]);
        prop_assert_eq!(strays(&world, &retired), [""; 0]);
    }

    #[test]
    fn two_networks_on_a_host_do_not_disturb_each_other(scene in scene()) {
        let mut world = fake(&scene);
        let (one, two) = (scene.plan(), scene.second_network().plan());
        let mut both = one.facts.clone();
        prop_assert!(both.join(two.facts.clone()).is_ok());
        reaches(&mut world, &one)?;
        reaches(&mut world, &two)?;
        for plan in [&one, &two] {
            let quiet = converge(&mut world, &plan.territory, &plan.facts).unwrap();
            prop_assert!(quiet.clean && quiet.made.is_empty(), "{quiet:#?}");
        }
        reaches(&mut world, &scene.second_network().retired())?;
        let quiet = converge(&mut world, &one.territory, &one.facts).unwrap();
        prop_assert!(quiet.clean && quiet.made.is_empty(), "{quiet:#?}");
    }
}

/// The kernel of a namespace that nobody else is in.
struct Fresh(Kernel);

impl World for Fresh {
    fn observe(&mut self, territory: &Territory) -> Result<Facts, WorldError> {
        self.0.observe(territory)
    }

    fn apply(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        self.0.apply(changes)
    }
}

impl Bench for Fresh {
    fn set_link(&mut self, name: LinkName, up: bool) {
        // A link that is not there stays away.
        let _ =
            Command::new("ip").args(["link", "set", name.as_str(), if up { "up" } else { "down" }]).output();
    }
}

/// Does it in a network namespace of its own, which ends with the thread.
fn in_a_fresh_kernel<T: Send>(work: impl FnOnce(&mut Fresh) -> T + Send) -> T {
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        work(&mut Fresh(Kernel::open().unwrap()))
    };
    std::thread::scope(|scope| scope.spawn(inside).join().unwrap())
}

proptest! {
    #![proptest_config(cases(KERNEL_CASES))]

    #[test]
    fn any_mess_in_a_real_kernel_becomes_the_plan(scene in scene()) {
        prop_assume!(require_root_and_namespaces());
        // A FORWARD chain of iptables is not on this ground.
        let scene = scene.without_chains();
        let plan = scene.plan();
        in_a_fresh_kernel(|world| {
            scene.play(world);
            reaches(world, &plan)?;
            prop_assert_eq!(harmed(world), [""; 0]);
            let retired = scene.retired();
            reaches(world, &retired)?;
            prop_assert_eq!(harmed(world), [""; 0]);
            Ok(())
        })?;
    }

    #[test]
    fn leases_that_change_are_followed_in_a_real_kernel(scene in scene(), changes in vec(peers(), 1..8)) {
        prop_assume!(require_root_and_namespaces());
        let scene = scene.without_chains();
        in_a_fresh_kernel(|world| {
            scene.play(world);
            follows(world, &scene, changes)?;
            prop_assert_eq!(harmed(world), [""; 0]);
            Ok(())
        })?;
    }

    #[test]
    fn the_fake_does_what_the_kernel_does(scene in scene()) {
        prop_assume!(require_root_and_namespaces());
        let scene = scene.without_chains();
        let plan = scene.plan();
        let territory = everything(&plan);
        let mut fake = fake(&scene);
        in_a_fresh_kernel(|real| {
            scene.play(real);
            prop_assert_eq!(lines(real, &territory), lines(&mut fake, &territory), "after the mess");
            converge(real, &plan.territory, &plan.facts).unwrap();
            converge(&mut fake, &plan.territory, &plan.facts).unwrap();
            prop_assert_eq!(lines(real, &territory), lines(&mut fake, &territory), "after the pass");
            Ok(())
        })?;
    }
}

/// One step of a script.
enum Step {
    Make(Fact),
    Turn(Fact, Fact),
    Drop(Fact),
    Up(&'static str, bool),
}

/// Every rule of the fake once, on both worlds: each step must end alike, in success or failure and in what is there then.
#[test]
fn the_fake_knows_the_kernels_rules_one_by_one() {
    use Step::{Drop, Make, Turn, Up};
    if !require_root_and_namespaces() {
        return;
    }
    let device = link(vxlan("flannel.1", 1, None));
    let bridge = link(Link { kind: LinkKind::Bridge, ..vxlan("cni0", 9, None) });
    let port = BridgePort {
        link: link_name("veth0123456789a"),
        bridge: link_name("cni0"),
        hairpin: false,
        isolated: false,
    };
    let with = |change: &dyn Fn(&mut Link)| {
        let mut changed = vxlan("flannel.1", 1, None);
        change(&mut changed);
        link(changed)
    };
    let there = [
        parse_address("flannel.1", "10.100.1.0/32"),
        neighbor("flannel.1", "10.100.2.0"),
        tunnel("10.100.2.0/24"),
    ];
    let connected = route("10.100.2.0/24".parse().unwrap(), None, link_name("eth0"), 4);
    let scripts: Vec<(&str, Vec<Step>)> = vec![
        ("a second device of one VNI", vec![Make(link(vxlan("flannel.2", 1, None)))]),
        ("a link takes all on it", vec![Drop(device.clone())]),
        ("the underlay takes the tunnel", vec![Drop(link(vxlan("eth0", 1, None)))]),
        ("one end of a pair takes the other", vec![Drop(link(vxlan("container0", 1, None)))]),
        ("down and up", vec![Up("flannel.1", false), Make(tunnel("10.100.3.0/24")), Up("flannel.1", true)]),
        ("a new MAC", vec![Turn(device.clone(), with(&|l| l.mac = Some(Mac([2, 1, 2, 3, 4, 5]))))]),
        ("a new MTU", vec![Turn(device.clone(), with(&|l| l.mtu = Mtu::new(1400).ok()))]),
        ("too large an MTU", vec![Turn(device.clone(), with(&|l| l.mtu = Mtu::new(1500).ok()))]),
        ("another VNI", vec![Turn(device.clone(), link(vxlan("flannel.1", 3, None)))]),
        ("the last address", vec![Drop(there[0].clone())]),
        (
            "another address first",
            vec![Make(parse_address("flannel.1", "10.100.7.0/32")), Drop(there[0].clone())],
        ),
        (
            "a bridge goes",
            vec![Make(bridge.clone()), Make(Fact::BridgePort(port.clone())), Drop(bridge.clone())],
        ),
        ("a port without a bridge", vec![Make(Fact::BridgePort(port.clone()))]),
        (
            "a port on what is no bridge",
            vec![Make(Fact::BridgePort(BridgePort { bridge: link_name("eth0"), ..port }))],
        ),
        ("forwarding on what is no tunnel", vec![Make(forward("docker0", "192.168.100.9"))]),
        ("forwarding to the other family", vec![Make(forward("flannel.1", "fd00:100::9"))]),
        ("a gateway that is not on the link", vec![Make(via("10.100.4.0/24", "10.1.1.1"))]),
        ("a gateway that is us", vec![Make(via("10.100.4.0/24", "192.168.100.1"))]),
        (
            "a gateway that is us, on-link",
            vec![
                Make(tunnel_by("192.168.100.1/32", "flannel.1")),
                Make(via("fd42:100:0:9::/64", "fd00:100::1")),
            ],
        ),
        (
            "a gateway in place of a device",
            vec![Make(connected.clone()), Make(via("10.100.2.0/24", "192.168.100.9"))],
        ),
        (
            "the replaced one is gone",
            vec![Make(via("10.100.2.0/24", "192.168.100.9")), Drop(tunnel("10.100.2.0/24"))],
        ),
        (
            "IPv6 on-link against a route",
            vec![
                Make(via("fd42:100:0:2::/64", "fd00:100::9")),
                Make(link(six())),
                Make(tunnel_by("fd42:100:0:2::/64", "flannel-v6.1")),
                Turn(via("fd42:100:0:2::/64", "fd00:100::9"), tunnel_by("fd42:100:0:2::/64", "flannel-v6.1")),
            ],
        ),
        (
            "IPv6 addresses do not outlive down",
            vec![
                Make(link(six())),
                Make(parse_address("flannel-v6.1", "fd42:100::/128")),
                Up("flannel-v6.1", false),
                Up("flannel-v6.1", true),
            ],
        ),
    ];
    for (what, script) in scripts {
        let mut fake = FakeWorld::new();
        in_a_fresh_kernel(|real| {
            let worlds: [&mut dyn Bench; 2] = [real, &mut fake];
            let told = worlds.map(|world| {
                Scene::plain().ground_only().play(world);
                let mut told = Vec::new();
                for step in [&device, &there[0], &there[1], &there[2]] {
                    told.push(world.apply(&[Change::Create(step)]).remove(0).is_ok().to_string());
                }
                for step in &script {
                    let ended = match step {
                        Make(fact) => world.apply(&[Change::Create(fact)]).remove(0).is_ok(),
                        Turn(old, new) => world.apply(&[Change::Replace { old, new }]).remove(0).is_ok(),
                        Drop(fact) => world.apply(&[Change::Delete(fact)]).remove(0).is_ok(),
                        Up(name, up) => {
                            world.set_link(link_name(name), *up);
                            true
                        }
                    };
                    let mut all = everything(&Scene::plain().plan());
                    all.links.extend(["flannel-v6.1", "flannel.2"].map(link_name));
                    told.push(format!("{ended}: {:#?}", lines(world, &all)));
                }
                told
            });
            assert_eq!(told[0], told[1], "{what}: left the kernel, right the fake");
        });
    }
}

fn link(link: Link) -> Fact {
    Fact::Link(Box::new(link))
}

/// The device of the other family.
fn six() -> Link {
    let mut link = vxlan("flannel-v6.1", 1, None);
    if let LinkKind::Vxlan(vxlan) = &mut link.kind {
        vxlan.local = "fd00:100::1".parse().unwrap();
    }
    link
}

fn parse_address(link: &str, address: &str) -> Fact {
    Fact::Address(Address {
        link: link_name(link),
        address: address.parse().unwrap(),
        no_prefix_route: false,
        detect_duplicates: false,
    })
}

fn neighbor(link: &str, ip: &str) -> Fact {
    Fact::Neighbor(Neighbor { link: link_name(link), ip: ip.parse().unwrap(), mac: Mac([2, 0, 0, 0, 0, 2]) })
}

fn forward(link: &str, remote: &str) -> Fact {
    let remote = remote.parse().unwrap();
    Fact::Forward(Forward { link: link_name(link), mac: Mac([2, 0, 0, 0, 0, 2]), remote })
}

fn via(destination: &str, gateway: &str) -> Fact {
    route(destination.parse().unwrap(), Some(gateway.parse().unwrap()), link_name("eth0"), 70)
}

fn tunnel(destination: &str) -> Fact {
    tunnel_by(destination, "flannel.1")
}

fn tunnel_by(destination: &str, link: &str) -> Fact {
    let destination: Prefix = destination.parse().unwrap();
    match route(destination, Some(destination.base()), link_name(link), 3) {
        Fact::Route(route) => Fact::Route(Route { onlink: true, ..route }),
        other => other,
    }
}

/// A territory that holds what a scene is played with and what is planned, whoever it belongs to.
fn everything(plan: &Plan) -> Territory {
    let ground = Territory::of(&ground()).links.into_iter().chain(Territory::of(&others()).links);
    let mut all = plan.territory.clone();
    all.links.extend(ground);
    // Settings of the host are inherited from the machine's.
    all.sysctls.retain(|(link, _)| link.is_some());
    all
}

fn lines(world: &mut dyn World, territory: &Territory) -> Vec<String> {
    world.observe(territory).unwrap().iter().map(Fact::to_string).collect()
}

#[test]
fn a_device_of_another_name_with_our_alias_makes_room() {
    let scene = Scene::plain();
    let plan = scene.plan();
    let mut world = fake(&scene);
    world.put(&Fact::Link(Box::new(squatter(&plan, Some("flannel network default"))))).unwrap();
    let report = reaches(&mut world, &plan).unwrap();
    assert_eq!(report.made[0].verb, "removed", "{report:#?}");
}

#[test]
fn a_device_of_others_with_our_vni_is_reported_and_left_alone() {
    let scene = Scene::plain();
    let plan = scene.plan();
    let mut world = fake(&scene);
    let theirs = Fact::Link(Box::new(squatter(&plan, None)));
    world.put(&theirs).unwrap();
    let before = world.outside(&plan.territory);
    let report = converge(&mut world, &plan.territory, &plan.facts).unwrap();
    assert!(!report.clean && report.failed.iter().any(|(made, _)| made.kind == "link"), "{report:#?}");
    assert_eq!(before, world.outside(&plan.territory));
    world.take(&theirs);
    reaches(&mut world, &plan).unwrap();
}

#[test]
fn a_route_that_gos_host_gw_left_is_taken_over() {
    let scene = Scene::host_gw();
    let plan = scene.plan();
    let mut world = fake(&scene);
    let Some(ours) = plan.facts.iter().find_map(|fact| match fact {
        Fact::Route(route) if route.via.is_some() => Some(route.clone()),
        _ => None,
    }) else {
        panic!("host-gw plans no route: {}", plan.facts)
    };
    world.put(&route(ours.destination, ours.via, ours.link, 3)).unwrap();
    reaches(&mut world, &plan).unwrap();
}

#[test]
fn the_uplink_goes_down_and_comes_back() {
    for scene in [Scene::plain(), Scene::host_gw()] {
        let plan = scene.plan();
        let mut world = fake(&scene);
        reaches(&mut world, &plan).unwrap();
        flap(&mut world);
        reaches(&mut world, &plan).unwrap();
    }
}

#[test]
fn ground_and_plan_hold_what_they_should() {
    // Guards the generator: a scene that plans nothing, or a mess that is never applied, proves nothing.
    let plan = Scene::plain().plan();
    let kinds: Vec<_> = plan.facts.iter().map(Fact::kind).collect();
    for kind in ["link", "sysctl", "address", "neighbor", "forward", "route"] {
        assert!(kinds.contains(&kind), "{kinds:?}");
    }
    let mut world = FakeWorld::new();
    for fact in ground() {
        world.put(&fact).unwrap_or_else(|error| panic!("{fact}: {error}"));
    }
    let device = Fact::Link(Box::new(vxlan("flannel.1", 1, None)));
    world.put(&device).unwrap();
    let again = world.put(&Fact::Link(Box::new(vxlan("flannel.x", 1, None))));
    assert_eq!(again.unwrap_err().raw_os_error(), Some(libc::EEXIST));
    let mut links: Vec<&Link> = Vec::new();
    let everything: &Facts = world.everything();
    links.extend(everything.iter().filter_map(|f| if let Fact::Link(l) = f { Some(&**l) } else { None }));
    assert!(links.iter().any(|link| matches!(link.kind, LinkKind::Vxlan(_))));
}
