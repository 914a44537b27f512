use serde_json::json;

use super::*;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn wish(bridge: Value) -> Result<Wish, CniError> {
    let conf = Conf::parse(json!({ "name": "n" }).to_string().as_bytes()).unwrap();
    Wish::read(bridge.as_object().unwrap(), "delegate.", &conf, &CniArgs::default())
}

#[test]
fn keys_are_matched_without_regard_to_case() {
    let wish =
        wish(json!({ "HairpinMode": true, "MTU": 1400, "Bridge": "br7", "isdefaultgateway": true })).unwrap();
    assert!(wish.hairpin && wish.default_gateway && wish.ip_masq.is_none());
    assert_eq!(wish.gateway, Some(true), "a default gateway is one");
    assert_eq!(wish.mtu, Some(Mtu::new(1400).unwrap()));
    assert_eq!(wish.bridge, Some(LinkName::new("br7").unwrap()));
}

#[test]
fn nothing_asked_for_is_an_ordinary_endpoint() {
    let nothing =
        json!({ "vlan": 0, "promiscMode": false, "isGateway": false, "vlanTrunk": [], "ipMasqBackend": "" });
    let wish = wish(nothing).unwrap();
    assert_eq!(wish.endpoint_options(Some(MAC)), EndpointOptions::default());
    assert_eq!(wish.gateway, Some(false));
    assert!(wish.refuse_addresses().is_ok() && !wish.has_vlans());
}

#[test]
fn every_field_reaches_the_endpoint() {
    let wish = wish(json!({ "vlan": 100, "preserveDefaultVlan": false, "macspoofchk": true, "enabledad": true,
        "disableContainerInterface": true, "portIsolation": true, "promiscMode": true, "ipMasqBackend": "nftables" }))
    .unwrap();
    let members = BTreeMap::from([(100, VlanMember::Access)]);
    assert_eq!(
        wish.endpoint_options(Some(MAC)),
        EndpointOptions {
            vlans: Some(EndpointVlans { members, not_default: true }),
            guard: Some(MAC),
            detect_duplicates: true,
            down: true,
        }
    );
    assert!(wish.isolated && wish.promiscuous);
    assert!(wish.refuse_addresses().unwrap_err().msg.contains("DisableContainerInterface"));
}

#[test]
fn a_trunk_is_ids_and_ranges() {
    let wish =
        wish(json!({ "vlanTrunk": [{ "minID": 5, "maxID": 7 }, { "id": 100 }, { "id": 6 }] })).unwrap();
    assert_eq!(wish.trunk, [5, 6, 7, 100]);
    let options = wish.endpoint_options(None).vlans.unwrap();
    assert!(!options.not_default && options.members.values().all(|member| *member == VlanMember::Tagged));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    for (value, code, part) in [
        (json!({ "hairpinMode": true, "promiscMode": true }), 7, "delegate.promiscMode"),
        (json!({ "vlan": 5, "vlanTrunk": [{ "id": 6 }] }), 7, "delegate.vlanTrunk"),
        (json!({ "vlan": 4095 }), 7, "invalid VLAN ID 4095"),
        (json!({ "vlan": -1 }), 7, "invalid VLAN ID -1"),
        (json!({ "vlan": "5" }), 6, "delegate.vlan"),
        (json!({ "vlanTrunk": [{}] }), 7, "delegate.vlanTrunk[0]"),
        (json!({ "vlanTrunk": [{ "minID": 9, "maxID": 7 }] }), 7, "from 9 to 7"),
        (json!({ "vlanTrunk": [{ "minID": 9 }] }), 7, "has one of them"),
        (json!({ "vlanTrunk": [{ "id": 5000 }] }), 7, "delegate.vlanTrunk[0].id"),
        (json!({ "ipMasqBackend": "pf" }), 7, "delegate.ipMasqBackend"),
        (json!({ "macspoofchk": 1 }), 6, "macspoofchk"),
    ] {
        let error = wish(value.clone()).unwrap_err();
        assert!(error.code == code && error.to_string().contains(part), "{value}: {error}");
    }
}
