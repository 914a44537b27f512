//! What holds since the last look. While nothing but leases changes, the next plan's difference to the last one is written without
//! another look: a lease costs what it changes, however many there are.
//!
//! It holds as long as nobody else changes the kernel. Whoever does is noticed and looked at, and so is everything at every
//! resync.

use std::sync::Arc;

use super::Inputs;
use crate::act::pass;
use crate::decide::plan::Plan;
use crate::touch::world::World;
use crate::words::config::BackendConfig;
use crate::words::fact::{Fact, Facts};
use crate::words::lease::LeaseSet;
use crate::words::node::Node;
use crate::words::report::{Finding, Report};

/// What a look left behind that had nothing more to do.
#[cfg_attr(test, derive(Clone))]
pub(super) struct Known {
    inputs: Inputs,
    node: Arc<Node>,
    /// What follows from the leases of peers, and is in the kernel.
    peers: Facts,
    /// What else was planned, before the host's own state was added to it.
    rest: Facts,
    /// What the last plan said beside its facts.
    outline: Plan,
    /// What the look found that no plan says.
    found: Vec<Finding>,
}

impl Known {
    /// What else a plan wants beside peers: taken before the host's own state is added to it.
    pub(super) fn rest(facts: &Facts) -> Facts {
        facts.iter().filter(|fact| !is_about_peers(fact)).cloned().collect()
    }

    /// After a clean look. `facts` are in the kernel now; the plan without them, and what only the look found.
    pub(super) fn after(
        inputs: &Inputs,
        node: Node,
        rest: Facts,
        facts: Facts,
        (outline, found): (Plan, Vec<Finding>),
    ) -> Self {
        let (inputs, node) = (inputs.clone(), Arc::new(node));
        Self { inputs, node, peers: peers_of(facts), rest, outline, found }
    }

    /// The same plan again, for a look at a host where nothing that it was planned from has changed. None where a plan is more than
    /// its facts.
    pub(super) fn again(self, inputs: &Inputs, node: &Node) -> Option<Plan> {
        let facts_only = matches!(inputs.config.backend, BackendConfig::Vxlan(_) | BackendConfig::HostGw);
        let same = facts_only && self.inputs == *inputs && *self.node == *node;
        same.then(|| {
            let mut facts = self.peers;
            self.rest.into_iter().for_each(|fact| facts.set(fact));
            Plan { facts, ..self.outline }
        })
    }

    /// This host, if nothing but leases has changed.
    pub(super) fn node(&self, inputs: &Inputs) -> Option<Arc<Node>> {
        let now = Inputs { leases: self.inputs.leases.clone(), ..inputs.clone() };
        (now == self.inputs).then(|| self.node.clone())
    }

    /// The leases that it was planned for.
    pub(super) fn leases(&self) -> &Arc<LeaseSet> {
        &self.inputs.leases
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
        if !self.is_rest(plan) {
            return None;
        }
        let peers = peers_of(std::mem::take(&mut plan.facts));
        let report = pass::step(world, &self.peers, &peers);
        self.outline = plan.clone();
        plan.findings.extend(self.found.clone());
        self.peers = peers;
        self.inputs.leases = inputs.leases.clone();
        report.clean.then_some((self, report))
    }

    /// Whether plans of the leases that differ may take each other's place in what is known: what goes is there, what comes is
    /// not, and nothing is to be said of either.
    pub(super) fn fits(&self, old: &Plan, new: &Plan) -> bool {
        let there = |fact: &Fact| self.peers.get(&fact.key());
        let mut gone = old.facts.iter().filter(|fact| is_about_peers(fact));
        let mut come = new.facts.iter().filter(|fact| is_about_peers(fact));
        old.findings == self.outline.findings
            && new.findings == self.outline.findings
            && self.is_rest(old)
            && self.is_rest(new)
            && gone.all(|fact| there(fact) == Some(fact))
            && come.all(|fact| there(fact).is_none() || old.facts.get(&fact.key()).is_some())
    }

    /// Puts one in the other's place, for leases that are these now. `write` brings the kernel from the facts of one to those of the
    /// other. None if it refused something.
    pub(super) fn shift(
        mut self,
        leases: &Arc<LeaseSet>,
        old: Plan,
        mut new: Plan,
        write: impl FnOnce(&Facts, &Facts) -> Report,
    ) -> Option<(Self, Plan, Report)> {
        let (gone, come) = (peers_of(old.facts), peers_of(std::mem::take(&mut new.facts)));
        let mut report = write(&gone, &come);
        gone.iter().for_each(|fact| drop(self.peers.remove(&fact.key())));
        come.into_iter().for_each(|fact| self.peers.set(fact));
        self.inputs.leases = leases.clone();
        new.findings.extend(self.found.clone());
        report.desired = self.peers.len();
        report.clean.then_some((self, new, report))
    }

    fn is_rest(&self, plan: &Plan) -> bool {
        plan.facts.iter().filter(|fact| !is_about_peers(fact)).eq(self.rest.iter())
    }
}

fn peers_of(mut facts: Facts) -> Facts {
    facts.retain(is_about_peers);
    facts
}

/// What the kernel takes one by one, and what nothing else depends on.
fn is_about_peers(fact: &Fact) -> bool {
    matches!(
        fact,
        Fact::Neighbor(_)
            | Fact::Forward(_)
            | Fact::WireguardPeer(_)
            | Fact::TunnelHost(_)
            | Fact::Policy(_)
            | Fact::Route(_)
    )
}

#[cfg(test)]
mod tests;
