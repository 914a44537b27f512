//! One at a time for each key: calls for one endpoint that an engine repeats while the first still runs, and what is done
//! after an answer, take turns. Calls for different ones do not wait for each other.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Who has their turn.
#[derive(Default)]
pub(crate) struct Turns {
    taken: Mutex<BTreeSet<String>>,
    over: Condvar,
}

/// A turn; dropping it ends it.
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    key: String,
}

impl Turns {
    /// Waits for the key's turn; blocking, for as long as what the others do takes.
    pub(crate) fn take(&self, key: &str) -> Turn<'_> {
        let mut taken = self.lock();
        while taken.contains(key) {
            taken = self.over.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        taken.insert(key.to_owned());
        Turn { turns: self, key: key.to_owned() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // A set of texts is never half changed.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.lock().remove(&self.key);
        self.turns.over.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_key_is_one_at_a_time_and_others_do_not_wait() {
        let turns = Turns::default();
        let inside = AtomicUsize::new(0);
        let other = turns.take("other");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let _turn = turns.take("one");
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    std::thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        drop(other);
        drop(turns.take("other"));
    }
}
