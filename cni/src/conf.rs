//! What the runtime says on stdin: a `type: flannel` configuration (upstream: flannel-io/cni-plugin flannel.go `NetConf`).
//!
//! Keys are matched without regard to case, because Go does, and because some Go runtimes write their structures without tags
//! (containerd sends `HostPort`).

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use flannel_core::touch::ledger::DEFAULT_ROOT;
use flannel_core::touch::subnet_env::{self, SubnetEnv};
use flannel_core::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use flannel_core::words::name::{Attachment, LinkName, NetworkName};
use flannel_core::words::units::Mtu;
use serde_json::{Map, Value, json};

use crate::args::{CniArgs, is_identifier};
use crate::result::{CniError, Route, Version};

const DATA_DIR: &str = "/var/lib/cni/flannel";

type Object = Map<String, Value>;

/// A configuration.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Conf {
    pub(crate) version: Version,
    /// The network's name as the runtime knows it.
    pub(crate) name: String,
    /// Where the agent says what this node has.
    pub(crate) subnet_file: PathBuf,
    /// Where upstream keeps a file for each container.
    pub(crate) data_dir: PathBuf,
    /// What an earlier plugin, or our own ADD, printed.
    pub(crate) previous: Option<Value>,
    /// GC: what is still in use. None if the runtime did not say.
    pub(crate) valid: Option<Vec<Attachment>>,
    delegate: Object,
    ipam: Object,
    runtime: Option<Object>,
    cni_args: Object,
    dns: Object,
}

/// Who does the work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Worker {
    /// This process: a bridge with addresses from a host-local ledger.
    Ourselves,
    /// The plugin of this name, as upstream does.
    Plugin(String),
}

/// What a configuration asks of the bridge, the endpoint and the ledger.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Wish {
    /// A bridge by name.
    pub(crate) bridge: Option<LinkName>,
    /// Instead of the network's.
    pub(crate) mtu: Option<Mtu>,
    /// Instead of "if the agent does not".
    pub(crate) ip_masq: Option<bool>,
    pub(crate) hairpin: bool,
    pub(crate) default_gateway: bool,
    /// Take other addresses off the bridge.
    pub(crate) force_address: bool,
    pub(crate) dns: Object,
    pub(crate) routes: Vec<Route>,
    /// These addresses and no others.
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) mac: Option<Mac>,
}

impl Conf {
    /// Reads stdin. The version is the last thing looked at, as Go does: who has no name has no version either.
    pub(crate) fn parse(stdin: &[u8]) -> Result<Self, CniError> {
        let conf: Object = serde_json::from_slice(stdin).map_err(|error| {
            CniError::new(CniError::DECODING, "error unmarshall network config")
                .with_details(error.to_string())
        })?;
        let name = string(&conf, "name")?.unwrap_or_default();
        if name.is_empty() {
            return Err(CniError::new(CniError::CONFIG, "missing network name"));
        }
        if !is_identifier(&name) {
            return Err(CniError::new(CniError::CONFIG, "invalid characters found in network name")
                .with_details(format!("name is {name:?}")));
        }
        let path = |key, default: &str| -> Result<PathBuf, CniError> {
            let given = string(&conf, key)?.filter(|path| !path.is_empty());
            Ok(given.map_or_else(|| PathBuf::from(default), PathBuf::from))
        };
        let args = object(&conf, "args")?.unwrap_or_default();
        Ok(Self {
            version: Version::negotiate(string(&conf, "cniVersion")?.as_deref())?,
            name,
            subnet_file: path("subnetFile", subnet_env::DEFAULT_PATH)?,
            data_dir: path("dataDir", DATA_DIR)?,
            previous: field(&conf, "prevResult").cloned(),
            valid: valid_attachments(&conf)?,
            delegate: delegate(&conf)?,
            ipam: object(&conf, "ipam")?.unwrap_or_default(),
            runtime: object(&conf, "runtimeConfig")?,
            cni_args: object(&args, "cni")?.unwrap_or_default(),
            dns: object(&conf, "dns")?.unwrap_or_default(),
        })
    }

    /// Who does the work.
    pub(crate) fn worker(&self) -> Worker {
        worker(&self.delegate, &self.ipam)
    }

    /// Where this configuration's ledger would be made.
    pub(crate) fn ledger_root(&self) -> PathBuf {
        ledger_root(&self.ipam)
    }

    /// The flannel network this is about, whatever the runtime calls it. Agents write a named network's file as
    /// `networks/NAME.env` beside the default network's (`run::setup::subnet_file`).
    pub(crate) fn network(&self) -> NetworkName {
        let file = &self.subnet_file;
        let named = file.parent().and_then(Path::file_name).is_some_and(|dir| dir == "networks");
        let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        NetworkName::new(stem).ok().filter(|_| named).unwrap_or_else(NetworkName::default_network)
    }

