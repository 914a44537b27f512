//! Which subnet a node gets: the one it has, the one it had, or one of the first free ones.
//!
//! **Source** — upstream pkg/subnet/etcd/local_manager.go `tryAcquireLease`, `allocateSubnet`. Kept from there: the match
//! by public address, the previous subnet, a random choice among the first hundred free subnets (so that nodes
//! starting together rarely ask for the same one).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::words::addr::{Family, Prefix};
use crate::words::code::Code;
use crate::words::config::{NetworkConfig, Range};
use crate::words::lease::{LeaseSet, LeaseValue, Subnets};
use crate::words::report::Finding;

/// How many free subnets are looked for before one of them is chosen. Upstream's number.
pub const CANDIDATES_MAX: usize = 100;

/// No subnet is free.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "out of subnets: all {total} subnets in range {} ... {} (/{}) are taken, by {leases} leases and {avoided} routes of this host",
    first.base(), last.base(), first.len()
)]
pub struct OutOfSubnets {
    /// First subnet of the range.
    pub first: Prefix,
    /// Last subnet of the range.
    pub last: Prefix,
    /// Subnets in the range.
    pub total: u128,
    /// Leases that overlap the range.
    pub leases: usize,
    /// Prefixes to avoid that overlap the range.
    pub avoided: usize,
}

impl OutOfSubnets {
    /// For the operator.
    pub fn finding(&self) -> Finding {
        Finding::new(Code::OUT_OF_SUBNETS, self.to_string())
    }
}

/// What a node without a lease does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Choice {
    /// Take over the lease that carries our public address already.
    Adopt(Subnets),
    /// Ask for the subnet we had last time.
    Reclaim(Subnets),
    /// Ask for a free one.
    Claim(Subnets),
}

/// Whether a lease of these subnets fits the config: the same families, each within its range and of its length.
pub fn compatible(config: &NetworkConfig, subnets: &Subnets) -> bool {
    [Family::V4, Family::V6].into_iter().all(|family| match (config.range(family), subnets.of(family)) {
        (Some(range), Some(subnet)) => range.allows(&subnet),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    })
}

/// Whether two values name the same holder: the same public IPv4 address or, where one of them has none, IPv6 address.
/// An unspecified address is nobody's, so a reservation without an address belongs to no node.
pub fn same_holder(a: &LeaseValue, b: &LeaseValue) -> bool {
    match (a.public(Family::V4), b.public(Family::V4)) {
        (Some(a), Some(b)) => a == b,
        // Who has both is still itself when its network loses IPv4, or gets it.
        _ => a.public_ipv6.is_some() && a.public_ipv6 == b.public_ipv6,
    }
}

/// The leases that carry our public address, or are `signed` by this node, and can be taken over, in the order of their
/// keys in the store.
pub fn ours(leases: &LeaseSet, value: &LeaseValue, signed: &BTreeSet<Subnets>) -> Vec<Subnets> {
    let mut ours: Vec<_> = leases
        .leases
        .iter()
        .filter(|(subnets, lease)| same_holder(lease, value) || signed.contains(subnets))
        .filter(|(subnets, _)| !leases.blocked.contains(subnets))
        .map(|(subnets, _)| *subnets)
        .collect();
    ours.sort_by_cached_key(Subnets::key);
    ours
}

/// Our leases that the config does not allow (any more): they are given back.
pub fn outdated(
    config: &NetworkConfig,
    leases: &LeaseSet,
    value: &LeaseValue,
    signed: &BTreeSet<Subnets>,
) -> Vec<Subnets> {
    ours(leases, value, signed).into_iter().filter(|subnets| !compatible(config, subnets)).collect()
}

