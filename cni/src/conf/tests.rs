use super::*;

fn conf(value: Value) -> Result<Conf, CniError> {
    Conf::parse(value.to_string().as_bytes())
}

fn env(ip_masq: bool) -> SubnetEnv {
    SubnetEnv {
        networks: vec!["10.1.0.0/16".parse().unwrap()],
        subnets: vec!["10.1.17.1/24".parse().unwrap()],
        mtu: Mtu::new(1472).unwrap(),
        ip_masq,
    }
}

fn wish(value: Value) -> Result<Wish, CniError> {
    conf(value).unwrap().wish(&CniArgs::default())
}

#[test]
fn the_least_and_the_usual_configuration() {
    let bare = conf(json!({ "name": "n", "type": "flannel" })).unwrap();
    assert_eq!(bare.version, Version::V0_1_0);
    assert_eq!(bare.subnet_file, Path::new("/run/flannel/subnet.env"));
    assert_eq!(bare.data_dir, Path::new("/var/lib/cni/flannel"));
    assert_eq!(bare.ledger_root(), Path::new("/var/lib/cni/networks"));
    assert_eq!(bare.worker(), Worker::Ourselves);
    assert!(bare.network().is_default());
    let usual = wish(json!({ "name": "cbr0", "cniVersion": "0.3.1", "type": "flannel",
        "delegate": { "hairpinMode": true, "isDefaultGateway": true } }))
    .unwrap();
    assert!(usual.hairpin && usual.default_gateway && usual.bridge.is_none() && usual.ip_masq.is_none());
}