    /// Everything ADD needs to know. What upstream's bridge and host-local plugins can do and this one cannot is an error that names
    /// it, if it is asked for.
    pub(crate) fn wish(&self, args: &CniArgs) -> Result<Wish, CniError> {
        self.refuse_what_is_not_served()?;
        let runtime = self.runtime.clone().unwrap_or_default();
        let mtu = match field(&self.delegate, "mtu").filter(|mtu| asks(mtu)) {
            None => None,
            Some(mtu) => Some(number(mtu, "delegate.mtu").and_then(|bytes| {
                Mtu::new(bytes).map_err(|error| config(format!("delegate.mtu: {error}")))
            })?),
        };
        let bridge = match string(&self.delegate, "bridge")?.filter(|name| !name.is_empty()) {
            None => None,
            Some(name) => {
                Some(LinkName::new(&name).map_err(|error| config(format!("delegate.bridge: {error}")))?)
            }
        };
        let dns = object(&self.delegate, "dns")?.filter(|dns| !dns.is_empty());
        Ok(Wish {
            bridge,
            mtu,
            ip_masq: flag(&self.delegate, "ipMasq")?,
            hairpin: flag(&self.delegate, "hairpinMode")?.unwrap_or(false),
            default_gateway: flag(&self.delegate, "isDefaultGateway")?.unwrap_or(false),
            force_address: flag(&self.delegate, "forceAddress")?.unwrap_or(false),
            dns: dns.unwrap_or_else(|| self.dns.clone()),
            routes: self.routes()?,
            ips: self.ips(args, &runtime)?,
            mac: self.mac(args, &runtime)?,
        })
    }

    fn refuse_what_is_not_served(&self) -> Result<(), CniError> {
        const BRIDGE: [&str; 9] = [
            "promiscMode",
            "vlan",
            "vlanTrunk",
            "preserveDefaultVlan",
            "macspoofchk",
            "enabledad",
            "disableContainerInterface",
            "portIsolation",
            "ipMasqBackend",
        ];
        const HOST_LOCAL: [&str; 5] = ["subnet", "rangeStart", "rangeEnd", "gateway", "resolvConf"];
        const CAPABILITIES: [&str; 3] = ["portMappings", "bandwidth", "ipRanges"];
        let empty = Object::new();
        let runtime = self.runtime.as_ref().unwrap_or(&empty);
        let asked = |place: &str, object: &Object, keys: &[&str]| {
            let asked = keys.iter().find(|key| field(object, key).is_some_and(asks));
            asked.map(|key| format!("{place}.{key}"))
        };
        let refused = asked("delegate", &self.delegate, &BRIDGE)
            .or_else(|| asked("ipam", &self.ipam, &HOST_LOCAL))
            .or_else(|| asked("runtimeConfig", runtime, &CAPABILITIES));
        if let Some(key) = refused {
            let hint = match key.as_str() {
                "runtimeConfig.portMappings" => {
                    ": list the plugin portmap after this one and give it the capability"
                }
                "runtimeConfig.bandwidth" => {
                    ": list the plugin bandwidth after this one and give it the capability"
                }
                _ => "",
            };
            return Err(CniError::new(CniError::UNSUPPORTED_FIELD, format!("{key} is not supported{hint}")));
        }
        if flag(&self.delegate, "isGateway")? == Some(false)
            && flag(&self.delegate, "isDefaultGateway")? != Some(true)
        {
            return Err(CniError::new(
                CniError::UNSUPPORTED_FIELD,
                "delegate.isGateway false is not supported: the bridge is the gateway of the node's containers",
            ));
        }
        Ok(())
    }

    fn routes(&self) -> Result<Vec<Route>, CniError> {
        let Some(list) = field(&self.ipam, "routes").filter(|routes| asks(routes)) else {
            return Ok(Vec::new());
        };
        let list = list.as_array().ok_or_else(|| decoding("ipam.routes is not a list"))?;
        list.iter().enumerate().map(|(index, route)| self::route(index, route)).collect()
    }

