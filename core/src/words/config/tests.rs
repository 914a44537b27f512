use super::*;
use crate::words::code::Code;
use crate::words::units::Mtu;
use crate::words::units::Port;
use crate::words::wireguard::key_text;

fn parsed(text: &str) -> Parsed {
    NetworkConfig::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn v4(text: &str) -> (u8, String, String) {
    let range = parsed(text).config.v4.unwrap();
    (range.subnet_len(), range.first.base().to_string(), range.last.base().to_string())
}

fn error(text: &str) -> String {
    NetworkConfig::parse(text).map(|p| format!("{p:?}")).unwrap_err().to_string()
}

#[test]
fn defaults_of_the_subnets_are_upstreams() {
    let cases = [
        ("10.5.0.0/16", 24, "10.5.1.0", "10.5.255.0"),
        ("10.5.0.0/22", 24, "10.5.1.0", "10.5.3.0"),
        ("10.5.0.0/23", 25, "10.5.0.128", "10.5.1.128"),
        ("10.5.0.0/28", 30, "10.5.0.4", "10.5.0.12"),
        ("10.5.7.9/16", 24, "10.5.1.0", "10.5.255.0"),
    ];
    for (network, len, first, last) in cases {
        let text = format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#);
        assert_eq!(v4(&text), (len, first.into(), last.into()), "{network}");
    }
    let v6 = parsed(
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"vxlan"}}"#,
    );
    let range = v6.config.v6.unwrap();
    assert_eq!((range.subnet_len(), range.first.base().to_string()), (64, "fd42:cafe:0:1::".into()));
    assert_eq!(range.last.base().to_string(), "fd42:cafe:0:ffff::");
    assert_eq!(v6.config.v4, None);
}

