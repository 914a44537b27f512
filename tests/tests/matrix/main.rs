//! Three hosts and a fourth that comes and goes, for each backend: whatever happens, the pods of all hosts reach each other again
//! soon after it is over. `FLANNEL_TESTS_LONG=1` does everything to everybody; the ordinary run takes a part. Backends that this
//! kernel lacks have everything done to them in the virtual machine (`make vm`).
//!
//! | cause | what is done |
//! |---|---|
//! | join, leave | a fourth host gets a lease and a pod; it cleans up and goes |
//! | restart, kill | SIGTERM, SIGKILL, and a start |
//! | flap, cable | the uplink down and up by a script, which takes the routes; its cable out and in |
//! | flush | the routes to the peers |
//! | device, mac | the backend's device deleted; its MAC changed by hand |
//! | switch | another backend in the config, and back |
//! | move | the host's address changes |
//!
//! A backend is a [`Row`] and a test of two lines.

use std::env;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, Pod, SubnetEnv, put_config};
use flannel_tests::needs::{self, Ability};
use flannel_tests::{Host, Lab, Mesh, Place, eventually, in_lab, now, secs, vm};

/// What a backend is expected to do.
struct Row<'a> {
    name: &'static str,
    config: &'a str,
    /// What `switch` changes to and back from.
    other: &'static str,
    /// Whether the third host lives behind the router.
    two_lans: bool,
    /// Bytes that a packet between two hosts (counted from 1) may have.
    carries: fn(usize, usize) -> u32,
    device: Option<&'static str>,
    /// Whether peers know the device by its MAC.
    has_mac: bool,
    /// Takes the routes to the peers away.
    flush: &'static str,
    /// What the kernel must have.
    ability: Option<Ability>,
    /// How many requests of all ways a restart may cost: none where the data path is the kernel's, any number where it ends with
    /// the process.
    restart_costs: u32,
    /// What the ordinary run does, besides a join and a kill.
    sample: &'static [Cause],
}

impl Row<'_> {
    /// What most backends have in common. The rest each has to say: with what is here for it nothing works.
    fn usual() -> Self {
        Self {
            name: "",
            config: "",
            other: VXLAN,
            two_lans: false,
            carries: |_, _| 1500,
            device: None,
            has_mac: false,
            flush: "false",
            ability: None,
            restart_costs: 0,
            sample: &[],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Join,
    Leave,
    Restart,
    Kill,
    Flap,
    Cable,
    Flush,
    Device,
    Mac,
    Switch,
    SwitchBack,
    Move,
}

const ALL: &[Cause] = &[
    Cause::Join,
    Cause::Kill,
    Cause::Restart,
    Cause::Flush,
    Cause::Device,
    Cause::Mac,
    Cause::Flap,
    Cause::Cable,
    Cause::Switch,
    Cause::SwitchBack,
    Cause::Move,
    Cause::Leave,
];

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// On a machine that does many other things; the figures themselves are printed.
const SOON: Duration = Duration::from_secs(5);

/// The same where the processors are emulated; keys of 4096 bits alone take most of it.
const SOON_EMULATED: Duration = Duration::from_secs(90);

/// Until everybody must be whole again for the figures to be had at all.
const DEADLINE: Duration = Duration::from_secs(30);
const DEADLINE_EMULATED: Duration = Duration::from_secs(120);

/// What is done to whom.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A part, to one.
    Sample,
    /// Everything, to one.
    Emulated,
    /// Everything, to everybody.
    Long,
}

impl Form {
    fn now() -> Self {
        match env::var_os("FLANNEL_TESTS_LONG").is_some_and(|long| long != "0") {
            _ if vm::is_inside() => Self::Emulated,
            true => Self::Long,
            false => Self::Sample,
        }
    }
}

#[test]
fn on_debians_kernel() {
    vm::again(&["wireguard", "ipip", "ipsec"], secs(3600));
}

#[test]
fn vxlan() {
    walk(&Row {
        name: "vxlan",
        config: VXLAN,
        other: HOST_GW,
        carries: |_, _| 1450,
        device: Some("flannel.1"),
        has_mac: true,
        flush: "ip route flush dev flannel.1",
        sample: &[Cause::Device, Cause::Mac, Cause::Flap, Cause::Leave],
        ..Row::usual()
    });
}

