//! What passes work from: whole values, as the agent has them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use crate::run::settings::AgentSettings;
use crate::touch::subnet_env::SubnetEnv;
use crate::touch::uplink::Sought;
use crate::words::addr::Prefix;
use crate::words::config::NetworkConfig;
use crate::words::lease::{LeaseSet, OwnLease};
use crate::words::name::{LinkName, NetworkName};
use crate::words::node::Identity;

/// What does not change while an agent runs.
#[derive(Clone, Debug)]
pub(in crate::run) struct Place {
    pub(in crate::run) network: NetworkName,
    pub(in crate::run) subnet_file: PathBuf,
    pub(in crate::run) masquerade: bool,
    pub(in crate::run) fully_random: bool,
    pub(in crate::run) forward: bool,
    pub(in crate::run) udp_offload: bool,
    pub(in crate::run) guard: bool,
    pub(in crate::run) blackhole: bool,
    /// The bridge, if the agent keeps one.
    pub(in crate::run) bridge: Option<LinkName>,
}

impl Place {
    /// What an agent was told.
    pub(in crate::run) fn of(settings: &AgentSettings) -> Self {
        Self {
            network: settings.network.clone(),
            subnet_file: settings.subnet_file.clone(),
            masquerade: settings.masquerade,
            fully_random: settings.fully_random,
            forward: settings.forward,
            udp_offload: settings.udp_offload,
            guard: settings.guard,
            blackhole: settings.blackhole,
            bridge: settings.bridge,
        }
    }
}

/// What a pass works from.
#[derive(Clone, PartialEq, Debug)]
pub(in crate::run) struct Inputs {
    pub(in crate::run) config: Arc<NetworkConfig>,
    pub(in crate::run) own: OwnLease,
    pub(in crate::run) leases: Arc<LeaseSet>,
    pub(in crate::run) uplink: LinkName,
    pub(in crate::run) sought: Sought,
    pub(in crate::run) identity: Identity,
    pub(in crate::run) isolated_from: BTreeSet<Prefix>,
    /// What the network's CIDRs were before the config changed: our routes in there are still ours to remove.
    pub(in crate::run) former: BTreeSet<Prefix>,
}

/// What a pass works from while another agent of this node holds the lease.
#[derive(Clone, Debug)]
pub(in crate::run) struct ReaderInputs {
    pub(in crate::run) env: SubnetEnv,
    pub(in crate::run) isolated_from: BTreeSet<Prefix>,
}

/// What a pass is for.
#[derive(Clone, Debug)]
pub(in crate::run) enum Sight {
    /// A lease of our own.
    Own(Box<Inputs>),
    /// Another agent's.
    Others(ReaderInputs),
}

impl From<Inputs> for Sight {
    fn from(inputs: Inputs) -> Self {
        Self::Own(Box::new(inputs))
    }
}

impl From<ReaderInputs> for Sight {
    fn from(inputs: ReaderInputs) -> Self {
        Self::Others(inputs)
    }
}

impl Sight {
    pub(super) fn own(&self) -> Option<&OwnLease> {
        match self {
            Self::Own(inputs) => Some(&inputs.own),
            Self::Others(_) => None,
        }
    }

    pub(super) fn leases(&self) -> usize {
        match self {
            Self::Own(inputs) => inputs.leases.leases.len(),
            Self::Others(_) => 0,
        }
    }
}
