//! Who may send into the tunnel: a stranger on the hosts' link forges packets of it, and hosts come, move and go.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SubnetEnv, leases, put_config};
use flannel_tests::{Host, Lab, PingStream, Place as _, eventually, in_lab, ping, ping_within, secs};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;
const TABLE: &str = "inet flannel_tunnel";
/// Generous: of a machine that does many other things.
const FOLLOW: Duration = Duration::from_secs(30);

#[test]
fn strangers_are_kept_out_and_holders_never() {
    in_lab(Lab::new("guard").hosts(4).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let [one, two, three, stranger] = [1, 2, 3, 4].map(|n| lab.host(n));
        let open = start(lab, one, &["--tunnel-guard=false"])?;
        let second = start(lab, two, &[])?;
        let (env, env_two) = (open.ready()?, second.ready()?);
        let (pod, pod_two) = (Pod::new(one, &env, 2)?, Pod::new(two, &env_two, 2)?);
        ping_within(FOLLOW, &pod, pod_two.ip())?;
        let forge = Forger::new(stranger, one, &pod, &env_two)?;
        eventually("without a guard anybody reaches a container", FOLLOW, || forge.arrives())?;
        ensure!(!one.sh("nft list tables")?.contains(TABLE), "no guard was asked for");

        open.daemon().stop(secs(10))?;
        let first = start(lab, one, &["--iptables-resync=1"])?;
        first.ready()?;
        let plan =
            one.out(&["flanneld", "--etcd-endpoints", &lab.etcd_endpoint(), "--iface=eth0", "plan"])?;
        ensure!(plan.contains("nothing to do"), "{plan}");
        is_kept_out(&forge, &first)?;
        another_network_on_the_same_port(one, stranger)?;
        another_flanneld_with_the_same_vni(lab, one, &pod, &pod_two)?;

        // From here on, not one packet between holders is lost, whatever happens to the guard.
        let pings = PingStream::start(&pod, pod_two.ip(), Duration::from_millis(20))?;
        let third = start(lab, three, &[])?;
        let env_three = third.ready()?;
        let pod_three = Pod::new(three, &env_three, 2)?;
        ping_within(FOLLOW, &pod_three, pod.ip())?;
        let everybody = ["10.77.0.12", "10.77.0.13"];
        eventually("both are let in", FOLLOW, || lets_in(one, &everybody))?;
        for host in [one, two] {
            host.sh("nft flush ruleset")?;
        }
        eventually("it is back", FOLLOW, || lets_in(one, &everybody))?;
        one.sh(&format!("nft 'delete element {TABLE} hosts {{ 10.77.0.13 }}'"))?;
        eventually("and mended", FOLLOW, || lets_in(one, &everybody))?;
        is_kept_out(&forge, &first)?;
        third.daemon().stop(secs(10))?;
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{}", env_three.key())])?;
        eventually("who left is a stranger", FOLLOW, || lets_in(one, &["10.77.0.12"]))?;
        let count = pings.stop()?;
        ensure!(count.lost() == 0 && count.received > 20, "{count:?}");

        // One that comes back with another address.
        three.sh("ip addr add 10.77.0.113/24 dev eth0")?;
        let third = start(lab, three, &["--public-ip=10.77.0.113"])?;
        ensure!(third.ready()?.subnet() == env_three.subnet(), "pods keep their addresses");
        ping_within(FOLLOW, &pod_three, pod.ip())?;
        eventually("by its new address", FOLLOW, || lets_in(one, &["10.77.0.12", "10.77.0.113"]))?;

        an_emptied_store(lab, one, [&second, &third])?;
        start(lab, two, &[])?.ready()?;
        start(lab, three, &["--public-ip=10.77.0.113"])?.ready()?;
        ping_within(FOLLOW, &pod, pod_two.ip())?;
        ping_within(FOLLOW, &pod, pod_three.ip())?;

        put_config(lab, HOST_GW)?;
        eventually("nothing is left to guard", FOLLOW, || {
            let tables = one.sh("nft list tables")?;
            ensure!(!tables.contains(TABLE), "{tables}");
            ping(&pod, pod_two.ip())
        })?;
        put_config(lab, VXLAN)?;
        eventually("and back", FOLLOW, || {
            lets_in(one, &["10.77.0.12", "10.77.0.113"])?;
            ping(&pod, pod_two.ip())
        })?;
        // Nobody would let in who comes next.
        first.daemon().stop(secs(10))?;
        ensure!(!one.sh("nft list tables")?.contains(TABLE), "a guard without a keeper");
        ping(&pod, pod_two.ip())?;
        a_guard_that_the_kernel_refuses(lab, one, &pod, &pod_two)
    });
}

