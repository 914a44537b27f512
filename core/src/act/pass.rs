//! A pass: observe, diff, apply, look again, until nothing is left to do or the bound is reached.

use std::collections::BTreeSet;

use crate::touch::world::{World, WorldError};
use crate::words::fact::{Change, Fact, Facts, diff};
use crate::words::name::LinkName;
use crate::words::report::{Made, Report};
use crate::words::territory::Territory;

/// Most looks a pass takes. Replacing a link takes its addresses, neighbors and routes with it, so a second round is
/// ordinary; a third is for what the kernel removed along with those; the last look only verifies.
pub const ROUNDS_MAX: usize = 3;

/// Of so many changes the report has the text. Nobody reads the thousands of a large cluster's first pass, and printing them would
/// cost more than making them.
pub const TOLD_MAX: usize = 64;

/// Brings the territory to the plan. Fails only when the world cannot be looked at: what could not be changed is in
/// the report and will be in the next diff.
pub fn converge(world: &mut dyn World, territory: &Territory, desired: &Facts) -> Result<Report, WorldError> {
    let mut report = Report { desired: desired.len(), ..Report::default() };
    for _ in 0..ROUNDS_MAX {
        let rest = world.compare(territory, desired)?;
        report.looks += 1;
        let changes = rest.changes();
        if changes.is_empty() {
            report.clean = true;
            return Ok(report);
        }
        if !round(world, &changes, &mut report) {
            return Ok(report);
        }
    }
    report.looks += 1;
    report.clean = world.compare(territory, desired)?.changes().is_empty();
    Ok(report)
}

/// Brings the territory from one plan to the next without a look: `known` is what is true now. Clean if the kernel took every
/// change.
pub fn step(world: &mut dyn World, known: &Facts, desired: &Facts) -> Report {
    let mut report = Report { desired: desired.len(), ..Report::default() };
    let changes = diff(desired, known);
    if !changes.is_empty() {
        round(world, &changes, &mut report);
    }
    report.clean = report.failed.is_empty();
    report
}

/// Makes the changes; false if none of them could be made, so that another round would be the same.
fn round(world: &mut dyn World, changes: &[Change<'_>], report: &mut Report) -> bool {
    report.failed.clear();
    report.in_wake = 0;
    let results = world.apply(changes);
    let absent = absent(changes, &results);
    let mut progress = false;
    for (change, result) in changes.iter().zip(results) {
        match result {
            Err(_) if is_in_wake(change, &absent) => report.in_wake += 1,
            Ok(()) => {
                progress = true;
                let told = report.made.len() < TOLD_MAX;
                report.made.push(made(change, told));
            }
            Err(error) => {
                let told = report.failed.len() < TOLD_MAX;
                report.failed.push((made(change, told), chain(&error)));
            }
        }
    }
    progress
}

/// Interfaces that could not be made.
fn absent(changes: &[Change<'_>], results: &[Result<(), WorldError>]) -> BTreeSet<LinkName> {
    let failed = changes.iter().zip(results).filter(|(_, result)| result.is_err());
    failed
        .filter_map(|(change, _)| match change.fact() {
            Fact::Link(link) => Some(link.name),
            _ => None,
        })
        .collect()
}

/// Whether a change cannot be made without one of these: it is as many lines as there are peers, and says nothing new.
fn is_in_wake(change: &Change<'_>, absent: &BTreeSet<LinkName>) -> bool {
    let fact = change.fact();
    !matches!(fact, Fact::Link(_)) && fact.link().is_some_and(|link| absent.contains(&link))
}

fn made(change: &Change<'_>, told: bool) -> Made {
    let fact = change.fact();
    let text = if told { fact.to_string() } else { String::new() };
    Made { verb: change.verb(), kind: fact.kind(), text }
}

/// An error with all its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
