//! When the kernel is looked at, and what becomes of what a pass found.

use std::time::Duration;

use tokio::time::Instant;

use super::{WAIT, Work};
use crate::run::reconcile::{Inputs, Look, Outcome, backoff};
use crate::words::report::Reason;

/// Notices from the kernel are gathered for so long before it is looked at.
const SETTLE: Duration = Duration::from_millis(50);

impl Work {
    /// Plans a look at the kernel, at the latest after `delay`.
    pub(super) fn look(&mut self, reason: Reason, delay: Duration) {
        self.pending = Some(self.pending.map_or(reason, |pending| pending.min(reason)));
        self.next_look = self.next_look.min(Instant::now() + delay);
    }

    /// The kernel said something. Whoever keeps undoing our work is answered more and more slowly, up to a second.
    pub(super) fn noticed(&mut self) {
        const QUIET: Duration = Duration::from_secs(3);
        const SLOWEST: Duration = Duration::from_millis(800);
        self.streak = if self.last_notice.elapsed() > QUIET { 0 } else { self.streak.saturating_add(1) };
        self.last_notice = Instant::now();
        let settle = SETTLE.saturating_mul(1 + self.streak / 8).min(SLOWEST);
        self.look(Reason::Kernel, settle);
    }

    pub(super) fn look_now(&mut self) {
        self.file_due = true;
        let reason = self.pending.take().unwrap_or(Reason::Resync);
        let idle = if self.survey_trouble.is_some() { WAIT } else { self.settings.resync };
        self.next_look = Instant::now() + idle;
        self.survey_due |= self.survey_trouble.is_some() || self.survey.is_none();
        if let Some(inputs) = self.inputs() {
            self.reconciler.pass(inputs, reason, Look::Needed);
        }
    }

    /// What passes work from, as soon as all of it is known.
    pub(super) fn inputs(&self) -> Option<Inputs> {
        let (config, own, survey) = (self.served.as_ref()?, self.own.as_ref()?, self.survey.as_ref()?);
        Some(Inputs {
            config: config.clone(),
            own: own.clone(),
            leases: self.leases.clone(),
            uplink: survey.uplink.link,
            sought: self.sought(),
            identity: survey.identity.clone(),
            isolated_from: self.settings.isolated_from.borrow().clone(),
            former: self.former.clone(),
        })
    }

    /// A pass has ended.
    pub(super) fn passed(&mut self) {
        let outcome: Outcome = self.reconciler.outcome.borrow_and_update().clone();
        if outcome.clean {
            self.failures = 0;
        } else {
            self.look(Reason::Retry, backoff(self.failures));
            self.failures = self.failures.saturating_add(1);
        }
        // The uplink is gone, or has another address: what we advertise must follow.
        let moved = self.survey.as_ref().is_some_and(|survey| survey.public() != outcome.public);
        self.survey_due |= moved;
        self.tell_charon(&outcome);
        self.errands = outcome.errands;
        self.tell_commands();
        if outcome.own.is_some() && outcome.own == self.own && self.commands_serve() && self.charon_serves() {
            self.ready = self.write_subnet_file(outcome.mtu) && (outcome.clean || self.ready);
        }
    }
}
