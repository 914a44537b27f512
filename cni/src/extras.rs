//! What the plugin `flannel` does beyond a bridge, in the same process: what upstream has plugins of their own for.

use flannel_core::words::name::Attachment;

use crate::args::Call;
use crate::conf::Conf;
use crate::json::first_asked;
use crate::result::{Attached, CniError};

/// What is asked for; read before anything is made, so that what cannot be read harms nothing.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Extras {}

/// What keeps the end of a DEL waiting: closing a socket right after rules were deleted waits for the kernel, and by the time
/// the interface is gone it need not any more.
pub(crate) struct Closing {}

impl Extras {
    pub(crate) fn read(conf: &Conf) -> Result<Self, CniError> {
        match first_asked(&conf.runtime, &["portMappings", "bandwidth"]) {
            None => Ok(Self {}),
            Some(key) => {
                let plugin = if key == "bandwidth" { "bandwidth" } else { "portmap" };
                Err(CniError::unsupported(format!(
                    "runtimeConfig.{key} is not supported: list the plugin {plugin} after this one and give it the capability"
                )))
            }
        }
    }

    /// Makes them, in this order; what was made is taken back on failure.
    pub(crate) fn add(&self, _call: &Call, _conf: &Conf, _attached: &Attached) -> Result<(), CniError> {
        Ok(())
    }

    /// Takes back whatever the attachment may have, in the opposite order, before its interface goes.
    pub(crate) fn del(_call: &Call, _conf: &Conf) -> Result<Closing, CniError> {
        Ok(Closing {})
    }

    /// What is not as it was made.
    pub(crate) fn check(&self, _call: &Call, _conf: &Conf) -> Result<Vec<String>, CniError> {
        Ok(Vec::new())
    }

    /// Takes back what belongs to none of the attachments.
    pub(crate) fn gc(_conf: &Conf, _valid: &[Attachment]) -> Result<(), CniError> {
        Ok(())
    }
}