fn start(lab: &Lab, host: &Host, flags: &[&str]) -> Result<Flanneld> {
    Flanneld::start_with(lab, host, &[&["--iface", "eth0"], flags].concat())
}

/// Whether these, and nobody else, are in a host's set.
fn lets_in(host: &Host, addresses: &[&str]) -> Result<()> {
    let said = host.out(&["nft", "-j", "list", "set", "inet", "flannel_tunnel", "hosts"])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let mut seen: Vec<&str> = said["nftables"][1]["set"]["elem"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(serde_json::Value::as_str)
        .collect();
    seen.sort_unstable();
    let mut wanted = addresses.to_vec();
    wanted.sort_unstable();
    ensure!(seen == wanted, "{seen:?}, and {wanted:?} were expected");
    Ok(())
}

/// Somebody on the hosts' link who wraps packets as the hosts do, with a container's source in them.
struct Forger<'a> {
    stranger: &'a Host,
    victim: &'a Host,
    pod: &'a Pod,
}

impl<'a> Forger<'a> {
    fn new(stranger: &'a Host, victim: &'a Host, pod: &'a Pod, as_if_of: &SubnetEnv) -> Result<Self> {
        let mac = victim.read("/sys/class/net/flannel.1/address")?;
        let (victim_ip, pod_ip, source) = (victim.ip(), pod.ip(), as_if_of.address(66));
        stranger.sh(&format!(
            "ip link add forged type vxlan id 1 dev eth0 dstport 8472 nolearning remote {victim_ip}
             ip link set forged up; ip addr add {source}/32 dev forged
             ip neigh add {pod_ip} lladdr {mac} dev forged; ip route add {pod_ip}/32 dev forged src {source}",
            mac = mac.trim()
        ))?;
        Ok(Self { stranger, victim, pod })
    }

    fn sends(&self) -> Result<()> {
        let ip = self.pod.ip();
        self.stranger.out(&["bash", "-c", &format!("echo hello > /dev/udp/{ip}/9")]).map(drop)
    }

    /// Datagrams that came to the container, to a port where nobody listens.
    fn seen(&self) -> Result<u64> {
        let said = self.pod.out(&["cat", "/proc/net/snmp"])?;
        let numbers = said.lines().filter(|line| line.starts_with("Udp:")).nth(1);
        let count = numbers.and_then(|line| line.split(' ').nth(2)?.parse().ok());
        count.with_context(|| format!("no count in\n{said}"))
    }

    fn arrives(&self) -> Result<()> {
        let before = self.seen()?;
        self.sends()?;
        eventually("it is seen", secs(1), || {
            let now = self.seen()?;
            ensure!(now > before, "{now} datagrams");
            Ok(())
        })
    }

    /// How many packets the victim's guard has dropped.
    fn dropped(&self) -> Result<u64> {
        let said = self.victim.sh(&format!("nft list chain {TABLE} input"))?;
        let count =
            said.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
        count.with_context(|| format!("no counter in\n{said}"))
    }
}

/// It arrives at the host, is counted and told, and goes no further.
fn is_kept_out(forge: &Forger<'_>, daemon: &Flanneld) -> Result<()> {
    let counted = || -> Result<u64> {
        let (_, text) = daemon.health("/metrics")?;
        let prefix = "flannel_tunnel_strangers_dropped_total{network=\"default\"} ";
        let line = text.lines().find_map(|line| line.strip_prefix(prefix));
        Ok(line.context("no such counter")?.parse()?)
    };
    let (seen, metric) = (forge.seen()?, counted()?);
    let before = forge.dropped()?;
    eventually("it is dropped", FOLLOW, || {
        forge.sends()?;
        let now = forge.dropped()?;
        ensure!(now > before, "{now} dropped");
        Ok(())
    })?;
    let now = forge.seen()?;
    ensure!(now == seen, "{} forged packets reached the container", now - seen);
    eventually("it is counted", FOLLOW, || {
        let now = counted()?;
        ensure!(now > metric, "{now}, and {metric} before");
        Ok(())
    })?;
    eventually("it is said", FOLLOW, || !daemon.said("E137").is_empty())
}

