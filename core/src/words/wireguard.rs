//! WireGuard: its keys, and what a device and its peers are told.
//!
//! **Source** — <https://www.wireguard.com/papers/wireguard.pdf>; uapi/linux/wireguard.h.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::addr::Prefix;
use super::name::LinkName;
use super::secret::Secret;
use super::units::{Mtu, Port};

/// Bytes of a key of any kind.
pub const KEY_BYTES: usize = 32;

/// A key that nobody may see: a device's own, or one that two peers share beforehand.
pub type SecretKey = Secret<[u8; KEY_BYTES]>;

/// A text that is no key. It does not repeat the text, which may be a secret.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a WireGuard key: 32 bytes in base64 were wanted, as `wg genkey` prints them")]
pub struct KeyError;

/// Reads a secret key. What stands around it does not count: files end in a newline.
pub fn secret_key(text: &str) -> Result<SecretKey, KeyError> {
    bytes(text.trim()).map(Secret::new)
}

/// A key as files hold it.
pub fn key_text(key: &[u8; KEY_BYTES]) -> String {
    STANDARD.encode(key)
}

fn bytes(text: &str) -> Result<[u8; KEY_BYTES], KeyError> {
    STANDARD.decode(text).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(KeyError)
}

/// What a peer is known by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; KEY_BYTES]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&key_text(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        bytes(text).map(Self)
    }
}

/// A node's own keys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyPair {
    /// Never leaves the host.
    pub secret: SecretKey,
    /// What peers know us by.
    pub public: PublicKey,
}

/// What a WireGuard device is told about itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WireguardDevice {
    /// The device.
    pub link: LinkName,
    /// Its own key.
    pub key: SecretKey,
    /// Where it listens.
    pub port: Port,
}

/// A peer of a WireGuard device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WireguardPeer {
    /// The device.
    pub link: LinkName,
    /// Who it is.
    pub key: PublicKey,
    /// What both know beforehand.
    pub shared: Option<SecretKey>,
    /// Where it is.
    pub endpoint: Option<SocketAddr>,
    /// Wherever it has gone to since it was told is right, too: a peer may speak from another address than its lease names.
    pub roams: bool,
    /// Something is sent to it so often, in seconds; 0 is never.
    pub keepalive: u16,
    /// What it may send from, and is sent to it.
    pub allowed: BTreeSet<Prefix>,
}

impl WireguardPeer {
    /// Whether a peer that was seen is as this one should be.
    pub fn satisfied_by(&self, have: &Self) -> bool {
        self.link == have.link
            && self.key == have.key
            && self.shared == have.shared
            && self.keepalive == have.keepalive
            && self.allowed == have.allowed
            && self.is_at(have.endpoint)
    }

    /// Whether it may be reached there.
    pub fn is_at(&self, endpoint: Option<SocketAddr>) -> bool {
        self.endpoint.is_none() || self.endpoint == endpoint || (self.roams && endpoint.is_some())
    }
}

impl fmt::Display for WireguardDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wg set {} listen-port {} private-key /dev/stdin", self.link, self.port)
    }
}

impl fmt::Display for WireguardPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wg set {} peer {}", self.link, self.key)?;
        if self.shared.is_some() {
            f.write_str(" preshared-key /dev/stdin")?;
        }
        if let Some(endpoint) = self.endpoint {
            write!(f, " endpoint {endpoint}")?;
        }
        if self.keepalive > 0 {
            write!(f, " persistent-keepalive {}", self.keepalive)?;
        }
        let allowed: Vec<_> = self.allowed.iter().map(ToString::to_string).collect();
        write!(f, " allowed-ips {}", allowed.join(","))
    }
}

/// A WireGuard device that this program itself is, where the kernel has none: a TUN device of the same name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WireguardTunnel {
    /// What the device is told.
    pub device: WireguardDevice,
    /// Its IPv4 address, if it has one: the source of ICMP errors.
    pub address: Option<Ipv4Addr>,
    /// Largest inner packet.
    pub mtu: Mtu,
    /// Its peers.
    pub peers: Vec<WireguardPeer>,
}