/// What to do without a lease. `random` chooses among the candidates.
///
/// Of several leases that are ours (two nodes behind one address, or left over) we take the one we had before, else the one
/// that carries our advertisement, else the first that carries our address, as upstream does, else the first that we have signed:
/// with another address, before it changed.
pub fn choose(
    config: &NetworkConfig,
    leases: &LeaseSet,
    value: &LeaseValue,
    signed: &BTreeSet<Subnets>,
    previous: Option<&Subnets>,
    avoid: &[Prefix],
    random: u64,
) -> Result<Choice, OutOfSubnets> {
    let mut ours = ours(leases, value, signed);
    ours.retain(|subnets| compatible(config, subnets));
    let found = previous
        .filter(|previous| ours.contains(previous))
        .or_else(|| {
            ours.iter().find(|subnets| leases.leases.get(*subnets).is_some_and(|lease| **lease == *value))
        })
        .or_else(|| {
            let alike = |subnets: &&Subnets| {
                leases.leases.get(*subnets).is_some_and(|lease| same_holder(lease, value))
            };
            ours.iter().find(alike)
        })
        .or_else(|| ours.first());
    if let Some(found) = found {
        return Ok(Choice::Adopt(*found));
    }
    if let Some(previous) = previous
        && compatible(config, previous)
        && is_free(leases, previous)
    {
        return Ok(Choice::Reclaim(*previous));
    }
    pick(config, leases, avoid, random, previous).map(Choice::Claim)
}

/// Whether no lease overlaps these subnets, in any family.
pub fn is_free(leases: &LeaseSet, subnets: &Subnets) -> bool {
    !taken(leases).any(|lease| lease.overlap(subnets))
}

/// Every subnet that nobody else can have.
fn taken(leases: &LeaseSet) -> impl Iterator<Item = &Subnets> {
    let blocked = leases.blocked.iter().filter(|subnets| !leases.leases.contains_key(subnets));
    leases.leases.keys().chain(blocked)
}

/// Subnets that nobody has, one per enabled family. What can be kept of `previous` is kept: containers stay when a network
/// gets a second family.
pub fn pick(
    config: &NetworkConfig,
    leases: &LeaseSet,
    avoid: &[Prefix],
    random: u64,
    previous: Option<&Subnets>,
) -> Result<Subnets, OutOfSubnets> {
    let kept = |range: &Range| {
        let subnet = previous?.of(range.first.family()).filter(|subnet| range.allows(subnet))?;
        let alone = Subnets::of_one(subnet);
        is_free(leases, &alone).then_some(subnet)
    };
    let one = |range: Range, random| kept(&range).map_or_else(|| pick_in(&range, leases, avoid, random), Ok);
    let v4 = config.v4.map(|range| one(range, random)).transpose()?;
    let v6 = config.v6.map(|range| one(range, random.rotate_right(32))).transpose()?;
    let none = || OutOfSubnets {
        first: Prefix::host(IpAddr::from([0, 0, 0, 0])),
        last: Prefix::host(IpAddr::from([0, 0, 0, 0])),
        total: 0,
        leases: leases.leases.len(),
        avoided: avoid.len(),
    };
    // A NetworkConfig has at least one family, so this is always Some.
    Subnets::new(v4, v6).ok_or_else(none)
}

fn pick_in(range: &Range, leases: &LeaseSet, avoid: &[Prefix], random: u64) -> Result<Prefix, OutOfSubnets> {
    let family = range.first.family();
    let held = taken(leases).filter_map(|lease| lease.of(family));
    let candidates = candidates(range, held.chain(avoid.iter().copied()));
    let index = usize::try_from(random % candidates.len().max(1) as u64).unwrap_or(0);
    candidates.get(index).copied().ok_or_else(|| {
        let within = |prefix: &Prefix| {
            prefix.family() == family
                && prefix.base() <= range.last.last()
                && prefix.last() >= range.first.base()
        };
        OutOfSubnets {
            first: range.first,
            last: range.last,
            total: range.first.steps_to(&range.last).map_or(0, |steps| steps + 1),
            leases: taken(leases).filter_map(|lease| lease.of(family)).filter(within).count(),
            avoided: avoid.iter().filter(|prefix| within(prefix)).count(),
        }
    })
}

