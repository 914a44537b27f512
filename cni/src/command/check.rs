//! CHECK: is the container's place on the network still as ADD made it?

use std::net::IpAddr;
use std::path::Path;

use flannel_core::act::attach;
use flannel_core::decide::endpoint::{Birth, EndpointRoute, EndpointSpec};
use flannel_core::touch::ledger::Ledger;
use flannel_core::touch::world::kernel::{Kernel, Namespace};
use flannel_core::words::addr::{InterfaceAddress, Mac};
use flannel_core::words::code::Code;
use flannel_core::words::name::{Attachment, LinkName};
use serde_json::Value;

use super::{
    Answer, Scratch, attach_error, ledger_error, no_namespace, pools, refuse_own_namespace, shared,
    subnet_env, world_error,
};
use crate::args::{Call, CniArgs};
use crate::conf::{Conf, Kept, Worker};
use crate::delegate;
use crate::result::CniError;

pub(super) fn check(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    let link = call.link()?;
    refuse_own_namespace(call)?;
    let kept = Scratch::of(conf, &owner).read();
    let previous = conf.previous.as_ref();
    if let Worker::Plugin(kind) = kept.as_ref().map_or_else(|| conf.worker(), Kept::worker) {
        let Some(kept) = kept else {
            return Err(drift(format!("nothing is known of container {}", owner.container)));
        };
        let conf = kept.with("prevResult", previous.cloned());
        return delegate::run(&kind, &call.path, None, &conf.to_value()).map(Answer::Printed);
    }
    let previous = previous
        .and_then(Previous::read)
        .ok_or_else(|| CniError::new(CniError::CONFIG, "Required prevResult missing or unreadable"))?;
    let env = subnet_env(conf, CniError::TRY_AGAIN)?;
    let wish = conf.wish(&CniArgs::parse(&call.args)?)?;
    let pools = pools(&env)?;
    let shared = shared(conf, &wish, &env, &pools)?;
    let namespace = Namespace::open(Path::new(&call.netns)).map_err(|error| no_namespace(call, &error))?;
    let mut sandbox = Kernel::open_inside(namespace).map_err(world_error)?;
    let mut host = Kernel::open().map_err(world_error)?;

    let derived = owner.host_link(conf.network().as_str());
    let addresses = previous.addresses(link);
    let spec = EndpointSpec {
        host_link: previous.host_link(shared.bridge.name).unwrap_or(derived),
        container_link: link,
        birth: Birth::InSandbox,
        bridge: shared.bridge.name,
        hairpin: wish.hairpin,
        isolated: false,
        mtu: None,
        mac: None,
        addresses: addresses.clone(),
        gateways: previous.gateways(),
        routes: previous.routes(),
    };
    let mut missing =
        attach::check(&mut host, Some(&mut sandbox), &shared, &spec).map_err(|error| attach_error(&error))?;
    missing.extend(wrong_mac(&mut sandbox, link, previous.mac(link))?);
    missing.extend(unclaimed(conf, &owner, &addresses)?);
    if missing.is_empty() { Ok(Answer::Nothing) } else { Err(drift(missing.join("; "))) }
}

fn drift(details: String) -> CniError {
    let code = Code::ATTACHMENT_DRIFT;
    CniError::new(code.number().into(), code.title()).with_details(details)
}

/// Only where the result named one: plugins that ran later may have changed it and said so there.
fn wrong_mac(sandbox: &mut Kernel, link: LinkName, wanted: Option<Mac>) -> Result<Option<String>, CniError> {
    let have = sandbox.link(link).map_err(world_error)?.and_then(|link| link.mac);
    Ok(wanted
        .filter(|wanted| have.is_some() && have != Some(*wanted))
        .map(|mac| format!("ip link set {link} address {mac}")))
}

/// Addresses of the container that the ledger does not know as its own.
fn unclaimed(
    conf: &Conf,
    owner: &Attachment,
    addresses: &[InterfaceAddress],
) -> Result<Vec<String>, CniError> {
    let nobody = |address: &InterfaceAddress| format!("no entry for {} in the ledger", address.address());
    let found = Ledger::find(&conf.subnet_file, &conf.ledger_root(), &conf.name).map_err(ledger_error)?;
    let Some(ledger) = found else { return Ok(addresses.iter().map(nobody).collect()) };
    let held = ledger.lock().map_err(ledger_error)?;
    let mut wrong = Vec::new();
    for address in addresses {
        match held.owner(address.address()).map_err(ledger_error)? {
            None => wrong.push(nobody(address)),
            Some(other) if other.container != owner.container => {
                wrong.push(format!("the ledger says that {} belongs to {other}", address.address()));
            }
            Some(_) => {}
        }
    }
    Ok(wrong)
}

/// The host's end as a result names it: for what was not made by us.
pub(super) fn host_link(result: &Value) -> Option<LinkName> {
    let interfaces = result.get("interfaces")?.as_array()?;
    interfaces
        .iter()
        .filter(|interface| text(interface, "sandbox").is_none_or(str::is_empty))
        .filter_map(|interface| LinkName::new(text(interface, "name")?).ok())
        .find(|name| name.as_str().starts_with("veth"))
}

/// The result of ADD, as far as CHECK needs it. Written by us or by upstream's bridge plugin.
struct Previous<'a> {
    interfaces: &'a [Value],
    ips: &'a [Value],
    routes: &'a [Value],
}

impl<'a> Previous<'a> {
    fn read(result: &'a Value) -> Option<Self> {
        let list = |key| result.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        result.is_object().then(|| Self {
            interfaces: list("interfaces"),
            ips: list("ips"),
            routes: list("routes"),
        })
    }

    fn host_link(&self, bridge: LinkName) -> Option<LinkName> {
        self.interfaces
            .iter()
            .filter(|interface| text(interface, "sandbox").is_none_or(str::is_empty))
            .filter_map(|interface| LinkName::new(text(interface, "name")?).ok())
            .find(|name| *name != bridge)
    }

    fn container(&self, link: LinkName) -> Option<(usize, &'a Value)> {
        self.interfaces.iter().enumerate().find(|(_, interface)| {
            text(interface, "name") == Some(link.as_str())
                && text(interface, "sandbox").is_some_and(|sandbox| !sandbox.is_empty())
        })
    }

    fn mac(&self, link: LinkName) -> Option<Mac> {
        text(self.container(link)?.1, "mac")?.parse().ok()
    }

    fn addresses(&self, link: LinkName) -> Vec<InterfaceAddress> {
        let container = self.container(link).map(|(index, _)| index as u64);
        self.ips
            .iter()
            .filter(|ip| match ip.get("interface").and_then(Value::as_u64) {
                Some(index) => Some(index) == container,
                None => true,
            })
            .filter_map(|ip| text(ip, "address")?.parse().ok())
            .collect()
    }

    fn gateways(&self) -> Vec<IpAddr> {
        self.ips.iter().filter_map(|ip| text(ip, "gateway")?.parse().ok()).collect()
    }

    fn routes(&self) -> Vec<EndpointRoute> {
        let route = |route: &Value| {
            Some(EndpointRoute {
                destination: text(route, "dst")?.parse::<InterfaceAddress>().ok()?.prefix(),
                via: text(route, "gw").and_then(|via| via.parse().ok()),
                metric: route
                    .get("priority")
                    .and_then(Value::as_u64)
                    .and_then(|m| u32::try_from(m).ok())
                    .unwrap_or(0),
            })
        };
        self.routes.iter().filter_map(route).collect()
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}