    /// All addresses asked for, by whatever way: runtimes use three.
    fn ips(&self, args: &CniArgs, runtime: &Object) -> Result<Vec<IpAddr>, CniError> {
        let mut ips = Vec::new();
        ips.extend(args.ip.iter().cloned());
        for (place, object) in [("args.cni", &self.cni_args), ("runtimeConfig", runtime)] {
            let Some(list) = field(object, "ips").filter(|ips| asks(ips)) else { continue };
            let list = list.as_array().ok_or_else(|| decoding(format!("{place}.ips is not a list")))?;
            for ip in list {
                ips.push(ip.as_str().ok_or_else(|| decoding(format!("{place}.ips holds {ip}")))?.to_owned());
            }
        }
        let parse = |text: &String| -> Result<IpAddr, CniError> {
            let bare = text.split('/').next().unwrap_or_default();
            bare.parse().map_err(|_| config(format!("{text:?} was asked for and is no address")))
        };
        let mut parsed = ips.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        parsed.sort();
        parsed.dedup();
        Ok(parsed)
    }

    /// The last one given wins: CNI_ARGS, then `args`, then the capability.
    fn mac(&self, args: &CniArgs, runtime: &Object) -> Result<Option<Mac>, CniError> {
        let given = string(runtime, "mac")?
            .filter(|mac| !mac.is_empty())
            .or(string(&self.cni_args, "mac")?.filter(|mac| !mac.is_empty()))
            .or_else(|| args.mac.clone());
        given
            .map(|mac| mac.parse().map_err(|error| config(format!("the MAC asked for: {error}"))))
            .transpose()
    }

    /// The configuration upstream would hand to the delegated plugin, in its order of precedence. It is also what upstream keeps for
    /// DEL: with that file there, a node can go back to it at any time.
    pub(crate) fn delegated(&self, env: &SubnetEnv) -> Object {
        let mut conf = self.delegate.clone();
        let mut put = |key: &str, value: Value, only_if_absent: bool| {
            if !only_if_absent || field(&conf, key).is_none() {
                conf.insert(key.to_owned(), value);
            }
        };
        put("name", json!(self.name), false);
        put("type", json!("bridge"), true);
        put("ipMasq", json!(!env.ip_masq), true);
        put("mtu", json!(env.mtu.bytes()), true);
        if self.worker_is_bridge() {
            put("isGateway", json!(true), true);
        }
        if self.version != Version::V0_1_0 {
            put("cniVersion", json!(self.version.text()), false);
        }
        put("ipam", Value::Object(self.delegated_ipam(env)), false);
        if let Some(runtime) = &self.runtime {
            put("runtimeConfig", Value::Object(runtime.clone()), false);
        }
        conf
    }

    fn worker_is_bridge(&self) -> bool {
        kind(&self.delegate).is_none_or(|kind| kind == "bridge")
    }

    fn delegated_ipam(&self, env: &SubnetEnv) -> Object {
        let mut ipam = self.ipam.clone();
        if kind(&ipam).is_none() {
            ipam.insert("type".to_owned(), json!("host-local"));
        }
        let subnet = |subnet: &InterfaceAddress| json!([{ "subnet": subnet.prefix().to_string() }]);
        ipam.insert("ranges".to_owned(), env.subnets.iter().map(subnet).collect());
        let given = field(&ipam, "routes").and_then(Value::as_array).cloned().unwrap_or_default();
        let networks = env.networks.iter().map(|network| json!({ "dst": network.to_string() }));
        ipam.insert("routes".to_owned(), given.into_iter().chain(networks).collect());
        ipam
    }
}

/// What upstream kept for a container when it made it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Kept(Object);

impl Kept {
    pub(crate) fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text).map(Self)
    }

    /// Who did the work, and has to undo it.
    pub(crate) fn worker(&self) -> Worker {
        worker(&self.0, &object(&self.0, "ipam").ok().flatten().unwrap_or_default())
    }

    /// Whether rules for this container alone were made. This plugin never makes such, and says so in what it keeps, so a yes comes from
    /// upstream's.
    pub(crate) fn masquerades(&self) -> bool {
        flag(&self.0, "ipMasq").ok().flatten().unwrap_or(false)
    }

    /// Name of the configuration that made it.
    pub(crate) fn name(&self) -> Option<&str> {
        field(&self.0, "name").and_then(Value::as_str)
    }

    /// For the plugin that does the work.
    pub(crate) fn to_value(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// With what the runtime sent along this time.
    pub(crate) fn with(mut self, key: &str, value: Option<Value>) -> Self {
        if let Some(value) = value {
            self.0.insert(key.to_owned(), value);
        }
        self
    }
}

fn worker(delegate: &Object, ipam: &Object) -> Worker {
    match (kind(delegate).unwrap_or("bridge"), kind(ipam).unwrap_or("host-local")) {
        ("bridge", "host-local") => Worker::Ourselves,
        (plugin, _) => Worker::Plugin(plugin.to_owned()),
    }
}

fn kind(object: &Object) -> Option<&str> {
    field(object, "type").and_then(Value::as_str).filter(|kind| !kind.is_empty())
}

