//! Names with the rules of whoever reads them: the kernel's interfaces, our networks, the attachments.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::addr::Family;

/// What is wrong with a name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    /// The kernel refuses it (include/linux/netdevice.h `dev_valid_name`).
    #[error("{0:?} cannot name an interface: 1 to 15 bytes, not \".\" or \"..\", no slash, colon or space")]
    Link(String),
    /// Ours to refuse.
    #[error(
        "{0:?} cannot name a network: it must match [a-z0-9][a-z0-9_.-]{{0,40}} and be neither \"config\" nor begin with \"subnets\""
    )]
    Network(String),
}

/// Longest interface name, without the final NUL (IFNAMSIZ - 1).
const LINK_NAME_MAX: usize = 15;

/// The name of an interface, held inline: thousands of facts carry one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LinkName([u8; LINK_NAME_MAX + 1]);

impl LinkName {
    /// Checked by the kernel's rules.
    pub fn new(name: &str) -> Result<Self, NameError> {
        let bad = |b: u8| b == b'/' || b == b':' || b.is_ascii_whitespace() || b == 0;
        if name.is_empty()
            || name.len() > LINK_NAME_MAX
            || name == "."
            || name == ".."
            || name.bytes().any(bad)
        {
            return Err(NameError::Link(name.to_owned()));
        }
        let mut bytes = [0; LINK_NAME_MAX + 1];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self(bytes))
    }

    /// `lo`: the interface by which a host reaches itself.
    pub const fn loopback() -> Self {
        let mut bytes = [0; LINK_NAME_MAX + 1];
        bytes[0] = b'l';
        bytes[1] = b'o';
        Self(bytes)
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(LINK_NAME_MAX);
        // Built from a whole &str only, so this is UTF-8.
        std::str::from_utf8(&self.0[..end]).unwrap_or("?")
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for LinkName {
    type Err = NameError;
    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<String> for LinkName {
    type Error = NameError;
    fn try_from(name: String) -> Result<Self, NameError> {
        Self::new(&name)
    }
}

impl From<LinkName> for String {
    fn from(name: LinkName) -> Self {
        name.as_str().to_owned()
    }
}

/// The name of a flannel network on a host. The network that lives directly under the store prefix is called `default`.
///
/// A host may have several flanneld, each with a prefix and a subnet file of its own, and so several networks that live directly under a
/// prefix. The one of the standard subnet file is `default`; those of other files have names that begin with `_`, which no network
/// of a store has ([`Self::of_subnet_file`]). What is made on the host is called by these names, so nobody takes another's for his own.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetworkName(String);

impl NetworkName {
    const DEFAULT: &str = "default";
    const LEN_MAX: usize = 41;
    /// What the names of further flanneld's networks begin with.
    const FURTHER: char = '_';

    /// The network that every flannel cluster has.
    pub fn default_network() -> Self {
        Self(Self::DEFAULT.to_owned())
    }

    /// The network of the flanneld that writes this subnet file, given by its real path: `default` for the standard one, `_hostgw` for
    /// `/run/flannel/hostgw.env`. Any other file is called by what can be read of it and a hash of the whole.
    pub fn of_subnet_file(file: &Path) -> Self {
        const READABLE: usize = 16;
        if file == Path::new("/run/flannel/subnet.env") {
            return Self::default_network();
        }
        let shown = file.to_string_lossy();
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let standard = shown.strip_prefix("/run/flannel/").and_then(|name| name.strip_suffix(".env"));
        if let Some(stem) = standard
            && (1..=READABLE).contains(&stem.len())
            && stem.bytes().all(plain)
        {
            return Self(format!("{}{stem}", Self::FURTHER));
        }
        let stem = shown.trim_start_matches("/run/").trim_end_matches(".env").trim_end_matches("/subnet");
        let letters =
            stem.bytes().map(|b| b.to_ascii_lowercase()).map(|b| if plain(b) { b.into() } else { '-' });
        let letters: String = letters.collect();
        let readable = letters.get(letters.len().saturating_sub(READABLE)..).unwrap_or_default();
        let hash = fingerprint(file.as_os_str().as_encoded_bytes());
        Self(format!("{}{}-{}", Self::FURTHER, readable.trim_matches('-'), &hash[..7]))
    }

    /// Whether this is the network that lives directly under its store's prefix, which flanneld serves.
    pub fn is_default(&self) -> bool {
        self.is_first() || self.0.starts_with(Self::FURTHER)
    }

    /// Whether what is made on the host has upstream's names.
    fn is_first(&self) -> bool {
        self.0 == Self::DEFAULT
    }

    /// Checked: `config` and `subnets*` are keys of the default network in the store and cannot name another.
    pub fn new(name: &str) -> Result<Self, NameError> {
        let first = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let rest = |b: u8| first(b) || matches!(b, b'_' | b'.' | b'-');
        let shaped =
            name.len() <= Self::LEN_MAX && name.bytes().next().is_some_and(first) && name.bytes().all(rest);
        if !shaped || name == "config" || name.starts_with("subnets") {
            return Err(NameError::Network(name.to_owned()));
        }
        Ok(Self(name.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the network's ledger is called by whoever has no name for it: that of the configuration that every
    /// flannel cluster has (`cbr0` in kube-flannel.yml) for the default network, so that Go's plugins find it.
    pub fn ledger(&self) -> &str {
        if self.is_first() { "cbr0" } else { &self.0 }
    }

    /// The node's bridge of this network, when nobody chose another name: `cni0` for the default network, as every
    /// flannel node has it; `fl-NAME` while that fits an interface name, else `fl-` and a hash of the name.
    pub fn bridge(&self) -> LinkName {
        let name = match self.is_first() {
            true => "cni0".to_owned(),
            false if self.0.len() + 3 <= LINK_NAME_MAX => format!("fl-{}", self.0),
            false => format!("fl-{}", &fingerprint(self.0.as_bytes())[..12]),
        };
        // Built within the kernel's rules: NetworkName has none of the refused bytes.
        LinkName::new(&name).unwrap_or(LinkName([b'f'; LINK_NAME_MAX + 1]))
    }

    /// The TUN device of the udp backend: `flannel0` for the default network, as every flannel node has it; `flannel-` and a
    /// hash of the name for another.
    pub fn tunnel(&self) -> LinkName {
        let name = match self.is_first() {
            true => "flannel0".to_owned(),
            false => format!("flannel-{}", &fingerprint(self.0.as_bytes())[..7]),
        };
        LinkName::new(&name).unwrap_or(LinkName([b'f'; LINK_NAME_MAX + 1]))
    }

    /// The device of the ipip backend: `flannel.ipip` for every flanneld's network, as upstream has it: the kernel has room for one with
    /// the host's address, and that may be the one that Go's flanneld left. `flannel.` and a hash of the name for another.
    pub fn ipip(&self) -> LinkName {
        let name = match self.is_default() {
            true => "flannel.ipip".to_owned(),
            false => format!("flannel.{}", &fingerprint(self.0.as_bytes())[..7]),
        };
        LinkName::new(&name).unwrap_or(LinkName([b'f'; LINK_NAME_MAX + 1]))
    }

    /// The WireGuard device of a family, IPv4's where there is one for both: `flannel-wg` and `flannel-wg-v6` for every flanneld's
    /// network, as every flannel node has them: one that Go's flanneld left has the port. With a hash of the name for another.
    pub fn wireguard(&self, family: Family) -> LinkName {
        let name = match (self.is_default(), family) {
            (true, Family::V4) => "flannel-wg".to_owned(),
            (true, Family::V6) => "flannel-wg-v6".to_owned(),
            (false, Family::V4) => format!("fl-wg-{}", &fingerprint(self.0.as_bytes())[..7]),
            (false, Family::V6) => format!("fl-wg6-{}", &fingerprint(self.0.as_bytes())[..7]),
        };
        LinkName::new(&name).unwrap_or(LinkName([b'f'; LINK_NAME_MAX + 1]))
    }

    /// Name of the network's nftables table: `flannel` for the default network, `flannel-NAME` while that has at most
    /// 31 bytes, else `flannel-` and a hash of the name.
    pub fn table(&self) -> String {
        self.table_named("flannel")
    }

    /// Name of the nftables table of the network's endpoints: `flannel_endpoints`, and further as [`Self::table`]. No
    /// network's own table is called so, because of the underscore.
    pub fn endpoints_table(&self) -> String {
        self.table_named("flannel_endpoints")
    }

    /// Name of the nftables table that guards the network's tunnels: `flannel_tunnel`, and further as [`Self::table`].
    pub fn tunnel_table(&self) -> String {
        self.table_named("flannel_tunnel")
    }

    fn table_named(&self, first: &str) -> String {
        if self.is_first() { first.to_owned() } else { table_named(first, &self.0) }
    }
}

/// Name of an nftables table: `FIRST-NAME` while that has at most 31 bytes, else `FIRST-` and a hash of the name.
pub fn table_named(first: &str, name: &str) -> String {
    const TABLE_NAME_MAX: usize = 31;
    let room = TABLE_NAME_MAX - first.len() - 1;
    if name.len() <= room {
        return format!("{first}-{name}");
    }
    let hash = fingerprint(name.as_bytes());
    format!("{first}-{}", &hash[..room.min(hash.len())])
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for NetworkName {
    type Err = NameError;
    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<String> for NetworkName {
    type Error = NameError;
    fn try_from(name: String) -> Result<Self, NameError> {
        Self::new(&name)
    }
}

impl From<NetworkName> for String {
    fn from(name: NetworkName) -> Self {
        name.0
    }
}

/// The identity of an endpoint: a container (CNI container id, or `docker:` and a libnetwork endpoint id) and
/// the interface in it. CNI 1.1.0 calls this an attachment.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// Container id as the runtime gave it; Docker endpoints carry the prefix `docker:`, which no CNI id can have.
    pub container: String,
    /// Interface name inside the container.
    pub interface: String,
}

impl Attachment {
    /// Name of the host's end of the veth pair: `veth` and 11 hex digits. Derived, so a DEL needs no memory.
    pub fn host_link(&self, network: &str) -> LinkName {
        let text = format!("{network}\0{}\0{}", self.container, self.interface);
        let name = format!("veth{}", &fingerprint(text.as_bytes())[..11]);
        LinkName::new(&name).unwrap_or(LinkName([b'v'; LINK_NAME_MAX + 1]))
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container, self.interface)
    }
}

/// 16 hex digits of FNV-1a 64 (http://www.isthe.com/chongo/tech/comp/fnv/), finished with the murmur3 mixer so that
/// every prefix of the text is well spread. For names only, never for secrets.
pub(crate) fn fingerprint(bytes: &[u8]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    format!("{:016x}", hash ^ (hash >> 33))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_follow_the_kernel() {
        for wrong in ["", ".", "..", "a/b", "a:b", "a b", "0123456789abcdef"] {
            assert!(LinkName::new(wrong).is_err(), "{wrong}");
        }
        assert_eq!(LinkName::new("0123456789abcde").unwrap().as_str(), "0123456789abcde");
    }

    #[test]
    fn network_names_cannot_shadow_keys_of_the_default_network() {
        for wrong in ["", "config", "subnets", "subnets-old", "Web", "-web", "a/b", &"a".repeat(42)] {
            assert!(NetworkName::new(wrong).is_err(), "{wrong}");
        }
        assert_eq!(NetworkName::new("web").unwrap().bridge().as_str(), "fl-web");
        assert_eq!(NetworkName::default_network().bridge().as_str(), "cni0");
        assert_eq!(NetworkName::new("web").unwrap().table(), "flannel-web");
        assert_eq!(NetworkName::default_network().table(), "flannel");
        let [one, other] =
            ["1", "2"].map(|end| NetworkName::new(&format!("a-rather-long-network-name{end}")));
        let other = other.unwrap();
        assert_ne!(one.as_ref().unwrap().table(), other.table());
        assert_ne!(one.as_ref().unwrap().endpoints_table(), other.endpoints_table());
        let one = one.unwrap();
        assert_eq!((one.table().len(), one.endpoints_table().len()), (24, 31));
        assert_eq!(NetworkName::new("web").unwrap().endpoints_table(), "flannel_endpoints-web");
        assert_eq!(NetworkName::default_network().endpoints_table(), "flannel_endpoints");
        let long = NetworkName::new("a-rather-long-network-name").unwrap().bridge();
        assert!(long.as_str().starts_with("fl-") && long.as_str().len() == 15);
    }

    #[test]
    fn a_further_subnet_file_is_a_further_network() {
        let name = |file: &str| NetworkName::of_subnet_file(Path::new(file));
        assert_eq!(name("/run/flannel/subnet.env"), NetworkName::default_network());
        assert_eq!(name("/run/flannel/hostgw.env").as_str(), "_hostgw");
        let files = [
            "/run/flannel/hostgw.env",
            "/run/flannel/default.env",
            "/run/flannel-b/subnet.env",
            "/run/flannel/b/subnet.env",
            "/run/flannel/b-subnet.env",
            "/run/flannel/B-subnet.env",
            "/run/flannel/.env",
            "/run/flannel/subnet",
            "/a directory/with a rather long/name/\u{c4}\u{c4}\u{c4}\u{c4}\u{c4}\u{c4}\u{c4}/subnet.env",
            "relative.env",
        ];
        let names: std::collections::BTreeSet<_> = files.iter().map(|file| name(file)).collect();
        assert_eq!(names.len(), files.len(), "{names:?}");
        for name in &names {
            assert!(name.is_default() && *name != NetworkName::default_network(), "{name}");
            assert!(NetworkName::new(name.as_str()).is_err(), "{name} can be a network of a store");
            assert!(name.as_str().len() <= NetworkName::LEN_MAX, "{name}");
            let of = |network: &NetworkName| {
                ([network.bridge(), network.tunnel()], [network.table(), network.endpoints_table()])
            };
            let (own, first) = (of(name), of(&NetworkName::default_network()));
            assert!(own.0.iter().all(|link| !first.0.contains(link)));
            assert!(own.1.iter().all(|table| !first.1.contains(table)));
            // What is Go's is taken over, whatever its subnet file is called.
            assert_eq!(name.wireguard(Family::V4).to_string(), "flannel-wg");
            assert_eq!(name.ipip().to_string(), "flannel.ipip");
        }
        assert!(name("/run/flannel-b/subnet.env").as_str().starts_with("_flannel-b-"));
    }

    #[test]
    fn two_interfaces_of_one_container_get_two_veths() {
        let a = Attachment { container: "c1".into(), interface: "eth0".into() };
        let b = Attachment { container: "c1".into(), interface: "eth1".into() };
        assert_ne!(a.host_link("default"), b.host_link("default"));
        assert_ne!(a.host_link("default"), a.host_link("web"));
        assert_eq!(a.host_link("default").as_str().len(), 15);
    }
}
