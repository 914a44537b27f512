//! What a bridge configuration asks for, be it a `bridge` plugin's own or flannel's `delegate`
//! (upstream: containernetworking/plugins plugins/main/bridge/bridge.go `NetConf`).

use std::net::IpAddr;

use flannel_core::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use flannel_core::words::name::LinkName;
use flannel_core::words::units::Mtu;
use serde_json::Value;

use crate::args::CniArgs;
use crate::conf::Conf;
use crate::json::{Object, asked, asks, field, first_asked, flag, list, number, object, string, text};
use crate::result::{CniError, Route};

/// What is asked of the bridge and the endpoint.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Wish {
    /// A bridge by name.
    pub(crate) bridge: Option<LinkName>,
    /// Instead of the network's.
    pub(crate) mtu: Option<Mtu>,
    /// Whether what leaves the network gets the node's address; none if nothing is said.
    pub(crate) ip_masq: Option<bool>,
    pub(crate) hairpin: bool,
    pub(crate) default_gateway: bool,
    /// Take other addresses off the bridge.
    pub(crate) force_address: bool,
    pub(crate) dns: Object,
    /// These addresses and no others.
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) mac: Option<Mac>,
}

impl Wish {
    /// Reads the object that describes the bridge; `place` is what it is called in messages, with a dot (`delegate.`), or nothing. What
    /// upstream's plugin can do and this one cannot is an error that names it, if it is asked for.
    pub(crate) fn read(bridge: &Object, place: &str, conf: &Conf, args: &CniArgs) -> Result<Self, CniError> {
        refuse_what_is_not_served(bridge, place)?;
        let mtu = match asked(bridge, "mtu") {
            None => None,
            Some(mtu) => Some(number(mtu, &format!("{place}mtu")).and_then(|bytes| {
                Mtu::new(bytes).map_err(|error| CniError::config(format!("{place}mtu: {error}")))
            })?),
        };
        let name = text(bridge, "bridge")?.map(|name| {
            LinkName::new(&name).map_err(|error| CniError::config(format!("{place}bridge: {error}")))
        });
        let dns = object(bridge, "dns")?.filter(|dns| !dns.is_empty());
        Ok(Self {
            bridge: name.transpose()?,
            mtu,
            ip_masq: flag(bridge, "ipMasq")?,
            hairpin: flag(bridge, "hairpinMode")?.unwrap_or(false),
            default_gateway: flag(bridge, "isDefaultGateway")?.unwrap_or(false),
            force_address: flag(bridge, "forceAddress")?.unwrap_or(false),
            dns: dns.unwrap_or_else(|| conf.dns.clone()),
            ips: conf.ips(args)?,
            mac: conf.mac(args)?,
        })
    }
}

fn refuse_what_is_not_served(bridge: &Object, place: &str) -> Result<(), CniError> {
    const UNSERVED: [&str; 9] = [
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
    if let Some(key) = first_asked(bridge, &UNSERVED) {
        return Err(CniError::unsupported(format!("{place}{key} is not supported")));
    }
    if flag(bridge, "isGateway")? == Some(false) && flag(bridge, "isDefaultGateway")? != Some(true) {
        return Err(CniError::unsupported(format!(
            "{place}isGateway false is not supported: the bridge is the gateway of the node's containers"
        )));
    }
    Ok(())
}

/// `ipam.routes`.
pub(crate) fn routes(ipam: &Object) -> Result<Vec<Route>, CniError> {
    list(ipam, "routes")?.iter().enumerate().map(|(index, route)| self::route(index, route)).collect()
}

fn route(index: usize, route: &Value) -> Result<Route, CniError> {
    let place = format!("ipam.routes[{index}]");
    let route = route.as_object().ok_or_else(|| CniError::decoding(format!("{place} is no object")))?;
    if let Some(key) = first_asked(route, &["mtu", "advmss", "table", "scope"]) {
        return Err(CniError::unsupported(format!("{place}.{key} is not supported")));
    }
    let destination = string(route, "dst")?.ok_or_else(|| CniError::config(format!("{place} has no dst")))?;
    // Go takes host bits off without a word, and such configurations exist.
    let destination: InterfaceAddress =
        destination.parse().map_err(|error| CniError::config(format!("{place}.dst: {error}")))?;
    let destination: Prefix = destination.prefix();
    let via = text(route, "gw")?
        .map(|via| {
            via.parse::<IpAddr>().map_err(|_| CniError::config(format!("{place}.gw: {via:?} is no address")))
        })
        .transpose()?;
    if via.is_some_and(|via| Family::of(via) != destination.family()) {
        return Err(CniError::config(format!("{place}: dst and gw are of different families")));
    }
    let metric = match field(route, "priority").filter(|priority| asks(priority)) {
        None => 0,
        Some(priority) => u32::try_from(number(priority, &format!("{place}.priority"))?)
            .map_err(|_| CniError::config(format!("{place}.priority is too large")))?,
    };
    Ok(Route { destination, via, metric })
}

#[cfg(test)]
#[path = "wish_tests.rs"]
mod tests;
