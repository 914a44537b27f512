//! What a `docker network create` says about the flannel network it wants: pure, no store and no clock.
//!
//! Only `--subnet`, `--ip-range` and `--ipam-opt` reach the IPAM half of a plugin, and they reach it before anything
//! else does, so they say it all.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};

use flannel_core::words::addr::{Family, Prefix};
use flannel_core::words::config::{BackendConfig, ConfigError, NetworkConfig, Range};
use flannel_core::words::name::{NameError, NetworkName};
use flannel_core::words::units::Vni;

/// What is taken when nothing is configured and nobody says anything.
pub(crate) const FALLBACK_CIDR: &str = "10.244.0.0/16";

/// An `--ipam-opt`, where its value goes in the config document, and how it is written there.
struct Known {
    option: &'static str,
    within: Within,
    key: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Within {
    Document,
    Backend,
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Number,
    Switch,
    V6Cidr,
}

const KNOWN: &[Known] = &[
    Known { option: "backend", within: Within::Backend, key: "Type", kind: Kind::Text },
    Known { option: "vni", within: Within::Backend, key: "VNI", kind: Kind::Number },
    Known { option: "port", within: Within::Backend, key: "Port", kind: Kind::Number },
    Known { option: "mtu", within: Within::Backend, key: "MTU", kind: Kind::Number },
    Known { option: "direct-routing", within: Within::Backend, key: "DirectRouting", kind: Kind::Switch },
    Known { option: "subnet-len", within: Within::Document, key: "SubnetLen", kind: Kind::Number },
    Known { option: "subnet-min", within: Within::Document, key: "SubnetMin", kind: Kind::Text },
    Known { option: "subnet-max", within: Within::Document, key: "SubnetMax", kind: Kind::Text },
    Known { option: IPV6_NETWORK, within: Within::Document, key: "IPv6Network", kind: Kind::V6Cidr },
    Known { option: "ipv6-subnet-len", within: Within::Document, key: "IPv6SubnetLen", kind: Kind::Number },
    Known { option: "ipv6-subnet-min", within: Within::Document, key: "IPv6SubnetMin", kind: Kind::Text },
    Known { option: "ipv6-subnet-max", within: Within::Document, key: "IPv6SubnetMax", kind: Kind::Text },
];

/// The IPv6 CIDR of a network with both families: the call that defines a network is the one for IPv4, and of IPv6 only
/// options reach it.
pub(crate) const IPV6_NETWORK: &str = "ipv6-network";

/// Why a wish cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum WishError {
    /// `--subnet` is no network of the family.
    #[error("--subnet {given}: {cause}")]
    Subnet {
        /// As typed.
        given: String,
        /// What is wrong.
        cause: String,
    },
    /// An option nobody knows.
    #[error("--ipam-opt {0}: unknown; known are network, {known}", known = known_options())]
    Option(String),
    /// An option's value is of the wrong kind.
    #[error("--ipam-opt {option}={value}: {wanted} was wanted")]
    Value {
        /// The option.
        option: String,
        /// Its value.
        value: String,
        /// What was expected.
        wanted: &'static str,
    },
    /// `--ipam-opt network=` names nothing.
    #[error("--ipam-opt network=…")]
    Network(#[from] NameError),
}

fn known_options() -> String {
    KNOWN.iter().map(|known| known.option).collect::<Vec<_>>().join(", ")
}

/// What was asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Wish {
    /// `--ipam-opt network=`
    pub(crate) network: Option<NetworkName>,
    /// `--subnet`: a whole flannel network.
    pub(crate) cidr: Option<Prefix>,
    /// The same of IPv6, where the call is for that.
    pub(crate) cidr_v6: Option<Prefix>,
    /// The options that define a network, as typed.
    options: BTreeMap<String, String>,
}

impl Wish {
    /// A network as it is; the default one, if none is named.
    pub(crate) fn of(network: Option<NetworkName>) -> Self {
        Self { network, ..Self::default() }
    }

