//! The network config document, and the only door to a [`NetworkConfig`].
//!
//! **Shape** — a JSON object with upstream's keys (`Network`, `SubnetLen`, `SubnetMin`, `SubnetMax`, their `IPv6…`
//! twins, `EnableIPv4`, `EnableIPv6`, `EnableNFTables`, `Backend`), matched without regard to case; of a key given
//! twice the last one counts. Unknown keys are findings.
//! **Source** — upstream pkg/subnet/config.go `ParseConfig`, `CheckNetworkConfig`.

mod backend;
mod document;
mod extension;
mod ipsec;
mod wireguard;

use std::net::IpAddr;

use serde_json::json;

use self::document::Document;
use super::addr::{Family, Prefix};
use super::report::Finding;

pub use self::backend::{BackendConfig, IpipConfig, UdpConfig, VxlanConfig};
pub use self::wireguard::{WireguardConfig, WireguardMode};

/// Why a document cannot be used: what, where, and what to do.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not JSON.
    #[error("not valid JSON at line {line}, column {column}: {cause}")]
    Json {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser said.
        cause: String,
    },
    /// A key's value cannot be used.
    #[error("{key} at line {line}, column {column} is {found}: {cause}")]
    Value {
        /// The key, with its path.
        key: String,
        /// Line of the value, from 1.
        line: usize,
        /// Column of the value, from 1.
        column: usize,
        /// The value as written.
        found: String,
        /// What is wrong with it.
        cause: String,
    },
    /// A key that is needed is not there.
    #[error("{key} is missing: {cause}")]
    Missing {
        /// The key.
        key: &'static str,
        /// Why it is needed.
        cause: &'static str,
    },
}

/// A network's configuration, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetworkConfig {
    /// IPv4, unless `EnableIPv4` is false.
    pub v4: Option<Range>,
    /// IPv6, if `EnableIPv6` is true.
    pub v6: Option<Range>,
    /// `EnableNFTables`: the operator's wish for the firewall's kind.
    pub nftables: bool,
    /// How packets travel between the hosts.
    pub backend: BackendConfig,
}

/// One family's addresses and how they are cut into subnets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// All of them.
    pub cidr: Prefix,
    /// First subnet that may be leased; its length is the subnets' length.
    pub first: Prefix,
    /// Last subnet that may be leased.
    pub last: Prefix,
}

impl Range {
    /// Length of a subnet in bits.
    pub fn subnet_len(&self) -> u8 {
        self.first.len()
    }

    /// Whether a subnet is one of those that may be leased.
    pub fn allows(&self, subnet: &Prefix) -> bool {
        subnet.len() == self.subnet_len() && (self.first.base()..=self.last.base()).contains(&subnet.base())
    }
}

/// A document that was read, and what the operator should know of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parsed {
    /// What it says.
    pub config: NetworkConfig,
    /// Keys nobody reads, and the like.
    pub findings: Vec<Finding>,
}

const KEYS: &[&str] = &[
    "EnableIPv4",
    "EnableIPv6",
    "EnableNFTables",
    "Network",
    "IPv6Network",
    "SubnetLen",
    "IPv6SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    "Backend",
];
impl NetworkConfig {
    /// Reads and checks a document.
    pub fn parse(text: &str) -> Result<Parsed, ConfigError> {
        let document = Document::parse(text)?;
        let mut findings = document.unknown_keys(KEYS);
        let enable_v4 = document.get("EnableIPv4").map(|v| v.bool()).transpose()?.unwrap_or(true);
        let enable_v6 = document.get("EnableIPv6").map(|v| v.bool()).transpose()?.unwrap_or(false);
        if !enable_v4 && !enable_v6 {
            return Err(ConfigError::Missing {
                key: "EnableIPv4 or EnableIPv6",
                cause: "both are false, so there is nothing to lease",
            });
        }
        let config = Self {
            v4: if enable_v4 { Some(range(&document, &V4_KEYS)?) } else { None },
            v6: if enable_v6 { Some(range(&document, &V6_KEYS)?) } else { None },
            nftables: document.get("EnableNFTables").map(|v| v.bool()).transpose()?.unwrap_or(false),
            backend: backend::read(&document, &mut findings)?,
        };
        if config.v4.is_none() {
            let cause = match config.backend {
                BackendConfig::Udp(_) => Some("backend udp carries IPv4 only"),
                BackendConfig::Ipip(_) => Some("backend ipip carries IPv4 only"),
                BackendConfig::Ipsec(_) => Some("backend ipsec carries IPv4 only"),
                _ => None,
            };
            if let Some(cause) = cause {
                return Err(ConfigError::Missing { key: "Network", cause });
            }
        }
        if let BackendConfig::Wireguard(wireguard) = &config.backend {
            wireguard.check(&config)?;
        }
        Ok(Parsed { config, findings })
    }

    /// The range of a family.
    pub fn range(&self, family: Family) -> Option<&Range> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// The enabled families, IPv4 first.
    pub fn families(&self) -> Vec<Family> {
        Family::BOTH.into_iter().filter(|family| self.range(*family).is_some()).collect()
    }

    /// The CIDRs of the enabled families.
    pub fn cidrs(&self) -> impl Iterator<Item = Prefix> {
        self.v4.iter().chain(self.v6.iter()).map(|range| range.cidr)
    }

    /// A document that reads back as this configuration.
    pub fn to_json(&self) -> String {
        let mut document = serde_json::Map::new();
        if let Some(v4) = &self.v4 {
            put_range(&mut document, v4, &V4_KEYS);
        } else {
            document.insert("EnableIPv4".into(), json!(false));
        }
        if let Some(v6) = &self.v6 {
            document.insert("EnableIPv6".into(), json!(true));
            put_range(&mut document, v6, &V6_KEYS);
        }
        if self.nftables {
            document.insert("EnableNFTables".into(), json!(true));
        }
        document.insert("Backend".into(), backend::write(&self.backend).into());
        serde_json::Value::from(document).to_string()
    }

