//! The node agent of one network: from the store's values to a data path, for as long as it runs.
//!
//! It wires store, tenure, uplink and reconciler by whole values. Stopping it leaves the data path as it is; retiring it
//! takes everything away. While another agent of this node serves the network, it reads that one's lease along.

mod memory;
mod reader;
mod work;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use self::work::{End, Work};
use super::settings::AgentSettings;
use crate::words::addr::{Family, InterfaceAddress, Prefix};
use crate::words::config::NetworkConfig;
use crate::words::exposure::Exposure;
use crate::words::lease::Subnets;
use crate::words::report::{Finding, Reason};
use crate::words::units::Mtu;

/// How often what the agent waits for (uplink, lock) is tried again.
const WAIT: Duration = Duration::from_secs(1);

/// What an agent has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leased {
    /// The network's configuration; not known of a network that another agent holds for this node.
    pub config: Option<Arc<NetworkConfig>>,
    /// All of the network, IPv4 before IPv6.
    pub networks: Vec<Prefix>,
    /// This node's part of it.
    pub subnets: Subnets,
    /// Largest packet of a container.
    pub mtu: Mtu,
    /// Who holds the lease, if another agent on this node does and this one only reads along.
    pub holder: Option<String>,
}

impl Leased {
    /// The gateway of this node's containers, with the length of the subnet: first address of the subnet.
    pub fn gateway(&self, family: Family) -> Option<InterfaceAddress> {
        gateway(&self.subnets, family)
    }

    /// The network of a family.
    pub fn network(&self, family: Family) -> Option<Prefix> {
        self.networks.iter().copied().find(|network| network.family() == family)
    }
}

/// How an agent stands. Whole values, published whenever something changes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Status {
    /// What it waits for, if it has no lease or the store is away.
    pub waiting: Option<Finding>,
    /// What it has. Stays while the store is away; comes from disk at a start without the store.
    pub lease: Option<Leased>,
    /// Whether the kernel is as planned and the subnet file is written.
    pub ready: bool,
}

/// Who waits to hear that an exposure is in the kernel.
type Exposed = oneshot::Sender<Result<(), String>>;

enum Command {
    Poke(Reason),
    Expose(Exposure, Exposed),
    Retire(oneshot::Sender<Result<(), String>>),
    Stop(oneshot::Sender<()>),
}

/// The way to a running agent. It stops, leaving the data path, when this is dropped.
pub struct Agent {
    status: watch::Receiver<Status>,
    commands: mpsc::UnboundedSender<Command>,
    task: JoinHandle<()>,
}

impl Agent {
    /// Starts one, in the network namespace of the calling thread. What it cannot do yet is in its status.
    pub fn spawn(settings: AgentSettings) -> Self {
        let (publish, status) = watch::channel(Status::default());
        let (commands, inbox) = mpsc::unbounded_channel();
        let task = tokio::spawn(run(settings, publish, inbox));
        Self { status, commands, task }
    }

    /// How it stands.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Tells it that something changed, for example that a container came.
    pub fn poke(&self, reason: Reason) {
        let _ = self.commands.send(Command::Poke(reason));
    }

    /// Sets what is particular about this node's endpoints; the newest value counts. Resolves when the kernel has it, which for an
    /// agent without a lease may take for ever: whoever waits sets a limit.
    ///
    /// # Errors
    /// What the kernel refused, or that the agent has ended. The value stays wanted, and is tried again.
    pub fn expose(&self, exposure: Exposure) -> impl Future<Output = Result<(), String>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Expose(exposure, reply));
        async move { answer.await.unwrap_or_else(|_| Err("the agent has ended".into())) }
    }

    /// Takes everything of the network away from this host, gives the lease back, and ends.
    pub async fn retire(self) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Retire(reply));
        let result = answer.await.unwrap_or_else(|_| Err("the agent has ended".into()));
        self.end().await;
        result
    }

    /// Ends, leaving the data path and the lease.
    pub async fn stop(self) {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Stop(reply));
        let _ = answer.await;
        self.end().await;
    }

    async fn end(mut self) {
        let _ = (&mut self.task).await;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(
    mut settings: AgentSettings,
    mut publish: watch::Sender<Status>,
    mut inbox: mpsc::UnboundedReceiver<Command>,
) {
    loop {
        let Some(hold) = reader::wait(&mut settings, &publish, &mut inbox).await else { return };
        match Work::start(settings, publish, hold) {
            Ok(work) => match work.run(&mut inbox).await {
                End::Over => return,
                End::Yielded(others, status) => (settings, publish) = (*others, status),
            },
            Err(error) => {
                tracing::error!("the agent cannot start: {error}");
                return;
            }
        }
    }
}

/// The gateway of a node's containers: the first address of its subnet.
fn gateway(subnets: &Subnets, family: Family) -> Option<InterfaceAddress> {
    let subnet = subnets.of(family)?;
    InterfaceAddress::new(subnet.nth(1)?, subnet.len()).ok()
}
