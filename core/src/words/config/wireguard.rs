//! `Backend` of type wireguard.

use serde_json::{Map, Value as Json, json};

use super::document::{Document, Value};
use super::{ConfigError, Finding, NetworkConfig};
use crate::words::units::{Mtu, Port};
use crate::words::wireguard::{SecretKey, key_text, secret_key};

const KEYS: &[&str] =
    &["Type", "ListenPort", "ListenPortV6", "MTU", "PSK", "PersistentKeepaliveInterval", "Mode"];

/// `Backend` of type wireguard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WireguardConfig {
    /// `ListenPort`; 0 or absent is 51820.
    pub port: Port,
    /// `ListenPortV6`, of the second device of mode separate; 0 or absent is 51821.
    pub port_v6: Port,
    /// `MTU` of the underlay, if not the uplink's.
    pub mtu: Option<Mtu>,
    /// `PSK`
    pub shared: Option<SecretKey>,
    /// `PersistentKeepaliveInterval` in seconds; 0 is never.
    pub keepalive: u16,
    /// `Mode`
    pub mode: WireguardMode,
}

/// How many devices, and which of a peer's addresses packets are sent to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WireguardMode {
    /// A device for each family, over the same family.
    #[default]
    Separate,
    /// One device, over the family that leads to the peer.
    Auto,
    /// One device, over IPv4.
    Ipv4,
    /// One device, over IPv6.
    Ipv6,
}

impl WireguardMode {
    const ALL: [(&'static str, Self); 4] =
        [("separate", Self::Separate), ("auto", Self::Auto), ("ipv4", Self::Ipv4), ("ipv6", Self::Ipv6)];

    fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(_, mode)| *mode == self).map_or("", |(name, _)| name)
    }
}

impl Default for WireguardConfig {
    fn default() -> Self {
        Self {
            port: Port::WIREGUARD,
            port_v6: Port::WIREGUARD_V6,
            mtu: None,
            shared: None,
            keepalive: 0,
            mode: WireguardMode::default(),
        }
    }
}

impl WireguardConfig {
    pub(super) fn read(options: &Document<'_>, findings: &mut Vec<Finding>) -> Result<Self, ConfigError> {
        findings.extend(options.unknown_keys(KEYS));
        let default = Self::default();
        let given = |key: &str| options.get(key).filter(|value| !value.is_null());
        let number = |key: &str| given(key).map(|v| v.number().map(|n| (v, n))).transpose();
        let port = |key: &str, default| match number(key)? {
            None | Some((_, 0)) => Ok(default),
            Some((value, n)) => Port::new(n).map_err(|e| value.error(e)),
        };
        Ok(Self {
            port: port("ListenPort", default.port)?,
            port_v6: port("ListenPortV6", default.port_v6)?,
            mtu: match number("MTU")? {
                None | Some((_, 0)) => None,
                Some((value, n)) => Some(Mtu::new(n).map_err(|e| value.error(e))?),
            },
            shared: given("PSK").map(|value| shared(&value)).transpose()?.flatten(),
            keepalive: match number("PersistentKeepaliveInterval")? {
                None => 0,
                Some((value, n)) => {
                    u16::try_from(n).map_err(|_| value.error("seconds from 0 to 65535 were wanted"))?
                }
            },
            mode: given("Mode").map_or(Ok(default.mode), |value| mode(&value))?,
        })
    }

    /// A single device that sends over one family needs the peers' addresses of that family, which leases have for enabled
    /// families only.
    pub(super) fn check(&self, config: &NetworkConfig) -> Result<(), ConfigError> {
        let (key, cause) = match self.mode {
            WireguardMode::Ipv4 if config.v4.is_none() => {
                ("EnableIPv4", "Backend.Mode ipv4 sends to IPv4 addresses, which peers publish only with it")
            }
            WireguardMode::Ipv6 if config.v6.is_none() => {
                ("EnableIPv6", "Backend.Mode ipv6 sends to IPv6 addresses, which peers publish only with it")
            }
            _ => return Ok(()),
        };
        Err(ConfigError::Missing { key, cause })
    }

    /// The keys that read back as this, but for the defaults.
    pub(super) fn put(&self, backend: &mut Map<String, Json>) {
        let default = Self::default();
        let mut put = |key: &str, differs: bool, value: Json| {
            if differs {
                backend.insert(key.into(), value);
            }
        };
        put("ListenPort", self.port != default.port, json!(self.port.number()));
        put("ListenPortV6", self.port_v6 != default.port_v6, json!(self.port_v6.number()));
        put("MTU", self.mtu.is_some(), json!(self.mtu.map(Mtu::bytes)));
        let shared = self.shared.as_ref().map(|shared| key_text(shared.reveal()));
        put("PSK", shared.is_some(), json!(shared));
        put("PersistentKeepaliveInterval", self.keepalive != 0, json!(self.keepalive));
        put("Mode", self.mode != default.mode, json!(self.mode.name()));
    }
}

/// As upstream, an empty one is none.
fn shared(value: &Value<'_>) -> Result<Option<SecretKey>, ConfigError> {
    match value.string()? {
        text if text.is_empty() => Ok(None),
        text => secret_key(&text).map(Some).map_err(|error| value.error(error)),
    }
}

fn mode(value: &Value<'_>) -> Result<WireguardMode, ConfigError> {
    let name = value.string()?;
    let found = WireguardMode::ALL.into_iter().find(|(known, _)| name.eq_ignore_ascii_case(known));
    match found {
        Some((_, mode)) => Ok(mode),
        None if name.is_empty() => Ok(WireguardMode::default()),
        None => Err(value.error("no valid Mode configured; say separate, auto, ipv4 or ipv6")),
    }
}
