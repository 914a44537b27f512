//! The plugin `portmap`: ports of this host for a container that earlier plugins of the chain put on a network (upstream:
//! plugins/meta/portmap). Behind our own `flannel`, which does the same, it finds the work done.

use flannel_core::decide::hostports::MARK_BIT;
use flannel_core::touch::world::kernel::{HostAddress, Kernel, Netfilter};
use flannel_core::words::addr::InterfaceAddress;
use flannel_core::words::hostport::CallerMasquerade;
use flannel_core::words::name::LinkName;
use flannel_core::words::rule::TableFamily;
use serde_json::Value;

use crate::args::{Call, Verb};
use crate::bridge::check::drift;
use crate::conf::Conf;
use crate::json::{Object, field, first_asked, flag, number, text};
use crate::ports::{self, Place, PortMappings};
use crate::previous::{self, Previous};
use crate::result::{Answer, CniError};

/// What the configuration says for all containers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PortmapConf {
    masquerade: CallerMasquerade,
}

impl PortmapConf {
    fn read(given: &Object) -> Result<Self, CniError> {
        if let Some(key) = first_asked(given, &["externalSetMarkChain", "conditionsV4", "conditionsV6"]) {
            return Err(CniError::unsupported(format!(
                "{key} is not supported: it speaks of rules of iptables, and none are made: leave it out"
            )));
        }
        if let Some(backend) = text(given, "backend")?
            && !matches!(backend.as_str(), "iptables" | "nftables")
        {
            return Err(CniError::config(format!(
                "backend is {backend:?}: leave it out; all ports are published by nftables"
            )));
        }
        match field(given, "markMasqBit").filter(|bit| !bit.is_null()) {
            Some(bit) if number(bit, "markMasqBit")? != u64::from(MARK_BIT) => {
                return Err(CniError::unsupported(format!(
                    "markMasqBit {bit} is not supported: one table serves the whole node, with bit {MARK_BIT}; leave it out"
                )));
            }
            _ => {}
        }
        let masquerade =
            match (flag(given, "snat")?.unwrap_or(true), flag(given, "masqAll")?.unwrap_or(false)) {
                (true, false) => CallerMasquerade::Needed,
                (true, true) => CallerMasquerade::Always,
                (false, false) => CallerMasquerade::Never,
                (false, true) => {
                    return Err(CniError::config(
                        "snat is false and masqAll is true: one says never, the other always",
                    ));
                }
            };
        Ok(Self { masquerade })
    }
}

/// Does what the call asks for.
pub(crate) fn run(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    match call.verb {
        Verb::Add => add(call, conf),
        Verb::Del => {
            // Whatever the configuration says by now.
            ports::withdraw(&conf.name, &call.attachment()?, true)?;
            Ok(Answer::Nothing)
        }
        Verb::Check => check(call, conf),
        Verb::Gc => gc(conf),
        Verb::Status => status(),
    }
}

fn add(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let settings = PortmapConf::read(&conf.given)?;
    let mappings = PortMappings::read(&conf.runtime)?;
    let previous = previous::required(conf)?;
    if !mappings.is_empty() {
        ports::publish(&place(call, conf, &previous)?, &mappings, settings.masquerade)?;
    }
    Ok(Answer::Value(Value::Object(previous)))
}

fn check(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let settings = PortmapConf::read(&conf.given)?;
    let mappings = PortMappings::read(&conf.runtime)?;
    let previous = previous::required(conf)?;
    if mappings.is_empty() {
        return Ok(Answer::Nothing);
    }
    let missing = ports::missing(&place(call, conf, &previous)?, &mappings, settings.masquerade)?;
    if missing.is_empty() { Ok(Answer::Nothing) } else { Err(drift(missing.join("; "))) }
}

