//! Golden plans: every backend and mode as the lines that iproute2 would take. The files under `golden/` are the
//! expected text; `GOLDEN=write cargo test --test plan` writes them anew, and the diff is for the reviewer.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic where it stands")]

#[path = "plan/ipsec.rs"]
mod ipsec;

use std::collections::BTreeSet;
use std::path::Path;

use flannel_core::decide::backend;
use flannel_core::decide::plan::{Inputs, Plan, PlanError, overlap, plan, remains};
use flannel_core::words::addr::{Family, Prefix};
use flannel_core::words::config::NetworkConfig;
use flannel_core::words::exposure::{Exposure, PublishedPort, Transport};
use flannel_core::words::fact::shared_chain::Home;
use flannel_core::words::fact::{Fact, RouteProtocol};
use flannel_core::words::lease::{LeaseSet, LeaseValue, OwnLease, Subnets};
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::node::{HostRoute, Identity, Node, Uplink};
use flannel_core::words::rule::TableName;
use flannel_core::words::secret::Secret;
use flannel_core::words::units::Mtu;
use flannel_core::words::wireguard::{KeyPair, PublicKey};

#[path = "plan/overlaps.rs"]
mod overlaps;
#[path = "plan/tunnel_guard.rs"]
mod tunnel_guard;
#[path = "plan/udp.rs"]
mod udp;
#[path = "plan/wireguard.rs"]
mod wireguard;

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const DIRECT: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"VxLAN","Directrouting":true}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;
const DUAL: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"vxlan"}}"#;
const DUAL_HOST_GW: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"host-gw"}}"#;

/// A host at 192.168.100.1/24 (fd00:100::1/64) on eth0, with a default route through a router.
fn node() -> Node {
    let eth0 = LinkName::new("eth0").unwrap();
    let route = |destination: &str, via: Option<&str>| HostRoute {
        destination: destination.parse().unwrap(),
        via: via.map(|via| via.parse().unwrap()),
        link: Some(eth0),
        bridge: false,
        protocol: RouteProtocol::BOOT,
        scope_link: via.is_none(),
    };
    Node {
        uplink: Uplink {
            link: eth0,
            mtu: Mtu::new(1500).unwrap(),
            v4: Some("192.168.100.1/24".parse().unwrap()),
            v6: Some("fd00:100::1/64".parse().unwrap()),
        },
        public_v4: Some("192.168.100.1".parse().unwrap()),
        public_v6: Some("fd00:100::1".parse().unwrap()),
        identity: Identity {
            vtep_mac: "02:00:00:00:04:01".parse().unwrap(),
            vtep_mac_v6: "02:00:00:00:06:01".parse().unwrap(),
            wireguard: Some(Box::new(KeyPair {
                secret: Secret::new([0x5e; 32]),
                public: PublicKey([0x0a; 32]),
            })),
        },
        routes: vec![
            route("0.0.0.0/0", Some("192.168.100.254")),
            route("192.168.100.0/24", None),
            route("::/0", Some("fd00:100::fe")),
            route("fd00:100::/64", None),
        ],
        forward_chains: Default::default(),
        iptables: Default::default(),
        nftables: true,
        ipv6: true,
        ra_at_risk: false,
        wireguard: true,
        ports: Default::default(),
    }
}

/// The world of one test: what is in the store, and the host.
struct Case {
    network: NetworkName,
    config: NetworkConfig,
    node: Node,
    own: OwnLease,
    leases: LeaseSet,
    bridge: Option<LinkName>,
    masquerade: bool,
    fully_random: bool,
    forward: bool,
    guard: bool,
    blackhole: bool,
    isolated_from: BTreeSet<Prefix>,
    exposure: Option<Exposure>,
}

