//! What charon has to be told by the ipsec backend, and charon itself where nobody else runs one: a task.
//!
//! It is told by whole values what charon should hold. It asks charon what it has, tells it the difference, and looks again: when
//! charon says that something changed, and from time to time. A charon that runs already is used; it is the operator's, and only what has
//! our names is touched. Else one is started, and again later and later when it dies; it outlives us, and is ours again when we come back.

mod charon;
mod client;
mod listener;
mod message;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use self::charon::Charon;
use self::client::{Client, SOCKET};
use self::listener::{Cause, Listener, News};
use self::session::Session;
use super::reconcile::backoff;
use crate::act::pass::chain;
use crate::decide::associations::Stage;
use crate::words::addr::Prefix;
use crate::words::code::Code;
use crate::words::ipsec::{Associations, Connection, IpsecConfig};
use crate::words::name::NetworkName;
use crate::words::report::Finding;

/// How long a charon that was just started may take until it listens.
const START_MAX: Duration = Duration::from_secs(60);
/// How often it is looked whether it does.
const START_STEP: Duration = Duration::from_millis(50);
/// A charon that ran for so long has not failed to start.
const SOUND: Duration = Duration::from_secs(60);
/// How long until charon is looked at again although it said nothing.
const LOOK: Duration = Duration::from_secs(30);
/// The same while a tunnel is missing.
const LOOK_SOON: Duration = Duration::from_secs(5);
/// News are gathered for so long before charon is looked at.
const SETTLE: Duration = Duration::from_millis(200);
/// A tunnel that is not up after this long is told of.
const PATIENCE: Duration = Duration::from_secs(15);
/// A cause that was not heard of for so long does not keep lighter ones away.
const FORGET: Duration = Duration::from_secs(150);
/// Log lines about peers in one go.
const LINES_MAX: usize = 40;
/// How long taking everything away may take.
const RETIRE_MAX: Duration = Duration::from_secs(30);

/// What charon should hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Wanted {
    /// The connections; none where another backend carries the network.
    pub(super) associations: Option<Arc<Associations>>,
    /// What has our names, and both subnets in one of these, is ours to take away.
    pub(super) networks: BTreeSet<Prefix>,
}

/// How it stands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct State {
    /// With what charon holds every connection that is wanted.
    serves: Option<IpsecConfig>,
    /// Whether nothing is wanted, and nothing is left.
    gone: bool,
    /// Why charon does not serve.
    pub(super) trouble: Option<Finding>,
}

/// The way to the task. It ends when this is dropped; charon does not.
pub(super) struct Ipsec {
    wanted: watch::Sender<Option<Wanted>>,
    pub(super) state: watch::Receiver<State>,
    task: JoinHandle<()>,
}

impl Ipsec {
    /// Starts it. Until something is wanted it does nothing.
    pub(super) fn spawn(network: &NetworkName) -> Self {
        let (wanted, inbox) = watch::channel(None);
        let (publish, state) = watch::channel(State::default());
        let (news, heard) = mpsc::unbounded_channel();
        let worker = Worker {
            network: network.clone(),
            inbox,
            publish,
            news,
            heard,
            session: None,
            listener: None,
            charon: None,
            started: None,
            failures: 0,
            down: BTreeMap::new(),
            told: BTreeSet::new(),
        };
        Self { wanted, state, task: tokio::spawn(worker.run()) }
    }

    /// Says what charon should hold.
    pub(super) fn want(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|current| {
            let news = current.as_ref() != Some(&wanted);
            *current = Some(wanted);
            news
        });
    }

    /// Whether charon holds every connection, as this config has them.
    pub(super) fn serves(&self, config: &IpsecConfig) -> bool {
        self.state.borrow().serves.as_ref() == Some(config)
    }

    /// Has everything of these networks taken away.
    pub(super) async fn retire(mut self, networks: BTreeSet<Prefix>) {
        self.want(Wanted { associations: None, networks });
        let gone = timeout(RETIRE_MAX, self.state.wait_for(|state| state.gone));
        if !matches!(gone.await, Ok(Ok(_))) {
            tracing::warn!("{}", Finding::new(Code::CHARON_FAILED, "connections of ours may be left in it"));
        }
    }
}

