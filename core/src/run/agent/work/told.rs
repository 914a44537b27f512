//! What the operator was told that an agent waits for: what is new at once, what lasts once a minute.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::words::code::Code;
use crate::words::report::Finding;

/// What is waited for is said again after this long: whoever looks into the log later must find it, too.
const REMIND: Duration = Duration::from_secs(60);

/// How many causes of a store that stays away are said at once. One that is tried every few seconds fails now this way, now that way.
const CAUSES_MAX: usize = 4;

/// What was told last.
pub(super) struct Told {
    finding: Option<Finding>,
    at: Instant,
    /// Why the store is away, as far as it was told since it went.
    causes: BTreeSet<String>,
}

impl Told {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self { finding: None, at: Instant::now(), causes: BTreeSet::new() }
    }

    /// Whether this is to be told now; it counts as told then.
    pub(super) fn is_due(&mut self, waiting: Option<&Finding>, now: Instant) -> bool {
        let again = waiting.is_some() && now.duration_since(self.at) >= REMIND;
        if waiting == self.finding.as_ref() && !again {
            return false;
        }
        let is_store = |finding: &&Finding| finding.code == Code::STORE_DOWN;
        match waiting.filter(is_store) {
            None => self.causes.clear(),
            Some(store) => {
                let lasts = self.finding.as_ref().is_some_and(|told| is_store(&told));
                let new = self.causes.len() < CAUSES_MAX && self.causes.insert(store.text.clone());
                if lasts && !new && !again {
                    return false;
                }
            }
        }
        self.finding = waiting.cloned();
        self.at = now;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_fails_in_many_ways_is_told_once_a_minute() {
        let (mut told, start) = (Told::new(), Instant::now());
        let down = |cause: u64| Finding::new(Code::STORE_DOWN, format!("cause {cause}"));
        assert!(!told.is_due(None, start));
        // One of the causes alternates with one that is never the same.
        let lines = (0..300).filter(|second| {
            let cause = if second % 2 == 0 { 0 } else { *second };
            told.is_due(Some(&down(cause)), start + Duration::from_secs(*second))
        });
        let lines = lines.count();
        assert!((CAUSES_MAX + 4..=CAUSES_MAX + 5).contains(&lines), "{lines}");
        let end = start + Duration::from_secs(300);
        assert!(told.is_due(None, end) && !told.is_due(None, end));
        assert!(told.is_due(Some(&down(0)), end), "it is away again");
        for line in ["line 1", "line 2"] {
            let other = Finding::new(Code::CONFIG_BROKEN, line);
            assert!(told.is_due(Some(&other), end), "somebody mends it: {line}");
        }
    }
}
