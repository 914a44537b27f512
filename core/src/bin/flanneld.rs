//! flanneld: the node agent of one network, as a daemon. A drop-in for the Go program of this name.

use std::io::Write;
use std::process::ExitCode;

use flannel_core::run::cli::{self, CommonFlags, Environment, Errand, FlanneldFlags};
use flannel_core::run::daemon;
use flannel_core::run::errands::{self, Answer};
use flannel_core::run::store::StoreError;
use flannel_core::touch::memory;

fn main() -> ExitCode {
    memory::be_thrifty();
    let parsed = cli::arguments().and_then(|line| cli::parse(line, &Environment::of_process()));
    let flags: FlanneldFlags = match parsed {
        Ok(flags) => flags,
        Err(refusal) => return refusal.exit(),
    };
    cli::start_logging(flags.common.verbosity);
    if let Some(errand) = &flags.errand {
        return run(errand, &flags.common);
    }
    let result = match flags.cleanup {
        true => daemon::cleanup(&flags.common),
        false => daemon::serve(&flags.common),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Says what is wrong. A flag that cannot be used is one, also when it takes more than itself to see it.
fn fail(error: &anyhow::Error) -> ExitCode {
    tracing::error!("{error:#}");
    match error.downcast_ref() {
        Some(StoreError::Settings { .. }) => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    }
}

fn run(errand: &Errand, flags: &CommonFlags) -> ExitCode {
    let answer = match errand {
        Errand::Completions { shell } => {
            Ok(Answer { text: String::from_utf8_lossy(&cli::completions(*shell)).into_owned(), well: true })
        }
        Errand::Status => errands::status(flags),
        Errand::Plan => errands::plan(flags),
        Errand::Leases => errands::leases(flags),
        Errand::Explain { address } => errands::explain(flags, *address),
    };
    match answer {
        Ok(Answer { text, well }) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) if well => ExitCode::SUCCESS,
            // Not well, or whoever reads our output has seen enough.
            _ => ExitCode::FAILURE,
        },
        Err(error) => fail(&error),
    }
}
