//! The table of CNI's ports: written element by element, and mended from records.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel_core::act::hostports::{HostPortError, Records, missing, publish, sweep, withdraw};
use flannel_core::decide::hostports::{emptied, plan, table_name};
use flannel_core::touch::world::kernel::nftables::Netfilter;
use flannel_core::words::exposure::{PublishedPort, Transport};
use flannel_core::words::hostport::{CallerMasquerade, Holding};
use flannel_core::words::name::Attachment;
use flannel_core::words::rule::TableName;

use super::{handle, in_namespace, listed, plain, run, sh};

/// Records in memory.
#[derive(Default)]
struct Shelf {
    holdings: BTreeMap<String, Holding>,
    dead: Vec<String>,
}

impl Records for Shelf {
    fn find(&mut self, tag: &str) -> Option<Holding> {
        self.holdings.get(tag).cloned()
    }
    fn is_alive(&mut self, holding: &Holding) -> bool {
        !self.dead.contains(&holding.tag())
    }
    fn all(&mut self) -> Vec<Holding> {
        self.holdings.values().cloned().collect()
    }
    fn remove(&mut self, holding: &Holding) {
        self.holdings.remove(&holding.tag());
    }
}

impl Shelf {
    fn add(&mut self, filter: &mut Netfilter, holding: &Holding) -> Result<(), HostPortError> {
        publish(filter, self, holding)?;
        self.holdings.insert(holding.tag(), holding.clone());
        Ok(())
    }
}

fn holding(container: &str, address: &str, ports: &[&str]) -> Holding {
    let address: flannel_core::words::addr::InterfaceAddress = address.parse().unwrap();
    let port = |text: &&str| {
        let (ip, port) = text.split_once('/').unwrap_or(("", text));
        PublishedPort {
            protocol: Transport::Tcp,
            host_ip: ip.parse::<IpAddr>().ok(),
            host_port: port.parse().unwrap(),
            address: address.address(),
            port: 80,
        }
    };
    Holding {
        network: "cbr0".to_owned(),
        owner: Attachment { container: container.to_owned(), interface: "eth0".to_owned() },
        ports: ports.iter().map(port).collect(),
        addresses: vec![address],
        masquerade: CallerMasquerade::Needed,
    }
}

fn elements() -> usize {
    listed(&table_name()).matches("comment").count()
}

#[test]
fn ports_are_read_as_written_and_listed_as_said() {
    in_namespace(&["nft"], |filter| {
        let mut always = holding("c3", "10.245.0.9/24", &["192.0.2.1/9003"]);
        always.masquerade = CallerMasquerade::Always;
        // One element in a map: nft lists several in the kernel's order.
        let holdings = [
            holding("c1", "10.244.1.5/24", &["8080"]),
            holding("c2", "fd00:1::5/64", &["8080", "fd00::1/8081"]),
            always,
        ];
        let table = plan(&holdings);
        filter.put(&table).unwrap();
        assert_eq!(filter.table(&table_name()).unwrap().unwrap(), table);
        assert_eq!(listed(&table_name()), plain(&table.to_string()));
        run(&["nft", "-c", "-f", "-"], &table.to_string());
        for holding in &holdings {
            assert_eq!(missing(filter, holding).unwrap(), [""; 0]);
            withdraw(filter, holding).unwrap();
        }
        assert_eq!(filter.table(&table_name()).unwrap().unwrap(), emptied(&table));
    });
}