impl Drop for Ipsec {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A peer without a tunnel.
struct Down {
    since: Instant,
    /// The weightiest of late, and when it was last heard of.
    cause: Option<(Cause, Instant)>,
}

impl Down {
    /// Whether that is news.
    fn hear(&mut self, cause: Cause) -> bool {
        let known = self.cause.filter(|(_, heard)| heard.elapsed() < FORGET);
        match known {
            Some((known, _)) if known < cause => false,
            _ => self.cause.replace((cause, Instant::now())).map(|(known, _)| known) != Some(cause),
        }
    }
}

struct Worker {
    network: NetworkName,
    inbox: watch::Receiver<Option<Wanted>>,
    publish: watch::Sender<State>,
    news: mpsc::UnboundedSender<News>,
    heard: mpsc::UnboundedReceiver<News>,
    session: Option<Session>,
    listener: Option<Listener>,
    /// One of ours.
    charon: Option<Charon>,
    started: Option<Instant>,
    /// In a row.
    failures: u32,
    down: BTreeMap<Connection, Down>,
    /// What was told of them.
    told: BTreeSet<Finding>,
}

impl Worker {
    async fn run(mut self) {
        loop {
            let wanted = self.inbox.borrow_and_update().clone();
            let pause = match wanted {
                Some(wanted) => self.round(&wanted).await,
                None => LOOK,
            };
            if !self.rest(Instant::now() + pause).await {
                return;
            }
        }
    }

    /// Waits for a reason to look again; false if nobody wants anything any more.
    async fn rest(&mut self, until: Instant) -> bool {
        loop {
            tokio::select! {
                changed = self.inbox.changed() => return changed.is_ok(),
                Some(one) = self.heard.recv() => if self.hear(one) {
                    self.gather().await;
                    return true;
                },
                how = ended(self.charon.as_mut()) => {
                    self.died(&how);
                    return true;
                }
                () = sleep_until(until) => return true,
            }
        }
    }

    /// Makes charon hold what is wanted; how long until the next look.
    async fn round(&mut self, wanted: &Wanted) -> Duration {
        let Some(associations) = wanted.associations.clone() else {
            self.nothing(wanted).await;
            return LOOK;
        };
        let result = match self.reach().await {
            Ok(session) => session.converge(Some(&associations), &wanted.networks).await,
            Err(finding) => return self.fails(finding),
        };
        match result {
            Ok(tunnels) => {
                self.failures = 0;
                self.account(&associations, &tunnels);
                let state = State { serves: Some(associations.config.clone()), ..State::default() };
                self.publish(state);
                if self.down.is_empty() { LOOK } else { LOOK_SOON }
            }
            Err(error) => {
                if !error.is_refusal() {
                    (self.session, self.listener) = (None, None);
                }
                self.fails(Finding::new(Code::CHARON_FAILED, chain(&error)))
            }
        }
    }

    /// Takes away what is ours, from whichever charon runs; one of ours is not needed any more.
    async fn nothing(&mut self, wanted: &Wanted) {
        if self.session.is_none()
            && let Ok(client) = Client::connect().await
        {
            self.session = Some(Session::new(client));
        }
        if let Some(mut session) = self.session.take()
            && let Err(error) = session.converge(None, &wanted.networks).await
        {
            let text = format!("connections of ours may be left in it: {}", chain(&error));
            tracing::warn!(network = %self.network, "{}", Finding::new(Code::CHARON_FAILED, text));
        }
        self.listener = None;
        if let Some(charon) = self.charon.take().or_else(Charon::left) {
            tracing::info!(network = %self.network, "Stopped charon daemon: nothing is left for it to do");
            charon.farewell().await;
        }
        self.down.clear();
        self.tell(BTreeSet::new());
        self.publish(State { gone: true, ..State::default() });
    }

    /// The session with charon; one is begun if there is none.
    async fn reach(&mut self) -> Result<&mut Session, Finding> {
        if self.session.is_none() {
            let client = match Client::connect().await {
                Ok(client) => {
                    self.take_up();
                    client
                }
                Err(_) => self.start().await?,
            };
            self.session = Some(Session::new(client));
        }
        if self.listener.is_none() {
            let begun = Listener::start(self.news.clone()).await;
            self.listener = Some(begun.map_err(|error| Finding::new(Code::CHARON_FAILED, chain(&error)))?);
        }
        let absent = || Finding::new(Code::CHARON_FAILED, "there is no session with it");
        self.session.as_mut().ok_or_else(absent)
    }

    /// Finds out whose the charon is that listens.
    fn take_up(&mut self) {
        let network = &self.network;
        if self.charon.is_some() {
            return;
        }
        self.charon = Charon::left();
        match &self.charon {
            Some(charon) => tracing::info!(%network, "Charon daemon runs already: process {}", charon.id()),
            None => tracing::info!(%network, "using the charon that listens on {SOCKET}"),
        }
    }

