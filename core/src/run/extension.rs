//! The commands of the extension backend at work: a task that runs them one after another.
//!
//! It is told by whole values what should have been told, and runs commands for the difference. What fails is said once, and
//! run again later and later; the others do not wait for it longer than its deadline. Nothing is run unless somebody asked
//! for this task, which is the permission to run commands at all.

mod command;
mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::health::Counters;
use super::reconcile::backoff;
use crate::act::pass::chain;
use crate::decide::errands::{Standing, Step, Wanted, next};
use crate::words::code::Code;
use crate::words::extension::{Errand, ExtensionConfig, Occasion};
use crate::words::name::NetworkName;
use crate::words::report::Finding;

/// After so many failures what should take something away is given up: it may be gone.
const REMOVALS_MAX: u32 = 3;
/// Log lines about peers in one go.
const LINES_MAX: usize = 40;
/// How often at most the file is written while commands run.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// How long taking everything away may take.
const RETIRE_MAX: Duration = Duration::from_secs(60);

/// How the commands stand.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct State {
    /// Whose they are.
    config: Option<ExtensionConfig>,
    /// What `PreStartupCommand` printed, once it has ended well.
    prepared: Option<Option<String>>,
    /// Whether the commands were told of us and, as far as they could be, of every peer.
    served: bool,
    /// The first of what fails.
    pub(super) trouble: Option<Finding>,
}

/// The way to the task. It ends when this is dropped, and the command that runs then with it.
pub(super) struct Extension {
    wanted: watch::Sender<Wanted>,
    pub(super) state: watch::Receiver<State>,
    task: JoinHandle<()>,
}

impl Extension {
    /// Starts it.
    pub(super) fn spawn(network: &NetworkName, state_dir: &Path, counters: Counters) -> Self {
        let path = file::path(state_dir, network);
        let standing = file::read(&path);
        let (wanted, inbox) = watch::channel(Wanted::Unknown);
        let state = State { config: standing.config.clone(), ..State::default() };
        let (publish, state) = watch::channel(state);
        let worker = Worker {
            network: network.clone(),
            path,
            counters,
            inbox,
            publish,
            saved: standing.clone(),
            saved_at: None,
            standing,
            failed: BTreeMap::new(),
            held: BTreeSet::new(),
            retry: None,
            rounds: 0,
            lines: 0,
            served: false,
        };
        Self { wanted, state, task: tokio::spawn(worker.run()) }
    }

    /// Says what should have been told.
    pub(super) fn want(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|current| {
            let news = *current != wanted;
            *current = wanted;
            news
        });
    }

    /// What `PreStartupCommand` of this config printed, if it has ended well.
    pub(super) fn prepared(&self, config: &ExtensionConfig) -> Option<Option<String>> {
        let state = self.state.borrow();
        state.prepared.clone().filter(|_| state.config.as_ref() == Some(config))
    }

    /// Whether the commands of this config were told of everything, as far as they could be.
    pub(super) fn serves(&self, config: &ExtensionConfig) -> bool {
        let state = self.state.borrow();
        state.served && state.config.as_ref() == Some(config)
    }

    /// Has everything taken away that the commands made.
    pub(super) async fn retire(mut self) {
        self.want(Wanted::Nothing);
        let gone = timeout(RETIRE_MAX, self.state.wait_for(|state| state.config.is_none()));
        if !matches!(gone.await, Ok(Ok(_))) {
            tracing::warn!("{}", Finding::new(Code::EXTENSION_FAILED, "what the commands made may be left"));
        }
    }
}

