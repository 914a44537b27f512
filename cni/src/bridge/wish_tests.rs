use serde_json::json;

use super::*;

fn wish(bridge: Value) -> Result<Wish, CniError> {
    let conf = Conf::parse(json!({ "name": "n" }).to_string().as_bytes()).unwrap();
    Wish::read(bridge.as_object().unwrap(), "delegate.", &conf, &CniArgs::default())
}

#[test]
fn keys_are_matched_without_regard_to_case() {
    let wish =
        wish(json!({ "HairpinMode": true, "MTU": 1400, "Bridge": "br7", "isdefaultgateway": true })).unwrap();
    assert!(wish.hairpin && wish.default_gateway && wish.ip_masq.is_none());
    assert_eq!(wish.mtu, Some(Mtu::new(1400).unwrap()));
    assert_eq!(wish.bridge, Some(LinkName::new("br7").unwrap()));
}

#[test]
fn what_is_not_served_is_refused_by_name_if_it_is_asked_for() {
    for (value, name) in [
        (json!({ "vlan": 7 }), "delegate.vlan"),
        (json!({ "promiscmode": true }), "delegate.promiscMode"),
        (json!({ "isGateway": false }), "delegate.isGateway"),
    ] {
        let error = wish(value).unwrap_err();
        assert_eq!(error.code, 2);
        assert!(error.msg.starts_with(name), "{error}");
    }
    let nothing = json!({ "vlan": 0, "promiscMode": false, "isGateway": false, "isDefaultGateway": true });
    assert!(wish(nothing).is_ok());
}

fn routes(list: Value) -> Result<Vec<Route>, CniError> {
    super::routes(json!({ "Routes": list }).as_object().unwrap())
}

#[test]
fn routes_are_read_as_go_reads_them() {
    let routes =
        routes(json!([{ "dst": "10.9.1.7/16", "gw": "10.1.17.9", "priority": 5 }, { "dst": "::/0" }]))
            .unwrap();
    assert_eq!(routes[0].destination.to_string(), "10.9.0.0/16");
    assert_eq!((routes[0].via, routes[0].metric), (Some("10.1.17.9".parse().unwrap()), 5));
    assert_eq!(routes[1].via, None);
    for (wrong, code) in [
        (json!([{ "dst": "10.9.0.0/16", "gw": "fd00::1" }]), 7),
        (json!([{ "gw": "10.1.1.1" }]), 7),
        (json!([{ "dst": "10.9.0.0/16", "table": 7 }]), 2),
        (json!({}), 6),
    ] {
        assert_eq!(self::routes(wrong.clone()).unwrap_err().code, code, "{wrong}");
    }
}
