//! Leases, with flannel's exact keys and values in the store.
//!
//! Upstream: pkg/lease/lease.go (`LeaseAttrs`), pkg/subnet/subnet.go (`MakeSubnetKey`, `ParseSubnetKey`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::addr::{AddrError, Family, Prefix};
use super::report::Finding;

/// Why a key of the store is no lease.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyError {
    /// Not of the form at all.
    #[error("{0:?} is no subnet key (like 10.100.5.0-24 or 10.100.5.0-24&fd42:cafe:0:30::-64)")]
    Shape(String),
    /// Address or length is wrong.
    #[error("{key:?} is no subnet key")]
    Address {
        /// The key.
        key: String,
        /// What is wrong with it.
        source: AddrError,
    },
    /// Upstream keeps the length in 5 (7) bits.
    #[error("{key:?} has a prefix of {len} bits, which other flannel nodes cannot read")]
    TooLong {
        /// The key.
        key: String,
        /// Length found.
        len: u8,
    },
}

/// The subnets of one lease: IPv4, IPv6 or both. In the store it is the key: `10.100.5.0-24`,
/// `10.100.5.0-24&fd42:cafe:0:30::-64`, or `0.0.0.0-0&fd42:cafe:0:30::-64` without IPv4.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Subnets {
    v4: Option<Prefix>,
    v6: Option<Prefix>,
}

impl Subnets {
    /// Only IPv4.
    pub const fn v4_only(subnet: Prefix) -> Self {
        Self { v4: Some(subnet), v6: None }
    }

    /// Of one family only.
    pub fn of_one(subnet: Prefix) -> Self {
        match subnet.family() {
            Family::V4 => Self { v4: Some(subnet), v6: None },
            Family::V6 => Self { v4: None, v6: Some(subnet) },
        }
    }

    /// One per family; none if neither is given or a prefix is of the wrong family.
    pub fn new(v4: Option<Prefix>, v6: Option<Prefix>) -> Option<Self> {
        let right =
            v4.is_none_or(|p| p.family() == Family::V4) && v6.is_none_or(|p| p.family() == Family::V6);
        (right && (v4.is_some() || v6.is_some())).then_some(Self { v4, v6 })
    }

    /// The IPv4 subnet.
    pub const fn v4(&self) -> Option<Prefix> {
        self.v4
    }

    /// The IPv6 subnet.
    pub const fn v6(&self) -> Option<Prefix> {
        self.v6
    }

    /// The subnet of a family.
    pub const fn of(&self, family: Family) -> Option<Prefix> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    /// Whether the two share an address.
    pub fn overlap(&self, other: &Self) -> bool {
        let both =
            |a: Option<Prefix>, b: Option<Prefix>| matches!((a, b), (Some(a), Some(b)) if a.overlaps(&b));
        both(self.v4, other.v4) || both(self.v6, other.v6)
    }

    /// What of these is not of the others: none if that is nothing.
    pub fn without(&self, others: &Self) -> Option<Self> {
        let left = |ours: Option<Prefix>, theirs: Option<Prefix>| ours.filter(|_| ours != theirs);
        Self::new(left(self.v4, others.v4), left(self.v6, others.v6))
    }

    /// The last part of the key in the store.
    pub fn key(&self) -> String {
        let v4 = match self.v4 {
            Some(subnet) => format!("{}-{}", subnet.base(), subnet.len()),
            None => "0.0.0.0-0".to_owned(),
        };
        match self.v6 {
            Some(subnet) => format!("{v4}&{}-{}", subnet.base(), subnet.len()),
            None => v4,
        }
    }

    /// Reads the last part of a key. Host bits are masked off, as upstream's readers do with the network they build.
    pub fn parse_key(key: &str) -> Result<Self, KeyError> {
        let shape = || KeyError::Shape(key.to_owned());
        let (v4, v6) = match key.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (key, None),
        };
        let v4 = parse_part(key, v4, Family::V4)?;
        let v6 = v6.map(|v6| parse_part(key, v6, Family::V6)).transpose()?;
        let v4 = (!(v4.is_default() && v6.is_some())).then_some(v4);
        if v4.is_some_and(|v4| v4.is_default()) {
            return Err(shape());
        }
        Self::new(v4, v6.filter(|v6| !v6.is_default())).ok_or_else(shape)
    }
}

fn parse_part(key: &str, part: &str, family: Family) -> Result<Prefix, KeyError> {
    let shape = || KeyError::Shape(key.to_owned());
    let (address, len) = part.rsplit_once('-').ok_or_else(shape)?;
    if len.is_empty()
        || !len.bytes().all(|b| b.is_ascii_digit())
        || address.bytes().any(|b| b.is_ascii_uppercase())
    {
        return Err(shape());
    }
    let len: u8 = len.parse().map_err(|_| shape())?;
    let address: IpAddr = match family {
        Family::V4 => address.parse::<Ipv4Addr>().map_err(|_| shape())?.into(),
        Family::V6 => address.parse::<Ipv6Addr>().map_err(|_| shape())?.into(),
    };
    if len >= family.bits() {
        return Err(KeyError::TooLong { key: key.to_owned(), len });
    }
    Prefix::containing(address, len).map_err(|source| KeyError::Address { key: key.to_owned(), source })
}