fn gc(conf: &Conf) -> Result<Answer, CniError> {
    // The runtime did not say what is in use: that is not "nothing".
    let Some(valid) = &conf.valid else { return Ok(Answer::Nothing) };
    match ports::collect(&conf.name, valid)? {
        failed if failed.is_empty() => Ok(Answer::Nothing),
        failed => Err(CniError::leftover(failed.join("; "))),
    }
}

fn status() -> Result<Answer, CniError> {
    let usable = Netfilter::open().and_then(|mut filter| filter.table_names(TableFamily::Inet));
    match usable {
        Ok(_) => Ok(Answer::Nothing),
        Err(error) => Err(CniError { code: CniError::UNAVAILABLE, ..error.into() }),
    }
}

/// The container as earlier plugins describe it.
fn place<'a>(call: &Call, conf: &'a Conf, previous: &Object) -> Result<Place<'a>, CniError> {
    let (owner, link) = (call.attachment()?, call.link()?);
    let result = Value::Object(previous.clone());
    let read = Previous::read(&result);
    let mut addresses = read.as_ref().map(|previous| previous.addresses(link)).unwrap_or_default();
    if addresses.is_empty() {
        // Versions before 0.3.0.
        let old = |key| result.get(key)?.get("ip")?.as_str()?.parse().ok();
        addresses = ["ip4", "ip6"].into_iter().filter_map(old).collect();
    }
    if addresses.is_empty() {
        return Err(CniError::config(format!(
            "prevResult has no address for {}: there is nothing that ports could lead to",
            owner.interface
        )));
    }
    // The bridge first, then the veth, then what others made; or the veth alone.
    let mut on_host = read.iter().flat_map(Previous::on_host);
    let (first, second) = (on_host.next(), on_host.next());
    let towards = match previous.get("interfaces") {
        Some(_) => first,
        None => link_towards(&addresses)?,
    };
    Ok(Place { network: &conf.name, owner, addresses, towards, host_link: second.or(first) })
}

/// The host's interface in the container's subnet, for results that name no interfaces.
fn link_towards(addresses: &[InterfaceAddress]) -> Result<Option<LinkName>, CniError> {
    let is_near = |near: &HostAddress| {
        addresses.iter().any(|address| near.address.prefix().contains(address.address()))
    };
    let interfaces = Kernel::open()?.interfaces()?;
    let found = interfaces.iter().find(|interface| interface.addresses.iter().any(is_near));
    Ok(found.map(|interface| interface.name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn conf(value: &Value) -> Result<CallerMasquerade, CniError> {
        PortmapConf::read(value.as_object().unwrap()).map(|conf| conf.masquerade)
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        for (value, code) in [
            (json!({ "externalSetMarkChain": "KUBE-MARK-MASQ" }), 2),
            (json!({ "conditionsV4": ["!", "-d", "192.0.2.0/24"] }), 2),
            (json!({ "ConditionsV6": ["-i", "eth0"] }), 2),
            (json!({ "markMasqBit": 14 }), 2),
            (json!({ "markMasqBit": 0 }), 2),
            (json!({ "backend": "ebpf" }), 7),
            (json!({ "snat": false, "masqAll": true }), 7),
            (json!({ "snat": "no" }), 6),
        ] {
            let error = conf(&value).unwrap_err();
            let key = value.as_object().unwrap().keys().next().unwrap();
            assert!(
                error.code == code && error.to_string().to_lowercase().contains(&key.to_lowercase()),
                "{value}: {error}"
            );
        }
    }

    #[test]
    fn sources_are_kept_as_the_configuration_says() {
        let harmless =
            json!({ "backend": "iptables", "markMasqBit": 13, "conditionsV4": [], "conditionsV6": null });
        assert_eq!(conf(&harmless), Ok(CallerMasquerade::Needed));
        assert_eq!(conf(&json!({ "masqAll": true, "snat": true })), Ok(CallerMasquerade::Always));
        assert_eq!(conf(&json!({ "snat": false })), Ok(CallerMasquerade::Never));
    }
}