impl Case {
    fn new(config: &str, own: &str) -> Self {
        let node = node();
        let config = NetworkConfig::parse(config).unwrap().config;
        let value = LeaseValue {
            public_ip: node.public_v4.unwrap(),
            public_ipv6: node.public_v6.filter(|_| config.v6.is_some()),
            advertisement: backend::of(&config.backend).advertise(&config, &node),
        };
        let own = OwnLease { subnets: Subnets::parse_key(own).unwrap(), value };
        let mut leases = LeaseSet::default();
        leases.leases.insert(own.subnets, own.value.clone().into());
        Self {
            network: NetworkName::default_network(),
            config,
            node,
            own,
            leases,
            bridge: None,
            masquerade: false,
            fully_random: true,
            forward: false,
            guard: false,
            blackhole: false,
            isolated_from: BTreeSet::new(),
            exposure: None,
        }
    }

    /// A lease of another host, key and value as in the store.
    fn peer(mut self, key: &str, value: &str) -> Self {
        let value = LeaseValue::from_json(value).unwrap();
        self.leases.leases.insert(Subnets::parse_key(key).unwrap(), value.into());
        self
    }

    fn try_plan(&self) -> Result<Plan, PlanError> {
        plan(&Inputs {
            network: &self.network,
            config: &self.config,
            node: &self.node,
            own: &self.own,
            leases: &self.leases,
            bridge: self.bridge,
            masquerade: self.masquerade,
            fully_random: self.fully_random,
            forward: self.forward,
            guard: self.guard,
            blackhole: self.blackhole,
            isolated_from: &self.isolated_from,
            exposure: self.exposure.as_ref(),
        })
    }

    fn plan(&self) -> Plan {
        self.try_plan().unwrap()
    }

    fn findings(&self) -> Vec<String> {
        let mut lines: Vec<_> =
            self.plan().findings.iter().map(|f| format!("{} {}", f.code, f.text)).collect();
        lines.sort();
        lines
    }
}

fn vxlan_peer(n: u8) -> String {
    format!(
        r#"{{"PublicIP":"192.168.100.{n}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:04:{n:02x}"}}}}"#
    )
}

