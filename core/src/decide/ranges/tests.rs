use super::*;
use proptest::prelude::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn part(subnet: &str, start: &str, end: &str) -> Result<Range, RangeError> {
    let bound = |text: &str| (!text.is_empty()).then(|| ip(text));
    Range::new(subnet.parse().unwrap(), bound(start), bound(end), None)
}

fn set(ranges: &[(&str, &str, &str)]) -> RangeSet {
    RangeSet::new(ranges.iter().map(|(subnet, start, end)| part(subnet, start, end).unwrap()).collect())
        .unwrap()
}

fn next(set: &RangeSet, last: Option<&str>, taken: &[&str]) -> String {
    let taken = taken.iter().map(|address| ip(address)).collect();
    let found = set.next(last.map(ip), &taken);
    found.map_or_else(|error| error.to_string(), |offer| offer.address.to_string())
}

#[test]
fn a_set_is_searched_as_if_its_ranges_were_one() {
    let set = set(&[("10.1.2.0/24", "10.1.2.9", "10.1.2.10"), ("10.9.0.0/16", "10.9.0.1", "10.9.0.3")]);
    assert_eq!(next(&set, None, &[]), "10.1.2.9/24");
    assert_eq!(next(&set, Some("10.1.2.9"), &[]), "10.1.2.10/24");
    assert_eq!(next(&set, Some("10.1.2.10"), &[]), "10.9.0.2/16", "10.9.0.1 is the gateway");
    assert_eq!(next(&set, Some("10.9.0.3"), &["10.1.2.9"]), "10.1.2.10/24");
    assert_eq!(next(&set, Some("10.9.0.2"), &["10.9.0.3", "10.1.2.9", "10.1.2.10"]), "10.9.0.2/16");
    assert_eq!(next(&set, Some("192.0.2.1"), &[]), "10.1.2.9/24", "a last one from elsewhere means nothing");
    let all = ["10.1.2.9", "10.1.2.10", "10.9.0.2", "10.9.0.3"];
    assert_eq!(
        next(&set, Some("10.9.0.3"), &all),
        "no free address: all 4 of 10.1.2.9-10.1.2.10,10.9.0.1-10.9.0.3 are taken"
    );
    assert_eq!(set.taken(all.map(ip).iter().chain(&[ip("10.9.0.1"), ip("10.7.0.1")])), 4);
}

#[test]
fn some_addresses_are_nobodys() {
    let set = set(&[("10.1.2.0/24", "10.1.2.0", "10.1.2.255")]);
    let admit = |address| set.admit(ip(address)).map_err(|error| error.to_string());
    assert_eq!(admit("10.1.2.1"), Err("requested ip 10.1.2.1 is subnet's gateway".to_owned()));
    assert_eq!(admit("10.1.2.0"), Err("requested ip 10.1.2.0 is subnet's network address".to_owned()));
    assert_eq!(admit("10.1.2.255"), Err("requested ip 10.1.2.255 is subnet's broadcast address".to_owned()));
    assert_eq!(admit("10.1.3.7"), Ok(None));
    let offer = admit("10.1.2.7").unwrap().unwrap();
    assert_eq!((offer.address.to_string(), offer.gateway), ("10.1.2.7/24".to_owned(), ip("10.1.2.1")));
    assert_eq!((set.capacity(), next(&set, Some("10.1.2.254"), &[])), (253, "10.1.2.2/24".to_owned()));
}

#[test]
fn a_gateway_may_lie_anywhere_in_its_family() {
    let range = |gateway| Range::new("10.5.1.0/29".parse().unwrap(), None, None, Some(ip(gateway)));
    assert_eq!((range("10.5.1.6").unwrap().capacity(), range("10.9.9.9").unwrap().capacity()), (5, 6));
    let set = RangeSet::new(vec![range("10.9.9.9").unwrap()]).unwrap();
    assert_eq!(next(&set, None, &[]), "10.5.1.1/29");
    assert!(matches!(range("fd00::1"), Err(RangeError::Gateway { .. })));
}

