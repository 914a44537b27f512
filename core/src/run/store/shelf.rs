//! The keys of one network as last read, and how they become a [`Snapshot`].

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;

use tokio::sync::watch;

use super::sign::{Sign, Signs};
use super::{Snapshot, StoreError};
use crate::decide::allocate;
use crate::words::code::Code;
use crate::words::lease::{LeaseSet, LeaseValue, Subnets};
use crate::words::report::Finding;

/// Longest part of a broken value that is shown.
const SHOWN_MAX: usize = 80;

/// What was read. Sound leases are shared with whoever was told of them: thousands are copied once for all that comes together.
#[derive(Debug)]
pub(super) struct Shelf {
    config: Option<String>,
    sound: Arc<LeaseSet>,
    /// Every other key.
    odd: BTreeMap<String, Odd>,
    /// Who has signed those that are sound.
    signs: Arc<Signs>,
    /// Whether the receivers may not have seen them yet.
    resigned: bool,
    /// Whether the receivers may not have seen it yet. True of a new shelf: an empty one is news, too.
    changed: bool,
}

/// What a key below `subnets/` turned out to be.
enum Entry {
    Sound(Subnets, LeaseValue),
    Odd(Odd),
}

/// A key that is not as we write it.
#[derive(PartialEq, Eq, Debug)]
enum Odd {
    /// A lease under another name than it should have.
    Lease(Subnets, Arc<LeaseValue>),
    /// No lease; it takes its subnet all the same, if it names one.
    Broken(Option<Subnets>, Finding),
}

impl Shelf {
    /// Nothing has been read yet.
    pub(super) fn new() -> Self {
        Self {
            config: None,
            sound: Arc::default(),
            odd: BTreeMap::new(),
            signs: Arc::default(),
            resigned: true,
            changed: true,
        }
    }

    /// Sets or removes the config.
    pub(super) fn config(&mut self, text: Option<&[u8]>) {
        let text = text.map(|text| String::from_utf8_lossy(text).into_owned());
        self.changed |= self.config != text;
        self.config = text;
    }

    /// Adds or replaces a key below `subnets/`. That a holder has renewed what it holds is no news; that somebody else has
    /// written it is.
    pub(super) fn put(&mut self, key: &str, value: &[u8], sign: Sign) {
        match read(key, value) {
            Entry::Sound(subnets, value) => {
                self.changed |= self.odd.remove(key).is_some();
                self.sign(subnets, sign);
                if self.sound.leases.get(&subnets).is_none_or(|known| **known != value) {
                    Arc::make_mut(&mut self.sound).leases.insert(subnets, value.into());
                    self.changed = true;
                }
            }
            Entry::Odd(odd) => self.put_odd(key, odd),
        }
    }

    fn sign(&mut self, subnets: Subnets, sign: Sign) {
        if self.signs.get(&subnets).copied().unwrap_or(Sign::Unsigned) != sign {
            let signs = Arc::make_mut(&mut self.signs);
            match sign {
                Sign::Unsigned => drop(signs.remove(&subnets)),
                sign => drop(signs.insert(subnets, sign)),
            }
            self.resigned = true;
        }
        // Who asks twice is answered twice.
        self.resigned |= matches!(sign, Sign::Asks(_));
    }

    /// Adds a key below `subnets/` whose value could not be read at all.
    pub(super) fn unreadable(&mut self, key: &str, cause: &dyn Display) {
        let finding = Finding::new(Code::LEASE_MALFORMED, format!("{key:?} cannot be read: {cause}"));
        self.put_odd(key, Odd::Broken(Subnets::parse_key(key).ok(), finding));
    }

    fn put_odd(&mut self, key: &str, odd: Odd) {
        self.forget_sound(key);
        if self.odd.get(key) != Some(&odd) {
            self.odd.insert(key.to_owned(), odd);
            self.changed = true;
        }
    }

    /// Removes a key below `subnets/`.
    pub(super) fn delete(&mut self, key: &str) {
        self.changed |= self.odd.remove(key).is_some();
        self.forget_sound(key);
    }

    fn forget_sound(&mut self, key: &str) {
        let subnets = Subnets::parse_key(key).ok().filter(|subnets| subnets.key() == key);
        if let Some(subnets) = subnets.filter(|subnets| self.sound.leases.contains_key(subnets)) {
            Arc::make_mut(&mut self.sound).leases.remove(&subnets);
            self.sign(subnets, Sign::Unsigned);
            self.changed = true;
        }
    }