#[test]
fn vxlan_with_direct_routing() {
    walk(&Row {
        name: "vxlan with DirectRouting",
        config: r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#,
        two_lans: true,
        carries: |from, to| if from == 3 || to == 3 { 1450 } else { 1500 },
        device: Some("flannel.1"),
        has_mac: true,
        flush: "ip route flush dev flannel.1; ip route flush proto 70",
        sample: &[Cause::Switch, Cause::SwitchBack, Cause::Move],
        ..Row::usual()
    });
}

#[test]
fn host_gw() {
    walk(&Row {
        name: "host-gw",
        config: HOST_GW,
        other: r#"{"Network":"10.100.0.0/16","Backend":{"Type":"udp"}}"#,
        flush: "ip route flush proto 70",
        sample: &[Cause::Flush, Cause::Cable, Cause::Move],
        ..Row::usual()
    });
}

#[test]
fn udp() {
    walk(&Row {
        name: "udp",
        config: r#"{"Network":"10.100.0.0/16","Backend":{"Type":"udp"}}"#,
        carries: |_, _| 1472,
        device: Some("flannel0"),
        flush: "ip route flush dev flannel0",
        restart_costs: u32::MAX,
        sample: &[Cause::Flap, Cause::Switch, Cause::SwitchBack],
        ..Row::usual()
    });
}

/// In the kernel where that can, by flanneld itself where not.
#[test]
fn wireguard() {
    walk(&Row {
        name: "wireguard",
        config: r#"{"Network":"10.100.0.0/16","Backend":{"Type":"wireguard"}}"#,
        carries: |_, _| 1420,
        device: Some("flannel-wg"),
        flush: "ip route flush dev flannel-wg",
        restart_costs: if needs::has(needs::WIREGUARD) { 0 } else { u32::MAX },
        sample: &[Cause::Device, Cause::Move],
        ..Row::usual()
    });
}

#[test]
fn ipip() {
    walk(&Row {
        name: "ipip",
        config: r#"{"Network":"10.100.0.0/16","Backend":{"Type":"ipip"}}"#,
        two_lans: true,
        carries: |_, _| 1480,
        device: Some("flannel.ipip"),
        flush: "ip route flush dev flannel.ipip",
        ability: Some(needs::IPIP),
        sample: &[Cause::Device],
        ..Row::usual()
    });
}

#[test]
fn ipsec() {
    let key = "0123456789abcdef".repeat(6);
    let config = format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"ipsec","PSK":"{key}"}}}}"#);
    walk(&Row {
        name: "ipsec",
        config: &config,
        // What is left of 1500 bytes in a tunnel of AES in GCM, in whole words.
        carries: |_, _| 1446,
        flush: "ip xfrm policy flush",
        ability: Some(needs::ESP),
        sample: &[Cause::Flush],
        ..Row::usual()
    });
}

fn walk(row: &Row<'_>) {
    let form = Form::now();
    let long = form == Form::Long;
    let plan = Lab::new("matrix").hosts(4).etcd();
    let plan = match row.ability {
        Some(ability) => plan.needs_kernel(ability),
        None => plan,
    };
    in_lab(if row.two_lans { plan.behind_router(&[3]) } else { plan }, |lab| {
        let mut cluster = Cluster::start(lab, row)?;
        let sampled =
            |cause: &Cause| row.sample.contains(cause) || [Cause::Join, Cause::Kill].contains(cause);
        for cause in ALL.iter().copied().filter(|cause| form != Form::Sample || sampled(cause)) {
            let possible = match cause {
                Cause::Device => row.device.is_some(),
                Cause::Mac => row.has_mac,
                _ => true,
            };
            // In the long form every host is the one it happens to, in the others the first and, for half, the third.
            let victims: &[usize] = match cause {
                _ if !possible => &[],
                Cause::Join | Cause::Leave | Cause::Switch | Cause::SwitchBack => &[4],
                _ if long => &[1, 2, 3],
                Cause::Kill | Cause::Flush | Cause::Flap => &[3],
                _ => &[1],
            };
            for victim in victims {
                cluster
                    .suffers(cause, *victim)
                    .with_context(|| format!("{}: {cause:?} of h{victim}", row.name))?;
            }
        }
        cluster.fits()
    });
}

