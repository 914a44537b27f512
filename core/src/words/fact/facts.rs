//! A set of facts, and the difference between two.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::{Fact, Key};

/// Two planners want different things of one key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("two plans disagree: one wants `{kept}`, another `{refused}`")]
pub struct Conflict {
    /// What was there first.
    pub kept: Box<Fact>,
    /// What did not get in.
    pub refused: Box<Fact>,
}

/// A set of facts, at most one about each key, in the kernel's order.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Facts(BTreeMap<Key, Fact>);

impl Facts {
    /// Puts a fact in. Two planners may ask for the same fact, never for two different ones about one key.
    pub fn add(&mut self, fact: Fact) -> Result<(), Conflict> {
        match self.0.entry(fact.key()) {
            Entry::Vacant(free) => {
                free.insert(fact);
                Ok(())
            }
            Entry::Occupied(kept) if *kept.get() == fact => Ok(()),
            Entry::Occupied(kept) => {
                Err(Conflict { kept: Box::new(kept.get().clone()), refused: Box::new(fact) })
            }
        }
    }

    /// Puts a fact in, or in the place of the one about the same key: what was seen last is true.
    pub fn set(&mut self, fact: Fact) {
        self.0.insert(fact.key(), fact);
    }

    /// Every fact of both.
    pub fn join(&mut self, other: Self) -> Result<(), Conflict> {
        other.0.into_values().try_for_each(|fact| self.add(fact))
    }

    /// The fact about a key.
    pub fn get(&self, key: &Key) -> Option<&Fact> {
        self.0.get(key)
    }

    /// Takes the fact about a key out.
    pub fn remove(&mut self, key: &Key) -> Option<Fact> {
        self.0.remove(key)
    }

    /// In the kernel's order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Fact> {
        self.0.values()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The same in as little memory as they take: what was put in one by one leaves a tree's leaves half empty.
    pub fn compact(self) -> Self {
        Self(self.0.into_iter().collect())
    }

    /// Keeps the facts that the test holds for.
    pub fn retain(&mut self, mut keep: impl FnMut(&Fact) -> bool) {
        self.0.retain(|_, fact| keep(fact));
    }
}

impl IntoIterator for Facts {
    type Item = Fact;
    type IntoIter = std::collections::btree_map::IntoValues<Key, Fact>;

    /// In the kernel's order.
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_values()
    }
}

impl FromIterator<Fact> for Facts {
    fn from_iter<I: IntoIterator<Item = Fact>>(facts: I) -> Self {
        Self(facts.into_iter().map(|fact| (fact.key(), fact)).collect())
    }
}

/// One step from what is to what should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change<'a> {
    /// Nothing is there yet.
    Create(&'a Fact),
    /// Something else is there; replaced in one step where the kernel can.
    Replace {
        /// What is there.
        old: &'a Fact,
        /// What should be.
        new: &'a Fact,
    },
    /// Nothing should be there.
    Delete(&'a Fact),
}

impl<'a> Change<'a> {
    /// The fact this is about: the new one, or the one that goes.
    pub fn fact(&self) -> &'a Fact {
        match self {
            Self::Create(fact) | Self::Replace { new: fact, .. } | Self::Delete(fact) => fact,
        }
    }

    /// `added`, `replaced` or `removed`.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Create(_) => "added",
            Self::Replace { .. } => "replaced",
            Self::Delete(_) => "removed",
        }
    }
}

/// What is left to do: first the deletion of links that stand in the way of new ones, then creations and replacements
/// in the kernel's order, then all other deletions in reverse. Sysctls are set, never unset.
pub fn diff<'a>(desired: &'a Facts, observed: &'a Facts) -> Vec<Change<'a>> {
    let mut changes = Vec::new();
    let mut ahead: Vec<&Key> = Vec::new();
    for (key, fact) in &observed.0 {
        if let Fact::Link(old) = fact
            && !desired.0.contains_key(key)
            && desired.iter().any(|new| matches!(new, Fact::Link(new) if new.excludes(old)))
        {
            ahead.push(key);
            changes.push(Change::Delete(fact));
        }
    }
    // Both are in the same order: side by side, thousands of them are compared once each.
    let mut olds = observed.0.iter().peekable();
    for (key, new) in &desired.0 {
        while olds.next_if(|(old, _)| *old < key).is_some() {}
        match olds.next_if(|(old, _)| *old == key) {
            None => changes.push(Change::Create(new)),
            Some((_, old)) if !new.satisfied_by(old) => changes.push(Change::Replace { old, new }),
            Some(_) => {}
        }
    }
    let mut news = desired.0.keys().rev().peekable();
    for (key, fact) in observed.0.iter().rev() {
        while news.next_if(|new| *new > key).is_some() {}
        let wanted = news.peek().is_some_and(|new| *new == key);
        if !wanted && !ahead.contains(&key) && !matches!(fact, Fact::Sysctl(_)) {
            changes.push(Change::Delete(fact));
        }
    }
    changes
}
