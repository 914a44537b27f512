//! What an agent is told once, when it starts.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;

use super::health::Counters;
use super::store::NetworkStore;
use crate::touch::uplink::Sought;
use crate::touch::wireguard_key::KeyPlace;
use crate::words::addr::Prefix;
use crate::words::exposure::Exposure;
use crate::words::name::{LinkName, NetworkName};

/// What an agent is to do.
#[derive(Clone)]
pub struct AgentSettings {
    /// Its network.
    pub network: NetworkName,
    /// Where config and leases live.
    pub store: NetworkStore,
    /// Which interface carries us, and how peers reach us.
    pub uplink: Sought,
    /// What others read: subnet, MTU.
    pub subnet_file: PathBuf,
    /// What survives a restart.
    pub state_dir: PathBuf,
    /// Where the key of WireGuard devices is.
    pub wireguard_key: KeyPlace,
    /// Masquerade what leaves the network.
    pub masquerade: bool,
    /// Source ports of that are chosen at random.
    pub fully_random: bool,
    /// Accept forwarded traffic of the network.
    pub forward: bool,
    /// Let the kernel cut and put together what the udp backend carries.
    pub udp_offload: bool,
    /// Take packets into the kernel's tunnels from holders of leases only.
    pub guard: bool,
    /// Throw away what is sent to our own subnet while nothing here takes it.
    pub blackhole: bool,
    /// Run the commands of a config that came from elsewhere.
    pub allow_extension: bool,
    /// Keep this bridge.
    pub bridge: Option<LinkName>,
    /// CIDRs that this network's containers must not reach, and the other way round.
    pub isolated_from: watch::Receiver<BTreeSet<Prefix>>,
    /// What is particular about this node's endpoints, to begin with; none if that is another program's to say, whose rules
    /// are then left alone.
    pub exposure: Option<Exposure>,
    /// The network is another agent's for good, because our store does not know of it: never take it, only read along.
    pub reads_only: bool,
    /// How long before its end the lease is renewed.
    pub renew_margin: Duration,
    /// How long without notice until the kernel is looked at all the same.
    pub resync: Duration,
    /// Where passes and repairs are counted.
    pub counters: Counters,
}
