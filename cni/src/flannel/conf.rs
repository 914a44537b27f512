//! A `type: flannel` configuration (upstream: flannel-io/cni-plugin flannel.go `NetConf`).

use std::path::{Path, PathBuf};

use flannel_core::touch::ledger::DEFAULT_ROOT;
use flannel_core::touch::subnet_env::{self, SubnetEnv};
use flannel_core::words::addr::InterfaceAddress;
use flannel_core::words::name::NetworkName;
use serde_json::{Value, json};

use crate::conf::Conf;
use crate::json::{Object, field, first_asked, object, text};
use crate::result::{CniError, Version};

const DATA_DIR: &str = "/var/lib/cni/flannel";

/// A configuration.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct FlannelConf<'a> {
    /// What every plugin's configuration has.
    pub(crate) common: &'a Conf,
    /// Where the agent says what this node has.
    pub(crate) subnet_file: PathBuf,
    /// Where upstream keeps a file for each container.
    pub(crate) data_dir: PathBuf,
    /// What the bridge, or the other plugin that does the work, is told.
    pub(crate) delegate: Object,
    ipam: Object,
}

/// Who does the work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Worker {
    /// This process: a bridge with addresses from a host-local ledger.
    Ourselves,
    /// The plugin of this name, as upstream does.
    Plugin(String),
}

impl<'a> FlannelConf<'a> {
    pub(crate) fn read(common: &'a Conf) -> Result<Self, CniError> {
        let path = |key, default: &str| -> Result<PathBuf, CniError> {
            Ok(text(&common.given, key)?.map_or_else(|| PathBuf::from(default), PathBuf::from))
        };
        Ok(Self {
            common,
            subnet_file: path("subnetFile", subnet_env::DEFAULT_PATH)?,
            data_dir: path("dataDir", DATA_DIR)?,
            delegate: delegate(&common.given)?,
            ipam: object(&common.given, "ipam")?.unwrap_or_default(),
        })
    }

    /// Who does the work.
    pub(crate) fn worker(&self) -> Worker {
        worker(&self.delegate, &self.ipam)
    }

    /// Where this configuration's ledger would be made.
    pub(crate) fn ledger_root(&self) -> PathBuf {
        let given = field(&self.ipam, "dataDir").and_then(Value::as_str).filter(|dir| !dir.is_empty());
        given.map_or_else(|| Path::new(DEFAULT_ROOT), Path::new).to_owned()
    }

    /// The flannel network this is about, whatever the runtime calls it. Agents write a named network's file as
    /// `networks/NAME.env` beside the default network's (`run::setup::subnet_file`).
    pub(crate) fn network(&self) -> NetworkName {
        let file = &self.subnet_file;
        let named = file.parent().and_then(Path::file_name).is_some_and(|dir| dir == "networks");
        let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        NetworkName::new(stem).ok().filter(|_| named).unwrap_or_else(NetworkName::default_network)
    }

    /// The `ipam` part, of which only what a node's lease leaves open can be asked for.
    pub(crate) fn ipam(&self) -> Result<&Object, CniError> {
        const SETTLED: [&str; 4] = ["subnet", "rangeStart", "rangeEnd", "gateway"];
        let refused = first_asked(&self.ipam, &SETTLED).map(|key| format!("ipam.{key}")).or_else(|| {
            first_asked(&self.common.runtime, &["ipRanges"]).map(|key| format!("runtimeConfig.{key}"))
        });
        match refused {
            Some(key) => Err(CniError::unsupported(format!(
                "{key} is not supported: the node's lease says which addresses there are"
            ))),
            None => Ok(&self.ipam),
        }
    }

    /// The configuration upstream would hand to the delegated plugin, in its order of precedence. It is also what upstream keeps for
    /// DEL: with that file there, a node can go back to it at any time.
    pub(crate) fn delegated(&self, env: &SubnetEnv) -> Object {
        let common = self.common;
        let mut conf = self.delegate.clone();
        let mut put = |key: &str, value: Value, only_if_absent: bool| {
            if !only_if_absent || field(&conf, key).is_none() {
                conf.insert(key.to_owned(), value);
            }
        };
        put("name", json!(common.name), false);
        put("type", json!("bridge"), true);
        put("ipMasq", json!(!env.ip_masq), true);
        put("mtu", json!(env.mtu.bytes()), true);
        if kind(&self.delegate).is_none_or(|kind| kind == "bridge") {
            put("isGateway", json!(true), true);
        }
        if common.version != Version::V0_1_0 {
            put("cniVersion", json!(common.version.text()), false);
        }
        put("ipam", Value::Object(self.delegated_ipam(env)), false);
        if field(&common.given, "runtimeConfig").is_some_and(|runtime| !runtime.is_null()) {
            put("runtimeConfig", Value::Object(common.runtime.clone()), false);
        }
        conf
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

/// Who does the work that these two describe.
pub(super) fn worker(delegate: &Object, ipam: &Object) -> Worker {
    match (kind(delegate).unwrap_or("bridge"), kind(ipam).unwrap_or("host-local")) {
        ("bridge", "host-local") => Worker::Ourselves,
        (plugin, _) => Worker::Plugin(plugin.to_owned()),
    }
}

fn kind(object: &Object) -> Option<&str> {
    field(object, "type").and_then(Value::as_str).filter(|kind| !kind.is_empty())
}

fn delegate(conf: &Object) -> Result<Object, CniError> {
    let delegate = object(conf, "delegate")?.unwrap_or_default();
    for key in ["name", "ipam"] {
        if field(&delegate, key).is_some() {
            return Err(CniError::config(format!(
                "'delegate' must not have a field '{key}': flannel sets it"
            )));
        }
    }
    if field(&delegate, "type").is_some_and(|kind| !kind.is_string()) {
        return Err(CniError::config("'delegate' has a field 'type' that is no string"));
    }
    Ok(delegate)
}
