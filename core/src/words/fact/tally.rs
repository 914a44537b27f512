//! What a look shows beside a plan, compared while it is read: of thousands of entries that are as wanted nothing is kept but that
//! they are.

use std::borrow::Cow;

use super::{Change, Fact, Facts, Key, diff};

/// Facts of a plan, ticked off one by one as they are seen.
#[derive(Debug)]
pub struct Tally<'a> {
    wanted: &'a Facts,
    /// Those of the plan that were seen as they are wanted.
    met: Vec<*const Fact>,
    /// Those that something else was seen in the place of.
    contested: Vec<*const Fact>,
    found: Facts,
}

/// What is left of a plan and of a look at the kernel, without what was as wanted.
#[derive(Debug)]
pub struct Rest<'a> {
    /// What was not seen as it is wanted; and of the kinds that are few, everything.
    pub wanted: Cow<'a, Facts>,
    /// What else was seen; and of the kinds that are few, everything.
    pub found: Facts,
}

impl Rest<'_> {
    /// The steps from what is to what should be.
    pub fn changes(&self) -> Vec<Change<'_>> {
        diff(&self.wanted, &self.found)
    }
}

impl<'a> Tally<'a> {
    /// Nothing has been seen yet.
    pub fn new(wanted: &'a Facts) -> Self {
        Self { wanted, met: Vec::new(), contested: Vec::new(), found: Facts::default() }
    }

    /// This is true now. Of two about one key the one that was seen last counts.
    pub fn see(&mut self, fact: Fact) {
        if !is_one_of_many(&fact) {
            return self.found.set(fact);
        }
        let key = fact.key();
        match self.wanted.get(&key) {
            Some(wanted) if wanted.satisfied_by(&fact) => self.meet(wanted, &key),
            Some(wanted) => {
                self.contested.push(wanted);
                self.found.set(fact);
            }
            None => self.found.set(fact),
        }
    }

    fn meet(&mut self, wanted: &'a Fact, key: &Key) {
        if !self.contested.is_empty() {
            self.contested.retain(|contested| !std::ptr::eq(*contested, wanted));
            self.found.remove(key);
        }
        self.met.push(wanted);
    }

    /// Where the kinds are put down that are few.
    pub fn few(&mut self) -> &mut Facts {
        &mut self.found
    }

    /// Everything has been seen.
    pub fn close(mut self) -> Rest<'a> {
        self.met.sort_unstable();
        self.contested.sort_unstable();
        let in_place = |fact: &Fact| {
            let fact = std::ptr::from_ref(fact);
            self.met.binary_search(&fact).is_ok() && self.contested.binary_search(&fact).is_err()
        };
        let wanted = match self.met.is_empty() {
            true => Cow::Borrowed(self.wanted),
            false => Cow::Owned(self.wanted.iter().filter(|fact| !in_place(fact)).cloned().collect()),
        };
        Rest { wanted, found: self.found }
    }
}

/// Every peer has them, and nothing else depends on them. Links stay in sight whether or not they are as wanted: one can stand in the
/// way of another one.
fn is_one_of_many(fact: &Fact) -> bool {
    matches!(fact, Fact::Neighbor(_) | Fact::Forward(_) | Fact::TunnelHost(_) | Fact::Route(_))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::words::addr::{Mac, Prefix};
    use crate::words::fact::{
        Forward, Link, LinkKind, LinkModes, Neighbor, Route, RouteExtras, RouteProtocol, RouteScope,
    };
    use crate::words::name::LinkName;

    fn name(n: u8) -> LinkName {
        LinkName::new(&format!("flannel.{n}")).unwrap()
    }

    fn link(n: u8, up: bool) -> Fact {
        Fact::Link(Box::new(Link {
            name: name(n),
            kind: LinkKind::Bridge,
            mtu: None,
            mac: None,
            alias: None,
            up,
            modes: LinkModes::default(),
        }))
    }

    /// Few keys and few values, so that they meet, contradict and repeat each other.
    fn fact() -> impl Strategy<Value = Fact> {
        let small = || 0u8..4;
        prop_oneof![
            (small(), prop::bool::ANY).prop_map(|(n, up)| link(n, up)),
            (small(), small()).prop_map(|(n, mac)| Fact::Neighbor(Neighbor {
                link: name(0),
                ip: [10, 0, n, 0].into(),
                mac: Mac([2, 0, 0, 0, 0, mac]),
            })),
            (small(), small()).prop_map(|(n, home)| Fact::Forward(Forward {
                link: name(0),
                mac: Mac([2, 0, 0, 0, 0, n]),
                remote: [192, 0, 2, home].into(),
            })),
            (small(), small(), prop::option::of(1400u32..1402)).prop_map(|(n, via, mtu)| Fact::Route(
                Route {
                    destination: Prefix::new([10, 0, n, 0].into(), 24).unwrap(),
                    via: Some([10, 9, 9, via].into()),
                    link: name(0),
                    onlink: true,
                    metric: 0,
                    scope: RouteScope::Global,
                    source: None,
                    protocol: RouteProtocol::BOOT,
                    extras: RouteExtras { mtu, ..RouteExtras::default() },
                }
            )),
        ]
    }

    proptest! {
        #[test]
        fn the_changes_are_those_of_all_that_is_wanted_and_all_that_was_seen(
            wanted in prop::collection::vec(fact(), 0..12),
            seen in prop::collection::vec(fact(), 0..24),
        ) {
            let wanted: Facts = wanted.into_iter().collect();
            let (mut all, mut tally) = (Facts::default(), Tally::new(&wanted));
            for fact in seen {
                all.set(fact.clone());
                tally.see(fact);
            }
            let rest = tally.close();
            prop_assert_eq!(rest.changes(), diff(&wanted, &all));
        }
    }
}
