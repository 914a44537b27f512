//! Networks with IPv6: what flanneld writes and does for both families, and that containers of the CNI plugin reach each other
//! by both.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::Ipv6Addr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, SUBNET_FILE, leases, put_config};
use flannel_tests::{
    Host, HttpServer, Lab, PingStream, Place, eventually, in_lab, largest_packet, ping_within, seen_as,
    unchanged,
};
use serde_json::Value;

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"host-gw"}}"#;
const V4_ONLY: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const V6_ONLY: &str =
    r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"vxlan"}}"#;

/// As kube-flannel ships it.
const CONF: &str = r#"{"name":"cbr0","cniVersion":"1.0.0","type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}}"#;

/// How long until a change in etcd is in the kernel of every host.
const FOLLOW: Duration = Duration::from_secs(15);

#[test]
fn vxlan_carries_both_families() {
    in_lab(Lab::new("dual-vxlan").outside().etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let mut daemons = Flanneld::start_all(lab)?;
        let nodes = nodes(lab)?;
        for node in &nodes {
            node.subnet_file(1430)?;
            let data = |key: &str, device: &str| -> Result<String> {
                let mac = node.host.read(&format!("/sys/class/net/{device}/address"))?;
                Ok(format!(r#""{key}":{{"VNI":1,"VtepMAC":"{}"}}"#, mac.trim()))
            };
            let (v4, v6) = (data("BackendData", "flannel.1")?, data("BackendV6Data", "flannel-v6.1")?);
            node.lease(lab, &format!(r#","BackendType":"vxlan",{v4},{v6}"#))?;
        }
        for (node, peer) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
            eventually(format!("{} has its IPv6 tunnel", node.host.name()), FOLLOW, || {
                node.shows_v6_tunnel(peer)
            })?;
        }
        let pods = pods(&nodes)?;
        reach_each_other(&pods)?;
        ensure!(largest_packet(&pods[0], pods[1].v4())? == 1430, "the path carries another size by IPv4");

        // What leaves the network has the node's address, in both families.
        let outside = lab.outside();
        let _servers = (HttpServer::start(outside, 8080, "v4")?, HttpServer::start_v6(outside, 8086, "v6")?);
        let seen = seen_as(&pods[0], outside.ip(), 8080)?;
        ensure!(seen == nodes[0].host.ip().to_string(), "{} is seen as {seen}", pods[0].v4());
        let seen = seen_as(&pods[0], format!("[{}]", outside.ip6()), 8086)?;
        ensure!(seen == nodes[0].host.ip6().to_string(), "{} is seen as {seen}", pods[0].v6());

        // A restart finds everything as it was.
        let held = leases(lab)?;
        let before = nodes[0].host.network_state()?;
        let stream = PingStream::start(&pods[1], pods[0].v6(), Duration::from_millis(50))?;
        daemons[0].daemon().crash()?;
        daemons[0] = Flanneld::start(lab, lab.host(1))?;
        daemons[0].ready()?;
        let seen = stream.stop_after(21)?;
        ensure!(seen.sent >= 20 && seen.lost() == 0, "{seen:?}");
        ensure!(leases(lab)? == held, "{held:?} became {:?}", leases(lab)?);
        unchanged("the kernel", &before, &nodes[0].host.network_state()?)?;
        ensure!(daemons[0].said("restored:").is_empty(), "{:#?}", daemons[0].said("restored:"));

        a_peer_without_ipv6_is_served_by_ipv4(lab, &nodes)?;
        repairs_ipv6(&nodes, &pods)?;
        for daemon in &daemons {
            ensure!(daemon.said(" ERROR ").is_empty(), "{}", daemon.daemon().tail());
        }
        Ok(())
    });
}

#[test]
fn host_gw_carries_both_families() {
    in_lab(Lab::new("dual-gw").etcd(), |lab| {
        put_config(lab, HOST_GW)?;
        Flanneld::start_all(lab)?;
        let nodes = nodes(lab)?;
        for node in &nodes {
            node.subnet_file(1500)?;
            node.lease(lab, r#","BackendType":"host-gw""#)?;
        }
        for (node, peer) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
            let route = format!("{} via {} dev eth0 proto 70 metric 1024", peer.v6_subnet(), peer.host.ip6());
            eventually(format!("{} has its IPv6 route", node.host.name()), FOLLOW, || {
                let routes = node.host.out(&["ip", "-6", "route"])?;
                ensure!(
                    routes.lines().any(|line| line.trim_end().starts_with(&route)),
                    "no {route} in {routes}"
                );
                ensure!(!node.host.out(&["ip", "-br", "link"])?.contains("flannel"), "there is a device");
                Ok(())
            })?;
        }
        reach_each_other(&pods(&nodes)?)
    });
}

#[test]
fn a_network_that_gets_ipv6_keeps_its_ipv4_subnets() {
    in_lab(Lab::new("gets-v6").etcd(), |lab| {
        put_config(lab, V4_ONLY)?;
        let daemons = Flanneld::start_all(lab)?;
        let before: Vec<_> = leases(lab)?.into_keys().collect();
        put_config(lab, VXLAN)?;
        eventually("every lease has a second half", FOLLOW, || {
            let now: Vec<_> = leases(lab)?.into_keys().collect();
            let kept = now.iter().map(|key| key.split_once('&').map_or("", |(v4, _)| v4));
            ensure!(kept.eq(before.iter().map(String::as_str)), "{before:?} became {now:?}");
            Ok(())
        })?;
        let found = eventually("every file has both", FOLLOW, || nodes(lab))?;
        reach_each_other(&pods(&found)?)?;
        let advised = |lost: &str| -> Result<()> {
            for daemon in &daemons {
                let said = daemon.said("start them again");
                ensure!(said.iter().all(|line| !lost.is_empty() && line.contains(lost)), "{said:#?}");
            }
            Ok(())
        };
        advised("")?;
        // And back.
        put_config(lab, V4_ONLY)?;
        eventually("every lease is as before", FOLLOW, || {
            let now: Vec<_> = leases(lab)?.into_keys().collect();
            ensure!(now == before, "{before:?} became {now:?}");
            Ok(())
        })?;
        for host in lab.hosts() {
            eventually("nothing of IPv6 is left", FOLLOW, || {
                ensure!(!host.exists("/sys/class/net/flannel-v6.1"), "flannel-v6.1 is there");
                ensure!(!host.read(SUBNET_FILE)?.contains("IPV6"), "{}", host.read(SUBNET_FILE)?);
                Ok(())
            })?;
        }
        advised("still have addresses of fd42:")?;
        // Without IPv4 it is the other half that stays.
        put_config(lab, VXLAN)?;
        let v6 = |leases: BTreeMap<String, String>| -> BTreeSet<String> {
            leases.keys().map(|key| key.split_once('&').map_or("", |(_, v6)| v6).to_owned()).collect()
        };
        let both = eventually("every lease has two halves again", FOLLOW, || {
            let both = v6(leases(lab)?);
            ensure!(both.len() == before.len() && !both.contains(""), "{both:?}");
            Ok(both)
        })?;
        put_config(lab, V6_ONLY)?;
        eventually("every lease is of IPv6 alone", FOLLOW, || {
            let now = leases(lab)?;
            ensure!(
                now.keys().all(|key| key.starts_with("0.0.0.0-0&")) && v6(now.clone()) == both,
                "{both:?} became {now:?}"
            );
            Ok(())
        })?;
        for daemon in &daemons {
            ensure!(daemon.said("E138").is_empty(), "{:?}", daemon.said("E138"));
        }
        ensure!(daemons.iter().all(|daemon| daemon.daemon().alive()));
        Ok(())
    });
}

#[test]
fn ipv6_alone_is_a_network_too() {
    in_lab(Lab::new("v6-only").etcd(), |lab| {
        put_config(lab, V6_ONLY)?;
        let daemons: Vec<_> =
            lab.hosts().iter().map(|host| Flanneld::start(lab, host)).collect::<Result<_>>()?;
        let nodes = eventually("both files", FOLLOW, || nodes(lab))
            .with_context(|| daemons.iter().map(|daemon| daemon.daemon().tail()).collect::<String>())?;
        for node in &nodes {
            let subnet = node.value("FLANNEL_IPV6_SUBNET")?;
            let text = format!(
                "FLANNEL_IPV6_NETWORK=fd42:cafe::/48\nFLANNEL_IPV6_SUBNET={subnet}\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
            );
            unchanged(SUBNET_FILE, &text, &node.env)?;
            let key = format!("0.0.0.0-0&{}", node.v6_subnet().replace('/', "-"));
            let value =
                leases(lab)?.remove(&key).with_context(|| format!("no {key} in {:?}", leases(lab)))?;
            let start = format!(r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{}","#, node.host.ip6());
            ensure!(value.starts_with(&start) && !value.contains("BackendData"), "{value}");
        }
        let pods = pods(&nodes)?;
        for (from, to) in [(0, 1), (1, 0)] {
            ping_within(FOLLOW, &pods[from], pods[to].v6())?;
        }
        Ok(())
    });
}

#[test]
fn a_host_without_ipv6_says_so_and_follows_when_it_has_some() {
    in_lab(Lab::new("late-v6").hosts(1).ip_forward(false).etcd(), |lab| {
        let host = lab.host(1);
        put_config(lab, VXLAN)?;
        host.out(&["ip", "-6", "addr", "flush", "dev", "eth0", "scope", "global"])?;
        let daemon = Flanneld::start(lab, host)?;
        eventually("it is said what is missing", FOLLOW, || {
            let said = daemon.said("interface eth0 has no IPv6 address that peers could use");
            ensure!(said.len() == 1, "{}", daemon.daemon().tail());
            Ok(())
        })?;
        ensure!(leases(lab)?.is_empty(), "{:?}", leases(lab)?);
        // The host follows router advertisements; forwarding must not cost it that.
        host.sh("echo 1 > /proc/sys/net/ipv6/conf/eth0/accept_ra")?;
        host.out(&["ip", "addr", "add", "fd77::b/64", "dev", "eth0", "nodad"])?;
        daemon.ready()?;
        eventually("eth0 goes on with router advertisements", FOLLOW, || {
            let value = host.out(&["cat", "/proc/sys/net/ipv6/conf/eth0/accept_ra"])?;
            ensure!(value == "2", "accept_ra is {value}");
            Ok(())
        })?;
        // Without its IPv6 address again: IPv4 goes on, and the lease stays.
        let held = leases(lab)?;
        host.out(&["ip", "-6", "addr", "flush", "dev", "eth0", "scope", "global"])?;
        eventually("it is said again", FOLLOW, || {
            daemon.said("interface eth0 has no IPv6 address that peers could use").len() == 2
        })?;
        host.out(&["ip", "link", "delete", "flannel.1"])?;
        eventually("flannel.1 is back", FOLLOW, || host.exists("/sys/class/net/flannel.1"))?;
        ensure!(leases(lab)? == held, "{held:?} became {:?}", leases(lab)?);
        Ok(())
    });
}

/// Go's flanneld crashes on a peer that lacks a family; here the other family is served.
fn a_peer_without_ipv6_is_served_by_ipv4(lab: &Lab, nodes: &[Node<'_>]) -> Result<()> {
    let value = r#"{"PublicIP":"10.77.0.200","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:c8"}}"#;
    lab.etcdctl(&["put", &format!("{PREFIX}/subnets/10.100.200.0-24"), value])?;
    // One that claims IPv6 and does not say where it is.
    let value = value.replace(".200", ".201").replace(":c8", ":c9");
    lab.etcdctl(&["put", &format!("{PREFIX}/subnets/10.100.201.0-24&fd42:cafe:0:c9::-64"), &value])?;
    for node in nodes {
        eventually("the peers without IPv6 have IPv4 routes", FOLLOW, || {
            let routes = node.host.sh("ip -4 route; ip -6 route")?;
            for third in [200, 201] {
                let route = format!("10.100.{third}.0/24 via 10.100.{third}.0 dev flannel.1 onlink");
                ensure!(routes.contains(&route), "no {route} in {routes}");
            }
            ensure!(!routes.contains("fd42:cafe:0:c9::"), "{routes}");
            Ok(())
        })?;
    }
    lab.etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/10.100.20")]).map(drop)
}

/// What somebody takes away of IPv6 is put back.
fn repairs_ipv6(nodes: &[Node<'_>], pods: &[Pod<'_>]) -> Result<()> {
    let host = nodes[0].host;
    host.sh("ip link delete flannel-v6.1; ip -6 route flush dev eth0 proto 70; nft delete table ip nat; nft delete table ip6 nat; true")?;
    ping_within(FOLLOW, &pods[0], pods[1].v6())?;
    eventually("the tunnel is as before", FOLLOW, || nodes[0].shows_v6_tunnel(&nodes[1]))
}

/// A host and what it leased.
struct Node<'a> {
    host: &'a Host,
    env: String,
}

/// Every host whose file is complete for the networks it names.
fn nodes(lab: &Lab) -> Result<Vec<Node<'_>>> {
    let node = |host| -> Result<Node<'_>> {
        let node = Node { host, env: Host::read(host, SUBNET_FILE)? };
        node.value("FLANNEL_IPV6_SUBNET")?;
        Ok(node)
    };
    lab.hosts().iter().map(node).collect()
}

impl Node<'_> {
    fn value(&self, key: &str) -> Result<&str> {
        let found = self.env.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        found.with_context(|| format!("no {key} in\n{}", self.env))
    }

    /// The base address of the IPv6 subnet.
    fn v6_base(&self) -> Ipv6Addr {
        let value = self.value("FLANNEL_IPV6_SUBNET").unwrap_or_default();
        let gateway: Ipv6Addr = value.split('/').next().unwrap_or_default().parse().expect("an address");
        Ipv6Addr::from_bits(gateway.to_bits() - 1)
    }

    fn v6_subnet(&self) -> String {
        format!("{}/64", self.v6_base())
    }

    /// Byte for byte; the subnets are inside the networks, and not their first ones.
    fn subnet_file(&self, mtu: u32) -> Result<()> {
        let (v4, v6) = (self.value("FLANNEL_SUBNET")?, self.value("FLANNEL_IPV6_SUBNET")?);
        let text = format!(
            "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET={v4}\nFLANNEL_IPV6_NETWORK=fd42:cafe::/48\n\
             FLANNEL_IPV6_SUBNET={v6}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n"
        );
        unchanged(SUBNET_FILE, &text, &self.env)?;
        ensure!(v4.starts_with("10.100.") && v4.ends_with(".1/24"), "{v4}");
        let parts = self.v6_base().segments();
        ensure!(parts[..3] == [0xfd42, 0xcafe, 0] && parts[3] >= 1 && parts[4..] == [0; 4], "{v6}");
        ensure!(v6 == format!("{}1/64", self.v6_base()), "{v6}");
        Ok(())
    }

    /// Key and value byte for byte.
    fn lease(&self, lab: &Lab, backend: &str) -> Result<()> {
        let v4 = self.value("FLANNEL_SUBNET")?.replace(".1/24", ".0-24");
        let key = format!("{v4}&{}-64", self.v6_base());
        let (ip, ip6) = (self.host.ip(), self.host.ip6());
        let value = format!(r#"{{"PublicIP":"{ip}","PublicIPv6":"{ip6}"{backend}}}"#);
        eventually(format!("the lease of {}", self.host.name()), FOLLOW, || {
            let leases = leases(lab)?;
            ensure!(leases.get(&key) == Some(&value), "expected {key} = {value}, found {leases:#?}");
            Ok(())
        })
    }

    /// Device, neighbour, forwarding entry and route as Go's flanneld makes them.
    fn shows_v6_tunnel(&self, peer: &Node<'_>) -> Result<()> {
        let (own, base) = (self.host.ip6(), peer.v6_base());
        let mac = peer.host.read("/sys/class/net/flannel-v6.1/address")?;
        let mac = mac.trim();
        for (script, expected) in [
            (
                "ip -d link show flannel-v6.1",
                format!("vxlan id 1 local {own} dev eth0 srcport 0 0 dstport 8472 nolearning"),
            ),
            ("ip -d link show flannel-v6.1", " mtu 1430 ".to_owned()),
            ("ip -6 -o addr show dev flannel-v6.1", format!("inet6 {}/128 scope global", self.v6_base())),
            ("ip -6 neigh show dev flannel-v6.1", format!("{base} lladdr {mac} PERMANENT")),
            ("bridge fdb show dev flannel-v6.1", format!("{mac} dst {} self permanent", peer.host.ip6())),
            ("ip -6 route", format!("{base}/64 via {base} dev flannel-v6.1 metric 1024 onlink")),
        ] {
            let said = self.host.sh(script)?;
            ensure!(said.contains(&expected), "{}: {script}: no {expected:?} in\n{said}", self.host.name());
        }
        Ok(())
    }
}

/// A container of the CNI plugin.
struct Pod<'a> {
    host: &'a Host,
    name: &'static str,
    addresses: Vec<String>,
}

