//! Cables: every node has a veth pair to the switch, made from inside the switch's namespace straight into the node, so
//! nothing of a lab ever appears in the machine's own namespace.

use std::fmt::Write as _;
use std::io::{Seek, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::command::{self, COMMAND_DEADLINE};
use crate::host::Host;
use crate::probe::eventually;

/// How long the kernel may take to notice that a cable is plugged in at both ends.
const CARRIER_DEADLINE: Duration = Duration::from_secs(10);

/// A segment: one bridge of the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lan {
    /// 10.77.0.0/24, fd77::/64
    A,
    /// 10.77.1.0/24, fd77:0:0:1::/64, behind the router
    B,
    /// 198.51.100.0/24, 2001:db8:51::/64: the world outside, which knows no container network
    Outside,
    /// 10.11.12.0/24, fd77:0:0:2::/64: a second link that all hosts have, without a router
    Second,
}

impl Lan {
    pub(super) fn ip(self, last: u8) -> Ipv4Addr {
        match self {
            Self::A => Ipv4Addr::new(10, 77, 0, last),
            Self::B => Ipv4Addr::new(10, 77, 1, last),
            Self::Outside => Ipv4Addr::new(198, 51, 100, last),
            Self::Second => Ipv4Addr::new(10, 11, 12, last),
        }
    }

    pub(super) fn ip6(self, last: u8) -> Ipv6Addr {
        let last = u16::from(last);
        match self {
            Self::A => Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, last),
            Self::B => Ipv6Addr::new(0xfd77, 0, 0, 1, 0, 0, 0, last),
            Self::Outside => Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, last),
            Self::Second => Ipv6Addr::new(0xfd77, 0, 0, 2, 0, 0, 0, last),
        }
    }

    fn bridge(self) -> &'static str {
        match self {
            Self::A => "lan-a",
            Self::B => "lan-b",
            Self::Outside => "lan-out",
            Self::Second => "lan-second",
        }
    }
}

/// One cable: `host`'s interface `link` on `lan` with the address `last`.
pub(super) struct Cable<'a> {
    pub(super) host: &'a Host,
    pub(super) link: &'a str,
    pub(super) lan: Lan,
    pub(super) last: u8,
    /// The router of the segment (`.1`) is its default gateway.
    pub(super) default_route: bool,
}

/// The switch's end of the cable of a host.
pub(super) fn port(host: &str, link: &str) -> String {
    if link == "eth0" { format!("p-{host}") } else { format!("p-{host}-{link}") }
}

/// Plugs all cables in.
pub(super) fn connect(switch: &Host, mtu: u32, cables: &[Cable<'_>]) -> Result<()> {
    let mut batch = String::new();
    for lan in [Lan::A, Lan::B, Lan::Outside, Lan::Second] {
        if cables.iter().any(|c| c.lan == lan) {
            writeln!(batch, "link add {} type bridge mcast_snooping 0", lan.bridge())?;
            writeln!(batch, "link set {} mtu {mtu} up", lan.bridge())?;
        }
    }
    for cable in cables {
        let (port, bridge, pid) = (port(cable.host.name(), cable.link), cable.lan.bridge(), cable.host.pid());
        writeln!(
            batch,
            "link add {port} mtu {mtu} type veth peer name {} mtu {mtu} netns {pid}",
            cable.link
        )?;
        writeln!(batch, "link set {port} master {bridge} up")?;
    }
    // A switch has no opinion about what it carries: no addresses, no firewall (bridge-nf-call exists once br_netfilter is loaded).
    switch.sh("cd /proc/sys/net; for f in ipv6/conf/all/disable_ipv6 ipv6/conf/default/disable_ipv6; do \
           [ ! -e $f ] || echo 1 > $f; done; \
         for f in bridge/bridge-nf-call-*; do [ ! -e $f ] || echo 0 > $f; done")?;
    ip_batch(switch, &batch)?;
    thread::scope(|scope| {
        let runs: Vec<_> = cables.iter().map(|cable| scope.spawn(move || address(cable))).collect();
        runs.into_iter()
            .try_for_each(|run| run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Gives the host's end of a cable its addresses and routes.
pub(super) fn address(cable: &Cable<'_>) -> Result<()> {
    let Cable { host, link, lan, last, default_route } = cable;
    let mut batch = format!("addr add {}/24 brd + dev {link}\n", lan.ip(*last));
    writeln!(batch, "addr add {}/64 dev {link} nodad", lan.ip6(*last))?;
    writeln!(batch, "link set {link} up")?;
    if *default_route {
        writeln!(batch, "route add default via {}", lan.ip(1))?;
        writeln!(batch, "route add default via {}", lan.ip6(1))?;
    }
    ip_batch(host, &batch)?;
    // The kernel notices the other end's carrier a moment later; until then there is neither a link-local address nor a path.
    let state = format!("/sys/class/net/{link}/operstate");
    eventually(format!("{} of {} is up", link, host.name()), CARRIER_DEADLINE, || {
        let state = host.read(&state)?;
        ensure!(state.trim() == "up", "it is {}", state.trim());
        Ok(())
    })
}

/// `ip -batch` in the node's network namespace only: peers are named by the machine's pids, so /proc must be the machine's.
fn ip_batch(host: &Host, batch: &str) -> Result<()> {
    let mut input = tempfile::tempfile().context("could not make a temporary file")?;
    input.write_all(batch.as_bytes())?;
    input.rewind()?;
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", host.netns().display()))
        .args(["ip", "-batch", "-"])
        .stdin(Stdio::from(input));
    command::run(&mut command, &format!("{}: ip -batch\n{batch}", host.name()), COMMAND_DEADLINE)?
        .text()
        .map(|_| ())
}