/// The first free subnets of a range, upward from its first, at most [`CANDIDATES_MAX`]. Runs of taken subnets are
/// jumped over, so a full network costs one look per lease and not one per candidate and lease.
pub fn candidates(range: &Range, taken: impl Iterator<Item = Prefix>) -> Vec<Prefix> {
    let taken = spans(taken.filter(|prefix| prefix.family() == range.first.family()));
    let mut free = Vec::new();
    let mut next = Some(range.first);
    while let Some(candidate) = next
        && free.len() < CANDIDATES_MAX
        && candidate.base() <= range.last.base()
    {
        // The last span that begins at or before the candidate's end is the only one that can reach into it.
        let reaching =
            taken.range(..=candidate.last()).next_back().filter(|(_, end)| **end >= candidate.base());
        next = match reaching {
            None => {
                free.push(candidate);
                candidate.step(1)
            }
            Some((_, end)) => {
                Prefix::containing(*end, candidate.len()).ok().and_then(|subnet| subnet.step(1))
            }
        };
    }
    free
}

/// The address spans that these prefixes cover, first to last address. Prefixes nest or are disjoint, so the outermost
/// ones are all of them.
fn spans(prefixes: impl Iterator<Item = Prefix>) -> BTreeMap<IpAddr, IpAddr> {
    let mut sorted: Vec<_> = prefixes.map(|prefix| (prefix.base(), prefix.last())).collect();
    sorted.sort_unstable_by(|(a, a_end), (b, b_end)| a.cmp(b).then(b_end.cmp(a_end)));
    let mut spans = BTreeMap::new();
    let mut covered: Option<IpAddr> = None;
    for (base, end) in sorted {
        if covered.is_none_or(|covered| covered < base) {
            spans.insert(base, end);
            covered = Some(end);
        }
    }
    spans
}

/// Leases that share addresses: one finding for each that reaches into an earlier one.
pub fn overlapping(leases: &LeaseSet) -> Vec<Finding> {
    if are_apart(leases) { Vec::new() } else { overlaps(leases) }
}

fn overlaps(leases: &LeaseSet) -> Vec<Finding> {
    let mut v4 = Vec::new();
    let mut v6 = Vec::new();
    for (subnets, value) in &leases.leases {
        v4.extend(subnets.v4().map(|prefix| (prefix, subnets, value)));
        v6.extend(subnets.v6().map(|prefix| (prefix, subnets, value)));
    }
    let mut findings = Vec::new();
    for mut leases in [v4, v6] {
        leases.sort_by_key(|(prefix, _, _)| (prefix.base(), prefix.len()));
        let mut outer: Option<(Prefix, &Subnets, &Arc<LeaseValue>)> = None;
        for lease in leases {
            match outer {
                Some((prefix, subnets, value)) if prefix.overlaps(&lease.0) => {
                    findings.push(Finding::new(
                        Code::LEASE_DUPLICATE,
                        format!(
                            "{} of {} and {} of {} overlap",
                            subnets.key(),
                            holder(value),
                            lease.1.key(),
                            holder(lease.2)
                        ),
                    ));
                }
                _ => outer = Some(lease),
            }
        }
    }
    findings
}

/// Whether no two leases share an address, as far as one walk over them shows: they are in the order of their IPv4 subnets, where an
/// overlap is one of neighbors. This is asked at every lease that changes among thousands.
fn are_apart(leases: &LeaseSet) -> bool {
    let mut before: Option<Prefix> = None;
    leases.leases.keys().all(|subnets| match (subnets.v4(), subnets.v6()) {
        (Some(subnet), None) => !before.replace(subnet).is_some_and(|before| before.overlaps(&subnet)),
        _ => false,
    })
}