    /// Tells the receivers, if anything they can see has changed. `revision` is that of the leases.
    pub(super) fn publish(&mut self, sender: &watch::Sender<Snapshot>, revision: i64) {
        let changed = std::mem::take(&mut self.changed);
        let resigned = std::mem::take(&mut self.resigned);
        sender.send_if_modified(|snapshot| {
            let mut modified = !snapshot.known || snapshot.down.is_some();
            if changed {
                let leases = self.leases();
                // A later revision with the same leases is news, too: a lease may have come and gone in between.
                modified |= snapshot.config != self.config
                    || snapshot.leases != leases
                    || snapshot.revision != revision;
                snapshot.config.clone_from(&self.config);
                snapshot.leases = leases;
            }
            if resigned {
                let asked = self.signs.values().any(|sign| matches!(sign, Sign::Asks(_)));
                modified |= snapshot.signs != self.signs || asked;
                snapshot.signs = self.signs.clone();
            }
            snapshot.known = true;
            snapshot.down = None;
            // Set even when nobody is told: whoever looks next sees how fresh the snapshot is. Not the larger of the
            // two: a store that was restored from a backup, or wiped, counts from further back.
            snapshot.revision = revision;
            modified
        });
    }

    fn leases(&self) -> Arc<LeaseSet> {
        let overlapping = allocate::overlapping(&self.sound);
        if self.odd.is_empty() && overlapping.is_empty() {
            return self.sound.clone();
        }
        let mut set = (*self.sound).clone();
        for (key, odd) in &self.odd {
            match odd {
                Odd::Lease(subnets, value) => {
                    // Two keys can name one subnet (10.5.1.7-24 and 10.5.1.0-24): the one in our own form counts. Without
                    // it the lease is a peer's like any other, but nobody can renew it under the name that it should have.
                    if !self.sound.leases.contains_key(subnets) {
                        set.leases.entry(*subnets).or_insert_with(|| value.clone());
                        set.blocked.insert(*subnets);
                    }
                    let text = format!("{key:?} has host bits set; it is read as {:?}", subnets.key());
                    set.findings.push(Finding::new(Code::LEASE_MALFORMED, text));
                }
                Odd::Broken(subnets, finding) => {
                    set.blocked.extend(*subnets);
                    set.findings.push(finding.clone());
                }
            }
        }
        let overlapping = allocate::overlapping(&set);
        set.findings.extend(overlapping);
        Arc::new(set)
    }
}

/// Tells the receivers that the store is away, and keeps what they have. True if that is new.
pub(super) fn publish_down(sender: &watch::Sender<Snapshot>, error: &StoreError) -> bool {
    let finding = error.finding();
    sender.send_if_modified(|snapshot| {
        let new = snapshot.down.as_ref() != Some(&finding);
        snapshot.down = Some(finding);
        new
    })
}

