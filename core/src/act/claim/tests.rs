use std::collections::BTreeMap;

use super::*;
use crate::decide::ranges::Range;

/// Says what it is told.
#[derive(Default)]
struct Told {
    attached: bool,
    dead: Vec<String>,
    asked: usize,
}

impl Life for Told {
    fn is_attached(&mut self, _owner: &Attachment) -> Result<bool, WorldError> {
        Ok(self.attached)
    }

    fn dead(&mut self, _held: &HeldLedger<'_>, entries: &[Entry]) -> Result<Vec<Entry>, LifeError> {
        self.asked += 1;
        Ok(entries.iter().filter(|entry| self.dead.contains(&entry.owner.container)).cloned().collect())
    }
}

struct Case {
    _dir: tempfile::TempDir,
    ledger: Ledger,
    sets: Vec<RangeSet>,
    life: Told,
}

impl Case {
    /// A set for each subnet.
    fn new(subnets: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::at(dir.path().join("cbr0"));
        let sets = subnets.iter().map(|subnet| RangeSet::whole(subnet.parse().unwrap()).unwrap()).collect();
        Self { _dir: dir, ledger, sets, life: Told::default() }
    }

    fn try_claim(&mut self, container: &str, wanted: &[&str]) -> Result<Claimed, String> {
        let owner = Attachment { container: container.into(), interface: "eth0".into() };
        let wanted: Vec<IpAddr> = wanted.iter().map(|ip| ip.parse().unwrap()).collect();
        let request = Request { owner: &owner, sets: &self.sets, wanted: &wanted, maker: Maker::Ourselves };
        claim(&self.ledger.lock().unwrap(), &request, &mut self.life).map_err(|error| error.to_string())
    }

    fn claim(&mut self, container: &str, wanted: &[&str]) -> Vec<String> {
        let claimed = self.try_claim(container, wanted).unwrap();
        claimed.offers.iter().map(|offer| offer.address.address().to_string()).collect()
    }

    fn held(&self) -> BTreeMap<String, String> {
        let entries = self.ledger.lock().unwrap().entries().unwrap();
        entries.into_iter().map(|entry| (entry.address.to_string(), entry.owner.container)).collect()
    }
}

#[test]
fn an_attachment_gets_one_address_of_each_set() {
    let mut case = Case::new(&["10.5.1.0/29", "fd00::/64"]);
    assert_eq!(case.claim("c1", &[]), ["10.5.1.2", "fd00::2"]);
    assert_eq!(case.claim("c2", &["fd00::9"]), ["10.5.1.3", "fd00::9"]);
    assert_eq!(
        case.claim("c3", &[]),
        ["10.5.1.4", "fd00::a"],
        "after the last one, also if it was asked for"
    );
    for (wanted, wrong) in [
        (&["10.5.1.5", "10.5.1.6"][..], "failed to allocate all requested IPs: 10.5.1.6"),
        (&["192.0.2.1"], "failed to allocate all requested IPs: 192.0.2.1"),
        (&["10.5.1.1"], "requested ip 10.5.1.1 is subnet's gateway"),
        (&["10.5.1.2"], "10.5.1.2 is already taken by c1/eth0"),
        (&["10.5.1.5", "fd00::9"], "fd00::9 is already taken by c2/eth0"),
    ] {
        let error = case.try_claim("c4", wanted).unwrap_err();
        assert!(error.contains(wrong), "{wanted:?}: {error}");
    }
    assert!(!case.held().values().any(|container| container == "c4"), "all or none");
}

#[test]
fn what_an_add_that_died_had_is_given_again() {
    let mut case = Case::new(&["10.5.1.0/29", "fd00::/64"]);
    let making = case.try_claim("c1", &[]).unwrap();
    let error = case.try_claim("c1", &[]).unwrap_err();
    assert!(
        error.contains("10.5.1.2 has been allocated to c1, duplicate allocation is not allowed"),
        "{error}"
    );
    drop(making);
    assert_eq!(case.claim("c1", &[]), ["10.5.1.2", "fd00::2"]);
    assert_eq!(case.claim("c1", &["10.5.1.2"]), ["10.5.1.2", "fd00::2"]);
    assert_eq!(case.claim("c1", &["10.5.1.5"]), ["10.5.1.5", "fd00::2"], "another one is wanted now");
    assert_eq!(case.held().len(), 2);
    case.sets.pop();
    assert_eq!(case.claim("c1", &[]), ["10.5.1.5"]);
    assert_eq!(case.held().len(), 1, "what is of no use any more goes");
    case.life.attached = true;
    assert!(case.try_claim("c1", &[]).unwrap_err().contains("eth0 is attached already"));
    assert_eq!(case.held().len(), 1);
}

#[test]
fn the_dead_are_asked_for_only_when_nothing_is_left() {
    let mut case = Case::new(&["10.5.1.0/29", "fd00::/64"]);
    for container in ["c2", "c3", "c4", "c5", "c6"] {
        case.claim(container, &[]);
    }
    assert_eq!(case.life.asked, 0);
    let error = case.try_claim("c7", &[]).unwrap_err();
    assert_eq!(error, "no free address: all 5 of 10.5.1.0/29 are taken");
    assert_eq!((case.life.asked, case.held().len()), (1, 10));
    case.life.dead = vec!["c3".into(), "c5".into()];
    let claimed = case.try_claim("c7", &[]).unwrap();
    let addresses: Vec<String> = claimed.offers.iter().map(|offer| offer.address.to_string()).collect();
    assert_eq!(addresses, ["10.5.1.3/29", "fd00::7/64"], "the oldest");
    assert_eq!(claimed.reclaimed.len(), 2);
    drop(claimed);
    assert_eq!(case.claim("c8", &[])[0], "10.5.1.5", "without asking again");
    assert_eq!(case.life.asked, 2);
    // Entries without an owner need no proof.
    std::fs::write(case.ledger.dir().join("10.5.1.2"), "").unwrap();
    assert_eq!(case.claim("c9", &[])[0], "10.5.1.2");
    assert_eq!(case.life.asked, 2);
}

#[test]
fn ranges_of_a_set_are_one() {
    let mut case = Case::new(&[]);
    let range = |subnet: &str, gateway: &str| {
        Range::new(subnet.parse().unwrap(), None, None, Some(gateway.parse().unwrap())).unwrap()
    };
    let set =
        RangeSet::new(vec![range("10.1.0.0/30", "10.1.0.2"), range("10.2.0.0/30", "10.2.0.1")]).unwrap();
    case.sets = vec![set];
    let claimed = |case: &mut Case, container| {
        let claimed = case.try_claim(container, &[]).unwrap();
        (claimed.offers[0].address.to_string(), claimed.offers[0].gateway.to_string())
    };
    assert_eq!(claimed(&mut case, "c1"), ("10.1.0.1/30".into(), "10.1.0.2".into()));
    assert_eq!(claimed(&mut case, "c2"), ("10.2.0.2/30".into(), "10.2.0.1".into()));
    assert!(case.try_claim("c3", &[]).unwrap_err().contains("all 2 of 10.1.0.0/30,10.2.0.0/30 are taken"));
}
