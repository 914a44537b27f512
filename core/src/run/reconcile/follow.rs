//! A pass for leases of peers that changed, from what is known.

use super::{Inputs, Sight, Thread, open};
use crate::act::pass;
use crate::decide::delta::delta;
use crate::decide::plan::Plan;
use crate::run::survey::Public;
use crate::words::report::Report;

impl Thread {
    /// None if what is known is not enough.
    pub(super) fn follow(&mut self, sight: &Sight) -> Option<(Plan, Report, Public)> {
        let Sight::Own(inputs) = sight else { return None };
        let known = self.known.take()?;
        let node = known.node(inputs)?;
        let public = Public::of_node(&node);
        let own_writes = self.own_writes.clone();

        let before = Inputs { leases: known.leases().clone(), ..Inputs::clone(inputs) };
        let few = delta(&self.plan_inputs(&before, &node), &inputs.leases);
        if let Some((old, new)) = few.filter(|(old, new)| known.fits(old, new)) {
            let kernel = open(&mut self.kernel).ok()?;
            let (known, plan, report) = known.shift(&inputs.leases, old, new, |gone, come| {
                pass::step(&mut own_writes.signed(kernel), gone, come)
            })?;
            self.known = Some(known);
            return Some((plan, report, public));
        }

        let mut plan = self.plan_for(inputs, &node).ok()?;
        if let Some(tunnel) = &plan.tunnel {
            self.carrier.carry(tunnel).ok()?;
        }
        self.wireguard.carry(&mut plan).ok()?;
        let kernel = open(&mut self.kernel).ok()?;
        let (known, report) = known.follow(&mut own_writes.signed(kernel), inputs, &mut plan)?;
        self.wireguard.told(kernel, known.peers(), &mut plan);
        self.known = Some(known);
        Some((plan, report, public))
    }
}
