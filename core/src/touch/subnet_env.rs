//! `subnet.env`: what the agent tells everyone on the node about its lease. The format is upstream's, byte for byte
//! (pkg/subnet/subnet.go `WriteSubnetFile`); flannel's CNI plugin, Docker start-up scripts and people read it.

use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::whole_file;
use crate::words::addr::{Family, InterfaceAddress, Prefix};
use crate::words::units::Mtu;

/// Where flanneld writes it unless told otherwise.
pub const DEFAULT_PATH: &str = "/run/flannel/subnet.env";

/// Why the file could not be read, used or written.
#[derive(Debug, thiserror::Error)]
pub enum SubnetEnvError {
    /// It could not be opened or read.
    #[error("could not read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line has a key we know and a value nobody can use.
    #[error("{path} line {line}: {key} {reason}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The key.
        key: &'static str,
        /// What is wrong with its value.
        reason: String,
    },
    /// Keys that must be there are not. The text is upstream's.
    #[error("{path} is missing {names}")]
    Missing {
        /// The file.
        path: PathBuf,
        /// Their names, comma-separated.
        names: String,
    },
    /// It could not be written.
    #[error("could not write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl SubnetEnvError {
    /// Whether an agent that comes up would cure it: the file is not there, or not complete.
    fn may_pass(&self) -> bool {
        match self {
            Self::Read { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Line { .. } | Self::Missing { .. } => true,
            Self::Write { .. } => false,
        }
    }
}

/// Waits for something to happen to a file. Where the kernel cannot tell (a limit, a file system), it looks now and then.
struct Watch(Option<(Inotify, Epoll)>);

impl Watch {
    /// Longest pause: a link or an odd file system may hide what happens.
    const PAUSE_MAX: Duration = Duration::from_millis(100);

    fn new() -> Self {
        let make = || -> nix::Result<_> {
            let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            epoll.add(&inotify, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
            Ok((inotify, epoll))
        };
        Self(make().ok())
    }

    /// At the directory of the file, or the nearest one above that exists: at boot there is none.
    fn aim(&self, path: &Path) {
        let Some((inotify, _)) = &self.0 else { return };
        let what = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CLOSE_WRITE;
        let _ = path.ancestors().skip(1).find(|dir| inotify.add_watch(*dir, what).is_ok());
    }

    fn pause(&self, longest: Duration) {
        let pause = longest.min(Self::PAUSE_MAX);
        let Some((inotify, epoll)) = &self.0 else { return thread::sleep(pause) };
        let timeout =
            EpollTimeout::try_from(pause.max(Duration::from_millis(1))).unwrap_or(EpollTimeout::ZERO);
        match epoll.wait(&mut [EpollEvent::empty()], timeout) {
            // What it was does not matter.
            Ok(1..) => drop(inotify.read_events()),
            Ok(0) | Err(Errno::EINTR) => {}
            Err(_) => thread::sleep(pause),
        }
    }
}

/// The content of `subnet.env`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SubnetEnv {
    /// The flannel networks, IPv4 before IPv6. Usually one of a family; flannel 0.21 and 0.22 could write several.
    pub networks: Vec<Prefix>,
    /// This node's subnets as its bridge holds them (the first address), IPv4 before IPv6; at most one of a family.
    pub subnets: Vec<InterfaceAddress>,
    /// Largest packet a container may send.
    pub mtu: Mtu,
    /// True if the agent masquerades what leaves the network, so that nobody else has to.
    pub ip_masq: bool,
}

const NETWORK: &str = "FLANNEL_NETWORK";
const SUBNET: &str = "FLANNEL_SUBNET";
const NETWORK_V6: &str = "FLANNEL_IPV6_NETWORK";
const SUBNET_V6: &str = "FLANNEL_IPV6_SUBNET";
const MTU: &str = "FLANNEL_MTU";
const IP_MASQ: &str = "FLANNEL_IPMASQ";
const KEYS: [&str; 6] = [NETWORK, SUBNET, NETWORK_V6, SUBNET_V6, MTU, IP_MASQ];

