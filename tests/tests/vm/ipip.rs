//! Backend ipip.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flannel_core::touch::world::World as _;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::fact::{Address, Change, Fact, Facts, Ipip, Link, LinkKind, LinkModes, diff};
use flannel_core::words::name::LinkName;
use flannel_core::words::territory::Territory;
use flannel_core::words::units::Mtu;
use flannel_tests::flanneld::{Flanneld, Pod, SubnetEnv, leases, put_config};
use flannel_tests::needs::{IPIP, require_kernel};
use flannel_tests::{
    Host, Lab, PingStream, Place, alone, eventually, in_lab, largest_packet, ping_within, secs, sh,
};

const PLAIN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"ipip"}}"#;
const DIRECT: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"ipip","Directrouting":true}}"#;
const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// How long until a change is in the kernel of every host.
const FOLLOW: Duration = Duration::from_secs(5);

/// A host, what it leased, and a pod on it.
struct Node<'a> {
    host: &'a Host,
    env: SubnetEnv,
    pod: Pod,
}

impl Node<'_> {
    /// The route to this one, as another host shows it.
    fn route(&self) -> String {
        format!("{} via {} dev flannel.ipip onlink", self.env.subnet(), self.host.ip())
    }

    fn shows_device(&self) -> Result<()> {
        let link = self.host.out(&["ip", "-d", "link", "show", "flannel.ipip"])?;
        let tunnel = format!("ipip ipip remote any local {} ttl inherit nopmtudisc ", self.host.ip());
        for part in [" mtu 1480 ", ",UP,LOWER_UP> ", &tunnel] {
            ensure!(link.contains(part), "no {part:?} in\n{link}");
        }
        let address =
            self.host.sh("ip -4 -o addr show dev flannel.ipip | sed 's/^[0-9]*: //; s/\\\\.*//'")?;
        let expected = format!("flannel.ipip    inet {}/32 scope global flannel.ipip", self.env.base());
        ensure!(address == expected, "expected {expected}, found {address}");
        Ok(())
    }

    /// The device, and one route for each of these.
    fn shows(&self, peers: &[&Node<'_>]) -> Result<()> {
        self.shows_device()?;
        self.routes(peers.iter().map(|peer| peer.route()).collect())
    }

    fn routes(&self, mut expected: Vec<String>) -> Result<()> {
        let found = self.host.sh("ip -4 route show | grep ^10.100 | grep -v docker0 || true")?;
        let mut found: Vec<_> = found.lines().map(|line| line.trim().to_owned()).collect();
        found.sort();
        expected.sort();
        ensure!(found == expected, "{}: expected {expected:#?}, found {found:#?}", self.host.name());
        Ok(())
    }
}

fn reach(nodes: &[Node<'_>]) -> Result<()> {
    for from in nodes {
        for to in nodes {
            ping_within(FOLLOW, &from.pod, to.pod.ip())?;
        }
    }
    Ok(())
}

/// Hosts 1 and 2 on one link, 3 behind the router.
#[test]
fn three_hosts() {
    in_lab(Lab::new("ipip").hosts(3).behind_router(&[3]).etcd().needs_kernel(IPIP), |lab| {
        put_config(lab, PLAIN)?;
        let mut daemons = Flanneld::start_all(lab)?;
        let mut nodes = Vec::new();
        for host in lab.hosts() {
            let env = SubnetEnv::read(host)?;
            ensure!(env.mtu == 1480, "{}", env.text);
            let value = format!(r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"ipip"}}"#, host.ip());
            ensure!(leases(lab)?.get(&env.key()) == Some(&value), "{:?}", leases(lab)?);
            let pod = Pod::new(host, &env, 2)?;
            nodes.push(Node { host, env, pod });
        }
        every_tunnel(&nodes)?;
        reach(&nodes)?;
        too_large_is_answered(lab, &nodes)?;
        restarts_cost_nothing(lab, &nodes, &mut daemons)?;
        what_is_broken_is_mended(lab, &nodes)?;
        one_leaves_and_comes_back(lab, &nodes, &mut daemons)?;
        other_backends(lab, &nodes)
    });
}