impl Drop for Extension {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whether commands of an earlier run made something for a network.
pub(super) fn stands(network: &NetworkName, state_dir: &Path) -> bool {
    file::read(&file::path(state_dir, network)).config.is_some()
}

struct Failure {
    times: u32,
    cause: String,
}

struct Worker {
    network: NetworkName,
    path: PathBuf,
    counters: Counters,
    inbox: watch::Receiver<Wanted>,
    publish: watch::Sender<State>,
    standing: Standing,
    /// As the file has it.
    saved: Standing,
    saved_at: Option<Instant>,
    /// What failed and has not worked since.
    failed: BTreeMap<Step, Failure>,
    /// What failed in this round.
    held: BTreeSet<Step>,
    /// When the next round begins.
    retry: Option<Instant>,
    rounds: u32,
    lines: usize,
    served: bool,
}

impl Worker {
    async fn run(mut self) {
        loop {
            let wanted = self.inbox.borrow_and_update().clone();
            self.standing.adopt(&wanted);
            match self.next(&wanted) {
                Some(step) => {
                    self.save(&wanted, false);
                    self.step(&wanted, step).await;
                }
                None => {
                    self.rest(&wanted);
                    let retry = self.retry.unwrap_or_else(Instant::now);
                    tokio::select! {
                        changed = self.inbox.changed() => if changed.is_err() { return },
                        () = sleep_until(retry), if self.retry.is_some() => {
                            self.retry = None;
                            self.held.clear();
                        }
                    }
                }
            }
            self.tell();
        }
    }

    /// What has failed before comes last: it may take all of its time again.
    fn next(&self, wanted: &Wanted) -> Option<Step> {
        if self.failed.is_empty() {
            return next(&self.standing, wanted, &self.held);
        }
        let troubled = self.failed.keys().chain(&self.held).cloned().collect();
        next(&self.standing, wanted, &troubled).or_else(|| next(&self.standing, wanted, &self.held))
    }

    /// Nothing is to be done now.
    fn rest(&mut self, wanted: &Wanted) {
        self.save(wanted, true);
        self.lines = 0;
        self.served |= self.standing.started && matches!(wanted, Wanted::Served(_));
        // What is not tried any more does not fail any more.
        self.failed.retain(|step, _| self.held.contains(step));
        self.counters.commands_failing(self.network.as_str(), self.failed.len());
        if self.held.is_empty() {
            self.rounds = 0;
        } else if self.retry.is_none() {
            self.retry = Some(Instant::now() + backoff(self.rounds));
            self.rounds = self.rounds.saturating_add(1);
        }
        self.tell();
    }

    async fn step(&mut self, wanted: &Wanted, step: Step) {
        let errand = self.standing.errand(wanted, &step);
        let config = self.standing.config.clone().unwrap_or_default();
        self.standing.begin(&step, &errand);
        let Some(line) = config.command(step.occasion) else {
            if matches!(step.occasion, Occasion::PreStartup | Occasion::PostStartup) {
                tracing::debug!(network = %self.network, "No {} configured - skipping", step.occasion);
            }
            return self.ended(&step, errand, None);
        };
        let makes = !matches!(step.occasion, Occasion::Shutdown | Occasion::SubnetRemove);
        let ran = tokio::select! {
            ran = command::run(line, &errand, config.deadline()) => ran,
            () = overtaken(self.inbox.clone(), &config), if makes => {
                let what = about(&step, &errand);
                tracing::info!(network = %self.network, "{what} was killed: the network config has others now");
                return;
            }
        };
        self.counters.command(self.network.as_str(), step.occasion, ran.is_ok());
        match ran {
            Ok((printed, said)) => {
                let output =
                    if printed.is_empty() { String::new() } else { format!(" Output: {}", start(&printed)) };
                if self.line() {
                    tracing::info!(network = %self.network, "Ran command: {}{output}{said}", about(&step, &errand));
                }
                self.ended(&step, errand, Some(printed));
            }
            Err(error) => self.fails(step, errand, chain(&error)),
        }
    }

    fn ended(&mut self, step: &Step, errand: Errand, printed: Option<String>) {
        if self.failed.remove(step).is_some() && self.line() {
            tracing::info!(network = %self.network, "{} works again", about(step, &errand));
        }
        self.standing.end(step, errand, printed);
        self.served &= self.standing.started;
    }

