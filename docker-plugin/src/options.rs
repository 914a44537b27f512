//! What `docker network create` says to the driver half with `-o` and `--internal`: pure, no store and no kernel.
//!
//! What defines the flannel network itself goes with `--ipam-opt`, to the other half (see [`crate::definition`]).

use std::net::{AddrParseError, IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::units::Mtu;

use crate::wire::Options;

/// The key under which an engine puts every `-o`.
const GENERIC: &str = "com.docker.network.generic";

/// Every `-o` there is; the bridge driver's have its names, so that command lines carry over.
const KNOWN: &[&str] = &[NETWORK, PUBLISH, BRIDGE, MTU, ICC, MASQUERADE, HOST_BINDING, INTERFACE_PREFIX];
const NETWORK: &str = "flannel.network";
const PUBLISH: &str = "flannel.publish";
const BRIDGE: &str = "com.docker.network.bridge.name";
const MTU: &str = "com.docker.network.driver.mtu";
const ICC: &str = "com.docker.network.bridge.enable_icc";
const MASQUERADE: &str = "com.docker.network.bridge.enable_ip_masquerade";
const HOST_BINDING: &str = "com.docker.network.bridge.host_binding_ipv4";
const INTERFACE_PREFIX: &str = "com.docker.network.container_iface_prefix";

/// `--driver-opt` of an endpoint.
const ADDRESS: &str = "flannel.ip";
const INTERFACE_NAME: &str = "com.docker.network.endpoint.ifname";

/// Why an option cannot be meant.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum OptionError {
    /// Nobody knows it.
    #[error("-o {0}: unknown; known are {known}. {DEFINES}", known = KNOWN.join(", "))]
    Unknown(String),
    /// Its value is of the wrong kind.
    #[error("-o {option}={value}: {wanted}")]
    Value {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What was expected, or what is wrong.
        wanted: String,
    },
    /// An endpoint's option that nobody knows.
    #[error(
        "--driver-opt {0}: unknown; known is {ADDRESS}, a fixed address on a network without an IPAM driver"
    )]
    UnknownOfEndpoint(String),
    /// An endpoint's address is none.
    #[error("--driver-opt {ADDRESS}={value}: {wanted}")]
    Address {
        /// What was given.
        value: String,
        /// What is wrong.
        wanted: String,
    },
    /// A plugin cannot name the interface.
    #[error(
        "--driver-opt {INTERFACE_NAME}: an engine lets no plugin choose an interface's whole name; create the network with -o {INTERFACE_PREFIX}=PREFIX, a number follows"
    )]
    InterfaceName,
}

const DEFINES: &str =
    "What defines the flannel network is given with --ipam-opt (network=, backend=, vni=, subnet-len=, …)";

/// Who makes a container's ports reachable from outside.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Publish {
    /// This driver. The engine does not know of them, so `docker ps` shows none.
    #[default]
    Driver,
    /// The engine, on docker_gwbridge, which also takes what leaves the network; `docker ps` shows them.
    Engine,
}

/// What was asked for.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
#[serde(default)]
pub(crate) struct NetworkOptions {
    /// The flannel network, where no pool of ours says it.
    pub(crate) network: Option<NetworkName>,
    /// Who publishes ports.
    pub(crate) publish: Publish,
    /// Name of the node's bridge.
    pub(crate) bridge: Option<LinkName>,
    /// Largest packet of a container, if smaller than what fits.
    pub(crate) mtu: Option<Mtu>,
    /// Containers do not reach each other (`enable_icc=false`).
    pub(crate) isolated: bool,
    /// Whether what leaves the network gets the node's address; as the plugin is set up (`--ip-masq`) if not said.
    pub(crate) masquerade: Option<bool>,
    /// Where `-p` without an address binds.
    pub(crate) host_binding: Option<Ipv4Addr>,
    /// What interfaces are called in containers, before the number.
    pub(crate) interface_prefix: Option<String>,
    /// No way out of the network, and none in (`--internal`).
    pub(crate) internal: bool,
}

