//! Upstream's chains, in the tables of both variants of iptables and of nftables.

use flannel_core::words::fact::shared_chain::Home;
use flannel_core::words::node::Iptables;

use super::*;

const MASQ: &str = "-m comment --comment \"flanneld masq\"";
const FWD: &str = "-m comment --comment \"flanneld forward\"";

/// What a node plans for the default network with such an iptables; none: with nftables.
fn planned(ranges: &[(&str, &str)], home: Option<Home>) -> (Territory, Facts) {
    let ranges: Vec<Range> =
        ranges.iter().map(|(cidr, subnet)| Range { cidr: prefix(cidr), subnet: prefix(subnet) }).collect();
    let written = home.iter().flat_map(|home| [(Family::V4, *home), (Family::V6, *home)]).collect();
    let iptables = Iptables { written, fully_random: true, ..Iptables::default() };
    let facts = plan(&FirewallScene {
        network: &NetworkName::default_network(),
        ranges: &ranges,
        masquerade: true,
        fully_random: true,
        forward: true,
        isolated_from: &BTreeSet::new(),
        forward_chains: &BTreeSet::new(),
        iptables: &iptables,
        nftables: home.is_none(),
    })
    .unwrap();
    let cidrs = ranges.iter().map(|range| range.cidr).collect();
    (Territory { cidrs, shared_chains: true, ..Territory::default() }, facts)
}

const V4: (&str, &str) = ("10.100.0.0/16", "10.100.5.0/24");
const V6: (&str, &str) = ("fd00:100::/48", "fd00:100:0:5::/64");
const OTHER: (&str, &str) = ("10.7.0.0/17", "10.7.3.0/24");

/// The chain of a network, as `iptables -t nat -S` lists it; the first rule is everybody's.
fn masquerading((cidr, subnet): (&str, &str), multicast: &str) -> String {
    [
        format!("-s {subnet} -d {cidr} {MASQ} -j RETURN"),
        format!("-s {cidr} -d {subnet} {MASQ} -j RETURN"),
        format!("! -s {cidr} -d {subnet} {MASQ} -j RETURN"),
        format!("-s {cidr} ! -d {multicast} {MASQ} -j MASQUERADE --random-fully"),
        format!("! -s {cidr} -d {cidr} {MASQ} -j MASQUERADE --random-fully"),
    ]
    .map(|rule| format!("-A FLANNEL-POSTRTG {rule}\n"))
    .concat()
}

fn marked() -> String {
    format!("-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {MASQ} -j RETURN\n")
}

fn accepting(cidr: &str) -> String {
    ["-s", "-d"].map(|side| format!("-A FLANNEL-FWD {side} {cidr} {FWD} -j ACCEPT\n")).concat()
}

/// `iptables -t nat -S` and `iptables -S` of a host that has nothing but flannel.
fn nat(chain: &str) -> String {
    format!(
        "-P PREROUTING ACCEPT\n-P INPUT ACCEPT\n-P OUTPUT ACCEPT\n-P POSTROUTING ACCEPT\n-N FLANNEL-POSTRTG\n\
         -A POSTROUTING {MASQ} -j FLANNEL-POSTRTG\n{}{chain}",
        marked()
    )
}

fn filter(chain: &str) -> String {
    format!(
        "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n-N FLANNEL-FWD\n-A FORWARD {FWD} -j FLANNEL-FWD\n{chain}"
    )
}

