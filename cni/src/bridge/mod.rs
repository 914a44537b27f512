//! A container on a bridge with addresses of a ledger, in this process: what upstream's bridge and host-local plugins do together.

pub(crate) mod check;
pub(crate) mod wish;

use std::net::IpAddr;

use flannel_core::act::attach::{self, OtherAddresses, Shared};
use flannel_core::act::claim::Request;
use flannel_core::act::life::Ports;
use flannel_core::decide::bridge::{self, BridgeOptions, BridgeSpec, Masquerade};
use flannel_core::decide::endpoint::{Birth, EndpointOptions, EndpointRoute, EndpointSpec, host_mac};
use flannel_core::decide::ranges::{Offer, Range, RangeSet};
use flannel_core::touch::ledger::{Entry, Ledger, Maker, Released};
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use flannel_core::words::fact::LinkKind;
use flannel_core::words::name::{Attachment, LinkName};
use flannel_core::words::units::Mtu;
use serde_json::Value;

use crate::args::Call;
use crate::previous::Previous;
use crate::result::{Address, Attached, CniError, Interface, Route};
use crate::sandbox::{self, Home};
use wish::Wish;

/// A network as this node has it, whoever describes it.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    /// What the host's ends of its veth pairs are named after ([`Attachment::host_link`]).
    pub(crate) name: String,
    /// The bridge.
    pub(crate) bridge: LinkName,
    /// Largest packet.
    pub(crate) mtu: Mtu,
    /// Where addresses come from: a container gets one of each set.
    pub(crate) sets: Vec<RangeSet>,
    /// Routes of the containers, beside a default route.
    pub(crate) routes: Vec<Route>,
    /// What leaves gets the node's address, unless it goes to one of these. None: somebody else sees to that.
    pub(crate) masquerade: Option<Vec<Prefix>>,
}

impl Network {
    /// The bridge with what belongs to it.
    fn shared(&self, wish: &Wish) -> Shared {
        let ranges = || self.sets.iter().flat_map(RangeSet::ranges);
        let subnets: Vec<Prefix> = ranges().map(Range::subnet).collect();
        let masquerade = |spared: &Vec<Prefix>| Masquerade {
            table: bridge::masquerade_table(self.bridge),
            subnets: subnets.clone(),
            spared: spared.clone(),
        };
        let gateways = ranges().filter_map(Range::gateway_address).collect();
        Shared {
            bridge: BridgeSpec {
                name: self.bridge,
                gateways,
                mtu: self.mtu,
                alias: None,
                options: BridgeOptions::default(),
            },
            masquerade: self.masquerade.as_ref().map(masquerade),
            others: if wish.force_address { OtherAddresses::Remove } else { OtherAddresses::Keep },
        }
    }

    fn endpoint(&self, owner: &Attachment, link: LinkName, wish: &Wish, offers: &[Offer]) -> EndpointSpec {
        let mac = offers.first().map(|first| Mac::for_address(first.address.address()));
        let gateways: Vec<IpAddr> = offers.iter().map(|offer| offer.gateway).collect();
        let to = |Route { destination, via, metric }| EndpointRoute {
            via,
            metric,
            ..EndpointRoute::to(destination)
        };
        EndpointSpec {
            host_link: owner.host_link(&self.name),
            container_link: link,
            birth: Birth::InSandbox,
            bridge: self.bridge,
            hairpin: wish.hairpin,
            isolated: false,
            options: EndpointOptions::default(),
            mtu: Some(self.mtu),
            mac: wish.mac.or(mac),
            addresses: offers.iter().map(|offer| offer.address).collect(),
            routes: self.routes(wish, &gateways).into_iter().map(to).collect(),
            gateways,
        }
    }

    /// The given ones, and a default route for each family if wanted and not given: upstream's order.
    fn routes(&self, wish: &Wish, gateways: &[IpAddr]) -> Vec<Route> {
        let mut routes = self.routes.clone();
        for gateway in gateways.iter().copied().filter(|_| wish.default_gateway) {
            let family = Family::of(gateway);
            let given = |route: &Route| {
                route.destination.is_default() && route.destination.family() == family && route.via.is_some()
            };
            if !routes.iter().any(given) {
                routes.push(Route { destination: default_route(family), via: Some(gateway), metric: 0 });
            }
        }
        routes
    }

    fn describe(&self, wish: &Wish, spec: &EndpointSpec, bridge_mac: Option<Mac>, netns: &str) -> Attached {
        let on_host = |name, mac| Interface { name, mac, mtu: spec.mtu, sandbox: String::new() };
        let container = Interface { sandbox: netns.to_owned(), ..on_host(spec.container_link, spec.mac) };
        let address = |(address, gateway): (&InterfaceAddress, &IpAddr)| Address {
            address: *address,
            gateway: *gateway,
        };
        Attached {
            interfaces: [
                on_host(self.bridge, bridge_mac),
                on_host(spec.host_link, spec.mac.map(host_mac)),
                container,
            ],
            addresses: spec.addresses.iter().zip(&spec.gateways).map(address).collect(),
            routes: self.routes(wish, &spec.gateways),
            dns: wish.dns.clone(),
        }
    }
}

fn default_route(family: Family) -> Prefix {
    let any = match family {
        Family::V4 => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    };
    // A length of 0 fits either family; the host route is never taken.
    Prefix::containing(any, 0).unwrap_or_else(|_| Prefix::host(any))
}

/// What ADD made.
pub(crate) struct Made {
    pub(crate) attached: Attached,
    /// Attachments that were found dead when no address was left, and whose addresses were freed.
    pub(crate) reclaimed: Vec<Entry>,
}

/// Puts a container on the network. Nothing but the bridge is left behind on failure.
pub(crate) fn add(
    call: &Call,
    home: Home,
    ledger: &Ledger,
    network: &Network,
    wish: &Wish,
) -> Result<Made, CniError> {
    let (owner, link) = (call.attachment()?, call.link()?);
    let mut sandbox = Kernel::open_inside(home.inside)?;
    let mut host = Kernel::open()?;
    host.set_sandbox(home.beside);
    let shared = network.shared(wish);
    let request = Request { owner: &owner, sets: &network.sets, wanted: &wish.ips, maker: Maker::Ourselves };
    let mut life = Ports { network: &network.name, bridge: network.bridge };
    let (claimed, (spec, bridge_mac)) = attach::attach(ledger, &request, &mut life, |offers| {
        let spec = network.endpoint(&owner, link, wish, offers);
        let bridge_mac = attach::connect(&mut host, Some(&mut sandbox), &shared, &spec)?;
        Ok((spec, bridge_mac))
    })?;
    if let Some(first) = claimed.reclaimed.first() {
        eprintln!(
            "flannel: {} had no free address: took back {} of containers that are gone, {} of {} first",
            network.sets.iter().map(RangeSet::to_string).collect::<Vec<_>>().join(", "),
            claimed.reclaimed.len(),
            first.address,
            first.owner,
        );
    }
    let attached = network.describe(wish, &spec, bridge_mac, &call.netns);
    Ok(Made { attached, reclaimed: claimed.reclaimed })
}

/// Deletes the veth pair by whatever end can be found. `network` is what its host's end is named after.
pub(crate) fn unlink(call: &Call, network: &str, previous: Option<&Value>) -> Result<(), CniError> {
    let owner = call.attachment()?;
    let mut host = Kernel::open()?;
    if host.delete_link(owner.host_link(network))? {
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
