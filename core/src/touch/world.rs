//! Something facts can be true of: the kernel of one network namespace, or a fake that models one.

pub mod kernel;

use std::borrow::Cow;

use crate::words::fact::{Change, Facts, Rest};
use crate::words::territory::Territory;

/// Why a look or a change failed. The cause is what the kernel said.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// The kernel could not be asked at all.
    #[error("could not {action}")]
    Io {
        /// What was tried, like `open a netlink socket`.
        action: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The kernel refused.
    #[error("could not {action}: {}", .detail.as_deref().unwrap_or("refused"))]
    Refused {
        /// What was tried, like `add route 10.100.2.0/24`.
        action: String,
        /// The kernel's own words (extended acknowledgement), if it had any.
        detail: Option<String>,
        /// The errno.
        source: std::io::Error,
    },
    /// An interface a change needs does not exist now.
    #[error("could not {action}: there is no interface {link}")]
    NoLink {
        /// What was tried.
        action: String,
        /// The interface.
        link: String,
    },
    /// Something the kernel cannot do.
    #[error("could not {action}: {what}")]
    Unsupported {
        /// What was tried.
        action: String,
        /// What is missing.
        what: String,
    },
}

/// Something facts can be true of.
pub trait World {
    /// Every fact that is true now inside the territory, and nothing outside it.
    fn observe(&mut self, territory: &Territory) -> Result<Facts, WorldError>;

    /// The same look, for whoever wants to know only what of a plan is not true, and what is true beside it.
    fn compare<'a>(&mut self, territory: &Territory, wanted: &'a Facts) -> Result<Rest<'a>, WorldError> {
        Ok(Rest { wanted: Cow::Borrowed(wanted), found: self.observe(territory)? })
    }

    /// Makes the changes, in the order given. The answer has one entry per change; one that failed does not
    /// keep the others from being made. Deleting what is already gone is no error.
    fn apply(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>>;
}
