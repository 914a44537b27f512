//! The node's bridge of a network: what it is called, and how it goes.
//!
//! Everybody on the node uses one bridge for a network, CNI too, so a name counts only if it is the first.

use std::path::Path;
use std::sync::Arc;

use flannel_core::touch::marker::{self, bridge_marker, settle_bridge};
use flannel_core::words::addr::Prefix;
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::node::HostRoute;

use super::Networks;
use crate::addresses::is_pending;
use crate::answer::{Refusal, blocking};
use crate::journal::NetworkRecord;
use crate::veth;

impl Networks {
    /// The bridge of a network that a Docker network is made on. `wanted` is the name that it asks for: the first comer's
    /// wish counts, and a bridge that somebody uses keeps its name.
    pub(crate) async fn keep_bridge(
        self: &Arc<Self>,
        network: &NetworkName,
        wanted: Option<LinkName>,
    ) -> Result<LinkName, Refusal> {
        self.serve(network, true).await?;
        let turn = self.turn(network).await;
        let Some(bridge) = self.bridge(network) else {
            return Err(Refusal(format!("network {network} is not served")));
        };
        let Some(wanted) = wanted.filter(|wanted| *wanted != bridge) else { return Ok(bridge) };
        if self.bridge_is_used(network) {
            return Err(Refusal(format!(
                "the bridge {wanted} was asked for, but flannel network {network} has the bridge {bridge} on this host, and that is in use: name {bridge}, or leave -o com.docker.network.bridge.name out"
            )));
        }
        blocking(move || veth::refuse_taken(wanted)).await?;
        let before = self.served().remove(network);
        if let Some(before) = before {
            before.agent.stop().await;
        }
        let file = self.settings.subnet_file(network);
        let default = network.bridge();
        blocking(move || {
            remove_bridge(&file)?;
            settle_bridge(&file, Some(wanted), default).map_err(|error| Refusal::of(&error))
        })
        .await?;
        self.serve_in_turn(network, true).await?;
        drop(turn);
        Ok(wanted)
    }

    /// The bridge that a network has here now.
    pub(crate) fn bridge(&self, network: &NetworkName) -> Option<LinkName> {
        self.served().get(network).and_then(|served| served.bridge)
    }

    /// Whether a Docker network or a container is on the bridge of a network; addresses that an engine asked for and that
    /// are no endpoint's yet do not count.
    fn bridge_is_used(&self, network: &NetworkName) -> bool {
        let docker = self.journal.networks().find(|_, record| record.network == *network).is_some();
        docker || self.addresses_held(network, |entry| !is_pending(entry))
    }

    /// The name that a Docker network gave the bridge, for a host that has booted since.
    fn named_bridge(&self, network: &NetworkName) -> Option<LinkName> {
        let names = |record: &NetworkRecord| record.network == *network && record.options.bridge.is_some();
        self.journal.networks().find(|_, record| names(record))?.1.options.bridge
    }

    /// What the bridge is called: what somebody chose since the host has booted, else what a Docker network named.
    pub(super) fn settled_bridge(&self, network: &NetworkName) -> Result<LinkName, Refusal> {
        let file = self.settings.subnet_file(network);
        let default = self.named_bridge(network).unwrap_or_else(|| network.bridge());
        settle_bridge(&file, None, default).map_err(|error| Refusal::of(&error))
    }
}

/// Removes the bridge that the marker beside a subnet file names, and the marker.
pub(super) fn remove_bridge(subnet_file: &Path) -> Result<(), Refusal> {
    let marker = bridge_marker(subnet_file);
    let named = marker::read(&marker).map_err(|error| Refusal::of(&error))?;
    if let Some(bridge) = named.and_then(|name| LinkName::new(name.to_str()?).ok()) {
        veth::remove_bridge(bridge)?;
    }
    marker::withdraw(&marker).map_err(|error| Refusal::of(&error))
}

/// Refuses to put a second bridge on a subnet: what is sent to its containers would go to the other one.
pub(super) fn alone_on(subnet: Prefix, bridge: LinkName) -> Result<(), Refusal> {
    match veth::host_routes()?.iter().find_map(|route| other_bridge(route, subnet, bridge)) {
        Some(other) => Err(Refusal(format!(
            "{other} has an address of {subnet}, this host's part of the flannel network: its bridge is to be {bridge}. If {other} is Docker's own, give the engine another --bip (172.17.0.1/16), restart it, and try again"
        ))),
        None => Ok(()),
    }
}

/// The bridge of a connected route into the subnet, unless it is the one that belongs there.
fn other_bridge(route: &HostRoute, subnet: Prefix, bridge: LinkName) -> Option<LinkName> {
    let connected = route.bridge && route.via.is_none() && route.destination.overlaps(&subnet);
    route.link.filter(|link| connected && !route.destination.is_default() && *link != bridge)
}