impl fmt::Display for Subnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.v4, self.v6) {
            (Some(v4), Some(v6)) => write!(f, "{v4} {v6}"),
            (Some(one), None) | (None, Some(one)) => write!(f, "{one}"),
            (None, None) => Ok(()),
        }
    }
}

impl FromStr for Subnets {
    type Err = KeyError;
    fn from_str(key: &str) -> Result<Self, KeyError> {
        Self::parse_key(key)
    }
}

/// What a backend tells its peers, per family: the `BackendData` of the lease.
#[derive(Clone, Debug, Default)]
pub struct Advertisement {
    /// `BackendType`; empty for backends that advertise nothing at all (udp, alloc).
    pub backend: String,
    /// `BackendData`, raw.
    pub data: Option<Box<RawValue>>,
    /// `BackendV6Data`, raw.
    pub v6_data: Option<Box<RawValue>>,
}

impl PartialEq for Advertisement {
    fn eq(&self, other: &Self) -> bool {
        fn text(data: &Option<Box<RawValue>>) -> Option<&str> {
            data.as_deref().map(RawValue::get)
        }
        self.backend == other.backend
            && text(&self.data) == text(&other.data)
            && text(&self.v6_data) == text(&other.v6_data)
    }
}

impl Eq for Advertisement {}

/// The value of a lease: how to reach its holder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LeaseValue {
    /// `PublicIP`; unspecified when the holder has no IPv4.
    pub public_ip: Ipv4Addr,
    /// `PublicIPv6`.
    pub public_ipv6: Option<Ipv6Addr>,
    /// What its backend needs.
    pub advertisement: Advertisement,
}

/// Field names and order as upstream emits them; a missing field is omitted, except `PublicIPv6`.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(rename = "PublicIP")]
    public_ip: Ipv4Addr,
    #[serde(rename = "PublicIPv6")]
    public_ipv6: Option<Ipv6Addr>,
    #[serde(rename = "BackendType", skip_serializing_if = "str::is_empty")]
    backend: &'a str,
    #[serde(rename = "BackendData", skip_serializing_if = "Option::is_none")]
    data: &'a Option<Box<RawValue>>,
    #[serde(rename = "BackendV6Data", skip_serializing_if = "Option::is_none")]
    v6_data: &'a Option<Box<RawValue>>,
}

/// Why a value is no lease.
#[derive(Debug, thiserror::Error)]
pub enum ValueError {
    /// Not JSON, or not an object.
    #[error("the value is not a JSON object")]
    Json(#[from] serde_json::Error),
    /// A field cannot be used.
    #[error("{field} is {found}, wanted {wanted}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// What is there.
        found: String,
        /// What should be.
        wanted: &'static str,
    },
}

impl LeaseValue {
    /// The public address of a family, if there is one.
    pub fn public(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => (!self.public_ip.is_unspecified()).then_some(self.public_ip.into()),
            Family::V6 => self.public_ipv6.map(Into::into),
        }
    }

    /// The value as the store holds it.
    pub fn to_json(&self) -> String {
        let written = Written {
            public_ip: self.public_ip,
            public_ipv6: self.public_ipv6,
            backend: &self.advertisement.backend,
            data: &self.advertisement.data,
            v6_data: &self.advertisement.v6_data,
        };
        // A struct of strings, addresses and already valid JSON always serializes.
        serde_json::to_string(&written).unwrap_or_default()
    }

    /// Reads a value as upstream's Go does: keys in any case, unknown keys ignored, a missing `PublicIP` is 0.0.0.0.
    pub fn from_json(text: &str) -> Result<Self, ValueError> {
        let fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(text)?;
        let raw = |name: &str| {
            fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
        };
        let present = |name: &str| raw(name).filter(|value| value.get() != "null").cloned();
        Ok(Self {
            public_ip: match raw("PublicIP") {
                None => Ipv4Addr::UNSPECIFIED,
                Some(value) => v4(value.get())?,
            },
            public_ipv6: present("PublicIPv6").map(|value| v6(value.get())).transpose()?,
            advertisement: Advertisement {
                backend: present("BackendType")
                    .map(|value| string(value.get()))
                    .transpose()?
                    .unwrap_or_default(),
                data: present("BackendData"),
                v6_data: present("BackendV6Data"),
            },
        })
    }
}

fn field(name: &'static str, found: &str, wanted: &'static str) -> ValueError {
    ValueError::Field { field: name, found: found.to_owned(), wanted }
}

fn v4(json: &str) -> Result<Ipv4Addr, ValueError> {
    let wrong = || field("PublicIP", json, "an IPv4 address");
    let Ok(Value::String(text)) = serde_json::from_str(json) else { return Err(wrong()) };
    match text.parse::<IpAddr>().map_err(|_| wrong())? {
        IpAddr::V4(v4) => Ok(v4),
        IpAddr::V6(v6) => v6.to_ipv4_mapped().ok_or_else(wrong),
    }
}

