//! A network as this node has it, whoever describes it, and what it makes of a container's place.

use std::net::IpAddr;

use flannel_core::act::attach::{OtherAddresses, Shared};
use flannel_core::decide::bridge::{BridgeOptions, BridgeSpec, Masquerade, VlanGateway};
use flannel_core::decide::endpoint::{Birth, EndpointRoute, EndpointSpec, host_mac};
use flannel_core::decide::ranges::{Offer, Range, RangeSet};
use flannel_core::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use flannel_core::words::digest::sha512_hex;
use flannel_core::words::name::{Attachment, LinkName};
use flannel_core::words::rule::TableName;
use flannel_core::words::units::Mtu;

use super::wish::Wish;
use crate::result::{Address, Attached, CniError, Interface};

/// A network as this node has it.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    /// What the host's ends of its veth pairs are named after ([`Attachment::host_link`]).
    pub(crate) name: String,
    /// The bridge.
    pub(crate) bridge: LinkName,
    /// Largest packet.
    pub(crate) mtu: Mtu,
    /// Where addresses come from: a container gets one of each set. None if somebody else gives them.
    pub(crate) sets: Vec<RangeSet>,
    /// Routes of the containers, beside a default route.
    pub(crate) routes: Vec<EndpointRoute>,
    /// The bridge has the gateways' addresses.
    pub(crate) is_gateway: bool,
    /// What becomes of other addresses that it has.
    pub(crate) others: OtherAddresses,
    /// None: somebody else sees to that, or nobody is to.
    pub(crate) masquerade: Option<Spared>,
}

/// What leaves the network gets the node's address, unless it goes to one of these.
#[derive(Clone, Debug)]
pub(crate) struct Spared {
    /// Where the rules are.
    pub(crate) table: TableName,
    /// Beside the network's own subnets.
    pub(crate) networks: Vec<Prefix>,
    /// Keep sparing what was spared already: nobody knows all of the network's subnets.
    pub(crate) accumulate: bool,
}

/// An address of a container to be, from wherever it comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Lease {
    pub(crate) address: InterfaceAddress,
    pub(crate) gateway: Option<IpAddr>,
}

impl From<&Offer> for Lease {
    fn from(offer: &Offer) -> Self {
        Self { address: offer.address, gateway: Some(offer.gateway) }
    }
}

impl Lease {
    /// The gateway as the bridge has it.
    fn gateway_address(&self) -> Option<InterfaceAddress> {
        InterfaceAddress::new(self.gateway?, self.address.prefix().len()).ok()
    }
}

impl Network {
    /// The bridge with what belongs to it. `leases` are addresses that are not of the sets.
    pub(super) fn shared(&self, wish: &Wish, leases: &[Lease]) -> Result<Shared, CniError> {
        let ranges = || self.sets.iter().flat_map(RangeSet::ranges);
        let gateways = ranges()
            .filter_map(Range::gateway_address)
            .chain(leases.iter().filter_map(Lease::gateway_address))
            .filter(|_| self.is_gateway)
            .collect();
        let vlan_gateway = match wish.vlan.filter(|_| self.is_gateway) {
            None => None,
            Some(vlan) => Some(VlanGateway::new(self.bridge, vlan, wish.not_default_vlan).map_err(|_| {
                let name = self.bridge;
                CniError::config(format!(
                    "the bridge's name {name} is too long: the gateway's interface would be {name}.{vlan}"
                ))
            })?),
        };
        let subnets: Vec<Prefix> =
            ranges().map(Range::subnet).chain(leases.iter().map(|lease| lease.address.prefix())).collect();
        let masquerade = |spared: &Spared| Masquerade {
            table: spared.table.clone(),
            spared: spared
                .networks
                .iter()
                .chain(subnets.iter().filter(|own| !spared.networks.iter().any(|all| all.covers(own))))
                .copied()
                .collect(),
            subnets: subnets.clone(),
            accumulate: spared.accumulate,
        };
        Ok(Shared {
            bridge: BridgeSpec {
                name: self.bridge,
                gateways,
                mtu: self.mtu,
                alias: None,
                options: BridgeOptions {
                    promiscuous: wish.promiscuous,
                    vlan_filtering: wish.has_vlans(),
                    vlan_gateway,
                },
            },
            masquerade: self.masquerade.as_ref().map(masquerade),
            others: if wish.force_address { OtherAddresses::Remove } else { self.others },
        })
    }

