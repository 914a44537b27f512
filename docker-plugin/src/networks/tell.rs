//! What running agents are told: which networks to keep apart, and what is particular about their endpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use flannel_core::run::agent::Status;
use flannel_core::words::addr::Prefix;
use flannel_core::words::name::NetworkName;

use super::{Networks, Served};
use crate::exposure;

impl Networks {
    /// Keeps the networks of this host apart as their leases come and change.
    pub(super) async fn follow(self: Arc<Self>, mut status: watch::Receiver<Status>) {
        while status.changed().await.is_ok() {
            self.isolate();
        }
    }

    /// Tells a network's agent what is particular about its endpoints now. Resolves when the kernel has it, at once if no agent
    /// runs: one that starts later reads it by itself.
    pub(crate) fn expose(
        &self,
        network: &NetworkName,
    ) -> impl Future<Output = Result<(), String>> + Send + use<> {
        // Read under the lock: of two calls the one that is sent last has read what both have recorded.
        let mut served = self.served();
        let told = served.get_mut(network).map(|served| {
            let exposure = exposure::of(&self.journal, network);
            served.exposure = Some(exposure.clone());
            served.agent.expose(exposure)
        });
        drop(served);
        async move {
            match told {
                Some(told) => told.await,
                None => Ok(()),
            }
        }
    }

    /// The same for every network whose endpoints are not as its agent was told last.
    pub(crate) fn expose_changes(&self) {
        let names: Vec<NetworkName> = {
            let served = self.served();
            let changed = |name: &NetworkName, served: &Served| {
                served.exposure.as_ref() != Some(&exposure::of(&self.journal, name))
            };
            served
                .iter()
                .filter(|(name, served)| changed(name, served))
                .map(|(name, _)| name.clone())
                .collect()
        };
        for name in names {
            drop(self.expose(&name));
        }
    }

    /// Tells every network which others its containers must not reach.
    pub(super) fn isolate(&self) {
        let served = self.served();
        let cidrs: BTreeMap<&NetworkName, Vec<Prefix>> =
            served.iter().map(|(name, served)| (name, served.cidrs())).collect();
        for (name, served) in served.iter() {
            let others = cidrs.iter().filter(|(other, _)| **other != name);
            let others = others.flat_map(|(_, cidrs)| cidrs.iter().copied()).collect();
            served.isolated_from.send_if_modified(|known| {
                let news = *known != others;
                *known = others;
                news
            });
        }
    }
}