impl SubnetEnv {
    /// Reads the file. Strict: unlike upstream's reader, a known key without a value is an error and not a crash.
    pub fn read(path: &Path) -> Result<Self, SubnetEnvError> {
        let text = fs::read_to_string(path)
            .map_err(|source| SubnetEnvError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Reads the file, and waits for it if there is nothing usable in it yet: an agent writes it when it has a lease. A file that is
    /// ready costs nothing more than [`read`](Self::read). The error is that of the last look.
    pub fn await_usable(path: &Path, patience: Duration) -> Result<Self, SubnetEnvError> {
        let first = Self::read(path);
        if !first.as_ref().is_err_and(SubnetEnvError::may_pass) {
            return first;
        }
        let deadline = Instant::now() + patience;
        let watch = Watch::new();
        loop {
            // Watched before the look: what happens after it wakes us.
            watch.aim(path);
            let found = Self::read(path);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !found.as_ref().is_err_and(SubnetEnvError::may_pass) {
                return found;
            }
            watch.pause(left);
        }
    }

    /// Reads a text; `path` is for messages only. Keys nobody knows are skipped, as upstream does.
    pub fn parse(text: &str, path: &Path) -> Result<Self, SubnetEnvError> {
        let mut found = Found::default();
        for (index, line) in text.lines().enumerate() {
            let (key, value) = match line.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (line, None),
            };
            let Some(key) = KEYS.into_iter().find(|known| *known == key) else { continue };
            let read =
                value.ok_or_else(|| "has no value".to_owned()).and_then(|value| found.take(key, value));
            read.map_err(|reason| SubnetEnvError::Line {
                path: path.to_owned(),
                line: index + 1,
                key,
                reason,
            })?;
        }
        found.finish(path)
    }

    /// The file's directory is made if need be; a reader sees the old content or the new one, never a part. Mode 0644
    /// whatever the umask.
    pub fn write(&self, path: &Path) -> Result<(), SubnetEnvError> {
        whole_file::write(path, self.to_string().as_bytes(), 0o644)
            .map_err(|source| SubnetEnvError::Write { path: path.to_owned(), source })
    }

    /// The network of a family, the first if there are several.
    pub fn network(&self, family: Family) -> Option<Prefix> {
        self.networks.iter().copied().find(|network| network.family() == family)
    }

    /// The node's subnet of a family.
    pub fn subnet(&self, family: Family) -> Option<InterfaceAddress> {
        self.subnets.iter().copied().find(|subnet| subnet.family() == family)
    }

    /// The gateways of the node's containers: the first address of each of its subnets.
    pub fn gateways(&self) -> Vec<InterfaceAddress> {
        let gateway = |own: &InterfaceAddress| InterfaceAddress::new(bridge_address(*own), own.len()).ok();
        self.subnets.iter().filter_map(gateway).collect()
    }

    /// The subnet this node had before, for the agent to ask for again: read as forgivingly as upstream does (dotenv syntax, and
    /// anything that is not exactly one subnet is none), because an unreadable wish must not keep an agent from starting.
    pub fn previous_subnet(path: &Path, family: Family) -> Option<Prefix> {
        let key = match family {
            Family::V4 => SUBNET,
            Family::V6 => SUBNET_V6,
        };
        let text = fs::read_to_string(path).ok()?;
        let value = text.lines().rev().find_map(|line| {
            let line = line.trim();
            let line = line.strip_prefix("export ").unwrap_or(line);
            let (name, value) = line.split_once('=')?;
            (name.trim() == key).then_some(value)
        })?;
        let value = value.split(" #").next().unwrap_or_default().trim().trim_matches(['"', '\'']);
        let mut subnets = value
            .split(',')
            .filter_map(|subnet| subnet.trim().parse::<InterfaceAddress>().ok())
            .filter(|subnet| subnet.family() == family);
        let first = subnets.next()?;
        subnets.next().is_none().then(|| first.prefix())
    }
}

#[derive(Default)]
struct Found {
    networks: Vec<Prefix>,
    subnets: Vec<InterfaceAddress>,
    mtu: Option<Mtu>,
    ip_masq: Option<bool>,
}

impl Found {
    fn take(&mut self, key: &'static str, value: &str) -> Result<(), String> {
        match key {
            NETWORK => self.networks(Family::V4, value),
            NETWORK_V6 => self.networks(Family::V6, value),
            SUBNET => self.subnet(Family::V4, value),
            SUBNET_V6 => self.subnet(Family::V6, value),
            MTU => {
                let bytes: u64 = value.parse().map_err(|_| format!("{value:?} is not a number"))?;
                self.mtu = Some(Mtu::new(bytes).map_err(|error| error.to_string())?);
                Ok(())
            }
            _ => {
                self.ip_masq = Some(value == "true");
                Ok(())
            }
        }
    }