#[test]
fn iptables_lists_the_chains_as_upstream_writes_them() {
    for (home, variant) in [(Home::IptablesNft, "nft"), (Home::IptablesLegacy, "legacy")] {
        let programs = match home {
            Home::IptablesNft => ["iptables-nft", "ip6tables-nft"],
            _ => ["iptables-legacy", "ip6tables-legacy"],
        };
        in_namespace(&programs, move |netfilter| {
            let rules = |program: &str, table: &str| sh(&format!("{program}-{variant} -t {table} -S"));
            let (territory, desired) = planned(&[V4, V6], Some(home));
            assert_eq!(settle(netfilter, &territory, &desired), 4);
            let expected = [
                ("iptables", "nat", nat(&masquerading(V4, "224.0.0.0/4"))),
                ("iptables", "filter", filter(&accepting(V4.0))),
                ("ip6tables", "nat", nat(&masquerading(V6, "ff00::/8"))),
                ("ip6tables", "filter", filter(&accepting(V6.0))),
            ];
            let check = |netfilter: &mut Netfilter, when: &str| {
                settle(netfilter, &territory, &desired);
                for (program, table, expected) in &expected {
                    assert_eq!(&rules(program, table), expected, "{when}");
                }
            };
            check(netfilter, "at first");
            // Upstream's own check of every rule, and the round trip.
            for (program, table, expected) in &expected {
                for rule in expected.lines().filter_map(|line| line.strip_prefix("-A ")) {
                    sh(&format!("{program}-{variant} -t {table} -C {rule}"));
                }
                sh(&format!("{program}-{variant}-save -t {table} | {program}-{variant}-restore"));
            }
            assert_eq!(settle(netfilter, &territory, &desired), 0, "what iptables wrote is what we wrote");
            let faults = [
                "-t nat -F",
                "-t nat -F POSTROUTING",
                "-t nat -F FLANNEL-POSTRTG",
                "-F",
                "-F FLANNEL-FWD",
                "-F; iptables -X",
                "-I FLANNEL-FWD -p tcp -j DROP",
                "-t nat -A FLANNEL-POSTRTG -j ACCEPT",
                "-I FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD",
                "-I FORWARD -s 10.100.0.0/16 -m comment --comment 'flanneld forward' -j ACCEPT",
                "-t nat -D FLANNEL-POSTRTG 2; iptables -t nat -A FLANNEL-POSTRTG -s 10.100.5.0/24 -d 10.100.0.0/16 \
                 -m comment --comment 'flanneld masq' -j RETURN",
                "-t nat -A POSTROUTING -s 10.100.0.0/16 -d 10.100.0.0/16 -m comment --comment 'flanneld masq' -j RETURN",
                "-t nat -A FLANNEL-POSTRTG -s 10.100.9.0/24 -d 10.100.0.0/16 -m comment --comment 'flanneld masq' -j RETURN",
                "-t nat -I FLANNEL-POSTRTG -s 10.100.0.0/16 -j RETURN",
            ];
            for fault in faults {
                sh(&format!("iptables {fault}").replace("iptables", &format!("iptables-{variant}")));
                check(netfilter, fault);
            }
            settle(netfilter, &territory, &Facts::default());
            for (program, table, expected) in &expected {
                let policies: String =
                    expected.split_inclusive('\n').filter(|line| line.starts_with("-P")).collect();
                assert_eq!(rules(program, table), policies);
            }
        });
    }
}

#[test]
fn two_agents_of_a_host_live_together() {
    for (home, variant) in [(Home::IptablesNft, "nft"), (Home::IptablesLegacy, "legacy")] {
        in_namespace(&["iptables-nft", "iptables-legacy"], move |netfilter| {
            let rules = || sh(&format!("iptables-{variant} -t nat -S; iptables-{variant} -S"));
            let (one, two) = (planned(&[V4], Some(home)), planned(&[OTHER], Some(home)));
            settle(netfilter, &one.0, &one.1);
            settle(netfilter, &two.0, &two.1);
            let both = [V4, OTHER].map(|range| masquerading(range, "224.0.0.0/4")).concat();
            let expected = nat(&both) + &filter(&(accepting(V4.0) + &accepting(OTHER.0)));
            assert_eq!(rules(), expected);
            for (territory, desired) in [&one, &two] {
                assert_eq!(settle(netfilter, territory, desired), 0, "neither minds the other");
            }
            // What upstream does at its start for one of them.
            sh(&format!("iptables-{variant} -t nat -F FLANNEL-POSTRTG"));
            settle(netfilter, &two.0, &two.1);
            assert_eq!(settle(netfilter, &one.0, &one.1), 1);
            assert_eq!(settle(netfilter, &two.0, &two.1), 0);
            settle(netfilter, &two.0, &Facts::default());
            let alone = nat(&masquerading(V4, "224.0.0.0/4")) + &filter(&accepting(V4.0));
            assert_eq!(rules(), alone);
        });
    }
}

