//! The ports of this host that endpoints hold: who has which, and what another asks for.
//!
//! In memory only; the journal has each endpoint's ports, and a start begins with those. What is asked costs what was asked for,
//! not what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flannel_core::act::hostports;
use flannel_core::touch::world::kernel::Netfilter;
use flannel_core::words::addr::Family;
use flannel_core::words::exposure::{PublishedPort, Transport};
use flannel_core::words::name::NetworkName;

use crate::port_socket::keep;
use crate::wire::PortBinding;

/// Why ports are not given. The texts follow Docker's own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortError {
    /// Neither TCP nor UDP nor SCTP.
    #[error(
        "protocol {proto} of container port {port} has no ports that could be published: tcp, udp and sctp have"
    )]
    Protocol {
        /// Number.
        proto: u8,
        /// In the container.
        port: u16,
    },
    /// What stands before the host's port is no address.
    #[error("-p {given}:…: {given:?} is no IP address of this host")]
    Address {
        /// As given.
        given: String,
    },
    /// The container has no address of that family.
    #[error(
        "-p {given}: the container has no {missing} address to lead to: publish on an address of the other family, or on none (-p HOSTPORT:PORT)"
    )]
    Family {
        /// As given.
        given: String,
        /// The family it lacks.
        missing: &'static str,
    },
    /// Another endpoint has it.
    #[error(
        "Bind for {at} failed: port is already allocated: {holder}: stop that container, or publish another port of this host"
    )]
    Held {
        /// What was wanted.
        at: SocketAddr,
        /// Who has it.
        holder: Box<Holder>,
    },
    /// A container of another runtime has it, by the CNI plugin.
    #[error(
        "Bind for {at} failed: port is already allocated: a container that CNI put on this host has it ({holder}): stop that container, or publish another port of this host"
    )]
    HeldByCni {
        /// What was wanted.
        at: SocketAddr,
        /// Network, container and interface.
        holder: String,
    },
    /// A program of this host has it.
    #[error(
        "Bind for {at} failed: a program of this host uses {protocol} port {port}; `ss -lnp 'sport = :{port}'` shows it: stop it, or publish another port",
        port = at.port()
    )]
    Busy {
        /// What was wanted.
        at: SocketAddr,
        /// Protocol.
        protocol: Transport,
    },
    /// The system does not let us.
    #[error("Bind for {at}/{protocol} failed")]
    Bind {
        /// What was wanted.
        at: SocketAddr,
        /// Protocol.
        protocol: Transport,
        /// What it said.
        source: io::Error,
    },
    /// None of several is free.
    #[error("no {protocol} port from {first} to {last} is free on this host")]
    NoneFree {
        /// Protocol.
        protocol: Transport,
        /// Lowest tried.
        first: u16,
        /// Highest tried.
        last: u16,
    },
}

/// Who has a port.
#[derive(Debug)]
pub(crate) struct Holder {
    port: PublishedPort,
    network: NetworkName,
    endpoint: String,
}

impl Holder {
    /// Endpoint id.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { port, network, endpoint } = self;
        let (at, short) = (at(port), endpoint.get(..12).unwrap_or(endpoint));
        let (protocol, address) = (port.protocol, port.address);
        write!(
            f,
            "{at}/{protocol} leads to container {address} on flannel network {network} (endpoint {short})"
        )
    }
}

impl PortError {
    /// Whether another port may do.
    fn concerns_one_port(&self) -> bool {
        matches!(self, Self::Held { .. } | Self::HeldByCni { .. } | Self::Busy { .. })
    }
}

/// Who asks for ports.
#[derive(Clone, Debug)]
pub(crate) struct Asker<'a> {
    /// Endpoint id.
    pub(crate) endpoint: &'a str,
    /// The flannel network it is on.
    pub(crate) network: &'a NetworkName,
    /// Its addresses.
    pub(crate) addresses: &'a [IpAddr],
    /// Where ports without an address are published; none for everywhere.
    pub(crate) binding: Option<IpAddr>,
}

/// A port that an endpoint holds.
struct Claim {
    endpoint: String,
    network: NetworkName,
    port: PublishedPort,
    /// Kept, not used. None where none was to be had: at a start that is no reason to break what works.
    socket: Option<OwnedFd>,
}

