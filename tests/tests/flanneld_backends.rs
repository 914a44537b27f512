//! flanneld with each backend on real hosts: what it writes to etcd, to subnet.env and to the kernel, and that packets pass.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, Pod, SUBNET_FILE, SubnetEnv, leases, put_config, time_to_live};
use flannel_tests::{
    Host, Lab, PingStream, eventually, in_lab, largest_packet, needs, ping_within, secs, unchanged,
};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const VNI_7: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;
/// As operators type it.
const DIRECT: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"VxLAN","Directrouting":true}}"#;
const IPIP: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"ipip"}}"#;
const ALLOC: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"alloc"}}"#;

/// How long until a change in etcd is in the kernel of every host.
const FOLLOW: Duration = Duration::from_secs(5);

#[test]
fn vxlan_is_as_flannel_has_it() {
    in_lab(Lab::new("vxlan").etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let daemons = Flanneld::start_all(lab)?;
        let nodes = nodes(lab)?;
        for node in &nodes {
            node.subnet_file(1450)?;
            let mac = node.mac("flannel.1")?;
            let data = format!(r#","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}"#);
            node.lease(lab, r#","BackendType":"vxlan""#, &data)?;
            let (left, granted) = time_to_live(lab, &node.env.key())?.context("the key has no lease")?;
            ensure!(granted == 86_400 && (86_300..=86_400).contains(&left), "{left} of {granted} seconds");
        }
        ensure!(leases(lab)?.len() == 2, "{:?}", leases(lab)?);
        shows_vxlan(&nodes, "flannel.1", 1)?;
        carries(&nodes, |_, _| 1450)?;
        for daemon in &daemons {
            ensure!(daemon.said(" ERROR ").is_empty(), "{}", daemon.daemon().tail());
        }
        Ok(())
    });
}

#[test]
fn host_gw_is_as_flannel_has_it() {
    in_lab(Lab::new("host-gw").etcd(), |lab| {
        put_config(lab, HOST_GW)?;
        Flanneld::start_all(lab)?;
        let nodes = nodes(lab)?;
        for node in &nodes {
            node.subnet_file(1500)?;
            node.lease(lab, r#","BackendType":"host-gw""#, "")?;
        }
        shows_host_gw(&nodes)?;
        carries(&nodes, |_, _| 1500)
    });
}

#[test]
fn alloc_is_a_lease_and_nothing_else() {
    in_lab(Lab::new("alloc").hosts(1).etcd(), |lab| {
        put_config(lab, ALLOC)?;
        let before = lab.host(1).network_state()?;
        let daemon = Flanneld::start_with(lab, lab.host(1), &["--iptables-forward-rules=false"])?;
        let env = daemon.ready()?;
        let expected = format!(
            "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET={}\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=false\n",
            env.gateway()
        );
        ensure!(env.text == expected, "{}", env.text);
        let held: BTreeMap<_, _> =
            [(env.key(), r#"{"PublicIP":"10.77.0.11","PublicIPv6":null}"#.to_owned())].into();
        ensure!(leases(lab)? == held, "{:?}", leases(lab)?);
        unchanged("the kernel", &before, &lab.host(1).network_state()?)
    });
}

#[test]
fn a_kernel_without_ipip_is_named_and_asked_again() {
    in_lab(Lab::new("no-ipip").hosts(1).etcd(), |lab| {
        let host = lab.host(1);
        if host.run(&["ip", "link", "add", "flannel.ipip", "type", "ipip", "local", "10.77.0.11"])?.ok() {
            needs::skipped("a kernel without ipip");
            return Ok(());
        }
        put_config(lab, IPIP)?;
        let daemon = Flanneld::start(lab, host)?;
        let hint = "this kernel has no ipip devices; load the module: modprobe ipip (it comes with kernels built with CONFIG_NET_IPIP)";
        eventually("what is missing is said", FOLLOW, || ensure_said(&daemon, hint))?;
        let value = r#"{"PublicIP":"10.77.0.11","PublicIPv6":null,"BackendType":"ipip"}"#;
        ensure!(leases(lab)?.values().eq([value]), "{:?}", leases(lab)?);
        let passes = || -> Result<u64> {
            let (_, text) = daemon.health("/metrics")?;
            let retries = text.lines().filter(|line| {
                line.starts_with("flannel_passes_total{") && line.contains("reason=\"retry\"")
            });
            Ok(retries.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
        };
        let before = passes()?;
        eventually("it is tried again", FOLLOW, || {
            let now = passes()?;
            ensure!(now > before + 1, "{now} tries");
            Ok(())
        })?;
        ensure!(daemon.said(hint).len() == 1, "{:#?}", daemon.said(hint));
        let (status, said) = daemon.health("/readyz")?;
        ensure!(status == 503, "{status} {said}");
        // And it is still there for what the kernel has.
        put_config(lab, HOST_GW)?;
        daemon.ready().map(|_| ())
    });
}

fn ensure_said(daemon: &Flanneld, text: &str) -> Result<()> {
    ensure!(!daemon.said(text).is_empty(), "{}", daemon.daemon().tail());
    Ok(())
}

#[test]
fn direct_routing_tunnels_only_to_those_behind_the_router() {
    in_lab(Lab::new("direct").hosts(3).behind_router(&[3]).etcd(), |lab| {
        put_config(lab, DIRECT)?;
        Flanneld::start_all(lab)?;
        let nodes = nodes(lab)?;
        for node in &nodes {
            node.subnet_file(1450)?;
            let mac = node.mac("flannel.1")?;
            let data = format!(r#","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}"#);
            node.lease(lab, r#","BackendType":"vxlan""#, &data)?;
        }
        shows_direct(&nodes)?;
        // The first two are on one link: nothing is wrapped between them.
        carries(&nodes, |from, to| if from == 2 || to == 2 { 1450 } else { 1500 })
    });
}

#[test]
fn a_change_of_the_config_needs_no_restart() {
    in_lab(Lab::new("switch").hosts(3).behind_router(&[3]).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let daemons = Flanneld::start_all(lab)?;
        let before = nodes(lab)?;
        shows_vxlan(&before, "flannel.1", 1)?;
        let pods = before.iter().map(|node| Pod::new(node.host, &node.env, 2)).collect::<Result<Vec<_>>>()?;
        let reach = |last: usize| -> Result<()> {
            for from in &pods[..last] {
                for to in &pods[..last] {
                    ping_within(FOLLOW, from, to.ip())?;
                }
            }
            Ok(())
        };
        reach(3)?;

        put_config(lab, HOST_GW)?;
        let near = &before[..2];
        eventually("subnet.env says 1500", FOLLOW, || expect_mtu(&before, 1500))?;
        for node in near {
            eventually("flannel.1 is gone", FOLLOW, || node.no_device())?;
            node.lease(lab, r#","BackendType":"host-gw""#, "")?;
        }
        for (node, peer) in [(&near[0], &near[1]), (&near[1], &near[0])] {
            eventually(format!("{} routes to its neighbour", node.host.name()), FOLLOW, || {
                node.routes([direct_route(peer)])
            })?;
        }
        reach(2)?;
        // The third one cannot be reached without a gateway, and that is said once.
        let said = || daemons[0].said("WARN E120");
        eventually("the unreachable peer is named", FOLLOW, || {
            said().iter().any(|line| line.contains(&before[2].env.subnet()))
        })?;

        put_config(lab, DIRECT)?;
        eventually("subnet.env says 1450", FOLLOW, || expect_mtu(&before, 1450))?;
        shows_direct(&before)?;
        reach(3)?;
        ensure!(said().len() == 1, "{:?}", said());

        put_config(lab, VNI_7)?;
        for (i, node) in before.iter().enumerate() {
            let peers = others(&before, i);
            eventually("flannel.7 instead of flannel.1", FOLLOW, || {
                node.shows_device("flannel.7", 7)?;
                ensure!(!node.host.exists("/sys/class/net/flannel.1"), "flannel.1 is still there");
                node.shows_entries("flannel.7", &peers)
            })?;
        }
        reach(3)?;

        put_config(lab, VXLAN)?;
        for node in &before {
            eventually("flannel.1 instead of flannel.7", FOLLOW, || {
                node.shows_device("flannel.1", 1)?;
                ensure!(!node.host.exists("/sys/class/net/flannel.7"), "flannel.7 is still there");
                Ok(())
            })?;
        }
        reach(3)?;
        for (before, after) in before.iter().zip(nodes(lab)?) {
            ensure!(before.env == after.env, "{:?} became {:?}", before.env, after.env);
        }
        Ok(())
    });
}

#[test]
fn a_killed_flanneld_costs_no_packet() {
    in_lab(Lab::new("kill").etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let mut daemons = Flanneld::start_all(lab)?;
        let nodes = nodes(lab)?;
        shows_vxlan(&nodes, "flannel.1", 1)?;
        let macs = nodes.iter().map(|node| node.mac("flannel.1")).collect::<Result<Vec<_>>>()?;
        let held = leases(lab)?;
        let pods = nodes.iter().map(|node| Pod::new(node.host, &node.env, 2)).collect::<Result<Vec<_>>>()?;
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        let states = lab.hosts().iter().map(Host::network_state).collect::<Result<Vec<_>>>()?;

        let every = Duration::from_millis(50);
        let there = PingStream::start(&pods[0], pods[1].ip(), every)?;
        let back = PingStream::start(&pods[1], pods[0].ip(), every)?;
        for (i, host) in lab.hosts().iter().enumerate() {
            daemons[i].daemon().crash()?;
            thread::sleep(Duration::from_millis(300)); // traffic without anybody who looks after it
            daemons[i] = Flanneld::start(lab, host)?;
            daemons[i].ready()?;
            ensure!(nodes[i].mac("flannel.1")? == macs[i], "another MAC address on {}", host.name());
        }
        // And once more the polite way.
        daemons[0].daemon().stop(secs(5))?;
        daemons[0] = Flanneld::start(lab, lab.host(1))?;
        daemons[0].ready()?;
        thread::sleep(Duration::from_millis(500)); // what a restart breaks may break when it is over
        for (way, seen) in [("there", there.stop_after(21)?), ("back", back.stop_after(21)?)] {
            ensure!(seen.sent >= 20 && seen.lost() == 0, "{way}: {seen:?}");
        }
        ensure!(leases(lab)? == held, "{held:?} became {:?}", leases(lab)?);
        for (node, (host, before)) in nodes.iter().zip(lab.hosts().iter().zip(&states)) {
            ensure!(SubnetEnv::read(host)? == node.env);
            unchanged(host.name(), before, &host.network_state()?)?;
        }
        for daemon in &daemons {
            // The guard of the tunnel goes with who ends in order, and comes back.
            let is_guard = |line: &String| line.contains(" tunnel_guard ") || line.contains(" tunnel_host ");
            let changed: Vec<_> = ["added:", "removed:", "replaced:", "restored:", "corrected:"]
                .iter()
                .flat_map(|verb| daemon.said(verb))
                .filter(|line| !is_guard(line))
                .collect();
            ensure!(changed.is_empty(), "a restart changed what it found: {changed:#?}");
        }
        Ok(())
    });
}

/// A host and what it leased.
struct Node<'a> {
    host: &'a Host,
    env: SubnetEnv,
}

fn nodes(lab: &Lab) -> Result<Vec<Node<'_>>> {
    lab.hosts().iter().map(|host| Ok(Node { host, env: SubnetEnv::read(host)? })).collect()
}

fn others<'n, 'a>(nodes: &'n [Node<'a>], i: usize) -> Vec<&'n Node<'a>> {
    nodes.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, node)| node).collect()
}

impl Node<'_> {
    fn subnet_file(&self, mtu: u32) -> Result<()> {
        let gateway = self.env.gateway();
        let expected = format!(
            "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET={gateway}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n"
        );
        unchanged(SUBNET_FILE, &expected, &self.env.text)?;
        let mode = self.host.out(&["stat", "-c", "%a", SUBNET_FILE])?;
        ensure!(mode == "644", "{SUBNET_FILE} has mode {mode}");
        let third = self.env.base().octets()[2];
        ensure!(self.env.base().octets()[..2] == [10, 100] && third >= 1 && self.env.len == 24, "{gateway}");
        Ok(())
    }

    /// Key and value byte for byte.
    fn lease(&self, lab: &Lab, backend: &str, data: &str) -> Result<()> {
        let expected = format!(r#"{{"PublicIP":"{}","PublicIPv6":null{backend}{data}}}"#, self.host.ip());
        let key = self.env.key();
        eventually(format!("the lease of {}", self.host.name()), FOLLOW, || {
            let leases = leases(lab)?;
            ensure!(leases.get(&key) == Some(&expected), "expected {key} = {expected}, found {leases:#?}");
            Ok(())
        })
    }

    fn mac(&self, link: &str) -> Result<String> {
        Ok(self.host.read(&format!("/sys/class/net/{link}/address"))?.trim().to_owned())
    }

    fn sorted(&self, script: &str) -> Result<BTreeSet<String>> {
        let said = self.host.sh(script)?;
        Ok(said.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
    }

    /// All IPv4 routes but those of pods, to the letter.
    fn routes(&self, expected: impl IntoIterator<Item = String>) -> Result<()> {
        let [a, b, c, _] = self.host.ip().octets();
        let mut all = BTreeSet::from([
            format!("default via {a}.{b}.{c}.1 dev eth0"),
            format!("{a}.{b}.{c}.0/24 dev eth0 proto kernel scope link src {}", self.host.ip()),
        ]);
        all.extend(expected);
        let found = self.sorted("ip -4 route | grep -v ' dev docker0 '")?;
        ensure!(found == all, "routes of {}\nexpected {all:#?}\nfound {found:#?}", self.host.name());
        Ok(())
    }

    fn no_device(&self) -> Result<()> {
        let links = self.host.out(&["ip", "-br", "link"])?;
        ensure!(!links.contains("flannel"), "{links}");
        Ok(())
    }

    /// The device as flannel makes it, its address and nothing more on it.
    fn shows_device(&self, device: &str, vni: u32) -> Result<()> {
        let link = self.host.out(&["ip", "-d", "link", "show", device])?;
        let local = self.host.ip();
        for part in [
            " mtu 1450 ".to_owned(),
            ",UP,LOWER_UP> ".to_owned(),
            format!(
                "vxlan id {vni} local {local} dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 \
                 udpcsum noudp6zerocsumtx noudp6zerocsumrx "
            ),
        ] {
            ensure!(link.contains(&part), "no {part:?} in\n{link}");
        }
        let addresses =
            self.sorted(&format!("ip -4 -o addr show dev {device} | sed 's/^[0-9]*: //; s/\\\\.*//'"))?;
        let expected = format!("{device}    inet {}/32 scope global {device}", self.env.base());
        ensure!(addresses == BTreeSet::from([expected.clone()]), "expected {expected}, found {addresses:?}");
        // /proc/sys/net shows the namespace of whoever reads it.
        let accept_ra = self.host.out(&["cat", &format!("/proc/sys/net/ipv6/conf/{device}/accept_ra")])?;
        ensure!(accept_ra.trim() == "0", "accept_ra is {accept_ra}");
        Ok(())
    }

    /// One neighbour and one forwarding entry for each of these peers, and no other.
    fn shows_entries(&self, device: &str, peers: &[&Node<'_>]) -> Result<()> {
        let (mut neighbours, mut forwards) = (BTreeSet::new(), BTreeSet::new());
        for peer in peers {
            let mac = peer.mac(device)?;
            neighbours.insert(format!("{} lladdr {mac} PERMANENT", peer.env.base()));
            forwards.insert(format!("{mac} dst {} self permanent", peer.host.ip()));
        }
        let found = self.sorted(&format!("ip -4 neigh show dev {device}"))?;
        ensure!(found == neighbours, "neighbours: expected {neighbours:#?}\nfound {found:#?}");
        let found = self.sorted(&format!("bridge fdb show dev {device}"))?;
        ensure!(found == forwards, "forwarding entries: expected {forwards:#?}\nfound {found:#?}");
        Ok(())
    }

    fn tunnel_route(&self, device: &str) -> String {
        format!("{} via {} dev {device} onlink", self.env.subnet(), self.env.base())
    }
}

fn shows_vxlan(nodes: &[Node<'_>], device: &str, vni: u32) -> Result<()> {
    for (i, node) in nodes.iter().enumerate() {
        let peers = others(nodes, i);
        eventually(format!("{} has its tunnels", node.host.name()), FOLLOW, || {
            node.shows_device(device, vni)?;
            node.shows_entries(device, &peers)?;
            node.routes(peers.iter().map(|peer| peer.tunnel_route(device)))
        })?;
    }
    Ok(())
}

fn shows_host_gw(nodes: &[Node<'_>]) -> Result<()> {
    for (i, node) in nodes.iter().enumerate() {
        eventually(format!("{} has its routes", node.host.name()), FOLLOW, || {
            node.no_device()?;
            node.routes(others(nodes, i).iter().map(|peer| direct_route(peer)))
        })?;
    }
    Ok(())
}

fn direct_route(peer: &Node<'_>) -> String {
    format!("{} via {} dev eth0 proto 70", peer.env.subnet(), peer.host.ip())
}

/// Hosts 1 and 2 on one link, 3 behind the router.
fn shows_direct(nodes: &[Node<'_>]) -> Result<()> {
    let [first, second, third] = nodes else { anyhow::bail!("three hosts are needed") };
    for (node, near, far) in [
        (first, Some(second), vec![third]),
        (second, Some(first), vec![third]),
        (third, None, vec![first, second]),
    ] {
        eventually(format!("{} has tunnels and routes", node.host.name()), FOLLOW, || {
            node.shows_device("flannel.1", 1)?;
            node.shows_entries("flannel.1", &far)?;
            let tunnels = far.iter().map(|peer| peer.tunnel_route("flannel.1"));
            node.routes(near.map(direct_route).into_iter().chain(tunnels))
        })?;
    }
    Ok(())
}

fn expect_mtu(nodes: &[Node<'_>], mtu: u32) -> Result<()> {
    for node in nodes {
        let now = SubnetEnv::read(node.host)?;
        ensure!(now.mtu == mtu && now.subnet() == node.env.subnet(), "{}", now.text);
    }
    Ok(())
}

/// A pod on each host; each reaches each, and the path carries exactly so many bytes. Hosts count from 0.
fn carries(nodes: &[Node<'_>], mtu: impl Fn(usize, usize) -> u32) -> Result<()> {
    let pods = nodes.iter().map(|node| Pod::new(node.host, &node.env, 2)).collect::<Result<Vec<_>>>()?;
    for (i, from) in pods.iter().enumerate() {
        for (j, to) in pods.iter().enumerate().filter(|(j, _)| *j != i) {
            ping_within(secs(5), from, to.ip())?;
            let carried = largest_packet(from, to.ip())?;
            ensure!(carried == mtu(i, j), "from host {} to host {}: {carried} bytes", i + 1, j + 1);
        }
    }
    // The host itself reaches pods elsewhere too.
    ping_within(secs(5), nodes[0].host, pods[1].ip())
}