fn v6(json: &str) -> Result<Ipv6Addr, ValueError> {
    let wrong = || field("PublicIPv6", json, "an IPv6 address or null");
    let Ok(Value::String(text)) = serde_json::from_str(json) else { return Err(wrong()) };
    text.parse().map_err(|_| wrong())
}

fn string(json: &str) -> Result<String, ValueError> {
    match serde_json::from_str(json) {
        Ok(Value::String(text)) => Ok(text),
        _ => Err(field("BackendType", json, "a string")),
    }
}

/// A peer's lease: somebody else's claim on a part of the network.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lease {
    /// Which part.
    pub subnets: Subnets,
    /// How to reach the holder.
    pub value: LeaseValue,
}

/// Our own lease. Not interchangeable with a peer's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnLease {
    /// Our part of the network.
    pub subnets: Subnets,
    /// What we tell our peers.
    pub value: LeaseValue,
}

/// Every lease of a network at one moment, ours included, by subnets; and what was wrong with other keys there.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LeaseSet {
    /// The leases. Values are shared among the sets that hold them: the next set has thousands in common with the one before.
    pub leases: BTreeMap<Subnets, Arc<LeaseValue>>,
    /// Subnets that a key takes away from everybody without being a lease that could be taken over: its value cannot be
    /// read, or the key is not written as we write it.
    pub blocked: BTreeSet<Subnets>,
    /// Keys that are no leases: each is one finding, and the others are still leases.
    pub findings: Vec<Finding>,
}

impl LeaseSet {
    /// Everybody's but ours.
    pub fn peers<'a>(&'a self, own: &'a Subnets) -> impl Iterator<Item = (&'a Subnets, &'a LeaseValue)> {
        self.leases
            .iter()
            .map(|(subnets, value)| (subnets, &**value))
            .filter(move |(subnets, _)| *subnets != own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(json: &str) -> LeaseValue {
        LeaseValue::from_json(json).unwrap()
    }

    #[test]
    fn keys_are_upstreams() {
        for key in ["10.12.13.0-24", "10.12.13.0-24&fd00:12:13::-56", "0.0.0.0-0&fd42:cafe:0:30::-64"] {
            assert_eq!(Subnets::parse_key(key).unwrap().key(), key);
        }
        for wrong in [
            "10",
            "10.12.13.0",
            "10.12.13-24",
            "10.12.13.300-24",
            "10.12.13.0-24hi",
            "&2001::-56",
            "10.12.13.0-24&:12:13:-56",
            "10.12.13.0-24&20011::-56",
            "10.12.13.0-24&2001-56",
            "10.12.13.0-24&2001::",
            "10.12.13.0-24&2001::-56hi",
            "10.12.13.0-24&FD00::-56",
            "10.12.13.0-32",
            "0.0.0.0-0",
            "10.1.2.0--24",
            "",
        ] {
            assert!(Subnets::parse_key(wrong).is_err(), "{wrong}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_a_panic(
            text in r#"(\{|\}|,|"PublicIP":|"PublicIPv6":|"BackendType":|"BackendData":|"BackendV6Data":|null|7|"1\.2\.3\.4"|"fd00::1"|"x"|\[|\PC){0,12}"#,
            key in "[0-9.]{0,16}-?[0-9]{0,3}(&[0-9a-f:]{0,20}-?[0-9]{0,4})?|\\PC*",
        ) {
            if let Ok(value) = LeaseValue::from_json(&text) {
                proptest::prop_assert_eq!(LeaseValue::from_json(&value.to_json()).ok(), Some(value));
            }
            if let Ok(subnets) = Subnets::parse_key(&key) {
                proptest::prop_assert_eq!(Subnets::parse_key(&subnets.key()).ok(), Some(subnets));
            }
        }
    }

    #[test]
    fn values_are_upstreams_byte_for_byte() {
        for json in [
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#,
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"host-gw"}"#,
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"76:e6:39:1b:26:de"}}"#,
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":"fd00::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"76:e6:39:1b:26:de"},"BackendV6Data":{"VNI":1,"VtepMAC":"76:e6:39:1b:26:df"}}"#,
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"extension","BackendData":"some text"}"#,
        ] {
            assert_eq!(value(json).to_json(), json);
        }
    }

    #[test]
    fn values_are_read_as_go_reads_them() {
        assert_eq!(
            value(r#"{"publicip":"1.2.3.4","Extra":1,"BackendData":null}"#).public_ip.to_string(),
            "1.2.3.4"
        );
        assert_eq!(value("{}").public_ip, Ipv4Addr::UNSPECIFIED);
        assert_eq!(value(r#"{"PublicIP":"::ffff:1.2.3.4"}"#).public_ip.to_string(), "1.2.3.4");
        for wrong in [r#"{"PublicIP":null}"#, r#"{"PublicIP":7}"#, r#"{"PublicIP":"fd00::1"}"#, "[]", "", "{"]
        {
            assert!(LeaseValue::from_json(wrong).is_err(), "{wrong}");
        }
    }
}
