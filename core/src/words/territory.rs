//! What is ours to see and to delete. Nothing else is ever observed, so nothing else can ever be removed.
//!
//! A reviewer who wants to know what this software may delete on a host reads this file.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::addr::Prefix;
use super::fact::{Address, Fact, Link, LinkKind, Policy, Route, RouteProtocol, RouteTable, Sysctl};
use super::name::{LinkName, NetworkName};
use super::rule::TableName;

/// The kernel objects that belong to one plan: a node's part of one network, or one endpoint.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Territory {
    /// Interfaces by name: the ones planned now.
    pub links: BTreeSet<LinkName>,
    /// Those of `links` that are ours only where they are IPIP devices. What somebody else gave the name to is let be, and the
    /// device cannot be made.
    pub ipip: BTreeSet<LinkName>,
    /// Interfaces that carry this alias are ours too: what an earlier configuration made. None means that only the
    /// interfaces in `links` are looked at, one by one, as an attach does.
    pub alias: Option<String>,
    /// Routes through a gateway that are marked with our protocol number and have a destination inside one of these
    /// are ours, whatever interface they leave by.
    pub cidrs: BTreeSet<Prefix>,
    /// Our tables.
    pub tables: BTreeSet<TableName>,
    /// Settings that are planned, and therefore looked at.
    pub sysctls: BTreeSet<(Option<LinkName>, String)>,
    /// Whether the FORWARD chain of iptables-nft is looked at for `cidrs`.
    pub accepts: bool,
    /// Whether policies of IPsec between subnets of `cidrs` are looked at.
    pub policies: bool,
    /// Whether upstream's chains are looked at for `cidrs`: rules about these in them are ours.
    pub shared_chains: bool,
    /// Interfaces whose VLANs are looked at.
    pub vlans: BTreeSet<LinkName>,
    /// Interfaces whose guard is looked at.
    pub guards: BTreeSet<LinkName>,
    /// Tables of routes that are looked at beside the main one.
    pub route_tables: BTreeSet<RouteTable>,
}

impl Territory {
    /// The mark that devices of a network carry as their alias.
    pub fn alias_of(network: &NetworkName) -> String {
        format!("flannel network {network}")
    }

    /// The network whose mark this alias is.
    pub fn network_of_alias(alias: &str) -> Option<&str> {
        alias.strip_prefix("flannel network ")
    }

    /// Whether an interface is ours: by its mark, or by its name. One that carries another network's mark is that one's, whatever it is
    /// called.
    pub fn holds_link(&self, link: &Link) -> bool {
        let others = self.alias.is_some()
            && self.alias != link.alias
            && link.alias.as_deref().is_some_and(|alias| Self::network_of_alias(alias).is_some());
        let taken = others || (self.ipip.contains(&link.name) && !matches!(link.kind, LinkKind::Ipip(_)));
        (self.links.contains(&link.name) && !taken) || (self.alias.is_some() && self.alias == link.alias)
    }

    /// Whether an address is ours: any on one of our links that the kernel did not make by itself.
    pub fn holds_address(&self, ours: &BTreeSet<LinkName>, address: &Address) -> bool {
        let automatic = match address.address.address() {
            IpAddr::V4(v4) => v4.is_loopback(),
            IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_loopback(),
        };
        ours.contains(&address.link) && !automatic
    }

    /// Whether a unicast route is ours. `ours` are the links found to be ours on this look.
    /// Routes that the kernel made (RTPROT_KERNEL) go with their addresses and are nobody's. A marked route without a
    /// gateway belongs to the bridge it leaves by: where the CNI plugin made that, it is not the agent's.
    pub fn holds_route(&self, ours: &BTreeSet<LinkName>, route: &Route) -> bool {
        if route.protocol == RouteProtocol::KERNEL {
            return false;
        }
        ours.contains(&route.link)
            || (route.protocol == RouteProtocol::FLANNEL
                && route.via.is_some()
                && self.cidrs.iter().any(|cidr| cidr.covers(&route.destination)))
    }

    /// Whether a route that throws packets away is ours: marked, and inside of a network.
    pub fn holds_blackhole(&self, destination: &Prefix, protocol: RouteProtocol) -> bool {
        protocol == RouteProtocol::FLANNEL && self.cidrs.iter().any(|cidr| cidr.covers(destination))
    }

    /// Whether a policy of IPsec is ours: with our mark, between two subnets of one network.
    pub fn holds_policy(&self, policy: &Policy) -> bool {
        let inside = |cidr: &Prefix| cidr.covers(&policy.source) && cidr.covers(&policy.destination);
        self.policies && self.cidrs.iter().any(inside)
    }

    /// Whether a table is ours.
    pub fn holds_table(&self, name: &TableName) -> bool {
        self.tables.contains(name)
    }

