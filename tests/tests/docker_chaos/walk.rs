//! A user who does one thing after the other without a plan, and somebody who kills without one either.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use flannel_tests::conversation::When;

use super::agreement::agree;
use super::world::{Step, World};
use super::{PLACES, VICTIMS};

const NAMES: [&str; 4] = ["w1", "w2", "w3", "w4"];

/// Numbers that look random, the same for the same seed (xorshift64*).
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// One of so many.
    pub(super) fn throw(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let thrown = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        usize::try_from(thrown).unwrap_or_default() % sides
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.throw(of.len())].clone()
    }
}

/// What the user has made so far.
#[derive(Default)]
struct Made {
    web: bool,
    /// Container to whether it runs, and which networks it is on.
    containers: BTreeMap<&'static str, (bool, BTreeSet<usize>)>,
}

impl Made {
    /// Everything that makes sense now.
    fn choices(&self) -> Vec<Step> {
        let mut choices = Vec::new();
        let mut networks = vec![1];
        match self.web {
            false => choices.push(Step::CreateNetwork(0)),
            true => networks.push(0),
        }
        let in_use = self.containers.values().any(|(_, on)| on.contains(&0));
        if self.web && !in_use {
            choices.push(Step::RemoveNetwork(0));
        }
        for name in NAMES {
            let Some((runs, on)) = self.containers.get(name) else {
                choices.extend(networks.iter().map(|network| Step::Run(name, *network)));
                continue;
            };
            choices.push(Step::Remove(name));
            if !runs {
                choices.push(Step::Start(name));
                continue;
            }
            choices.push(Step::Stop(name));
            for network in &networks {
                match on.contains(network) {
                    true => choices.push(Step::Disconnect(name, *network)),
                    false => choices.push(Step::Connect(name, *network)),
                }
            }
        }
        choices
    }

    fn note(&mut self, step: &Step) {
        match step {
            Step::CreateNetwork(_) => self.web = true,
            Step::RemoveNetwork(_) => self.web = false,
            Step::Run(name, network) => drop(self.containers.insert(name, (true, [*network].into()))),
            Step::Remove(name) => drop(self.containers.remove(name)),
            Step::Stop(name) | Step::Start(name) => {
                if let Some((runs, _)) = self.containers.get_mut(name) {
                    *runs = matches!(step, Step::Start(_));
                }
            }
            Step::Connect(name, network) | Step::Disconnect(name, network) => {
                if let Some((_, on)) = self.containers.get_mut(name) {
                    match matches!(step, Step::Connect(..)) {
                        true => on.insert(*network),
                        false => on.remove(network),
                    };
                }
            }
        }
    }
}

/// So many steps, then everything the user made is removed.
pub(super) fn walk(world: &mut World<'_>, dice: &mut Dice, steps: usize) -> Result<()> {
    let mut made = Made::default();
    let mut history = Vec::new();
    for number in 0..steps {
        let step = dice.one_of(&made.choices());
        // Somebody is killed in every third step: inside one of its calls, or before it.
        let (fate, victim) = (dice.throw(6), dice.one_of(&VICTIMS));
        let (call, when): (usize, When) = (1 + dice.throw(4), dice.one_of(&PLACES));
        let told = match fate {
            0 => {
                world.set_trap(victim, call, when);
                format!("{step:?} with {victim:?} killed {when:?} of call {call}")
            }
            1 => {
                world.kill(victim)?;
                format!("{step:?} after {victim:?} was killed")
            }
            _ => format!("{step:?}"),
        };
        history.push(told);
        let taken = step.take(world);
        world.disarm()?;
        taken.and_then(|()| agree(world).map(drop)).with_context(|| {
            format!(
                "step {number} of {steps}:\n{}\n{}",
                history[history.len().saturating_sub(15)..].join("\n"),
                world.tails()
            )
        })?;
        made.note(&step);
    }
    for name in made.containers.keys() {
        Step::Remove(name).take(world)?;
    }
    if made.web {
        Step::RemoveNetwork(0).take(world)?;
    }
    Ok(())
}
