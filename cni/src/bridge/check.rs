//! CHECK: is the container's place on the network still as ADD made it?

use flannel_core::act::attach;
use flannel_core::decide::endpoint::EndpointSpec;
use flannel_core::touch::ledger::Ledger;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::addr::{InterfaceAddress, Mac};
use flannel_core::words::code::Code;
use flannel_core::words::name::LinkName;

use super::wish::Wish;
use super::{Lease, Network};
use crate::args::Call;
use crate::conf::Conf;
use crate::previous::Previous;
use crate::result::CniError;
use crate::sandbox;

/// What is not as it was made, as the commands that would make it; nothing if all is well. What later plugins added is no fault.
/// `leases` are addresses that are not of the network's sets.
pub(crate) fn check(
    call: &Call,
    conf: &Conf,
    network: &Network,
    wish: &Wish,
    leases: &[Lease],
) -> Result<Vec<String>, CniError> {
    let (owner, link) = (call.attachment()?, call.link()?);
    let previous = required(conf)?;
    let shared = network.shared(wish, leases)?;
    let mut sandbox = Kernel::open_inside(sandbox::open(call)?)?;
    let mut host = Kernel::open()?;
    let bare = network.endpoint(&owner, link, wish, &[]);
    let mac = previous.mac(link);
    let spec = EndpointSpec {
        host_link: previous.host_link(network.bridge).unwrap_or(bare.host_link),
        mtu: None,
        mac: None,
        addresses: previous.addresses(link),
        gateways: previous.gateways(),
        routes: previous.routes(),
        options: wish.endpoint_options(mac),
        ..bare
    };
    let mut missing = attach::check(&mut host, Some(&mut sandbox), &shared, &spec)?;
    missing.extend(wrong_mac(&mut sandbox, link, mac)?);
    Ok(missing)
}

fn required(conf: &Conf) -> Result<Previous<'_>, CniError> {
    let previous = conf.previous.as_ref().and_then(Previous::read);
    previous.ok_or_else(|| CniError::config("Required prevResult missing or unreadable"))
}

/// The error of CHECK.
pub(crate) fn drift(details: impl Into<String>) -> CniError {
    let code = Code::ATTACHMENT_DRIFT;
    CniError::new(code.number().into(), code.title()).with_details(details)
}

/// Only where the result named one: plugins that ran later may have changed it and said so there.
fn wrong_mac(sandbox: &mut Kernel, link: LinkName, wanted: Option<Mac>) -> Result<Option<String>, CniError> {
    let have = sandbox.link(link)?.and_then(|link| link.mac);
    Ok(wanted
        .filter(|wanted| have.is_some() && have != Some(*wanted))
        .map(|mac| format!("ip link set {link} address {mac}")))
}

/// Addresses of the container that the ledger does not know as its own.
pub(crate) fn unclaimed(call: &Call, conf: &Conf, ledger: Option<&Ledger>) -> Result<Vec<String>, CniError> {
    let (owner, addresses) = (call.attachment()?, required(conf)?.addresses(call.link()?));
    let nobody = |address: &InterfaceAddress| format!("no entry for {} in the ledger", address.address());
    let Some(ledger) = ledger else { return Ok(addresses.iter().map(nobody).collect()) };
    let held = ledger.lock()?;
    let mut wrong = Vec::new();
    for address in &addresses {
        match held.owner(address.address())? {
            None => wrong.push(nobody(address)),
            Some(other) if other.container != owner.container => {
                wrong.push(format!("the ledger says that {} belongs to {other}", address.address()));
            }
            Some(_) => {}
        }
    }
    Ok(wrong)
}
