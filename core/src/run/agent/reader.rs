//! An agent whose network another agent of this node serves: it reads that one's subnet file along and keeps the bridge, the
//! ports and a few rules for the containers of its own program. It writes neither the file, nor a lease, nor anything of the overlay.
//!
//! When the other one ends, it may only be restarting, and then needs its lease, device and file as they are: nothing is
//! taken over before [`GRACE`] is over, except where the file has gone too.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::{Command, Leased, Status, WAIT};
use crate::act::pass::{chain, converge};
use crate::decide::reader;
use crate::run::hold::{Door, Hold, HoldError};
use crate::run::kernel_events::KernelEvents;
use crate::run::reconcile::{Look, Place, ReaderInputs, Reconciler, backoff};
use crate::run::settings::AgentSettings;
use crate::touch::other_agents::OtherAgent;
use crate::touch::subnet_env::SubnetEnv;
use crate::touch::world::kernel::Kernel;
use crate::words::addr::{Family, InterfaceAddress};
use crate::words::code::Code;
use crate::words::exposure::Exposure;
use crate::words::fact::Facts;
use crate::words::lease::Subnets;
use crate::words::report::{Finding, Reason};

/// How long the other agent may be away. A service manager restarts it within seconds; a kubelet, after crashes in a
/// row, waits longer, but never for the first one.
const GRACE: Duration = Duration::from_secs(60);

/// Notices from the kernel are gathered for so long before it is looked at.
const SETTLE: Duration = Duration::from_millis(50);

/// Waits until the network is this agent's to serve, reading along meanwhile. None if the agent is to end.
pub(super) async fn wait(
    settings: &mut AgentSettings,
    publish: &watch::Sender<Status>,
    inbox: &mut mpsc::UnboundedReceiver<Command>,
) -> Option<Hold> {
    let watchman = match Watchman::start(settings).await {
        Ok(hold) => {
            forget_reading(settings).await;
            return Some(hold);
        }
        Err(watchman) => watchman,
    };
    match Reader::start(settings.clone(), publish.clone(), watchman) {
        Ok(reader) => {
            let (hold, exposure) = reader.run(inbox).await?;
            settings.exposure = exposure;
            Some(hold)
        }
        Err(error) => {
            tracing::error!("the agent cannot start: {error}");
            None
        }
    }
}

/// An earlier life of this program may have been a reader's.
async fn forget_reading(settings: &AgentSettings) {
    if settings.bridge.is_none() {
        return;
    }
    let territory = reader::remains(&settings.network);
    let removed = tokio::task::spawn_blocking(move || {
        Kernel::open().and_then(|mut kernel| converge(&mut kernel, &territory, &Facts::default()))
    });
    if let Ok(Err(error)) = removed.await {
        tracing::warn!("the rules of an earlier reader may be left: {}", chain(&error));
    }
}

/// Who serves the network here.
struct Watchman {
    settings: AgentSettings,
    door: Option<Door>,
    other: Option<OtherAgent>,
}

impl Watchman {
    /// Takes the lock, or watches those who keep us from it.
    async fn start(settings: &AgentSettings) -> Result<Hold, Self> {
        let mut watchman = Self { settings: settings.clone(), door: None, other: None };
        // A reader's look at the lock is no reason to become one.
        const LOOKS: u32 = 5;
        const LOOK: Duration = Duration::from_millis(2);
        for _ in 0..LOOKS {
            match watchman.holder().await {
                Ok(None) if !settings.reads_only => match watchman.take() {
                    Some(hold) => return Ok(hold),
                    None => tokio::time::sleep(LOOK).await,
                },
                Ok(_) | Err(_) => break,
            }
        }
        Err(watchman)
    }

    /// Who serves the network now, if anybody does.
    async fn holder(&mut self) -> Result<Option<String>, HoldError> {
        let door = match self.door.take().filter(Door::is_current) {
            Some(door) => door,
            None => Door::open(&self.settings.subnet_file, &self.settings.network)?,
        };
        let door = self.door.insert(door);
        if let Some(holder) = door.holder()? {
            return Ok(Some(holder));
        }
        if !self.other.as_ref().is_some_and(OtherAgent::lives) {
            let lock = door.file().try_clone();
            let subnet_file = self.settings.subnet_file.clone();
            let look = move || lock.ok().and_then(|lock| OtherAgent::find(&subnet_file, &lock));
            self.other = tokio::task::spawn_blocking(look).await.unwrap_or_default();
        }
        Ok(self.other.as_ref().map(OtherAgent::to_string))
    }

    fn take(&mut self) -> Option<Hold> {
        match self.door.take()?.take() {
            Ok(hold) => Some(hold),
            Err((door, _)) => {
                self.door = Some(door);
                None
            }
        }
    }
}

/// Which file was read: a new one is another file, because everybody replaces it whole.
type Stamp = (u64, Option<SystemTime>, u64);