    pub(super) fn endpoint(
        &self,
        owner: &Attachment,
        link: LinkName,
        wish: &Wish,
        leases: &[Lease],
    ) -> EndpointSpec {
        let first = leases.first().map(|first| Mac::for_address(first.address.address()));
        let mac = wish.mac.or(first).unwrap_or_else(|| mac_of(owner));
        let gateways: Vec<IpAddr> = leases.iter().filter_map(|lease| lease.gateway).collect();
        EndpointSpec {
            host_link: owner.host_link(&self.name),
            container_link: link,
            birth: Birth::InSandbox,
            bridge: self.bridge,
            hairpin: wish.hairpin,
            isolated: wish.isolated,
            mtu: Some(self.mtu),
            mac: Some(mac),
            addresses: leases.iter().map(|lease| lease.address).collect(),
            routes: self.routes(wish, &gateways),
            gateways,
            options: wish.endpoint_options(Some(mac)),
        }
    }

    /// The given ones, and a default route for each family if wanted and not given: upstream's order.
    fn routes(&self, wish: &Wish, gateways: &[IpAddr]) -> Vec<EndpointRoute> {
        let mut routes = self.routes.clone();
        for gateway in gateways.iter().copied().filter(|_| wish.default_gateway) {
            let family = Family::of(gateway);
            let given = |route: &EndpointRoute| {
                route.destination.is_default() && route.destination.family() == family && route.via.is_some()
            };
            if !routes.iter().any(given) {
                routes.push(EndpointRoute { via: Some(gateway), ..EndpointRoute::to(default_route(family)) });
            }
        }
        routes
    }

    pub(super) fn describe(
        &self,
        wish: &Wish,
        (shared, spec): (&Shared, &EndpointSpec),
        leases: &[Lease],
        bridge_mac: Option<Mac>,
        netns: &str,
    ) -> Attached {
        let on_host = |name, mac| Interface { name, mac, mtu: spec.mtu, sandbox: String::new() };
        let container = Interface { sandbox: netns.to_owned(), ..on_host(spec.container_link, spec.mac) };
        let gateway_mac = shared.bridge.gateways.first().map(|gateway| Mac::for_address(gateway.address()));
        let vlan_gateway = shared.bridge.options.vlan_gateway.as_ref();
        let host_end = on_host(spec.host_link, spec.mac.map(host_mac));
        Attached {
            interfaces: [on_host(self.bridge, bridge_mac), host_end, container],
            vlan_gateway: vlan_gateway.map(|gateway| on_host(gateway.link, gateway_mac)),
            addresses: leases
                .iter()
                .map(|Lease { address, gateway }| Address { address: *address, gateway: *gateway })
                .collect(),
            routes: spec.routes.clone(),
            dns: wish.dns.clone(),
        }
    }
}

/// A MAC that is the attachment's alone, for one without addresses: other hosts may be on the same wire.
fn mac_of(owner: &Attachment) -> Mac {
    let hash = sha512_hex(owner.to_string().as_bytes(), 12);
    let byte = |n: usize| hash.get(2 * n..2 * n + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    Mac::locally_administered(std::array::from_fn(|n| byte(n).unwrap_or_default()))
}

fn default_route(family: Family) -> Prefix {
    let any = match family {
        Family::V4 => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    };
    // A length of 0 fits either family; the host route is never taken.
    Prefix::containing(any, 0).unwrap_or_else(|_| Prefix::host(any))
}
