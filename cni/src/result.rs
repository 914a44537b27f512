//! What the plugin prints: results in the shape of every spec version, and errors. stdout is for these alone.

use std::fmt;

use flannel_core::decide::endpoint::EndpointRoute;
use flannel_core::words::addr::{Family, InterfaceAddress, Mac};
use flannel_core::words::code::Code;
use flannel_core::words::fact::RouteTable;
use flannel_core::words::name::LinkName;
use flannel_core::words::units::Mtu;
use serde_json::{Map, Value, json};

/// A spec version that we speak.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Version {
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub(crate) const ALL: [Self; 7] =
        [Self::V0_1_0, Self::V0_2_0, Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    pub(crate) const NEWEST: Self = Self::V1_1_0;

    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The version of a configuration. None given means 0.1.0, which knew no such key.
    pub(crate) fn negotiate(given: Option<&str>) -> Result<Self, CniError> {
        let given = given.unwrap_or_default();
        if given.is_empty() {
            return Ok(Self::V0_1_0);
        }
        Self::ALL.into_iter().find(|version| version.text() == given).ok_or_else(|| {
            let ours = Self::ALL.map(Self::text).join(" ");
            CniError::new(CniError::INCOMPATIBLE, "incompatible CNI versions")
                .with_details(format!("config is \"{given}\", plugin supports [{ours}]"))
        })
    }
}

impl Version {
    /// The version of a configuration that has something else wrong with it, for the error that says so.
    pub(crate) fn named_in(text: &[u8]) -> Self {
        let version = serde_json::from_slice::<Value>(text).ok();
        let version = version.as_ref().and_then(|conf| conf.get("cniVersion")).and_then(Value::as_str);
        version.and_then(|version| Self::negotiate(Some(version)).ok()).unwrap_or(Self::NEWEST)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

/// What goes to stdout.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Answer {
    /// Nothing: it is done.
    Nothing,
    /// A result of ours.
    Value(Value),
    /// What a delegated plugin printed.
    Printed(Vec<u8>),
}

/// What VERSION answers. SPEC.md wants the version that was asked in, whatever it is.
pub(crate) fn versions(asked_in: Option<&str>) -> Value {
    json!({
        "cniVersion": asked_in.unwrap_or(Version::NEWEST.text()),
        "supportedVersions": Version::ALL.map(Version::text),
    })
}

/// An interface that ADD made or used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Interface {
    pub(crate) name: LinkName,
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: Option<Mtu>,
    /// CNI_NETNS as it was given; empty on the host.
    pub(crate) sandbox: String,
}

/// An address of the container.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Address {
    pub(crate) address: InterfaceAddress,
    pub(crate) gateway: Option<std::net::IpAddr>,
}

/// What ADD made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Attached {
    /// Bridge, host's end, container's end: in this order, because readers count.
    pub(crate) interfaces: [Interface; 3],
    /// Where the gateway is, if that is not the bridge itself.
    pub(crate) vlan_gateway: Option<Interface>,
    pub(crate) addresses: Vec<Address>,
    /// A gateway only where it was given: without one it is that of the family.
    pub(crate) routes: Vec<EndpointRoute>,
    /// As the configuration gave it.
    pub(crate) dns: Map<String, Value>,
}

/// Index of the container's end in `interfaces`.
const CONTAINER: usize = 2;

impl Attached {
    /// The result in the shape of a version.
    pub(crate) fn render(&self, version: Version) -> Value {
        let mut result = match version {
            Version::V0_1_0 | Version::V0_2_0 => self.by_family(),
            _ => self.by_interface(version),
        };
        result.insert("cniVersion".to_owned(), json!(version.text()));
        // Readers of old shapes expect it, if only empty.
        if version < Version::V1_0_0 || !self.dns.is_empty() {
            result.insert("dns".to_owned(), Value::Object(self.dns.clone()));
        }
        Value::Object(result)
    }

    /// 0.1.0 and 0.2.0: one address of a family, routes with it.
    fn by_family(&self) -> Map<String, Value> {
        let mut result = Map::new();
        for (key, family) in [("ip4", Family::V4), ("ip6", Family::V6)] {
            let Some(first) = self.addresses.iter().find(|a| a.address.family() == family) else { continue };
            let routes: Vec<Value> = self
                .routes
                .iter()
                .filter(|route| route.destination.family() == family)
                .map(render_route)
                .collect();
            let mut ip = json!({ "ip": first.address.to_string() });
            if let Some(gateway) = first.gateway {
                ip["gateway"] = json!(gateway.to_string());
            }
            if !routes.is_empty() {
                ip["routes"] = Value::Array(routes);
            }
            result.insert(key.to_owned(), ip);
        }
        result
    }