#[test]
fn bad_input_has_the_code_the_spec_gives_it() {
    for (text, code) in [
        ("", 6),
        ("[]", 6),
        ("{", 6),
        ("{}", 7),
        (r#"{"name":"a/b"}"#, 7),
        (r#"{"name":5}"#, 6),
        (r#"{"name":"n","cniVersion":"9.0.0"}"#, 1),
        (r#"{"name":"n","delegate":"bridge"}"#, 6),
        (r#"{"name":"n","delegate":{"name":"x"}}"#, 7),
        (r#"{"name":"n","delegate":{"IPAM":{}}}"#, 7),
        (r#"{"name":"n","delegate":{"type":4}}"#, 7),
    ] {
        assert_eq!(Conf::parse(text.as_bytes()).unwrap_err().code, code, "{text}");
    }
}

#[test]
fn keys_are_matched_without_regard_to_case() {
    let wish = wish(json!({ "Name": "n", "DELEGATE": { "HairpinMode": true, "MTU": 1400, "Bridge": "br7" },
        "RuntimeConfig": { "IPs": ["10.1.17.9/24"], "MAC": "0a:58:00:00:00:09" } }))
    .unwrap();
    assert!(wish.hairpin);
    assert_eq!(wish.mtu, Some(Mtu::new(1400).unwrap()));
    assert_eq!(wish.bridge, Some(LinkName::new("br7").unwrap()));
    assert_eq!(wish.ips, ["10.1.17.9".parse::<IpAddr>().unwrap()]);
    assert_eq!(wish.mac.unwrap().to_string(), "0a:58:00:00:00:09");
}

#[test]
fn what_is_not_served_is_refused_by_name_if_it_is_asked_for() {
    for (value, name) in [
        (json!({ "name": "n", "delegate": { "vlan": 7 } }), "delegate.vlan"),
        (json!({ "name": "n", "delegate": { "promiscmode": true } }), "delegate.promiscMode"),
        (json!({ "name": "n", "delegate": { "isGateway": false } }), "delegate.isGateway"),
        (json!({ "name": "n", "ipam": { "rangeStart": "10.1.17.9" } }), "ipam.rangeStart"),
        (
            json!({ "name": "n", "ipam": { "routes": [{ "dst": "10.9.0.0/16", "table": 7 }] } }),
            "ipam.routes[0].table",
        ),
        (
            json!({ "name": "n", "runtimeConfig": { "portMappings": [{ "HostPort": 80 }] } }),
            "runtimeConfig.portMappings",
        ),
    ] {
        let error = wish(value).unwrap_err();
        assert_eq!(error.code, 2);
        assert!(error.msg.starts_with(name), "{error}");
    }
    let nothing = json!({ "name": "n", "delegate": { "vlan": 0, "promiscMode": false, "isGateway": false,
        "isDefaultGateway": true }, "runtimeConfig": { "portMappings": [] } });
    assert!(wish(nothing).is_ok());
}

#[test]
fn routes_are_read_as_go_reads_them() {
    let wish = wish(json!({ "name": "n", "ipam": { "routes": [
        { "dst": "10.9.1.7/16", "gw": "10.1.17.9", "priority": 5 }, { "dst": "::/0" } ] } }))
    .unwrap();
    assert_eq!(wish.routes[0].destination.to_string(), "10.9.0.0/16");
    assert_eq!((wish.routes[0].via, wish.routes[0].metric), (Some("10.1.17.9".parse().unwrap()), 5));
    assert_eq!(wish.routes[1].via, None);
    let error =
        self::wish(json!({ "name": "n", "ipam": { "routes": [{ "dst": "10.9.0.0/16", "gw": "fd00::1" }] } }));
    assert_eq!(error.unwrap_err().code, 7);
}

#[test]
fn addresses_and_mac_come_by_three_ways() {
    let conf =
        conf(json!({ "name": "n", "args": { "cni": { "ips": ["10.1.17.8"], "mac": "0a:58:00:00:00:02" } },
        "runtimeConfig": { "ips": ["fd00::9/64"] } }))
        .unwrap();
    let args = CniArgs { ip: Some("10.1.17.7".into()), mac: Some("0a:58:00:00:00:01".into()) };
    let wish = conf.wish(&args).unwrap();
    let ips: Vec<String> = wish.ips.iter().map(IpAddr::to_string).collect();
    assert_eq!(ips, ["10.1.17.7", "10.1.17.8", "fd00::9"]);
    assert_eq!(wish.mac.unwrap().to_string(), "0a:58:00:00:00:02");
    let nonsense = CniArgs { ip: Some("x".into()), mac: None };
    assert_eq!(conf.wish(&nonsense).unwrap_err().code, 7);
}

#[test]
fn what_is_kept_for_a_container_is_upstreams_text() {
    let conf = conf(json!({ "name": "cni-flannel", "type": "flannel" })).unwrap();
    assert_eq!(
        Value::Object(conf.delegated(&env(true))).to_string(),
        r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}"#
    );
}

#[test]
fn other_plugins_get_what_upstream_gives_them() {
    let conf = conf(json!({ "name": "n", "cniVersion": "0.3.1", "type": "flannel",
        "delegate": { "type": "macvlan", "master": "eth1" },
        "ipam": { "type": "static", "routes": [{ "dst": "0.0.0.0/0" }] } }))
    .unwrap();
    assert_eq!(conf.worker(), Worker::Plugin("macvlan".into()));
    let delegated = Value::Object(conf.delegated(&env(false)));
    assert_eq!(
        delegated,
        json!({ "name": "n", "cniVersion": "0.3.1", "type": "macvlan", "master": "eth1", "ipMasq": true, "mtu": 1472,
            "ipam": { "type": "static", "ranges": [[{ "subnet": "10.1.17.0/24" }]],
                      "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.1.0.0/16" }] } })
    );
}

#[test]
fn an_absent_list_of_attachments_is_not_an_empty_one() {
    assert_eq!(conf(json!({ "name": "n" })).unwrap().valid, None);
    let empty = json!({ "name": "n", "cni.dev/valid-attachments": [] });
    assert_eq!(conf(empty).unwrap().valid, Some(Vec::new()));
    let one = json!({ "name": "n", "cni.dev/attachments": [{ "containerID": "c", "ifname": "eth0" }] });
    assert_eq!(conf(one).unwrap().valid.unwrap()[0].to_string(), "c/eth0");
    let wrong = json!({ "name": "n", "cni.dev/valid-attachments": [{ "containerID": "c" }] });
    assert_eq!(conf(wrong).unwrap_err().code, 6);
}

#[test]
fn the_flannel_network_follows_from_its_subnet_file() {
    let named = conf(json!({ "name": "n", "subnetFile": "/run/flannel/networks/web.env" })).unwrap();
    assert_eq!(named.network().as_str(), "web");
    let moved = conf(json!({ "name": "n", "subnetFile": "/run/other/flannel.env" })).unwrap();
    assert!(moved.network().is_default());
}