#[test]
fn each_attachment_writes_its_own_elements_only() {
    in_namespace(&["nft"], |filter| {
        let mut shelf = Shelf::default();
        let first = holding("c1", "10.244.1.5/24", &["8080"]);
        shelf.add(filter, &first).unwrap();
        let made = handle(&table_name());
        for n in 0..100 {
            let port = (9000 + n).to_string();
            shelf
                .add(filter, &holding(&format!("d{n}"), &format!("10.244.1.{}/24", n + 10), &[&port]))
                .unwrap();
        }
        assert_eq!((elements(), handle(&table_name())), (101, made), "the table was not made anew");
        // Another subnet has rules of its own; everything else comes along.
        shelf.add(filter, &holding("e1", "10.245.1.5/24", &["8090"])).unwrap();
        assert_eq!(elements(), 102);
        assert_eq!(missing(filter, &first).unwrap(), [""; 0]);
        // Somebody flushed it all: the next one brings everything back.
        sh("nft flush ruleset");
        assert!(missing(filter, &first).unwrap().len() > 3);
        shelf.add(filter, &holding("f1", "10.244.1.6/24", &["8099"])).unwrap();
        assert_eq!((elements(), missing(filter, &first).unwrap()), (103, Vec::new()));
        sh("nft flush chain inet flannel_cni_ports postrouting");
        assert_eq!(missing(filter, &first).unwrap().len(), 3);
        // Twice is once.
        withdraw(filter, &first).unwrap();
        withdraw(filter, &first).unwrap();
        assert_eq!(elements(), 102);
    });
}

#[test]
fn a_port_has_one_holder() {
    in_namespace(&["nft"], |filter| {
        let mut shelf = Shelf::default();
        shelf.add(filter, &holding("c1", "10.244.1.5/24", &["8080", "192.0.2.1/8081"])).unwrap();
        for (asked, is_free) in [
            ("8080", false),
            ("192.0.2.1/8080", false),
            ("8081", false),
            ("192.0.2.1/8081", false),
            ("192.0.2.2/8081", true),
            ("8082", true),
        ] {
            let other = holding("c2", "10.244.1.6/24", &["9999", asked]);
            let before = elements();
            match publish(filter, &mut shelf, &other) {
                Ok(()) => {
                    assert!(is_free, "{asked}");
                    withdraw(filter, &other).unwrap();
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(
                        !is_free && text.contains("container c1 (eth0) on network cbr0"),
                        "{asked}: {text}"
                    );
                }
            }
            assert_eq!(elements(), before, "{asked}");
        }
        // Whoever is dead holds nothing, whether it left a record or not.
        shelf.dead.push("cbr0 c1 eth0".to_owned());
        shelf.add(filter, &holding("c2", "10.244.1.6/24", &["8081"])).unwrap();
        assert_eq!((shelf.holdings.len(), elements()), (1, 1));
        shelf.holdings.clear();
        shelf.add(filter, &holding("c3", "10.244.1.6/24", &["8081", "192.0.2.1/8082"])).unwrap();
        assert_eq!(elements(), 2);
        // Nor does whoever another network's runtime does not know.
        shelf.holdings.clear();
        sweep(filter, &mut shelf, "cbr").unwrap();
        assert_eq!(elements(), 2);
        sweep(filter, &mut shelf, "cbr0").unwrap();
        assert_eq!(elements(), 0);
    });
}

#[test]
fn an_engines_ports_are_seen() {
    in_namespace(&["nft"], |filter| {
        sh("nft add table inet flannel_endpoints-web
            nft add map inet flannel_endpoints-web published '{ type inet_proto . inet_service : ipv4_addr . inet_service; }'
            nft add element inet flannel_endpoints-web published '{ tcp . 8080 : 10.100.5.2 . 80 }'");
        for asked in ["8080", "192.0.2.1/8080"] {
            let asked = holding("c1", "10.244.1.5/24", &[asked]);
            let error = publish(filter, &mut Shelf::default(), &asked).unwrap_err().to_string();
            assert!(error.contains("10.100.5.2 of a Docker network"), "{error}");
        }
        publish(filter, &mut Shelf::default(), &holding("c1", "10.244.1.5/24", &["8081"])).unwrap();
        let name = TableName { name: "flannel_endpoints-web".to_owned(), ..table_name() };
        assert!(listed(&name).contains("10.100.5.2"));
    });
}
