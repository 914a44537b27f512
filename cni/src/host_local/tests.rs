use super::*;

fn ipam(ipam: Value, version: &str, runtime: Value) -> Result<Vec<String>, CniError> {
    let conf = json!({ "name": "n", "cniVersion": version, "ipam": ipam, "runtimeConfig": runtime });
    let conf = Conf::parse(conf.to_string().as_bytes()).unwrap();
    let ipam = object(&conf.given, "ipam").unwrap().unwrap();
    Ipam::read(&ipam, &conf).map(|ipam| ipam.sets.iter().map(RangeSet::to_string).collect())
}

#[test]
fn ranges_come_from_three_places() {
    let all = json!({
        "subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.20", "gateway": "10.1.0.254",
        "ranges": [[{ "subnet": "10.2.0.0/24" }, { "Subnet": "10.3.0.0/24", "RangeStart": "10.3.0.200" }], [{ "subnet": "fd00::/64" }]],
    });
    let runtime = json!({ "ipRanges": [[{ "subnet": "10.4.0.0/24" }]] });
    assert_eq!(
        ipam(all, "1.0.0", runtime).unwrap(),
        ["10.4.0.0/24", "10.1.0.9-10.1.0.20", "10.2.0.0/24,10.3.0.200-10.3.0.254", "fd00::/64"]
    );
}

#[test]
fn what_cannot_be_is_refused() {
    let two = json!({ "ranges": [[{ "subnet": "10.1.0.0/24" }], [{ "subnet": "10.2.0.0/24" }]] });
    assert!(ipam(two.clone(), "0.3.0", json!({})).is_ok());
    for (given, version, wrong) in [
        (json!({}), "1.0.0", "no IP ranges specified"),
        (two, "0.2.0", "CNI version 0.2.0 does not support more than 1 address per family"),
        (json!({ "ranges": [[]] }), "1.0.0", "invalid range set 0: empty range set"),
        (
            json!({ "ranges": [[{ "subnet": "10.1.0.0/31" }]] }),
            "1.0.0",
            "invalid range set 0: Network 10.1.0.0/31 too small",
        ),
        (json!({ "ranges": [[{ "subnet": "10.1.0.1/24" }]] }), "1.0.0", "host bits set"),
        (json!({ "ranges": [[{ "gateway": "10.1.0.1" }]] }), "1.0.0", "ipam.ranges[0][0] has no subnet"),
        (json!({ "subnet": "10.1.0.0/24", "rangeEnd": "x" }), "1.0.0", "ipam.rangeEnd: \"x\" is no address"),
        (
            json!({ "subnet": "10.1.0.0/24", "ranges": [[{ "subnet": "10.1.0.0/16" }]] }),
            "1.0.0",
            "range set 0 overlaps with 1",
        ),
    ] {
        let error = ipam(given, version, json!({})).unwrap_err();
        assert!(error.msg.contains(wrong), "{error}");
        assert_eq!(error.code, 7, "{error}");
    }
    assert_eq!(ipam(json!({ "ranges": [{}] }), "1.0.0", json!({})).unwrap_err().code, 6);
}

#[test]
fn results_have_the_shape_of_their_version() {
    let set = |subnet: &str| RangeSet::whole(subnet.parse().unwrap()).unwrap();
    let offers: Vec<Offer> = ["10.1.0.0/24", "fd00::/64"]
        .iter()
        .map(|subnet| set(subnet).next(None, &[].into()).unwrap())
        .collect();
    let routes = [json!({ "dst": "0.0.0.0/0", "mtu": 1300 })];
    let render = |version| render(version, &offers, &routes, Map::new());
    assert_eq!(
        render(Version::V1_0_0),
        json!({ "cniVersion": "1.0.0", "routes": [{ "dst": "0.0.0.0/0", "mtu": 1300 }],
                "ips": [{ "address": "10.1.0.2/24", "gateway": "10.1.0.1" }, { "address": "fd00::2/64", "gateway": "fd00::1" }] })
    );
    assert_eq!(render(Version::V0_4_0)["ips"][1]["version"], "6");
    assert_eq!(
        render(Version::V0_2_0),
        json!({ "cniVersion": "0.2.0", "dns": {}, "ip6": { "ip": "fd00::2/64", "gateway": "fd00::1" },
                "ip4": { "ip": "10.1.0.2/24", "gateway": "10.1.0.1", "routes": [{ "dst": "0.0.0.0/0", "mtu": 1300 }] } })
    );
}