    /// Reads what a RequestPool carries; there is one for each family.
    pub(crate) fn read(
        subnet: &str,
        family: Family,
        options: &BTreeMap<String, String>,
    ) -> Result<Self, WishError> {
        let mut wish = Self::default();
        if !subnet.is_empty() {
            let wrong = |cause: String| WishError::Subnet { given: subnet.to_owned(), cause };
            let cidr: Prefix = subnet.parse().map_err(|error| wrong(format!("{error}")))?;
            if cidr.family() != family {
                return Err(wrong(format!("an {family} network was wanted")));
            }
            match family {
                Family::V4 => wish.cidr = Some(cidr),
                Family::V6 => wish.cidr_v6 = Some(cidr),
            }
        }
        for (option, value) in options {
            if option == "network" {
                wish.network = Some(NetworkName::new(value)?);
                continue;
            }
            let Some(known) = KNOWN.iter().find(|known| known.option == option) else {
                return Err(WishError::Option(option.clone()));
            };
            known.value(value)?;
            if option == IPV6_NETWORK && family == Family::V6 && wish.cidr_v6.is_none() {
                wish.cidr_v6 = value.parse().ok();
            }
            wish.options.insert(option.clone(), value.clone());
        }
        Ok(wish)
    }

    /// The same wish for a network whose name is known.
    pub(crate) fn named(self, network: Option<NetworkName>) -> Self {
        Self { network, ..self }
    }

    /// Whether it does not say which network it means.
    pub(crate) fn names_none(&self) -> bool {
        self.network.is_none() && self.cidr.is_none() && self.cidr_v6.is_none()
    }

    /// Whether the wish names a VNI.
    pub(crate) fn names_vni(&self) -> bool {
        self.options.contains_key("vni")
    }

    /// Whether the wish says nothing but which network, and this can be it.
    pub(crate) fn names_only(&self, cidrs: &[Prefix]) -> bool {
        let mut named = self.cidr.iter().chain(&self.cidr_v6);
        self.options.is_empty() && named.all(|cidr| cidrs.contains(cidr))
    }

    /// The name under which a CIDR nobody knows is kept in the store, when the default network has another.
    pub(crate) fn name_for(cidr: &Prefix) -> Result<NetworkName, NameError> {
        NetworkName::new(&format!("net-{}", cidr.to_string().replace(['/', ':'], "-")))
    }

    /// The config of a new network. `vni` is used unless the wish has its own or needs none.
    pub(crate) fn define(&self, cidr: &Prefix, vni: Vni) -> Result<NetworkConfig, ConfigError> {
        let mut document = Map::from_iter([("Network".to_owned(), json!(cidr.to_string()))]);
        document.insert("Backend".into(), json!({"Type": "vxlan"}));
        self.put_into(&mut document);
        let parsed = NetworkConfig::parse(&Value::from(document.clone()).to_string())?;
        if !matches!(parsed.config.backend, BackendConfig::Vxlan(_)) || self.names_vni() {
            return Ok(parsed.config);
        }
        backend_of(&mut document).insert("VNI".into(), json!(vni.id()));
        Ok(NetworkConfig::parse(&Value::from(document).to_string())?.config)
    }

    /// Whether everything that the wish says is true of a network that exists. What it does not say may be as it likes.
    pub(crate) fn agrees_with(&self, stored: &NetworkConfig) -> bool {
        let other = |cidr: Option<Prefix>, range: Option<Range>| {
            cidr.is_some_and(|cidr| range.is_none_or(|range| range.cidr != cidr))
        };
        if other(self.cidr, stored.v4) || other(self.cidr_v6, stored.v6) {
            return false;
        }
        let Ok(Value::Object(mut document)) = serde_json::from_str(&stored.to_json()) else { return false };
        self.put_into(&mut document);
        // A value that cannot even be combined with the stored ones is certainly a different one.
        NetworkConfig::parse(&Value::from(document).to_string()).is_ok_and(|parsed| parsed.config == *stored)
    }

    fn put_into(&self, document: &mut Map<String, Value>) {
        for known in KNOWN {
            let Some(value) = self.options.get(known.option) else { continue };
            // Checked when it was read.
            let Ok(value) = known.value(value) else { continue };
            if known.key.starts_with("IPv6") {
                document.insert("EnableIPv6".into(), json!(true));
            }
            match known.within {
                Within::Document => document.insert(known.key.into(), value),
                Within::Backend => backend_of(document).insert(known.key.into(), value),
            };
        }
    }
}