    fn fails(&mut self, step: Step, errand: Errand, cause: String) {
        let earlier = self.failed.get(&step);
        let times = earlier.map_or(0, |failure| failure.times) + 1;
        if earlier.is_none_or(|failure| failure.cause != cause) && self.line() {
            let text = format!("{}: {cause}", about(&step, &errand));
            tracing::warn!(network = %self.network, "{}", Finding::new(Code::EXTENSION_FAILED, text));
        }
        if matches!(step.occasion, Occasion::Shutdown | Occasion::SubnetRemove) && times >= REMOVALS_MAX {
            if self.line() {
                tracing::warn!(network = %self.network, "{} failed {times} times and is given up", about(&step, &errand));
            }
            self.failed.remove(&step);
            self.standing.end(&step, errand, None);
            return;
        }
        self.failed.insert(step.clone(), Failure { times, cause });
        self.held.insert(step);
    }

    /// Whether one more line may be written about this go.
    fn line(&mut self) -> bool {
        self.lines += 1;
        if self.lines == LINES_MAX {
            tracing::info!(network = %self.network, "more commands follow, which are not told one by one");
        }
        self.lines < LINES_MAX
    }

    fn tell(&self) {
        let trouble = self.failed.iter().next().map(|(step, failure)| {
            Finding::new(Code::EXTENSION_FAILED, format!("{}: {}", step.occasion, failure.cause))
        });
        let state = State {
            config: self.standing.config.clone(),
            prepared: self.standing.prepared.clone(),
            served: self.served && self.standing.started,
            trouble,
        };
        self.publish.send_if_modified(|current| {
            let news = *current != state;
            *current = state;
            news
        });
    }

    /// Writes down what was told, and before anything begins what is about to be told: whatever happens meanwhile, there
    /// may be something to remove.
    fn save(&mut self, wanted: &Wanted, now: bool) {
        let late = self.saved_at.is_none_or(|at| at.elapsed() >= SAVE_EVERY);
        let news = match wanted {
            Wanted::Served(errands) => !errands.peers.keys().all(|peer| self.saved.peers.contains_key(peer)),
            _ => self.saved.config != self.standing.config,
        };
        if !(now || late || news) {
            return;
        }
        let mut standing = self.standing.clone();
        if let Wanted::Served(errands) = wanted {
            let about_to =
                |errand: &Errand| crate::decide::errands::Told { errand: errand.clone(), done: false };
            for (peer, errand) in &errands.peers {
                standing.peers.entry(peer.clone()).or_insert_with(|| about_to(errand));
            }
        }
        (standing.prepared, standing.started) = (None, false);
        if standing == self.saved {
            return;
        }
        match file::write(&self.path, &standing) {
            Ok(()) => (self.saved, self.saved_at) = (standing, Some(Instant::now())),
            Err(error) => tracing::warn!(
                network = %self.network,
                "{} could not be written, so a restart may tell commands twice: {error}", self.path.display()
            ),
        }
    }
}

/// Waits until commands of this config are not wanted any more: whoever puts another in the place of one that hangs need not wait
/// for its deadline.
async fn overtaken(mut inbox: watch::Receiver<Wanted>, config: &ExtensionConfig) {
    if inbox.wait_for(|wanted| wanted.overtakes(config)).await.is_err() {
        // Nobody is left who could want anything; this task is about to end.
        std::future::pending::<()>().await;
    }
}

/// A step for the operator.
fn about(step: &Step, errand: &Errand) -> String {
    let Some(peer) = &step.peer else { return step.occasion.to_string() };
    let public =
        ["PUBLIC_IP", "PUBLIC_IPV6"].map(|name| errand.variables.get(name).map_or("", String::as_str));
    let known: Vec<_> = public.into_iter().filter(|ip| !matches!(*ip, "" | "0.0.0.0" | "<nil>")).collect();
    format!("{} for {peer} of {}", step.occasion, known.join(" "))
}

/// The beginning of a long text, on one line.
fn start(text: &str) -> String {
    let short: String = text.chars().take(200).collect();
    let more = if short.len() < text.len() { "..." } else { "" };
    format!("{}{more}", short.escape_debug())
}