fn every_tunnel(nodes: &[Node<'_>]) -> Result<()> {
    for node in nodes {
        let peers: Vec<_> = nodes.iter().filter(|peer| peer.host.name() != node.host.name()).collect();
        eventually(format!("{} has its tunnels", node.host.name()), FOLLOW, || node.shows(&peers))?;
    }
    Ok(())
}

/// The largest packet passes, and the first answer to one byte more is the host's own.
fn too_large_is_answered(lab: &Lab, nodes: &[Node<'_>]) -> Result<()> {
    let [first, .., last] = nodes else { anyhow::bail!("hosts are needed") };
    let said = first.pod.run(&[
        "ping",
        "-n",
        "-M",
        "do",
        "-c",
        "1",
        "-W",
        "5",
        "-s",
        "1453",
        &last.pod.ip().to_string(),
    ])?;
    let answer = format!("From {} icmp_seq=1 Frag needed and DF set (mtu = 1480)", first.env.address(1));
    ensure!(said.all().contains(&answer), "no {answer:?} in {said}");
    let carried = largest_packet(&first.pod, last.pod.ip())?;
    ensure!(carried == 1480, "{carried}");
    // A smaller link on the way: what the router says of the outer packet is passed on to the sender of the inner one.
    lab.router().out(&["ip", "link", "set", "eth1", "mtu", "1400"])?;
    let carried = largest_packet(&first.pod, last.pod.ip())?;
    lab.router().out(&["ip", "link", "set", "eth1", "mtu", "1500"])?;
    ensure!(carried == 1380, "{carried}");
    // What was learned of the path would be kept for ten minutes.
    for node in nodes {
        node.host.out(&["ip", "route", "flush", "cache"])?;
    }
    Ok(())
}

fn restarts_cost_nothing(lab: &Lab, nodes: &[Node<'_>], daemons: &mut [Flanneld]) -> Result<()> {
    let every = Duration::from_millis(200);
    let there = PingStream::start(&nodes[0].pod, nodes[2].pod.ip(), every)?;
    let back = PingStream::start(&nodes[1].pod, nodes[0].pod.ip(), every)?;
    for (i, host) in lab.hosts().iter().enumerate() {
        match i {
            1 => daemons[i].daemon().stop(secs(20)).map(drop)?,
            _ => daemons[i].daemon().crash()?,
        }
        thread::sleep(Duration::from_millis(500)); // traffic without anybody who looks after it
        daemons[i] = Flanneld::start(lab, host)?;
        daemons[i].ready()?;
    }
    for (way, seen) in [("there", there.stop_after(21)?), ("back", back.stop_after(21)?)] {
        ensure!(seen.sent >= 20 && seen.lost() == 0, "{way}: {seen:?}");
    }
    for daemon in daemons {
        let verbs = ["added:", "removed:", "replaced:", "restored:", "corrected:"];
        let mut changed: Vec<_> = verbs.iter().flat_map(|verb| daemon.said(verb)).collect();
        // Who ends in order leaves no guard that nobody keeps.
        changed.retain(|line| !line.contains("tunnel_guard added") && !line.contains("tunnel_host added"));
        ensure!(changed.is_empty(), "a restart changed what it found: {changed:#?}");
    }
    Ok(())
}

fn what_is_broken_is_mended(lab: &Lab, nodes: &[Node<'_>]) -> Result<()> {
    let host = nodes[0].host;
    // In one step: between two the daemon would have mended it.
    let other = "ip tunnel change flannel.ipip mode ipip local 10.77.0.11 ttl 64 pmtudisc";
    for (what, script) in [
        ("the device is deleted", "ip link del flannel.ipip"),
        ("the routes are flushed", "ip route flush dev flannel.ipip"),
        ("the address is deleted", "ip addr flush dev flannel.ipip"),
        ("the device is down", "ip link set flannel.ipip down"),
        ("the device has other attributes", other),
        ("the MTU is another", "ip link set flannel.ipip mtu 1400"),
    ] {
        host.sh(script).context(what)?;
        eventually(what, FOLLOW, || nodes[0].shows(&[&nodes[1], &nodes[2]]))?;
        ping_within(FOLLOW, &nodes[0].pod, nodes[2].pod.ip()).context(what)?;
    }
    lab.link(host, false)?;
    eventually("the cable is pulled", FOLLOW, || {
        let link = host.out(&["ip", "link", "show", "eth0"])?;
        ensure!(!link.contains("LOWER_UP"), "{link}");
        Ok(())
    })?;
    lab.link(host, true)?;
    // Down and up by hand takes the host's own default route away, too; that one is the operator's.
    host.sh("ip link set eth0 down; ip link set eth0 up; ip route replace default via 10.77.0.1 dev eth0")?;
    eventually("the uplink has flapped", FOLLOW, || nodes[0].shows(&[&nodes[1], &nodes[2]]))?;
    reach(nodes)?;
    // The module's own device is nobody's.
    ensure!(host.out(&["ip", "link", "show", "tunl0"])?.contains("state DOWN"));
    Ok(())
}

fn one_leaves_and_comes_back(lab: &Lab, nodes: &[Node<'_>], daemons: &mut [Flanneld]) -> Result<()> {
    daemons[1].daemon().stop(secs(20))?;
    lab.etcdctl(&["del", &format!("/coreos.com/network/subnets/{}", nodes[1].env.key())])?;
    for (node, peer) in [(&nodes[0], &nodes[2]), (&nodes[2], &nodes[0])] {
        eventually("one route is left", FOLLOW, || node.shows(&[peer]))?;
    }
    daemons[1] = Flanneld::start(lab, nodes[1].host)?;
    let env = daemons[1].ready()?;
    ensure!(env == nodes[1].env, "{}", env.text);
    every_tunnel(nodes)?;
    reach(nodes)
}

/// Directly where that goes, then vxlan, and back.
fn other_backends(lab: &Lab, nodes: &[Node<'_>]) -> Result<()> {
    let direct = |peer: &Node<'_>| format!("{} via {} dev eth0 proto 70", peer.env.subnet(), peer.host.ip());
    put_config(lab, DIRECT)?;
    let [first, second, third] = nodes else { anyhow::bail!("three hosts are needed") };
    for (node, routes) in [
        (first, vec![direct(second), third.route()]),
        (second, vec![direct(first), third.route()]),
        (third, vec![first.route(), second.route()]),
    ] {
        eventually("neighbours are reached directly", FOLLOW, || {
            node.shows_device()?;
            node.routes(routes.clone())
        })?;
    }
    reach(nodes)?;
    let carried =
        (largest_packet(&first.pod, second.pod.ip())?, largest_packet(&second.pod, third.pod.ip())?);
    ensure!(carried == (1500, 1480), "{carried:?}");

    put_config(lab, VXLAN)?;
    for node in nodes {
        eventually("flannel.1 instead of flannel.ipip", FOLLOW, || {
            ensure!(node.host.exists("/sys/class/net/flannel.1"), "no flannel.1");
            ensure!(!node.host.exists("/sys/class/net/flannel.ipip"), "flannel.ipip is still there");
            Ok(())
        })?;
    }
    reach(nodes)?;
    put_config(lab, PLAIN)?;
    every_tunnel(nodes)?;
    for node in nodes {
        ensure!(!node.host.exists("/sys/class/net/flannel.1"), "flannel.1 is still there");
    }
    reach(nodes)
}

fn wanted() -> Facts {
    let link = LinkName::new("flannel.ipip").expect("a name");
    let local = Some(Ipv4Addr::new(10, 77, 0, 11));
    let device = Link {
        name: link,
        kind: LinkKind::Ipip(Ipip { local }),
        mtu: Mtu::new(1480).ok(),
        mac: None,
        alias: Some("flannel network default".into()),
        up: true,
        modes: LinkModes::default(),
    };
    let address = "10.100.5.0/32".parse().expect("an address");
    Facts::from_iter([
        Fact::Link(Box::new(device)),
        Fact::Address(Address { link, address, no_prefix_route: false, detect_duplicates: false }),
    ])
}

/// What is done to the kernel, and what it said.
fn make(kernel: &mut Kernel) -> Result<Vec<String>> {
    let (desired, territory) = (wanted(), Territory::of(wanted().iter()));
    let seen = kernel.observe(&territory)?;
    let changes: Vec<Change<'_>> = diff(&desired, &seen);
    let results = kernel.apply(&changes);
    Ok(results.into_iter().filter_map(|result| result.err().map(|error| error.to_string())).collect())
}

#[test]
fn a_device_is_read_back_adopted_or_replaced() {
    if !require_kernel(IPIP) {
        return;
    }
    alone(|| {
        let mut kernel = Kernel::open()?;
        let index = || {
            sh(
                "cat /sys/class/net/flannel.ipip/ifindex 2>/dev/null || ip -o link show flannel.ipip | cut -d: -f1",
            )
        };
        let is_right = |kernel: &mut Kernel| -> Result<()> {
            let seen = kernel.observe(&Territory::of(wanted().iter()))?;
            ensure!(diff(&wanted(), &seen).is_empty(), "{seen}");
            Ok(())
        };
        ensure!(make(&mut kernel)?.is_empty());
        is_right(&mut kernel)?;
        // As upstream makes it: kept.
        sh(
            "ip link del flannel.ipip; ip link add flannel.ipip type ipip local 10.77.0.11 ttl inherit nopmtudisc",
        )?;
        let before = index()?;
        ensure!(make(&mut kernel)?.is_empty());
        is_right(&mut kernel)?;
        ensure!(index()? == before, "upstream's device was made anew");
        // Other attributes: made anew.
        for attributes in
            ["local 10.77.0.12", "local 10.77.0.11 remote 10.77.0.13", "local 10.77.0.11 ttl 64", "external"]
        {
            sh(&format!("ip link del flannel.ipip; ip link add flannel.ipip type ipip {attributes}"))
                .context(attributes)?;
            ensure!(make(&mut kernel)?.is_empty(), "{attributes}");
            make(&mut kernel)?;
            is_right(&mut kernel).context(attributes)?;
        }
        // The address is in use by a device of another name.
        sh("ip link del flannel.ipip; ip link add other type ipip local 10.77.0.11 ttl inherit nopmtudisc")?;
        let said = make(&mut kernel)?;
        ensure!(said[0].contains("another ipip device has this local address"), "{said:?}");
        // Of another kind: not ours to delete, and nothing is put on it.
        sh(
            "ip link del other; ip link add flannel.ipip type bridge; ip addr add 192.168.9.1/24 dev flannel.ipip",
        )?;
        let said = make(&mut kernel)?;
        ensure!(
            said[0].contains("that is no ipip device; rename or remove it: ip link del flannel.ipip"),
            "{said:?}"
        );
        let addresses = sh("ip -4 -o addr show dev flannel.ipip")?;
        ensure!(addresses.contains("192.168.9.1/24") && !addresses.contains("10.100.5.0"), "{addresses}");
        Ok(())
    });
}
