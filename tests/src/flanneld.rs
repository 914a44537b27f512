//! flanneld on the hosts of a lab, started as an operator would, and everything it leaves for others to read.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::daemon::Daemon;
use crate::host::{Host, Place};
use crate::lab::Lab;
use crate::probe::{eventually, secs};

/// Where the config and the leases live in etcd unless somebody says otherwise.
pub const PREFIX: &str = "/coreos.com/network";

/// What others read.
pub const SUBNET_FILE: &str = "/run/flannel/subnet.env";

/// Port of the health server that [`Flanneld::start`] asks for.
const HEALTH_PORT: &str = "8285";

/// How long a healthy start may take on a machine that does many other things.
const START_DEADLINE: Duration = Duration::from_secs(15);

/// A running flanneld.
#[derive(Debug)]
pub struct Flanneld {
    host: Host,
    daemon: Daemon,
}

impl Flanneld {
    /// Starts it as the guides do: with etcd's endpoint, `--iface eth0`, `--ip-masq` and a health server; does not wait.
    pub fn start(lab: &Lab, host: &Host) -> Result<Self> {
        Self::start_with(lab, host, &["--iface", "eth0", "--ip-masq"])
    }

    /// Starts it with other flags besides etcd's endpoint and the health server.
    pub fn start_with(lab: &Lab, host: &Host, flags: &[&str]) -> Result<Self> {
        Self::start_in(lab, host, flags, &[])
    }

    /// The same with more in its environment.
    pub fn start_in(lab: &Lab, host: &Host, flags: &[&str], env: &[(&str, &str)]) -> Result<Self> {
        Self::begin(&lab.etcd_endpoint(), host, flags, env)
    }

    /// Starts it with other endpoints than the lab's.
    pub fn start_at(endpoints: &str, host: &Host, flags: &[&str]) -> Result<Self> {
        Self::begin(endpoints, host, flags, &[])
    }

    fn begin(endpoints: &str, host: &Host, flags: &[&str], env: &[(&str, &str)]) -> Result<Self> {
        let endpoints = format!("--etcd-endpoints={endpoints}");
        let argv =
            [&["flanneld", &endpoints, "--healthz-ip=127.0.0.1", "--healthz-port", HEALTH_PORT], flags];
        let daemon = host.spawn("flanneld", &argv.concat(), env)?;
        Ok(Self { host: host.clone(), daemon })
    }

    /// Starts it on every host and waits until all are ready.
    pub fn start_all(lab: &Lab) -> Result<Vec<Self>> {
        let all = lab.hosts().iter().map(|host| Self::start(lab, host)).collect::<Result<Vec<_>>>()?;
        for one in &all {
            one.ready()?;
        }
        Ok(all)
    }

    /// The process.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// The host it runs on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Waits until it says that it is ready, and reads what it wrote.
    pub fn ready(&self) -> Result<SubnetEnv> {
        eventually(format!("flanneld on {} is ready", self.host.name()), START_DEADLINE, || {
            if !self.daemon.alive() {
                return Ok(());
            }
            let (status, said) = self.health("/readyz")?;
            ensure!(status == 200, "{status} {said}");
            Ok(())
        })
        .with_context(|| self.daemon.tail())?;
        if !self.daemon.alive() {
            bail!("flanneld ended\n{}", self.daemon.tail());
        }
        SubnetEnv::read(&self.host)
    }

    /// Status and body of a page of its health server.
    pub fn health(&self, path: &str) -> Result<(u16, String)> {
        // bash, because busybox has nothing that shows the body of an error and leaves the connection open until the answer.
        let ask = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{HEALTH_PORT}; printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3; exec cat <&3"
        );
        let said = self.host.out(&["timeout", "2", "bash", "-ec", &ask])?;
        let (head, body) = said.split_once("\r\n\r\n").unwrap_or((&said, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.with_context(|| format!("no HTTP answer: {said:?}"))?, body.to_owned()))
    }

    /// Repairs that it has counted, by kind of fact.
    pub fn repaired(&self) -> Result<BTreeMap<String, u64>> {
        let (_, text) = self.health("/metrics")?;
        let counts = text.lines().filter_map(|line| {
            let labels = line.strip_prefix("flannel_drift_repaired_total{")?;
            let (labels, count) = labels.split_once("} ")?;
            let (_, kind) = labels.split_once("kind=\"")?;
            Some((kind.split('"').next()?.to_owned(), count.trim().parse().ok()?))
        });
        Ok(counts.collect())
    }

    /// Lines of its log that contain a text.
    pub fn said(&self, text: &str) -> Vec<String> {
        self.daemon.log().lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }
}

/// subnet.env, read as any shell would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The whole file.
    pub text: String,
    /// First three bytes and the fourth of the subnet's base address.
    base: Ipv4Addr,
    /// Length of the subnet.
    pub len: u8,
    /// `FLANNEL_MTU`
    pub mtu: u32,
}

