//! Putting an endpoint on a network and taking it off again, for CNI and for Docker.
//!
//! An attach claims addresses, plans, makes the host's half and then the container's; what fails is undone in reverse. Detaching needs no
//! memory: the host's end of the veth pair has a name that follows from the attachment, and the container's end goes with it.
//!
//! Unlike a pass, an attach does not look before it writes what is new and its own, and not again afterwards: the kernel refuses what exists,
//! and every look costs. It only looks at what it shares, the bridge, and never removes anything there unless told to.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::claim::{ClaimError, Claimed, Request, claim, give_back};
use super::life::Life;
use super::pass::{ROUNDS_MAX, chain};
use crate::decide::bridge::{self, BridgeSpec, Masquerade};
use crate::decide::endpoint::{self, EndpointPlan, EndpointSpec};
use crate::decide::ranges::Offer;
use crate::touch::ledger::Ledger;
use crate::touch::world::{World, WorldError};
use crate::words::addr::{Family, InterfaceAddress, Mac};
use crate::words::fact::{
    Address, Change, Conflict, Fact, Facts, Guard, Key, Link, LinkKind, LinkModes, RouteProtocol, RouteTable,
    diff,
};
use crate::words::name::LinkName;
use crate::words::territory::Territory;

/// Why an endpoint could not be put on the network.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No addresses.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The plan contradicts itself.
    #[error("the endpoint cannot be planned")]
    Plan(#[from] Conflict),
    /// The kernel cannot be looked at.
    #[error(transparent)]
    World(#[from] WorldError),
    /// It is there already.
    #[error("{container_link} is attached already ({host_link} exists on the host): detach it first")]
    Exists {
        /// The container's end of the veth pair.
        container_link: LinkName,
        /// The host's end.
        host_link: LinkName,
    },
    /// The container has an interface of that name already.
    #[error(
        "container veth name provided ({link}) already exists: the container has an interface of that name already, which this attachment did not make"
    )]
    Occupied {
        /// The name.
        link: LinkName,
    },
    /// The bridge is the gateway of something else. Upstream's words, which people look for.
    #[error(
        "{link:?} already has an IP address different from {wanted}: it has {there}; with forceAddress that one is taken off"
    )]
    OtherAddress {
        /// The bridge.
        link: String,
        /// What it should have.
        wanted: InterfaceAddress,
        /// What stands in the way.
        there: InterfaceAddress,
    },
    /// The kernel keeps no VLANs apart.
    #[error(
        "this kernel has no VLANs on bridges (CONFIG_BRIDGE_VLAN_FILTERING), and the configuration asks for one"
    )]
    NoVlans,
    /// The bridge's name belongs to something else.
    #[error("{link} exists and is no bridge: choose another bridge name, or remove it")]
    NoBridge {
        /// The name.
        link: LinkName,
    },
    /// Others change the bridge as fast as we do.
    #[error("the bridge {link} could not be brought to the plan: something else changes it")]
    Unsettled {
        /// Its name.
        link: LinkName,
    },
    /// It failed, and what was made could not be taken back entirely.
    #[error("{error}; and taking back what was made failed too: {undo}")]
    Undo {
        /// What failed first.
        error: Box<Self>,
        /// What failed then.
        undo: String,
    },
}

/// What an endpoint needs of the host and shares with others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shared {
    /// The bridge.
    pub bridge: BridgeSpec,
    /// What leaves its subnets gets the node's address.
    pub masquerade: Option<Masquerade>,
    /// What becomes of other addresses that the bridge has.
    pub others: OtherAddresses,
}

/// What becomes of addresses of the bridge that are not planned and in the way of those that are: any IPv4 address, and IPv6
/// addresses whose subnets overlap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OtherAddresses {
    /// They stay: they are the gateways of containers that are still there.
    Keep,
    /// It is an error.
    Refuse,
    /// They go.
    Remove,
}

impl Shared {
    fn plan(&self) -> Result<Facts, Conflict> {
        let mut facts = bridge::plan(&self.bridge)?;
        if let Some(wanted) = &self.masquerade {
            facts.add(bridge::masquerade(wanted))?;
        }
        Ok(facts)
    }

    /// Addresses where the gateways are that are not planned.
    fn other_addresses<'a>(&'a self, observed: &'a Facts) -> impl Iterator<Item = &'a Address> {
        let link = self.bridge.gateway_link();
        observed.iter().filter_map(move |fact| match fact {
            Fact::Address(there) if there.link == link => {
                (!self.bridge.gateways.contains(&there.address)).then_some(there)
            }
            _ => None,
        })
    }