fn host_gw_peer(public: &str) -> String {
    format!(r#"{{"PublicIP":"{public}","PublicIPv6":null,"BackendType":"host-gw"}}"#)
}

/// Compares with the file, or writes it.
#[track_caller]
fn golden(name: &str, case: &Case) {
    let plan = case.plan();
    let config = case.config.to_json().replace(ipsec::PSK, "PSK");
    let mut text = format!("# {config}\n# MTU {}\n{}", plan.mtu, plan.facts);
    text.extend(plan.tunnel.iter().map(ToString::to_string));
    text.extend(plan.associations.iter().map(ToString::to_string));
    text.extend(plan.wireguard.iter().map(ToString::to_string));
    text.extend(plan.errands.iter().map(ToString::to_string));
    for finding in &plan.findings {
        text.push_str(&format!("# {} {}: {}\n", finding.code, finding.code.title(), finding.text));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).with_extension("txt");
    if std::env::var_os("GOLDEN").is_some_and(|v| v == "write") {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "{} differs\n--- expected\n{expected}--- planned\n{text}", path.display());
}

#[test]
fn vxlan() {
    golden("vxlan", &Case::new(VXLAN, "10.100.5.0-24").peer("10.100.9.0-24", &vxlan_peer(2)));
}

#[test]
fn vxlan_with_direct_routing() {
    let beyond_the_router = r#"{"PublicIP":"192.168.200.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:04:03"}}"#;
    let case = Case::new(DIRECT, "10.100.5.0-24")
        .peer("10.100.9.0-24", &vxlan_peer(2))
        .peer("10.100.12.0-24", beyond_the_router);
    golden("vxlan-direct-routing", &case);
}

#[test]
fn vxlan_with_every_option() {
    let config = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","VNI":4096,"Port":4789,"GBP":true,"Learning":true,"MTU":1400}}"#;
    let mut case = Case::new(config, "10.100.5.0-24").peer("10.100.9.0-24", &vxlan_peer(2));
    case.network = NetworkName::new("web").unwrap();
    golden("vxlan-options", &case);
}

#[test]
fn vxlan_in_both_families() {
    let both = r#"{"PublicIP":"192.168.100.2","PublicIPv6":"fd00:100::2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:04:02"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:02"}}"#;
    let case = Case::new(DUAL, "10.5.70.0-24&fd42:cafe:0:2::-64")
        .peer("10.5.68.0-24&fd42:cafe:0:1::-64", both)
        .peer("10.5.71.0-24", &vxlan_peer(4));
    golden("vxlan-dual-stack", &case);
}

#[test]
fn an_uplink_is_told_to_go_on_with_router_advertisements_before_the_host_forwards() {
    let mut case = Case::new(DUAL, "10.5.70.0-24&fd42:cafe:0:2::-64");
    case.bridge = Some(LinkName::new("cni0").unwrap());
    let settings = |case: &Case| {
        let facts = case.plan().facts.to_string();
        facts.lines().filter(|line| line.contains("ipv6.conf.all") || line.contains("eth0.accept")).count()
    };
    assert_eq!(settings(&case), 1);
    case.node.ra_at_risk = true;
    let facts = case.plan().facts.to_string();
    let place = |setting: &str| facts.find(setting).unwrap();
    assert!(
        place("net.ipv6.conf.eth0.accept_ra=2") < place("net.ipv6.conf.all.forwarding=1"),
        "the host would lose its default route:\n{facts}"
    );
    let mut v4 = Case::new(VXLAN, "10.100.5.0-24");
    v4.node.ra_at_risk = true;
    assert_eq!(settings(&v4), 0);
}

#[test]
fn vxlan_with_ipv6_alone() {
    let config = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
    let far = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:200::3","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:03"}}"#;
    let near = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:100::2","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:02"}}"#;
    let case = Case::new(config, "0.0.0.0-0&fd42:cafe:0:2::-64")
        .peer("0.0.0.0-0&fd42:cafe:0:1::-64", near)
        .peer("0.0.0.0-0&fd42:cafe:0:3::-64", far);
    golden("vxlan-ipv6", &case);
}

#[test]
fn host_gw() {
    let case = Case::new(HOST_GW, "10.100.5.0-24")
        .peer("10.100.9.0-24", &host_gw_peer("192.168.100.2"))
        .peer("10.100.12.0-24", &host_gw_peer("192.168.200.3"));
    golden("host-gw", &case);
}

#[test]
fn host_gw_in_both_families() {
    let both = r#"{"PublicIP":"192.168.100.2","PublicIPv6":"fd00:100::2","BackendType":"host-gw"}"#;
    let case = Case::new(DUAL_HOST_GW, "10.5.70.0-24&fd42:cafe:0:2::-64")
        .peer("10.5.68.0-24&fd42:cafe:0:1::-64", both);
    golden("host-gw-dual-stack", &case);
}

#[test]
fn ipip() {
    let peer = |public: &str| format!(r#"{{"PublicIP":"{public}","PublicIPv6":null,"BackendType":"ipip"}}"#);
    let config = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"IPIP"}}"#;
    let mut case = Case::new(config, "10.100.5.0-24")
        .peer("10.100.9.0-24", &peer("192.168.100.2"))
        .peer("10.100.12.0-24", &peer("192.168.200.3"))
        .peer("10.100.13.0-24", &host_gw_peer("192.168.100.4"));
    golden("ipip", &case);
    // As operators type it: who is on our own link is sent to directly.
    let direct = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"ipip","directrouting":true}}"#;
    case.config = NetworkConfig::parse(direct).unwrap().config;
    golden("ipip-direct-routing", &case);
    assert_eq!(NetworkConfig::parse(&case.config.to_json()).unwrap().config, case.config);
    // Behind NAT packets leave from the address that this host has.
    case.own.value.public_ip = "203.0.113.7".parse().unwrap();
    assert!(case.plan().facts.to_string().contains(" local 192.168.100.1 remote any "));
    // A tunnel that leaves nothing is no tunnel.
    case.node.uplink.mtu = Mtu::new(68).unwrap();
    assert!(matches!(case.try_plan(), Err(PlanError::Mtu { backend: "ipip", .. })));
}

