//! The plugin `loopback`: a container's interface with itself (upstream: plugins/main/loopback). Runtimes that have none of their
//! own call it beside the network's, with whatever interface name they please; it is always `lo`.

use std::net::IpAddr;

use flannel_core::touch::world::kernel::{Kernel, Turn};
use flannel_core::words::addr::{Family, InterfaceAddress};
use flannel_core::words::name::LinkName;
use serde_json::{Value, json};

use crate::args::{Call, Verb};
use crate::bridge::check::drift;
use crate::conf::Conf;
use crate::result::{Answer, CniError, Version};
use crate::sandbox;

/// Does what the call asks for.
pub(crate) fn run(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let lo = LinkName::loopback();
    match call.verb {
        Verb::Add => add(call, conf),
        Verb::Del => {
            call.attachment()?;
            if let Some(mut inside) = sandbox::find(call) {
                inside.turn(lo, &up(false))?;
            }
            Ok(Answer::Nothing)
        }
        Verb::Check => {
            sandbox::refuse_own(call)?;
            let mut inside = Kernel::open_inside(sandbox::open(call)?)?;
            match inside.device(lo)?.is_some_and(|device| device.up) {
                true => Ok(Answer::Nothing),
                false => Err(drift("ip link set lo up")),
            }
        }
        Verb::Gc | Verb::Status => Ok(Answer::Nothing),
    }
}

const fn up(up: bool) -> Turn {
    Turn { up: Some(up), mac: None, mtu: None, promiscuous: None, all_multicast: None, queue: None }
}

fn add(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    call.attachment()?;
    sandbox::refuse_own(call)?;
    let mut inside = Kernel::open_inside(sandbox::open(call)?)?;
    inside.turn(LinkName::loopback(), &up(true))?;
    if let Some(previous) = &conf.previous {
        return Ok(Answer::Value(previous.clone()));
    }
    let interfaces = inside.interfaces()?;
    let on_lo = interfaces.iter().filter(|interface| interface.loopback).flat_map(|lo| &lo.addresses);
    let addresses: Vec<InterfaceAddress> = on_lo.map(|seen| seen.address).collect();
    // Who has another address there has more than a loopback, and the runtime should know.
    if let Some(other) = addresses.iter().find(|address| !address.address().is_loopback()) {
        return Err(CniError::config(format!("loopback interface found with non-loopback address {other}")));
    }
    let first = |family| addresses.iter().copied().find(|address| address.family() == family);
    let each: Vec<_> = [Family::V4, Family::V6].into_iter().filter_map(first).collect();
    result(conf.version, &call.netns, &each).map(Answer::Value)
}

/// The result in the shape of a version.
fn result(version: Version, netns: &str, addresses: &[InterfaceAddress]) -> Result<Value, CniError> {
    if version < Version::V0_3_0 {
        if addresses.is_empty() {
            return Err(CniError::config("cannot convert: no valid IP addresses"));
        }
        let mut result = json!({ "cniVersion": version.text(), "dns": {} });
        for address in addresses {
            let key = if address.address().is_ipv4() { "ip4" } else { "ip6" };
            result[key] = json!({ "ip": address.to_string() });
        }
        return Ok(result);
    }
    let ip = |address: &InterfaceAddress| {
        let mut ip = json!({ "interface": 0, "address": address.to_string() });
        if version < Version::V1_0_0 {
            ip["version"] = json!(if matches!(address.address(), IpAddr::V4(_)) { "4" } else { "6" });
        }
        ip
    };
    let mut result = json!({
        "cniVersion": version.text(),
        "interfaces": [{ "name": "lo", "mac": "00:00:00:00:00:00", "sandbox": netns }],
        "ips": addresses.iter().map(ip).collect::<Vec<_>>(),
    });
    if version < Version::V1_0_0 {
        result["dns"] = json!({});
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_have_the_shape_of_their_version() {
        let addresses = ["127.0.0.1/8", "::1/128"].map(|text| text.parse().unwrap());
        let at = |version| result(version, "/run/netns/a", &addresses).unwrap();
        assert_eq!(
            at(Version::V0_2_0),
            json!({ "cniVersion": "0.2.0", "ip4": { "ip": "127.0.0.1/8" }, "ip6": { "ip": "::1/128" }, "dns": {} })
        );
        assert_eq!(
            at(Version::V0_3_1)["ips"][1],
            json!({ "version": "6", "interface": 0, "address": "::1/128" })
        );
        assert_eq!(
            at(Version::V1_0_0),
            json!({ "cniVersion": "1.0.0",
                    "interfaces": [{ "name": "lo", "mac": "00:00:00:00:00:00", "sandbox": "/run/netns/a" }],
                    "ips": [{ "interface": 0, "address": "127.0.0.1/8" }, { "interface": 0, "address": "::1/128" }] })
        );
        assert!(result(Version::V0_1_0, "", &[]).is_err());
    }
}
