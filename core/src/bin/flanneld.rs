//! flanneld: the node agent of one network, as a daemon. A drop-in for the Go program of this name.

use std::process::ExitCode;

use clap::Parser;
use flannel_core::run::cli::{self, CommonFlags, Environment};
use flannel_core::run::daemon;

/// Leases this host a subnet of a flannel network and makes the kernel carry its packets to the other hosts
#[derive(Parser, Debug)]
#[command(name = "flanneld", version)]
struct Flags {
    #[command(flatten)]
    common: CommonFlags,

    /// Remove everything that flannel made on this host (devices, routes, rules, files, lease), and end
    #[arg(long)]
    cleanup: bool,
}

fn main() -> ExitCode {
    let flags: Flags = match cli::parse(std::env::args(), &Environment::of_process()) {
        Ok(flags) => flags,
        Err(refusal) => return refusal.exit(),
    };
    cli::start_logging(flags.common.verbosity);
    let result = match flags.cleanup {
        true => daemon::cleanup(&flags.common),
        false => daemon::serve(&flags.common),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
