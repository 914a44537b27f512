//! What other programs made for one container: taken away exactly, and nothing beside it.

use super::*;

/// As the Go plugins `bridge` and `portmap` write them, with a neighbor whose chain begins alike.
fn chains(program: &str) -> String {
    let rules = "-N CNI-aa; -A CNI-aa -d 10.5.1.0/24 -m comment --comment 'name: \"n\" id: \"a\"' -j ACCEPT
        -A CNI-aa ! -d 224.0.0.0/4 -m comment --comment 'name: \"n\" id: \"a\"' -j MASQUERADE
        -N CNI-aab; -A CNI-aab -j MASQUERADE; -N CNI-HOSTPORT-DNAT
        -A POSTROUTING -s 10.5.1.3 -m comment --comment 'name: \"n\" id: \"aab\"' -j CNI-aab
        -A POSTROUTING -s 10.5.1.2 -m comment --comment 'name: \"n\" id: \"a\"' -j CNI-aa
        -A POSTROUTING -s 10.5.1.0/24 -m comment --comment 'old' -j CNI-aa
        -A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 80,443 -j CNI-aa; -A CNI-HOSTPORT-DNAT -p udp -j CNI-aab";
    let rules = rules.split([';', '\n']).map(str::trim);
    rules.map(|rule| format!("{program} -t nat {rule}\n")).collect()
}

fn goes_exactly(netfilter: &mut Netfilter, program: &str, other: &str) {
    assert!(!netfilter.remove_foreign_chain("CNI-aa").unwrap());
    sh(&chains(program));
    let before = sh(&format!("{program} -t nat -S"));
    assert!(!netfilter.remove_foreign_chain("CNI-a").unwrap());
    assert_eq!(sh(&format!("{program} -t nat -S")), before);
    assert!(netfilter.remove_foreign_chain("CNI-aa").unwrap());
    let expected: String = before
        .lines()
        .filter(|line| !line.split(' ').any(|word| word == "CNI-aa"))
        .flat_map(|line| [line, "\n"])
        .collect();
    assert_eq!(sh(&format!("{program} -t nat -S")), expected);
    assert!(!netfilter.remove_foreign_chain("CNI-aa").unwrap(), "once more is no harm");
    assert_eq!(sh(other), "", "the other variant was touched");
}

#[test]
fn a_chain_of_iptables_goes_with_the_rules_that_jump_there() {
    in_namespace(&["iptables-nft", "nft", "cat"], |netfilter| {
        goes_exactly(netfilter, "iptables-nft", "cat /proc/net/ip_tables_names 2>/dev/null || true");
    });
}

#[test]
fn of_the_other_family_too() {
    in_namespace(&["ip6tables-nft", "nft"], |netfilter| {
        sh("ip6tables-nft -t nat -N CNI-b; ip6tables-nft -t nat -A POSTROUTING -s fd00::2 -j CNI-b");
        assert!(netfilter.remove_foreign_chain("CNI-b").unwrap());
        assert!(!sh("ip6tables-nft -t nat -S").contains("CNI-b"));
    });
}

#[test]
fn of_the_older_iptables_too() {
    in_namespace(&["iptables-legacy", "iptables-legacy-restore", "nft"], |netfilter| {
        if run(&["sh", "-c", "iptables-legacy -t nat -S 2>/dev/null || true"], "").is_empty() {
            flannel_tests::needs::skipped("the table nat of the older iptables in its kernel");
            return;
        }
        goes_exactly(netfilter, "iptables-legacy", "nft list ruleset");
    });
}

#[test]
fn rules_go_by_their_comment() {
    in_namespace(&["nft"], |netfilter| {
        let name = TableName { family: TableFamily::Inet, name: "cni_plugins_masquerade".to_owned() };
        let none = netfilter.remove_foreign_rules(&name, &|_| true).unwrap();
        assert_eq!(none, 0, "there is no such table");
        sh(r#"nft 'add table inet cni_plugins_masquerade; add chain inet cni_plugins_masquerade masq_checks
            add rule inet cni_plugins_masquerade masq_checks ip saddr 10.5.1.2 masquerade comment "aa-1, net: n"
            add rule inet cni_plugins_masquerade masq_checks ip saddr 10.5.1.3 masquerade comment "aa-12, net: n"
            add rule inet cni_plugins_masquerade masq_checks ip saddr 10.5.1.4 masquerade'"#);
        let gone = netfilter.remove_foreign_rules(&name, &|comment| comment.starts_with("aa-1,")).unwrap();
        assert_eq!(gone, 1);
        let left = sh("nft list ruleset");
        assert!(!left.contains("10.5.1.2") && left.contains("aa-12") && left.contains("10.5.1.4"), "{left}");
    });
}