/// How we call whoever holds a lease.
pub fn holder(value: &LeaseValue) -> String {
    match value.public(Family::V4).or_else(|| value.public(Family::V6)) {
        Some(address) => address.to_string(),
        None => "nobody (a reservation)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).unwrap().config
    }

    fn value(ip: &str) -> LeaseValue {
        LeaseValue::from_json(&format!(r#"{{"PublicIP":"{ip}"}}"#)).unwrap()
    }

    fn set(leases: &[(&str, &str)]) -> LeaseSet {
        LeaseSet {
            leases: leases
                .iter()
                .map(|(key, ip)| (Subnets::parse_key(key).unwrap(), value(ip).into()))
                .collect(),
            ..LeaseSet::default()
        }
    }

    fn key(key: &str) -> Subnets {
        Subnets::parse_key(key).unwrap()
    }

    const THREE: &str = r#"{"Network":"10.100.0.0/16","SubnetLen":25,"SubnetMin":"10.100.0.0","SubnetMax":"10.100.1.0","Backend":{"Type":"vxlan"}}"#;

    #[test]
    fn three_subnets_serve_three_nodes_and_the_fourth_is_told_how_many_there_are() {
        let config = config(THREE);
        let mut leases = LeaseSet::default();
        for host in 1..=3 {
            let subnets = pick(&config, &leases, &[], 7 * host, None).unwrap();
            leases.leases.insert(subnets, value(&format!("192.168.0.{host}")).into());
        }
        let error = pick(&config, &leases, &[], 1, None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "out of subnets: all 3 subnets in range 10.100.0.0 ... 10.100.1.0 (/25) are taken, by 3 leases and 0 routes of this host"
        );
        assert_eq!(error.finding().code, Code::OUT_OF_SUBNETS);
        let wider = super::tests::config(&THREE.replace("10.100.1.0", "10.100.1.128"));
        assert_eq!(pick(&wider, &leases, &[], 1, None).unwrap(), key("10.100.1.128-25"));
    }

    #[test]
    fn the_first_hundred_free_subnets_are_candidates() {
        let range = config(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"alloc"}}"#).v4.unwrap();
        let taken = ["10.0.1.0/24", "10.0.3.128/25", "10.1.0.0/16", "9.0.0.0/8"].map(|p| p.parse().unwrap());
        let free = candidates(&range, taken.into_iter());
        assert_eq!(free.len(), CANDIDATES_MAX);
        assert_eq!(free[0].to_string(), "10.0.2.0/24");
        assert_eq!(free[1].to_string(), "10.0.4.0/24");
        assert!(candidates(&range, ["10.0.0.0/8".parse().unwrap()].into_iter()).is_empty());
        let late = candidates(&range, ["10.0.0.0/9".parse().unwrap()].into_iter());
        assert_eq!(late[0].to_string(), "10.128.0.0/24");
    }

    #[test]
    fn the_end_of_the_address_space_ends_the_search() {
        let range =
            config(r#"{"Network":"255.255.255.0/24","SubnetLen":26,"Backend":{"Type":"alloc"}}"#).v4.unwrap();
        assert_eq!(candidates(&range, std::iter::empty()).len(), 3);
        let taken = ["255.255.255.192/26".parse().unwrap()];
        assert_eq!(candidates(&range, taken.into_iter()).len(), 2);
    }

    #[test]
    fn a_full_large_network_is_searched_quickly() {
        let range =
            config(r#"{"Network":"10.0.0.0/8","SubnetLen":30,"Backend":{"Type":"alloc"}}"#).v4.unwrap();
        let taken = (0..5000).filter_map(|n| range.first.step(n));
        let free = candidates(&range, taken);
        assert_eq!(free[0], range.first.step(5000).unwrap());
    }

    #[test]
    fn our_address_comes_first_then_the_previous_subnet_then_a_free_one() {
        let config = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let leases = set(&[
            ("10.5.9.0-24", "1.1.1.1"),
            ("10.5.10.0-24", "1.1.1.1"),
            ("10.5.2.0-25", "1.1.1.1"),
            ("10.5.3.0-24", "2.2.2.2"),
        ]);
        let me = value("1.1.1.1");
        let choose = |value: &LeaseValue, previous: Option<&str>| {
            choose(&config, &leases, value, &BTreeSet::new(), previous.map(key).as_ref(), &[], 0).unwrap()
        };
        // Lexical order of the keys, as upstream: "10.5.10" before "10.5.9".
        assert_eq!(choose(&me, None), Choice::Adopt(key("10.5.10.0-24")));
        assert_eq!(choose(&me, Some("10.5.9.0-24")), Choice::Adopt(key("10.5.9.0-24")));
        assert_eq!(outdated(&config, &leases, &me, &BTreeSet::new()), [key("10.5.2.0-25")]);
        let other = value("3.3.3.3");
        assert_eq!(choose(&other, Some("10.5.77.0-24")), Choice::Reclaim(key("10.5.77.0-24")));
        for unusable in ["10.5.3.0-24", "10.5.77.0-25", "10.6.77.0-24"] {
            assert_eq!(choose(&other, Some(unusable)), Choice::Claim(key("10.5.1.0-24")), "{unusable}");
        }
    }

    #[test]
    fn what_we_have_signed_is_ours_whatever_our_address_is_now() {
        let config = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let leases =
            set(&[("10.5.1.0-24", "1.1.1.1"), ("10.5.2.0-25", "1.1.1.1"), ("10.5.3.0-24", "2.2.2.2")]);
        let signed = ["10.5.1.0-24", "10.5.2.0-25"].map(key).into();
        let choose = |ip: &str| choose(&config, &leases, &value(ip), &signed, None, &[], 0).unwrap();
        assert_eq!(choose("9.9.9.9"), Choice::Adopt(key("10.5.1.0-24")));
        assert_eq!(choose("2.2.2.2"), Choice::Adopt(key("10.5.3.0-24")), "the address comes first");
        assert_eq!(outdated(&config, &leases, &value("9.9.9.9"), &signed), [key("10.5.2.0-25")]);
    }

    #[test]
    fn of_several_with_our_address_the_one_with_our_advertisement_is_ours() {
        let config = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let mut leases = set(&[("10.5.1.0-24", "1.1.1.1"), ("10.5.2.0-24", "1.1.1.1")]);
        let mine = LeaseValue::from_json(
            r#"{"PublicIP":"1.1.1.1","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:01"}}"#,
        )
        .unwrap();
        leases.leases.insert(key("10.5.2.0-24"), mine.clone().into());
        let choice = choose(&config, &leases, &mine, &BTreeSet::new(), None, &[], 0).unwrap();
        assert_eq!(choice, Choice::Adopt(key("10.5.2.0-24")));
    }

    #[test]
    fn a_reservation_without_an_address_is_nobodys() {
        let config = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"alloc"}}"#);
        let leases = set(&[("10.5.1.0-24", "0.0.0.0")]);
        assert!(ours(&leases, &value("0.0.0.0"), &BTreeSet::new()).is_empty());
        assert_eq!(pick(&config, &leases, &[], 0, None).unwrap(), key("10.5.2.0-24"));
    }

    #[test]
    fn a_key_that_is_no_lease_takes_its_subnet_and_belongs_to_nobody() {
        let config = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"alloc"}}"#);
        let mut leases = set(&[("10.5.1.0-24", "1.1.1.1")]);
        leases.blocked = BTreeSet::from([key("10.5.1.0-24"), key("10.5.2.0-24")]);
        let me = value("1.1.1.1");
        let previous = key("10.5.2.0-24");
        let choice = choose(&config, &leases, &me, &BTreeSet::new(), Some(&previous), &[], 0).unwrap();
        assert_eq!(choice, Choice::Claim(key("10.5.3.0-24")));
        let full = super::tests::config(THREE);
        leases.blocked = ["10.100.0.0-25", "10.100.0.128-25", "10.100.1.0-25"].map(key).into();
        assert_eq!(pick(&full, &leases, &[], 0, None).unwrap_err().leases, 3);
    }

    #[test]
    fn nodes_without_ipv4_match_by_ipv6() {
        let six = |ip: &str| {
            LeaseValue::from_json(&format!(r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{ip}"}}"#)).unwrap()
        };
        assert!(same_holder(&six("fd00::1"), &six("fd00::1")));
        assert!(!same_holder(&six("fd00::1"), &six("fd00::2")));
        assert!(!same_holder(&six("fd00::1"), &value("1.1.1.1")));
    }

    #[test]
    fn both_families_are_allocated_and_must_both_fit() {
        let config = config(
            r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"vxlan"}}"#,
        );
        let leases = set(&[("10.5.1.0-24&fd42:cafe:0:1::-64", "1.1.1.1")]);
        assert_eq!(pick(&config, &leases, &[], 0, None).unwrap(), key("10.5.2.0-24&fd42:cafe:0:2::-64"));
        assert!(!compatible(&config, &key("10.5.2.0-24")));
        // A network that gets a second family keeps what it has of the first; what is taken is not kept.
        for (previous, picked) in [
            ("10.5.77.0-24", "10.5.77.0-24&fd42:cafe:0:2::-64"),
            ("10.5.1.0-24", "10.5.2.0-24&fd42:cafe:0:2::-64"),
            ("0.0.0.0-0&fd42:cafe:0:77::-64", "10.5.2.0-24&fd42:cafe:0:77::-64"),
            ("10.5.77.0-24&fd42:cafe:0:1::-64", "10.5.77.0-24&fd42:cafe:0:2::-64"),
            ("10.5.77.0-25&fd42:beef::-64", "10.5.2.0-24&fd42:cafe:0:2::-64"),
        ] {
            let (me, signed) = (value("9.9.9.9"), BTreeSet::new());
            let found = choose(&config, &leases, &me, &signed, Some(&key(previous)), &[], 0).unwrap();
            assert_eq!(found, Choice::Claim(key(picked)), "{previous}");
        }
        assert!(compatible(&config, &key("10.5.2.0-24&fd42:cafe:0:2::-64")));
    }

    #[test]
    fn overlapping_leases_are_named() {
        let leases = set(&[
            ("10.5.0.0-23", "1.1.1.1"),
            ("10.5.1.0-24", "2.2.2.2"),
            ("10.5.2.0-24", "3.3.3.3"),
            ("10.6.0.0-24", "0.0.0.0"),
        ]);
        let findings = overlapping(&leases);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].text, "10.5.0.0-23 of 1.1.1.1 and 10.5.1.0-24 of 2.2.2.2 overlap");
    }

    proptest! {
        #[test]
        fn one_walk_shows_what_overlaps(taken in prop::collection::vec((0u8..=40, 20u8..=28), 0..12)) {
            let prefix = |(third, len): &(u8, u8)| Prefix::containing([10, 5, *third, 0].into(), *len).unwrap();
            let leases = LeaseSet {
                leases: taken.iter().map(|t| (Subnets::v4_only(prefix(t)), value("1.1.1.1").into())).collect(),
                ..LeaseSet::default()
            };
            prop_assert_eq!(are_apart(&leases), overlaps(&leases).is_empty());
        }

        #[test]
        fn what_is_picked_is_allowed_and_free(
            taken in prop::collection::vec((0u8..=255, 20u8..=28), 0..60),
            avoid in prop::collection::vec((0u8..=255, 18u8..=28), 0..5),
            random: u64,
        ) {
            let config = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"alloc"}}"#);
            let prefix = |(third, len): &(u8, u8)| Prefix::containing([10, 5, *third, 0].into(), *len).unwrap();
            let leases = LeaseSet {
                leases: taken.iter().map(|t| (Subnets::v4_only(prefix(t)), value("1.1.1.1").into())).collect(),
                ..LeaseSet::default()
            };
            let avoid: Vec<_> = avoid.iter().map(prefix).collect();
            let range = config.v4.unwrap();
            let slow: Vec<_> = (0..255)
                .filter_map(|n| range.first.step(n))
                .filter(|c| !leases.leases.keys().any(|l| l.overlap(&Subnets::v4_only(*c))))
                .filter(|c| !avoid.iter().any(|a| a.overlaps(c)))
                .take(CANDIDATES_MAX)
                .collect();
            match pick(&config, &leases, &avoid, random, None) {
                Ok(subnets) => {
                    prop_assert!(compatible(&config, &subnets));
                    prop_assert!(slow.contains(&subnets.v4().unwrap()));
                }
                Err(_) => prop_assert!(slow.is_empty()),
            }
            let taken = leases.leases.keys().filter_map(Subnets::v4).chain(avoid.iter().copied());
            prop_assert_eq!(candidates(&range, taken), slow);
        }
    }
}
