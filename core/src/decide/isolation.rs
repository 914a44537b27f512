//! Which bridges of a node keep to themselves, as one table of rules: what upstream's plugin `firewall` calls `ingressPolicy`.
//!
//! The table belongs to all networks of the node and follows from what is in it and one bridge more, so there is nothing per
//! container, and nothing to keep anywhere else.

use std::collections::BTreeMap;

use crate::words::name::LinkName;
use crate::words::rule::{Base, Chain, ChainKind, Hook, Match, Rule, Table, TableFamily, TableName, Verdict};

/// Who may reach a container.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// Everybody.
    Open,
    /// Containers of its bridge, and whoever is not on a bridge that keeps to itself.
    SameBridge,
    /// The same without the containers of its bridge.
    Isolated,
}

/// Bridges that keep to themselves; true for those whose containers do not reach each other either.
pub type Bridges = BTreeMap<LinkName, bool>;

const FORWARD: &str = "forward";
const TO_OTHERS: &str = "to-others";

/// The table's name.
pub fn table_name() -> TableName {
    TableName { family: TableFamily::Inet, name: "flannel_cni_isolation".to_owned() }
}

/// The bridges that a table speaks of.
pub fn bridges(table: &Table) -> Bridges {
    let rules = |chain: &str| table.chains.get(chain).map_or(&[][..], |chain| &chain.rules);
    let mut found = Bridges::new();
    for rule in rules(TO_OTHERS) {
        if let [Match::Output { negated: false, link }] = rule.matches.as_slice() {
            found.insert(*link, false);
        }
    }
    for rule in rules(FORWARD) {
        if let [Match::Input { link, .. }, Match::Output { negated: false, .. }] = rule.matches.as_slice() {
            found.insert(*link, true);
        }
    }
    found
}

/// The table for these bridges; none if there are none.
pub fn table(bridges: &Bridges) -> Option<Table> {
    if bridges.is_empty() {
        return None;
    }
    let rule = |matches, verdict| Rule { matches, counter: false, verdict };
    let (mut forward, mut others) = (Vec::new(), Vec::new());
    for (link, isolated) in bridges {
        let from = Match::Input { negated: false, link: *link };
        let to = |negated| Match::Output { negated, link: *link };
        if *isolated {
            forward.push(rule(vec![from.clone(), to(false)], Verdict::Drop));
        }
        forward.push(rule(vec![from, to(true)], Verdict::Jump(TO_OTHERS.to_owned())));
        others.push(rule(vec![to(false)], Verdict::Drop));
    }
    let base = Base { kind: ChainKind::Filter, hook: Hook::Forward, priority: 0 };
    let mut table = Table::new(table_name());
    table.chains.insert(FORWARD.to_owned(), Chain { base: Some(base), rules: forward });
    table.chains.insert(TO_OTHERS.to_owned(), Chain { base: None, rules: others });
    Some(table)
}

/// What becomes of the bridges when one of them gets a policy, and those that are no more are forgotten.
pub fn with(have: &Bridges, bridge: LinkName, policy: Policy, exists: impl Fn(LinkName) -> bool) -> Bridges {
    let mut bridges = have.clone();
    bridges.retain(|link, _| exists(*link));
    match policy {
        Policy::Open => {
            bridges.remove(&bridge);
        }
        Policy::SameBridge | Policy::Isolated => {
            bridges.insert(bridge, policy == Policy::Isolated);
        }
    }
    bridges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str) -> LinkName {
        LinkName::new(name).unwrap()
    }

    #[test]
    fn a_table_says_which_bridges_it_is_for() {
        let bridges = Bridges::from([(link("br0"), false), (link("br1"), true)]);
        let table = table(&bridges).unwrap();
        assert_eq!(
            table.to_string(),
            "\
table inet flannel_cni_isolation {
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname \"br0\" oifname != \"br0\" jump to-others
		iifname \"br1\" oifname \"br1\" drop
		iifname \"br1\" oifname != \"br1\" jump to-others
	}
	chain to-others {
		oifname \"br0\" drop
		oifname \"br1\" drop
	}
}"
        );
        assert_eq!(super::bridges(&table), bridges);
        assert_eq!(super::table(&Bridges::new()), None);
    }

    #[test]
    fn bridges_come_change_and_go() {
        let have = Bridges::from([(link("old"), true), (link("br0"), false)]);
        let exists = |name: LinkName| name != link("old");
        let isolated = with(&have, link("br1"), Policy::Isolated, exists);
        assert_eq!(isolated, Bridges::from([(link("br0"), false), (link("br1"), true)]));
        let weaker = with(&isolated, link("br1"), Policy::SameBridge, exists);
        assert!(!weaker[&link("br1")]);
        assert_eq!(with(&weaker, link("br0"), Policy::Open, exists).len(), 1);
    }
}
