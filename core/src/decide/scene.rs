//! What the planners of one network look at, and the sheet they write on.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use serde_json::value::RawValue;

use crate::words::addr::{Family, Prefix};
use crate::words::code::Code;
use crate::words::config::NetworkConfig;
use crate::words::extension::Errands;
use crate::words::fact::{Conflict, Fact, Facts};
use crate::words::ipsec::Associations;
use crate::words::lease::{LeaseSet, LeaseValue, OwnLease, Subnets};
use crate::words::name::NetworkName;
use crate::words::node::{HostRoute, Node};
use crate::words::report::Finding;
use crate::words::tunnel::Tunnel;
use crate::words::wireguard::WireguardTunnel;

/// One network as this node sees it at one moment.
#[derive(Clone, Debug)]
pub struct Scene<'a> {
    /// Which network.
    pub network: &'a NetworkName,
    /// Its configuration.
    pub config: &'a NetworkConfig,
    /// This host.
    pub node: &'a Node,
    /// Our part of the network.
    pub own: &'a OwnLease,
    /// The peers that can be served, by subnet; no two of them share an address.
    pub peers: Vec<Peer<'a>>,
    /// How many peers there are at least, where these are only some of them; else 0.
    pub crowd: usize,
}

/// A peer that can be served.
#[derive(Clone, Copy, Debug)]
pub struct Peer<'a> {
    /// Its part of the network.
    pub subnets: Subnets,
    /// How to reach it.
    pub value: &'a LeaseValue,
}

/// What a peer says about itself in one address family.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Its subnet.
    pub subnet: Prefix,
    /// The address it is reached at.
    pub public: IpAddr,
    /// Its `BackendData` (`BackendV6Data`).
    pub data: Option<&'a RawValue>,
}

/// The facts and findings that the planners leave behind.
#[derive(Debug, Default)]
pub struct Draft {
    /// What should be true.
    pub facts: Facts,
    /// What the operator should know.
    pub findings: Vec<Finding>,
    /// The tunnel that this program itself should carry.
    pub tunnel: Option<Tunnel>,
    /// What charon should hold.
    pub associations: Option<Associations>,
    /// The WireGuard devices that this program itself should be.
    pub wireguard: Vec<WireguardTunnel>,
    /// What the operator's commands should be told.
    pub errands: Option<Errands>,
}

impl Draft {
    /// Puts a fact down. If it contradicts one that is there, that one stays and a finding says so.
    pub fn add(&mut self, fact: Fact) {
        if let Err(conflict) = self.facts.add(fact) {
            self.find(Code::PLAN_CONFLICT, conflict.to_string());
        }
    }

    /// Puts down what another planner planned.
    pub fn join(&mut self, facts: Result<Facts, Conflict>) {
        match facts {
            Ok(facts) => facts.into_iter().for_each(|fact| self.add(fact)),
            Err(conflict) => self.find(Code::PLAN_CONFLICT, conflict.to_string()),
        }
    }

    /// Puts a finding down.
    pub fn find(&mut self, code: Code, text: impl Into<String>) {
        self.findings.push(Finding::new(code, text));
    }
}

impl<'a> Scene<'a> {
    /// Takes from the leases the peers that can be served; every other one is a finding. `backend` is the
    /// `BackendType` that we advertise ourselves.
    pub fn new(
        network: &'a NetworkName,
        config: &'a NetworkConfig,
        node: &'a Node,
        own: &'a OwnLease,
        leases: &'a LeaseSet,
        backend: &str,
        draft: &mut Draft,
    ) -> Self {
        draft.findings.extend(leases.findings.iter().cloned());
        let mut scene = Self { network, config, node, own, peers: Vec::new(), crowd: 0 };
        let mut sound: Vec<Peer<'a>> = leases
            .peers(&own.subnets)
            .map(|(subnets, value)| Peer { subnets: *subnets, value })
            .filter(|peer| scene.families().any(|family| peer.subnets.of(family).is_some()))
            .filter(|peer| scene.sound(peer, backend, draft))
            .collect();
        // Where two leases overlap, the one that the config allows wins: a stray wide lease must not take the place
        // of the many it covers.
        sound.sort_by_key(|peer| !scene.allowed(peer));
        let mut claims = Claims::default();
        claims.claim(&scene, &own.subnets);
        for peer in sound {
            match claims.holder(&scene, &peer.subnets) {
                None => {
                    claims.claim(&scene, &peer.subnets);
                    scene.peers.push(peer);
                }
                Some(holder) => {
                    draft.find(Code::LEASE_DUPLICATE, format!("{peer} overlaps {holder}; {holder} is used"));
                }
            }
        }
        scene.peers.sort_by_key(|peer| peer.subnets);
        scene
    }

