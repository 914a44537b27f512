//! The keys of one network as last read, and how they become a [`Snapshot`].

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use super::{Snapshot, StoreError};
use crate::decide::allocate;
use crate::words::code::Code;
use crate::words::lease::{LeaseSet, LeaseValue, Subnets};
use crate::words::report::Finding;

/// Longest part of a broken value that is shown.
const SHOWN_MAX: usize = 80;

/// What was read.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    config: Option<String>,
    keys: BTreeMap<String, Result<(Subnets, LeaseValue), Finding>>,
    changed: bool,
}

impl Shelf {
    /// Sets or removes the config.
    pub(super) fn config(&mut self, text: Option<&[u8]>) {
        let text = text.map(|text| String::from_utf8_lossy(text).into_owned());
        self.changed |= self.config != text;
        self.config = text;
    }

    /// Adds or replaces a key below `subnets/`.
    pub(super) fn put(&mut self, key: &str, value: &[u8]) {
        let entry = read(key, value);
        if self.keys.get(key) != Some(&entry) {
            self.keys.insert(key.to_owned(), entry);
            self.changed = true;
        }
    }

    /// Removes a key below `subnets/`.
    pub(super) fn delete(&mut self, key: &str) {
        self.changed |= self.keys.remove(key).is_some();
    }

    /// Tells the receivers, if anything they can see has changed.
    pub(super) fn publish(&mut self, sender: &watch::Sender<Snapshot>, revision: i64) {
        let changed = std::mem::take(&mut self.changed);
        sender.send_if_modified(|snapshot| {
            // A shelf that was read anew is all changed; what counts is what the receivers have.
            let news = (changed || !snapshot.known).then(|| (self.config.clone(), self.leases())).filter(
                |(config, leases)| {
                    !snapshot.known || snapshot.config != *config || *snapshot.leases != *leases
                },
            );
            let modified = news.is_some() || snapshot.down.is_some();
            if let Some((config, leases)) = news {
                snapshot.config = config;
                snapshot.leases = Arc::new(leases);
            }
            snapshot.known = true;
            snapshot.down = None;
            // Grows even when nobody is told: whoever looks next sees how fresh the snapshot is.
            snapshot.revision = snapshot.revision.max(revision);
            modified
        });
    }

    fn leases(&self) -> LeaseSet {
        let mut set = LeaseSet::default();
        for (key, entry) in &self.keys {
            match entry {
                Ok((subnets, value)) => {
                    // Two keys can name one subnet (10.5.1.7-24 and 10.5.1.0-24): the one in our own form counts.
                    if !set.leases.contains_key(subnets) || subnets.key() == *key {
                        set.leases.insert(*subnets, value.clone());
                    }
                    if subnets.key() != *key {
                        let text = format!("{key:?} has host bits set; it is read as {:?}", subnets.key());
                        set.findings.push(Finding::new(Code::LEASE_MALFORMED, text));
                    }
                }
                Err(finding) => set.findings.push(finding.clone()),
            }
        }
        set.findings.extend(allocate::overlapping(set.leases.iter()));
        set
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

fn read(key: &str, value: &[u8]) -> Result<(Subnets, LeaseValue), Finding> {
    let malformed = |cause: String| Finding::new(Code::LEASE_MALFORMED, cause);
    let subnets = Subnets::parse_key(key).map_err(|error| malformed(error.to_string()))?;
    let text = String::from_utf8_lossy(value);
    let lease = LeaseValue::from_json(&text).map_err(|error| {
        let shown: String = text.chars().take(SHOWN_MAX).collect();
        malformed(format!("{key:?} holds {shown:?}: {error}"))
    })?;
    Ok((subnets, lease))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: &[u8] = br#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#;

    #[test]
    fn a_malformed_key_costs_nobody_else_its_lease() {
        let mut shelf = Shelf::default();
        shelf.put("10.5.1.0-24", VALUE);
        shelf.put("garbage", VALUE);
        shelf.put("10.5.2.0-24", b"{");
        let set = shelf.leases();
        assert_eq!(set.leases.len(), 1);
        assert_eq!(set.findings.len(), 2);
        assert!(set.findings.iter().all(|finding| finding.code == Code::LEASE_MALFORMED), "{set:?}");
        shelf.delete("garbage");
        assert_eq!(shelf.leases().findings.len(), 1);
    }

    #[test]
    fn a_renewal_that_changes_nothing_wakes_nobody_but_counts() {
        let (sender, mut receiver) = watch::channel(Snapshot::default());
        let mut shelf = Shelf::default();
        shelf.put("10.5.1.0-24", VALUE);
        shelf.publish(&sender, 3);
        assert!(receiver.has_changed().unwrap());
        receiver.mark_unchanged();
        shelf.put("10.5.1.0-24", VALUE);
        shelf.publish(&sender, 4);
        assert!(!receiver.has_changed().unwrap());
        assert_eq!(receiver.borrow().revision, 4);
    }

    #[test]
    fn when_the_store_is_away_the_last_set_stays_and_the_same_cause_is_said_once() {
        let (sender, receiver) = watch::channel(Snapshot::default());
        let mut shelf = Shelf::default();
        shelf.put("10.5.1.0-24", VALUE);
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
        let mut shelf = Shelf::default();
        shelf.put("10.5.1.0-24", VALUE);
        shelf.put("10.5.1.7-24", br#"{"PublicIP":"9.9.9.9"}"#);
        let set = shelf.leases();
        let [(subnets, value)] = set.leases.iter().collect::<Vec<_>>()[..] else { panic!("{set:?}") };
        assert_eq!(
            (subnets.key().as_str(), value.public_ip.to_string().as_str()),
            ("10.5.1.0-24", "1.2.3.4")
        );
        assert_eq!(set.findings.len(), 1);
    }
}