struct Cluster<'a> {
    lab: &'a Lab,
    row: &'a Row<'a>,
    daemons: Vec<Flanneld>,
    pods: Vec<Pod>,
    mesh: Mesh,
    /// When the config was, if that was the cause.
    written: Option<f64>,
}

impl<'a> Cluster<'a> {
    fn start(lab: &'a Lab, row: &'a Row<'a>) -> Result<Self> {
        put_config(lab, row.config)?;
        let mut cluster =
            Self { lab, row, daemons: Vec::new(), pods: Vec::new(), mesh: Mesh::default(), written: None };
        for host in &lab.hosts()[..3] {
            cluster.daemons.push(Flanneld::start(lab, host)?);
        }
        for daemon in &cluster.daemons {
            let pod = Pod::new(daemon.host(), &daemon.ready()?, 2)?;
            // So that what does not fit is the path's to say, and not the pod's.
            pod.set_mtu(2000)?;
            cluster.pods.push(pod);
        }
        let places: Vec<(&dyn Place, Ipv4Addr)> =
            cluster.pods.iter().map(|pod| (pod as &dyn Place, pod.ip())).collect();
        cluster.mesh = Mesh::start(&places)?;
        cluster.mesh.recovers(now(), now(), deadline())?;
        cluster.fits()?;
        Ok(cluster)
    }

    /// Lets something happen to a host, and measures.
    fn suffers(&mut self, cause: Cause, victim: usize) -> Result<()> {
        let before = now();
        let envs = self.lab.hosts()[..3].iter().map(SubnetEnv::read).collect::<Result<Vec<_>>>()?;
        self.happens(cause, victim)?;
        let end = match cause {
            Cause::Restart | Cause::Kill => before,
            _ => self.written.unwrap_or_else(now),
        };
        let seen = self.mesh.recovers(before, end, deadline())?;
        eprintln!(
            "{:24} {:10} of h{victim}: everybody reaches everybody {:4} ms after its end, {:3} requests lost; slowest: {}",
            self.row.name,
            format!("{cause:?}"),
            seen.after.as_millis(),
            seen.lost,
            seen.slowest
        );
        let soon = if vm::is_inside() { SOON_EMULATED } else { SOON };
        ensure!(seen.after < soon, "{seen:?}");
        let allowed = match cause {
            Cause::Restart | Cause::Kill => self.row.restart_costs,
            // An emulated processor with too much to do loses some by itself.
            Cause::Join | Cause::Leave if vm::is_inside() => 10,
            Cause::Join | Cause::Leave => 0,
            _ => u32::MAX,
        };
        if allowed < u32::MAX {
            seen.outages.iter().for_each(|outage| eprintln!("    {outage}"));
        }
        ensure!(seen.lost <= allowed, "{seen:?}");
        for (host, env) in self.lab.hosts().iter().zip(envs) {
            ensure!(SubnetEnv::read(host)?.subnet() == env.subnet(), "{} has another subnet", host.name());
        }
        Ok(())
    }

    fn happens(&mut self, cause: Cause, victim: usize) -> Result<()> {
        self.written = None;
        let host = self.lab.host(victim);
        match cause {
            Cause::Join => self.join(host),
            Cause::Leave => self.leave(host),
            Cause::Restart | Cause::Kill => {
                let old = &self.daemons[victim - 1];
                match cause {
                    Cause::Kill => old.daemon().crash()?,
                    _ => drop(old.daemon().stop(secs(10))?),
                }
                self.daemons[victim - 1] = Flanneld::start(self.lab, host)?;
                self.daemons[victim - 1].ready().map(drop)
            }
            Cause::Flap => {
                self.readdress(host, host.ip(), "ip link set eth0 down; sleep 1; ip link set eth0 up")
            }
            Cause::Cable => {
                self.lab.link(host, false)?;
                eventually("no carrier", secs(5), || {
                    ensure!(host.out(&["ip", "link", "show", "eth0"])?.contains("NO-CARRIER"));
                    Ok(())
                })?;
                self.lab.link(host, true)
            }
            Cause::Flush => host.sh(self.row.flush).map(drop),
            Cause::Device => {
                host.sh(&format!("ip link del {}", self.row.device.unwrap_or_default())).map(drop)
            }
            Cause::Mac => {
                let device = self.row.device.unwrap_or_default();
                host.sh(&format!("ip link set {device} address 02:aa:aa:aa:aa:0{victim}")).map(drop)
            }
            Cause::Switch => self.switch(self.row.other),
            Cause::SwitchBack => self.switch(self.row.config),
            Cause::Move => {
                let [a, b, c, d] = host.ip().octets();
                let (old, new) = (host.ip(), Ipv4Addr::new(a, b, c, d + 100));
                let script = format!("ip addr del {old}/24 dev eth0; ip addr add {new}/24 brd + dev eth0");
                self.readdress(host, new, &script)
            }
        }
    }