    /// The address families that this network uses on this node: the lease may still lack one that the config has
    /// just enabled.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<'a> {
        let (config, own) = (self.config, self.own);
        [Family::V4, Family::V6]
            .into_iter()
            .filter(|family| config.range(*family).is_some() && own.subnets.of(*family).is_some())
    }

    /// The peers of a family. One whose public address cannot be used is a finding.
    pub fn places(&self, family: Family, draft: &mut Draft) -> Vec<Place<'a>> {
        let mut places = Vec::with_capacity(self.peers.len());
        for peer in &self.peers {
            let Some(subnet) = peer.subnets.of(family) else { continue };
            let data = match family {
                Family::V4 => peer.value.advertisement.data.as_deref(),
                Family::V6 => peer.value.advertisement.v6_data.as_deref(),
            };
            match peer.value.public(family) {
                Some(public) if self.usable(public) => places.push(Place { subnet, public, data }),
                Some(public) => draft.find(
                    Code::PEER_DATA,
                    format!("{peer}: its public address {public} is not one that a packet can be sent to"),
                ),
                None => {
                    draft.find(Code::PEER_DATA, format!("{peer}: no public address for the subnet {subnet}"))
                }
            }
        }
        places
    }

    /// A peer's public address of a family, if packets of this network can be sent to it.
    pub fn reachable(&self, peer: &Peer<'_>, family: Family) -> Option<IpAddr> {
        peer.value.public(family).filter(|public| self.usable(*public))
    }

    /// Whether an address can be the outer destination of a packet of this network.
    fn usable(&self, public: IpAddr) -> bool {
        let broadcast = matches!(public, IpAddr::V4(v4) if v4.is_broadcast());
        let nobody = public.is_unspecified() || public.is_loopback() || public.is_multicast() || broadcast;
        let inside = self.config.cidrs().any(|cidr| cidr.contains(public));
        !nobody && !inside
    }

    fn sound(&self, peer: &Peer<'_>, backend: &str, draft: &mut Draft) -> bool {
        for family in self.families() {
            let (Some(range), Some(subnet)) = (self.config.range(family), peer.subnets.of(family)) else {
                continue;
            };
            if !range.cidr.covers(&subnet) {
                draft.find(Code::LEASE_OUTSIDE, format!("{peer} is not inside {}", range.cidr));
                return false;
            }
            if let Some(route) = self.fenced(&subnet) {
                let bridge = route.link.map(|link| link.to_string()).unwrap_or_default();
                draft
                    .find(Code::LEASE_FENCED, format!("{peer}, and {bridge} has {} here", route.destination));
                return false;
            }
            if peer.value.public(family).is_some()
                && peer.value.public(family) == self.own.value.public(family)
            {
                draft.find(Code::PUBLIC_IP_SHARED, format!("{peer}; our own subnet is {}", self.own.subnets));
                return false;
            }
        }
        let theirs = &peer.value.advertisement.backend;
        if theirs != backend {
            // Leases of these two do not say which.
            let theirs = if theirs.is_empty() { "udp or alloc" } else { theirs };
            let text = format!("{peer} uses backend {theirs}, this host {}", self.config.backend.name());
            draft.find(Code::PEER_OTHER_BACKEND, text);
            return false;
        }
        true
    }

    /// A bridge of this host on which containers may have these addresses: once they were ours. They keep what they have of
    /// each other; a route to the new holder would cut them off.
    fn fenced(&self, subnet: &Prefix) -> Option<&'a HostRoute> {
        let node: &'a Node = self.node;
        let connected =
            |route: &HostRoute| route.bridge && route.via.is_none() && route.link != Some(node.uplink.link);
        node.routes.iter().find(|route| connected(route) && route.destination.overlaps(subnet))
    }

    fn allowed(&self, peer: &Peer<'_>) -> bool {
        self.families().all(|family| match (self.config.range(family), peer.subnets.of(family)) {
            (Some(range), Some(subnet)) => range.allows(&subnet),
            _ => true,
        })
    }
}

impl std::fmt::Display for Peer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let families = [Family::V4, Family::V6].into_iter();
        let public: Vec<_> = families.filter_map(|f| self.value.public(f)).map(|ip| ip.to_string()).collect();
        write!(
            f,
            "{} of {}",
            self.subnets,
            if public.is_empty() { "nobody".into() } else { public.join(" ") }
        )
    }
}

/// Subnets that are taken: disjoint, so that one look to the left and one to the right finds an overlap.
#[derive(Default)]
struct Claims {
    taken: BTreeSet<Prefix>,
    holders: HashMap<Prefix, Subnets>,
}

impl Claims {
    fn claim(&mut self, scene: &Scene<'_>, subnets: &Subnets) {
        for subnet in scene.families().filter_map(|family| subnets.of(family)) {
            self.taken.insert(subnet);
            self.holders.insert(subnet, *subnets);
        }
    }

    /// Who has an address of these subnets.
    fn holder(&self, scene: &Scene<'_>, subnets: &Subnets) -> Option<Subnets> {
        scene.families().filter_map(|family| subnets.of(family)).find_map(|subnet| {
            let before = self.taken.range(..=subnet).next_back();
            let after = self.taken.range(subnet..).next();
            before
                .into_iter()
                .chain(after)
                .find(|taken| taken.overlaps(&subnet))
                .map(|taken| self.holders[taken])
        })
    }
}