    fn by_interface(&self, version: Version) -> Map<String, Value> {
        let interfaces = self
            .interfaces
            .iter()
            .chain(&self.vlan_gateway)
            .map(|interface| interface.render(version))
            .collect();
        let ips: Vec<Value> = self.addresses.iter().map(|address| address.render(version)).collect();
        let routes: Vec<Value> = self.routes.iter().map(render_route).collect();
        let mut result = Map::new();
        result.insert("interfaces".to_owned(), Value::Array(interfaces));
        if !ips.is_empty() {
            result.insert("ips".to_owned(), Value::Array(ips));
        }
        if !routes.is_empty() {
            result.insert("routes".to_owned(), Value::Array(routes));
        }
        result
    }
}

impl Interface {
    fn render(&self, version: Version) -> Value {
        let mut value = json!({ "name": self.name.as_str() });
        if let Some(mac) = self.mac {
            value["mac"] = json!(mac.to_string());
        }
        if let Some(mtu) = self.mtu
            && version >= Version::V1_1_0
        {
            value["mtu"] = json!(mtu.bytes());
        }
        if !self.sandbox.is_empty() {
            value["sandbox"] = json!(self.sandbox);
        }
        value
    }
}

impl Address {
    fn render(&self, version: Version) -> Value {
        let mut value = json!({
            "interface": CONTAINER,
            "address": self.address.to_string(),
        });
        if let Some(gateway) = self.gateway {
            value["gateway"] = json!(gateway.to_string());
        }
        if version < Version::V1_0_0 {
            value["version"] = json!(match self.address.family() {
                Family::V4 => "4",
                Family::V6 => "6",
            });
        }
        value
    }
}

/// The same in every version: upstream has one type for all of them, and CHECK has to find the route again.
fn render_route(route: &EndpointRoute) -> Value {
    let mut value = json!({ "dst": route.destination.to_string() });
    if let Some(via) = route.via {
        value["gw"] = json!(via.to_string());
    }
    let table = Some(route.extras.table.0).filter(|_| route.extras.table != RouteTable::MAIN);
    let scope = route.scope.map(|scope| u32::from(scope.number()));
    let metric = Some(route.metric).filter(|metric| *metric != 0);
    let (mtu, advmss) = (route.extras.mtu, route.extras.advmss);
    for (key, number) in
        [("mtu", mtu), ("advmss", advmss), ("priority", metric), ("table", table), ("scope", scope)]
    {
        if let Some(number) = number {
            value[key] = json!(number);
        }
    }
    value
}

/// Why a command failed, as the runtime is told (SPEC.md, "Error").
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CniError {
    pub(crate) code: u32,
    pub(crate) msg: String,
    pub(crate) details: Option<String>,
}

impl CniError {
    pub(crate) const INCOMPATIBLE: u32 = 1;
    pub(crate) const UNSUPPORTED_FIELD: u32 = 2;
    pub(crate) const ENVIRONMENT: u32 = 4;
    pub(crate) const INPUT: u32 = 5;
    pub(crate) const DECODING: u32 = 6;
    pub(crate) const CONFIG: u32 = 7;
    pub(crate) const NETNS: u32 = 8;
    pub(crate) const TRY_AGAIN: u32 = 11;
    /// STATUS: no ADD can succeed now.
    pub(crate) const UNAVAILABLE: u32 = 50;
    /// STATUS: the same, and containers that are there may suffer.
    pub(crate) const LIMITED: u32 = 51;

