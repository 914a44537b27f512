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
mod exposure;
mod forgotten;
mod half;
mod ipam_driver;
mod journal;
mod network_driver;
mod networks;
mod options;
mod plugin;
mod pool_id;
mod port_socket;
mod ports;
mod server;
mod settings;
mod socket;
mod status;
mod suspects;
mod turns;
mod veth;
mod wire;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use flannel_core::run::cli::{self, Environment, start_logging};
use flannel_core::run::health::{self, Counters};
use flannel_core::run::setup;
use flannel_core::run::store::Store;
use flannel_core::touch::memory;

use crate::forgotten::Forgotten;
use crate::journal::Journal;
use crate::networks::Networks;
use crate::plugin::Plugin;
use crate::settings::Settings;
use crate::socket::{HostLock, Socket};

/// How often what crashes left behind is looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(30);

/// How long what is in the way of serving gets to go away before the next try.
const TRY_AGAIN: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let arguments = match cli::arguments() {
        Ok(arguments) => arguments,
        Err(refusal) => return refusal.exit(),
    };
    if command::is_meant(&arguments) {
        return match runtime() {
            Ok(runtime) => runtime.block_on(command::run(arguments)),
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    memory::be_thrifty();
    let environment = Environment::of_process();
    let stays_up = settings::stays_up(&environment);
    let outcome = match Settings::read(arguments, environment) {
        Ok(settings) => {
            start_logging(settings.common.verbosity);
            if settings.cleanup { cleanup(settings) } else { run(settings) }
        }
        Err(refusal) if stays_up && refusal.status != 0 => {
            start_logging(0);
            refuse_for_good(&refusal.text)
        }
        Err(refusal) => return refusal.exit(),
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
    let settings = Arc::new(settings);
    runtime()?.block_on(async {
        // Whoever may exit does so before an engine can see the socket.
        let lock = if settings.stay_up { None } else { Some(socket::host_lock()?) };
        // Then this, first of all: an engine that starts now finds somebody listening, and waits in the backlog.
        let socket = Socket::open(&settings.socket)?;
        let stop = stop_signal()?;
        let Some((plugin, lock)) = begin_in_the_end(&settings, lock, &socket, &stop).await? else {
            return Ok(());
        };
        tracing::info!("listening on {}", settings.socket.display());
        tell_systemd("serving");
        let upkeep = tokio::spawn(upkeep(plugin.clone(), Forgotten::by(&settings.docker_socket)));
        let served = server::serve(&socket, plugin.clone(), stopped(&stop)).await;
        upkeep.abort();
        plugin.networks().stop().await;
        // Together, so that whoever has the lock finds the socket's place free.
        drop((socket, lock));
        served.context("the socket broke")?;
        tracing::info!("Exiting cleanly...");
        Ok(())
    })
}

/// Begins, or with `--stay-up` refuses engines' calls until nothing is in the way any more; `None` when told to stop before.
async fn begin_in_the_end(
    settings: &Arc<Settings>,
    mut lock: Option<HostLock>,
    socket: &Socket,
    stop: &watch::Receiver<bool>,
) -> anyhow::Result<Option<(Arc<Plugin>, HostLock)>> {
    let mut known = String::new();
    loop {
        let error = match begin(settings, lock.take()).await {
            Ok(begun) => return Ok(Some(begun)),
            Err(error) if settings.stay_up => error,
            Err(error) => return Err(error),
        };
        let reason = format!("the flannel plugin cannot serve: {error:#}");
        if reason != known {
            tracing::error!("{reason}; it tries again every {} s", TRY_AGAIN.as_secs());
            tell_systemd(&reason);
        }
        let next_try = tokio::time::sleep(TRY_AGAIN);
        let stopped = stopped(stop);
        let until = async move {
            tokio::select! { () = next_try => {}, () = stopped => {} }
        };
        server::refuse(socket, &reason, until).await.context("the socket broke")?;
        if *stop.borrow() {
            return Ok(None);
        }
        known = reason;
    }
}

/// Everything that can be in the way of serving.
async fn begin(settings: &Arc<Settings>, lock: Option<HostLock>) -> anyhow::Result<(Arc<Plugin>, HostLock)> {
    let lock = lock.map_or_else(socket::host_lock, Ok)?;
    let store = store(settings)?;
    let journal = Arc::new(Journal::open(&settings.common.state_dir)?);
    let counters = Counters::default();
    if let Some(address) = settings.common.health_address() {
        // The last that can fail: what it starts is not taken back.
        health::serve(address, counters.clone())
            .await
            .with_context(|| format!("could not serve health on {address} (--healthz-ip, --healthz-port)"))?;
    }
    let networks = Arc::new(Networks::new(settings.clone(), journal.clone(), store, counters));
    Ok((Arc::new(Plugin::new(settings.clone(), journal, networks)), lock))
}

/// Settings that cannot be read do not mend themselves: every call is refused with what is wrong with them, until SIGTERM.
fn refuse_for_good(refusal: &str) -> anyhow::Result<()> {
    let reason = format!("the flannel plugin's settings are wrong: {}", refusal.trim());
    tracing::error!("{reason}");
    runtime()?.block_on(async {
        let socket = Socket::open(Path::new(settings::DEFAULT_SOCKET))?;
        let stop = stop_signal()?;
        tell_systemd(&reason);
        server::refuse(&socket, &reason, stopped(&stop)).await.context("the socket broke")
    })
}

/// Becomes true with SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let mut terminate = signal(SignalKind::terminate()).context("could not wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("could not wait for SIGINT")?;
    let (told, stop) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        told.send_replace(true);
    });
    Ok(stop)
}

fn stopped(stop: &watch::Receiver<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut stop = stop.clone();
    async move { drop(stop.wait_for(|told| *told).await) }
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

/// Ready is whoever answers engines, be it with refusals: docker.service waits for it, and the status says what is.
fn tell_systemd(status: &str) {
    use sd_notify::NotifyState;
    // Without systemd there is nobody to tell. A status is one line.
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&status.replace('\n', " "))]);
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
