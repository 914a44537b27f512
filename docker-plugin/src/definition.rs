//! What a `docker network create` says about the flannel network it wants: pure, no store and no clock.
//!
//! Only `--subnet`, `--ip-range` and `--ipam-opt` reach the IPAM half of a plugin, and they reach it before anything
//! else does, so they say it all.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};

use flannel_core::words::addr::{Family, Prefix};
use flannel_core::words::config::{BackendConfig, ConfigError, NetworkConfig};
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
];

/// Why a wish cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum WishError {
    /// `--subnet` is no IPv4 network.
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
    /// The options that define a network, as typed.
    options: BTreeMap<String, String>,
}

impl Wish {
    /// A network as it is; the default one, if none is named.
    pub(crate) fn of(network: Option<NetworkName>) -> Self {
        Self { network, ..Self::default() }
    }

    /// Reads what a RequestPool carries.
    pub(crate) fn read(subnet: &str, options: &BTreeMap<String, String>) -> Result<Self, WishError> {
        let mut wish = Self::default();
        if !subnet.is_empty() {
            let wrong = |cause: String| WishError::Subnet { given: subnet.to_owned(), cause };
            let cidr: Prefix = subnet.parse().map_err(|error| wrong(format!("{error}")))?;
            if cidr.family() == Family::V6 {
                return Err(wrong("IPv6 is not built yet in this version; give an IPv4 network".into()));
            }
            wish.cidr = Some(cidr);
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
            wish.options.insert(option.clone(), value.clone());
        }
        Ok(wish)
    }

    /// Whether the wish names a VNI.
    pub(crate) fn names_vni(&self) -> bool {
        self.options.contains_key("vni")
    }

    /// Whether the wish says nothing but which network, and this can be it.
    pub(crate) fn names_only(&self, cidr: Option<Prefix>) -> bool {
        self.options.is_empty() && (self.cidr.is_none() || self.cidr == cidr)
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
        if self.cidr.is_some_and(|cidr| stored.v4.is_none_or(|v4| v4.cidr != cidr)) {
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
        words.extend(self.cidr.map(|cidr| format!("--subnet {cidr}")));
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
        BackendConfig::Alloc | BackendConfig::HostGw => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(subnet: &str, options: &[(&str, &str)]) -> Result<Wish, WishError> {
        Wish::read(subnet, &options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    fn defined(subnet: &str, options: &[(&str, &str)]) -> NetworkConfig {
        let wish = wish(subnet, options).unwrap();
        wish.define(&wish.cidr.unwrap(), Vni::new(7).unwrap()).unwrap()
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (subnet, options, said) in [
            ("10.100.5.7/16", &[][..], "the network is 10.100.0.0/16"),
            ("fd00::/64", &[], "IPv6 is not built yet"),
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
