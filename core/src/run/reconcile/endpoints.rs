//! The part of the kernel that is about single endpoints: written by every pass, and in between whenever it changes.
//!
//! A change in between is made from what was written last, without a look: one port more costs one element more, however
//! many there are. A look follows only if the kernel does not take it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use tokio::sync::oneshot;

use crate::act::pass::{chain, converge};
use crate::decide::firewall::Range;
use crate::decide::hostports;
use crate::decide::publish::{self, PublishScene};
use crate::touch::world::kernel::Kernel;
use crate::touch::world::kernel::nftables::conntrack::Changed;
use crate::touch::world::{World, WorldError};
use crate::words::exposure::{Exposure, PublishedPort, Transport};
use crate::words::fact::{Conflict, Fact, Facts, Key, diff};
use crate::words::name::{LinkName, NetworkName};
use crate::words::report::Report;
use crate::words::rule::TableFamily;
use crate::words::territory::Territory;

/// Who waits for a change.
pub(in crate::run) type Reply = oneshot::Sender<Result<(), String>>;

/// Why a change is not in the kernel.
#[derive(Debug, thiserror::Error)]
pub(super) enum EndpointsError {
    #[error(transparent)]
    World(#[from] WorldError),
    #[error("the rules contradict each other")]
    Plan(#[from] Conflict),
    #[error("{0}")]
    Left(String),
}

/// What the endpoints of one network want, and what the kernel has of it.
pub(super) struct Endpoints {
    network: NetworkName,
    bridge: Option<LinkName>,
    /// None: somebody else's to say.
    exposure: Option<Exposure>,
    /// The network's ranges as of the last pass; before it nothing can be written.
    ranges: Option<Vec<Range>>,
    /// What is in the kernel, as far as we know.
    written: Option<Facts>,
    waiting: Vec<Reply>,
    /// The ports whose connections are as they say.
    settled: BTreeSet<PublishedPort>,
}

impl Endpoints {
    pub(super) fn new(network: NetworkName, bridge: Option<LinkName>, exposure: Option<Exposure>) -> Self {
        Self {
            network,
            bridge,
            exposure,
            ranges: None,
            written: None,
            waiting: Vec::new(),
            settled: BTreeSet::new(),
        }
    }

    /// What is wanted now.
    pub(super) fn exposure(&self) -> Option<&Exposure> {
        self.exposure.as_ref()
    }

    /// Takes a new value, in the place of the one before.
    pub(super) fn want(&mut self, exposure: Exposure, reply: Reply) {
        self.exposure = Some(exposure);
        self.waiting.push(reply);
    }

    /// Whether somebody waits and can be served.
    pub(super) fn is_due(&self) -> bool {
        self.ranges.is_some() && !self.waiting.is_empty()
    }

    /// Writes what is wanted, and tells everybody who waits.
    pub(super) fn serve(&mut self, kernel: Result<&mut Kernel, WorldError>) {
        let result = kernel.map_err(EndpointsError::from).and_then(|kernel| {
            self.write(kernel)?;
            self.settle(kernel);
            Ok(())
        });
        let result = result.map_err(|error| chain(&error));
        for reply in self.waiting.drain(..) {
            // Whoever does not wait any more has no use for it.
            let _ = reply.send(result.clone());
        }
    }

    /// A pass is about to be made for these ranges: closes what the old rules guarded, if the new ones do not.
    pub(super) fn prepare(
        &mut self,
        kernel: &mut Kernel,
        facts: &mut Facts,
        territory: &mut Territory,
    ) -> Result<(), WorldError> {
        self.written = None;
        let Some(bridge) = self.bridge.filter(|_| self.exposure.is_some()) else { return Ok(()) };
        let open = publish::localnet(bridge, true);
        if facts.get(&open.key()).is_some() {
            return Ok(());
        }
        let own = Territory { tables: [publish::table_name(&self.network)].into(), ..Territory::default() };
        if guarded(&kernel.observe(&own)?, &self.network) && !is_guarded_by_cni(kernel)? {
            territory.sysctls.extend(Territory::of([&open]).sysctls);
            facts.set(publish::localnet(bridge, false));
        }
        Ok(())
    }

    /// A pass was made for these ranges.
    pub(super) fn passed(&mut self, kernel: &mut Kernel, ranges: Vec<Range>, report: &Report) {
        self.ranges = Some(ranges);
        self.written = if report.clean { self.plan().ok() } else { None };
        if report.made.iter().any(|made| made.kind == "table") {
            // While the rules were not there, packets went another way.
            self.settled.clear();
        }
        self.settle(kernel);
    }

    /// Forgets connections that are not as the ports now say. Nothing depends on it but those connections.
    fn settle(&mut self, kernel: &mut Kernel) {
        let wanted = self.exposure.as_ref().map(|exposure| exposure.published.clone()).unwrap_or_default();
        let gone: Vec<_> = self.settled.difference(&wanted).copied().collect();
        let come: Vec<_> = wanted.difference(&self.settled).copied().collect();
        let changed = |port: &PublishedPort| port.protocol != Transport::Tcp;
        if gone.iter().chain(&come).any(changed) {
            let forgotten = kernel.interfaces().and_then(|interfaces| {
                let addresses = interfaces.iter().flat_map(|interface| &interface.addresses);
                let local: Vec<IpAddr> = addresses.map(|address| address.address.address()).collect();
                kernel.netfilter()?.forget(&Changed { gone: &gone, come: &come, local: &local })
            });
            match forgotten {
                Ok(0) => {}
                Ok(count) => {
                    tracing::info!(network = %self.network, "{count} tracked connections to changed ports forgotten")
                }
                Err(error) => tracing::warn!(network = %self.network, "{}", chain(&error)),
            }
        }
        self.settled = wanted;
    }

    fn plan(&self) -> Result<Facts, Conflict> {
        let (Some(exposure), Some(ranges)) = (&self.exposure, &self.ranges) else {
            return Ok(Facts::default());
        };
        let (network, bridge) = (&self.network, self.bridge);
        publish::plan(&PublishScene { network, ranges, exposure, bridge })
    }

    fn write(&mut self, kernel: &mut Kernel) -> Result<(), EndpointsError> {
        let mut wanted = self.plan()?;
        if let Some(written) = self.written.take() {
            self.close(kernel, &mut wanted, &written)?;
            if kernel.apply(&diff(&wanted, &written)).iter().all(Result::is_ok) {
                self.written = Some(self.plan()?);
                return Ok(());
            }
        }
        let mut territory = Territory::of(wanted.iter());
        territory.tables.insert(publish::table_name(&self.network));
        self.prepare(kernel, &mut wanted, &mut territory)?;
        let report = converge(kernel, &territory, &wanted)?;
        match report.failed.first() {
            _ if report.clean => {
                self.written = Some(self.plan()?);
                Ok(())
            }
            Some((made, cause)) => Err(EndpointsError::Left(format!("{cause} ({})", made.text))),
            None => Err(EndpointsError::Left(format!(
                "something else keeps changing the table {}",
                publish::table_name(&self.network)
            ))),
        }
    }

    /// The setting that the old rules guarded goes with them.
    fn close(&self, kernel: &mut Kernel, wanted: &mut Facts, written: &Facts) -> Result<(), WorldError> {
        if let Some(bridge) = self.bridge
            && guarded(written, &self.network)
            && !guarded(wanted, &self.network)
            && !is_guarded_by_cni(kernel)?
        {
            wanted.set(publish::localnet(bridge, false));
        }
        Ok(())
    }
}

/// Containers that the CNI plugin put on the same bridge may need the setting as well; their table has a guard of its own, and nobody
/// but the plugin knows what is in it.
fn is_guarded_by_cni(kernel: &mut Kernel) -> Result<bool, WorldError> {
    let tables = kernel.netfilter()?.table_names(TableFamily::Inet)?;
    Ok(tables.contains(&hostports::table_name().name))
}

fn guarded(facts: &Facts, network: &NetworkName) -> bool {
    matches!(facts.get(&Key::Table(publish::table_name(network))), Some(Fact::Table(table)) if publish::guards(table))
}