    fn networks(&mut self, family: Family, value: &str) -> Result<(), String> {
        for text in value.split(',') {
            let network = cidr(family, text)?.prefix();
            if !self.networks.contains(&network) {
                self.networks.push(network);
            }
        }
        Ok(())
    }

    fn subnet(&mut self, family: Family, value: &str) -> Result<(), String> {
        let subnet = cidr(family, value)?;
        self.subnets.retain(|other| other.family() != family);
        self.subnets.push(subnet);
        Ok(())
    }

    fn finish(mut self, path: &Path) -> Result<SubnetEnv, SubnetEnvError> {
        let mut names = Vec::new();
        if self.networks.is_empty() {
            names.extend([NETWORK, NETWORK_V6]);
        }
        if self.subnets.is_empty() {
            names.extend([SUBNET, SUBNET_V6]);
        }
        if self.mtu.is_none() {
            names.push(MTU);
        }
        if self.ip_masq.is_none() {
            names.push(IP_MASQ);
        }
        match (self.mtu, self.ip_masq) {
            (Some(mtu), Some(ip_masq)) if names.is_empty() => {
                self.networks.sort_by_key(Prefix::family);
                self.subnets.sort_by_key(InterfaceAddress::family);
                Ok(SubnetEnv { networks: self.networks, subnets: self.subnets, mtu, ip_masq })
            }
            _ => Err(SubnetEnvError::Missing { path: path.to_owned(), names: names.join(", ") }),
        }
    }
}

fn cidr(family: Family, text: &str) -> Result<InterfaceAddress, String> {
    let cidr: InterfaceAddress = text.parse().map_err(|error| format!("{error}"))?;
    if cidr.family() != family {
        return Err(format!("{text:?} is of the wrong address family"));
    }
    Ok(cidr)
}

/// The file's exact text.
impl fmt::Display for SubnetEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (family, network, subnet) in [(Family::V4, NETWORK, SUBNET), (Family::V6, NETWORK_V6, SUBNET_V6)]
        {
            let networks: Vec<_> =
                self.networks.iter().filter(|n| n.family() == family).map(Prefix::to_string).collect();
            if !networks.is_empty() {
                writeln!(f, "{network}={}", networks.join(","))?;
            }
            if let Some(own) = self.subnet(family) {
                writeln!(f, "{subnet}={}/{}", bridge_address(own), own.len())?;
            }
        }
        writeln!(f, "{MTU}={}", self.mtu)?;
        writeln!(f, "{IP_MASQ}={}", self.ip_masq)
    }
}

