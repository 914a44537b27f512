//! How an agent goes with the commands of the extension backend: whether they may run, what they wait for, who waits for them.

use std::time::Duration;

use super::Work;
use crate::decide::errands::Wanted;
use crate::run::extension::Extension;
use crate::run::settings::AgentSettings;
use crate::words::code::Code;
use crate::words::config::{BackendConfig, NetworkConfig};
use crate::words::report::{Finding, Reason};

/// The task that runs commands: where they were allowed, or where whoever wrote the config is root here anyway.
pub(super) fn spawn(settings: &AgentSettings) -> Option<Extension> {
    (settings.allow_extension || settings.store.is_local())
        .then(|| Extension::spawn(&settings.network, &settings.state_dir, settings.counters.clone()))
}

/// Resolves when something has become of the commands.
pub(super) async fn changed(extension: Option<&mut Extension>) {
    let ended = match extension {
        Some(extension) => extension.state.changed().await.is_err(),
        None => true,
    };
    if ended {
        std::future::pending().await
    }
}

impl Work {
    /// Why a config's commands may not run here.
    pub(super) fn refuses(&self, config: &NetworkConfig) -> Option<Finding> {
        let asks = matches!(config.backend, BackendConfig::Extension(_));
        let text = "Backend.Type is extension, and flanneld was started without --allow-extension (FLANNELD_ALLOW_EXTENSION=true)";
        (asks && self.extension.is_none()).then(|| Finding::new(Code::EXTENSION_REFUSED, text))
    }

    /// What is to go into our lease: nothing from a backend without commands. None while a command has not said it.
    pub(super) fn prepared(&mut self, config: &NetworkConfig) -> Option<Option<String>> {
        let (BackendConfig::Extension(wanted), Some(extension)) = (&config.backend, &self.extension) else {
            return Some(None);
        };
        let prepared = extension.prepared(wanted);
        if prepared.is_none() {
            self.survey_trouble = extension.state.borrow().trouble.clone();
        }
        prepared
    }

    /// Tells the commands the newest values.
    pub(super) fn tell_commands(&self) {
        let (Some(extension), Some(config)) = (&self.extension, &self.config) else { return };
        let planned = self.errands.as_ref();
        extension.want(match &config.backend {
            BackendConfig::Extension(wanted) => match planned.filter(|errands| errands.config == *wanted) {
                Some(errands) => Wanted::Served(errands.clone()),
                None => Wanted::Prepared(wanted.clone()),
            },
            _ => Wanted::Nothing,
        });
    }

    /// Whether whoever waits for the subnet file would find a data path, as far as commands make it.
    pub(super) fn commands_serve(&self) -> bool {
        match (self.config.as_ref().map(|config| &config.backend), &self.extension) {
            (Some(BackendConfig::Extension(config)), Some(extension)) => extension.serves(config),
            _ => true,
        }
    }

    /// Something has become of the commands.
    pub(super) fn commands_ran(&mut self) {
        self.survey_due |= self.survey.is_none();
        if let Some(BackendConfig::Extension(config)) = self.config.as_ref().map(|config| &config.backend)
            && let Some(extension) = &self.extension
        {
            let printed = extension.prepared(config);
            self.survey_due |= printed.is_some() && self.printed != printed;
            self.printed = printed;
        }
        self.look(Reason::Retry, Duration::ZERO);
    }
}