impl NetworkOptions {
    /// Reads what a CreateNetwork carries.
    pub(crate) fn read(options: &Options) -> Result<Self, OptionError> {
        let internal = options.get("com.docker.network.internal").and_then(Value::as_bool);
        let mut read = Self { internal: internal.unwrap_or_default(), ..Self::default() };
        let generic = options.get(GENERIC).and_then(Value::as_object);
        for (option, value) in generic.into_iter().flatten() {
            read.set(option, text(value))?;
        }
        Ok(read)
    }

    fn set(&mut self, option: &str, value: String) -> Result<(), OptionError> {
        match option {
            NETWORK => self.network = Some(parse(NETWORK, value)?),
            PUBLISH => self.publish = publish(value)?,
            BRIDGE => self.bridge = Some(parse(BRIDGE, value)?),
            MTU => self.mtu = Some(mtu(value)?),
            ICC => self.isolated = !switch(ICC, value)?,
            MASQUERADE => self.masquerade = Some(switch(MASQUERADE, value)?),
            HOST_BINDING => self.host_binding = Some(parse(HOST_BINDING, value)?),
            INTERFACE_PREFIX => self.interface_prefix = Some(interface_prefix(value)?),
            _ => return Err(OptionError::Unknown(option.to_owned())),
        }
        Ok(())
    }

    /// What interfaces are called in containers, before the number.
    pub(crate) fn interface_prefix(&self) -> &str {
        self.interface_prefix.as_deref().unwrap_or("eth")
    }
}

/// What `--driver-opt` of an endpoint asks for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct EndpointOptions {
    /// A fixed address, where no IPAM driver takes `--ip`.
    pub(crate) address: Option<IpAddr>,
}

impl EndpointOptions {
    /// Reads what a CreateEndpoint carries: options of the person beside those of the engine, which all begin alike.
    pub(crate) fn read(options: &Options) -> Result<Self, OptionError> {
        let mut read = Self::default();
        for (option, value) in options {
            match option.as_str() {
                ADDRESS => {
                    let value = text(value);
                    let address = value.parse().map_err(|error: AddrParseError| OptionError::Address {
                        value,
                        wanted: error.to_string(),
                    });
                    read.address = Some(address?);
                }
                INTERFACE_NAME => return Err(OptionError::InterfaceName),
                // Ports, names, sysctls, …: for the engine itself, or said again where they count.
                other if other.starts_with("com.docker.") => {}
                other => return Err(OptionError::UnknownOfEndpoint(other.to_owned())),
            }
        }
        Ok(read)
    }
}

/// Engines send text; what is none is shown as it came.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn wrong(option: &'static str, value: String, wanted: impl ToString) -> OptionError {
    OptionError::Value { option, value, wanted: wanted.to_string() }
}

fn parse<T: std::str::FromStr<Err: ToString>>(option: &'static str, value: String) -> Result<T, OptionError> {
    value.parse().map_err(|error: T::Err| wrong(option, value, error))
}

/// As engines read one for their bridge driver (Go's `strconv.ParseBool`).
fn switch(option: &'static str, value: String) -> Result<bool, OptionError> {
    match value.as_str() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(wrong(option, value, "true or false was wanted")),
    }
}

fn publish(value: String) -> Result<Publish, OptionError> {
    match value.as_str() {
        "driver" => Ok(Publish::Driver),
        "engine" => Ok(Publish::Engine),
        _ => Err(wrong(PUBLISH, value, "driver or engine was wanted")),
    }
}

fn mtu(value: String) -> Result<Mtu, OptionError> {
    let Ok(bytes) = value.parse() else { return Err(wrong(MTU, value, "a number of bytes was wanted")) };
    Mtu::new(bytes).map_err(|error| wrong(MTU, value, error))
}

