//! flanneld's life: one agent for the default network, health server, signals, systemd.

use std::collections::BTreeSet;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::agent::Agent;
use super::cli::CommonFlags;
use super::health::{self, Counters};
use super::settings::AgentSettings;
use super::store::Store;
use super::{retire, setup};
use crate::words::name::NetworkName;

/// Runs until SIGTERM or SIGINT. The data path stays; the lease too.
pub fn serve(flags: &CommonFlags) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("could not wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("could not wait for SIGINT")?;
        let counters = Counters::default();
        if let Some(address) = flags.health_address() {
            health::serve(address, counters.clone()).await.with_context(|| {
                format!("could not serve health on {address} (--healthz-ip, --healthz-port)")
            })?;
        }
        let (_isolation, isolated_from) = watch::channel(BTreeSet::new());
        let agent = Agent::spawn(settings(flags, &setup::etcd(flags)?, counters, isolated_from)?);
        let mut status = agent.status();
        let mut told = false;
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                changed = status.changed() => {
                    changed.context("the agent ended by itself")?;
                    if status.borrow_and_update().ready && !std::mem::replace(&mut told, true) {
                        tracing::info!("flannel is ready");
                        // Without systemd there is nobody to tell.
                        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
                    }
                }
            }
        }
        agent.stop().await;
        tracing::info!("Exiting cleanly...");
        Ok(())
    })
}

/// Removes what flannel made on this host.
pub fn cleanup(flags: &CommonFlags) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let store = setup::etcd(flags)?.network(&NetworkName::default_network());
        retire::everything(flags, store).await
    })
}

fn settings(
    flags: &CommonFlags,
    store: &Store,
    counters: Counters,
    isolated_from: watch::Receiver<BTreeSet<crate::words::addr::Prefix>>,
) -> anyhow::Result<AgentSettings> {
    let network = NetworkName::default_network();
    setup::agent(flags, store, network, counters, isolated_from)
}

/// One thread: everything that takes long has its own.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("could not start the runtime")
}