/// The document's `Backend`, made if it is not there.
fn backend_of(document: &mut Map<String, Value>) -> &mut Map<String, Value> {
    let backend = document.entry("Backend").or_insert_with(|| json!({}));
    if !backend.is_object() {
        *backend = json!({});
    }
    match backend {
        Value::Object(backend) => backend,
        // Made one above.
        _ => unreachable!("Backend is an object"),
    }
}

impl Known {
    fn value(&self, text: &str) -> Result<Value, WishError> {
        let wrong =
            |wanted| WishError::Value { option: self.option.to_owned(), value: text.to_owned(), wanted };
        match self.kind {
            Kind::Text => Ok(json!(text)),
            Kind::Number => text.parse::<u64>().map(|n| json!(n)).map_err(|_| wrong("a whole number")),
            Kind::V6Cidr => match text.parse::<Prefix>() {
                Ok(cidr) if cidr.family() == Family::V6 => Ok(json!(text)),
                _ => Err(wrong("an IPv6 network without host bits, like fd00:100::/48,")),
            },
            Kind::Switch => match text {
                "true" | "1" | "" => Ok(json!(true)),
                "false" | "0" => Ok(json!(false)),
                _ => Err(wrong("true or false")),
            },
        }
    }
}

impl fmt::Display for Wish {
    /// As it was typed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        let cidrs = self.cidr.into_iter().chain(self.cidr_v6);
        words.extend(cidrs.map(|cidr| format!("--subnet {cidr}")));
        words.extend(self.network.iter().map(|network| format!("--ipam-opt network={network}")));
        words.extend(self.options.iter().map(|(option, value)| format!("--ipam-opt {option}={value}")));
        f.write_str(&words.join(" "))
    }
}

/// The lowest VNI from 1 on that no network uses.
pub(crate) fn free_vni<'a>(networks: impl IntoIterator<Item = &'a NetworkConfig>) -> Option<Vni> {
    let used: std::collections::BTreeSet<u32> =
        networks.into_iter().filter_map(vni_of).map(Vni::id).collect();
    (1..=u64::from(u32::MAX)).map_while(|id| Vni::new(id).ok()).find(|vni| !used.contains(&vni.id()))
}

