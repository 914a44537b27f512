//! Tables and the FORWARD chain against the real kernel, each test in a network namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test may panic, and so may what only tests call")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use flannel_core::decide::firewall::{FirewallScene, Range, plan};
use flannel_core::touch::world::WorldError;
use flannel_core::touch::world::kernel::nftables::Netfilter;
use flannel_core::words::addr::{Family, Prefix};
use flannel_core::words::fact::{Accept, Change, Fact, Facts, Key, diff};
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::rule::{
    Base, Chain, ChainKind, Hook, Match, Rule, Set, Side, Table, TableFamily, TableName, Verdict,
};
use flannel_core::words::territory::Territory;
use flannel_tests::needs::{require, require_root_and_namespaces};
use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Runs a test on a thread that has a network namespace of its own; it goes with the thread.
fn in_namespace(programs: &[&str], test: impl FnOnce(&mut Netfilter) + Send + 'static) {
    if !require_root_and_namespaces() || !programs.iter().all(|program| require(program)) {
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        test(&mut Netfilter::open().unwrap());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(argv: &[&str], input: &str) -> String {
    let mut child = Command::new(argv[0])
        .args(&argv[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{argv:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn sh(script: &str) -> String {
    run(&["sh", "-euc", script], "")
}

/// Brings the kernel to `desired` inside `territory`, and says how many changes that took.
fn settle(netfilter: &mut Netfilter, territory: &Territory, desired: &Facts) -> usize {
    let mut made = 0;
    for _ in 0..3 {
        let observed = look(netfilter, territory);
        let changes = diff(desired, &observed);
        if changes.is_empty() {
            return made;
        }
        made += changes.len();
        for (change, result) in changes.iter().zip(netfilter.apply(&changes)) {
            result.unwrap_or_else(|error| panic!("{change}: {}", flannel_core::act::pass::chain(&error)));
        }
    }
    let left = diff(desired, &look(netfilter, territory)).iter().map(ToString::to_string).collect::<Vec<_>>();
    panic!("never settles: {left:?}");
}

fn look(netfilter: &mut Netfilter, territory: &Territory) -> Facts {
    let mut facts = Facts::default();
    netfilter.observe(territory, &mut facts).unwrap();
    facts
}

fn facts(facts: impl IntoIterator<Item = Fact>) -> (Territory, Facts) {
    let facts: Facts = facts.into_iter().collect();
    (Territory::of(facts.iter()), facts)
}

fn table(table: Table) -> Fact {
    Fact::Table(Box::new(table))
}

/// A ruleset with what does not matter taken out: counts, separators, and how lines are broken.
fn plain(ruleset: &str) -> String {
    let words: Vec<&str> =
        ruleset.split(|c: char| c.is_whitespace() || c == ';').filter(|w| !w.is_empty()).collect();
    let text = words.join(" ");
    let mut parts = text.split(" counter packets ");
    let mut out = parts.next().unwrap().to_owned();
    for part in parts {
        let rest = part.splitn(4, ' ').nth(3).unwrap();
        out.push_str(" counter ");
        out.push_str(rest);
    }
    out
}

fn listed(name: &TableName) -> String {
    plain(&run(&["nft", "list", "table", &name.family.to_string(), &name.name], ""))
}

/// The kernel's number of a table: another one if it was made anew.
fn handle(name: &TableName) -> String {
    let text = run(&["nft", "-a", "-t", "list", "table", &name.family.to_string(), &name.name], "");
    let first = text.lines().next().filter(|line| line.contains("# handle ")).map(str::to_owned);
    first.unwrap_or_else(|| panic!("no number in {text}"))
}

fn inet(name: &str) -> TableName {
    TableName { family: TableFamily::Inet, name: name.to_owned() }
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn from(cidr: &str) -> Match {
    Match::Address { side: Side::Source, negated: false, prefix: prefix(cidr) }
}

fn from_set(set: &str) -> Match {
    Match::AddressIn { side: Side::Source, negated: false, family: Family::V4, set: set.to_owned() }
}

fn accept(matches: Vec<Match>) -> Rule {
    Rule { matches, counter: true, verdict: Verdict::Accept }
}

fn forward(rules: Vec<Rule>) -> Chain {
    Chain { base: Some(Base { kind: ChainKind::Filter, hook: Hook::Forward, priority: 0 }), rules }
}

/// A table like the planned ones: a set and a rule that looks into it.
fn sample(name: &str, nets: impl IntoIterator<Item = Prefix>) -> Table {
    let mut table = Table::new(inet(name));
    table.sets.insert("nets".to_owned(), Set::of(Family::V4, nets));
    table.chains.insert("forward".to_owned(), forward(vec![accept(vec![from_set("nets")])]));
    table
}

/// Disjoint networks with a gap behind each.
fn many(count: u32) -> impl Iterator<Item = Prefix> {
    (0..count).map(|n| Prefix::new(std::net::Ipv4Addr::from(0x0a00_0000 + n * 512).into(), 24).unwrap())
}

mod any {
    use super::*;

    fn v4() -> impl Strategy<Value = Prefix> {
        (any::<u32>(), 0..=32u8).prop_map(|(bits, length)| {
            Prefix::containing(std::net::Ipv4Addr::from(bits).into(), length).unwrap()
        })
    }

    /// Not those below ::/8, whose text has a dotted quad in some libraries.
    fn v6() -> impl Strategy<Value = Prefix> {
        (any::<u128>(), 1..=128u8).prop_map(|(bits, length)| {
            let address = std::net::Ipv6Addr::from(bits | 1 << 127);
            Prefix::containing(address.into(), length).unwrap()
        })
    }

    fn of(family: Family) -> BoxedStrategy<Prefix> {
        match family {
            Family::V4 => v4().boxed(),
            Family::V6 => v6().boxed(),
        }
    }

    /// Prefixes that lie close together, so that many are adjacent.
    fn close(family: Family) -> BoxedStrategy<Prefix> {
        let bits = family.bits();
        (0..64u128, 0..3u8)
            .prop_map(move |(n, shorter)| {
                let net = match family {
                    Family::V4 => prefix("255.255.255.192/26"),
                    Family::V6 => prefix("fd00::/122"),
                };
                Prefix::containing(net.nth(n).unwrap(), bits - shorter).unwrap()
            })
            .boxed()
    }

    fn set(family: Family) -> impl Strategy<Value = Set> {
        prop_oneof![
            proptest::collection::vec(of(family), 0..12),
            proptest::collection::vec(close(family), 0..24),
        ]
        .prop_map(move |prefixes| Set::of(family, prefixes))
    }

    fn family() -> impl Strategy<Value = Family> {
        prop_oneof![Just(Family::V4), Just(Family::V6)]
    }

    fn side() -> impl Strategy<Value = Side> {
        prop_oneof![Just(Side::Source), Just(Side::Destination)]
    }

    fn link() -> impl Strategy<Value = LinkName> {
        "[a-z][a-z0-9.-]{0,14}".prop_map(|name| LinkName::new(&name).unwrap())
    }

    fn test(family: Family, sets: Vec<String>) -> BoxedStrategy<Match> {
        let address = (side(), any::<bool>(), of(family))
            .prop_map(|(side, negated, prefix)| Match::Address { side, negated, prefix });
        let input = (any::<bool>(), link()).prop_map(|(negated, link)| Match::Input { negated, link });
        let output = (any::<bool>(), link()).prop_map(|(negated, link)| Match::Output { negated, link });
        let mark =
            (1..=u32::MAX, any::<u32>()).prop_map(|(mask, value)| Match::Mark { mask, value: value & mask });
        if sets.is_empty() {
            return prop_oneof![address, input, output, mark].boxed();
        }
        let lookup = (side(), any::<bool>(), proptest::sample::select(sets))
            .prop_map(move |(side, negated, set)| Match::AddressIn { side, negated, family, set });
        prop_oneof![address, lookup, input, output, mark].boxed()
    }

    fn rule(family: Family, sets: Vec<String>, verdicts: Vec<Verdict>) -> impl Strategy<Value = Rule> {
        let tests = proptest::collection::vec(test(family, sets), 0..4);
        (tests, any::<bool>(), proptest::sample::select(verdicts))
            .prop_map(|(matches, counter, verdict)| Rule { matches, counter, verdict })
    }

    fn base() -> impl Strategy<Value = Option<Base>> {
        let filter = (
            prop_oneof![
                Just(Hook::Prerouting),
                Just(Hook::Input),
                Just(Hook::Forward),
                Just(Hook::Output),
                Just(Hook::Postrouting)
            ],
            -310..310i32,
        )
            .prop_map(|(hook, priority)| Some(Base { kind: ChainKind::Filter, hook, priority }));
        let nat = (Just(Hook::Postrouting), 90..120i32)
            .prop_map(|(hook, priority)| Some(Base { kind: ChainKind::Nat, hook, priority }));
        prop_oneof![Just(None), filter, nat]
    }

    fn chain(
        table: TableFamily,
        sets: BTreeMap<String, Set>,
        later: Vec<String>,
    ) -> impl Strategy<Value = Chain> {
        base().prop_flat_map(move |base| {
            let mut verdicts = vec![Verdict::Accept, Verdict::Drop, Verdict::Return];
            verdicts.extend(later.iter().cloned().map(Verdict::Jump));
            if base.is_some_and(|base| base.kind == ChainKind::Nat) {
                verdicts.push(Verdict::Masquerade { fully_random: true });
                verdicts.push(Verdict::Masquerade { fully_random: false });
            }
            let sets = sets.clone();
            let one = family().prop_flat_map(move |family| {
                let family = match table {
                    TableFamily::Ip => Family::V4,
                    TableFamily::Ip6 => Family::V6,
                    TableFamily::Inet => family,
                };
                let of_family = sets.iter().filter(|(_, set)| set.family == family);
                rule(family, of_family.map(|(name, _)| name.clone()).collect(), verdicts.clone())
            });
            proptest::collection::vec(one, 0..5).prop_map(move |rules| Chain { base, rules })
        })
    }

    /// Any table that the kernel takes: jumps only lead on to chains without a hook.
    pub(super) fn table(family: TableFamily, name: &'static str) -> impl Strategy<Value = Table> {
        let set = family_of_sets(family).prop_flat_map(set);
        proptest::collection::btree_map("[a-c]set", set, 0..3).prop_flat_map(move |sets| {
            let tail = vec!["y1".to_owned(), "y2".to_owned()];
            let heads = proptest::collection::btree_map("[a-e]", chain(family, sets.clone(), tail), 0..4);
            let leaf = chain(family, sets.clone(), Vec::new()).boxed();
            (heads, leaf.clone(), leaf).prop_map(move |(mut chains, one, two)| {
                let plain = |chain: Chain| Chain {
                    base: None,
                    rules: chain
                        .rules
                        .into_iter()
                        .filter(|rule| !matches!(rule.verdict, Verdict::Masquerade { .. }))
                        .collect(),
                };
                chains.insert("y1".to_owned(), plain(one));
                chains.insert("y2".to_owned(), plain(two));
                let name = TableName { family, name: name.to_owned() };
                Table { sets: sets.clone(), chains, ..Table::new(name) }
            })
        })
    }

    fn family_of_sets(table: TableFamily) -> BoxedStrategy<Family> {
        match table {
            TableFamily::Ip => Just(Family::V4).boxed(),
            TableFamily::Ip6 => Just(Family::V6).boxed(),
            TableFamily::Inet => family().boxed(),
        }
    }

    pub(super) fn families() -> impl Strategy<Value = TableFamily> {
        prop_oneof![Just(TableFamily::Inet), Just(TableFamily::Ip), Just(TableFamily::Ip6)]
    }
}

fn properties(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() })
}

#[test]
fn any_table_is_read_as_it_was_written_and_nft_lists_it_so() {
    in_namespace(&["nft"], |netfilter| {
        let netfilter = RefCell::new(netfilter);
        let strategy = any::families().prop_flat_map(|family| any::table(family, "flannel"));
        let ran = properties(96).run(&strategy, |wanted| {
            let netfilter = &mut **netfilter.borrow_mut();
            let (territory, desired) = facts([table(wanted.clone())]);
            settle(netfilter, &territory, &desired);
            prop_assert_eq!(look(netfilter, &territory), desired);
            prop_assert_eq!(listed(&wanted.name), plain(&wanted.to_string()));
            settle(netfilter, &territory, &Facts::default());
            Ok(())
        });
        ran.unwrap();
        assert_eq!(run(&["nft", "list", "ruleset"], ""), "");
    });
}

#[test]
fn any_table_turns_into_any_other_without_being_made_anew() {
    in_namespace(&["nft"], |netfilter| {
        let netfilter = RefCell::new(netfilter);
        let strategy = any::families()
            .prop_flat_map(|family| (any::table(family, "flannel"), any::table(family, "flannel")));
        let ran = properties(96).run(&strategy, |(old, new)| {
            let netfilter = &mut **netfilter.borrow_mut();
            let (territory, before) = facts([table(old.clone())]);
            let (_, after) = facts([table(new.clone())]);
            netfilter.apply(&[Change::Delete(&table(old.clone()))]).remove(0).unwrap();
            settle(netfilter, &territory, &before);
            let made = handle(&old.name);
            settle(netfilter, &territory, &after);
            prop_assert_eq!(look(netfilter, &territory), after);
            prop_assert_eq!(handle(&old.name), made);
            Ok(())
        });
        ran.unwrap();
    });
}

#[test]
fn what_nft_loads_from_our_text_is_what_we_would_have_written() {
    in_namespace(&["nft"], |netfilter| {
        let netfilter = RefCell::new(netfilter);
        let strategy = any::families().prop_flat_map(|family| any::table(family, "flannel"));
        let ran = properties(24).run(&strategy, |wanted| {
            let netfilter = &mut **netfilter.borrow_mut();
            run(&["nft", "-f", "-"], &wanted.to_string());
            let (territory, desired) = facts([table(wanted.clone())]);
            prop_assert_eq!(settle(netfilter, &territory, &desired), 0);
            settle(netfilter, &territory, &Facts::default());
            Ok(())
        });
        ran.unwrap();
    });
}

#[test]
fn flushed_rules_are_written_again_and_foreign_tables_stay() {
    in_namespace(&["nft"], |netfilter| {
        let (territory, desired) =
            facts([table(sample("flannel", many(3))), table(sample("flannel-web", many(1)))]);
        assert_eq!(settle(netfilter, &territory, &desired), 2);
        assert_eq!(settle(netfilter, &territory, &desired), 0, "what is right is left alone");
        sh("nft flush ruleset");
        assert_eq!(settle(netfilter, &territory, &desired), 2);
        sh(
            "nft add table ip other; nft add chain ip other c; nft add rule ip other c drop; nft flush table inet flannel",
        );
        assert_eq!(settle(netfilter, &territory, &desired), 1);
        sh("nft delete element inet flannel nets { 10.0.2.0/24 }");
        assert_eq!(settle(netfilter, &territory, &desired), 1);
        let own = ["flannel", "flannel-web"].map(|name| listed(&inet(name)));
        settle(netfilter, &territory, &Facts::default());
        assert_eq!(plain(&sh("nft list ruleset")), "table ip other { chain c { drop } }");
        assert!(own.iter().all(|text| text.contains("10.0.0.0/24")));
    });
}

#[test]
fn what_others_put_into_our_table_is_cleaned_away() {
    in_namespace(&["nft"], |netfilter| {
        let (territory, desired) = facts([table(sample("flannel", many(3)))]);
        settle(netfilter, &territory, &desired);
        let intrusions = [
            "nft add rule inet flannel forward tcp dport 22 drop",
            "nft insert rule inet flannel forward drop",
            "nft add rule inet flannel forward ip saddr 10.0.0.1 drop",
            "nft add rule inet flannel forward ct state established accept",
            "nft add rule inet flannel forward iifname 'cni*' accept",
            "nft add rule inet flannel forward ip saddr { 10.1.0.0/16, 10.3.0.0/16 } accept",
            "nft add rule inet flannel forward limit rate 1/second accept",
            "nft add rule inet flannel forward meta mark set 1",
            "nft add chain inet flannel more",
            "nft add chain inet flannel more '{ type filter hook input priority 0; policy drop; }'",
            "nft add chain inet flannel forward '{ policy drop; }'",
            "nft add set inet flannel ports '{ type inet_service; }'",
            "nft add map inet flannel ports '{ type inet_service : ipv4_addr; }'",
            "nft add set inet flannel more '{ type ipv4_addr; }'",
            "nft add element inet flannel nets { 10.77.0.3-10.77.0.9 }",
            "nft add table inet flannel '{ flags dormant; }'",
        ];
        let right = listed(&inet("flannel"));
        for intrusion in intrusions {
            sh(intrusion);
            assert_ne!(look(netfilter, &territory), desired, "{intrusion} is not seen");
            assert_eq!(settle(netfilter, &territory, &desired), 1, "{intrusion}");
            assert_eq!(listed(&inet("flannel")), right, "{intrusion}");
        }
    });
}

#[test]
fn a_change_of_a_set_keeps_the_counters() {
    in_namespace(&["nft", "ping", "ip"], |netfilter| {
        let mut wanted = sample("flannel", [prefix("127.0.0.0/8")]);
        let base = Base { kind: ChainKind::Filter, hook: Hook::Output, priority: 0 };
        wanted
            .chains
            .insert("out".into(), Chain { base: Some(base), rules: vec![accept(vec![from("127.0.0.0/8")])] });
        let (territory, desired) = facts([table(wanted.clone())]);
        settle(netfilter, &territory, &desired);
        sh("ip link set lo up; ping -qc1 -W1 127.0.0.1");
        let counted = |text: &str| text.contains("ip saddr 127.0.0.0/8 counter packets 2 ");
        assert!(counted(&sh("nft list table inet flannel")));
        wanted.sets.insert("nets".into(), Set::of(Family::V4, many(9)));
        wanted.chains.insert("forward".into(), forward(vec![accept(vec![from("10.0.0.0/8")])]));
        let (_, desired) = facts([table(wanted)]);
        assert_eq!(settle(netfilter, &territory, &desired), 1);
        assert!(counted(&sh("nft list table inet flannel")));
    });
}

#[test]
fn thousands_of_elements() {
    in_namespace(&["nft"], |netfilter| {
        const COUNT: u32 = 5000;
        let (territory, desired) = facts([table(sample("flannel", many(COUNT)))]);
        let start = Instant::now();
        let results = netfilter.apply(&diff(&desired, &Facts::default()));
        let written = start.elapsed();
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        let start = Instant::now();
        assert_eq!(look(netfilter, &territory), desired);
        let read = start.elapsed();
        let made = handle(&inet("flannel"));
        let (_, more) = facts([table(sample("flannel", many(COUNT + 1).skip(1)))]);
        let observed = look(netfilter, &territory);
        let start = Instant::now();
        netfilter.apply(&diff(&more, &observed)).remove(0).unwrap();
        let delta = start.elapsed();
        assert_eq!(look(netfilter, &territory), more);
        assert_eq!(handle(&inet("flannel")), made);
        // All of them at once go out and others come in.
        let elsewhere = many(COUNT).map(|net| net.step(COUNT.into()).unwrap());
        let (_, moved) = facts([table(sample("flannel", elsewhere))]);
        assert_eq!(settle(netfilter, &territory, &moved), 1);
        println!("{COUNT} elements: written {written:?}, read {read:?}, one in and one out {delta:?}");
    });
}

#[test]
fn a_transaction_that_the_kernel_refuses_names_its_step_and_changes_nothing() {
    in_namespace(&["nft"], |netfilter| {
        let good = table(sample("flannel", many(1)));
        let (territory, desired) = facts([good.clone()]);
        settle(netfilter, &territory, &desired);
        let mut bad = sample("flannel", many(2));
        let jump = Rule { matches: Vec::new(), counter: false, verdict: Verdict::Jump("nowhere".into()) };
        bad.chains.insert("more".into(), Chain { base: None, rules: vec![jump] });
        let other = table(sample("flannel-web", many(1)));
        let bad = table(bad);
        let changes = [Change::Replace { old: &good, new: &bad }, Change::Create(&other)];
        let mut results = netfilter.apply(&changes).into_iter();
        let error = results.next().unwrap().unwrap_err();
        assert!(results.next().unwrap().is_ok(), "one table does not keep the other from being written");
        let text = flannel_core::act::pass::chain(&error);
        assert!(text.contains("write rule `jump nowhere` into chain more of table inet flannel"), "{text}");
        assert!(text.contains("No such file"), "{text}");
        assert_eq!(look(netfilter, &territory), desired);
        netfilter.apply(&[Change::Delete(&other)]).remove(0).unwrap();
        netfilter.apply(&[Change::Delete(&other)]).remove(0).expect("what is gone already is no error");
    });
}

const FRESH: &str = "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n";

fn accept_fact(cidr: &str) -> Fact {
    Fact::Accept(Accept { cidr: prefix(cidr) })
}

#[test]
fn iptables_lists_the_accepts_as_upstream_writes_them() {
    in_namespace(&["iptables-nft", "ip6tables-nft", "nft"], |netfilter| {
        let v4 = accept_fact("10.100.0.0/16");
        let v6 = accept_fact("fd00:100::/49");
        let error = netfilter.apply(&[Change::Create(&v4)]).remove(0).unwrap_err();
        assert!(matches!(error, WorldError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("no chain FORWARD in table ip filter"), "{error}");
        netfilter.apply(&[Change::Delete(&v4)]).remove(0).expect("nothing to delete is no error");
        assert!(netfilter.forward_chains().unwrap().is_empty());

        sh("iptables-nft -A FORWARD -i docker0 -j DROP; ip6tables-nft -A FORWARD -i docker0 -j DROP");
        assert_eq!(netfilter.forward_chains().unwrap(), [Family::V4, Family::V6].into());
        let before = sh("iptables-nft -S; ip6tables-nft -S");
        let (territory, desired) = facts([v4, accept_fact("10.101.128.0/17"), v6]);
        assert_eq!(settle(netfilter, &territory, &desired), 3);
        let rules = sh("iptables-nft -S");
        let expected = "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n-N FLANNEL-FWD
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n-A FORWARD -i docker0 -j DROP
-A FLANNEL-FWD -s 10.100.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -d 10.100.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -s 10.101.128.0/17 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -d 10.101.128.0/17 -m comment --comment \"flanneld forward\" -j ACCEPT\n";
        assert_eq!(rules, expected);
        assert!(sh("ip6tables-nft -S").contains("-A FLANNEL-FWD -d fd00:100::/49 -m comment"));
        // Upstream's own check and the save/restore round trip.
        sh("iptables-nft -C FLANNEL-FWD -s 10.100.0.0/16 -m comment --comment 'flanneld forward' -j ACCEPT");
        sh("iptables-nft -C FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD");
        sh("iptables-nft-save | iptables-nft-restore");
        assert_eq!(settle(netfilter, &territory, &desired), 0, "what iptables wrote is what we wrote");

        sh("iptables-nft -D FLANNEL-FWD -d 10.100.0.0/16 -m comment --comment 'flanneld forward' -j ACCEPT");
        assert_eq!(settle(netfilter, &territory, &desired), 1);
        sh("iptables-nft -F FORWARD; iptables-nft -A FORWARD -i docker0 -j DROP");
        assert_eq!(settle(netfilter, &territory, &desired), 2);
        assert!(
            sh("iptables-nft -S FORWARD").contains("-P FORWARD ACCEPT\n-A FORWARD -m comment"),
            "at the head"
        );

        let mut fewer = desired.clone();
        fewer.remove(&Key::Accept(prefix("10.100.0.0/16")));
        assert_eq!(settle(netfilter, &territory, &fewer), 1);
        assert!(
            sh("iptables-nft -S").contains("-N FLANNEL-FWD") && !sh("iptables-nft -S").contains("10.100.")
        );
        assert_eq!(settle(netfilter, &territory, &Facts::default()), 2);
        assert_eq!(sh("iptables-nft -S; ip6tables-nft -S"), before);
    });
}

#[test]
fn the_accepts_of_others_stay() {
    in_namespace(&["iptables-nft", "nft"], |netfilter| {
        sh("iptables-nft -N FLANNEL-FWD; iptables-nft -A FLANNEL-FWD -s 10.9.0.0/16 -j ACCEPT
            iptables-nft -A FORWARD -j FLANNEL-FWD");
        let before = sh("iptables-nft -S");
        let (territory, desired) = facts([accept_fact("10.100.0.0/16")]);
        settle(netfilter, &territory, &desired);
        assert!(sh("iptables-nft -S").contains("-s 10.100.0.0/16"));
        settle(netfilter, &territory, &Facts::default());
        assert_eq!(sh("iptables-nft -S"), before);
    });
}

#[test]
fn the_older_iptables_are_written_where_they_are_in_use() {
    in_namespace(&["iptables-legacy", "iptables-legacy-restore", "iptables-nft", "nft"], |netfilter| {
        let (territory, desired) = facts([accept_fact("10.100.0.0/16"), accept_fact("10.101.0.0/16")]);
        assert_eq!(sh("iptables-legacy -P FORWARD DROP; iptables-legacy -S").lines().count(), 3);
        assert_eq!(netfilter.forward_chains().unwrap(), [Family::V4].into());
        assert_eq!(netfilter.hint(), None);
        assert_eq!(settle(netfilter, &territory, &desired), 2);
        let rules = sh("iptables-legacy -S");
        assert!(
            rules.contains("-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n"),
            "{rules}"
        );
        assert_eq!(rules.matches("-A FLANNEL-FWD ").count(), 4, "{rules}");
        assert_eq!(sh("nft list ruleset"), "", "no chain of iptables-nft is made where there was none");
        // Docker comes up with the other variant: both need the accept now.
        sh("iptables-nft -P FORWARD DROP");
        assert_eq!(settle(netfilter, &territory, &desired), 2);
        assert_eq!(sh("iptables-nft -S").matches("-A FLANNEL-FWD ").count(), 4);
        sh("iptables-legacy -F FORWARD");
        assert_eq!(settle(netfilter, &territory, &desired), 2);
        assert_eq!(sh("iptables-legacy -S"), rules);
        settle(netfilter, &territory, &Facts::default());
        let dropping = FRESH.replace("FORWARD ACCEPT", "FORWARD DROP");
        assert_eq!(sh("iptables-legacy -S"), dropping);
        assert_eq!(sh("iptables-nft -S"), dropping);
    });
}

/// A namespace that lives as long as this does.
struct Sandbox(Child);

impl Sandbox {
    fn new() -> Self {
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let child = Command::new("unshare").args(["--net", "sleep", "120"]).spawn().unwrap();
        let link = format!("/proc/{}/ns/net", child.id());
        for _ in 0..500 {
            if std::fs::read_link(&link).is_ok_and(|there| there != own) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        Self(child)
    }

    fn try_sh(&self, script: &str) -> bool {
        let target = self.0.id().to_string();
        let status = Command::new("nsenter")
            .args(["-t", &target, "-n", "sh", "-euc", script])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.unwrap().success()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Sandbox {
    /// One that is joined to this namespace by a link of this name: we have the first address, it has the second.
    fn behind(link: &str, ours: &str, theirs: &str) -> Self {
        let sandbox = Self::new();
        let pid = sandbox.0.id();
        sh(&format!(
            "ip link add {link} type veth peer name eth0 netns {pid}; ip addr add {ours}/24 dev {link}
             ip link set {link} up"
        ));
        let inside = format!("ip addr add {theirs}/24 dev eth0; ip link set eth0 up; ip link set lo up");
        assert!(sandbox.try_sh(&inside));
        sandbox
    }

    fn pings(&self, to: &str) -> bool {
        self.try_sh(&format!("ping -qc1 -W1 {to}"))
    }
}

#[test]
fn packets_pass_a_forward_chain_that_drops_like_dockers() {
    in_namespace(&["iptables-nft", "nft", "ip", "ping", "nsenter", "unshare"], |netfilter| {
        let left = Sandbox::behind("left", "10.100.1.1", "10.100.1.2");
        let right = Sandbox::behind("right", "10.100.2.1", "10.100.2.2");
        assert!(left.try_sh("ip route add default via 10.100.1.1"));
        assert!(right.try_sh("ip route add default via 10.100.2.1"));
        sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
        let passes = || left.pings("10.100.2.2");
        assert!(passes(), "the way is open without rules");
        sh(
            "iptables-nft -P FORWARD DROP; iptables-nft -N DOCKER-USER; iptables-nft -I FORWARD -j DOCKER-USER",
        );
        assert!(!passes(), "the chain drops");
        let (territory, own_table) = facts([table(sample("flannel", [prefix("10.100.0.0/16")]))]);
        settle(netfilter, &territory, &own_table);
        assert!(
            !passes(),
            "the accept of another table does not outweigh the drop: this is why Accept exists"
        );
        let (territory, desired) = facts([accept_fact("10.100.0.0/16")]);
        settle(netfilter, &territory, &desired);
        assert!(passes());
        settle(netfilter, &territory, &Facts::default());
        assert!(!passes());
    });
}

/// The plan of a network on a node, seen from a container, another node, the outside, and another network's container.
#[test]
fn a_planned_firewall_masquerades_and_isolates() {
    in_namespace(&["nft", "ip", "ping", "nsenter", "unshare"], |netfilter| {
        let pod = Sandbox::behind("pod", "10.100.5.1", "10.100.5.2");
        let peer = Sandbox::behind("peer", "172.30.9.1", "172.30.9.2");
        let outside = Sandbox::behind("outside", "192.0.2.1", "192.0.2.2");
        let stranger = Sandbox::behind("stranger", "10.200.1.1", "10.200.1.2");
        sh("echo 1 > /proc/sys/net/ipv4/ip_forward; ip route add 10.100.9.0/24 via 172.30.9.2");
        assert!(pod.try_sh("ip route add default via 10.100.5.1"));
        assert!(peer.try_sh("ip addr add 10.100.9.2/32 dev lo; ip route add 10.100.0.0/16 via 172.30.9.1"));
        assert!(stranger.try_sh("ip route add default via 10.200.1.1"));

        let network = NetworkName::default_network();
        let ranges = [Range { cidr: prefix("10.100.0.0/16"), subnet: prefix("10.100.5.0/24") }];
        let (alone, others) = (BTreeSet::new(), BTreeSet::from([prefix("10.200.0.0/16")]));
        let scene = FirewallScene {
            network: &network,
            ranges: &ranges,
            masquerade: true,
            fully_random: true,
            forward: true,
            isolated_from: &alone,
            forward_chains: &netfilter.forward_chains().unwrap(),
        };
        let from_host =
            || sh("ping -qc1 -W1 -I 192.0.2.1 10.100.9.2 >/dev/null && echo yes || echo no") == "yes\n";
        assert!(!pod.pings("192.0.2.2"), "the outside knows no way back to a container");
        assert!(!from_host(), "nor does another node to an address outside the network");

        let (territory, desired) = facts(plan(&scene).unwrap().iter().cloned());
        settle(netfilter, &territory, &desired);
        assert_eq!(settle(netfilter, &territory, &desired), 0);
        assert!(pod.pings("192.0.2.2"), "masqueraded to the outside");
        assert!(from_host(), "masqueraded into the network (upstream's nftables rules cannot)");
        assert!(pod.pings("10.200.1.2") && stranger.pings("10.100.5.2"), "not isolated yet");
        assert!(peer.try_sh("ip route add blackhole 172.30.9.1/32"));
        assert!(!from_host(), "the peer answers nobody but containers now");
        assert!(pod.pings("10.100.9.2"), "between containers the source is kept");
        assert!(
            outside.try_sh("ip route add 10.100.0.0/16 via 192.0.2.1; ip route add blackhole 10.100.5.1/32")
        );
        assert!(outside.pings("10.100.5.2"), "into the network the source is kept");

        let isolated = FirewallScene { isolated_from: &others, ..scene };
        let (_, desired) = facts(plan(&isolated).unwrap().iter().cloned());
        assert_eq!(settle(netfilter, &territory, &desired), 1);
        assert!(!pod.pings("10.200.1.2") && !stranger.pings("10.100.5.2"));
        assert!(pod.pings("192.0.2.2") && pod.pings("10.100.9.2"));
        let drops = sh("nft list chain inet flannel forward");
        assert_eq!(drops.matches("counter packets 1 ").count(), 2, "{drops}");
    });
}

/// What is dropped stays dropped while its table is replaced over and over, by difference and as a whole.
#[test]
fn no_packet_slips_through_a_replacement() {
    in_namespace(&["nft", "ip"], |netfilter| {
        sh("ip link set lo up");
        let closed = |more: u32| {
            let mut table = sample("flannel", many(more));
            let base = Base { kind: ChainKind::Filter, hook: Hook::Output, priority: 0 };
            let to =
                Match::Address { side: Side::Destination, negated: false, prefix: prefix("127.0.0.2/32") };
            let drop = Rule { matches: vec![to], counter: more % 2 == 0, verdict: Verdict::Drop };
            table.chains.insert("out".into(), Chain { base: Some(base), rules: vec![drop] });
            table
        };
        let (territory, desired) = facts([table(closed(0))]);
        settle(netfilter, &territory, &desired);
        let there = std::net::UdpSocket::bind("127.0.0.2:0").unwrap();
        let address = there.local_addr().unwrap();
        let here = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        there.set_nonblocking(true).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let sent = std::thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let mut sent = 0u32;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // EPERM is what a drop in the output hook looks like to the sender.
                    assert!(here.send_to(b"x", address).is_err(), "a packet got out");
                    sent += 1;
                }
                sent
            });
            for round in 1..300 {
                let strange = Table { strange: vec!["made anew".to_owned()], ..closed(0) };
                let old = table(if round % 2 == 0 { closed(round - 1) } else { strange });
                let new = table(closed(round));
                netfilter.apply(&[Change::Replace { old: &old, new: &new }]).remove(0).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            flood.join().unwrap()
        });
        assert!(sent > 100, "only {sent} packets were tried");
        assert!(there.recv(&mut [0]).is_err(), "a packet arrived");
        sh("nft delete table inet flannel");
        here.send_to(b"x", address).expect("it was the table that dropped");
    });
}
