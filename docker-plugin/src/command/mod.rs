//! What an operator types: `flannel-docker-plugin status`, `flannel-docker-plugin network create`. They talk to the plugin
//! that runs and to the engine, and change nothing by themselves.

mod create;
mod status;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::engine::{Engine, EngineError};
use crate::status::Status;

/// Network and IPAM driver for Docker on flannel leases: commands for the operator
#[derive(Parser)]
#[command(name = "flannel-docker-plugin", version)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show networks, leases, containers and ports, and where plugin, engine and kernel disagree
    Status(status::Flags),
    /// Docker networks on flannel networks
    #[command(subcommand)]
    Network(Network),
}

#[derive(Subcommand)]
enum Network {
    /// Create a Docker network: `docker network create` with the options that flannel needs filled in
    Create(Box<create::Flags>),
}

/// Where plugin and engine listen.
#[derive(Args, Clone, Debug)]
struct Sockets {
    /// The plugin's socket; without it also those of managed plugins are looked for
    #[arg(
        long,
        value_name = "FILE",
        env = "FLANNELD_SOCKET",
        default_value = "/run/docker/plugins/flannel.sock"
    )]
    socket: PathBuf,

    /// The engine's API
    #[arg(long, value_name = "FILE", default_value = "/var/run/docker.sock")]
    docker_socket: PathBuf,
}

/// Whether the line is for an operator's command, and not for the plugin itself.
pub(crate) fn is_meant(arguments: &[String]) -> bool {
    matches!(arguments.get(1).map(String::as_str), Some("status" | "network"))
}

/// Runs the command.
pub(crate) async fn run(arguments: Vec<String>) -> ExitCode {
    let line = match CommandLine::try_parse_from(arguments) {
        Ok(line) => line,
        Err(error) => {
            let status = if error.use_stderr() { 2 } else { 0 };
            // Nobody is left to be told if this fails.
            let _ = error.print();
            return ExitCode::from(status);
        }
    };
    let outcome = match line.command {
        Command::Status(flags) => status::run(flags).await,
        Command::Network(Network::Create(flags)) => create::run(*flags).await,
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Asks the plugin that runs on this host: the service's socket, else a managed plugin's
/// (`/run/docker/plugins/<plugin id>/flannel.sock`, moby plugin/v2 `GetPluginSocket`).
async fn ask_plugin(socket: &Path) -> Result<Status, EngineError> {
    let asked = Engine::at(socket).get::<Status>("/status").await;
    let Err(absent @ EngineError::Absent { .. }) = asked else { return asked };
    let Some((dir, name)) = socket.parent().zip(socket.file_name()) else { return Err(absent) };
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let candidate = entry.path().join(name);
        if candidate.exists()
            && let Ok(status) = Engine::at(&candidate).get::<Status>("/status").await
        {
            return Ok(status);
        }
    }
    Err(absent)
}