    /// Over when it is written; what comes before everybody has heard of it tells nothing.
    fn switch(&mut self, config: &str) -> Result<()> {
        let heard = |daemon: &Flanneld| daemon.said("Found network config").len();
        let before: Vec<usize> = self.daemons.iter().map(heard).collect();
        put_config(self.lab, config)?;
        self.written = Some(now());
        eventually("everybody hears of it", SOON, || {
            self.daemons.iter().map(heard).zip(&before).all(|(now, before)| now > *before)
        })
    }

    /// What a network script does when an interface or its address changes: routes by the old one are gone.
    fn readdress(&self, host: &Host, ip: Ipv4Addr, script: &str) -> Result<()> {
        let [a, b, c, _] = ip.octets();
        let (v6, prefix) = (host.ip6(), if c == 0 { "fd77::" } else { "fd77:0:0:1::" });
        host.sh(&format!(
            "{script}; ip route replace default via {a}.{b}.{c}.1; ip addr replace {v6}/64 dev eth0 nodad; \
             ip -6 route replace default via {prefix}1"
        ))
        .map(drop)
    }

    fn join(&mut self, host: &Host) -> Result<()> {
        let daemon = Flanneld::start(self.lab, host)?;
        let pod = Pod::new(host, &daemon.ready()?, 2)?;
        pod.set_mtu(2000)?;
        for other in &self.pods {
            self.mesh.add(other, pod.ip())?;
            self.mesh.add(&pod, other.ip())?;
        }
        self.daemons.push(daemon);
        self.pods.push(pod);
        Ok(())
    }

    fn leave(&mut self, host: &Host) -> Result<()> {
        let (Some(daemon), Some(pod)) = (self.daemons.pop(), self.pods.pop()) else { return Ok(()) };
        let subnet = SubnetEnv::read(host)?.subnet();
        self.mesh.remove(&pod, pod.ip())?;
        daemon.daemon().stop(secs(10))?;
        let endpoints = format!("--etcd-endpoints={}", self.lab.etcd_endpoint());
        host.out(&["flanneld", &endpoints, "--cleanup"])?;
        for other in &self.lab.hosts()[..3] {
            eventually(format!("{} forgets it", other.name()), SOON, || {
                ensure!(
                    !other.out(&["ip", "route"])?.contains(&subnet),
                    "there is still a route to {subnet}"
                );
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The largest packet passes every way, and one byte more is answered with what would.
    fn fits(&self) -> Result<()> {
        for (i, from) in self.pods.iter().enumerate() {
            // What it has learnt of a path that was another.
            from.out(&["ip", "route", "flush", "cache"])?;
            for (j, to) in self.pods.iter().enumerate().filter(|(j, _)| *j != i) {
                let bytes = (self.row.carries)(i + 1, j + 1);
                let to = to.ip().to_string();
                let ping = |bytes: u32| {
                    let payload = (bytes - 28).to_string();
                    from.run(&["ping", "-n", "-M", "do", "-c", "1", "-W", "1", "-s", &payload, &to])
                };
                eventually(format!("{bytes} bytes pass from h{} to h{}", i + 1, j + 1), SOON, || {
                    let said = ping(bytes)?;
                    ensure!(said.ok(), "{said}");
                    Ok(())
                })?;
                eventually(format!("{bytes} bytes and one more are answered"), SOON, || {
                    let said = ping(bytes + 1)?;
                    let answers = [format!("(mtu = {bytes})"), format!("mtu={bytes}")];
                    ensure!(answers.iter().any(|answer| said.all().contains(answer)), "{said}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

fn deadline() -> Duration {
    if vm::is_inside() { DEADLINE_EMULATED } else { DEADLINE }
}
