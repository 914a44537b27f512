//! A kernel of one namespace as values: what it refuses, and what it takes away with something else.
//!
//! The state is one set of facts, ours and other people's alike; only [`World::observe`] tells them apart, by the territory, as
//! with the real kernel. Each rule names where the kernel has it; `tests/convergence.rs` compares the two.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use flannel_core::touch::world::{World, WorldError};
use flannel_core::words::addr::{Family, Mac};
use flannel_core::words::fact::{
    Accept, Address, Change, Fact, Facts, Forward, Key, Link, LinkKind, LinkModes, PortVlans, Route,
    RouteProtocol, RouteScope, Sysctl,
};
use flannel_core::words::name::LinkName;
use flannel_core::words::rule::TableName;
use flannel_core::words::territory::Territory;
use flannel_core::words::units::{Mtu, Overhead};

/// Why the fake refuses: the errno the kernel would give.
type Errno = i32;

/// Decides which changes fail without effect: gets the number of the change since the world was made, and the change.
pub type Refusal = Box<dyn FnMut(usize, &Change<'_>) -> bool + Send>;

/// A model of the kernel.
#[derive(Default)]
pub struct FakeWorld {
    facts: Facts,
    refuse: Option<Refusal>,
    changes: usize,
}

impl FakeWorld {
    /// A namespace with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a fact true, as somebody else would with iproute2.
    pub fn put(&mut self, fact: &Fact) -> io::Result<()> {
        self.create(fact).map_err(io::Error::from_raw_os_error)
    }

    /// Makes a fact untrue.
    pub fn take(&mut self, fact: &Fact) {
        self.delete(fact);
    }

    /// From now on, changes for which this holds fail.
    pub fn refuse(&mut self, refuse: impl FnMut(usize, &Change<'_>) -> bool + Send + 'static) {
        self.refuse = Some(Box::new(refuse));
    }

    /// From now on, everything works again.
    pub fn refuse_nothing(&mut self) {
        self.refuse = None;
    }

    /// How many changes were asked for so far.
    pub fn changes(&self) -> usize {
        self.changes
    }

    /// Everything, whoever it belongs to.
    pub fn everything(&self) -> &Facts {
        &self.facts
    }

    /// Everything that is not in a territory.
    pub fn outside(&mut self, territory: &Territory) -> Facts {
        let ours = self.look(territory);
        let mut others = self.facts.clone();
        others.retain(|fact| match fact {
            Fact::Sysctl(Sysctl { link: Some(link), .. }) => ours.get(&Key::Link(*link)).is_none(),
            fact => ours.get(&fact.key()).is_none(),
        });
        others
    }

    /// Sets an interface up or down.
    pub fn set_link(&mut self, name: LinkName, up: bool) {
        let Some(Fact::Link(link)) = self.facts.get(&Key::Link(name)) else { return };
        if link.up == up {
            return;
        }
        let mut link = link.clone();
        link.up = up;
        self.facts.set(Fact::Link(link));
        if !up {
            // Routes and all neighbors go, permanent ones too (net/ipv4/fib_frontend.c `fib_disable_ip`, `arp_ifdown`), and the
            // IPv6 addresses (net/ipv6/addrconf.c `addrconf_ifdown`). IPv4 addresses and VXLAN's permanent
            // forwarding entries stay.
            self.facts.retain(|fact| match fact {
                Fact::Route(route) => route.link != name,
                Fact::Neighbor(neighbor) => neighbor.link != name,
                Fact::Address(address) => address.link != name || address.address.family() == Family::V4,
                _ => true,
            });
        }
    }

    fn link(&self, name: LinkName) -> Option<&Link> {
        match self.facts.get(&Key::Link(name)) {
            Some(Fact::Link(link)) => Some(link),
            _ => None,
        }
    }

    fn links(&self) -> impl Iterator<Item = &Link> {
        self.facts.iter().filter_map(|fact| match fact {
            Fact::Link(link) => Some(&**link),
            _ => None,
        })
    }

    fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.facts.iter().filter_map(|fact| match fact {
            Fact::Address(address) => Some(address),
            _ => None,
        })
    }

    fn create(&mut self, fact: &Fact) -> Result<(), Errno> {
        match fact {
            Fact::Link(link) => return self.create_link(link),
            Fact::BridgePort(port) => {
                let bridge = self.link(port.bridge).ok_or(libc::ENODEV)?;
                if bridge.kind != LinkKind::Bridge {
                    return Err(libc::EOPNOTSUPP);
                }
                self.link(port.link).ok_or(libc::ENODEV)?;
            }
            Fact::PortVlans(PortVlans { link, .. }) => {
                self.link(*link).ok_or(libc::ENODEV)?;
            }
            Fact::Address(address) => {
                self.link(address.link).ok_or(libc::ENODEV)?;
            }
            Fact::Neighbor(neighbor) => {
                self.link(neighbor.link).ok_or(libc::ENODEV)?;
            }
            Fact::WireguardDevice(_) | Fact::WireguardPeer(_) => {
                let link = fact.link().and_then(|link| self.link(link)).ok_or(libc::ENODEV)?;
                if link.kind != LinkKind::Wireguard {
                    return Err(libc::EOPNOTSUPP);
                }
            }
            Fact::Forward(forward) => {
                if !self.forwards(forward)? {
                    return Ok(());
                }
            }
            Fact::Route(route) => return self.create_route(route),
            Fact::TunnelHost(host) => {
                self.facts.get(&Key::Table(TableName::clone(&host.table))).ok_or(libc::ENOENT)?;
            }
            Fact::Sysctl(Sysctl { link: Some(link), .. }) => {
                self.link(*link).ok_or(libc::ENOENT)?;
            }
            Fact::Sysctl(_)
            | Fact::SharedChain(_)
            | Fact::Table(_)
            | Fact::Accept(_)
            | Fact::Guard(_)
            | Fact::Policy(_)
            | Fact::Blackhole(_) => {}
        }
        self.facts.set(fact.clone());
        Ok(())
    }

    fn create_link(&mut self, link: &Link) -> Result<(), Errno> {
        // What exists by itself cannot be made.
        if link.kind == LinkKind::Given {
            return Err(libc::ENODEV);
        }
        if self.link(link.name).is_some() {
            return Err(libc::EEXIST);
        }
        // One VNI per port and family (drivers/net/vxlan/vxlan_core.c `vxlan_vni_in_use`).
        if self.links().any(|other| other.excludes(link)) {
            return Err(libc::EEXIST);
        }
        let mut made = link.clone();
        made.mac = made.mac.or_else(|| Some(Mac::locally_administered(arbitrary(link.name))));
        made.mtu = made.mtu.or_else(|| Mtu::new(1500).ok());
        if let Some(most) = self.most(link)? {
            // At creation too large an MTU is cut (`vxlan_config_apply`), later it is refused (`vxlan_change_mtu`).
            made.mtu = made.mtu.map(|mtu| mtu.min(most));
        }
        if let LinkKind::Veth { peer: Some(peer) } = &link.kind
            && !peer.in_sandbox
        {
            self.facts.set(Fact::Link(Box::new(Link {
                name: peer.name,
                kind: LinkKind::Veth { peer: None },
                mtu: peer.mtu.or(made.mtu),
                mac: peer.mac.or_else(|| Some(Mac::locally_administered(arbitrary(peer.name)))),
                alias: None,
                up: false,
                modes: LinkModes::default(),
            })));
        }
        self.facts.set(Fact::Link(Box::new(made)));
        Ok(())
    }

    /// The largest MTU a VXLAN device may have.
    fn most(&self, link: &Link) -> Result<Option<Mtu>, Errno> {
        let LinkKind::Vxlan(vxlan) = &link.kind else { return Ok(None) };
        let underlay = self.link(vxlan.underlay).ok_or(libc::ENODEV)?;
        let overhead = if vxlan.local.is_ipv4() { Overhead::VXLAN_OVER_V4 } else { Overhead::VXLAN_OVER_V6 };
        Ok(underlay.mtu.and_then(|mtu| mtu.less(overhead).ok()))
    }

    /// `seen` is what the link looked like to whoever wants it replaced.
    fn replace_link(&mut self, seen: &Link, new: &Link) -> Result<(), Errno> {
        if !new.kind.same_device(&seen.kind) {
            self.delete_link(new.name);
            return self.create_link(new);
        }
        let old = self.link(new.name).cloned().ok_or(libc::ENODEV)?;
        if let (Some(most), Some(mtu)) = (self.most(&old)?, new.mtu)
            && mtu > most
        {
            return Err(libc::EINVAL);
        }
        // All neighbors are forgotten when a MAC is set, even the same one (net/core/neighbour.c `neigh_changeaddr`);
        // it is set only if it looked different.
        if new.mac.is_some() && new.mac != seen.mac {
            self.facts.retain(|fact| !matches!(fact, Fact::Neighbor(n) if n.link == new.name));
        }
        self.facts.set(Fact::Link(Box::new(Link {
            mtu: new.mtu.or(old.mtu),
            mac: new.mac.or(old.mac),
            alias: new.alias.clone().or(old.alias),
            up: new.up || old.up,
            modes: LinkModes {
                promiscuous: new.modes.promiscuous || old.modes.promiscuous,
                vlan_filtering: new.modes.vlan_filtering || old.modes.vlan_filtering,
            },
            ..old
        })));
        Ok(())
    }

    /// A link takes everything on it away, VXLAN devices above it too (drivers/net/vxlan/vxlan_core.c
    /// `vxlan_handle_lowerdev_unregister`), and the other end of a veth pair.
    fn delete_link(&mut self, name: LinkName) {
        let Some(Fact::Link(gone)) = self.facts.remove(&Key::Link(name)) else { return };
        self.facts.retain(|fact| match fact {
            Fact::Link(_) => true,
            Fact::BridgePort(port) => port.link != name && port.bridge != name,
            fact => fact.link() != Some(name),
        });
        let above: Vec<LinkName> = self
            .links()
            .filter(|link| match (&link.kind, &gone.kind) {
                (LinkKind::Vxlan(vxlan), _) => vxlan.underlay == name,
                (LinkKind::Veth { peer: Some(peer) }, LinkKind::Veth { .. }) => peer.name == name,
                (LinkKind::Veth { .. }, LinkKind::Veth { peer: Some(peer) }) => peer.name == link.name,
                _ => false,
            })
            .map(|link| link.name)
            .collect();
        above.into_iter().for_each(|link| self.delete_link(link));
    }

    /// Whether the link has a forwarding database. Any other takes the entry for an address it shall listen to
    /// (net/core/rtnetlink.c `ndo_dflt_fdb_add`), which is no fact.
    fn forwards(&self, forward: &Forward) -> Result<bool, Errno> {
        match &self.link(forward.link).ok_or(libc::ENODEV)?.kind {
            LinkKind::Vxlan(vxlan) if vxlan.local.is_ipv4() == forward.remote.is_ipv4() => Ok(true),
            // drivers/net/vxlan/vxlan_core.c `vxlan_fdb_parse`
            LinkKind::Vxlan(_) => Err(libc::EAFNOSUPPORT),
            _ => Ok(false),
        }
    }

    fn create_route(&mut self, route: &Route) -> Result<(), Errno> {
        let link = self.link(route.link).ok_or(libc::ENODEV)?;
        if !link.up {
            return Err(libc::ENETDOWN);
        }
        let local = |ip: IpAddr| self.addresses().any(|address| address.address.address() == ip);
        if let Some(source) = route.source
            && !local(source)
        {
            return Err(libc::EINVAL);
        }
        if let Some(via) = route.via {
            // Not to oneself; but IPv4 minds only on-link (net/ipv4/fib_semantics.c `fib_check_nh_v4_gw`).
            if local(via) && (route.onlink || via.is_ipv6()) {
                return Err(libc::EINVAL);
            }
            if route.onlink && self.leads_elsewhere(route.link, via) {
                return Err(libc::EINVAL);
            }
            if !route.onlink && !self.on_link(route.link, via) {
                return Err(match Family::of(via) {
                    Family::V4 => libc::ENETUNREACH,
                    Family::V6 => libc::EHOSTUNREACH,
                });
            }
        }
        let mut route = route.clone();
        if route.destination.family() == Family::V6 && route.metric == 0 {
            route.metric = 1024;
        }
        // A route's place is its destination and metric, with or without a gateway (net/ipv4/fib_trie.c
        // `fib_table_insert`).
        for gateway in [true, false] {
            self.facts.remove(&Key::Route(gateway, route.extras.table, route.destination, route.metric));
        }
        self.facts.set(Fact::Route(route));
        Ok(())
    }

    /// What leads to the new gateway by another link goes first, as the real world's writer does it.
    fn replace_route(&mut self, old: &Route, new: &Route) -> Result<(), Errno> {
        if new.makes_way(old) {
            self.delete(&Fact::Route(old.clone()));
        }
        self.create_route(new)
    }

    /// Whether an IPv6 gateway that is said to be on a link is already reached by another one, other than by default
    /// (net/ipv6/route.c `ip6_route_check_nh_onlink`). IPv4 does not look.
    fn leads_elsewhere(&self, link: LinkName, via: IpAddr) -> bool {
        let routes = self.facts.iter().filter_map(|fact| match fact {
            Fact::Route(route) => Some((route.destination, route.link)),
            Fact::Address(address) if !address.no_prefix_route => {
                Some((address.address.prefix(), address.link))
            }
            _ => None,
        });
        via.is_ipv6()
            && routes
                .filter(|(destination, _)| destination.contains(via) && !destination.is_default())
                .max_by_key(|(destination, _)| destination.len())
                .is_some_and(|(_, through)| through != link)
    }

    /// Whether a gateway is reachable without another one (net/ipv4/fib_semantics.c `fib_check_nh_v4_gw`).
    fn on_link(&self, link: LinkName, via: IpAddr) -> bool {
        let connected = self.addresses().any(|address| {
            address.link == link && !address.no_prefix_route && address.address.prefix().contains(via)
        });
        connected
            || self.facts.iter().any(|fact| {
                matches!(fact, Fact::Route(r) if r.link == link && r.via.is_none()
                    && r.scope == RouteScope::Link && r.destination.contains(via))
            })
    }

    fn delete(&mut self, fact: &Fact) {
        match fact {
            Fact::Link(link) => self.delete_link(link.name),
            // With everything in it.
            Fact::Table(gone) => {
                self.facts.remove(&fact.key());
                self.facts.retain(|fact| !matches!(fact, Fact::TunnelHost(host) if *host.table == gone.name));
            }
            // Only the very route, the very destination goes; another may be in its place by now.
            Fact::Route(_) | Fact::Forward(_) => {
                if self.facts.get(&fact.key()) == Some(fact) {
                    self.facts.remove(&fact.key());
                }
            }
            Fact::Address(address) => self.delete_address(address),
            Fact::Sysctl(_) => {}
            fact => {
                self.facts.remove(&fact.key());
            }
        }
    }

    fn delete_address(&mut self, gone: &Address) {
        let (link, ip) = (gone.link, gone.address.address());
        if self.facts.remove(&Fact::Address(gone.clone()).key()).is_none() || ip.is_ipv6() {
            return;
        }
        // Routes that prefer it as a source (net/ipv4/fib_semantics.c `fib_sync_down_addr`), and with the last
        // address all of IPv4 on the link (net/ipv4/fib_frontend.c `fib_inetaddr_event`).
        let last = !self.addresses().any(|a| a.link == link && a.address.family() == Family::V4);
        self.facts.retain(|fact| match fact {
            Fact::Route(route) => {
                let v4 = route.destination.family() == Family::V4;
                route.source != Some(ip) && !(last && v4 && route.link == link)
            }
            Fact::Neighbor(neighbor) => !(last && neighbor.ip.is_ipv4() && neighbor.link == link),
            _ => true,
        });
    }

    fn look(&self, territory: &Territory) -> Facts {
        let ours: BTreeSet<LinkName> =
            self.links().filter(|link| territory.holds_link(link)).map(|link| link.name).collect();
        let mut seen: Facts = self
            .facts
            .iter()
            .filter(|fact| match fact {
                Fact::Link(link) => territory.holds_link(link),
                Fact::BridgePort(port) => ours.contains(&port.link),
                Fact::PortVlans(vlans) => territory.vlans.contains(&vlans.link),
                Fact::Guard(guard) => territory.guards.contains(&guard.link),
                Fact::Address(address) => territory.holds_address(&ours, address),
                Fact::Neighbor(neighbor) => ours.contains(&neighbor.link),
                Fact::Forward(forward) => ours.contains(&forward.link),
                Fact::WireguardDevice(device) => ours.contains(&device.link),
                Fact::WireguardPeer(peer) => ours.contains(&peer.link),
                Fact::Route(route) => territory.holds_route(&ours, route),
                Fact::Policy(policy) => territory.holds_policy(policy),
                Fact::Table(table) => territory.holds_table(&table.name),
                Fact::TunnelHost(host) => territory.holds_table(&host.table),
                Fact::SharedChain(chain) => {
                    let ours = |one| territory.cidrs.iter().any(|cidr| cidr.overlaps(&one));
                    territory.shared_chains && chain.cidrs().any(ours)
                }
                Fact::Blackhole(blackhole) => {
                    territory.holds_blackhole(&blackhole.destination, RouteProtocol::FLANNEL)
                }
                Fact::Accept(Accept { cidr }) => territory.accepts && territory.cidrs.contains(cidr),
                Fact::Sysctl(_) => false,
            })
            .cloned()
            .map(|fact| match fact {
                // The other end may be anywhere, so it is never read.
                Fact::Link(mut link) if matches!(link.kind, LinkKind::Veth { .. }) => {
                    link.kind = LinkKind::Veth { peer: None };
                    Fact::Link(link)
                }
                fact => fact,
            })
            .collect();
        for (link, path) in &territory.sysctls {
            if link.is_none_or(|link| self.link(link).is_some()) {
                let on = path.ends_with("/accept_ra") || path.ends_with("/accept_dad");
                let value = if on { "1" } else { "0" };
                let unset = Fact::Sysctl(Sysctl { link: *link, path: path.clone(), value: value.into() });
                seen.set(self.facts.get(&unset.key()).cloned().unwrap_or(unset));
            }
        }
        seen
    }

    fn change(&mut self, change: &Change<'_>) -> Result<(), Errno> {
        let number = self.changes;
        self.changes += 1;
        if self.refuse.as_mut().is_some_and(|refuse| refuse(number, change)) {
            return Err(libc::EIO);
        }
        match change {
            Change::Create(fact) => self.create(fact),
            Change::Replace { old: Fact::Link(seen), new: Fact::Link(new) } => self.replace_link(seen, new),
            Change::Replace { old: Fact::Route(old), new: Fact::Route(new) } => self.replace_route(old, new),
            Change::Replace { new, .. } => self.create(new),
            Change::Delete(fact) => {
                self.delete(fact);
                Ok(())
            }
        }
    }
}

impl World for FakeWorld {
    fn observe(&mut self, territory: &Territory) -> Result<Facts, WorldError> {
        Ok(self.look(territory))
    }

    fn apply(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        let refused = |change: &Change<'_>, errno| WorldError::Refused {
            action: change.to_string(),
            detail: None,
            source: io::Error::from_raw_os_error(errno),
        };
        changes.iter().map(|change| self.change(change).map_err(|errno| refused(change, errno))).collect()
    }
}

/// Six bytes that look as random as what the kernel makes up, and are the same on every run.
fn arbitrary(name: LinkName) -> [u8; 6] {
    let mut bytes = [0u8; 6];
    for (n, byte) in name.as_str().bytes().enumerate() {
        bytes[n % 6] = bytes[n % 6].wrapping_mul(31).wrapping_add(byte);
    }
    bytes
}