/// A number follows, so some of an interface name's 15 bytes are the engine's.
fn interface_prefix(value: String) -> Result<String, OptionError> {
    const DIGITS: &str = "000";
    match LinkName::new(&format!("{value}{DIGITS}")) {
        Ok(_) if !value.is_empty() => Ok(value),
        _ => Err(wrong(
            INTERFACE_PREFIX,
            value,
            "1 to 12 bytes were wanted, without slash, colon or space; a number follows",
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(generic: Value) -> Result<NetworkOptions, OptionError> {
        NetworkOptions::read(&Options::from([(GENERIC.to_owned(), generic)]))
    }

    #[test]
    fn what_the_bridge_driver_knows_is_understood() {
        let options = read(json!({
            "com.docker.network.bridge.name": "br7",
            "com.docker.network.driver.mtu": "1300",
            "com.docker.network.bridge.enable_icc": "false",
            "com.docker.network.bridge.enable_ip_masquerade": "0",
            "com.docker.network.bridge.host_binding_ipv4": "127.0.0.1",
            "com.docker.network.container_iface_prefix": "web",
            "flannel.publish": "engine",
            "flannel.network": "blue",
        }))
        .unwrap();
        assert_eq!(
            options,
            NetworkOptions {
                network: Some(NetworkName::new("blue").unwrap()),
                publish: Publish::Engine,
                bridge: Some(LinkName::new("br7").unwrap()),
                mtu: Some(Mtu::new(1300).unwrap()),
                isolated: true,
                masquerade: Some(false),
                host_binding: Some(Ipv4Addr::LOCALHOST),
                interface_prefix: Some("web".to_owned()),
                internal: false,
            }
        );
        assert_eq!(options.interface_prefix(), "web");
    }

    #[test]
    fn nothing_said_is_the_default() {
        for nothing in [json!({}), Value::Null] {
            assert_eq!(read(nothing).unwrap(), NetworkOptions::default());
        }
        let as_the_default = json!({
            "com.docker.network.bridge.enable_icc": "True",
            "flannel.publish": "driver",
        });
        assert_eq!(read(as_the_default).unwrap(), NetworkOptions::default());
        assert_eq!(NetworkOptions::default().interface_prefix(), "eth");
        let internal = Options::from([("com.docker.network.internal".to_owned(), json!(true))]);
        assert!(NetworkOptions::read(&internal).unwrap().internal);
        assert_eq!(serde_json::from_str::<NetworkOptions>("{}").unwrap(), NetworkOptions::default());
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (option, value, said) in [
            ("mtu", "1300", "-o mtu: unknown; known are flannel.network, flannel.publish, com.docker."),
            ("vni", "7", "is given with --ipam-opt"),
            (MTU, "many", "mtu=many: a number of bytes was wanted"),
            (MTU, "1", "MTU 1 is outside 68..=65535"),
            (ICC, "", "enable_icc=: true or false was wanted"),
            (MASQUERADE, "no", "true or false was wanted"),
            (BRIDGE, "a/b", "cannot name an interface"),
            (BRIDGE, "sixteen-bytes-xx", "1 to 15 bytes"),
            (HOST_BINDING, "fd00::1", "host_binding_ipv4=fd00::1: invalid IPv4"),
            (INTERFACE_PREFIX, "thirteen-byte", "1 to 12 bytes were wanted"),
            (INTERFACE_PREFIX, "", "1 to 12 bytes were wanted"),
            (PUBLISH, "both", "driver or engine was wanted"),
            (NETWORK, "Web", "flannel.network=Web: \"Web\" cannot name a network"),
        ] {
            let error = read(json!({ option: value })).unwrap_err().to_string();
            assert!(error.contains(said), "{error}\nnot {said}");
        }
        assert!(read(json!({ MTU: 1300 })).is_ok(), "a number is as good as its text");
    }

    #[test]
    fn an_endpoints_options_are_ours_or_the_engines() {
        let read = |options: Value| EndpointOptions::read(&serde_json::from_value(options).unwrap());
        let fixed = read(json!({
            "flannel.ip": "10.100.5.7",
            "com.docker.network.endpoint.exposedports": [],
            "com.docker.network.portmap": [],
            "com.docker.network.endpoint.sysctls": "net.ipv4.conf.IFNAME.log_martians=1",
        }));
        assert_eq!(fixed.unwrap().address, Some([10, 100, 5, 7].into()));
        assert_eq!(read(json!({})).unwrap(), EndpointOptions::default());
        for (option, value, said) in [
            ("mtu", "1300", "--driver-opt mtu: unknown; known is flannel.ip"),
            ("flannel.ip", "10.100.5.7/24", "--driver-opt flannel.ip=10.100.5.7/24: invalid IP"),
            (INTERFACE_NAME, "web0", "-o com.docker.network.container_iface_prefix=PREFIX"),
        ] {
            let error = read(json!({ option: value })).unwrap_err().to_string();
            assert!(error.contains(said), "{error}\nnot {said}");
        }
    }
}
