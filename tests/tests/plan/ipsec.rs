//! Golden plans of backend ipsec.

use super::*;

/// As short as a key may be.
pub(crate) const PSK: &str = concat!(
    "0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef"
);

fn ipsec_config(options: &str) -> String {
    format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"ipsec","PSK":"{PSK}"{options}}}}}"#)
}

fn ipsec_peer(n: u8) -> String {
    format!(r#"{{"PublicIP":"192.168.100.{n}","PublicIPv6":null,"BackendType":"ipsec"}}"#)
}

#[test]
fn ipsec() {
    let case = Case::new(&ipsec_config(""), "10.100.5.0-24")
        .peer("10.100.9.0-24", &ipsec_peer(2))
        .peer("10.100.12.0-24", &ipsec_peer(3));
    golden("ipsec", &case);
    assert!(!format!("{:?}", case.plan()).contains(PSK));
    let remains = remains(&case.network, case.config.cidrs());
    assert!(case.plan().facts.iter().all(|fact| match fact {
        Fact::Policy(policy) => remains.holds_policy(policy),
        _ => true,
    }));
    // ESP in UDP has 8 bytes less for the packet.
    let encapsulated = Case::new(&ipsec_config(r#","udpencap":true"#), "10.100.5.0-24");
    assert_eq!(encapsulated.plan().mtu.to_string(), "1415");
}

#[test]
fn ipsec_says_what_is_in_its_way() {
    let mut case = Case::new(&ipsec_config(""), "10.100.5.0-24")
        .peer("10.100.9.0-24", &ipsec_peer(2))
        .peer("10.100.12.0-24", &ipsec_peer(3));
    case.node.routes.retain(|route| !route.destination.is_default());
    assert_eq!(case.findings(), ["E133 this host has no route to 10.100.9.0/24 and 1 more"]);
    let network = HostRoute {
        destination: "10.100.0.0/16".parse().unwrap(),
        via: None,
        link: Some(case.node.uplink.link),
        bridge: false,
        protocol: RouteProtocol::BOOT,
        scope_link: true,
    };
    case.node.routes.push(network.clone());
    assert_eq!(case.findings(), Vec::<String>::new());
    assert_eq!(overlap(&case.config, &case.node.routes), None);
    // Only this backend needs such a route.
    let vxlan = NetworkConfig::parse(VXLAN).unwrap().config;
    assert!(overlap(&vxlan, &[network]).is_some());
    case.own.value.public_ip = "203.0.113.7".parse().unwrap();
    assert_eq!(case.findings(), ["E114 the public address is 203.0.113.7, eth0 has 192.168.100.1"]);
    let plan = case.plan();
    assert_eq!(plan.associations, None);
    // What they hold back would leave in clear.
    assert!(plan.facts.iter().any(|fact| matches!(fact, Fact::Policy(_))), "{:?}", plan.facts);
}
