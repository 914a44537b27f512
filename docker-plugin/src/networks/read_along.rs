//! Networks that another agent of this host serves: what is particular about them here.

use std::sync::Arc;

use flannel_core::run::retire;
use flannel_core::words::code::Code;
use flannel_core::words::name::NetworkName;

use super::{Networks, Part, Served};
use crate::answer::{Refusal, blocking};
use crate::definition::Wish;

impl Served {
    /// Whether another agent has the lease.
    pub(super) fn reads_along(&self) -> bool {
        let status = self.status.borrow();
        let waits = status.waiting.as_ref().is_some_and(|finding| finding.code == Code::AGENT_HELD);
        waits || status.lease.as_ref().is_some_and(|lease| lease.holder.is_some())
    }
}

impl Networks {
    /// Takes away what was made here for a network that another agent serves.
    pub(super) async fn read_no_more(
        self: &Arc<Self>,
        network: &NetworkName,
        served: Option<Served>,
    ) -> Result<(), Refusal> {
        if let Some(served) = served {
            served.agent.retire().await.map_err(Refusal)?;
        }
        self.isolate();
        let (file, name) = (self.settings.subnet_file(network), network.clone());
        let removed =
            blocking(move || retire::reader(&file, &name).map_err(|error| Refusal(format!("{error:#}"))))
                .await;
        if self.always_runs(network) {
            self.serve_in_turn(network, false).await?;
        }
        removed
    }
}

/// A network that another agent serves here may be another one than the store has under its name.
pub(super) fn as_asked(part: Part, wish: &Wish) -> Result<Part, Refusal> {
    match wish.cidr {
        Some(cidr) if cidr != part.cidr => Err(Refusal(format!(
            "--subnet {cidr}: another agent serves flannel network {} on this host, and there it is {}; use --subnet {} to join that, or --ipam-opt network=NAME for a network of another name",
            part.network, part.cidr, part.cidr
        ))),
        Some(_) | None => match (wish.cidr_v6, part.v6) {
            (Some(cidr), Some(half)) if cidr != half.cidr => Err(Refusal(format!(
                "--subnet {cidr}: another agent serves flannel network {} on this host, and there its IPv6 is {}: use --subnet {} to join that",
                part.network, half.cidr, half.cidr
            ))),
            _ => Ok(part),
        },
    }
}
