//! A container on a bridge, in this process: what upstream's bridge plugin does.

pub(crate) mod check;
mod ipam;
mod network;
mod plugin;
pub(crate) mod routes;
pub(crate) mod wish;

use std::time::Duration;

use flannel_core::act::attach::{self, AttachError, Shared};
use flannel_core::act::claim::Request;
use flannel_core::act::life::Ports;
use flannel_core::decide::endpoint::EndpointSpec;
use flannel_core::decide::ranges::RangeSet;
use flannel_core::touch::ledger::{Entry, Ledger, Maker, Released};
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::addr::Mac;
use flannel_core::words::fact::LinkKind;
use flannel_core::words::name::{Attachment, LinkName};
use serde_json::Value;

use crate::args::Call;
use crate::previous::Previous;
use crate::result::{Attached, CniError};
use crate::sandbox::{self, Home};
pub(crate) use network::{Lease, Network, Spared};
pub(crate) use plugin::run;
use wish::Wish;

/// Longest wait for objections to IPv6 addresses, as upstream's.
const OBJECTIONS: Duration = Duration::from_secs(10);

/// What ADD made.
pub(crate) struct Made {
    pub(crate) attached: Attached,
    /// Attachments that were found dead when no address was left, and whose addresses were freed.
    pub(crate) reclaimed: Vec<Entry>,
}

/// Puts a container on the network with addresses of a ledger. Nothing but the bridge is left behind on failure.
pub(crate) fn add(
    call: &Call,
    home: Home,
    ledger: &Ledger,
    network: &Network,
    wish: &Wish,
) -> Result<Made, CniError> {
    let (owner, link) = (call.attachment()?, call.link()?);
    wish.refuse_addresses()?;
    let mut place = Place::open(home)?;
    let shared = network.shared(wish, &[])?;
    let request = Request { owner: &owner, sets: &network.sets, wanted: &wish.ips, maker: Maker::Ourselves };
    let mut life = Ports { network: &network.name, bridge: network.bridge };
    let (claimed, (leases, spec, bridge_mac)) = attach::attach(ledger, &request, &mut life, |offers| {
        let leases: Vec<Lease> = offers.iter().map(Lease::from).collect();
        let spec = network.endpoint(&owner, link, wish, &leases);
        let bridge_mac = place.connect(&shared, &spec)?;
        Ok((leases, spec, bridge_mac))
    })?;
    if let Some(first) = claimed.reclaimed.first() {
        say!(
            "flannel: {} had no free address: took back {} of containers that are gone, {} of {} first",
            network.sets.iter().map(RangeSet::to_string).collect::<Vec<_>>().join(", "),
            claimed.reclaimed.len(),
            first.address,
            first.owner,
        );
    }
    let attached = network.describe(wish, (&shared, &spec), &leases, bridge_mac, &call.netns);
    Ok(Made { attached, reclaimed: claimed.reclaimed })
}

/// Puts a container on the network with addresses that somebody else gave, or without. Nothing but the bridge is left behind on failure.
fn add_leased(
    call: &Call,
    home: Home,
    network: &Network,
    wish: &Wish,
    leases: &[Lease],
) -> Result<Attached, CniError> {
    let spec = network.endpoint(&call.attachment()?, call.link()?, wish, leases);
    let shared = network.shared(wish, leases)?;
    let bridge_mac = Place::open(home)?.connect(&shared, &spec)?;
    Ok(network.describe(wish, (&shared, &spec), leases, bridge_mac, &call.netns))
}

/// Where a container's interface is made.
struct Place {
    host: Kernel,
    sandbox: Kernel,
}

impl Place {
    fn open(home: Home) -> Result<Self, CniError> {
        let sandbox = Kernel::open_inside(home.inside)?;
        let mut host = Kernel::open()?;
        host.set_sandbox(home.beside);
        Ok(Self { host, sandbox })
    }

    /// Makes it, and waits for objections to its addresses if that was asked for.
    fn connect(&mut self, shared: &Shared, spec: &EndpointSpec) -> Result<Option<Mac>, AttachError> {
        let mac = attach::connect(&mut self.host, Some(&mut self.sandbox), shared, spec)?;
        if !spec.options.detect_duplicates {
            return Ok(mac);
        }
        self.sandbox.await_addresses(spec.container_link, OBJECTIONS).map_err(|error| {
            match disconnect(&mut self.host, spec) {
                Ok(()) => error.into(),
                Err(undo) => AttachError::Undo { error: Box::new(error.into()), undo: undo.to_string() },
            }
        })?;
        Ok(mac)
    }
}

fn disconnect(host: &mut Kernel, spec: &EndpointSpec) -> Result<(), CniError> {
    if spec.options.guard.is_some() {
        attach::lift_guard(host, spec.host_link)?;
    }
    attach::disconnect(host, spec.host_link)?;
    Ok(())
}

/// Deletes the veth pair by whatever end can be found. `network` is what its host's end is named after; `guarded` says that
/// it may be held to one MAC.
pub(crate) fn unlink(
    call: &Call,
    network: &str,
    previous: Option<&Value>,
    guarded: bool,
) -> Result<(), CniError> {
    let host_link = call.attachment()?.host_link(network);
    let mut host = Kernel::open()?;
    if guarded {
        attach::lift_guard(&mut host, host_link)?;
    }
    if host.delete_link(host_link)? {
        return Ok(());
    }
    // Not made by us, or gone already.
    if let Some(mut sandbox) = sandbox::find(call) {
        return delete_veth(&mut sandbox, call.link()?);
    }
    match previous.and_then(Previous::read).and_then(|previous| previous.host_veth()) {
        Some(host_link) => delete_veth(&mut host, host_link),
        None => Ok(()),
    }
}

fn delete_veth(world: &mut Kernel, name: LinkName) -> Result<(), CniError> {
    let link = world.link(name)?;
    if link.is_some_and(|link| matches!(link.kind, LinkKind::Veth { .. })) {
        world.delete_link(name)?;
    }
    Ok(())
}

/// Frees the attachment's addresses.
pub(crate) fn release(ledger: Option<&Ledger>, owner: &Attachment) -> Result<Released, CniError> {
    let Some(ledger) = ledger else { return Ok(Released::default()) };
    Ok(ledger.lock()?.release(owner)?)
}

/// Takes the addresses off the bridge that the node had before, where these were the last to be in their subnets.
pub(crate) fn retire(network: &Network, wish: &Wish, released: &Released) -> Result<(), CniError> {
    let left: Vec<_> = released.left.iter().copied().collect();
    let shared = network.shared(wish, &[])?;
    Ok(attach::retire_subnets(&mut Kernel::open()?, &shared, &released.addresses, &left)?)
}
