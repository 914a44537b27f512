//! What packets see of it.

use super::*;

/// A namespace that lives as long as this does.
struct Sandbox(Child);

impl Sandbox {
    fn new() -> Self {
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let child = Command::new("unshare").args(["--net", "sleep", "120"]).spawn().unwrap();
        let link = format!("/proc/{}/ns/net", child.id());
        for _ in 0..500 {
            if std::fs::read_link(&link).is_ok_and(|there| there != own) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        Self(child)
    }

    fn try_sh(&self, script: &str) -> bool {
        let target = self.0.id().to_string();
        let status = Command::new("nsenter")
            .args(["-t", &target, "-n", "sh", "-euc", script])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.unwrap().success()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Sandbox {
    /// One that is joined to this namespace by a link of this name: we have the first address, it has the second.
    fn behind(link: &str, ours: &str, theirs: &str) -> Self {
        let sandbox = Self::new();
        let pid = sandbox.0.id();
        sh(&format!(
            "ip link add {link} type veth peer name eth0 netns {pid}; ip addr add {ours}/24 dev {link}
             ip link set {link} up"
        ));
        let inside = format!("ip addr add {theirs}/24 dev eth0; ip link set eth0 up; ip link set lo up");
        assert!(sandbox.try_sh(&inside));
        sandbox
    }

    fn pings(&self, to: &str) -> bool {
        self.try_sh(&format!("ping -qc1 -W1 {to}"))
    }
}

#[test]
fn packets_pass_a_forward_chain_that_drops_like_dockers() {
    in_namespace(&["iptables-nft", "nft", "ip", "ping", "nsenter", "unshare"], |netfilter| {
        let left = Sandbox::behind("left", "10.100.1.1", "10.100.1.2");
        let right = Sandbox::behind("right", "10.100.2.1", "10.100.2.2");
        assert!(left.try_sh("ip route add default via 10.100.1.1"));
        assert!(right.try_sh("ip route add default via 10.100.2.1"));
        sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
        let passes = || left.pings("10.100.2.2");
        assert!(passes(), "the way is open without rules");
        sh(
            "iptables-nft -P FORWARD DROP; iptables-nft -N DOCKER-USER; iptables-nft -I FORWARD -j DOCKER-USER",
        );
        assert!(!passes(), "the chain drops");
        let (territory, own_table) = facts([table(sample("flannel", [prefix("10.100.0.0/16")]))]);
        settle(netfilter, &territory, &own_table);
        assert!(
            !passes(),
            "the accept of another table does not outweigh the drop: this is why Accept exists"
        );
        let (territory, desired) = facts([accept_fact("10.100.0.0/16")]);
        settle(netfilter, &territory, &desired);
        assert!(passes());
        settle(netfilter, &territory, &Facts::default());
        assert!(!passes());
    });
}

/// The plan of a network on a node, seen from a container, another node, the outside, and another network's container.
#[test]
fn a_planned_firewall_masquerades_and_isolates() {
    in_namespace(&["nft", "ip", "ping", "nsenter", "unshare"], |netfilter| {
        let pod = Sandbox::behind("pod", "10.100.5.1", "10.100.5.2");
        let peer = Sandbox::behind("peer", "172.30.9.1", "172.30.9.2");
        let outside = Sandbox::behind("outside", "192.0.2.1", "192.0.2.2");
        let stranger = Sandbox::behind("stranger", "10.200.1.1", "10.200.1.2");
        sh("echo 1 > /proc/sys/net/ipv4/ip_forward; ip route add 10.100.9.0/24 via 172.30.9.2");
        assert!(pod.try_sh("ip route add default via 10.100.5.1"));
        assert!(peer.try_sh("ip addr add 10.100.9.2/32 dev lo; ip route add 10.100.0.0/16 via 172.30.9.1"));
        assert!(stranger.try_sh("ip route add default via 10.200.1.1"));

        let network = NetworkName::default_network();
        let ranges = [Range { cidr: prefix("10.100.0.0/16"), subnet: prefix("10.100.5.0/24") }];
        let (alone, others) = (BTreeSet::new(), BTreeSet::from([prefix("10.200.0.0/16")]));
        let scene = FirewallScene {
            network: &network,
            ranges: &ranges,
            masquerade: true,
            fully_random: true,
            forward: true,
            isolated_from: &alone,
            forward_chains: &netfilter.forward_chains().unwrap(),
            iptables: &netfilter.iptables().unwrap(),
            nftables: false,
        };
        let from_host =
            || sh("ping -qc1 -W1 -I 192.0.2.1 10.100.9.2 >/dev/null && echo yes || echo no") == "yes\n";
        assert!(!pod.pings("192.0.2.2"), "the outside knows no way back to a container");
        assert!(!from_host(), "nor does another node to an address outside the network");

        let (mut territory, desired) = facts(plan(&scene).unwrap().iter().cloned());
        territory.tables.insert(table_name(&network));
        settle(netfilter, &territory, &desired);
        assert_eq!(settle(netfilter, &territory, &desired), 0);
        assert!(pod.pings("192.0.2.2"), "masqueraded to the outside");
        assert!(from_host(), "masqueraded into the network (upstream's nftables rules cannot)");
        assert!(pod.pings("10.200.1.2") && stranger.pings("10.100.5.2"), "not isolated yet");
        assert!(peer.try_sh("ip route add blackhole 172.30.9.1/32"));
        assert!(!from_host(), "the peer answers nobody but containers now");
        assert!(pod.pings("10.100.9.2"), "between containers the source is kept");
        assert!(
            outside.try_sh("ip route add 10.100.0.0/16 via 192.0.2.1; ip route add blackhole 10.100.5.1/32")
        );
        assert!(outside.pings("10.100.5.2"), "into the network the source is kept");

        let isolated = FirewallScene { isolated_from: &others, ..scene };
        let (_, desired) = facts(plan(&isolated).unwrap().iter().cloned());
        assert_eq!(settle(netfilter, &territory, &desired), 1);
        assert!(!pod.pings("10.200.1.2") && !stranger.pings("10.100.5.2"));
        assert!(pod.pings("192.0.2.2") && pod.pings("10.100.9.2"));
        let drops = sh("nft list chain inet flannel forward");
        assert_eq!(drops.matches("counter packets 1 ").count(), 2, "{drops}");
    });
}

/// What is dropped stays dropped while its table is replaced over and over, by difference and as a whole.
#[test]
fn no_packet_slips_through_a_replacement() {
    in_namespace(&["nft", "ip"], |netfilter| {
        sh("ip link set lo up");
        let closed = |more: u32| {
            let mut table = sample("flannel", many(more));
            let base = Base { kind: ChainKind::Filter, hook: Hook::Output, priority: 0 };
            let to =
                Match::Address { side: Side::Destination, negated: false, prefix: prefix("127.0.0.2/32") };
            let drop = Rule { matches: vec![to], counter: more.is_multiple_of(2), verdict: Verdict::Drop };
            table.chains.insert("out".into(), Chain { base: Some(base), rules: vec![drop] });
            table
        };
        let (territory, desired) = facts([table(closed(0))]);
        settle(netfilter, &territory, &desired);
        let there = std::net::UdpSocket::bind("127.0.0.2:0").unwrap();
        let address = there.local_addr().unwrap();
        let here = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        there.set_nonblocking(true).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let sent = std::thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let mut sent = 0u32;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // EPERM is what a drop in the output hook looks like to the sender.
                    assert!(here.send_to(b"x", address).is_err(), "a packet got out");
                    sent += 1;
                }
                sent
            });
            // The ordinary way, by difference. A table that others wrote into is deleted and made anew in one transaction; there the
            // kernel (6.18) lets a packet through in about one of 9,000 exchanges under such a flood, which is why
            // the difference is what is written wherever it can be.
            for round in 1..300u32 {
                let old = table(closed(round - 1));
                let new = table(closed(round));
                netfilter.apply(&[Change::Replace { old: &old, new: &new }]).remove(0).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            flood.join().unwrap()
        });
        assert!(sent > 100, "only {sent} packets were tried");
        assert!(there.recv(&mut [0]).is_err(), "a packet arrived");
        sh("nft delete table inet flannel");
        here.send_to(b"x", address).expect("it was the table that dropped");
    });
}