    /// A territory that holds what these facts are about, and nothing more.
    pub fn of<'a>(facts: impl IntoIterator<Item = &'a Fact>) -> Self {
        let mut territory = Self::default();
        for fact in facts {
            match fact {
                Fact::Sysctl(Sysctl { link, path, .. }) => {
                    territory.sysctls.insert((*link, path.clone()));
                }
                Fact::Link(link) => {
                    territory.links.insert(link.name);
                    if matches!(link.kind, LinkKind::Ipip(_)) {
                        territory.ipip.insert(link.name);
                    }
                }
                Fact::SharedChain(chain) => {
                    territory.shared_chains = true;
                    territory.cidrs.extend(chain.cidrs());
                }
                Fact::Table(table) => {
                    territory.tables.insert(table.name.clone());
                }
                Fact::TunnelHost(host) => {
                    territory.tables.insert(TableName::clone(&host.table));
                }
                Fact::Accept(accept) => {
                    territory.accepts = true;
                    territory.cidrs.insert(accept.cidr);
                }
                Fact::PortVlans(vlans) => {
                    territory.vlans.insert(vlans.link);
                }
                Fact::Guard(guard) => {
                    territory.guards.insert(guard.link);
                }
                Fact::Route(route) => {
                    if route.extras.table != RouteTable::MAIN {
                        territory.route_tables.insert(route.extras.table);
                    }
                }
                Fact::Blackhole(blackhole) => {
                    territory.cidrs.insert(blackhole.destination);
                }
                Fact::Policy(policy) => {
                    territory.policies = true;
                    territory.cidrs.extend([policy.source, policy.destination]);
                }
                Fact::BridgePort(_)
                | Fact::Address(_)
                | Fact::Neighbor(_)
                | Fact::Forward(_)
                | Fact::WireguardDevice(_)
                | Fact::WireguardPeer(_) => {}
            }
        }
        territory
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::fact::{Ipip, LinkModes, RouteExtras, RouteScope};

    #[test]
    fn a_name_is_not_enough_for_an_ipip_device() {
        let link = |kind: LinkKind, alias: Option<&str>| {
            let name = LinkName::new("flannel.ipip").unwrap();
            let alias = alias.map(str::to_owned);
            Link { name, kind, mtu: None, mac: None, alias, up: true, modes: LinkModes::default() }
        };
        let wanted = LinkKind::Ipip(Ipip { local: Some("10.77.0.11".parse().unwrap()) });
        let mut territory = Territory::of([&Fact::Link(Box::new(link(wanted.clone(), None)))]);
        let ours = Territory::alias_of(&NetworkName::default_network());
        territory.alias = Some(ours.clone());
        assert!(territory.holds_link(&link(wanted, None)));
        assert!(territory.holds_link(&link(LinkKind::Ipip(Ipip { local: None }), None)));
        assert!(!territory.holds_link(&link(LinkKind::Bridge, None)));
        assert!(!territory.holds_link(&link(LinkKind::Given, Some("the operator's"))));
        assert!(territory.holds_link(&link(LinkKind::Given, Some(&ours))));
        // Go's has no mark; one with another network's is another flanneld's.
        let ipip = || LinkKind::Ipip(Ipip { local: None });
        assert!(territory.holds_link(&link(ipip(), Some("the operator's"))));
        assert!(!territory.holds_link(&link(ipip(), Some("flannel network _b"))));
    }

    #[test]
    fn a_route_belongs_to_who_planned_it() {
        let link = |name| LinkName::new(name).unwrap();
        let territory =
            Territory { cidrs: BTreeSet::from(["10.5.0.0/16".parse().unwrap()]), ..Territory::default() };
        let ours = BTreeSet::from([link("flannel.1")]);
        let held = |destination: &str, via: Option<&str>, name, protocol| {
            let route = Route {
                destination: destination.parse().unwrap(),
                via: via.map(|via| via.parse().unwrap()),
                link: link(name),
                onlink: false,
                metric: 0,
                scope: RouteScope::Global,
                source: None,
                protocol,
                extras: RouteExtras::default(),
            };
            territory.holds_route(&ours, &route)
        };
        let (marked, boot, kernel) = (RouteProtocol::FLANNEL, RouteProtocol::BOOT, RouteProtocol(2));
        assert!(held("10.5.2.0/24", Some("10.77.0.12"), "eth0", marked));
        assert!(held("10.6.2.0/24", None, "flannel.1", boot));
        // The bridge of a CNI plugin, an operator's route, another network's peer, an address's own route.
        assert!(!held("10.5.1.0/24", None, "cni0", marked));
        assert!(!held("10.5.2.0/24", Some("10.77.0.12"), "eth0", boot));
        assert!(!held("10.6.2.0/24", Some("10.77.0.12"), "eth0", marked));
        assert!(!held("10.6.1.0/24", None, "flannel.1", kernel));
    }
}
