use std::path::Path;

use flannel_core::words::units::Mtu;

use super::*;
use crate::result::Version;

fn conf(value: Value) -> Result<Conf, CniError> {
    Conf::parse(value.to_string().as_bytes())
}

fn read(conf: &Conf) -> FlannelConf<'_> {
    FlannelConf::read(conf).unwrap()
}

fn env(ip_masq: bool) -> SubnetEnv {
    SubnetEnv {
        networks: vec!["10.1.0.0/16".parse().unwrap()],
        subnets: vec!["10.1.17.1/24".parse().unwrap()],
        mtu: Mtu::new(1472).unwrap(),
        ip_masq,
    }
}

#[test]
fn the_least_and_the_usual_configuration() {
    let common = conf(json!({ "name": "n", "type": "flannel" })).unwrap();
    assert_eq!(common.version, Version::V0_1_0);
    let bare = read(&common);
    assert_eq!(bare.subnet_file, Path::new("/run/flannel/subnet.env"));
    assert_eq!(bare.data_dir, Path::new("/var/lib/cni/flannel"));
    assert_eq!(bare.ledger_root(), Path::new("/var/lib/cni/networks"));
    assert_eq!(bare.worker(), Worker::Ourselves);
    assert!(bare.network().is_default());
    for (delegate, code) in [
        (json!("bridge"), 6),
        (json!({ "name": "x" }), 7),
        (json!({ "IPAM": {} }), 7),
        (json!({ "type": 4 }), 7),
    ] {
        let common = conf(json!({ "name": "n", "delegate": delegate })).unwrap();
        assert_eq!(FlannelConf::read(&common).unwrap_err().code, code, "{delegate}");
    }
}

#[test]
fn what_is_kept_for_a_container_is_upstreams_text() {
    let common = conf(json!({ "name": "cni-flannel", "type": "flannel" })).unwrap();
    let conf = read(&common);
    assert_eq!(
        Value::Object(conf.delegated(&env(true))).to_string(),
        r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}"#
    );
}

#[test]
fn other_plugins_get_what_upstream_gives_them() {
    let common = conf(json!({ "name": "n", "cniVersion": "0.3.1", "type": "flannel",
        "delegate": { "type": "macvlan", "master": "eth1" },
        "ipam": { "type": "static", "routes": [{ "dst": "0.0.0.0/0" }] } }))
    .unwrap();
    let conf = read(&common);
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
fn the_flannel_network_follows_from_its_subnet_file() {
    let named = conf(json!({ "name": "n", "subnetFile": "/run/flannel/networks/web.env" })).unwrap();
    assert_eq!(read(&named).network().as_str(), "web");
    let moved = conf(json!({ "name": "n", "subnetFile": "/run/other/flannel.env" })).unwrap();
    assert!(read(&moved).network().is_default());
}

#[test]
fn what_the_lease_settles_cannot_be_asked_for() {
    for (value, name) in [
        (json!({ "name": "n", "ipam": { "rangeStart": "10.1.17.9" } }), "ipam.rangeStart"),
        (json!({ "name": "n", "runtimeConfig": { "ipRanges": [[{}]] } }), "runtimeConfig.ipRanges"),
    ] {
        let common = conf(value).unwrap();
        let error = read(&common).ipam().unwrap_err();
        assert_eq!(error.code, 2);
        assert!(error.msg.starts_with(name), "{error}");
    }
}