#[test]
fn ranges_without_sense_are_refused() {
    for small in ["10.5.1.0/31", "10.5.1.0/32", "fd00::/127", "fd00::/128"] {
        let error = Range::whole(small.parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("too small to allocate from"), "{small}: {error}");
    }
    for (start, end, wrong) in [
        ("10.5.2.1", "", "rangeStart 10.5.2.1 not in network 10.5.1.0/24"),
        ("", "10.5.2.1", "rangeEnd 10.5.2.1 not in network 10.5.1.0/24"),
        ("10.5.1.9", "10.5.1.8", "rangeEnd 10.5.1.8 not in network"),
        ("10.5.1.255", "", "rangeStart 10.5.1.255 not in network"),
        ("fd00::1", "", "rangeStart fd00::1 not in network"),
        ("10.5.1.0", "10.5.1.1", "range 10.5.1.0-10.5.1.1 has no address for an endpoint"),
    ] {
        let error = part("10.5.1.0/24", start, end).unwrap_err().to_string();
        assert!(error.contains(wrong), "{start} {end}: {error}");
    }
    let [v4, v6] = ["10.5.1.0/24", "fd00::/64"].map(|subnet| Range::whole(subnet.parse().unwrap()).unwrap());
    assert_eq!(RangeSet::new(vec![]), Err(RangeError::Empty));
    assert_eq!(RangeSet::new(vec![v4, v6]), Err(RangeError::Mixed));
    let low = part("10.5.0.0/16", "10.5.1.7", "10.5.1.8").unwrap();
    assert_eq!(RangeSet::new(vec![v4, low]), Err(RangeError::Overlap(v4.to_string(), low.to_string())));
    let sets = [v4, v6, low].map(|range| RangeSet::new(vec![range]).unwrap());
    assert_eq!(apart(&sets), Err(RangeError::SetsOverlap(0, 2)));
    assert_eq!(apart(&sets[..2]), Ok(()));
}

#[test]
fn large_ranges_are_no_long_walks() {
    let large = set(&[("fd00:0:0:1::/64", "", "")]);
    assert_eq!(next(&large, Some("fd00:0:0:1:ffff:ffff:ffff:ffff"), &[]), "fd00:0:0:1::2/64");
    assert_eq!((large.capacity(), large.to_string()), ((1 << 64) - 2, "fd00:0:0:1::/64".to_owned()));
    let all = set(&[("::/0", "", "")]);
    assert_eq!(next(&all, None, &["::2"]), "::3/0");
}

/// Two ranges of 10.5.1.0/27 and 10.5.2.0/27, as offsets of their ends.
type Ends = ((u8, u8), (u8, u8));

fn ends() -> impl Strategy<Value = Ends> {
    let bounds = || (0..32u8, 0..32u8).prop_map(|(a, b)| (a.min(b), a.max(b)));
    (bounds(), bounds())
}

fn address(net: u8, host: u8) -> IpAddr {
    IpAddr::from([10, 5, net, host])
}

/// host-local's allocator, written down as a list.
fn model(ends: Ends) -> Vec<IpAddr> {
    let of = |net: u8, (first, last): (u8, u8)| {
        (first..=last).filter(|host| !matches!(host, 0 | 1 | 31)).map(move |host| address(net, host))
    };
    of(1, ends.0).chain(of(2, ends.1)).collect()
}

proptest! {
    #[test]
    fn ranges_do_as_a_list_does(ends in ends(), last in (1..4u8, 0..32u8), taken in prop::collection::btree_set((1..3u8, 0..32u8), 0..64)) {
        let list = model(ends);
        let taken: BTreeSet<IpAddr> = taken.into_iter().map(|(net, host)| address(net, host)).collect();
        let range = |net: u8, (first, last)| {
            Range::new(Prefix::new(address(net, 0), 27).unwrap(), Some(address(net, first)), Some(address(net, last)), None)
        };
        let (Ok(one), Ok(two)) = (range(1, ends.0), range(2, ends.1)) else {
            let empty = |ends: (u8, u8)| (ends.0..=ends.1).all(|host| matches!(host, 0 | 1 | 31));
            prop_assert!(empty(ends.0) || empty(ends.1), "refused without need");
            return Ok(());
        };
        let set = RangeSet::new(vec![one, two]).unwrap();
        prop_assert_eq!(set.capacity(), list.len() as u128);
        prop_assert_eq!(set.taken(&taken), list.iter().filter(|a| taken.contains(a)).count() as u128);
        let last = address(last.0, last.1);
        // Where the list goes on: behind everything that is not greater, if the last one lies in the set.
        let start = if set.contains(last) { list.iter().filter(|a| **a <= last).count() } else { 0 };
        let rotated = list[start..].iter().chain(&list[..start]);
        let wanted = rotated.copied().find(|a| !taken.contains(a));
        let found = set.next(Some(last), &taken).ok();
        prop_assert_eq!(found.map(|offer| offer.address.address()), wanted);
        if let Some(offer) = found {
            prop_assert_eq!(offer.address.len(), 27);
            prop_assert_eq!(set.admit(offer.address.address()), Ok(Some(offer)));
        }
    }
}
