//! Docker networks that the engine no longer knows: `docker network rm` succeeds there while the plugin is away, and no
//! engine tells it again.
//!
//! The engine is asked in the background, never on the way to an answer of ours: at its start it waits for us.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;

use crate::engine::{Engine, EngineError};
use crate::plugin::Plugin;
use crate::suspects::Suspects;

/// What the engine was asked so far.
pub(crate) struct Forgotten {
    engine: Engine,
    suspects: Suspects,
}

impl Forgotten {
    /// Asks the engine on that socket.
    pub(crate) fn by(socket: &Path) -> Self {
        Self { engine: Engine::at(socket), suspects: Suspects::default() }
    }

    /// Looks once. A network counts as forgotten when the engine itself says that there is none, twice, and no endpoint is
    /// on it; an engine that does not answer says nothing.
    pub(crate) async fn look(&mut self, plugin: &Arc<Plugin>) {
        let mut gone = BTreeSet::new();
        for id in plugin.networks_without_endpoints() {
            match self.engine.get::<Value>(&format!("/networks/{id}")).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => drop(gone.insert(id)),
                Err(EngineError::Absent { .. }) => return,
                Err(error) => {
                    tracing::debug!(docker_network = %id, "the engine was asked for it: {error}");
                    return;
                }
            }
        }
        for id in self.suspects.look(gone, Instant::now()) {
            tracing::info!(docker_network = %id, "the engine knows it no longer");
            if let Err(refusal) = plugin.forget_network(id).await {
                tracing::warn!("it stays for now: {refusal}");
            }
        }
    }
}
