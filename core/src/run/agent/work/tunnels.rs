//! How an agent goes with the ipsec backend's charon: what that should hold, and who waits for it.

use std::sync::Arc;

use super::Work;
use crate::run::ipsec::{Ipsec, Wanted};
use crate::run::reconcile::Outcome;
use crate::words::config::BackendConfig;

/// Resolves when something has become of the tunnels.
pub(super) async fn changed(ipsec: &mut Ipsec) {
    if ipsec.state.changed().await.is_err() {
        std::future::pending().await
    }
}

impl Work {
    /// Tells charon what a pass has planned. What another backend carries now is not taken away before that one does.
    pub(super) fn tell_charon(&self, outcome: &Outcome) {
        let Some(config) = &self.config else { return };
        let networks = config.cidrs().chain(self.former.iter().copied()).collect();
        let planned = outcome.associations.clone();
        match &config.backend {
            BackendConfig::Ipsec(wanted) => {
                if let Some(planned) = planned.filter(|planned| planned.config == *wanted) {
                    self.ipsec.want(Wanted { associations: Some(planned), networks });
                }
            }
            _ if planned.is_none() && outcome.clean => {
                self.ipsec.want(Wanted { associations: None::<Arc<_>>, networks });
            }
            _ => {}
        }
    }

    /// Whether whoever waits for the subnet file would find a data path, as far as charon makes it.
    pub(super) fn charon_serves(&self) -> bool {
        match self.config.as_ref().map(|config| &config.backend) {
            Some(BackendConfig::Ipsec(config)) => self.ipsec.serves(config),
            _ => true,
        }
    }
}
