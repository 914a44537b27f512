//! What holds since the last look. While nothing but leases changes, the next plan's difference to the last one is written without
//! another look: a lease costs what it changes, however many there are.
//!
//! It holds as long as nobody else changes the kernel. Whoever does is noticed and looked at, and so is everything at every
//! resync.

use super::Inputs;
use crate::act::pass;
use crate::decide::plan::Plan;
use crate::touch::world::World;
use crate::words::fact::{Fact, Facts};
use crate::words::node::Node;
use crate::words::report::{Finding, Report};

/// What a look left behind that had nothing more to do.
pub(super) struct Known {
    inputs: Inputs,
    node: Node,
    /// What follows from the leases of peers, and is in the kernel.
    peers: Facts,
    /// What else was planned, before the host's own state was added to it.
    rest: Facts,
    /// What the look found that no plan says.
    found: Option<Finding>,
}

impl Known {
    /// What else a plan wants beside peers: taken before the host's own state is added to it.
    pub(super) fn rest(facts: &Facts) -> Facts {
        facts.iter().filter(|fact| !is_about_peers(fact)).cloned().collect()
    }

    /// After a clean look. `facts` are in the kernel now.
    pub(super) fn after(
        inputs: &Inputs,
        node: Node,
        rest: Facts,
        mut facts: Facts,
        found: Option<Finding>,
    ) -> Self {
        facts.retain(is_about_peers);
        Self { inputs: inputs.clone(), node, peers: facts, rest, found }
    }

    /// This host, if nothing but leases has changed.
    pub(super) fn node(&self, inputs: &Inputs) -> Option<&Node> {
        let now = Inputs { leases: self.inputs.leases.clone(), ..inputs.clone() };
        (now == self.inputs).then_some(&self.node)
    }

    /// What follows from the leases of peers, and is in the kernel.
    pub(super) fn peers(&self) -> &Facts {
        &self.peers
    }

    /// Brings the kernel from the last plan to this one. None if more than peers is different, or if the kernel refused
    /// something: then it must be looked at.
    pub(super) fn follow(
        mut self,
        world: &mut dyn World,
        inputs: &Inputs,
        plan: &mut Plan,
    ) -> Option<(Self, Report)> {
        let rest = plan.facts.iter().filter(|fact| !is_about_peers(fact));
        if !rest.eq(self.rest.iter()) {
            return None;
        }
        let mut peers = std::mem::take(&mut plan.facts);
        peers.retain(is_about_peers);
        let report = pass::step(world, &self.peers, &peers);
        plan.findings.extend(self.found.clone());
        self.peers = peers;
        self.inputs.leases = inputs.leases.clone();
        report.clean.then_some((self, report))
    }
}

/// What the kernel takes one by one, and what nothing else depends on.
fn is_about_peers(fact: &Fact) -> bool {
    matches!(fact, Fact::Neighbor(_) | Fact::Forward(_) | Fact::WireguardPeer(_) | Fact::Route(_))
}