impl fmt::Display for WireguardTunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ip tuntap add {} mode tun; {}", self.device.link, self.device)?;
        self.peers.iter().try_for_each(|peer| writeln!(f, "{peer}"))
    }
}

/// Whether an address is one that only its own site knows: RFC 1918, or unique local (RFC 4193).
pub fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_private(),
        IpAddr::V6(v6) => v6.is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=";

    fn peer(endpoint: Option<&str>) -> WireguardPeer {
        WireguardPeer {
            link: LinkName::new("flannel-wg").unwrap(),
            key: PublicKey([7; 32]),
            shared: Some(secret_key(TEXT).unwrap()),
            endpoint: endpoint.map(|endpoint| endpoint.parse().unwrap()),
            roams: false,
            keepalive: 25,
            allowed: BTreeSet::from([
                "10.100.2.0/24".parse().unwrap(),
                "fd42:cafe:0:1::/64".parse().unwrap(),
            ]),
        }
    }

    #[test]
    fn keys_are_those_of_wg() {
        let key: PublicKey = TEXT.parse().unwrap();
        assert_eq!((key.0[0], key.0[31], key.to_string().as_str()), (0xab, 0x90, TEXT));
        assert_eq!(secret_key(&format!(" {TEXT}\n")).unwrap().reveal(), &key.0);
        for wrong in ["", "abc", &TEXT[..43], &TEXT[4..], &format!("{TEXT}AAAA"), "!", "q83vEjRWeJA="] {
            assert_eq!(wrong.parse::<PublicKey>(), Err(KeyError), "{wrong}");
            assert!(!wrong.is_empty() || secret_key(wrong).is_err());
        }
    }

    #[test]
    fn no_secret_is_printed() {
        let device = WireguardDevice {
            link: LinkName::new("flannel-wg").unwrap(),
            key: secret_key(TEXT).unwrap(),
            port: Port::WIREGUARD,
        };
        let (mtu, peers) = (Mtu::new(1420).unwrap(), vec![peer(Some("192.0.2.1:51820"))]);
        let tunnel = WireguardTunnel { device, address: None, mtu, peers };
        let pair = KeyPair { secret: secret_key(TEXT).unwrap(), public: PublicKey([1; 32]) };
        for text in [format!("{tunnel}"), format!("{tunnel:?} {pair:?} {:?}", KeyError), KeyError.to_string()]
        {
            assert!(!text.contains(&TEXT[..8]) && !text.contains("171, 205"), "{text}");
        }
        assert_eq!(
            tunnel.to_string(),
            "ip tuntap add flannel-wg mode tun; wg set flannel-wg listen-port 51820 private-key /dev/stdin\n\
             wg set flannel-wg peer BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc= preshared-key /dev/stdin \
             endpoint 192.0.2.1:51820 persistent-keepalive 25 allowed-ips 10.100.2.0/24,fd42:cafe:0:1::/64\n"
        );
    }

    #[test]
    fn a_peer_may_roam_once_it_was_told_where_it_is() {
        let (want, elsewhere) = (peer(Some("192.0.2.1:51820")), peer(Some("192.0.2.9:1024")));
        assert!(want.satisfied_by(&want) && !want.satisfied_by(&elsewhere));
        let roams = WireguardPeer { roams: true, ..want.clone() };
        assert!(roams.satisfied_by(&elsewhere) && roams.satisfied_by(&want));
        // One that was made anew without an endpoint is told again.
        assert!(!roams.satisfied_by(&peer(None)));
        assert!(!roams.satisfied_by(&WireguardPeer { keepalive: 0, ..elsewhere }));
        assert!(!roams.satisfied_by(&WireguardPeer { shared: None, ..want }));
    }
}
