//! Leases that are gone all at once: not because their hosts are, but because somebody emptied the store or restored an old backup of
//! it. Every host writes its lease again as soon as it sees that; until then the peers stay what they were.
//!
//! A peer whose lease alone is gone has left, and goes at once.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::allocate;
use crate::words::code::Code;
use crate::words::lease::{LeaseSet, LeaseValue, Subnets};
use crate::words::report::Finding;

/// Peers that are kept although the store does not know them any more.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Vanished {
    kept: BTreeMap<Subnets, Arc<LeaseValue>>,
}

impl Vanished {
    /// What the store shows has changed. True if hosts have vanished all at once, so that the time they have to come back begins.
    ///
    /// That is so if our own lease, `own`, is gone together with any other, or if anything is gone from a store that counts from further
    /// back than before (`rewound`). How many are gone says nothing: the others may have been faster to write theirs again than we to look.
    pub fn follow(&mut self, before: &LeaseSet, now: &LeaseSet, own: &Subnets, rewound: bool) -> bool {
        let own_gone = before.leases.contains_key(own) && !now.leases.contains_key(own);
        let begins = (own_gone || rewound) && self.take(before, now, own);
        if !self.kept.is_empty() {
            self.drop_replaced(before, now);
        }
        begins && !self.kept.is_empty()
    }

    fn take(&mut self, before: &LeaseSet, now: &LeaseSet, own: &Subnets) -> bool {
        let kept = self.kept.len();
        let gone =
            before.leases.iter().filter(|(subnets, _)| *subnets != own && !now.leases.contains_key(subnets));
        self.kept.extend(gone.map(|(subnets, value)| (*subnets, value.clone())));
        self.kept.len() > kept
    }

    /// Of a host that has written another lease, or whose place somebody else has, nothing is kept. Only what is new can be that.
    fn drop_replaced(&mut self, before: &LeaseSet, now: &LeaseSet) {
        let fresh = now.leases.iter().filter(|(subnets, value)| before.leases.get(*subnets) != Some(*value));
        for (subnets, value) in fresh {
            self.kept.retain(|kept, of| !kept.overlap(subnets) && !allocate::same_holder(of, value));
        }
    }

    /// Whether any are kept.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Their time is over: who has not come back is gone. How many that are.
    pub fn give_up(&mut self) -> usize {
        std::mem::take(&mut self.kept).len()
    }

    /// The leases to plan with: those of the store, and those that are kept, with a finding that says so.
    pub fn with(&self, now: &Arc<LeaseSet>) -> Arc<LeaseSet> {
        if self.kept.is_empty() {
            return now.clone();
        }
        let mut all = LeaseSet::clone(now);
        all.leases.extend(self.kept.iter().map(|(subnets, value)| (*subnets, value.clone())));
        // Not how many they are: it would be another finding with every one that comes back.
        let text = "this host's lease and those of others are gone from the store all at once; their routes are kept for a minute";
        all.findings.push(Finding::new(Code::LEASES_VANISHED, text));
        Arc::new(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnets(n: u8) -> Subnets {
        Subnets::parse_key(&format!("10.100.{n}.0-24")).unwrap()
    }

    fn value(n: u8) -> Arc<LeaseValue> {
        Arc::new(
            LeaseValue::from_json(&format!(r#"{{"PublicIP":"192.0.2.{n}","PublicIPv6":null}}"#)).unwrap(),
        )
    }

    /// Hosts that have the subnet of their own number.
    fn set(hosts: &[u8]) -> Arc<LeaseSet> {
        let leases = hosts.iter().map(|n| (subnets(*n), value(*n))).collect();
        Arc::new(LeaseSet { leases, ..LeaseSet::default() })
    }

    fn hosts(set: &LeaseSet) -> Vec<u8> {
        (0..=255).filter(|n| set.leases.contains_key(&subnets(*n))).collect()
    }

    #[test]
    fn who_goes_alone_goes_at_once() {
        let mut vanished = Vanished::default();
        for (before, now) in [
            (&[1, 2, 3][..], &[1, 3][..]),
            (&[1, 2], &[1]),
            // All the others, one after another or as one: our own lease is there, so the store is the store.
            (&[1, 2, 3], &[1]),
            // Ours alone was deleted.
            (&[1, 2, 3], &[2, 3]),
            // We had none.
            (&[2, 3], &[]),
        ] {
            assert!(!vanished.follow(&set(before), &set(now), &subnets(1), false), "{before:?} {now:?}");
            assert!(vanished.is_empty());
            assert_eq!(vanished.with(&set(now)), set(now));
        }
    }

    #[test]
    fn an_emptied_store_takes_no_peer_away() {
        let mut vanished = Vanished::default();
        let (all, none) = (set(&[1, 2, 3, 4]), set(&[]));
        assert!(vanished.follow(&all, &none, &subnets(1), false));
        let kept = vanished.with(&none);
        assert_eq!(hosts(&kept), [2, 3, 4]);
        assert_eq!(kept.findings.len(), 1);
        // They come back one by one: 2 as it was, 3 with another subnet, and somebody new gets that of 4.
        assert!(!vanished.follow(&none, &set(&[1, 2]), &subnets(1), false));
        assert_eq!(hosts(&vanished.with(&set(&[1, 2]))), [1, 2, 3, 4]);
        let mut later = LeaseSet::clone(&set(&[1, 2]));
        later.leases.insert(subnets(33), value(3));
        later.leases.insert(subnets(4), value(44));
        let later = Arc::new(later);
        assert!(!vanished.follow(&set(&[1, 2]), &later, &subnets(1), false));
        assert!(vanished.is_empty());
        assert_eq!(vanished.with(&later), later);
        // Who is deleted after it has come back is gone.
        assert!(!vanished.follow(&later, &set(&[1]), &subnets(1), false));
        assert!(vanished.is_empty());
    }

    #[test]
    fn those_who_are_faster_hide_nothing() {
        let mut vanished = Vanished::default();
        assert!(vanished.follow(&set(&[1, 2, 3, 4]), &set(&[3, 4]), &subnets(1), false));
        assert_eq!(hosts(&vanished.with(&set(&[3, 4]))), [2, 3, 4]);
    }

    #[test]
    fn who_does_not_come_back_is_given_up() {
        let mut vanished = Vanished::default();
        assert!(vanished.follow(&set(&[1, 2, 3]), &set(&[]), &subnets(1), false));
        assert!(!vanished.follow(&set(&[]), &set(&[1, 3]), &subnets(1), false));
        assert_eq!(vanished.give_up(), 1);
        assert_eq!(hosts(&vanished.with(&set(&[1, 3]))), [1, 3]);
    }

    #[test]
    fn an_old_backup_takes_no_peer_away() {
        let mut vanished = Vanished::default();
        // 4 and 5 came after it was made.
        assert!(vanished.follow(&set(&[1, 2, 3, 4, 5]), &set(&[1, 2, 3]), &subnets(1), true));
        assert_eq!(hosts(&vanished.with(&set(&[1, 2, 3]))), [1, 2, 3, 4, 5]);
        // Nothing is gone.
        let mut vanished = Vanished::default();
        assert!(!vanished.follow(&set(&[1, 2]), &set(&[1, 2, 3]), &subnets(1), true));
    }
}
