//! Tables and the FORWARD chain against the real kernel, each test in a network namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test may panic, and so may what only tests call")]

mod any;
mod foreign;
mod hostports;
mod iptables;
mod packets;
mod published;
mod shared;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use flannel_core::decide::firewall::{FirewallScene, Range, plan, table_name};
use flannel_core::touch::world::WorldError;
use flannel_core::touch::world::kernel::nftables::Netfilter;
use flannel_core::words::addr::{Family, Prefix};
use flannel_core::words::fact::{Accept, Change, Fact, Facts, Key, Tally, diff};
use flannel_core::words::name::NetworkName;
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
    let nothing = Facts::default();
    let mut tally = Tally::new(&nothing);
    netfilter.observe(territory, &mut tally).unwrap();
    tally.close().found
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

fn accept_fact(cidr: &str) -> Fact {
    Fact::Accept(Accept { cidr: prefix(cidr) })
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