#[test]
fn ipip_says_that_it_carries_no_ipv6() {
    let config = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"ipip"}}"#;
    let both = r#"{"PublicIP":"192.168.100.2","PublicIPv6":"fd00:100::2","BackendType":"ipip"}"#;
    let case =
        Case::new(config, "10.5.70.0-24&fd42:cafe:0:2::-64").peer("10.5.68.0-24&fd42:cafe:0:1::-64", both);
    assert_eq!(case.findings(), ["E125 ipip carries IPv4 only; the IPv6 subnet stays on this host"]);
    assert!(!case.plan().facts.to_string().contains("fd42:cafe:0:1::"), "{}", case.plan().facts);
}

#[test]
fn extension() {
    let config = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48",
        "Backend":{"Type":"Extension","SubnetAddCommand":["add","$x"],"SubnetRemoveCommand":"remove | it","PostStartupCommand":"","CommandTimeout":5}}"#;
    let case = Case::new(config, "10.5.70.0-24&fd42:cafe:0:2::-64")
        .peer("10.5.68.0-24&fd42:cafe:0:1::-64", r#"{"PublicIP":"192.168.100.2","PublicIPv6":"fd00:100::2","BackendType":"extension","BackendData":"key \"$(id)\""}"#)
        .peer("10.5.69.0-24", r#"{"PublicIP":"192.168.100.3","PublicIPv6":null,"BackendType":"extension"}"#)
        .peer("10.5.71.0-24", r#"{"PublicIP":"192.168.100.4","PublicIPv6":null,"BackendType":"extension","BackendData":{"VNI":1}}"#)
        .peer("10.5.72.0-24", &host_gw_peer("192.168.100.5"));
    golden("extension", &case);
    assert_eq!(NetworkConfig::parse(&case.config.to_json()).unwrap().config, case.config);
}

#[test]
fn alloc() {
    let config = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"alloc"}}"#;
    let case = Case::new(config, "10.100.5.0-24")
        .peer("10.100.9.0-24", r#"{"PublicIP":"192.168.100.2","PublicIPv6":null}"#);
    golden("alloc", &case);
}

/// A node as the Docker plugin keeps it: bridge, one endpoint's port, masquerading, another network to keep out.
#[test]
fn a_node_with_everything() {
    let mut case = Case::new(VXLAN, "10.100.5.0-24").peer("10.100.9.0-24", &vxlan_peer(2));
    case.bridge = Some(case.network.bridge());
    case.node.ports = BTreeSet::from([LinkName::new("veth0123456789a").unwrap()]);
    case.node.forward_chains = BTreeSet::from([Family::V4]);
    case.node.iptables.written.insert(Family::V4, Home::IptablesNft);
    (case.masquerade, case.forward) = (true, true);
    case.isolated_from = BTreeSet::from(["10.200.0.0/16".parse().unwrap()]);
    golden("everything", &case);
}

/// Published ports of both families, and every policy an endpoint can have.
#[test]
fn a_node_with_published_ports() {
    let both = r#"{"PublicIP":"192.168.100.2","PublicIPv6":"fd00:100::2","BackendType":"host-gw"}"#;
    let mut case = Case::new(DUAL_HOST_GW, "10.5.70.0-24&fd42:cafe:0:2::-64")
        .peer("10.5.68.0-24&fd42:cafe:0:1::-64", both);
    case.bridge = Some(case.network.bridge());
    let port = |protocol, host_ip: Option<&str>, host_port, address: &str, port| PublishedPort {
        protocol,
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host_port,
        address: address.parse().unwrap(),
        port,
    };
    let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    case.exposure = Some(Exposure {
        published: BTreeSet::from([
            port(Transport::Tcp, None, 8080, "10.5.70.2", 80),
            port(Transport::Udp, None, 53, "10.5.70.3", 53),
            port(Transport::Sctp, Some("127.0.0.1"), 9, "10.5.70.2", 9),
            port(Transport::Tcp, None, 8080, "fd42:cafe:0:2::2", 80),
            port(Transport::Tcp, Some("fd00:100::1"), 443, "fd42:cafe:0:2::2", 443),
            // Not of this subnet any more: it leads nowhere.
            port(Transport::Tcp, None, 81, "10.5.71.2", 80),
        ]),
        internal: addresses(&["10.5.70.4", "fd42:cafe:0:2::4", "10.5.71.4"]),
        closed: addresses(&["10.5.70.5", "10.5.70.6"]),
        unmasqueraded: addresses(&["10.5.70.7"]),
    });
    golden("published", &case);
}

#[test]
fn only_an_agent_that_keeps_a_bridge_touches_it() {
    let mut case = Case::new(VXLAN, "10.100.5.0-24");
    let (bridge, port) = (case.network.bridge(), LinkName::new("veth0123456789a").unwrap());
    case.node.ports = BTreeSet::from([port]);
    assert!(case.plan().territory.links.is_disjoint(&BTreeSet::from([bridge, port])));
    case.bridge = Some(bridge);
    assert!(case.plan().territory.links.is_superset(&BTreeSet::from([bridge, port])));
    // With the alias, an agent without a bridge would find them.
    let marked =
        |fact: &Fact| matches!(fact, Fact::Link(l) if l.alias.is_some() && l.name.as_str() != "flannel.1");
    assert!(!case.plan().facts.iter().any(marked));
}

#[test]
fn without_ipv6_in_the_kernel_nothing_of_it_is_set() {
    let mut case = Case::new(VXLAN, "10.100.5.0-24");
    assert!(case.plan().facts.to_string().contains("net.ipv6"));
    case.node.ipv6 = false;
    assert!(!case.plan().facts.to_string().contains("net.ipv6"));
}

#[test]
fn a_vni_that_names_no_device_is_said() {
    let config = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","VNI":16777215}}"#;
    let case = Case::new(config, "10.100.5.0-24");
    assert!(case.plan().facts.is_empty());
    assert!(case.findings()[0].starts_with("E102 VNI is 16777215: \"flannel.16777215\" cannot name"));
}

#[test]
fn advertisements_are_upstreams_byte_for_byte() {
    let json = |config: &str| Case::new(config, "10.100.5.0-24").own.value.to_json();
    assert_eq!(
        json(VXLAN),
        r#"{"PublicIP":"192.168.100.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:04:01"}}"#
    );
    assert_eq!(
        json(DUAL),
        r#"{"PublicIP":"192.168.100.1","PublicIPv6":"fd00:100::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:04:01"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:01"}}"#
    );
    assert_eq!(json(HOST_GW), r#"{"PublicIP":"192.168.100.1","PublicIPv6":null,"BackendType":"host-gw"}"#);
    assert_eq!(
        json(r#"{"Network":"10.100.0.0/16","Backend":{"Type":"alloc"}}"#),
        r#"{"PublicIP":"192.168.100.1","PublicIPv6":null}"#
    );
}

#[test]
fn a_peer_that_cannot_be_served_is_a_finding_and_the_others_are_served() {
    let case = Case::new(VXLAN, "10.100.5.0-24")
        .peer("10.100.9.0-24", &vxlan_peer(2))
        .peer("10.100.10.0-24", &host_gw_peer("192.168.100.10"))
        .peer("10.100.11.0-24", r#"{"PublicIP":"192.168.100.11","BackendType":"vxlan","BackendData":{"VNI":1}}"#)
        .peer("10.100.12.0-24", r#"{"PublicIP":"192.168.100.12","BackendType":"vxlan","BackendData":"text"}"#)
        .peer("10.100.13.0-24", r#"{"PublicIP":"192.168.100.13","BackendType":"vxlan"}"#)
        .peer("10.100.14.0-24", r#"{"PublicIP":"192.168.100.14","BackendType":"vxlan","BackendData":{"VtepMAC":"00:00:00:00:00:00"}}"#)
        .peer("10.100.15.0-24", &vxlan_peer(1))
        .peer("10.101.1.0-24", &vxlan_peer(16))
        .peer("10.100.17.0-24", r#"{"PublicIP":"192.168.100.17","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:04:01"}}"#)
        .peer("10.100.18.0-24", r#"{"PublicIP":"192.168.100.18","BackendType":"vxlan","BackendData":{"vtepmac":"02:00:00:00:04:02"}}"#)
        .peer("10.100.19.0-24", r#"{"PublicIP":"127.0.0.1","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:04:13"}}"#)
        .peer("10.100.20.0-24", r#"{"BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:04:14"}}"#);
    golden("vxlan-trouble", &case);
    assert_eq!(case.findings().len(), 11, "{:#?}", case.findings());
}

#[test]
fn a_host_with_two_subnets_is_sent_what_is_for_either() {
    let case = Case::new(VXLAN, "10.100.5.0-24")
        .peer("10.100.9.0-24", &vxlan_peer(2))
        .peer("10.100.10.0-24", &vxlan_peer(2));
    let facts = case.plan().facts.to_string();
    assert_eq!((facts.matches("ip route").count(), facts.matches("bridge fdb").count()), (2, 1), "{facts}");
    assert_eq!(case.findings(), [""; 0]);
}

#[test]
fn overlapping_leases_have_one_winner_whatever_their_order() {
    let case = Case::new(VXLAN, "10.100.5.0-24")
        .peer("10.100.0.0-20", &vxlan_peer(7)) // around ours
        .peer("10.100.8.0-21", &vxlan_peer(3)) // around the next two
        .peer("10.100.9.0-24", &vxlan_peer(2))
        .peer("10.100.10.0-24", &vxlan_peer(4))
        .peer("10.100.9.128-25", &vxlan_peer(5));
    assert_eq!(
        case.findings(),
        [
            "E108 10.100.0.0/20 of 192.168.100.7 overlaps 10.100.5.0/24; 10.100.5.0/24 is used",
            "E108 10.100.8.0/21 of 192.168.100.3 overlaps 10.100.9.0/24; 10.100.9.0/24 is used",
            "E108 10.100.9.128/25 of 192.168.100.5 overlaps 10.100.9.0/24; 10.100.9.0/24 is used",
        ]
    );
    let routes = case.plan().facts.to_string().matches("ip route").count();
    assert_eq!(routes, 2);
}

#[test]
fn host_gw_behind_nat_plans_nothing_and_says_why() {
    let mut case = Case::new(HOST_GW, "10.100.5.0-24").peer("10.100.9.0-24", &host_gw_peer("192.168.100.2"));
    case.own.value.public_ip = "203.0.113.7".parse().unwrap();
    assert!(case.plan().facts.is_empty());
    assert_eq!(case.findings(), ["E114 the public address is 203.0.113.7, eth0 has 192.168.100.1"]);
}

#[test]
fn vxlan_behind_nat_sends_from_an_address_that_this_host_has() {
    let mut case = Case::new(VXLAN, "10.100.5.0-24").peer("10.100.9.0-24", &vxlan_peer(2));
    case.own.value.public_ip = "203.0.113.7".parse().unwrap();
    let device = case.plan().facts.iter().map(|fact| fact.to_string()).find(|fact| fact.contains("vxlan"));
    let device = device.unwrap();
    assert!(device.contains("192.168.100.1") && !device.contains("203.0.113.7"), "{device}");
}

#[test]
fn a_subnet_that_nothing_takes_leads_nowhere_if_that_is_wanted() {
    let mut case = Case::new(VXLAN, "10.100.5.0-24");
    let without = case.plan();
    case.blackhole = true;
    let with = case.plan();
    let more: Vec<_> =
        with.facts.iter().filter(|fact| !without.facts.iter().any(|other| other == *fact)).collect();
    let lines: Vec<_> = more.iter().map(|fact| fact.to_string()).collect();
    assert_eq!(lines, ["ip route replace blackhole 10.100.5.0/24 metric 65535 proto 70"]);
    assert_eq!(with.territory, without.territory, "without the flag it is removed");
}

#[test]
fn source_ports_are_random_unless_that_is_disabled() {
    let mut case = Case::new(VXLAN, "10.100.5.0-24");
    case.masquerade = true;
    let rules = case.plan().facts.to_string();
    assert!(rules.matches("masquerade fully-random").count() == 2, "{rules}");
    case.fully_random = false;
    let rules = case.plan().facts.to_string();
    assert!(rules.matches("masquerade").count() == 2 && !rules.contains("fully-random"), "{rules}");
}

#[test]
fn an_mtu_that_cannot_be_had_is_said() {
    let config = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","MTU":9000}}"#;
    let mut case = Case::new(config, "10.100.5.0-24");
    assert_eq!(case.plan().mtu, Mtu::new(1450).unwrap());
    assert_eq!(case.findings(), ["E124 MTU is 9000, eth0 has 1500, which is used"]);
    case.node.uplink.mtu = Mtu::new(100).unwrap();
    let error = case.try_plan().unwrap_err();
    assert_eq!(error.to_string(), "backend vxlan leaves no room for a packet on eth0, whose MTU is 100");
}

#[test]
fn a_family_that_is_not_enabled_here_is_ignored() {
    let both = r#"{"PublicIP":"192.168.100.2","PublicIPv6":"fd00:100::2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:04:02"},"BackendV6Data":"junk"}"#;
    let six =
        r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:100::3","BackendType":"vxlan","BackendV6Data":"junk"}"#;
    let case = Case::new(VXLAN, "10.100.5.0-24")
        .peer("10.100.9.0-24&fd42:cafe:0:1::-64", both)
        .peer("0.0.0.0-0&fd42:cafe:0:3::-64", six);
    assert_eq!(case.findings(), [""; 0]);
    let text = case.plan().facts.to_string();
    assert!(text.contains("ip route replace 10.100.9.0/24") && !text.contains("fd42"), "{text}");
}

#[test]
fn a_plan_may_touch_what_is_left_of_its_network_and_what_it_wants() {
    let case = Case::new(VXLAN, "10.100.5.0-24").peer("10.100.9.0-24", &vxlan_peer(2));
    let (planned, left) = (case.plan().territory, remains(&case.network, case.config.cidrs()));
    assert_eq!(left.alias.as_deref(), Some("flannel network default"));
    assert_eq!(left.cidrs.iter().map(Prefix::to_string).collect::<Vec<_>>(), ["10.100.0.0/16"]);
    let names =
        |tables: &BTreeSet<TableName>| tables.iter().map(|table| table.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&left.tables), ["flannel", "flannel_endpoints", "flannel_tunnel"]);
    assert_eq!((planned.alias, planned.cidrs), (left.alias, left.cidrs));
    assert_eq!(names(&planned.tables), ["flannel", "flannel_tunnel"], "the endpoints are somebody else's");
    let case = Case { exposure: Some(Exposure::default()), ..case };
    assert_eq!(case.plan().territory.tables, left.tables);
    assert_eq!(planned.links.iter().map(|link| link.as_str()).collect::<Vec<_>>(), ["flannel.1"]);
    assert!(left.links.is_empty() && left.shared_chains && planned.shared_chains && !planned.accepts);
    let named = remains(&NetworkName::new("web").unwrap(), case.config.cidrs());
    assert!(named.accepts && !named.shared_chains, "upstream's chains are the default network's");
}

#[test]
fn four_thousand_peers_take_milliseconds() {
    let mut case = Case::new(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#, "10.255.255.0-24");
    for n in 1..=4000u32 {
        let [_, a, b, c] = n.to_be_bytes();
        let value = format!(
            r#"{{"PublicIP":"172.{}.{b}.{c}","BackendType":"vxlan","BackendData":{{"VtepMAC":"02:01:00:{a:02x}:{b:02x}:{c:02x}"}}}}"#,
            16 + a
        );
        case = case.peer(&format!("10.{b}.{c}.0-24"), &value);
    }
    let start = std::time::Instant::now();
    let plan = case.plan();
    let took = start.elapsed();
    assert_eq!((plan.facts.len(), plan.findings.len()), (3 + 3 * 4000, 0));
    println!("planned {} facts in {took:?}", plan.facts.len());
    // Generous: a debug build on a loaded machine. Quadratic work would take minutes.
    assert!(took.as_secs() < 2, "{took:?}");
}