#[test]
fn null_says_nothing_but_where_it_names_the_backend() {
    let text = r#"{"Network":"10.5.0.0/16","SubnetLen":26,"SubnetLen":null,"SubnetMax":null,"EnableIPv6":null,
                   "Backend":{"Type":"vxlan","VNI":null,"Port":4789,"port":null,"GBP":null}}"#;
    let Parsed { config, findings } = parsed(text);
    assert_eq!((config.v4.unwrap().subnet_len(), config.v6, findings.len()), (26, None, 0));
    let BackendConfig::Vxlan(vxlan) = config.backend else { panic!() };
    assert_eq!((vxlan.vni.id(), vxlan.port.number(), vxlan.gbp), (1, 4789, false));
    for (wrong, key) in [
        (r#"{"Network":"10.5.0.0/16","Backend":null}"#, "Backend"),
        (r#"{"Network":"10.5.0.0/16","Backend":{"Type":null}}"#, "no Type"),
        (r#"{"Network":null,"Backend":{"Type":"vxlan"}}"#, "Network is missing"),
    ] {
        assert!(error(wrong).contains(key), "{wrong}: {}", error(wrong));
    }
}

#[test]
fn what_operators_type_is_understood() {
    let text = r#"{"Network":"172.7.0.0/16","Backend":{"Type":"VxLAN","Directrouting":true}}"#;
    let BackendConfig::Vxlan(vxlan) = parsed(text).config.backend else { panic!() };
    assert!(vxlan.direct_routing);
    assert_eq!((vxlan.vni.id(), vxlan.port.number()), (1, 8472));

    let text =
        r#"{"Network":"10.100.0.0/16","SubnetLen":25,"SubnetMin":"10.100.0.0","SubnetMax":"10.100.1.0"}"#;
    assert_eq!(v4(text), (25, "10.100.0.0".into(), "10.100.1.0".into()));
    assert_eq!(parsed(text).findings[0].code, Code::BACKEND_ABSENT);
    assert_eq!(parsed(text).config.backend, BackendConfig::Udp(UdpConfig { port: Port::new(8285).unwrap() }));

    assert_eq!(
        v4(r#"{"network":"10.0.0.0/8","NETWORK":"10.5.0.0/16","Backend":{"Type":"alloc"}}"#).1,
        "10.5.1.0"
    );
    let findings =
        parsed(r#"{"Network":"10.5.0.0/16","SubnetLength":25,"Backend":{"type":"host-gw","VNI":3}}"#)
            .findings;
    let texts: Vec<_> = findings.iter().map(|f| f.text.as_str()).collect();
    assert_eq!(texts, ["SubnetLength", "Backend.VNI"]);
}

#[test]
fn errors_say_what_where_and_why() {
    let cases = [
        (
            r#"{"Network": "10.100.0.0/16""#,
            "not valid JSON at line 1, column 27: EOF while parsing an object",
        ),
        ("[]", "not valid JSON at line 1, column 0: invalid type: sequence, expected a JSON object"),
        ("{}", "Network is missing: define the network, for example \"10.100.0.0/16\""),
        (
            "{\n \"Network\": \"fd00::/48\"}",
            "Network at line 2, column 13 is \"fd00::/48\": an IPv6 network; put it into IPv6Network and set EnableIPv6",
        ),
        (
            r#"{"Network":"10.100.0.0/16","SubnetLen":31}"#,
            "SubnetLen at line 1, column 40 is 31: it must be less than /31",
        ),
        (
            r#"{"Network":"10.100.0.0/16","SubnetLen":17}"#,
            "SubnetLen at line 1, column 40 is 17: the network 10.100.0.0/16 must hold at least four subnets: at least 18",
        ),
        (
            r#"{"Network":"10.100.0.0/29"}"#,
            "Network at line 1, column 12 is \"10.100.0.0/29\": the network is too small, the smallest useful one is a /28",
        ),
        (
            r#"{"Network":"10.100.0.0/16","SubnetLen":"24"}"#,
            "SubnetLen at line 1, column 40 is \"24\": a whole number, not negative and without quotes, was wanted",
        ),
        (
            r#"{"Network":"10.100.0.0/16","SubnetMin":"10.99.0.0"}"#,
            "SubnetMin at line 1, column 40 is \"10.99.0.0\": not in the range of the network 10.100.0.0/16",
        ),
        (
            r#"{"Network":"10.100.0.0/16","SubnetMax":"10.100.1.128"}"#,
            "SubnetMax at line 1, column 40 is \"10.100.1.128\": not on a SubnetLen boundary (/24)",
        ),
        (
            r#"{"Network":"10.100.0.0/16","SubnetMin":"10.100.9.0","SubnetMax":"10.100.1.0"}"#,
            "SubnetMax at line 1, column 65 is \"10.100.1.0\": SubnetMin 10.100.9.0 is above SubnetMax 10.100.1.0",
        ),
        (
            r#"{"Network":"10.100.0.0/16","Backend":{"Type":"extension","SubnetAddCommand":["ip",7]}}"#,
            "Backend.SubnetAddCommand at line 1, column 77 is [\"ip\",7]: a command for sh in quotes, or a list of a program and its arguments, was wanted",
        ),
        (
            r#"{"Network":"10.100.0.0/16","Backend":{"Type":"extension","CommandTimeout":0}}"#,
            "Backend.CommandTimeout at line 1, column 75 is 0: seconds from 1 to 3600 were wanted",
        ),
        (
            r#"{"Network":"10.100.0.0/16","Backend":{"Type":"tencent-vpc"}}"#,
            "Backend.Type at line 1, column 46 is \"tencent-vpc\": backend tencent-vpc is not built yet; this version has alloc, extension, host-gw, ipip, ipsec, udp, vxlan, wireguard",
        ),
        (
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"udp"}}"#,
            "Network is missing: backend udp carries IPv4 only",
        ),
        (
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"ipip"}}"#,
            "Network is missing: backend ipip carries IPv4 only",
        ),
        (
            r#"{"Network":"10.100.0.0/16","Backend":{"Type":"udp","Port":65536}}"#,
            "Backend.Port at line 1, column 59 is 65536: port 65536 is outside 1..=65535",
        ),
        (
            r#"{"Network":"10.100.0.0/16","Backend":{}}"#,
            "Backend at line 1, column 38 is {}: Backend has no Type; say one of alloc, extension, host-gw, ipip, ipsec, udp, vxlan, wireguard",
        ),
        (
            r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
            "Backend.VNI at line 1, column 60 is 16777216: VNI 16777216 is outside 0..=16777215",
        ),
        (
            r#"{"EnableIPv4":false,"Network":"10.100.0.0/16"}"#,
            "EnableIPv4 or EnableIPv6 is missing: both are false, so there is nothing to lease",
        ),
    ];
    for (text, wanted) in cases {
        assert_eq!(error(text), wanted, "{text}");
    }
}