/// The VNI of a network that has one.
pub(crate) fn vni_of(config: &NetworkConfig) -> Option<Vni> {
    match &config.backend {
        BackendConfig::Vxlan(vxlan) => Some(vxlan.vni),
        BackendConfig::Alloc
        | BackendConfig::HostGw
        | BackendConfig::Ipip(_)
        | BackendConfig::Udp(_)
        | BackendConfig::Ipsec(_)
        | BackendConfig::Wireguard(_)
        | BackendConfig::Extension(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(subnet: &str, options: &[(&str, &str)]) -> Result<Wish, WishError> {
        let family = if subnet.contains(':') { Family::V6 } else { Family::V4 };
        Wish::read(subnet, family, &options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    fn defined(subnet: &str, options: &[(&str, &str)]) -> NetworkConfig {
        let wish = wish(subnet, options).unwrap();
        wish.define(&wish.cidr.unwrap(), Vni::new(7).unwrap()).unwrap()
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (subnet, options, said) in [
            ("10.100.5.7/16", &[][..], "the network is 10.100.0.0/16"),
            ("fd00::1/64", &[], "the network is fd00::/64"),
            (
                "",
                &[("ipv6-network", "fd00::1/48")],
                "an IPv6 network without host bits, like fd00:100::/48, was wanted",
            ),
            ("", &[("ipv6-network", "10.0.0.0/8")], "an IPv6 network"),
            ("x", &[], "--subnet x"),
            ("", &[("colour", "red")], "--ipam-opt colour: unknown; known are network, backend, vni"),
            ("", &[("vni", "many")], "--ipam-opt vni=many: a whole number was wanted"),
            ("", &[("network", "Config")], "--ipam-opt network="),
        ] {
            let error = wish(subnet, options).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn a_new_network_gets_the_free_vni_unless_it_names_one_or_needs_none() {
        assert_eq!(vni_of(&defined("10.100.0.0/16", &[])), Some(Vni::new(7).unwrap()));
        assert_eq!(vni_of(&defined("10.100.0.0/16", &[("vni", "9")])), Some(Vni::new(9).unwrap()));
        assert_eq!(defined("10.100.0.0/16", &[("backend", "host-gw")]).backend, BackendConfig::HostGw);
        let small = defined("10.100.0.0/16", &[("subnet-len", "26"), ("direct-routing", "true")]);
        assert_eq!(small.v4.unwrap().subnet_len(), 26);
        assert!(matches!(small.backend, BackendConfig::Vxlan(vxlan) if vxlan.direct_routing));
    }

    #[test]
    fn only_what_was_said_has_to_agree() {
        let stored = defined("10.100.0.0/16", &[("subnet-len", "26")]);
        let agrees = |subnet, options: &[_]| wish(subnet, options).unwrap().agrees_with(&stored);
        assert!(agrees("", &[]));
        assert!(agrees("10.100.0.0/16", &[("vni", "7"), ("subnet-len", "26"), ("backend", "vxlan")]));
        assert!(!agrees("10.101.0.0/16", &[]));
        assert!(!agrees("", &[("vni", "8")]));
        assert!(!agrees("", &[("subnet-len", "24")]));
        assert!(!agrees("", &[("backend", "host-gw")]));
    }

    #[test]
    fn ipv6_is_defined_with_ipv4_and_named_by_its_own_cidr() {
        let both = defined("10.100.0.0/16", &[("ipv6-network", "fd00:100::/48"), ("ipv6-subnet-len", "60")]);
        let v6 = both.v6.unwrap();
        assert_eq!((v6.cidr.to_string().as_str(), v6.subnet_len()), ("fd00:100::/48", 60));
        let agrees = |stored: &NetworkConfig, subnet, options: &[_]| {
            wish(subnet, options).unwrap().agrees_with(stored)
        };
        for subnet in ["10.100.0.0/16", "fd00:100::/48", ""] {
            assert!(agrees(&both, subnet, &[]), "{subnet}");
            assert!(agrees(&both, subnet, &[("ipv6-network", "fd00:100::/48")]), "{subnet}");
            assert!(!agrees(&both, subnet, &[("ipv6-network", "fd00:200::/48")]), "{subnet}");
        }
        assert!(!agrees(&both, "fd00:200::/48", &[]));
        let v4 = defined("10.100.0.0/16", &[]);
        assert!(!agrees(&v4, "fd00:100::/48", &[]));
        assert!(!agrees(&v4, "10.100.0.0/16", &[("ipv6-network", "fd00:100::/48")]));
        assert!(!agrees(&v4, "10.100.0.0/16", &[("ipv6-subnet-len", "64")]));
        // Without its network, a part of IPv6 is not defined silently.
        let wish = wish("10.100.0.0/16", &[("ipv6-subnet-len", "64")]).unwrap();
        let error = wish.define(&wish.cidr.unwrap(), Vni::ONE).unwrap_err().to_string();
        assert!(error.contains("IPv6Network is missing"), "{error}");
        // A call for IPv6 without a subnet means the network that it defines.
        let options = BTreeMap::from([("ipv6-network".to_owned(), "fd00:100::/48".to_owned())]);
        let automatic = Wish::read("", Family::V6, &options).unwrap();
        assert_eq!(automatic.cidr_v6, Some("fd00:100::/48".parse().unwrap()));
        assert!(Wish::read("", Family::V4, &options).unwrap().names_none());
        assert!(
            Wish::read("10.0.0.0/8", Family::V6, &options)
                .unwrap_err()
                .to_string()
                .contains("an IPv6 network was wanted")
        );
    }

    #[test]
    fn free_numbers_and_names_are_found() {
        let networks = [defined("10.1.0.0/16", &[("vni", "1")]), defined("10.2.0.0/16", &[("vni", "3")])];
        assert_eq!(free_vni(&networks), Some(Vni::new(2).unwrap()));
        assert_eq!(Wish::name_for(&"10.2.0.0/16".parse().unwrap()).unwrap().as_str(), "net-10.2.0.0-16");
    }

    #[test]
    fn a_wish_prints_as_it_was_typed() {
        let wish = wish("10.1.0.0/16", &[("network", "web"), ("vni", "4")]).unwrap();
        assert_eq!(wish.to_string(), "--subnet 10.1.0.0/16 --ipam-opt network=web --ipam-opt vni=4");
    }
}