fn pods<'a>(nodes: &[Node<'a>]) -> Result<Vec<Pod<'a>>> {
    nodes.iter().map(|node| Pod::add(node, "one")).collect()
}

fn reach_each_other(pods: &[Pod<'_>]) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        ping_within(FOLLOW, &pods[from], pods[to].v4())?;
        ping_within(FOLLOW, &pods[from], pods[to].v6())?;
    }
    Ok(())
}

impl<'a> Pod<'a> {
    fn add(node: &Node<'a>, name: &'static str) -> Result<Self> {
        let host = node.host;
        host.sh(&format!("ip netns add {name}; ip -n {name} link set lo up"))?;
        host.write("/run/conf", CONF)?;
        let netns = format!("CNI_NETNS=/run/netns/{name}");
        let id = format!("CNI_CONTAINERID={name}");
        #[rustfmt::skip]
        let argv = ["env", "CNI_COMMAND=ADD", &id, &netns, "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin", "flannel"];
        let said = host.run_input(&argv, File::open(host.path("/run/conf"))?)?.text()?;
        let result: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        let ips = result["ips"].as_array().context("no ips")?;
        let address = |ip: &Value| ip["address"].as_str()?.split('/').next().map(str::to_owned);
        let addresses: Vec<_> = ips.iter().filter_map(address).collect();
        for ip in ips {
            let (address, gateway) = (ip["address"].to_string(), ip["gateway"].to_string());
            let key = if address.contains(':') { "FLANNEL_IPV6_SUBNET" } else { "FLANNEL_SUBNET" };
            let own = node.value(key)?.split('/').next().unwrap_or_default().to_owned();
            ensure!(gateway.trim_matches('"') == own, "{said}");
        }
        Ok(Self { host, name, addresses })
    }

    fn v4(&self) -> &str {
        self.addresses.iter().find(|address| address.contains('.')).map_or("no IPv4 address", String::as_str)
    }

    fn v6(&self) -> &str {
        self.addresses.iter().find(|address| address.contains(':')).map_or("no IPv6 address", String::as_str)
    }
}

impl Place for Pod<'_> {
    fn name(&self) -> String {
        format!("{} on {}", self.name, self.host.name())
    }

    fn host(&self) -> &Host {
        self.host
    }

    fn enter(&self, argv: &[&str]) -> Command {
        self.host.enter_netns(self.name, argv)
    }
}
