//! Routes as configurations and results write them: `dst`, `gw`, and what version 1.1.0 added.

use std::net::IpAddr;

use flannel_core::decide::endpoint::EndpointRoute;
use flannel_core::words::addr::{Family, InterfaceAddress};
use flannel_core::words::fact::{RouteExtras, RouteScope, RouteTable};
use serde_json::Value;

use crate::json::{Object, asked, list, number, string, text};
use crate::result::CniError;

/// A list of routes under this key; `place` is what the object is called in messages.
pub(crate) fn read(object: &Object, key: &str, place: &str) -> Result<Vec<EndpointRoute>, CniError> {
    let each = |(index, value)| route(value, &format!("{place}.{key}[{index}]"));
    list(object, key)?.iter().enumerate().map(each).collect()
}

/// One route; `place` is what it is called in messages.
pub(crate) fn route(value: &Value, place: &str) -> Result<EndpointRoute, CniError> {
    let route = value.as_object().ok_or_else(|| CniError::decoding(format!("{place} is no object")))?;
    let destination = string(route, "dst")?.ok_or_else(|| CniError::config(format!("{place} has no dst")))?;
    // Go takes host bits off without a word, and such configurations exist.
    let destination: InterfaceAddress =
        destination.parse().map_err(|error| CniError::config(format!("{place}.dst: {error}")))?;
    let destination = destination.prefix();
    let via = text(route, "gw")?
        .map(|via| {
            via.parse::<IpAddr>().map_err(|_| CniError::config(format!("{place}.gw: {via:?} is no address")))
        })
        .transpose()?;
    if via.is_some_and(|via| Family::of(via) != destination.family()) {
        return Err(CniError::config(format!("{place}: dst and gw are of different families")));
    }
    let small = |key: &str| -> Result<Option<u32>, CniError> {
        let Some(value) = asked(route, key) else { return Ok(None) };
        let number = number(value, &format!("{place}.{key}"))?;
        let number = u32::try_from(number);
        number.map(Some).map_err(|_| CniError::config(format!("{place}.{key} is too large")))
    };
    // Zero is a scope, and the one that a gateway has anyway.
    let scope =
        match small("scope")? {
            None => None,
            Some(scope) => Some(u8::try_from(scope).map(RouteScope::of).map_err(|_| {
                CniError::config(format!("{place}.scope {scope} is none: scopes are 0 to 255"))
            })?),
        };
    Ok(EndpointRoute {
        destination,
        via,
        metric: small("priority")?.unwrap_or(0),
        scope,
        extras: RouteExtras {
            table: small("table")?.map_or(RouteTable::MAIN, RouteTable),
            mtu: small("mtu")?,
            advmss: small("advmss")?,
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn routes(list: Value) -> Result<Vec<EndpointRoute>, CniError> {
        read(json!({ "Routes": list }).as_object().unwrap(), "routes", "ipam")
    }

    #[test]
    fn routes_are_read_as_go_reads_them() {
        let read =
            routes(json!([{ "dst": "10.9.1.7/16", "gw": "10.1.17.9", "priority": 5 }, { "dst": "::/0" }]));
        let read = read.unwrap();
        assert_eq!(read[0].destination.to_string(), "10.9.0.0/16");
        assert_eq!((read[0].via, read[0].metric), (Some("10.1.17.9".parse().unwrap()), 5));
        assert_eq!(read[1], EndpointRoute::to("::/0".parse().unwrap()));
        let all = json!([{ "dst": "10.9.0.0/16", "mtu": 1300, "advmss": 1200, "table": 70000, "scope": 253, "priority": 9 }]);
        let one = routes(all).unwrap()[0];
        let extras = RouteExtras { table: RouteTable(70_000), mtu: Some(1300), advmss: Some(1200) };
        assert_eq!((one.extras, one.scope, one.metric), (extras, Some(RouteScope::Link), 9));
        for (wrong, code, place) in [
            (json!([{ "dst": "10.9.0.0/16", "gw": "fd00::1" }]), 7, "ipam.routes[0]"),
            (json!([{ "gw": "10.1.1.1" }]), 7, "ipam.routes[0] has no dst"),
            (json!([{ "dst": "10.9.0.0/16", "scope": 256 }]), 7, "scope 256"),
            (json!([{ "dst": "10.9.0.0/16", "mtu": "x" }]), 6, "ipam.routes[0].mtu"),
            (json!({}), 6, "routes"),
        ] {
            let error = routes(wrong.clone()).unwrap_err();
            assert!(error.code == code && error.msg.contains(place), "{wrong}: {error}");
        }
    }
}