    /// The planned gateway that another address is in the way of.
    fn hindered_by(&self, there: &Address) -> Option<InterfaceAddress> {
        self.bridge.gateways.iter().copied().find(|gateway| match gateway.family() {
            Family::V4 => there.address.family() == Family::V4,
            Family::V6 => gateway.prefix().overlaps(&there.address.prefix()),
        })
    }

    /// Who lives in a subnet that was the node's before keeps being masqueraded, as long as the bridge keeps its address, which is
    /// not `going`. An address is ours if it is the network's, or has a route that we made.
    fn keep_masquerading(&self, wanted: &mut Facts, observed: &Facts, going: &[InterfaceAddress]) {
        let Some(planned) = &self.masquerade else { return };
        let mut masquerade = planned.clone();
        let stayers = self.other_addresses(observed).filter(|_| self.others == OtherAddresses::Keep);
        for address in stayers.map(|there| there.address) {
            let subnet = address.prefix();
            let route = Key::Route(false, RouteTable::MAIN, subnet, 0);
            let made =
                matches!(observed.get(&route), Some(Fact::Route(r)) if r.protocol == RouteProtocol::FLANNEL);
            let ours = made || planned.spared.iter().any(|network| network.covers(&subnet));
            if ours && !going.contains(&address) && !masquerade.subnets.contains(&subnet) {
                masquerade.subnets.push(subnet);
            }
        }
        if let Some(Fact::Table(there)) = observed.get(&Key::Table(planned.table.clone()))
            && planned.accumulate
        {
            masquerade = masquerade.accumulated(there);
        }
        wanted.set(bridge::masquerade(&masquerade));
    }
}

/// Makes the host's half of an endpoint and, with a sandbox, the container's. Nothing is left behind on failure but the
/// bridge, which is the network's. The answer is the bridge's MAC.
///
/// With [`endpoint::Birth::InSandbox`] the host's [`World`] must know the same sandbox.
pub fn connect(
    host: &mut dyn World,
    sandbox: Option<&mut dyn World>,
    shared: &Shared,
    spec: &EndpointSpec,
) -> Result<Option<Mac>, AttachError> {
    let plan = endpoint::plan(spec)?;
    let mac = prepare(host, shared, spec)?;
    let mut sandbox = sandbox;
    let made = create(host, &plan.host).and_then(|()| match &mut sandbox {
        Some(sandbox) => configure(*sandbox, &plan, spec),
        None => Ok(()),
    });
    let Err(error) = made else { return Ok(mac) };
    let undone = take_back(host, spec);
    let occupied = sandbox.is_some_and(|sandbox| is_occupied(sandbox, &error, spec));
    let error = match occupied {
        true => AttachError::Occupied { link: spec.container_link },
        false => error.into(),
    };
    Err(match undone {
        Ok(()) => error,
        Err(undo) => AttachError::Undo { error: Box::new(error), undo: chain(&undo) },
    })
}

/// Whether the pair could not be made because the container has an interface of that name.
fn is_occupied(sandbox: &mut dyn World, error: &WorldError, spec: &EndpointSpec) -> bool {
    let WorldError::Refused { source, .. } = error else { return false };
    let name = spec.container_link;
    let territory = Territory { links: BTreeSet::from([name]), ..Territory::default() };
    source.raw_os_error() == Some(libc::EEXIST)
        && sandbox.observe(&territory).is_ok_and(|seen| seen.get(&Key::Link(name)).is_some())
}

/// Deletes the veth pair of a failed attach, unless it is of another one: the same attachment may be made twice at the
/// same time, with another address and therefore another MAC.
fn take_back(host: &mut dyn World, spec: &EndpointSpec) -> Result<(), WorldError> {
    let territory = Territory { links: BTreeSet::from([spec.host_link]), ..Territory::default() };
    match host.observe(&territory)?.get(&Key::Link(spec.host_link)) {
        Some(Fact::Link(link)) if spec.mac.is_none() || link.mac == spec.mac.map(endpoint::host_mac) => {
            if spec.options.guard.is_some() {
                lift_guard(host, spec.host_link)?;
            }
            disconnect(host, spec.host_link)
        }
        _ => Ok(()),
    }
}

/// Takes an endpoint off the network: deletes the veth pair by its host's end. One that is gone is no error.
pub fn disconnect(host: &mut dyn World, host_link: LinkName) -> Result<(), WorldError> {
    let link = veth(host_link, None);
    host.apply(&[Change::Delete(&link)]).into_iter().collect()
}

/// Forgets which MAC an endpoint's port may use. One that was free is no error.
pub fn lift_guard(host: &mut dyn World, host_link: LinkName) -> Result<(), WorldError> {
    // It goes by the name.
    let guard = Fact::Guard(Guard { link: host_link, mac: Mac([0; 6]) });
    host.apply(&[Change::Delete(&guard)]).into_iter().collect()
}

