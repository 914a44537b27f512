//! `Backend` of the network config: which one, and its options.

use serde_json::json;

use super::document::Document;
use super::wireguard::WireguardConfig;
use super::{ConfigError, extension, ipsec};
use crate::words::code::Code;
use crate::words::extension::ExtensionConfig;
use crate::words::ipsec::IpsecConfig;
use crate::words::report::Finding;
use crate::words::units::{Mtu, Port, Vni};
use crate::words::wireguard::key_text;

/// How packets travel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BackendConfig {
    /// Not at all: only leases.
    Alloc,
    /// Routes through the peers' own addresses.
    HostGw,
    /// IP in IP.
    Ipip(IpipConfig),
    /// VXLAN.
    Vxlan(VxlanConfig),
    /// Whole packets in UDP, carried by this program itself.
    Udp(UdpConfig),
    /// Encrypted by the kernel, with keys that charon agrees on.
    Ipsec(IpsecConfig),
    /// WireGuard.
    Wireguard(WireguardConfig),
    /// By commands of the operator's.
    Extension(ExtensionConfig),
}

impl BackendConfig {
    /// `Backend.Type`, as upstream spells it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Alloc => "alloc",
            Self::HostGw => "host-gw",
            Self::Ipip(_) => "ipip",
            Self::Vxlan(_) => "vxlan",
            Self::Udp(_) => "udp",
            Self::Ipsec(_) => "ipsec",
            Self::Wireguard(_) => "wireguard",
            Self::Extension(_) => "extension",
        }
    }

    /// What of it nobody may see, as it stands in a document.
    pub(super) fn secret(&self) -> Option<String> {
        match self {
            Self::Wireguard(wireguard) => wireguard.shared.as_ref().map(|shared| key_text(shared.reveal())),
            Self::Ipsec(ipsec) => Some(ipsec.psk.reveal().clone()),
            _ => None,
        }
    }
}

/// `Backend` of type udp.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UdpConfig {
    /// `Port`, the same on every host; 0 or absent is 8285.
    pub port: Port,
}

impl Default for UdpConfig {
    fn default() -> Self {
        Self { port: Port::UDP_BACKEND }
    }
}

/// `Backend` of type ipip.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct IpipConfig {
    /// `DirectRouting`: peers on our own link get a plain route.
    pub direct_routing: bool,
}

/// `Backend` of type vxlan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VxlanConfig {
    /// `VNI`
    pub vni: Vni,
    /// `Port`; 0 or absent is the kernel's 8472.
    pub port: Port,
    /// `GBP`
    pub gbp: bool,
    /// `Learning`
    pub learning: bool,
    /// `DirectRouting`: peers on our own link get a plain route.
    pub direct_routing: bool,
    /// `MTU` of the underlay, if not the uplink's.
    pub mtu: Option<Mtu>,
}

impl Default for VxlanConfig {
    fn default() -> Self {
        Self {
            vni: Vni::ONE,
            port: Port::VXLAN,
            gbp: false,
            learning: false,
            direct_routing: false,
            mtu: None,
        }
    }
}

const VXLAN_KEYS: &[&str] = &["Type", "VNI", "Port", "GBP", "Learning", "DirectRouting", "MTU"];
const IPIP_KEYS: &[&str] = &["Type", "DirectRouting"];
const UDP_KEYS: &[&str] = &["Type", "Port"];
/// The types there are, as errors list them.
const BUILT: &str = "alloc, extension, host-gw, ipip, ipsec, udp, vxlan, wireguard";
/// Upstream's types that this software does not have yet.
const NOT_BUILT: &[&str] = &["tencent-vpc"];

