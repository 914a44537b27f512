//! Golden plans of the udp backend.

use super::*;

#[test]
fn udp() {
    let peer = |n: u8| format!(r#"{{"PublicIP":"192.168.100.{n}","PublicIPv6":null}}"#);
    let config = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"udp"}}"#;
    let mut case = Case::new(config, "10.100.5.0-24")
        .peer("10.100.9.0-24", &peer(2))
        .peer("10.100.12.0-24", &peer(3))
        .peer("10.100.13.0-24", &host_gw_peer("192.168.100.4"));
    golden("udp", &case);
    // Behind NAT datagrams leave from the address that this host has.
    case.own.value.public_ip = "203.0.113.7".parse().unwrap();
    assert_eq!(case.plan().tunnel.unwrap().local.to_string(), "192.168.100.1");
}

#[test]
fn udp_says_that_it_carries_no_ipv6() {
    let config = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"udp","Port":8286}}"#;
    let case = Case::new(config, "10.5.70.0-24&fd42:cafe:0:2::-64");
    assert_eq!(case.findings(), ["E125 udp carries IPv4 only; the IPv6 subnet stays on this host"]);
    assert_eq!(case.plan().tunnel.unwrap().port.number(), 8286);
}
