//! flanneld's life: one agent for the network of its prefix, health server, signals, systemd.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context;
use sd_notify::{NotifyState, notify};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::agent::{Agent, Status};
use super::cli::CommonFlags;
use super::health::{self, Counters};
use super::settings::AgentSettings;
use super::store::Store;
use super::{retire, setup};

/// How long a thread may still write a file when everything else has ended.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Runs until SIGTERM or SIGINT. The data path stays; the lease too.
pub fn serve(flags: &CommonFlags) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let served = runtime.block_on(live(flags));
    // Dropped, it would wait for all that its threads are at: a name that no server resolves takes them ten seconds and more.
    runtime.shutdown_timeout(LAST_WORDS);
    served
}

async fn live(flags: &CommonFlags) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("could not wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("could not wait for SIGINT")?;
    let counters = Counters::default();
    if let Some(address) = flags.health_address() {
        health::serve(address, counters.clone())
            .await
            .with_context(|| format!("could not serve health on {address} (--healthz-ip, --healthz-port)"))?;
    }
    let (_isolation, isolated_from) = watch::channel(BTreeSet::new());
    let store = setup::etcd(flags)?;
    store.counted_by(counters.clone());
    let agent = Agent::spawn(settings(flags, &store, counters, isolated_from)?);
    let mut status = agent.status();
    let mut systemd = Systemd::default();
    // A watchdog that nobody set is never due.
    let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
    let mut beat = tokio::time::interval(watchdog.unwrap_or(Duration::from_secs(3600)));
    systemd.tell(&status.borrow_and_update().clone());
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = beat.tick() => systemd.beat(watchdog.is_some()),
            changed = status.changed() => {
                changed.context("the agent ended by itself")?;
                systemd.tell(&status.borrow_and_update().clone());
            }
        }
    }
    systemd.stopping();
    agent.stop().await;
    tracing::info!("Exiting cleanly...");
    Ok(())
}

/// What a service manager is told (sd_notify(3)). Without one there is nobody to tell, and failures are nobody's.
#[derive(Default)]
struct Systemd {
    ready: bool,
    told: String,
}

impl Systemd {
    /// How the agent stands; ready once.
    fn tell(&mut self, status: &Status) {
        if status.ready && !std::mem::replace(&mut self.ready, true) {
            tracing::info!("flannel is ready");
            let _ = notify(&[NotifyState::Ready]);
        }
        let line = line(status);
        if line != self.told {
            let _ = notify(&[NotifyState::Status(&line)]);
            self.told = line;
        }
    }

    /// That this loop, which carries the agent too, still turns.
    fn beat(&self, watched: bool) {
        if watched {
            let _ = notify(&[NotifyState::Watchdog]);
        }
    }

    fn stopping(&self) {
        let _ = notify(&[NotifyState::Stopping, NotifyState::Status("stopping; the data path stays")]);
    }
}

/// One line for `systemctl status`.
fn line(status: &Status) -> String {
    let serving = status.lease.as_ref().map(|lease| {
        let state = if status.ready { "serving" } else { "preparing" };
        format!("{state} subnet {}", lease.subnets)
    });
    let waiting = status.waiting.as_ref().map(|finding| format!("waiting: {finding}"));
    let parts: Vec<_> = serving.into_iter().chain(waiting).collect();
    match parts.is_empty() {
        true => "starting".to_owned(),
        false => parts.join("; ").replace('\n', " "),
    }
}

/// Removes what flannel made on this host.
pub fn cleanup(flags: &CommonFlags) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let store = setup::etcd(flags)?.network(&setup::flannelds_network(flags));
        retire::everything(flags, store).await
    })
}

fn settings(
    flags: &CommonFlags,
    store: &Store,
    counters: Counters,
    isolated_from: watch::Receiver<BTreeSet<crate::words::addr::Prefix>>,
) -> anyhow::Result<AgentSettings> {
    setup::agent(flags, store, setup::flannelds_network(flags), counters, isolated_from)
}

/// One thread: everything that takes long has its own.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("could not start the runtime")
}
