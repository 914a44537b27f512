//! What of the work that is waiting is still to be done.

use std::sync::mpsc::Receiver;

use super::{Look, Sight, Work};
use crate::words::report::Reason;

/// What endpoints want comes first. Of the passes that are waiting only the newest inputs count, and the weightiest reason; one that
/// must look makes all of them look. Retiring comes last.
pub(super) fn newest(first: Work, todo: &Receiver<Work>) -> Vec<Work> {
    let mut pass: Option<(Box<Sight>, Reason, Look)> = None;
    let (mut exposed, mut rest) = (Vec::new(), Vec::new());
    for work in std::iter::once(first).chain(todo.try_iter()) {
        match work {
            Work::Pass(inputs, reason, look) => {
                let earlier = pass.as_ref().map_or((reason, look), |(_, reason, look)| (*reason, *look));
                pass = Some((inputs, reason.min(earlier.0), look.min(earlier.1)));
            }
            expose @ Work::Expose(..) => exposed.push(expose),
            retire @ Work::Retire(..) => rest.push(retire),
        }
    }
    let pass = pass.map(|(inputs, reason, look)| Work::Pass(inputs, reason, look));
    exposed.into_iter().chain(pass).chain(rest).collect()
}