    /// Starts one of ours, unless that runs and only does not listen yet, and waits until it listens.
    async fn start(&mut self) -> Result<Client, Finding> {
        let failed = |text: String| Finding::new(Code::CHARON_FAILED, text);
        if let Some(how) = self.charon.as_mut().and_then(Charon::gone) {
            self.died(&how);
        }
        if self.charon.is_none() {
            // One that an earlier flanneld has only just started.
            self.charon = Charon::left();
        }
        if self.charon.is_none() {
            let program = charon::find().ok_or_else(|| {
                Finding::new(Code::CHARON_ABSENT, format!("no charon in {}", charon::places()))
            })?;
            let started = Charon::start(&program)
                .map_err(|error| failed(format!("{} cannot be started: {error}", program.display())))?;
            tracing::info!(network = %self.network, "Charon daemon started: {}, process {}", program.display(), started.id());
            (self.charon, self.started) = (Some(started), Some(Instant::now()));
        }
        let deadline = Instant::now() + START_MAX;
        loop {
            if let Ok(client) = Client::connect().await {
                return Ok(client);
            }
            tokio::select! {
                how = ended(self.charon.as_mut()) => {
                    self.charon = None;
                    return Err(failed(how));
                }
                () = sleep(START_STEP) => {}
            }
            if Instant::now() >= deadline {
                if let Some(charon) = self.charon.take() {
                    charon.kill().await;
                }
                let text = format!("it does not listen on {SOCKET} (plugin vici), and was killed");
                return Err(failed(text));
            }
        }
    }

    /// A charon of ours has ended by itself.
    fn died(&mut self, how: &str) {
        (self.charon, self.session, self.listener) = (None, None, None);
        let sound = self.started.is_some_and(|at| at.elapsed() >= SOUND);
        self.failures = if sound { 0 } else { self.failures.saturating_add(1) };
        tracing::warn!(network = %self.network, "charon: {how}; the tunnels that are up carry packets on, and it is started again");
    }

    /// Whether it is a reason to look.
    fn hear(&mut self, one: News) -> bool {
        match one {
            News::Changed => true,
            News::Over => {
                (self.session, self.listener) = (None, None);
                true
            }
            News::Cause(connection, cause) => match self.down.get_mut(&connection) {
                Some(down) => down.hear(cause),
                None => false,
            },
        }
    }

    /// What else is said within a moment belongs to the same look.
    async fn gather(&mut self) {
        let until = Instant::now() + SETTLE;
        while let Ok(Some(one)) = tokio::time::timeout_at(until, self.heard.recv()).await {
            self.hear(one);
        }
    }

    /// Who has a tunnel and who has not, and since when.
    fn account(&mut self, associations: &Associations, tunnels: &BTreeMap<Connection, Stage>) {
        let up = |connection: &Connection| tunnels.get(connection) == Some(&Stage::Up);
        let wanted: BTreeSet<Connection> = associations.connections().collect();
        self.down.retain(|connection, _| wanted.contains(connection) && !up(connection));
        for connection in wanted.into_iter().filter(|connection| !up(connection)) {
            self.down.entry(connection).or_insert_with(|| Down { since: Instant::now(), cause: None });
        }
        let overdue =
            self.down.iter().filter(|(_, down)| down.since.elapsed() >= PATIENCE || down.cause.is_some());
        let findings = overdue.map(|(connection, down)| {
            let cause = down.cause.map_or("the two do not agree yet", |(cause, _)| cause.text());
            let Connection { subnet, remote, .. } = connection;
            Finding::new(Code::TUNNEL_ABSENT, format!("{subnet} of {remote}: {cause}"))
        });
        self.tell(findings.collect());
    }

    /// Tells what is new and what is over.
    fn tell(&mut self, now: BTreeSet<Finding>) {
        let network = &self.network;
        for new in now.difference(&self.told).take(LINES_MAX) {
            tracing::warn!(%network, "{new}");
        }
        for ended in self.told.difference(&now).take(LINES_MAX) {
            tracing::info!(%network, "over: {} {}: {}", ended.code, ended.code.title(), ended.text);
        }
        self.told = now;
    }

    /// charon does not serve. The tunnels may, so nothing is said of them; who reads the state tells the operator.
    fn fails(&mut self, finding: Finding) -> Duration {
        let serves = self.publish.borrow().serves.clone();
        self.publish(State { serves, trouble: Some(finding), gone: false });
        let pause = backoff(self.failures);
        self.failures = self.failures.saturating_add(1);
        pause
    }

    fn publish(&self, state: State) {
        self.publish.send_if_modified(|current| {
            let news = *current != state;
            *current = state;
            news
        });
    }
}

async fn ended(charon: Option<&mut Charon>) -> String {
    match charon {
        Some(charon) => charon.ended().await,
        None => std::future::pending().await,
    }
}

/// Takes what is ours away from a charon that runs, without an agent, and one of ours altogether.
pub(super) async fn retire(network: &NetworkName, networks: BTreeSet<Prefix>) {
    if Client::connect().await.is_ok() || Charon::left().is_some() {
        Ipsec::spawn(network).retire(networks).await;
    }
}