/// VXLAN of somebody else: another network identifier, and the kernel has one socket for both.
fn another_network_on_the_same_port(host: &Host, other: &Host) -> Result<()> {
    for (here, there, n) in [(host, other, 1), (other, host, 2)] {
        here.sh(&format!(
            "ip link add other type vxlan id 7 dev eth0 dstport 8472 remote {}; ip link set other up
             ip addr add 192.168.7.{n}/24 dev other",
            there.ip()
        ))?;
    }
    ping_within(FOLLOW, host, "192.168.7.2")?;
    for here in [host, other] {
        here.sh("ip link del other")?;
    }
    Ok(())
}

/// A second flanneld whose config has the first one's VNI gets no device, and its guard knows none of the first one's hosts.
fn another_flanneld_with_the_same_vni(lab: &Lab, host: &Host, pod: &Pod, far: &Pod) -> Result<()> {
    let second = r#"{"Network":"10.200.0.0/16","Backend":{"Type":"vxlan"}}"#;
    lab.etcdctl(&["put", "/second/network/config", second])?;
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let flags = ["--etcd-prefix=/second/network", "--subnet-file=/run/flannel/second.env", "--iface=eth0"];
    let daemon = host.spawn("second", &[&["flanneld", &endpoints], &flags[..]].concat(), &[])?;
    daemon.wait_log("each network needs a Backend.VNI of its own", FOLLOW)?;
    let tables = host.sh("nft list tables")?;
    ensure!(!tables.contains("flannel_tunnel-"), "{tables}");
    ping(pod, far.ip())?;
    daemon.stop(secs(10)).map(drop)
}

/// Its table is the property of another program's socket. That is said once, everything else works, and as soon as it is free there is a
/// guard.
fn a_guard_that_the_kernel_refuses(lab: &Lab, host: &Host, pod: &Pod, far: &Pod) -> Result<()> {
    let script = format!("exec nft -i < <(echo 'table {TABLE} {{ flags owner; }}'; exec sleep 600)");
    let owner = host.spawn("owner", &["bash", "-c", &script], &[])?;
    eventually("the table is taken", FOLLOW, || {
        let tables = host.sh("nft list tables")?;
        ensure!(tables.contains(TABLE), "{tables}");
        Ok(())
    })?;
    let daemon = start(lab, host, &["--iptables-resync=1"])?;
    daemon.ready()?;
    ping(pod, far.ip())?;
    let looks = || -> Result<u64> {
        let (_, text) = daemon.health("/metrics")?;
        let prefix = "flannel_passes_total{network=\"default\",reason=\"resync\"} ";
        let line = text.lines().find_map(|line| line.strip_prefix(prefix));
        Ok(line.unwrap_or("0").parse()?)
    };
    eventually("it has tried again", FOLLOW, || {
        let looks = looks()?;
        ensure!(looks >= 2, "{looks} regular looks");
        Ok(())
    })?;
    let said = daemon.said("no tunnel guard");
    ensure!(said.len() == 1 && said[0].contains("not permitted"), "{said:#?}");
    ensure!(
        daemon.health("/readyz")?.0 == 200 && daemon.said(" ERROR ").is_empty(),
        "{}",
        daemon.daemon().tail()
    );
    ping(pod, far.ip())?;
    owner.crash()?;
    eventually("there is a guard", FOLLOW, || lets_in(host, &["10.77.0.12", "10.77.0.113"]))?;
    ping(pod, far.ip())
}

/// All leases are gone, and with them everybody who could come back. While there are routes to those who were known, they are let in.
fn an_emptied_store(lab: &Lab, host: &Host, others: [&Flanneld; 2]) -> Result<()> {
    for other in others {
        other.daemon().crash()?;
    }
    lab.etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/")])?;
    eventually("one has its lease again", FOLLOW, || {
        let leases = leases(lab)?;
        ensure!(leases.len() == 1, "{leases:?}");
        Ok(())
    })?;
    lets_in(host, &["10.77.0.12", "10.77.0.113"])?;
    let routes = host.out(&["ip", "route", "show", "dev", "flannel.1"])?;
    ensure!(routes.matches("/24 via").count() == 2, "{routes}");
    Ok(())
}
