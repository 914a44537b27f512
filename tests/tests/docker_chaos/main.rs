//! Kills: the plugin, the engine, both, at every boundary of every call that an engine makes, and at random. At the end engine,
//! journal, ledger and kernel say the same, nothing is left behind, and a container that ran meanwhile has noticed nothing.
//!
//! The ordinary run takes samples; `FLANNEL_TESTS_LONG=1` (and `cargo nextest run --profile long`) takes everything. `FLANNEL_TESTS_SEED` repeats a random walk.

mod agreement;
mod walk;
mod world;

use std::env;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use flannel_tests::conversation::When;
use flannel_tests::{Lab, LabPlan, eventually, in_lab, ping_within, secs, unchanged};

use agreement::{Leftovers, agree};
use walk::{Dice, walk};
use world::{Bystander, Step, Victim, World};

const VICTIMS: [Victim; 3] = [Victim::Plugin, Victim::Engine, Victim::Both];

/// Every place of a call.
const PLACES: [When; 5] =
    [When::BeforeRequest, When::InRequest(60), When::BeforeAnswer, When::InAnswer(40), When::AfterAnswer];

/// No command makes an engine call more often than this.
const CALLS_MAX: usize = 8;

fn is_long() -> bool {
    env::var_os("FLANNEL_TESTS_LONG").is_some_and(|long| long == "1")
}

fn plan(name: &str) -> LabPlan {
    Lab::new(name).hosts(1).ip_forward(false).needs(&["dockerd", "docker", "busybox"])
}

/// A day in the life of a container.
fn scene() -> Vec<Step> {
    vec![
        Step::CreateNetwork(0),
        Step::Run("c1", 0),
        Step::Connect("c1", 1),
        Step::Disconnect("c1", 1),
        Step::Stop("c1"),
        Step::Start("c1"),
        Step::Remove("c1"),
        Step::RemoveNetwork(0),
    ]
}

/// Plays the scene with a kill in every step, at the same call and place of each.
fn play(world: &mut World<'_>, victim: Victim, call: usize, when: When) -> Result<usize> {
    let mut struck = 0;
    for step in scene() {
        world.set_trap(victim, call, when);
        let taken = step.take(world);
        let sprung = world.disarm()?;
        struck += usize::from(sprung.is_some());
        let what = || {
            format!("{step:?}, {victim:?} killed {}", sprung.clone().unwrap_or_else(|| "not at all".into()))
        };
        taken.with_context(what)?;
        agree(world).with_context(what).with_context(|| world.tails())?;
    }
    Ok(struck)
}

/// A world with a bystander; what happens there is `scenes`.
fn in_a_world(name: &str, scenes: impl FnOnce(&mut World<'_>) -> Result<()>) {
    in_lab(plan(name).time_to_live(secs(4 * 3600)), |lab| {
        let host = lab.host(1);
        let mut world = World::start(host, true)?;
        let start = host.network_state()?;
        Step::CreateNetwork(1).take(&world)?;
        let run = |name| host.docker_run(name, &["--network", "other"]);
        let (one, two) = (run("b1")?, run("b2")?);
        ping_within(secs(5), &one, two.ip()?)?;
        let bystander = Bystander::watch(&one, &two)?;
        scenes(&mut world)?;
        bystander.lost_nothing()?;
        let leftovers = agree(&world)?;
        ensure!(leftovers.count() <= 2 * world.kills, "{} kills left {leftovers:?}", world.kills);
        eprintln!("{} kills left for the sweep: {leftovers:?}", world.kills);
        for name in ["b1", "b2"] {
            Step::Remove(name).take(&world)?;
        }
        Step::RemoveNetwork(1).take(&world)?;
        is_as_before(&world, &start)
    });
}

/// Everything is removed. What an engine that died never told is taken by the sweep; the long run waits for that.
fn is_as_before(world: &World<'_>, start: &str) -> Result<()> {
    let left = agree(world)?;
    if left.count() > 0 && !is_long() {
        return Ok(());
    }
    let patience = if left.count() > 0 { secs(800) } else { secs(15) };
    eventually("nothing is left", patience, || -> Result<()> {
        let left = agree(world)?;
        ensure!(left == Leftovers::default(), "{left:?}");
        unchanged("the kernel", start, &world.host.network_state()?)
    })
    .with_context(|| world.tails())
}

#[test]
fn a_kill_inside_any_call_is_survived() {
    let all = VICTIMS.into_iter().flat_map(|victim| {
        (1..=CALLS_MAX).flat_map(move |call| PLACES.into_iter().map(move |when| (victim, call, when)))
    });
    let rounds: Vec<_> = match is_long() {
        true => all.collect(),
        // One of each victim, and of each place.
        false => vec![
            (Victim::Plugin, 1, When::BeforeRequest),
            (Victim::Engine, 2, When::BeforeAnswer),
            (Victim::Both, 3, When::AfterAnswer),
        ],
    };
    in_a_world("chaos-calls", |world| {
        let mut struck = 0;
        for (victim, call, when) in rounds {
            struck += play(world, victim, call, when)?;
            eprintln!("{victim:?} killed {when:?} of call {call}: {struck} kills so far");
        }
        ensure!(struck > 0, "no kill at all");
        Ok(())
    });
}

#[test]
fn a_walk_at_random_with_kills_ends_in_agreement() {
    let steps = if is_long() { 500 } else { 45 };
    in_a_world("chaos-walk", |world| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let seed = match env::var("FLANNEL_TESTS_SEED") {
            Ok(seed) => seed.parse().with_context(|| format!("FLANNEL_TESTS_SEED={seed} is no number"))?,
            Err(_) => now,
        };
        eprintln!("FLANNEL_TESTS_SEED={seed}");
        walk(world, &mut Dice::new(seed), steps).with_context(|| format!("FLANNEL_TESTS_SEED={seed}"))
    });
}