#[derive(Default)]
struct Held {
    by_port: BTreeMap<(Transport, u16), Vec<Claim>>,
    by_endpoint: BTreeMap<String, BTreeSet<(Transport, u16)>>,
    /// The next port to try for whom any will do.
    next: u16,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Ports {
    held: Mutex<Held>,
}

impl Ports {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an endpoint held before this start. A port that a program has taken meanwhile stays published.
    pub(crate) fn restore(&self, endpoint: &str, network: &NetworkName, ports: &BTreeSet<PublishedPort>) {
        let mut held = self.lock();
        for port in ports {
            let socket = keep(port.protocol, at(port)).unwrap_or_else(|error| {
                tracing::warn!(%endpoint, "{port} stays published, but the port cannot be kept from programs of this host: {error}");
                None
            });
            let (endpoint, network) = (endpoint.to_owned(), network.clone());
            held.put(Claim { endpoint, network, port: *port, socket });
        }
    }

    /// Gives an endpoint what it asks for, in the place of what it had. All or nothing: on failure it keeps what it had.
    pub(crate) fn replace(
        &self,
        asker: &Asker<'_>,
        wanted: &[PortBinding],
    ) -> Result<BTreeSet<PublishedPort>, PortError> {
        let mut held = self.lock();
        let before = held.take(asker.endpoint);
        let given = held.give(asker, wanted, &before);
        if given.is_err() {
            held.take(asker.endpoint);
            before.into_iter().for_each(|claim| held.put(claim));
        }
        given
    }

    /// Takes back what an endpoint got, for what it had.
    pub(crate) fn restore_only(&self, endpoint: &str, network: &NetworkName, had: &BTreeSet<PublishedPort>) {
        self.release(endpoint);
        self.restore(endpoint, network, had);
    }

    /// An endpoint needs none any more.
    pub(crate) fn release(&self, endpoint: &str) {
        self.lock().take(endpoint);
    }

    /// Releases those of endpoints for which nothing holds.
    pub(crate) fn retain(&self, holds: impl Fn(&str) -> bool) {
        let mut held = self.lock();
        let gone: Vec<String> =
            held.by_endpoint.keys().filter(|endpoint| !holds(endpoint)).cloned().collect();
        for endpoint in gone {
            held.take(&endpoint);
        }
    }
}

impl Held {
    fn put(&mut self, claim: Claim) {
        let key = (claim.port.protocol, claim.port.host_port);
        self.by_endpoint.entry(claim.endpoint.clone()).or_default().insert(key);
        self.by_port.entry(key).or_default().push(claim);
    }

    /// Takes everything that an endpoint has.
    fn take(&mut self, endpoint: &str) -> Vec<Claim> {
        let mut taken = Vec::new();
        for key in self.by_endpoint.remove(endpoint).unwrap_or_default() {
            let Some(claims) = self.by_port.get_mut(&key) else { continue };
            taken.extend(claims.extract_if(.., |claim| claim.endpoint == endpoint));
            if claims.is_empty() {
                self.by_port.remove(&key);
            }
        }
        taken
    }

    fn give(
        &mut self,
        asker: &Asker<'_>,
        wanted: &[PortBinding],
        before: &[Claim],
    ) -> Result<BTreeSet<PublishedPort>, PortError> {
        let mut given = BTreeSet::new();
        for binding in wanted {
            let places = places(asker, binding)?;
            given.extend(self.give_one(asker, binding, &places, before)?);
        }
        Ok(given)
    }

    /// One port, on as many addresses as it takes, and on the same port of each.
    fn give_one(
        &mut self,
        asker: &Asker<'_>,
        binding: &PortBinding,
        places: &[PublishedPort],
        before: &[Claim],
    ) -> Result<Vec<PublishedPort>, PortError> {
        let Some(protocol) = places.first().map(|place| place.protocol) else { return Ok(Vec::new()) };
        let candidates = self.candidates(binding, places, before);
        let (first, last) = (candidates.first().copied(), candidates.last().copied());
        for port in &candidates {
            match self.give_at(asker, places, *port, before) {
                Ok(given) => {
                    if binding.host_port == 0 {
                        self.next = port.wrapping_add(1);
                    }
                    return Ok(given);
                }
                Err(error) if candidates.len() > 1 && error.concerns_one_port() => {}
                Err(error) => return Err(error),
            }
        }
        Err(PortError::NoneFree {
            protocol,
            first: first.unwrap_or_default(),
            last: last.unwrap_or_default(),
        })
    }

