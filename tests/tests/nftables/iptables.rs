//! Our accepts in the FORWARD chains of both variants of iptables.

use super::*;

const FRESH: &str = "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n";

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
