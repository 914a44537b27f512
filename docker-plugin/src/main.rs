//! `flannel-docker-plugin`: flannel networks for Docker. Runs the node agent of every network that Docker uses, and answers
//! an engine's network and IPAM calls on a unix socket.

mod addresses;
mod answer;
mod catalogue;
mod cleanup;
mod command;
mod connections;
mod definition;
mod engine;
mod forgotten;
mod ipam_driver;
mod journal;
mod network_driver;
mod networks;
mod plugin;
mod server;
mod settings;
mod socket;
mod status;
mod suspects;
mod veth;
mod wire;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use flannel_core::run::cli::{Environment, start_logging};
use flannel_core::run::health::{self, Counters};
use flannel_core::run::setup;
use flannel_core::run::store::Store;

use crate::forgotten::Forgotten;
use crate::journal::Journal;
use crate::networks::Networks;
use crate::plugin::Plugin;
use crate::settings::Settings;
use crate::socket::Socket;

/// How often what crashes left behind is looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if command::is_meant(&arguments) {
        return match runtime() {
            Ok(runtime) => runtime.block_on(command::run(arguments)),
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let settings = match Settings::read(arguments, Environment::of_process()) {
        Ok(settings) => settings,
        Err(refusal) => return refusal.exit(),
    };
    start_logging(settings.common.verbosity);
    let outcome = match settings.cleanup {
        true => cleanup(settings),
        false => run(settings),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs until SIGTERM or SIGINT. The data path and the leases stay.
fn run(settings: Settings) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        // First of all: an engine that starts now finds somebody listening, and waits in the backlog.
        let mut socket = Socket::bind(&settings.socket)?;
        let mut terminate = signal(SignalKind::terminate()).context("could not wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("could not wait for SIGINT")?;
        let counters = Counters::default();
        if let Some(address) = settings.common.health_address() {
            health::serve(address, counters.clone()).await.with_context(|| {
                format!("could not serve health on {address} (--healthz-ip, --healthz-port)")
            })?;
        }
        let store = store(&settings)?;
        let settings = Arc::new(settings);
        let journal = Arc::new(Journal::open(&settings.common.state_dir)?);
        let networks = Arc::new(Networks::new(settings.clone(), journal.clone(), store, counters));
        let plugin = Arc::new(Plugin::new(settings.clone(), journal, networks.clone()));
        tracing::info!("listening on {}", settings.socket.display());
        tell_systemd();
        let upkeep = tokio::spawn(upkeep(plugin.clone(), Forgotten::by(&settings.docker_socket)));
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let served = server::serve(&mut socket, plugin, stop).await;
        upkeep.abort();
        networks.stop().await;
        drop(socket);
        served.context("the socket broke")?;
        tracing::info!("Exiting cleanly...");
        Ok(())
    })
}

/// Starts what ran before, then looks after what crashes leave behind.
async fn upkeep(plugin: Arc<Plugin>, mut forgotten: Forgotten) {
    plugin.networks().start().await;
    let mut tick = tokio::time::interval(SWEEP_EVERY);
    loop {
        tick.tick().await;
        let sweeping = Arc::clone(&plugin);
        if let Err(error) = tokio::task::spawn_blocking(move || sweeping.sweep()).await {
            tracing::error!("the sweep broke off: {error}");
        }
        forgotten.look(&plugin).await;
    }
}

/// Where leases are kept: etcd if endpoints were given, else a directory.
fn store(settings: &Settings) -> anyhow::Result<Store> {
    match settings.embedded_store() {
        None => setup::etcd(&settings.common),
        Some(dir) => {
            tracing::info!(
                "no --etcd-endpoints: leases are kept in {}, for this machine only",
                dir.display()
            );
            Ok(Store::embedded(dir)?)
        }
    }
}

fn tell_systemd() {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

/// Removes everything that the plugin made on this host.
fn cleanup(settings: Settings) -> anyhow::Result<()> {
    let _alone = socket::host_lock()?;
    let store = store(&settings)?;
    let journal = Journal::open(&settings.common.state_dir)?;
    runtime()?.block_on(cleanup::everything(&settings, &store, &journal))
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    /// Of calls that wait for the disk or the kernel; more of them would wait for each other.
    const THREADS_MAX: usize = 64;
    // One thread: what takes long has its own.
    tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(THREADS_MAX)
        .enable_all()
        .build()
        .context("could not start the runtime")
}
