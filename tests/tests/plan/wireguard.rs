//! Golden plans of the wireguard backend, in the kernel and in this program.

use flannel_core::words::wireguard::{PublicKey, key_text};

use super::*;

fn config(options: &str) -> String {
    format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"wireguard"{options}}}}}"#)
}

fn dual(options: &str) -> String {
    format!(
        r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{{"Type":"wireguard"{options}}}}}"#
    )
}

fn key(n: u8) -> PublicKey {
    PublicKey([n; 32])
}

fn data(n: u8, port: &str) -> String {
    format!(r#"{{"PublicKey":"{}"{port}}}"#, key(n))
}

fn peer(n: u8, port: &str) -> String {
    let data = data(n, port);
    format!(
        r#"{{"PublicIP":"192.168.100.{n}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{data}}}"#
    )
}

/// A peer of both families, with the ports that it names.
fn both(n: u8, public: [&str; 2], ports: [u16; 2]) -> String {
    let [v4, v6] = ports.map(|port| data(n, &format!(r#","Port":{port}"#)));
    let [public_v4, public_v6] = public;
    format!(
        r#"{{"PublicIP":"{public_v4}","PublicIPv6":"{public_v6}","BackendType":"wireguard","BackendData":{v4},"BackendV6Data":{v6}}}"#
    )
}

#[test]
fn wireguard() {
    let mut case = Case::new(&config(""), "10.100.5.0-24")
        .peer("10.100.9.0-24", &peer(2, r#","Port":51820"#))
        // From before there was a port in leases, and with another one.
        .peer("10.100.12.0-24", &peer(3, ""))
        .peer("10.100.13.0-24", &peer(4, r#","Port":4500"#))
        .peer("10.100.14.0-24", &peer(5, r#","Port":"x""#))
        .peer("10.100.15.0-24", &peer(2, ""))
        .peer("10.100.16.0-24", &host_gw_peer("192.168.100.6"));
    golden("wireguard", &case);
    case.node.wireguard = false;
    golden("wireguard-userspace", &case);
}

#[test]
fn wireguard_with_every_option() {
    let psk = key_text(&[0x77; 32]);
    let options = format!(
        r#","ListenPort":4500,"ListenPortV6":4501,"MTU":1400,"PSK":"{psk}","PersistentKeepaliveInterval":25"#
    );
    let mut case = Case::new(&dual(&options), "10.5.70.0-24&fd42:cafe:0:2::-64")
        .peer("10.5.68.0-24&fd42:cafe:0:1::-64", &both(2, ["192.168.100.2", "fd00:100::2"], [51_820, 51_821]))
        .peer("10.5.71.0-24", &peer(4, r#","Port":0"#));
    case.network = NetworkName::new("web").unwrap();
    golden("wireguard-options", &case);
    let text = format!("{} {:?}", case.plan().facts, case.plan());
    assert!(
        !text.contains(&psk) && !text.contains("119, 119") && !text.contains("94, 94"),
        "a secret is shown"
    );
}

#[test]
fn wireguard_on_one_device() {
    // Where one device listens for both families, Go's flanneld names ListenPortV6 for IPv6 all the same.
    let plan = |mode: &str| {
        let case = Case::new(&dual(&format!(r#","Mode":"{mode}""#)), "10.5.70.0-24&fd42:cafe:0:2::-64")
            .peer(
                "10.5.68.0-24&fd42:cafe:0:1::-64",
                &both(2, ["192.168.100.2", "fd00:100::2"], [51_820, 51_821]),
            )
            .peer(
                "10.5.71.0-24&fd42:cafe:0:3::-64",
                &both(3, ["198.51.100.3", "2001:db8::3"], [51_820, 51_820]),
            );
        golden(&format!("wireguard-{mode}"), &case);
        case.own.value.advertisement
    };
    for mode in ["auto", "ipv4", "ipv6"] {
        let advertised = plan(mode);
        let port =
            |data: Option<&serde_json::value::RawValue>| data.unwrap().get().contains(r#""Port":51820}"#);
        assert!(port(advertised.data.as_deref()) && port(advertised.v6_data.as_deref()), "{mode}");
    }
}

#[test]
fn two_devices_do_not_greet_the_one_of_a_peer() {
    // It has not yet followed a change of Mode.
    let peer = both(2, ["192.168.100.2", "fd00:100::2"], [51_820, 51_820]);
    let mut case = Case::new(&dual(""), "10.5.70.0-24&fd42:cafe:0:2::-64")
        .peer("10.5.68.0-24&fd42:cafe:0:1::-64", &peer);
    let facts = case.plan().facts.to_string();
    assert!(facts.contains("endpoint 192.168.100.2:51820") && !facts.contains("[fd00:100::2]"), "{facts}");
    let said = "E110 10.5.68.0/24 fd42:cafe:0:1::/64 of 192.168.100.2 fd00:100::2 has one WireGuard device for both families, this host two";
    assert_eq!(case.findings(), [said]);
    case.node.wireguard = false;
    let peers: Vec<usize> = case.plan().wireguard.iter().map(|tunnel| tunnel.peers.len()).collect();
    assert_eq!(peers, [1, 0]);
}

#[test]
fn wireguard_with_ipv6_alone() {
    let config = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"wireguard"}}"#;
    let lease = format!(
        r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:100::2","BackendType":"wireguard","BackendV6Data":{}}}"#,
        data(2, r#","Port":51821"#)
    );
    let mut case =
        Case::new(config, "0.0.0.0-0&fd42:cafe:0:2::-64").peer("0.0.0.0-0&fd42:cafe:0:1::-64", &lease);
    golden("wireguard-ipv6-alone", &case);
    case.node.wireguard = false;
    assert_eq!(case.plan().wireguard.len(), 1);
    assert_eq!(case.plan().wireguard[0].address, None);
    let auto = config.replace(r#""wireguard""#, r#""wireguard","Mode":"auto""#);
    let case = Case::new(&auto, "0.0.0.0-0&fd42:cafe:0:2::-64").peer("0.0.0.0-0&fd42:cafe:0:1::-64", &lease);
    assert!(case.plan().facts.to_string().contains("wg set flannel-wg peer"), "{}", case.plan().facts);
}

#[test]
fn what_wireguard_tells_its_peers_is_upstreams_byte_for_byte() {
    let value = |config: &str, key| Case::new(config, key).own.value.to_json();
    let own = "CgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgo=";
    assert_eq!(
        value(&config(""), "10.100.5.0-24"),
        format!(
            r#"{{"PublicIP":"192.168.100.1","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{own}","Port":51820}}}}"#
        )
    );
    assert_eq!(
        value(&dual(r#","ListenPortV6":7"#), "10.5.70.0-24&fd42:cafe:0:2::-64"),
        format!(
            r#"{{"PublicIP":"192.168.100.1","PublicIPv6":"fd00:100::1","BackendType":"wireguard","BackendData":{{"PublicKey":"{own}","Port":51820}},"BackendV6Data":{{"PublicKey":"{own}","Port":7}}}}"#
        )
    );
}

#[test]
fn a_host_without_ipv6_serves_peers_with_both_on_one_device() {
    let case = Case::new(&config(r#","Mode":"auto""#), "10.100.5.0-24").peer(
        "10.100.9.0-24&fd42:cafe:0:1::-64",
        &both(2, ["192.168.100.2", "2001:db8::2"], [51_820, 51_821]),
    );
    let facts = case.plan().facts.to_string();
    let line =
        format!("wg set flannel-wg peer {} endpoint 192.168.100.2:51820 allowed-ips 10.100.9.0/24\n", key(2));
    assert!(facts.contains(&line), "{facts}");
    assert_eq!(case.findings(), [""; 0]);
}

#[test]
fn a_key_of_our_own_in_a_peers_lease_is_told_and_not_taken() {
    let case = Case::new(&config(""), "10.100.5.0-24").peer("10.100.9.0-24", &peer(0x0a, ""));
    let expected = format!("E134 10.100.9.0/24 of 192.168.100.10 has the key of this host, {}", key(0x0a));
    assert_eq!(case.findings(), [expected]);
}
