//! Networks that would take addresses of the host.

use super::*;

#[test]
fn routes_of_the_host_that_a_network_may_not_cover() {
    let config = NetworkConfig::parse(HOST_GW).unwrap().config;
    let found = |destination: &str, via: Option<&str>, link: &str, bridge: bool| {
        let route = HostRoute {
            destination: destination.parse().unwrap(),
            via: via.map(|via| via.parse().unwrap()),
            link: Some(LinkName::new(link).unwrap()),
            bridge,
            protocol: RouteProtocol::BOOT,
            scope_link: via.is_none(),
        };
        overlap(&config, &[route]).map(|finding| finding.text)
    };
    for (destination, via, link, bridge) in [
        ("0.0.0.0/0", Some("192.168.100.254"), "eth0", false),
        ("10.101.0.0/16", None, "eth0", false),
        ("10.100.0.0/16", None, "flannel0", false),
        ("10.100.5.0/24", Some("10.100.5.0"), "flannel.1", false),
        ("10.100.5.0/24", None, "docker0", true),
        ("10.100.5.0/24", None, "cni0", true),
        // From when a host had more.
        ("10.100.64.0/18", None, "docker0", true),
        ("10.100.9.0/24", Some("192.168.100.2"), "eth0", false),
    ] {
        assert_eq!(found(destination, via, link, bridge), None, "{destination} {link}");
    }
    for (destination, via, link, bridge) in [
        ("10.100.5.0/24", None, "eth0", false),
        ("10.0.0.0/8", None, "eth0", false),
        ("10.0.0.0/8", Some("192.168.100.254"), "eth0", false),
        ("10.100.0.0/17", Some("192.168.100.254"), "eth0", false),
        ("10.100.0.0/16", None, "br0", true),
        ("10.100.0.0/17", None, "br0", true),
    ] {
        let via_text = via.map(|via| format!(" via {via}")).unwrap_or_default();
        assert_eq!(
            found(destination, via, link, bridge),
            Some(format!(
                "the network is 10.100.0.0/16, this host has the route {destination}{via_text} dev {link}"
            )),
        );
    }
}
