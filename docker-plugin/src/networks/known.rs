//! What is known here of the networks that run: no store is asked.

use std::sync::Arc;

use tokio::time::Instant;

use flannel_core::words::addr::{Family, Prefix};
use flannel_core::words::name::NetworkName;
use flannel_core::words::units::Mtu;

use super::{Networks, PATIENCE, Part, Served};
use crate::answer::Refusal;
use crate::status::NetworkStatus;

impl Networks {
    /// How every network that runs here stands.
    pub(crate) fn states(&self) -> Vec<NetworkStatus> {
        self.served().iter().map(|(name, served)| served.state(name)).collect()
    }

    /// This node's subnets by network.
    pub(crate) fn subnets_here(&self) -> Vec<(NetworkName, Prefix)> {
        let served = self.served();
        served.iter().filter_map(|(name, served)| Some((name.clone(), served.part(name)?.subnet))).collect()
    }

    /// The part whose subnet is exactly this. After a restart its agent may still be on its way.
    pub(crate) async fn part_with(self: &Arc<Self>, subnet: Prefix) -> Result<Option<Part>, Refusal> {
        let network = self.subnets_here().into_iter().find(|(_, here)| *here == subnet).map(|(name, _)| name);
        let network = network.or_else(|| {
            self.journal
                .pools()
                .find(|_, record| record.subnet == Some(subnet))
                .map(|(_, record)| record.network)
        });
        let Some(network) = network else { return Ok(None) };
        self.serve(&network, true).await?;
        let part = self.lease(&network, Instant::now() + PATIENCE).await?;
        Ok((part.subnet == subnet).then_some(part))
    }

    /// Refuses to go on with a subnet that this host no longer holds.
    pub(crate) fn still_ours(&self, network: &NetworkName, subnet: Prefix) -> Result<(), Refusal> {
        let part = self.served().get(network).and_then(|served| served.part(network));
        match part {
            Some(part) if part.subnet_of(subnet.family()) != Some(subnet) => {
                let now =
                    part.subnet_of(subnet.family()).map_or_else(|| "none".to_owned(), |now| now.to_string());
                Err(Refusal(format!(
                    "this host's subnet of flannel network {network} is now {now}, no longer {subnet}: remove the Docker network and create it again"
                )))
            }
            // Without a lease known yet, what was recorded counts.
            Some(_) | None => Ok(()),
        }
    }

    /// Largest packet of a network's containers, if its lease is known.
    pub(crate) fn mtu(&self, network: &NetworkName) -> Option<Mtu> {
        self.served().get(network).and_then(|served| served.part(network)).map(|part| part.mtu)
    }

    /// The CIDR to name in a command for somebody who asked for this one: that of the network it lies in or holds, else any.
    pub(crate) fn cidr_near(&self, asked: Prefix) -> Option<Prefix> {
        let served = self.served();
        let cidrs = || served.iter().filter_map(|(name, served)| Some(served.part(name)?.cidr));
        cidrs().find(|cidr| cidr.overlaps(&asked)).or_else(|| cidrs().next())
    }

    /// What is leased here, for texts.
    pub(crate) fn parts_text(&self) -> String {
        let served = self.served();
        let parts: Vec<String> = served
            .iter()
            .filter_map(|(name, served)| served.part(name))
            .map(|part| format!("{} of {}", part.subnet, part.cidr))
            .collect();
        match parts.is_empty() {
            true => String::new(),
            false => format!(" (here: {})", parts.join(", ")),
        }
    }
}

impl Served {
    fn state(&self, network: &NetworkName) -> NetworkStatus {
        let status = self.status.borrow();
        let lease = status.lease.as_ref();
        let families = [Family::V4, Family::V6];
        let subnets = lease.map(|lease| families.into_iter().filter_map(|family| lease.subnets.of(family)));
        NetworkStatus {
            name: network.to_string(),
            cidrs: lease
                .map(|lease| lease.networks.iter().map(Prefix::to_string).collect())
                .unwrap_or_default(),
            subnets: subnets.map(|all| all.map(|subnet| subnet.to_string()).collect()).unwrap_or_default(),
            backend: lease.and_then(|lease| Some(lease.config.as_ref()?.backend.name().to_owned())),
            holder: lease.and_then(|lease| lease.holder.clone()),
            mtu: lease.map(|lease| lease.mtu.bytes()),
            bridge: self.bridge.map(|bridge| bridge.to_string()),
            ready: status.ready,
            waiting: status.waiting.as_ref().map(ToString::to_string),
        }
    }
}