struct Reader {
    settings: AgentSettings,
    publish: watch::Sender<Status>,
    watchman: Watchman,
    reconciler: Reconciler,
    kernel_notice: Arc<Notify>,
    _events: KernelEvents,
    stamp: Option<Stamp>,
    env: Option<SubnetEnv>,
    /// What is wrong with the file.
    trouble: Option<String>,
    holder: Option<String>,
    /// Since when nobody serves the network.
    alone: Option<Instant>,
    ready: bool,
    failures: u32,
    next_poll: Instant,
    next_look: Instant,
    pending: Option<Reason>,
}

impl Reader {
    fn start(
        settings: AgentSettings,
        publish: watch::Sender<Status>,
        watchman: Watchman,
    ) -> std::io::Result<Self> {
        let place = Place::of(&settings);
        let kernel_notice = Arc::new(Notify::new());
        let reconciler = Reconciler::start(place, settings.exposure.clone(), settings.counters.clone())?;
        Ok(Self {
            _events: KernelEvents::subscribe(kernel_notice.clone(), reconciler.own_writes.clone())?,
            reconciler,
            kernel_notice,
            settings,
            publish,
            watchman,
            stamp: None,
            env: None,
            trouble: None,
            holder: None,
            alone: None,
            ready: false,
            failures: 0,
            next_poll: Instant::now(),
            next_look: Instant::now() + WAIT,
            pending: None,
        })
    }

    /// The lock, and what endpoints want by now; none if the agent is to end.
    async fn run(mut self, inbox: &mut mpsc::UnboundedReceiver<Command>) -> Option<(Hold, Option<Exposure>)> {
        loop {
            // Every arm is cancel-safe; none awaits inside the select.
            let command = tokio::select! {
                () = sleep_until(self.next_poll) => {
                    self.next_poll = Instant::now() + WAIT;
                    if let Some(hold) = self.poll().await {
                        return Some(self.take_over(hold).await);
                    }
                    continue;
                }
                Ok(()) = self.settings.isolated_from.changed() => {
                    self.look(Reason::Config, Duration::ZERO);
                    continue;
                }
                Ok(()) = self.reconciler.outcome.changed() => {
                    self.passed();
                    continue;
                }
                () = self.kernel_notice.notified() => {
                    self.look(Reason::Kernel, SETTLE);
                    continue;
                }
                () = sleep_until(self.next_look) => {
                    self.look_now();
                    continue;
                }
                command = inbox.recv() => command,
            };
            match command {
                Some(Command::Poke(reason)) => self.look(reason, Duration::ZERO),
                Some(Command::Expose(exposure, reply)) => {
                    self.settings.exposure = Some(exposure.clone());
                    self.reconciler.expose(exposure, reply);
                }
                Some(Command::Retire(reply)) => {
                    let _ = reply.send(self.retire().await);
                    return None;
                }
                Some(Command::Stop(reply)) => {
                    self.reconciler.end().await;
                    let _ = reply.send(());
                    return None;
                }
                None => return None,
            }
        }
    }

    /// Reads the file if it is another one, looks who serves the network, and tells. With the lock, if it is to be ours.
    async fn poll(&mut self) -> Option<Hold> {
        self.read();
        let holder = self.watchman.holder().await;
        match holder {
            Ok(Some(holder)) => self.served_by(holder),
            Ok(None) if self.settings.reads_only => self.holder = None,
            Ok(None) => {
                if self.is_over()
                    && let Some(hold) = self.watchman.take()
                {
                    return Some(hold);
                }
            }
            Err(error) => self.trouble = Some(chain(&error)),
        }
        self.announce();
        None
    }

    fn served_by(&mut self, holder: String) {
        let network = &self.settings.network;
        if self.alone.take().is_some() {
            tracing::info!(%network, "served again, by {holder}; reading along");
        } else if self.holder.is_none() {
            let held = held(&self.settings, &holder);
            tracing::warn!(%network, "{held}; reading along: {}", self.settings.subnet_file.display());
        } else if self.holder.as_ref() != Some(&holder) {
            tracing::info!(%network, "served by {holder} now; reading along");
        }
        self.holder = Some(holder);
    }

    /// Whether the one who served the network will not come back.
    fn is_over(&mut self) -> bool {
        let network = &self.settings.network;
        if !self.settings.subnet_file.exists() {
            tracing::info!(%network, "nobody serves it any more: taking it");
            return true;
        }
        match self.alone {
            None => {
                let holder = self.holder.as_deref().unwrap_or("the agent that served it");
                tracing::warn!(%network, "{holder} has ended; taking over in {GRACE:?} unless it comes back");
                self.alone = Some(Instant::now());
                false
            }
            Some(since) if since.elapsed() < GRACE => false,
            Some(_) => {
                tracing::warn!(%network, "nobody has served it for {GRACE:?}: taking over");
                true
            }
        }
    }

