//! Who may send into the kernel's tunnels.

use flannel_core::words::fact::{Change, Facts, TunnelHost, diff};

use super::*;

const IPIP: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"ipip"}}"#;

fn guarded(config: &str, own: &str) -> Case {
    Case { guard: true, ..Case::new(config, own) }
}

/// The addresses that a plan lets in.
fn hosts(facts: &Facts) -> Vec<String> {
    let address = |fact: &Fact| match fact {
        Fact::TunnelHost(host) => Some(host.address.to_string()),
        _ => None,
    };
    facts.iter().filter_map(address).collect()
}

#[test]
fn vxlan_of_both_families() {
    let peer = |n: u8, v6: &str, backend: &str| {
        format!(
            r#"{{"PublicIP":"192.168.100.{n}","PublicIPv6":{v6},"BackendType":"{backend}","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:04:{n:02x}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"02:00:00:00:06:{n:02x}"}}}}"#
        )
    };
    let case = guarded(DUAL, "10.5.70.0-24&fd42:cafe:0:2::-64")
        .peer("10.5.71.0-24&fd42:cafe:0:3::-64", &peer(2, r#""fd00:100::2""#, "vxlan"))
        // It cannot be served, and what it sends is what a holder sends.
        .peer("10.5.72.0-24", &peer(3, "null", "host-gw"))
        // Two leases of one host, of which one is about to end.
        .peer("10.5.73.0-24", &peer(4, "null", "vxlan"))
        .peer("10.5.74.0-24", &peer(4, "null", "vxlan"))
        // Nobody's address, and our own.
        .peer("10.5.75.0-24", r#"{"PublicIP":"0.0.0.0","PublicIPv6":null,"BackendType":"vxlan"}"#)
        .peer("10.5.76.0-24", &peer(1, "null", "vxlan"));
    golden("vxlan-guarded", &case);
}

#[test]
fn ipip() {
    let peer = r#"{"PublicIP":"192.168.100.2","PublicIPv6":null,"BackendType":"ipip"}"#;
    let mut case = guarded(IPIP, "10.100.5.0-24").peer("10.100.9.0-24", peer);
    golden("ipip-guarded", &case);
    // Behind NAT, packets arrive at the address that this host has.
    case.own.value.public_ip = "203.0.113.7".parse().unwrap();
    let text = case.plan().facts.to_string();
    assert!(text.contains("ip daddr 192.168.100.1 meta l4proto ipencap ip saddr != @hosts"), "{text}");
}

#[test]
fn nothing_is_guarded_where_nothing_needs_it() {
    let peer = |case: Case| case.peer("10.100.9.0-24", &vxlan_peer(2));
    for kind in ["host-gw", "udp", "alloc", "wireguard"] {
        let config = format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"{kind}"}}}}"#);
        let plan = peer(guarded(&config, "10.100.5.0-24")).plan();
        assert!(!plan.facts.to_string().contains("flannel_tunnel"), "{kind}: {}", plan.facts);
        assert!(
            plan.territory.tables.iter().any(TunnelHost::are_in),
            "{kind}: what another backend left goes"
        );
    }
    let mut case = peer(guarded(VXLAN, "10.100.5.0-24"));
    case.node.nftables = false;
    let without = peer(Case::new(VXLAN, "10.100.5.0-24")).plan();
    assert_eq!(case.plan().facts, without.facts);
    assert!(without.territory.tables.iter().any(TunnelHost::are_in), "switched off, it is removed");
}

#[test]
fn who_comes_is_let_in_before_he_is_sent_anything_and_who_goes_is_kept_out_after() {
    let alone = guarded(VXLAN, "10.100.5.0-24").peer("10.100.8.0-24", &vxlan_peer(3));
    let alone = alone.plan().facts;
    let both = guarded(VXLAN, "10.100.5.0-24")
        .peer("10.100.8.0-24", &vxlan_peer(3))
        .peer("10.100.9.0-24", &vxlan_peer(2));
    let both = both.plan().facts;
    let kinds = |changes: Vec<Change<'_>>| {
        changes.iter().map(|change| format!("{} {}", change.fact().kind(), change.verb())).collect::<Vec<_>>()
    };
    let come = ["neighbor added", "forward added", "tunnel_host added", "route added"];
    assert_eq!(kinds(diff(&both, &alone)), come, "and the table stays as it is");
    let go = ["route removed", "tunnel_host removed", "forward removed", "neighbor removed"];
    assert_eq!(kinds(diff(&alone, &both)), go);
    // One that moves is let in at its new address first.
    let moved = vxlan_peer(2).replace("192.168.100.2", "192.168.100.7");
    let moved =
        guarded(VXLAN, "10.100.5.0-24").peer("10.100.8.0-24", &vxlan_peer(3)).peer("10.100.9.0-24", &moved);
    let moved = moved.plan().facts;
    assert_eq!(kinds(diff(&moved, &both)), ["forward replaced", "tunnel_host added", "tunnel_host removed"]);
    assert_eq!(hosts(&moved), ["192.168.100.3", "192.168.100.7"]);
}

#[test]
fn alone_in_the_network_nobody_is_let_in() {
    let alone = guarded(VXLAN, "10.100.5.0-24").plan();
    assert_eq!(hosts(&alone.facts), [""; 0]);
    assert!(alone.facts.to_string().contains("ip saddr != @hosts counter drop"));
    let table = TunnelHost::table_of(&NetworkName::default_network());
    assert!(alone.territory.holds_table(&table), "who was let in before is a stranger now");
    let left = remains(&NetworkName::default_network(), []);
    assert!(left.holds_table(&table), "clean-up takes all of it");
}