fn ledger_root(ipam: &Object) -> PathBuf {
    let given = field(ipam, "dataDir").and_then(Value::as_str).filter(|dir| !dir.is_empty());
    given.map_or_else(|| Path::new(DEFAULT_ROOT), Path::new).to_owned()
}

fn delegate(conf: &Object) -> Result<Object, CniError> {
    let delegate = object(conf, "delegate")?.unwrap_or_default();
    for key in ["name", "ipam"] {
        if field(&delegate, key).is_some() {
            return Err(config(format!("'delegate' must not have a field '{key}': flannel sets it")));
        }
    }
    if field(&delegate, "type").is_some_and(|kind| !kind.is_string()) {
        return Err(config("'delegate' has a field 'type' that is no string"));
    }
    Ok(delegate)
}

/// `cni.dev/valid-attachments`; libcni also writes the name an earlier draft had.
fn valid_attachments(conf: &Object) -> Result<Option<Vec<Attachment>>, CniError> {
    let given = field(conf, "cni.dev/valid-attachments").or_else(|| field(conf, "cni.dev/attachments"));
    let Some(given) = given.filter(|given| !given.is_null()) else { return Ok(None) };
    let wrong = || decoding("cni.dev/valid-attachments is not a list of {containerID, ifname}");
    let attachment = |value: &Value| -> Option<Attachment> {
        let value = value.as_object()?;
        let text = |key| Some(field(value, key)?.as_str()?.to_owned());
        Some(Attachment { container: text("containerID")?, interface: text("ifname")? })
    };
    let list = given.as_array().ok_or_else(wrong)?;
    list.iter().map(attachment).collect::<Option<Vec<_>>>().map(Some).ok_or_else(wrong)
}

fn route(index: usize, route: &Value) -> Result<Route, CniError> {
    let place = format!("ipam.routes[{index}]");
    let route = route.as_object().ok_or_else(|| decoding(format!("{place} is no object")))?;
    for key in ["mtu", "advmss", "table", "scope"] {
        if field(route, key).is_some_and(asks) {
            return Err(CniError::new(
                CniError::UNSUPPORTED_FIELD,
                format!("{place}.{key} is not supported"),
            ));
        }
    }
    let destination = string(route, "dst")?.ok_or_else(|| config(format!("{place} has no dst")))?;
    // Go takes host bits off without a word, and such configurations exist.
    let destination: InterfaceAddress =
        destination.parse().map_err(|error| config(format!("{place}.dst: {error}")))?;
    let destination: Prefix = destination.prefix();
    let via = string(route, "gw")?.filter(|via| !via.is_empty());
    let via = via
        .map(|via| via.parse::<IpAddr>().map_err(|_| config(format!("{place}.gw: {via:?} is no address"))))
        .transpose()?;
    if via.is_some_and(|via| Family::of(via) != destination.family()) {
        return Err(config(format!("{place}: dst and gw are of different families")));
    }
    let metric = match field(route, "priority").filter(|priority| asks(priority)) {
        None => 0,
        Some(priority) => u32::try_from(number(priority, &format!("{place}.priority"))?)
            .map_err(|_| config(format!("{place}.priority is too large")))?,
    };
    Ok(Route { destination, via, metric })
}

/// Without regard to case; an exact match is preferred.
fn field<'a>(object: &'a Object, name: &str) -> Option<&'a Value> {
    object
        .get(name)
        .or_else(|| object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value))
}

/// Whether a value says more than Go's zero value, with which a field is as good as absent.
fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
    }
}

fn string(object: &Object, name: &str) -> Result<Option<String>, CniError> {
    match field(object, name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(decoding(format!("{name} is {other}, a string was expected"))),
    }
}

fn flag(object: &Object, name: &str) -> Result<Option<bool>, CniError> {
    match field(object, name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(on)) => Ok(Some(*on)),
        Some(other) => Err(decoding(format!("{name} is {other}, true or false was expected"))),
    }
}

fn object(object: &Object, name: &str) -> Result<Option<Object>, CniError> {
    match field(object, name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(inner)) => Ok(Some(inner.clone())),
        Some(other) => Err(decoding(format!("{name} is {other}, an object was expected"))),
    }
}

fn number(value: &Value, name: &str) -> Result<u64, CniError> {
    value.as_u64().ok_or_else(|| decoding(format!("{name} is {value}, a number was expected")))
}

fn config(msg: impl Into<String>) -> CniError {
    CniError::new(CniError::CONFIG, msg)
}

fn decoding(msg: impl Into<String>) -> CniError {
    CniError::new(CniError::DECODING, msg)
}

#[cfg(test)]
#[path = "conf/tests.rs"]
mod tests;
