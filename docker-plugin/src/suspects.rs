//! What looks dead is taken away only when it looked so twice, a while apart: an engine may be in the middle of making it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How long something must look dead.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Ids that looked dead at every look since then.
#[derive(Debug, Default)]
pub(crate) struct Suspects(BTreeMap<String, Instant>);

impl Suspects {
    /// Takes the result of a look; the answer is who has looked dead for [`PATIENCE`].
    pub(crate) fn look(&mut self, seen: BTreeSet<String>, now: Instant) -> Vec<String> {
        self.0.retain(|id, _| seen.contains(id));
        for id in seen {
            self.0.entry(id).or_insert(now);
        }
        let old = |since: &Instant| now.saturating_duration_since(*since) >= PATIENCE;
        self.0.iter().filter(|(_, since)| old(since)).map(|(id, _)| id.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn only_who_was_suspect_at_every_look_is_confirmed() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut suspects = Suspects::default();
        assert!(suspects.look(ids(&["a", "b"]), at(0)).is_empty());
        assert!(suspects.look(ids(&["a"]), at(30)).is_empty());
        assert_eq!(suspects.look(ids(&["a", "b"]), at(61)), ["a"]);
        assert_eq!(suspects.look(ids(&["b"]), at(121)), ["b"]);
    }
}
