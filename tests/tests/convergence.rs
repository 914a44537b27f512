//! From any mess to the plan: the properties that make "the next pass" the answer to everything.
//!
//! The same scenes run on the fake kernel, thousands of times, and on the real one in a fresh namespace. The fake is compared
//! with the kernel on random scripts, so what it says can be trusted.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic where it stands")]

mod scenes;

use flannel_core::act::pass::{ROUNDS_MAX, converge};
use flannel_core::decide::plan::Plan;
use flannel_core::touch::world::World;
use flannel_core::words::fact::{Change, Fact, Facts, Link, LinkKind, diff};
use flannel_core::words::report::Report;
use flannel_tests::fake::FakeWorld;
use proptest::prelude::*;

use scenes::{Bench, Scene, flap, ground, harmed, route, scene, squatter, strays, vxlan};

/// The cases each property is tried with; every one is a host with another past.
const CASES: u32 = 400;

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
    fn a_retired_network_leaves_nothing_behind(scene in scene()) {
        let (mut world, plan) = (fake(&scene), scene.plan());
        reaches(&mut world, &plan)?;
        let retired = plan.retired();
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
        reaches(&mut world, &two.retired())?;
        let quiet = converge(&mut world, &one.territory, &one.facts).unwrap();
        prop_assert!(quiet.clean && quiet.made.is_empty(), "{quiet:#?}");
    }
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