    /// The ports that may be tried, in order.
    fn candidates(&self, binding: &PortBinding, places: &[PublishedPort], before: &[Claim]) -> Vec<u16> {
        if binding.host_port != 0 {
            return (binding.host_port..=binding.host_port_end.max(binding.host_port)).collect();
        }
        // Asked again, an endpoint gets what it had.
        let had = before.iter().map(|claim| claim.port).find(|had| {
            places.iter().any(|place| PublishedPort { host_port: had.host_port, ..*place } == *had)
        });
        let (low, high) = ephemeral();
        let start = if (low..=high).contains(&self.next) { self.next } else { low };
        had.map(|port| port.host_port).into_iter().chain(start..=high).chain(low..start).collect()
    }

    fn give_at(
        &mut self,
        asker: &Asker<'_>,
        places: &[PublishedPort],
        host_port: u16,
        before: &[Claim],
    ) -> Result<Vec<PublishedPort>, PortError> {
        let mut claims = Vec::new();
        for place in places {
            let port = PublishedPort { host_port, ..*place };
            claims.push(self.claim(asker, port, before)?);
        }
        let given = claims.iter().map(|claim| claim.port).collect();
        claims.into_iter().for_each(|claim| self.put(claim));
        Ok(given)
    }

    fn claim(&self, asker: &Asker<'_>, port: PublishedPort, before: &[Claim]) -> Result<Claim, PortError> {
        let (at, protocol) = (at(&port), port.protocol);
        let others = self.by_port.get(&(protocol, port.host_port));
        if let Some(holder) = others.into_iter().flatten().find(|claim| claim.port.clashes(&port)) {
            let (network, endpoint) = (holder.network.clone(), holder.endpoint.clone());
            let holder = Box::new(Holder { port: holder.port, network, endpoint });
            return Err(PortError::Held { at, holder });
        }
        let same = |claim: &&Claim| claim.port.clashes(&port) && self::at(&claim.port) == at;
        let socket = match before.iter().find(same).and_then(|claim| claim.socket.as_ref()) {
            Some(socket) => socket.try_clone().map(Some),
            None => match cni_holder(&port) {
                Some(holder) => return Err(PortError::HeldByCni { at, holder }),
                None => keep(protocol, at),
            },
        };
        let socket = socket.map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => PortError::Busy { at, protocol },
            _ => PortError::Bind { at, protocol, source },
        })?;
        let (endpoint, network) = (asker.endpoint.to_owned(), asker.network.clone());
        Ok(Claim { endpoint, network, port, socket })
    }
}

/// CNI's ports are in the packet filter only. Where that cannot be looked at, nobody can have put anything there.
fn cni_holder(port: &PublishedPort) -> Option<String> {
    let mut filter = Netfilter::open().ok()?;
    hostports::holder(&mut filter, port).ok().flatten()
}

/// Where one `-p` is published, without the host's port: once for each family that is meant and that the container has.
fn places(asker: &Asker<'_>, binding: &PortBinding) -> Result<Vec<PublishedPort>, PortError> {
    let protocol = Transport::of(binding.proto)
        .ok_or(PortError::Protocol { proto: binding.proto, port: binding.port })?;
    let asked = match binding.host_ip.as_str() {
        "" => asker.binding,
        given => Some(given.parse::<IpAddr>().map_err(|_| PortError::Address { given: given.to_owned() })?),
    };
    let meant = |address: &&IpAddr| asked.is_none_or(|asked| Family::of(asked) == Family::of(**address));
    let places: Vec<PublishedPort> = asker
        .addresses
        .iter()
        .filter(meant)
        .map(|address| PublishedPort {
            protocol,
            host_ip: asked.filter(|asked| !asked.is_unspecified()),
            host_port: 0,
            address: *address,
            port: binding.port,
        })
        .collect();
    match asked {
        Some(asked) if places.is_empty() => {
            let missing = if asked.is_ipv4() { "IPv4" } else { "IPv6" };
            Err(PortError::Family { given: SocketAddr::new(asked, binding.host_port).to_string(), missing })
        }
        _ => Ok(places),
    }
}

/// The address and port of this host.
fn at(port: &PublishedPort) -> SocketAddr {
    let any = match port.family() {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::from([0; 16]),
    };
    SocketAddr::new(port.host_ip.unwrap_or(any), port.host_port)
}

/// The ports that the kernel gives to whom any will do; its default if it does not say.
fn ephemeral() -> (u16, u16) {
    const DEFAULT: (u16, u16) = (32768, 60999);
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_ascii_whitespace().map(str::parse::<u16>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(low)), Some(Ok(high))) if 0 < low && low <= high => (low, high),
        _ => DEFAULT,
    }
}
