//! The guard of the tunnels as one host has it: whether its kernel takes it, and whom it keeps out.

use std::time::{Duration, Instant};

use crate::decide::plan::Plan;
use crate::run::health::Counters;
use crate::touch::world::WorldError;
use crate::touch::world::kernel::Kernel;
use crate::words::code::Code;
use crate::words::config::{BackendConfig, NetworkConfig};
use crate::words::fact::{Fact, LinkKind, TunnelHost};
use crate::words::name::NetworkName;
use crate::words::node::Node;
use crate::words::report::{Finding, Reason, Report};
use crate::words::territory::Territory;

/// Somebody who has not knocked for so long is gone.
const QUIET: Duration = Duration::from_secs(600);

/// What is known of the guard from one pass to the next.
pub(super) struct TunnelGuard {
    network: NetworkName,
    asked_for: bool,
    /// Whether it was said that there is no nf_tables.
    told_of_absence: bool,
    /// Why the kernel did not take it, as it was said last.
    refusal: Option<String>,
    /// Until the next regular look it is not tried again.
    given_up: bool,
    /// Packets that were dropped, by the kernel's counters, when they were last read.
    dropped: Option<u64>,
    last_dropped: Option<Instant>,
}

impl TunnelGuard {
    pub(super) fn new(network: &NetworkName, asked_for: bool) -> Self {
        Self {
            network: network.clone(),
            asked_for,
            told_of_absence: false,
            refusal: None,
            given_up: false,
            dropped: None,
            last_dropped: None,
        }
    }

    /// Whether it is to be planned.
    pub(super) fn is_wanted(&self) -> bool {
        self.asked_for && !self.given_up
    }

    /// A pass begins. Whether it is to be tried again, after the kernel has refused it: then what was planned without it does not
    /// count any more.
    pub(super) fn begins_again(&mut self, reason: Reason) -> bool {
        let due = matches!(reason, Reason::Startup | Reason::Config | Reason::Resync);
        due && std::mem::take(&mut self.given_up)
    }

    /// Says once if there can be none.
    pub(super) fn tell(&mut self, config: &NetworkConfig, node: &Node) {
        let tunnels = matches!(config.backend, BackendConfig::Vxlan(_) | BackendConfig::Ipip(_));
        if self.asked_for && tunnels && !node.nftables && !self.told_of_absence {
            self.told_of_absence = true;
            self.warn("this kernel has no nf_tables");
        }
    }

    fn warn(&self, cause: &str) {
        let network = self.network.as_str();
        tracing::warn!(
            network,
            "no tunnel guard: {cause}; whoever can send to this host can send into the tunnel, unless another firewall keeps them out"
        );
    }

    /// Guards no tunnel whose place another device has: its packets are that one's.
    pub(super) fn spare_others(&self, kernel: &mut Kernel, plan: &mut Plan) -> Result<(), WorldError> {
        let is_part = |fact: &Fact| match fact {
            Fact::Table(table) => TunnelHost::are_in(&table.name),
            fact => matches!(fact, Fact::TunnelHost(_)),
        };
        if !plan.facts.iter().any(is_part) {
            return Ok(());
        }
        let tunnels = plan.facts.iter().filter_map(|fact| match fact {
            Fact::Link(link) if matches!(link.kind, LinkKind::Vxlan(_) | LinkKind::Ipip(_)) => Some(&**link),
            _ => None,
        });
        if kernel.is_taken(&plan.territory, &tunnels.collect::<Vec<_>>())? {
            plan.facts.retain(|fact| !is_part(fact));
        }
        Ok(())
    }

    /// What was given up is left as it is.
    pub(super) fn let_be(&self, territory: &mut Territory) {
        if self.given_up {
            territory.tables.remove(&TunnelHost::table_of(&self.network));
        }
    }

    /// Whether nothing but the guard was refused: then the rest is to be planned without it, which works.
    pub(super) fn is_refused(&mut self, report: &Report) -> bool {
        let about_it = [TunnelHost::TABLE_KIND, TunnelHost::KIND];
        let alone = report.failed.iter().all(|(made, _)| about_it.contains(&made.kind));
        let Some((_, cause)) = report.failed.first().filter(|_| alone) else {
            if self.is_wanted() {
                self.refusal = None;
            }
            return false;
        };
        if self.refusal.as_ref() != Some(cause) {
            self.warn(cause);
            self.refusal = Some(cause.clone());
        }
        self.given_up = true;
        true
    }

    /// Counts whom it has kept out since the last look, and says so while there are any.
    pub(super) fn count(
        &mut self,
        kernel: &mut Kernel,
        counters: &Counters,
    ) -> Result<Option<Finding>, WorldError> {
        let table = TunnelHost::table_of(&self.network);
        let Some(now) = kernel.netfilter()?.strangers(&table)? else {
            self.dropped = None;
            return Ok(None);
        };
        // Rules that were written anew begin anew.
        let before = self.dropped.replace(now);
        let more = now.checked_sub(before.unwrap_or_default()).unwrap_or(now);
        counters.strangers(self.network.as_str(), more);
        if more > 0 {
            self.last_dropped = Some(Instant::now());
        }
        let recent = self.last_dropped.is_some_and(|last| last.elapsed() < QUIET);
        let text = format!("they are dropped, and counted: nft list chain {table} input");
        Ok(recent.then(|| Finding::new(Code::TUNNEL_STRANGER, text)))
    }
}
