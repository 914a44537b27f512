//! A result that somebody printed before: an earlier plugin of the chain, or our own ADD. Ours or upstream's, of version 0.3.0 or later.

use std::net::IpAddr;

use flannel_core::decide::endpoint::EndpointRoute;
use flannel_core::words::addr::{InterfaceAddress, Mac};
use flannel_core::words::name::LinkName;
use serde_json::Value;

use crate::bridge::routes;
use crate::conf::Conf;
use crate::json::Object;
use crate::result::CniError;

/// The result of the plugin before this one, to be passed on. A plugin that works on what others made needs one.
pub(crate) fn required(conf: &Conf) -> Result<Object, CniError> {
    match &conf.previous {
        Some(Value::Object(result)) => {
            let mut result = result.clone();
            // A result without a version has that of the configuration.
            result.entry("cniVersion").or_insert_with(|| conf.version.text().into());
            Ok(result)
        }
        Some(other) => Err(CniError::decoding(format!("prevResult is {other}, an object was expected"))),
        None => Err(CniError::config("Required prevResult missing").with_details(
            "this plugin works on an interface that another one made: list it behind that one",
        )),
    }
}

/// The result, by reference.
pub(crate) struct Previous<'a> {
    interfaces: &'a [Value],
    ips: &'a [Value],
    routes: &'a [Value],
}

impl<'a> Previous<'a> {
    /// None if it is no object.
    pub(crate) fn read(result: &'a Value) -> Option<Self> {
        let list = |key| result.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        result.is_object().then(|| Self {
            interfaces: list("interfaces"),
            ips: list("ips"),
            routes: list("routes"),
        })
    }

    /// The host's end of the container's interface: the one on the host that is not the bridge.
    pub(crate) fn host_link(&self, bridge: LinkName) -> Option<LinkName> {
        self.on_host().find(|name| *name != bridge)
    }

    /// The host's end, by the name that every bridge plugin gives it: for who does not know the bridge.
    pub(crate) fn host_veth(&self) -> Option<LinkName> {
        self.on_host().find(|name| name.as_str().starts_with("veth"))
    }

    /// Interfaces on the host, in the order given: the bridge, if there is one, then the end of the container's.
    pub(crate) fn on_host(&self) -> impl Iterator<Item = LinkName> {
        self.interfaces
            .iter()
            .filter(|interface| text(interface, "sandbox").is_none_or(str::is_empty))
            .filter_map(|interface| LinkName::new(text(interface, "name")?).ok())
    }

    fn container(&self, link: LinkName) -> Option<(usize, &'a Value)> {
        self.interfaces.iter().enumerate().find(|(_, interface)| {
            text(interface, "name") == Some(link.as_str())
                && text(interface, "sandbox").is_some_and(|sandbox| !sandbox.is_empty())
        })
    }

    /// MAC of the container's interface.
    pub(crate) fn mac(&self, link: LinkName) -> Option<Mac> {
        text(self.container(link)?.1, "mac")?.parse().ok()
    }

    /// Addresses of the container's interface.
    pub(crate) fn addresses(&self, link: LinkName) -> Vec<InterfaceAddress> {
        self.leases(link).into_iter().map(|(address, _)| address).collect()
    }

    fn of_container(&self, link: LinkName) -> impl Iterator<Item = &'a Value> {
        let container = self.container(link).map(|(index, _)| index as u64);
        self.ips.iter().filter(move |ip| match ip.get("interface").and_then(Value::as_u64) {
            Some(index) => Some(index) == container,
            None => true,
        })
    }

    /// Addresses of the container's interface, each with its gateway if it has one.
    pub(crate) fn leases(&self, link: LinkName) -> Vec<(InterfaceAddress, Option<IpAddr>)> {
        let lease = |ip: &Value| {
            let gateway = text(ip, "gateway").and_then(|gateway| gateway.parse().ok());
            Some((text(ip, "address")?.parse().ok()?, gateway))
        };
        self.of_container(link).filter_map(lease).collect()
    }

    /// Gateways, in the order of the addresses.
    pub(crate) fn gateways(&self) -> Vec<IpAddr> {
        self.ips.iter().filter_map(|ip| text(ip, "gateway")?.parse().ok()).collect()
    }

    /// The container's routes.
    pub(crate) fn routes(&self) -> Vec<EndpointRoute> {
        let route = |route| routes::route(route, "prevResult.routes").ok();
        self.routes.iter().filter_map(route).collect()
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}
