//! Ports of this host that lead to endpoints, and the packet filter that follows what is booked of them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use flannel_core::words::exposure::PublishedPort;
use flannel_core::words::name::NetworkName;

use super::Plugin;
use crate::answer::Refusal;
use crate::exposure;
use crate::journal::Stage;
use crate::ports::{Asker, PortError};
use crate::wire::PortBinding;

/// How long the packet filter is waited for. After that the network's agent has no lease yet, or is not there: it writes what is
/// booked when it is.
const PATIENCE: Duration = Duration::from_secs(2);

impl Plugin {
    /// Books an endpoint's ports, in the place of those it had. The answer is the network whose packet filter has to follow, if
    /// it has to.
    pub(crate) fn publish(
        &self,
        docker_network: &str,
        id: &str,
        bindings: &[PortBinding],
    ) -> Result<Option<NetworkName>, Refusal> {
        let _turn = self.turns.take(id);
        let known = self.journal.endpoints().get(id).filter(|found| found.stage != Stage::Deleted);
        let Some(endpoint) = known else {
            return match bindings {
                [] => Ok(None),
                _ => Err(Refusal(format!("endpoint {id} is unknown: it was never created, or is deleted"))),
            };
        };
        if bindings.is_empty() && endpoint.ports.is_empty() {
            return Ok(None);
        }
        let options = self.docker_network(docker_network)?.options;
        if options.internal {
            return Ok(None);
        }
        let addresses: Vec<IpAddr> = exposure::addresses(&endpoint).collect();
        let binding = options.host_binding.map(IpAddr::V4);
        let asker = Asker { endpoint: id, network: &endpoint.network, addresses: &addresses, binding };
        let ports = self.take_ports(&asker, bindings).map_err(|error| Refusal::of(&error))?;
        // If not, the engine repeats itself: the packet filter has them, or will.
        if ports != endpoint.ports {
            let noted = self.journal.endpoints().update(id, |record| record.ports.clone_from(&ports));
            if let Err(error) = noted {
                self.ports.restore_only(id, &endpoint.network, &endpoint.ports);
                return Err(Refusal::of(&error));
            }
            for port in &ports {
                tracing::info!(network = %endpoint.network, endpoint = %id, "published {port}");
            }
        }
        Ok(Some(endpoint.network))
    }

    /// Ports that an endpoint holds whose container has ended, without our being told, are free for who asks for them.
    fn take_ports(
        &self,
        asker: &Asker<'_>,
        bindings: &[PortBinding],
    ) -> Result<BTreeSet<PublishedPort>, PortError> {
        for _ in bindings {
            match self.ports.replace(asker, bindings) {
                Err(PortError::Held { holder, .. })
                    if self.moves(holder.endpoint(), asker.endpoint) || self.take_away(holder.endpoint()) => {
                }
                given => return given,
            }
        }
        self.ports.replace(asker, bindings)
    }

    /// Takes the ports of another endpoint of the same container: its engine publishes by one of them, and does not repeat a
    /// Revoke that we died over. False if the containers are not the same.
    fn moves(&self, from: &str, to: &str) -> bool {
        let sandbox = |id: &str| self.journal.endpoints().get(id).map(|record| record.sandbox);
        let same = sandbox(from).is_some_and(|from| !from.is_empty() && sandbox(to) == Some(from));
        same && match self.take_ports_from(from) {
            Ok(_) => {
                self.networks.expose_changes();
                true
            }
            Err(Refusal(text)) => {
                tracing::warn!(endpoint = %from, "its ports cannot be taken back: {text}");
                false
            }
        }
    }

    /// Books that an endpoint has no ports. The answer as in [`Self::publish`].
    pub(crate) fn unpublish(&self, id: &str) -> Result<Option<NetworkName>, Refusal> {
        let _turn = self.turns.take(id);
        self.take_ports_from(id)
    }

    /// Not in the endpoint's turn: whoever asks may have another's.
    fn take_ports_from(&self, id: &str) -> Result<Option<NetworkName>, Refusal> {
        let Some(record) = self.journal.endpoints().get(id).filter(|record| !record.ports.is_empty()) else {
            return Ok(None);
        };
        let noted = self.journal.endpoints().update(id, |record| record.ports.clear());
        noted.map_err(|error| Refusal::of(&error))?;
        self.ports.release(id);
        Ok(Some(record.network))
    }

    /// Has the packet filter of a network follow what is booked, and waits for it.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) async fn expose(&self, network: &NetworkName) -> Result<(), String> {
        let told = tokio::time::timeout(PATIENCE, self.networks.expose(network)).await;
        told.unwrap_or_else(|_| {
            tracing::warn!(%network, "its packet filter follows when the network has its lease");
            Ok(())
        })
    }
}
