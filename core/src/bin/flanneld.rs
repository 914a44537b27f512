//! flanneld: the node agent of one network, as a daemon. A drop-in for the Go program of this name.

use std::io::Write;
use std::process::ExitCode;

use flannel_core::run::cli::{self, Environment, Errand, FlanneldFlags};
use flannel_core::run::daemon;

fn main() -> ExitCode {
    let flags: FlanneldFlags = match cli::parse(std::env::args(), &Environment::of_process()) {
        Ok(flags) => flags,
        Err(refusal) => return refusal.exit(),
    };
    if let Some(errand) = flags.errand {
        return run(&errand);
    }
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

fn run(errand: &Errand) -> ExitCode {
    let said = match errand {
        Errand::Completions { shell } => std::io::stdout().write_all(&cli::completions(*shell)),
    };
    match said {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(_) => ExitCode::FAILURE,
    }
}