#[test]
fn a_written_config_reads_back() {
    for text in [
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789,"DirectRouting":true,"MTU":1400}}"#,
        r#"{"Network":"10.5.0.0/16","SubnetLen":26,"Backend":{"Type":"host-gw"}}"#,
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":8286}}"#,
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp"}}"#,
        r#"{"EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","Backend":{"Type":"alloc"}}"#,
    ] {
        let config = parsed(text).config;
        assert_eq!(parsed(&config.to_json()).config, config);
    }
}

#[test]
fn wireguard_has_upstreams_keys_and_defaults() {
    let network = r#""Network":"10.100.0.0/16""#;
    let wireguard = |options: &str| {
        let text = format!(r#"{{{network},"Backend":{{"Type":"WireGuard"{options}}}}}"#);
        let BackendConfig::Wireguard(wireguard) = parsed(&text).config.backend else { panic!("{text}") };
        let again = parsed(&parsed(&text).config.to_json()).config.backend;
        assert_eq!(again, BackendConfig::Wireguard(wireguard.clone()), "{text}");
        wireguard
    };
    for nothing in [
        "",
        r#","ListenPort":0,"MTU":0,"PSK":"","Mode":"","PersistentKeepaliveInterval":0"#,
        r#","PSK":null"#,
    ] {
        assert_eq!(wireguard(nothing), WireguardConfig::default(), "{nothing}");
    }
    assert_eq!((Port::WIREGUARD.number(), Port::WIREGUARD_V6.number()), (51_820, 51_821));
    let key = key_text(&[7; 32]);
    let all = wireguard(&format!(
        r#","listenport":1,"ListenPortV6":2,"Mtu":1400,"psk":"{key}","PersistentKeepaliveInterval":25,"MODE":"Auto""#
    ));
    assert_eq!((all.port.number(), all.port_v6.number(), all.keepalive), (1, 2, 25));
    assert_eq!((all.mtu.map(Mtu::bytes), all.mode), (Some(1400), WireguardMode::Auto));
    assert_eq!(all.shared.as_ref().map(|shared| *shared.reveal()), Some([7; 32]));
    let text = format!(r#"{{{network},"Backend":{{"Type":"wireguard","PSK":"{key}"}}}}"#);
    let shown = parsed(&text).config.shown();
    assert!(shown.contains(r#""PSK":"[redacted]""#) && !shown.contains(&key), "{shown}");
    assert!(!format!("{all:?}").contains(&key) && !format!("{all:?}").contains("7, 7"), "{all:?}");
}

#[test]
fn what_wireguard_cannot_use_is_said_by_its_name_and_no_secret_with_it() {
    let wrong = |options: &str| {
        error(&format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"wireguard",{options}}}}}"#))
    };
    assert_eq!(
        wrong(r#""PSK":"hunter2""#),
        "Backend.PSK at line 1, column 64 is [redacted]: not a WireGuard key: 32 bytes in base64 were wanted, as `wg genkey` prints them"
    );
    let typeless = error(r#"{"Network":"10.100.0.0/16","Backend":{"psk":"hunter2","Typ":"wireguard"}}"#);
    assert!(
        typeless.contains("[redacted]: Backend has no Type") && !typeless.contains("hunter2"),
        "{typeless}"
    );
    assert!(wrong(r#""PSK":12345678"#).contains("is [redacted]: text in quotes"));
    assert!(
        wrong(r#""Mode":"ipv5""#)
            .contains("Backend.Mode at line 1, column 65 is \"ipv5\": no valid Mode configured")
    );
    assert!(wrong(r#""ListenPort":65536"#).contains("Backend.ListenPort"));
    assert!(wrong(r#""ListenPortV6":"51821""#).contains("Backend.ListenPortV6"));
    assert!(wrong(r#""PersistentKeepaliveInterval":65536"#).contains("seconds from 0 to 65535"));
    assert!(wrong(r#""MTU":10"#).contains("Backend.MTU"));
    assert!(wrong(r#""Mode":"ipv6""#).contains("EnableIPv6 is missing: Backend.Mode ipv6"));
}

/// Pieces of documents in any order: more of them come past the first brace than of arbitrary text.
fn pieces() -> impl proptest::strategy::Strategy<Value = String> {
    use proptest::prelude::*;
    const PIECES: &[&str] = &[
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "null",
        "true",
        "-1",
        "0",
        "30",
        "1e400",
        "99999999999999999999",
        "\"10.5.0.0/16\"",
        "\"10.5.0.0/33\"",
        "\"fd42::/48\"",
        "\"255.255.255.255\"",
        "\"::\"",
        "\"Network\":",
        "\"IPv6Network\":",
        "\"EnableIPv6\":",
        "\"SubnetLen\":",
        "\"SubnetMin\":",
        "\"SubnetMax\":",
        "\"IPv6SubnetLen\":",
        "\"Backend\":",
        "\"Type\":",
        "\"vxlan\"",
        "\"udp\"",
        "\"host-gw\"",
        "\"VNI\":",
        "\"Port\":",
        "\"MTU\":",
        "\\u0000",
        "ä",
    ];
    let any = proptest::collection::vec(proptest::sample::select(PIECES), 0..24).prop_map(|all| all.concat());
    let whole = |value: &'static str| {
        proptest::sample::select(PIECES).prop_map(move |piece| {
            format!(
                r#"{{"Network":"10.5.0.0/16",{piece}{value},"Backend":{{"Type":"vxlan",{piece}{value}}}}}"#
            )
        })
    };
    prop_oneof![any, whole("4294967296"), whole("\"0.0.0.0/0\""), whole("31"), ".*"]
}

proptest::proptest! {
    #[test]
    fn no_text_is_a_panic(text in pieces()) {
        if let Ok(parsed) = NetworkConfig::parse(&text) {
            proptest::prop_assert!(parsed.config.cidrs().count() > 0, "{text}");
        }
    }
}

/// As short as a key may be.
fn psk() -> String {
    "0123456789abcdef".repeat(6)
}

#[test]
fn ipsec_has_upstreams_keys_and_shows_none() {
    let ipsec =
        |options: &str| format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"ipsec"{options}}}}}"#);
    let text = ipsec(&format!(r#","psk":"{}","udpencap":true,"EspProposal":"aes256-sha256""#, psk()));
    let parsed = parsed(&text);
    assert!(parsed.findings.is_empty() && !format!("{parsed:?}").contains("0123456789"));
    let BackendConfig::Ipsec(config) = &parsed.config.backend else { panic!() };
    assert!(config.udp_encap && config.esp_proposal == "aes256-sha256" && *config.psk.reveal() == psk());
    assert_eq!(NetworkConfig::parse(&parsed.config.to_json()).unwrap().config, parsed.config);
    let plain = NetworkConfig::parse(&ipsec(&format!(r#","PSK":"{}""#, psk()))).unwrap().config;
    assert!(plain.to_json().contains(r#"{"PSK":"0123"#) && !plain.to_json().contains("ESPProposal"));

    let errors = [
        (String::new(), "Backend.PSK is missing: backend ipsec needs a key of at least 96 characters"),
        (
            format!(r#","PSK":"{}""#, &psk()[1..]),
            "Backend.PSK at line 1, column 58 is [redacted]: password is too short: it has 95 characters, and at least 96",
        ),
        (
            format!(r#","PSK":"{}","ESPProposal":"aes128, aes256""#, psk()),
            "is \"aes128, aes256\": one proposal as strongSwan writes it was wanted",
        ),
        (format!(r#","PSK":"{}","UDPEncap":"yes""#, psk()), "is \"yes\": true or false was wanted"),
    ];
    for (options, wanted) in errors {
        let said = error(&ipsec(&options));
        assert!(said.contains(wanted) && !said.contains("0123456789"), "{said}");
    }
    let without_type = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"PSK":"{}"}}}}"#, psk());
    assert!(!error(&without_type).contains("0123456789"));
    let only_v6 = format!(
        r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{{"Type":"ipsec","PSK":"{}"}}}}"#,
        psk()
    );
    assert_eq!(error(&only_v6), "Network is missing: backend ipsec carries IPv4 only");
}