impl SubnetEnv {
    /// Reads that of a host.
    pub fn read(host: &Host) -> Result<Self> {
        let text = host.read(SUBNET_FILE)?;
        let value = |key: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            found.with_context(|| format!("no {key} in\n{text}"))
        };
        let (gateway, len) =
            value("FLANNEL_SUBNET")?.split_once('/').context("FLANNEL_SUBNET has no length")?;
        let base = u32::from(gateway.parse::<Ipv4Addr>()?) - 1;
        let (len, mtu) = (len.parse()?, value("FLANNEL_MTU")?.parse()?);
        Ok(Self { base: base.into(), len, mtu, text })
    }

    /// The subnet as routes show it: `10.100.5.0/24`.
    pub fn subnet(&self) -> String {
        format!("{}/{}", self.base, self.len)
    }

    /// The subnet's first address: what peers have as next hop, and the device.
    pub fn base(&self) -> Ipv4Addr {
        self.base
    }

    /// The n-th address of the subnet; 1 is the gateway.
    pub fn address(&self, n: u8) -> Ipv4Addr {
        (u32::from(self.base) + u32::from(n)).into()
    }

    /// The gateway as a bridge has it: `10.100.5.1/24`.
    pub fn gateway(&self) -> String {
        format!("{}/{}", self.address(1), self.len)
    }

    /// The last part of the lease's key: `10.100.5.0-24`.
    pub fn key(&self) -> String {
        format!("{}-{}", self.base, self.len)
    }
}

/// Puts the network config as an operator does.
pub fn put_config(lab: &Lab, document: &str) -> Result<()> {
    lab.etcdctl(&["put", &format!("{PREFIX}/config"), document]).map(|_| ())
}

/// All leases in etcd: last part of the key, and the value byte for byte.
pub fn leases(lab: &Lab) -> Result<BTreeMap<String, String>> {
    let prefix = format!("{PREFIX}/subnets/");
    let keys = lab.etcdctl(&["get", "--prefix", "--keys-only", &prefix])?;
    keys.lines()
        .filter(|key| !key.is_empty())
        .map(|key| {
            let value = lab.etcdctl(&["get", "--print-value-only", key])?;
            Ok((key.trim_start_matches(&prefix).to_owned(), value))
        })
        .collect()
}

/// How long the key of a lease still has, and how long it was given, in seconds; None for a key that stays for ever.
pub fn time_to_live(lab: &Lab, key: &str) -> Result<Option<(u64, u64)>> {
    let said = lab.etcdctl(&["get", "-w", "json", &format!("{PREFIX}/subnets/{key}")])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let lease = said["kvs"][0]["lease"].as_u64();
    let Some(lease) = lease.filter(|lease| *lease != 0) else { return Ok(None) };
    let said = lab.etcdctl(&["lease", "timetolive", &format!("{lease:x}"), "-w", "json"])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let number = |key: &str| said[key].as_u64().with_context(|| format!("no {key} in {said}"));
    Ok(Some((number("ttl")?, number("granted-ttl")?)))
}

/// A container's place made by hand, as the first guides did: a network namespace on a bridge that has the subnet's
/// gateway address (`docker0 --bip`). As a [`Place`] it runs the machine's own programs there.
#[derive(Debug, Clone)]
pub struct Pod {
    host: Host,
    name: String,
    ip: Ipv4Addr,
}

/// The bridge that pods of a host share.
const POD_BRIDGE: &str = "docker0";

impl Pod {
    /// Makes one with the n-th address of the host's subnet. Its MTU is the uplink's, so that what a path carries shows.
    pub fn new(host: &Host, env: &SubnetEnv, n: u8) -> Result<Self> {
        let (name, ip) = (format!("pod{n}"), env.address(n));
        let (gateway, bridge_ip, len) = (env.address(1), env.gateway(), env.len);
        host.sh(&format!(
            "[ -e /sys/class/net/{POD_BRIDGE} ] || {{ ip link add {POD_BRIDGE} type bridge; \
               ip addr add {bridge_ip} dev {POD_BRIDGE}; ip link set {POD_BRIDGE} up; }}; \
             ip netns add {name}; \
             ip link add v-{name} type veth peer name eth0 netns {name}; \
             ip link set v-{name} master {POD_BRIDGE} up; \
             ip -n {name} addr add {ip}/{len} dev eth0; ip -n {name} link set lo up; ip -n {name} link set eth0 up; \
             ip -n {name} route add default via {gateway}"
        ))?;
        Ok(Self { host: host.clone(), name, ip })
    }

    /// Its address.
    pub fn ip(&self) -> Ipv4Addr {
        self.ip
    }

    /// Changes its MTU, and that of its host's end and the bridge.
    pub fn set_mtu(&self, mtu: u32) -> Result<()> {
        let name = &self.name;
        self.host.sh(&format!(
            "ip -n {name} link set eth0 mtu {mtu}; ip link set v-{name} mtu {mtu}; ip link set {POD_BRIDGE} mtu {mtu}"
        ))?;
        Ok(())
    }

    /// Removes it, and the bridge.
    pub fn remove(self) -> Result<()> {
        let name = &self.name;
        self.host
            .sh(&format!("ip netns del {name}; ip link del v-{name} || true; ip link del {POD_BRIDGE}"))?;
        let gone = || -> Result<()> {
            let links = self.host.out(&["ip", "-br", "link"])?;
            ensure!(!links.contains(name.as_str()), "{links}");
            Ok(())
        };
        eventually("the pod is gone", secs(5), gone)
    }
}

impl Place for Pod {
    fn name(&self) -> String {
        format!("{} on {}", self.name, self.host.name())
    }

    fn host(&self) -> &Host {
        &self.host
    }

    fn enter(&self, argv: &[&str]) -> std::process::Command {
        self.host.enter_netns(&self.name, argv)
    }
}
