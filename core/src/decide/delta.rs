//! What changes in a plan when leases do, planned from those leases alone: one that comes among thousands costs what one costs.
//!
//! The planner is the same, given a few leases instead of all. That is exact where no lease has to do with another one; where
//! one may, there is no answer here, and everything is planned. Whoever uses an answer still checks it against the plan before: every
//! fact that goes must be in it, and none that comes.

use std::cmp::Ordering;
use std::net::Ipv4Addr;

use super::backend::PLAIN_METRIC_PEERS;
use super::plan::{Inputs, Plan, plan_among};
use crate::words::config::{BackendConfig, NetworkConfig};
use crate::words::lease::{LeaseSet, Subnets};

/// With more changes than this it is no less work to plan everything.
const CHANGES_MAX: usize = 1000;

/// Plans of the leases that differ: as they were in `before`, and as they are `now`.
pub fn delta(before: &Inputs<'_>, now: &LeaseSet) -> Option<(Plan, Plan)> {
    let old = before.leases;
    if !stand_alone(before.config) || !old.findings.is_empty() || !now.findings.is_empty() {
        return None;
    }
    // One of them is our own. A small crowd has other metrics, and costs nothing.
    let count = |set: &LeaseSet| set.leases.keys().filter(|subnets| subnets.v4().is_some()).count();
    let crowd = count(old).min(count(now)).saturating_sub(1);
    let changed = changes(old, now);
    if crowd <= PLAIN_METRIC_PEERS || changed.len() > CHANGES_MAX {
        return None;
    }
    if changed.iter().any(|subnets| overlaps_a_neighbor(now, subnets))
        || (shares_facts(before) && shares_an_address(old, now, &changed))
    {
        return None;
    }
    let planned = |set: &LeaseSet| {
        let some = changed.iter().filter_map(|subnets| Some((*subnets, set.leases.get(subnets)?.clone())));
        let leases = LeaseSet { leases: some.collect(), ..LeaseSet::default() };
        plan_among(&Inputs { leases: &leases, ..*before }, crowd).ok()
    };
    Some((planned(old)?, planned(now)?))
}

/// Whether what one peer needs is its own business: these backends give each peer facts of its own. Leases with two families overlap
/// in two ways.
fn stand_alone(config: &NetworkConfig) -> bool {
    matches!(config.backend, BackendConfig::Vxlan(_) | BackendConfig::HostGw) && config.v6.is_none()
}

/// Subnets of the leases that came, changed or went.
fn changes(old: &LeaseSet, now: &LeaseSet) -> Vec<Subnets> {
    let (mut olds, mut nows) = (old.leases.iter().peekable(), now.leases.iter().peekable());
    let mut changed = Vec::new();
    loop {
        let order = match (olds.peek(), nows.peek()) {
            (None, None) => return changed,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((one, _)), Some((other, _))) => one.cmp(other),
        };
        let one = if order == Ordering::Greater { None } else { olds.next() };
        let other = if order == Ordering::Less { None } else { nows.next() };
        if one != other {
            changed.extend(one.or(other).map(|(subnets, _)| *subnets));
        }
    }
}

/// Whether two leases of one host have a fact in common: its place in the guard of the tunnel, the entry of its MAC.
fn shares_facts(inputs: &Inputs<'_>) -> bool {
    inputs.guard || matches!(inputs.config.backend, BackendConfig::Vxlan(_))
}

/// Whether a lease that stays has the public address of one that differs.
fn shares_an_address(old: &LeaseSet, now: &LeaseSet, changed: &[Subnets]) -> bool {
    let of = |set: &LeaseSet, subnets| set.leases.get(subnets).map(|value| value.public_ip);
    let addresses = changed.iter().flat_map(|subnets| [of(old, subnets), of(now, subnets)]);
    let mut addresses: Vec<Ipv4Addr> = addresses.flatten().collect();
    addresses.sort_unstable();
    // Both in the order of their subnets.
    let mut differ = changed.iter().peekable();
    now.leases.iter().any(|(subnets, value)| {
        while differ.next_if(|one| *one < subnets).is_some() {}
        differ.peek() != Some(&subnets) && addresses.binary_search(&value.public_ip).is_ok()
    })
}

/// Whether a lease that is there overlaps the one before it or behind it. If no changed one does, and none did before, none does.
fn overlaps_a_neighbor(set: &LeaseSet, subnets: &Subnets) -> bool {
    use std::ops::Bound::{Excluded, Unbounded};
    if !set.leases.contains_key(subnets) {
        return false;
    }
    let before = set.leases.range((Unbounded, Excluded(subnets))).next_back();
    let behind = set.leases.range((Excluded(subnets), Unbounded)).next();
    let Some(subnet) = subnets.v4() else {
        // Not a lease of this family: the whole plan knows what to say of it.
        return true;
    };
    let overlaps = |other: &Subnets| other.v4().is_none_or(|other| other.overlaps(&subnet));
    before.into_iter().chain(behind).any(|(other, _)| overlaps(other))
}