fn read(key: &str, value: &[u8]) -> Entry {
    let broken =
        |subnets, cause| Entry::Odd(Odd::Broken(subnets, Finding::new(Code::LEASE_MALFORMED, cause)));
    let subnets = match Subnets::parse_key(key) {
        Ok(subnets) => subnets,
        Err(error) => return broken(None, error.to_string()),
    };
    let text = String::from_utf8_lossy(value);
    match LeaseValue::from_json(&text) {
        Ok(lease) if subnets.key() == key => Entry::Sound(subnets, lease),
        Ok(lease) => Entry::Odd(Odd::Lease(subnets, lease.into())),
        Err(error) => {
            let shown: String = text.chars().take(SHOWN_MAX).collect();
            broken(Some(subnets), format!("{key:?} holds {shown:?}: {error}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sign::NodeMark;
    use super::*;

    const VALUE: &[u8] = br#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#;

    #[test]
    fn a_malformed_key_costs_nobody_else_its_lease() {
        let mut shelf = Shelf::new();
        shelf.put("10.5.1.0-24", VALUE, Sign::Unsigned);
        shelf.put("garbage", VALUE, Sign::Unsigned);
        shelf.put("10.5.2.0-24", b"{", Sign::Unsigned);
        let set = shelf.leases();
        assert_eq!(set.leases.len(), 1);
        assert_eq!(set.findings.len(), 2);
        assert_eq!(set.blocked.iter().map(Subnets::key).collect::<Vec<_>>(), ["10.5.2.0-24"]);
        assert!(set.findings.iter().all(|finding| finding.code == Code::LEASE_MALFORMED), "{set:?}");
        shelf.delete("garbage");
        assert_eq!(shelf.leases().findings.len(), 1);
    }

    #[test]
    fn a_renewal_that_changes_nothing_wakes_nobody_but_counts() {
        let (sender, mut receiver) = watch::channel(Snapshot::default());
        let mut shelf = Shelf::new();
        shelf.put("10.5.1.0-24", VALUE, Sign::Unsigned);
        shelf.publish(&sender, 3);
        assert!(receiver.has_changed().unwrap());
        receiver.mark_unchanged();
        shelf.put("10.5.1.0-24", VALUE, Sign::Unsigned);
        shelf.publish(&sender, 4);
        assert!(!receiver.has_changed().unwrap());
        assert_eq!(receiver.borrow().revision, 4);
    }

    #[test]
    fn another_hand_is_news_a_renewal_by_the_same_is_not() {
        let (sender, mut receiver) = watch::channel(Snapshot::default());
        let mut shelf = Shelf::new();
        let (a, b) = (NodeMark(1), NodeMark(2));
        let signs = [
            (Sign::Holds(a), true),
            (Sign::Holds(a), false),
            (Sign::Asks(b), true),
            (Sign::Asks(b), true),
            (Sign::Holds(b), true),
            (Sign::Unsigned, true),
            (Sign::Unsigned, false),
        ];
        for (revision, (sign, news)) in signs.into_iter().enumerate() {
            shelf.put("10.5.1.0-24", VALUE, sign);
            shelf.publish(&sender, revision as i64);
            assert_eq!(receiver.has_changed().unwrap(), news, "{revision}: {sign:?}");
            let told = receiver.borrow_and_update().signs.values().next().copied();
            assert_eq!(told.unwrap_or(Sign::Unsigned), sign);
        }
        shelf.put("10.5.1.0-24", VALUE, Sign::Holds(a));
        shelf.delete("10.5.1.0-24");
        shelf.publish(&sender, 9);
        assert!(receiver.borrow().signs.is_empty());
    }

    #[test]
    fn a_lease_that_came_and_went_between_two_looks_is_news_for_its_holder() {
        let (sender, mut receiver) = watch::channel(Snapshot::default());
        let mut shelf = Shelf::new();
        shelf.publish(&sender, 3);
        receiver.mark_unchanged();
        shelf.put("10.5.1.0-24", VALUE, Sign::Unsigned);
        shelf.delete("10.5.1.0-24");
        shelf.publish(&sender, 5);
        assert!(receiver.has_changed().unwrap());
    }

    #[test]
    fn when_the_store_is_away_the_last_set_stays_and_the_same_cause_is_said_once() {
        let (sender, receiver) = watch::channel(Snapshot::default());
        let mut shelf = Shelf::new();
        shelf.put("10.5.1.0-24", VALUE, Sign::Unsigned);
        shelf.publish(&sender, 3);
        let error = StoreError::Unreachable { tried: "list", causes: "x: connection refused".into() };
        assert!(publish_down(&sender, &error));
        assert!(!publish_down(&sender, &error));
        assert_eq!(receiver.borrow().leases.leases.len(), 1);
        assert_eq!(receiver.borrow().down.as_ref().unwrap().code, Code::STORE_DOWN);
        shelf.publish(&sender, 3);
        assert_eq!(receiver.borrow().down, None);
    }

    #[test]
    fn the_key_in_our_own_form_counts() {
        let mut shelf = Shelf::new();
        shelf.put("10.5.1.0-24", VALUE, Sign::Unsigned);
        shelf.put("10.5.1.7-24", br#"{"PublicIP":"9.9.9.9"}"#, Sign::Unsigned);
        let set = shelf.leases();
        let (first, subnets) = (set.clone(), &Subnets::parse_key("10.5.1.0-24").unwrap());
        let [(_, value)] = first.leases.iter().collect::<Vec<_>>()[..] else { panic!("{set:?}") };
        assert_eq!(
            (subnets.key().as_str(), value.public_ip.to_string().as_str()),
            ("10.5.1.0-24", "1.2.3.4")
        );
        assert_eq!(set.findings.len(), 1);
        // Nothing keeps the holder from taking its own key over; without that key there is none to take over.
        assert!(set.blocked.is_empty());
        shelf.delete("10.5.1.0-24");
        let set = shelf.leases();
        assert_eq!(set.leases[subnets].public_ip.to_string(), "9.9.9.9");
        assert!(set.blocked.contains(subnets));
    }

    #[test]
    fn a_store_that_was_emptied_is_news() {
        let (sender, receiver) = watch::channel(Snapshot::default());
        let mut shelf = Shelf::new();
        shelf.put("10.5.1.0-24", VALUE, Sign::Unsigned);
        shelf.config(Some(b"{}"));
        shelf.publish(&sender, 30);
        Shelf::new().publish(&sender, 2);
        let snapshot = receiver.borrow();
        assert_eq!((snapshot.config.as_ref(), snapshot.leases.leases.len(), snapshot.revision), (None, 0, 2));
    }
}