/// The first address of the subnet, whatever address of it is given.
fn bridge_address(own: InterfaceAddress) -> IpAddr {
    own.prefix().nth(1).unwrap_or_else(|| own.address())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const BOTH: &str = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.29.1/24\nFLANNEL_IPV6_NETWORK=fd42:cafe::/48\n\
                        FLANNEL_IPV6_SUBNET=fd42:cafe:0:30::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

    fn parse(text: &str) -> Result<SubnetEnv, String> {
        SubnetEnv::parse(text, Path::new("/run/flannel/subnet.env")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_that_comes_later_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/flannel/subnet.env");
        let start = Instant::now();
        let error = SubnetEnv::await_usable(&path, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, SubnetEnvError::Read { .. }), "{error}");
        assert!(start.elapsed() >= Duration::from_millis(20));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| SubnetEnv::await_usable(&path, Duration::from_secs(60)));
            // The directories come, then a part of it as a careless writer leaves it, then all of it.
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_MTU").unwrap();
            thread::sleep(Duration::from_millis(20));
            let env = parse(BOTH).unwrap();
            env.write(&path).unwrap();
            assert_eq!(waiting.join().unwrap().unwrap(), env);
        });
        assert!(start.elapsed() < Duration::from_secs(50), "it was not woken");
    }

    #[test]
    fn what_no_agent_would_cure_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let start = Instant::now();
        // A directory.
        assert!(SubnetEnv::await_usable(dir.path(), Duration::from_secs(60)).is_err());
        assert!(start.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn what_is_written_is_upstreams_text_and_reads_back() {
        let env = parse(BOTH).unwrap();
        assert_eq!(env.to_string(), BOTH);
        assert_eq!(env.network(Family::V4), Some("10.5.0.0/16".parse().unwrap()));
        assert_eq!(env.subnet(Family::V6), Some("fd42:cafe:0:30::1/64".parse().unwrap()));
        assert!(env.ip_masq);
        let one = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.29.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";
        assert_eq!(parse(one).unwrap().to_string(), one);
    }

    #[test]
    fn what_is_missing_is_named_as_upstream_does() {
        assert_eq!(
            parse("").unwrap_err(),
            "/run/flannel/subnet.env is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, \
             FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ"
        );
        let no_mtu = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.29.1/24\nFLANNEL_IPMASQ=true\n";
        assert_eq!(parse(no_mtu).unwrap_err(), "/run/flannel/subnet.env is missing FLANNEL_MTU");
    }

    #[test]
    fn a_broken_line_is_named_and_never_a_panic() {
        for (line, reason) in [
            ("FLANNEL_MTU", "line 1: FLANNEL_MTU has no value"),
            ("FLANNEL_MTU=", "FLANNEL_MTU \"\" is not a number"),
            ("FLANNEL_MTU=12", "FLANNEL_MTU MTU 12 is outside 68..=65535"),
            (
                "FLANNEL_SUBNET=10.5.29.1",
                "FLANNEL_SUBNET \"10.5.29.1\" is not an address with a prefix length",
            ),
            ("FLANNEL_NETWORK=10.5.0.0/16,x", "FLANNEL_NETWORK \"x\""),
            ("FLANNEL_NETWORK=fd00::/48", "wrong address family"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(reason), "{line}: {error}");
        }
    }

    #[test]
    fn lists_and_unknown_lines_are_read_as_upstream_reads_them() {
        let env = parse(
            "# by hand\nOTHER\nFLANNEL_NETWORK=10.5.0.0/16,10.6.0.0/16,10.5.0.0/16\nFLANNEL_SUBNET=10.5.29.7/24\n\
             FLANNEL_MTU=1450\nFLANNEL_IPMASQ=True\n",
        )
        .unwrap();
        assert_eq!(env.networks.len(), 2);
        assert!(!env.ip_masq, "only the exact word counts");
        assert!(env.to_string().contains("FLANNEL_SUBNET=10.5.29.1/24\n"));
    }

    #[test]
    fn the_previous_subnet_is_read_forgivingly() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            SubnetEnv::previous_subnet(&path, Family::V4).map(|subnet| subnet.to_string())
        };
        assert_eq!(read("FLANNEL_SUBNET=10.5.29.1/24\n").as_deref(), Some("10.5.29.0/24"));
        assert_eq!(read("export FLANNEL_SUBNET=\"10.5.29.1/24\" # mine\n").as_deref(), Some("10.5.29.0/24"));
        assert_eq!(read("FLANNEL_SUBNET=x,10.5.29.1/24\n").as_deref(), Some("10.5.29.0/24"));
        assert_eq!(read("FLANNEL_SUBNET=10.5.28.1/24,10.5.29.1/24\n"), None);
        assert_eq!(read("FLANNEL_SUBNET\n"), None);
        assert_eq!(SubnetEnv::previous_subnet(&dir.path().join("absent"), Family::V4), None);
    }

    #[test]
    fn writing_replaces_the_file_at_once_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/subnet.env");
        let env = parse(BOTH).unwrap();
        env.write(&path).unwrap();
        env.write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), BOTH);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let error = env.write(&path.join("below")).unwrap_err();
        assert!(
            error.to_string().contains("could not write") && error.to_string().contains("below"),
            "{error}"
        );
    }
}