pub(super) fn read(
    document: &Document<'_>,
    findings: &mut Vec<Finding>,
) -> Result<BackendConfig, ConfigError> {
    let Some(value) = document.get_any("Backend") else {
        findings.push(Finding::new(Code::BACKEND_ABSENT, "Backend is missing, udp is used"));
        return Ok(BackendConfig::Udp(UdpConfig::default()));
    };
    let options = value.document()?;
    let Some(kind) = options.get("Type") else {
        return Err(value.error(format!("Backend has no Type; say one of {BUILT}")));
    };
    let name = kind.string()?.to_ascii_lowercase();
    match name.as_str() {
        "alloc" | "host-gw" => {
            findings.extend(options.unknown_keys(&["Type"]));
            Ok(if name == "alloc" { BackendConfig::Alloc } else { BackendConfig::HostGw })
        }
        "vxlan" => {
            findings.extend(options.unknown_keys(VXLAN_KEYS));
            vxlan(&options).map(BackendConfig::Vxlan)
        }
        "ipip" => {
            findings.extend(options.unknown_keys(IPIP_KEYS));
            let direct_routing =
                options.get("DirectRouting").map(|on| on.bool()).transpose()?.unwrap_or(false);
            Ok(BackendConfig::Ipip(IpipConfig { direct_routing }))
        }
        "udp" => {
            findings.extend(options.unknown_keys(UDP_KEYS));
            udp(&options).map(BackendConfig::Udp)
        }
        "ipsec" => ipsec::read(&options, findings).map(BackendConfig::Ipsec),
        "wireguard" => WireguardConfig::read(&options, findings).map(BackendConfig::Wireguard),
        "extension" => extension::read(&options, findings).map(BackendConfig::Extension),
        name if NOT_BUILT.contains(&name) => {
            Err(kind.error(format!("backend {name} is not built yet; this version has {BUILT}")))
        }
        _ => Err(kind.error(format!("unknown backend type; say one of {BUILT}"))),
    }
}

fn udp(options: &Document<'_>) -> Result<UdpConfig, ConfigError> {
    let port = options.get("Port").map(|v| v.number().map(|n| (v, n))).transpose()?;
    Ok(match port {
        None | Some((_, 0)) => UdpConfig::default(),
        Some((value, n)) => UdpConfig { port: Port::new(n).map_err(|e| value.error(e))? },
    })
}

fn vxlan(options: &Document<'_>) -> Result<VxlanConfig, ConfigError> {
    let number = |key: &str| options.get(key).map(|v| v.number().map(|n| (v, n))).transpose();
    let flag = |key: &str| options.get(key).map(|v| v.bool()).transpose().map(|on| on.unwrap_or(false));
    let default = VxlanConfig::default();
    Ok(VxlanConfig {
        vni: number("VNI")?.map_or(Ok(default.vni), |(v, n)| Vni::new(n).map_err(|e| v.error(e)))?,
        port: match number("Port")? {
            None | Some((_, 0)) => default.port,
            Some((value, n)) => Port::new(n).map_err(|e| value.error(e))?,
        },
        gbp: flag("GBP")?,
        learning: flag("Learning")?,
        direct_routing: flag("DirectRouting")?,
        mtu: match number("MTU")? {
            None | Some((_, 0)) => None,
            Some((value, n)) => Some(Mtu::new(n).map_err(|e| value.error(e))?),
        },
    })
}

/// An object that reads back as this configuration.
pub(super) fn write(config: &BackendConfig) -> serde_json::Map<String, serde_json::Value> {
    let mut backend = serde_json::Map::new();
    backend.insert("Type".into(), json!(config.name()));
    match config {
        BackendConfig::Alloc | BackendConfig::HostGw => {}
        BackendConfig::Extension(extension) => {
            if let Ok(serde_json::Value::Object(commands)) = serde_json::to_value(extension) {
                backend.extend(commands);
            }
        }
        BackendConfig::Ipip(ipip) => {
            if ipip.direct_routing {
                backend.insert("DirectRouting".into(), json!(true));
            }
        }
        BackendConfig::Ipsec(ipsec) => ipsec::write(ipsec, &mut backend),
        BackendConfig::Udp(udp) => put_port(&mut backend, udp.port, Port::UDP_BACKEND),
        BackendConfig::Vxlan(vxlan) => put_vxlan(&mut backend, vxlan),
        BackendConfig::Wireguard(wireguard) => wireguard.put(&mut backend),
    }
    backend
}

fn put_port(backend: &mut serde_json::Map<String, serde_json::Value>, port: Port, default: Port) {
    if port != default {
        backend.insert("Port".into(), json!(port.number()));
    }
}

fn put_vxlan(backend: &mut serde_json::Map<String, serde_json::Value>, vxlan: &VxlanConfig) {
    backend.insert("VNI".into(), json!(vxlan.vni.id()));
    put_port(backend, vxlan.port, Port::VXLAN);
    let flags = [("GBP", vxlan.gbp), ("Learning", vxlan.learning), ("DirectRouting", vxlan.direct_routing)];
    for (key, _) in flags.into_iter().filter(|(_, on)| *on) {
        backend.insert(key.into(), json!(true));
    }
    if let Some(mtu) = vxlan.mtu {
        backend.insert("MTU".into(), json!(mtu.bytes()));
    }
}