/// Takes addresses off the bridge that earlier subnets of the node left there: those in whose subnet one of the
/// released addresses was, and none of those still held is.
pub fn retire_subnets(
    host: &mut dyn World,
    shared: &Shared,
    released: &[IpAddr],
    held: &[IpAddr],
) -> Result<(), AttachError> {
    let planned = shared.plan()?;
    let observed = host.observe(&Territory::of(planned.iter()))?;
    let left = |there: &&Address| {
        let lives = |ips: &[IpAddr]| ips.iter().any(|ip| there.address.prefix().contains(*ip));
        lives(released) && !lives(held)
    };
    let going: Vec<Fact> =
        shared.other_addresses(&observed).filter(left).cloned().map(Fact::Address).collect();
    if going.is_empty() {
        return Ok(());
    }
    let addresses: Vec<_> =
        shared.other_addresses(&observed).filter(left).map(|there| there.address).collect();
    let mut wanted = planned.clone();
    shared.keep_masquerading(&mut wanted, &observed, &addresses);
    wanted.retain(|fact| matches!(fact, Fact::Table(_)));
    let mut rules = observed.clone();
    rules.retain(|fact| matches!(fact, Fact::Table(_)));
    let mut changes: Vec<_> = going.iter().map(Change::Delete).collect();
    changes.extend(diff(&wanted, &rules));
    host.apply(&changes).into_iter().collect::<Result<(), _>>()?;
    Ok(())
}

/// What keeps an endpoint from being as planned, as the lines that would repair it. What others added is nobody's
/// fault: plugins that run later may do so.
pub fn check(
    host: &mut dyn World,
    sandbox: Option<&mut dyn World>,
    shared: &Shared,
    spec: &EndpointSpec,
) -> Result<Vec<String>, AttachError> {
    let plan = endpoint::plan(spec)?;
    let mut wanted = shared.plan()?;
    // Whoever else made the bridge may have left the subnet's route to the kernel.
    wanted.retain(|fact| !matches!(fact, Fact::Route(_)));
    wanted.join(plan.host)?;
    let observed = host.observe(&Territory::of(wanted.iter()))?;
    settle_for(&mut wanted, &observed, shared.bridge.name);
    shared.keep_masquerading(&mut wanted, &observed, &[]);
    let mut missing = missing(&wanted, &observed);
    if let Some(sandbox) = sandbox {
        let mut container = plan.container;
        // Settings count when addresses come; other plugins, and the container, may have their own afterwards.
        container.retain(|fact| !matches!(fact, Fact::Sysctl(_)));
        let observed = sandbox.observe(&Territory::of(container.iter()))?;
        missing.extend(self::missing(&container, &observed));
    }
    Ok(missing)
}

/// Claims addresses and lets `connect` put the endpoint on the network with them; gives them back if it fails.
pub fn attach<T>(
    ledger: &Ledger,
    request: &Request<'_>,
    life: &mut dyn Life,
    connect: impl FnOnce(&[Offer]) -> Result<T, AttachError>,
) -> Result<(Claimed, T), AttachError> {
    let held = ledger.lock().map_err(ClaimError::from)?;
    let claimed = claim(&held, request, life)?;
    // Others may claim while we talk to the kernel.
    drop(held);
    match connect(&claimed.offers) {
        Ok(made) => Ok((claimed, made)),
        Err(error) => Err(match give_back(ledger, &claimed) {
            Ok(()) => error,
            Err(undo) => AttachError::Undo { error: Box::new(error), undo: chain(&undo) },
        }),
    }
}

