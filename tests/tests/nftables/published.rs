//! The table of a node's endpoints: maps of ports, and what is looked up in them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use flannel_core::decide::publish::{PublishScene, plan, table_name};
use flannel_core::words::exposure::{Exposure, PublishedPort, Transport};
use flannel_core::words::name::LinkName;

use super::*;

fn port(protocol: Transport, host_ip: Option<&str>, host_port: u16, address: &str) -> PublishedPort {
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    PublishedPort { protocol, host_ip: host_ip.map(ip), host_port, address: ip(address), port: 80 }
}

/// The table alone: the setting beside it needs a bridge.
fn endpoints(published: impl IntoIterator<Item = PublishedPort>) -> Facts {
    let (network, bridge) = (NetworkName::default_network(), LinkName::new("cni0").ok());
    let ranges = [
        Range { cidr: prefix("10.100.0.0/16"), subnet: prefix("10.100.5.0/24") },
        Range { cidr: prefix("fd00:100::/48"), subnet: prefix("fd00:100:0:5::/64") },
    ];
    let one = |text: &str| BTreeSet::from([text.parse().unwrap()]);
    let exposure = Exposure {
        published: published.into_iter().collect(),
        internal: one("fd00:100:0:5::4"),
        closed: one("10.100.5.5"),
        unmasqueraded: one("10.100.5.6"),
    };
    let scene = PublishScene { network: &network, ranges: &ranges, exposure: &exposure, bridge };
    let mut facts = plan(&scene).unwrap();
    facts.retain(|fact| matches!(fact, Fact::Table(_)));
    facts
}

fn every_kind() -> Vec<PublishedPort> {
    use Transport::{Sctp, Tcp, Udp};
    vec![
        port(Tcp, None, 8080, "10.100.5.2"),
        port(Udp, None, 53, "10.100.5.3"),
        port(Sctp, Some("127.0.0.1"), 9, "10.100.5.2"),
        port(Tcp, None, 8080, "fd00:100:0:5::2"),
        port(Udp, Some("fd00::1"), 443, "fd00:100:0:5::2"),
    ]
}

#[test]
fn published_ports_are_read_as_written_and_nft_lists_them_so() {
    in_namespace(&["nft"], |netfilter| {
        let desired = endpoints(every_kind());
        let territory = Territory::of(desired.iter());
        assert_eq!(settle(netfilter, &territory, &desired), 1);
        assert_eq!(look(netfilter, &territory), desired);
        // The order of a map's elements is the kernel's.
        let sorted = |text: &str| {
            let mut words: Vec<String> = text.split_whitespace().map(|word| word.replace(',', "")).collect();
            words.sort();
            words
        };
        let name = table_name(&NetworkName::default_network());
        let Some(Fact::Table(table)) = desired.get(&Key::Table(name.clone())) else { panic!("no table") };
        assert_eq!(sorted(&listed(&name)), sorted(&plain(&table.to_string())));
    });
}

#[test]
fn a_port_more_is_an_element_more() {
    in_namespace(&["nft"], |netfilter| {
        let many = |first: u16, address: &str| -> Vec<_> {
            (first..first + 1000).map(|n| port(Transport::Tcp, None, n, address)).collect()
        };
        let before = endpoints(many(2000, "10.100.5.2"));
        let territory = Territory::of(before.iter());
        settle(netfilter, &territory, &before);
        let name = table_name(&NetworkName::default_network());
        let made = handle(&name);
        // One more, one elsewhere, one fewer, and a port that leads into another container.
        for after in [
            many(1999, "10.100.5.2"),
            [many(1999, "10.100.5.2"), vec![port(Transport::Udp, Some("192.0.2.1"), 53, "10.100.5.3")]]
                .concat(),
            many(2000, "10.100.5.2"),
            many(2000, "10.100.5.3"),
        ] {
            let after = endpoints(after);
            assert_eq!(settle(netfilter, &territory, &after), 1);
            assert_eq!(look(netfilter, &territory), after);
            assert_eq!(handle(&name), made, "the table was made anew");
        }
        settle(netfilter, &territory, &Facts::default());
        assert!(look(netfilter, &territory).is_empty());
    });
}
