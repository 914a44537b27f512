//! Addresses from an address plugin: host-local is this process, any other one is executed as upstream does it.

use flannel_core::decide::endpoint::EndpointRoute;
use flannel_core::words::addr::InterfaceAddress;
use serde_json::Value;

use super::network::Lease;
use super::routes;
use crate::args::{Call, Verb};
use crate::conf::Conf;
use crate::delegate;
use crate::host_local;
use crate::json::{Object, field, list, object, text};
use crate::result::{Answer, CniError};

/// What an address plugin gave.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Given {
    pub(super) leases: Vec<Lease>,
    pub(super) routes: Vec<EndpointRoute>,
    pub(super) dns: Object,
}

/// Has the plugin do what the call asks for.
pub(super) fn run(kind: &str, call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    match kind {
        "host-local" => host_local::run(call, conf),
        other => {
            let verb = Some(call.verb.name());
            delegate::run(other, &call.path, verb, &Value::Object(conf.given.clone())).map(Answer::Printed)
        }
    }
}

/// Has the plugin give addresses.
pub(super) fn add(kind: &str, call: &Call, conf: &Conf) -> Result<Given, CniError> {
    let read =
        object_of(run(kind, call, conf)?).and_then(|result| read(&result)).and_then(|given| {
            match given.leases.is_empty() {
                true => Err(CniError::config("IPAM plugin returned missing IP config")),
                false => Ok(given),
            }
        });
    read.map_err(|error| {
        let error = CniError { msg: format!("the result of the IPAM plugin {kind}: {}", error.msg), ..error };
        take_back(kind, call, conf, error)
    })
}

/// An ADD that fails later leaves no addresses behind.
pub(super) fn take_back(kind: &str, call: &Call, conf: &Conf, error: CniError) -> CniError {
    let mut back = call.clone();
    back.verb = Verb::Del;
    match run(kind, &back, conf) {
        Ok(_) => error,
        Err(undo) => error.but_left(&undo),
    }
}

fn object_of(answer: Answer) -> Result<Object, CniError> {
    match answer {
        Answer::Value(Value::Object(result)) => Ok(result),
        Answer::Printed(bytes) => {
            serde_json::from_slice(&bytes).map_err(|error| CniError::decoding(error.to_string()))
        }
        Answer::Value(_) | Answer::Nothing => Err(CniError::decoding("it is no object")),
    }
}

/// A result of any version.
fn read(result: &Object) -> Result<Given, CniError> {
    let mut given = Given {
        leases: Vec::new(),
        routes: routes::read(result, "routes", "result")?,
        dns: object(result, "dns")?.unwrap_or_default(),
    };
    for ip in list(result, "ips")? {
        let ip = ip.as_object().ok_or_else(|| CniError::decoding(format!("ips holds {ip}")))?;
        given.leases.push(lease(ip, "address")?);
    }
    // 0.1.0 and 0.2.0 have one address of a family, and its routes with it.
    for key in ["ip4", "ip6"] {
        if let Some(Value::Object(ip)) = field(result, key) {
            given.leases.push(lease(ip, "ip")?);
            given.routes.extend(routes::read(ip, "routes", key)?);
        }
    }
    Ok(given)
}

fn lease(ip: &Object, key: &str) -> Result<Lease, CniError> {
    let missing = || CniError::decoding(format!("an address without {key}"));
    let address = text(ip, key)?.ok_or_else(missing)?;
    let address: InterfaceAddress =
        address.parse().map_err(|error| CniError::decoding(format!("{address:?}: {error}")))?;
    let gateway = match text(ip, "gateway")? {
        None => None,
        Some(gateway) => Some(
            gateway.parse().map_err(|_| CniError::decoding(format!("gateway {gateway:?} is no address")))?,
        ),
    };
    Ok(Lease { address, gateway })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn given(result: Value) -> Result<Given, CniError> {
        read(result.as_object().unwrap())
    }

    #[test]
    fn results_of_every_version_say_the_same() {
        let new = given(json!({ "cniVersion": "1.0.0", "dns": { "nameservers": ["10.1.0.1"] },
            "ips": [{ "address": "10.1.2.3/24", "gateway": "10.1.2.1" }, { "address": "fd00::3/64" }],
            "routes": [{ "dst": "0.0.0.0/0" }] }))
        .unwrap();
        let old = given(json!({ "cniVersion": "0.2.0", "dns": { "nameservers": ["10.1.0.1"] },
            "ip4": { "ip": "10.1.2.3/24", "gateway": "10.1.2.1", "routes": [{ "dst": "0.0.0.0/0" }] },
            "ip6": { "ip": "fd00::3/64" } }))
        .unwrap();
        assert_eq!(new, old);
        let gateways: Vec<_> = new.leases.iter().map(|lease| lease.gateway).collect();
        assert_eq!(gateways, ["10.1.2.1".parse().ok(), None]);
    }

    #[test]
    fn nonsense_is_an_error_that_says_what() {
        for (wrong, part) in [
            (json!({ "ips": ["10.1.2.3/24"] }), "ips holds"),
            (json!({ "ips": [{ "gateway": "10.1.2.1" }] }), "without address"),
            (json!({ "ips": [{ "address": "10.1.2.300/24" }] }), "10.1.2.300"),
            (json!({ "ip4": { "ip": "10.1.2.3/24", "gateway": "x" } }), "\"x\" is no address"),
        ] {
            let error = given(wrong.clone()).unwrap_err();
            assert!(error.code == 6 && error.msg.contains(part), "{wrong}: {error}");
        }
    }
}