    fn read(&mut self) {
        let path = &self.settings.subnet_file;
        let stamp = fs::metadata(path).ok().map(|file| (file.ino(), file.modified().ok(), file.len()));
        if stamp == self.stamp && (stamp.is_some() || self.trouble.is_some()) {
            return;
        }
        self.stamp = stamp;
        match SubnetEnv::read(path) {
            Ok(env) => {
                self.trouble = None;
                if self.env.as_ref() != Some(&env) {
                    let network = &self.settings.network;
                    tracing::info!(%network, "{} says: {}", path.display(), one_line(&env));
                    self.env = Some(env);
                    self.ready = false;
                    self.look(Reason::Leases, Duration::ZERO);
                }
            }
            // Containers go on with what was true last.
            Err(error) => {
                let trouble = chain(&error);
                if self.env.is_some() {
                    tracing::warn!(network = %self.settings.network, "{trouble}; its last content counts");
                }
                self.trouble = Some(trouble);
            }
        }
    }

    fn announce(&self) {
        let lease = self.env.as_ref().and_then(|env| self.leased(env));
        let waiting = match (&lease, &self.trouble) {
            (Some(_), _) => None,
            (None, trouble) => {
                let mut finding = held(&self.settings, &self.holder());
                finding.text.extend(trouble.iter().flat_map(|trouble| ["; ", trouble.as_str()]));
                Some(finding)
            }
        };
        let status = Status { waiting, ready: self.ready && lease.is_some(), lease };
        self.settings.counters.ready(self.settings.network.as_str(), status.ready);
        self.publish.send_if_modified(|current| {
            let news = *current != status;
            *current = status;
            news
        });
    }

    fn leased(&self, env: &SubnetEnv) -> Option<Leased> {
        let subnet = |family| env.subnet(family).map(|own| InterfaceAddress::prefix(&own));
        Some(Leased {
            config: None,
            networks: env.networks.clone(),
            subnets: Subnets::new(subnet(Family::V4), subnet(Family::V6))?,
            mtu: env.mtu,
            holder: Some(self.holder()),
        })
    }

    fn holder(&self) -> String {
        self.holder.clone().unwrap_or_else(|| "another agent".to_owned())
    }

    /// Plans a look at the kernel, at the latest after `delay`.
    fn look(&mut self, reason: Reason, delay: Duration) {
        self.pending = Some(self.pending.map_or(reason, |pending| pending.min(reason)));
        self.next_look = self.next_look.min(Instant::now() + delay);
    }

    fn look_now(&mut self) {
        let reason = self.pending.take().unwrap_or(Reason::Resync);
        self.next_look = Instant::now() + self.settings.resync;
        let Some(env) = self.env.clone() else { return };
        let isolated_from = self.settings.isolated_from.borrow().clone();
        self.reconciler.pass(ReaderInputs { env, isolated_from }, reason, Look::Needed);
    }

    /// A pass has ended.
    fn passed(&mut self) {
        let clean = self.reconciler.outcome.borrow_and_update().clean;
        match clean {
            true => self.failures = 0,
            false => {
                self.look(Reason::Retry, backoff(self.failures));
                self.failures = self.failures.saturating_add(1);
            }
        }
        self.ready |= clean;
        self.announce();
    }

    async fn take_over(self, hold: Hold) -> (Hold, Option<Exposure>) {
        if let Err(error) = self.reconciler.retire_table(reader::table_name(&self.settings.network)).await {
            tracing::warn!(network = %self.settings.network, "a reader's rules may be left: {error}");
        }
        self.reconciler.end().await;
        (hold, self.settings.exposure)
    }

    /// Takes away what only a reader has; the network stays, and its bridge is whose it is.
    async fn retire(self) -> Result<(), String> {
        if self.settings.exposure.is_some() && self.env.is_some() {
            let (reply, answer) = oneshot::channel();
            self.reconciler.expose(Exposure::default(), reply);
            answer.await.unwrap_or_else(|_| Err("the reconciler has ended".into()))?;
        }
        let report = self.reconciler.retire_table(reader::table_name(&self.settings.network)).await?;
        tracing::info!(network = %self.settings.network, "reads along no more");
        match report.failed.first() {
            Some((made, cause)) => Err(format!("{cause} ({})", made.text)),
            None => Ok(()),
        }
    }
}

fn held(settings: &AgentSettings, holder: &str) -> Finding {
    let held = HoldError::Held {
        network: settings.network.clone(),
        holder: holder.to_owned(),
        subnet_file: settings.subnet_file.display().to_string().into(),
    };
    Finding::new(Code::AGENT_HELD, held.to_string())
}

fn one_line(env: &SubnetEnv) -> String {
    env.to_string().lines().collect::<Vec<_>>().join(" ")
}