/// Sees to the bridge and its rules, and that the endpoint is not there yet. The answer is the bridge's MAC.
fn prepare(host: &mut dyn World, shared: &Shared, spec: &EndpointSpec) -> Result<Option<Mac>, AttachError> {
    let name = shared.bridge.name;
    let planned = shared.plan()?;
    let mut territory = Territory::of(planned.iter());
    territory.links.insert(spec.host_link);
    let mut failed = None;
    for _ in 0..ROUNDS_MAX {
        let observed = host.observe(&territory)?;
        if observed.get(&Key::Link(spec.host_link)).is_some() {
            let EndpointSpec { container_link, host_link, .. } = *spec;
            return Err(AttachError::Exists { container_link, host_link });
        }
        let mut wanted = planned.clone();
        let mac = settle_for(&mut wanted, &observed, name);
        if shared.others == OtherAddresses::Refuse {
            refuse_others(shared, &observed)?;
        }
        shared.keep_masquerading(&mut wanted, &observed, &[]);
        let changes: Vec<_> = diff(&wanted, &observed)
            .into_iter()
            .filter(|change| match change {
                Change::Create(_) | Change::Replace { .. } => true,
                Change::Delete(Fact::Address(there)) => {
                    shared.others == OtherAddresses::Remove
                        && shared.other_addresses(&observed).any(|other| other == there)
                        && shared.hindered_by(there).is_some()
                }
                Change::Delete(_) => false,
            })
            .collect();
        if changes.iter().any(|change| is_other_device(change, name)) {
            return Err(AttachError::NoBridge { link: name });
        }
        if changes.is_empty() {
            return Ok(mac);
        }
        if shared.bridge.options.vlan_filtering {
            refuse_without_vlans(host, &changes, name)?;
        }
        match host.apply(&changes).into_iter().collect::<Result<(), _>>() {
            Ok(()) if mac.is_some() => return Ok(mac),
            // The kernel made one up: look what it is.
            Ok(()) => {}
            // The first containers of a node come at once, and each makes the bridge: look what the others have done.
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.map_or(AttachError::Unsettled { link: name }, AttachError::World))
}

/// A kernel that keeps no VLANs apart says so to the bridge, which is therefore asked before anything else is made. What
/// else the bridge may say it says again, in its turn.
fn refuse_without_vlans(
    host: &mut dyn World,
    changes: &[Change<'_>],
    bridge: LinkName,
) -> Result<(), AttachError> {
    let about = |change: &&Change<'_>| change.fact().key() == Key::Link(bridge);
    let first: Vec<_> = changes.iter().filter(about).copied().collect();
    match host.apply(&first).into_iter().collect() {
        Err(WorldError::Refused { source, .. }) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Err(AttachError::NoVlans)
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Fails if something is in the way of an address that is not there yet, as upstream does.
fn refuse_others(shared: &Shared, observed: &Facts) -> Result<(), AttachError> {
    let link = shared.bridge.gateway_link();
    let hindered = shared.other_addresses(observed).find_map(|there| {
        let wanted = shared.hindered_by(there)?;
        let missing = observed.get(&Key::Address(link, wanted)).is_none();
        missing.then_some((wanted, there.address))
    });
    match hindered {
        Some((wanted, there)) => Err(AttachError::OtherAddress { link: link.to_string(), wanted, there }),
        None => Ok(()),
    }
}

/// A bridge that exists keeps its MAC and MTU: its containers know the one and were made for the other. The answer is its
/// MAC.
fn settle_for(wanted: &mut Facts, observed: &Facts, name: LinkName) -> Option<Mac> {
    bridge::adopt(wanted, observed, name);
    let key = Key::Link(name);
    if observed.get(&key).is_some()
        && let Some(Fact::Link(mut link)) = wanted.remove(&key)
    {
        link.mtu = None;
        wanted.set(Fact::Link(link));
    }
    match wanted.get(&key) {
        Some(Fact::Link(link)) => link.mac,
        _ => None,
    }
}

fn is_other_device(change: &Change<'_>, name: LinkName) -> bool {
    match change {
        Change::Replace { old: Fact::Link(old), new: Fact::Link(new) } => {
            new.name == name && !new.kind.same_device(&old.kind)
        }
        _ => false,
    }
}

fn create(world: &mut dyn World, facts: &Facts) -> Result<(), WorldError> {
    let changes: Vec<_> = facts.iter().map(Change::Create).collect();
    world.apply(&changes).into_iter().collect()
}

/// The container's half. Its interface was born with the host's, but not up.
fn configure(sandbox: &mut dyn World, plan: &EndpointPlan, spec: &EndpointSpec) -> Result<(), WorldError> {
    let born = veth(spec.container_link, spec.mac);
    let changes: Vec<_> = plan
        .container
        .iter()
        .map(|fact| match fact {
            Fact::Link(_) => Change::Replace { old: &born, new: fact },
            _ => Change::Create(fact),
        })
        .collect();
    sandbox.apply(&changes).into_iter().collect()
}

fn veth(name: LinkName, mac: Option<Mac>) -> Fact {
    let kind = LinkKind::Veth { peer: None };
    Fact::Link(Box::new(Link {
        name,
        kind,
        mtu: None,
        mac,
        alias: None,
        up: false,
        modes: LinkModes::default(),
    }))
}

fn missing(wanted: &Facts, observed: &Facts) -> Vec<String> {
    diff(wanted, observed)
        .iter()
        .filter(|change| !matches!(change, Change::Delete(_)))
        .map(|change| change.fact().to_string())
        .collect()
}
