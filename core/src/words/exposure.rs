//! Who reaches an endpoint of this node, and whom it reaches, where that is not what every endpoint of the network has.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::addr::Family;

/// What the packet filter must know of a network's endpoints on this node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Exposure {
    /// Ports of this host that lead into containers.
    pub published: BTreeSet<PublishedPort>,
    /// Endpoints without a way out of the network: neither to the world, nor to other networks, nor to this host's other
    /// addresses, and back as little.
    pub internal: BTreeSet<IpAddr>,
    /// Endpoints that no container of the network may call, here or elsewhere; published ports of theirs excepted.
    pub closed: BTreeSet<IpAddr>,
    /// Endpoints whose traffic to the outside keeps its source.
    pub unmasqueraded: BTreeSet<IpAddr>,
}

impl Exposure {
    /// Whether every endpoint is as every endpoint of a network is.
    pub fn is_empty(&self) -> bool {
        self.published.is_empty()
            && self.internal.is_empty()
            && self.closed.is_empty()
            && self.unmasqueraded.is_empty()
    }
}

/// A port of this host that leads into a container. Prints as `0.0.0.0:8080->10.100.5.2:80/tcp`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Protocol.
    pub protocol: Transport,
    /// The address of this host that it is published on; none for all of the container's family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// The port there.
    pub host_port: u16,
    /// The container's address.
    pub address: IpAddr,
    /// The port there.
    pub port: u16,
}

impl PublishedPort {
    /// The family it is published in.
    pub fn family(&self) -> Family {
        Family::of(self.address)
    }

    /// Whether the two want the same packets: the same port and protocol, on the same address or on all of them.
    pub fn clashes(&self, other: &Self) -> bool {
        let apart = matches!((self.host_ip, other.host_ip), (Some(a), Some(b)) if a != b);
        self.protocol == other.protocol
            && self.host_port == other.host_port
            && self.family() == other.family()
            && !apart
    }
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let any = match self.family() {
            Family::V4 => IpAddr::from([0; 4]),
            Family::V6 => IpAddr::from([0; 16]),
        };
        let host = std::net::SocketAddr::new(self.host_ip.unwrap_or(any), self.host_port);
        let container = std::net::SocketAddr::new(self.address, self.port);
        write!(f, "{host}->{container}/{}", self.protocol)
    }
}

/// A transport protocol with ports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// `tcp`
    Tcp,
    /// `udp`
    Udp,
    /// `sctp`
    Sctp,
}

impl Transport {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The number in an IP header (IANA protocol numbers).
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The protocol with this number.
    pub fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.number() == number)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host_ip: Option<&str>, host_port: u16, address: &str) -> PublishedPort {
        PublishedPort {
            protocol: Transport::Tcp,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port,
            address: address.parse().unwrap(),
            port: 80,
        }
    }

    #[test]
    fn a_port_prints_as_docker_shows_it() {
        assert_eq!(port(None, 8080, "10.100.5.2").to_string(), "0.0.0.0:8080->10.100.5.2:80/tcp");
        assert_eq!(port(Some("127.0.0.1"), 81, "10.1.1.2").to_string(), "127.0.0.1:81->10.1.1.2:80/tcp");
        assert_eq!(port(None, 8080, "fd00::2").to_string(), "[::]:8080->[fd00::2]:80/tcp");
    }

    #[test]
    fn ports_clash_where_a_packet_could_belong_to_both() {
        let everywhere = port(None, 80, "10.1.1.2");
        let here = port(Some("192.0.2.1"), 80, "10.1.1.3");
        assert!(everywhere.clashes(&here) && here.clashes(&everywhere) && here.clashes(&here));
        assert!(!here.clashes(&port(Some("192.0.2.2"), 80, "10.1.1.3")));
        assert!(!everywhere.clashes(&port(None, 81, "10.1.1.2")));
        assert!(!everywhere.clashes(&port(None, 80, "fd00::2")));
        let udp = PublishedPort { protocol: Transport::Udp, ..everywhere };
        assert!(!everywhere.clashes(&udp));
    }

    #[test]
    fn a_port_survives_its_record() {
        for port in [port(None, 80, "10.1.1.2"), port(Some("::1"), 80, "fd00::2")] {
            let text = serde_json::to_string(&port).unwrap();
            assert_eq!(serde_json::from_str::<PublishedPort>(&text).unwrap(), port, "{text}");
        }
    }
}
