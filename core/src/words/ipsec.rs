//! Tunnels that an IKE daemon keeps: what the ipsec backend wants beside facts of the kernel.
//!
//! The kernel's policies, which say that packets between two subnets are to be encrypted, are facts. Which keys they are
//! encrypted with is agreed between two charon daemons; what ours has to be told is here.
//! **Source** — upstream pkg/backend/ipsec (`handle_charon.go`); strongSwan's swanctl.conf(5).

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use super::addr::{Family, Prefix};
use super::secret::Secret;

/// `Backend` of type ipsec, with upstream's keys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IpsecConfig {
    /// `UDPEncap`: ESP in UDP always, also where no NAT is found.
    pub udp_encap: bool,
    /// `ESPProposal`, in strongSwan's words.
    pub esp_proposal: String,
    /// `PSK`, the same on every host.
    pub psk: Secret<String>,
}

impl IpsecConfig {
    /// Shortest key, in bytes, as upstream has it.
    pub const PSK_MIN: usize = 96;
    /// What the ESP packets are made with unless the config says otherwise.
    pub const ESP_PROPOSAL: &str = "aes128gcm16-sha256-prfsha256-ecp256";
}

/// The mark that our tunnels' policies and keys share in the kernel, as upstream has it.
pub const REQID: u32 = 11;

/// What charon should hold for a network.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Associations {
    /// How.
    pub config: IpsecConfig,
    /// Our public address.
    pub local: Ipv4Addr,
    /// Our subnet.
    pub own: Prefix,
    /// The peers' subnets, and the public addresses of their holders.
    pub peers: BTreeMap<Prefix, Ipv4Addr>,
}

impl Associations {
    /// One for each peer.
    pub fn connections(&self) -> impl Iterator<Item = Connection> {
        let (local, own) = (self.local, self.own);
        self.peers.iter().map(move |(subnet, remote)| Connection {
            local,
            own,
            subnet: *subnet,
            remote: *remote,
        })
    }
}

impl fmt::Display for Associations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let encap = if self.config.udp_encap { " encap" } else { "" };
        self.connections().try_for_each(|connection| {
            let Connection { local, own, subnet, remote } = connection;
            writeln!(
                f,
                "swanctl --load-conns: {connection} {local} ({own}) === {remote} ({subnet}) esp {}{encap}",
                self.config.esp_proposal
            )
        })
    }
}

/// A connection to one peer. Its name says all about it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Connection {
    /// Our public address.
    pub local: Ipv4Addr,
    /// Our subnet.
    pub own: Prefix,
    /// The peer's subnet.
    pub subnet: Prefix,
    /// The peer's public address.
    pub remote: Ipv4Addr,
}

impl Connection {
    /// Name of the part that carries packets.
    pub fn child(&self) -> String {
        format!("{}-{}", self.own, self.subnet)
    }

    /// Name of the key that both ends prove to have.
    pub fn key(&self) -> String {
        format!("{KEY}{self}")
    }

    /// Reads a connection's name; none if it is somebody else's.
    pub fn parse(name: &str) -> Option<Self> {
        let parts: Vec<&str> = name.split('-').collect();
        let [local, own, subnet, remote] = <[&str; 4]>::try_from(parts).ok()?;
        let subnets: [Prefix; 2] = [own.parse().ok()?, subnet.parse().ok()?];
        let [own, subnet] = subnets;
        let v4 = [own, subnet].iter().all(|prefix| prefix.family() == Family::V4);
        let connection = Self { local: local.parse().ok()?, own, subnet, remote: remote.parse().ok()? };
        v4.then_some(connection)
    }

    /// Reads a key's name; none if it is somebody else's.
    pub fn parse_key(name: &str) -> Option<Self> {
        Self::parse(name.strip_prefix(KEY)?)
    }
}

const KEY: &str = "flannel-";

/// Upstream's name.
impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}-{}", self.local, self.own, self.subnet, self.remote)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_upstreams_and_read_back() {
        let connection = Connection {
            local: [192, 0, 2, 1].into(),
            own: "10.100.5.0/24".parse().unwrap(),
            subnet: "10.100.9.0/24".parse().unwrap(),
            remote: [192, 0, 2, 9].into(),
        };
        let name = "192.0.2.1-10.100.5.0/24-10.100.9.0/24-192.0.2.9";
        assert_eq!(connection.to_string(), name);
        assert_eq!(connection.child(), "10.100.5.0/24-10.100.9.0/24");
        assert_eq!(Connection::parse(name), Some(connection));
        assert_eq!(Connection::parse_key(&connection.key()), Some(connection));
        for other in [
            "",
            "home-office",
            "192.0.2.1-10.100.5.0/24-10.100.9.0/24",
            "192.0.2.1-10.100.5.0/24-10.100.9.0/24-192.0.2.9-x",
            "192.0.2.1-10.100.5.7/24-10.100.9.0/24-192.0.2.9",
            "192.0.2.1-fd00::/64-10.100.9.0/24-192.0.2.9",
            "gw-10.100.5.0/24-10.100.9.0/24-192.0.2.9",
        ] {
            assert_eq!(Connection::parse(other), None, "{other}");
        }
        assert_eq!(Connection::parse_key(name), None);
    }

    #[test]
    fn the_key_is_not_shown() {
        let config = IpsecConfig {
            udp_encap: true,
            esp_proposal: IpsecConfig::ESP_PROPOSAL.into(),
            psk: Secret::new("hunter2".into()),
        };
        let associations = Associations {
            config,
            local: [192, 0, 2, 1].into(),
            own: "10.100.5.0/24".parse().unwrap(),
            peers: [("10.100.9.0/24".parse().unwrap(), [192, 0, 2, 9].into())].into(),
        };
        assert!(!format!("{associations:?} {associations}").contains("hunter2"));
    }
}