#[test]
fn the_jump_comes_before_what_ends_all() {
    for (home, variant) in [(Home::IptablesNft, "nft"), (Home::IptablesLegacy, "legacy")] {
        in_namespace(&["iptables-nft", "iptables-legacy"], move |netfilter| {
            let iptables = |script: &str| sh(&script.replace("iptables", &format!("iptables-{variant}")));
            iptables("iptables -N DOCKER-USER; iptables -A DOCKER-USER -i eth9 -j DROP; iptables -A DOCKER-USER -j RETURN
                iptables -A FORWARD -j DOCKER-USER; iptables -A FORWARD -i docker0 -j ACCEPT
                iptables -A FORWARD -j REJECT --reject-with icmp-host-prohibited");
            let before = iptables("iptables -S");
            let (territory, desired) = planned(&[V4], Some(home));
            settle(netfilter, &territory, &desired);
            let rules = iptables("iptables -S");
            let expected = format!(
                "-A DOCKER-USER -i eth9 -j DROP\n-A DOCKER-USER {FWD} -j FLANNEL-FWD\n-A DOCKER-USER -j RETURN\n"
            );
            assert!(rules.contains(&expected), "{rules}");
            let expected = format!(
                "-A FORWARD -j DOCKER-USER\n-A FORWARD -i docker0 -j ACCEPT\n-A FORWARD {FWD} -j FLANNEL-FWD\n\
                 -A FORWARD -j REJECT --reject-with icmp-host-prohibited\n"
            );
            assert!(rules.contains(&expected), "{rules}");
            assert_eq!(settle(netfilter, &territory, &desired), 0);
            settle(netfilter, &territory, &Facts::default());
            assert_eq!(iptables("iptables -S"), before);
        });
    }
}

#[test]
fn nft_lists_the_tables_as_upstream_writes_them() {
    in_namespace(&["nft"], |netfilter| {
        let (territory, desired) = planned(&[V4, V6], None);
        assert_eq!(settle(netfilter, &territory, &desired), 4);
        let expected = "table ip flannel-ipv4 {
	comment \"rules for flannel-ipv4\"
	chain postrtg {
		comment \"chain to manage traffic masquerading by flannel\"
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.100.5.0/24 ip daddr 10.100.0.0/16 return
		ip saddr 10.100.0.0/16 ip daddr 10.100.5.0/24 return
		ip saddr != 10.100.0.0/16 ip daddr 10.100.5.0/24 return
		ip saddr 10.100.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.100.0.0/16 ip daddr 10.100.0.0/16 masquerade fully-random
	}

	chain forward {
		comment \"chain to accept flannel traffic\"
		type filter hook forward priority filter; policy accept;
		ip saddr 10.100.0.0/16 accept
		ip daddr 10.100.0.0/16 accept
	}
}
";
        let v4 = || sh("nft list table ip flannel-ipv4");
        assert_eq!(v4(), expected);
        assert!(
            sh("nft list table ip6 flannel-ipv6")
                .contains("ip6 saddr fd00:100::/48 ip6 daddr != ff00::/8 masquerade")
        );
        for fault in [
            "flush ruleset",
            "delete table ip flannel-ipv4",
            "flush chain ip flannel-ipv4 postrtg",
            "delete chain ip flannel-ipv4 forward",
            "insert rule ip flannel-ipv4 forward drop",
            "add table ip flannel-ipv4; delete table ip flannel-ipv4; add table ip flannel-ipv4; \
             add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority 5; }",
        ] {
            sh(&format!("nft '{fault}'"));
            settle(netfilter, &territory, &desired);
            if !fault.starts_with("add table") {
                assert_eq!(plain(&v4()), plain(expected), "{fault}");
            }
        }
        assert!(v4().contains("priority srcnat"));
        let other = planned(&[OTHER], None);
        settle(netfilter, &other.0, &other.1);
        assert_eq!(settle(netfilter, &territory, &desired), 0);
        assert_eq!(settle(netfilter, &other.0, &other.1), 0);
        settle(netfilter, &other.0, &Facts::default());
        assert!(v4().contains("10.100.0.0/16") && !v4().contains("10.7."));
        // To iptables and back, and away.
        let (_, iptables) = planned(&[V4, V6], Some(Home::IptablesNft));
        settle(netfilter, &territory, &iptables);
        assert!(!sh("nft list ruleset").contains("flannel-ipv"));
        settle(netfilter, &territory, &desired);
        assert!(!sh("nft list ruleset").contains("FLANNEL"));
        settle(netfilter, &territory, &Facts::default());
        assert!(!sh("nft list ruleset").to_lowercase().contains("flannel"));
    });
}