    /// The same for people: no secret is in it.
    pub fn shown(&self) -> String {
        let document = self.to_json();
        match self.backend.secret() {
            Some(secret) => document.replace(&secret, "[redacted]"),
            None => document,
        }
    }
}

fn put_range(document: &mut serde_json::Map<String, serde_json::Value>, range: &Range, keys: &FamilyKeys) {
    document.insert(keys.network.into(), json!(range.cidr.to_string()));
    document.insert(keys.len.into(), json!(range.subnet_len()));
    document.insert(keys.min.into(), json!(range.first.base().to_string()));
    document.insert(keys.max.into(), json!(range.last.base().to_string()));
}

/// A family's keys and limits: the same rules with other numbers.
struct FamilyKeys {
    family: Family,
    network: &'static str,
    len: &'static str,
    min: &'static str,
    max: &'static str,
    /// Longest subnet that may be asked for.
    len_max: u8,
    /// Longest network that gets a default subnet length.
    net_len_max: u8,
    /// The default subnet length, for networks up to two bits shorter.
    len_default: u8,
}

const V4_KEYS: FamilyKeys = FamilyKeys {
    family: Family::V4,
    network: "Network",
    len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
    len_max: 30,
    net_len_max: 28,
    len_default: 24,
};

const V6_KEYS: FamilyKeys = FamilyKeys {
    family: Family::V6,
    network: "IPv6Network",
    len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
    len_max: 126,
    net_len_max: 124,
    len_default: 64,
};

fn range(document: &Document<'_>, keys: &FamilyKeys) -> Result<Range, ConfigError> {
    let cidr = cidr(document, keys)?;
    let len = subnet_len(document, keys, cidr)?;
    let whole = |base: IpAddr| Prefix::containing(base, len).ok();
    // len > cidr.len(), so both exist.
    let (Some(base), Some(end)) = (whole(cidr.base()), whole(cidr.last())) else {
        return Err(ConfigError::Missing { key: keys.len, cause: "no subnet fits the network" });
    };
    let first = bound(document, keys, keys.min, cidr, len)?;
    let last = bound(document, keys, keys.max, cidr, len)?;
    let range =
        Range { cidr, first: first.or_else(|| base.step(1)).unwrap_or(base), last: last.unwrap_or(end) };
    match document.get(keys.max).or_else(|| document.get(keys.min)) {
        Some(value) if range.first > range.last => Err(value.error(format!(
            "{} {} is above {} {}",
            keys.min,
            range.first.base(),
            keys.max,
            range.last.base()
        ))),
        _ => Ok(range),
    }
}

fn cidr(document: &Document<'_>, keys: &FamilyKeys) -> Result<Prefix, ConfigError> {
    let needed = match keys.family {
        Family::V4 => "define the network, for example \"10.100.0.0/16\"",
        Family::V6 => "define the network, for example \"fd00:100::/48\"",
    };
    let Some(value) = document.get(keys.network) else {
        return Err(ConfigError::Missing { key: keys.network, cause: needed });
    };
    let text = value.string()?;
    let (address, len) = text
        .split_once('/')
        .and_then(|(a, l)| Some((a.parse::<IpAddr>().ok()?, l.parse::<u8>().ok()?)))
        .ok_or_else(|| value.error(needed))?;
    if Family::of(address) != keys.family {
        return Err(value.error(match keys.family {
            Family::V4 => "an IPv6 network; put it into IPv6Network and set EnableIPv6",
            Family::V6 => "an IPv4 network; put it into Network",
        }));
    }
    let cidr = Prefix::containing(address, len).map_err(|error| value.error(error))?;
    if cidr.is_default() {
        return Err(value.error(needed));
    }
    Ok(cidr)
}

fn subnet_len(document: &Document<'_>, keys: &FamilyKeys, cidr: Prefix) -> Result<u8, ConfigError> {
    if let Some(value) = document.get(keys.len)
        && value.number()? != 0
    {
        let len = value.number()?;
        if len > u64::from(keys.len_max) {
            return Err(value.error(format!("it must be less than /{}", keys.len_max + 1)));
        }
        if len < u64::from(cidr.len()) + 2 {
            return Err(value.error(format!(
                "the network {cidr} must hold at least four subnets: at least {}",
                cidr.len() + 2
            )));
        }
        return Ok(len as u8);
    }
    if cidr.len() > keys.net_len_max {
        let text = format!("the network is too small, the smallest useful one is a /{}", keys.net_len_max);
        return Err(document
            .get(keys.network)
            .map_or(ConfigError::Missing { key: keys.len, cause: "the network is too small" }, |value| {
                value.error(text)
            }));
    }
    Ok(keys.len_default.max(cidr.len() + 2))
}

fn bound(
    document: &Document<'_>,
    keys: &FamilyKeys,
    key: &str,
    cidr: Prefix,
    len: u8,
) -> Result<Option<Prefix>, ConfigError> {
    let Some(value) = document.get(key) else { return Ok(None) };
    let text = value.string()?;
    let address: IpAddr = text.parse().map_err(|_| value.error("an address was wanted, without a length"))?;
    if Family::of(address) != keys.family {
        return Err(value.error("of the wrong address family"));
    }
    if address.is_unspecified() {
        return Ok(None);
    }
    if !cidr.contains(address) {
        return Err(value.error(format!("not in the range of the network {cidr}")));
    }
    Prefix::new(address, len)
        .map(Some)
        .map_err(|_| value.error(format!("not on a {} boundary (/{len})", keys.len)))
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
