//! What the operator reads: one line for each change, one when a trouble starts, one when it ends.

use std::collections::BTreeSet;
use std::time::Duration;

use super::health::Counters;
use crate::words::name::NetworkName;
use crate::words::report::{Finding, Made, Reason, Report};

/// A pass that changes more than this is told in sums: the first look at a large cluster is no news line by line.
const LINES_MAX: usize = 40;

/// What was said last, so that nothing is said twice.
pub(super) struct Journal {
    network: NetworkName,
    counters: Counters,
    findings: BTreeSet<Finding>,
    failures: BTreeSet<String>,
    broken: Option<String>,
}

impl Journal {
    pub(super) fn new(network: &NetworkName, counters: Counters) -> Self {
        Self {
            network: network.clone(),
            counters,
            findings: BTreeSet::new(),
            failures: BTreeSet::new(),
            broken: None,
        }
    }

    /// A pass took place.
    pub(super) fn pass(
        &mut self,
        reason: Reason,
        report: &Report,
        findings: &[Finding],
        leases: usize,
        took: Duration,
    ) {
        let network = &*self.network.to_string();
        if self.broken.take().is_some() {
            tracing::info!(network, "the kernel can be looked at again");
        }
        self.counters.pass(network, &reason.to_string());
        self.counters.state(network, report.failed.len() + report.in_wake, leases.saturating_sub(1));
        if !reason.inputs_changed() {
            self.counters.repaired(network, &report.made);
        }
        self.changes(reason, &report.made);
        self.failures(report);
        self.findings(findings);
        tracing::debug!(
            network, %reason, desired = report.desired, made = report.made.len(),
            failed = report.failed.len(), in_wake = report.in_wake, looks = report.looks, ?took, "pass"
        );
    }

    /// The kernel could not even be looked at.
    pub(super) fn broken(&mut self, reason: Reason, cause: &str) {
        if self.broken.as_deref() != Some(cause) {
            tracing::error!(network = self.network.as_str(), %reason, "no pass: {cause}; trying again");
            self.broken = Some(cause.to_owned());
        }
    }

    fn changes(&self, reason: Reason, made: &[Made]) {
        let network = self.network.as_str();
        if made.len() > LINES_MAX {
            let kinds: BTreeSet<_> = made.iter().map(|made| (made.kind, made.verb)).collect();
            for (kind, verb) in kinds {
                let count = made.iter().filter(|made| made.kind == kind && made.verb == verb).count();
                tracing::info!(network, %reason, count, "{kind} {}", told(verb, reason));
            }
            return;
        }
        for made in made {
            tracing::info!(network, %reason, "{} {}: {}", made.kind, told(made.verb, reason), one_line(&made.text));
        }
    }

    fn failures(&mut self, report: &Report) {
        let network = self.network.as_str();
        let now: BTreeSet<String> =
            report.failed.iter().map(|(made, cause)| format!("{cause} ({})", one_line(&made.text))).collect();
        let mut waiting = report.in_wake;
        for new in now.difference(&self.failures).take(LINES_MAX) {
            // As many as there are peers: once is enough.
            match std::mem::take(&mut waiting) {
                0 => tracing::error!(network, "{new}; trying again"),
                count => tracing::error!(network, "{new}; {count} more changes wait for it; trying again"),
            }
        }
        if now.is_empty() && !self.failures.is_empty() {
            tracing::info!(network, "everything that had failed is done now");
        }
        self.failures = now;
    }

    fn findings(&mut self, findings: &[Finding]) {
        let network = self.network.as_str();
        let now: BTreeSet<Finding> = findings.iter().cloned().collect();
        let (new, ended) = (now.difference(&self.findings), self.findings.difference(&now));
        if let more @ 1.. = new.clone().count().saturating_sub(LINES_MAX) {
            tracing::warn!(network, "of what follows only {LINES_MAX} are told, and {more} more are not");
        }
        for new in new.take(LINES_MAX) {
            tracing::warn!(network, "{new}");
        }
        if let more @ 1.. = ended.clone().count().saturating_sub(LINES_MAX) {
            tracing::info!(network, "over: {LINES_MAX} that follow, and {more} more");
        }
        for ended in ended.take(LINES_MAX) {
            tracing::info!(network, "over: {} {}: {}", ended.code, ended.code.title(), ended.text);
        }
        self.findings = now;
    }
}

/// What was changed without a change of the inputs had been there before.
fn told(verb: &'static str, reason: Reason) -> &'static str {
    match (verb, reason.inputs_changed()) {
        ("added", false) => "restored",
        ("replaced", false) => "corrected",
        (verb, _) => verb,
    }
}

/// A table is told by its name: it may have thousands of elements, and `nft list table` shows them. Of a chain of iptables the
/// line is told that lists it.
fn one_line(text: &str) -> String {
    if let Some((program, rest)) = text.split_once("-restore --noflush '*") {
        return format!("{program} -t {} -S", rest.lines().next().unwrap_or_default());
    }
    let text = match text.split_once('{') {
        Some((head, _)) if text.starts_with("nft 'table") => {
            head.trim_end().trim_end_matches('\'').replace('\'', "")
        }
        _ => text.to_owned(),
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