    pub(crate) fn new(code: u32, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: None }
    }

    /// The configuration contradicts itself or the node.
    pub(crate) fn config(msg: impl Into<String>) -> Self {
        Self::new(Self::CONFIG, msg)
    }

    /// A value of another type than its key has.
    pub(crate) fn decoding(msg: impl Into<String>) -> Self {
        Self::new(Self::DECODING, msg)
    }

    /// A field asks for what is not built.
    pub(crate) fn unsupported(msg: impl Into<String>) -> Self {
        Self::new(Self::UNSUPPORTED_FIELD, msg)
    }

    /// Something could not be taken away.
    pub(crate) fn leftover(details: impl Into<String>) -> Self {
        let code = Code::LEFTOVER;
        Self::new(code.number().into(), code.title()).with_details(details)
    }

    /// The same failure, after which something could not be taken back.
    pub(crate) fn but_left(&self, undo: &Self) -> Self {
        Self::new(
            Code::LEFTOVER.number().into(),
            format!("{self}; and taking back what was made failed too: {undo}"),
        )
    }

    pub(crate) fn with_details(self, details: impl Into<String>) -> Self {
        Self { details: Some(details.into()), ..self }
    }

    pub(crate) fn render(&self, version: Version) -> Value {
        let mut value = json!({ "cniVersion": version.text(), "code": self.code, "msg": self.msg });
        if let Some(details) = &self.details {
            value["details"] = json!(details);
        }
        value
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        match &self.details {
            Some(details) => write!(f, ": {details}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached() -> Attached {
        let interface = |name: &str, sandbox: &str| Interface {
            name: LinkName::new(name).unwrap(),
            mac: Some("0a:58:0a:f4:01:05".parse().unwrap()),
            mtu: Some(Mtu::new(1450).unwrap()),
            sandbox: sandbox.to_owned(),
        };
        Attached {
            interfaces: [interface("cni0", ""), interface("veth1", ""), interface("eth0", "/run/netns/a")],
            addresses: vec![
                Address { address: "10.244.1.5/24".parse().unwrap(), gateway: "10.244.1.1".parse().ok() },
                Address { address: "fd00::5/64".parse().unwrap(), gateway: "fd00::1".parse().ok() },
            ],
            routes: vec![
                EndpointRoute::to("10.244.0.0/16".parse().unwrap()),
                EndpointRoute {
                    via: Some("10.244.1.1".parse().unwrap()),
                    ..EndpointRoute::to("0.0.0.0/0".parse().unwrap())
                },
            ],
            vlan_gateway: None,
            dns: Map::new(),
        }
    }

    #[test]
    fn the_oldest_shape_is_by_family() {
        assert_eq!(
            attached().render(Version::V0_2_0),
            json!({
                "cniVersion": "0.2.0",
                "ip4": { "ip": "10.244.1.5/24", "gateway": "10.244.1.1",
                         "routes": [{ "dst": "10.244.0.0/16" }, { "dst": "0.0.0.0/0", "gw": "10.244.1.1" }] },
                "ip6": { "ip": "fd00::5/64", "gateway": "fd00::1" },
                "dns": {},
            })
        );
        assert_eq!(attached().render(Version::V0_1_0)["cniVersion"], "0.1.0");
    }

    #[test]
    fn later_shapes_differ_in_details() {
        let old = attached().render(Version::V0_3_1);
        assert_eq!(
            old["ips"][0],
            json!({ "version": "4", "interface": 2, "address": "10.244.1.5/24", "gateway": "10.244.1.1" })
        );
        assert_eq!(old["ips"][1]["version"], "6");
        assert_eq!(old["dns"], json!({}));
        assert_eq!(
            old["interfaces"][2],
            json!({ "name": "eth0", "mac": "0a:58:0a:f4:01:05", "sandbox": "/run/netns/a" })
        );
        assert_eq!(old["interfaces"][0], json!({ "name": "cni0", "mac": "0a:58:0a:f4:01:05" }));
        let new = attached().render(Version::V1_0_0);
        assert_eq!(new["ips"][0].get("version"), None);
        assert_eq!(new.get("dns"), None);
        assert_eq!(attached().render(Version::V1_1_0)["interfaces"][1]["mtu"], 1450);
    }

    #[test]
    fn versions_are_negotiated() {
        assert_eq!(Version::negotiate(None), Ok(Version::V0_1_0));
        assert_eq!(Version::negotiate(Some("")), Ok(Version::V0_1_0));
        for version in Version::ALL {
            assert_eq!(Version::negotiate(Some(version.text())), Ok(version));
        }
        let error = Version::negotiate(Some("2.0.0")).unwrap_err();
        assert_eq!(error.code, 1);
        assert_eq!(
            error.details.as_deref(),
            Some("config is \"2.0.0\", plugin supports [0.1.0 0.2.0 0.3.0 0.3.1 0.4.0 1.0.0 1.1.0]")
        );
        assert_eq!(versions(None)["supportedVersions"].as_array().map(Vec::len), Some(7));
    }
}
