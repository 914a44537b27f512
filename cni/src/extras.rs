//! What the plugin `flannel` does beyond a bridge, in the same process: what upstream has plugins of their own for.

use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::name::Attachment;

use crate::args::Call;
use crate::bandwidth::{self, Limits};
use crate::conf::Conf;
use crate::json::first_asked;
use crate::result::{Attached, CniError};

/// What is asked for; read before anything is made, so that what cannot be read harms nothing.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Extras {
    limits: Option<Limits>,
}

/// What keeps the end of a DEL waiting: closing a socket right after rules were deleted waits for the kernel, and by the time
/// the interface is gone it need not any more.
pub(crate) struct Closing {}

impl Extras {
    pub(crate) fn read(conf: &Conf) -> Result<Self, CniError> {
        if first_asked(&conf.runtime, &["portMappings"]).is_some() {
            return Err(CniError::unsupported(
                "runtimeConfig.portMappings is not supported: list the plugin portmap after this one and give it the capability",
            ));
        }
        Ok(Self { limits: Limits::read(conf)? })
    }

    /// Makes them, in this order; what was made is taken back on failure.
    pub(crate) fn add(&self, call: &Call, conf: &Conf, attached: &Attached) -> Result<(), CniError> {
        let [_, end, _] = &attached.interfaces;
        if let Some(limits) = &self.limits {
            limits.put_on(&mut Kernel::open()?, end.name, &conf.name, &call.attachment()?)?;
        }
        Ok(())
    }

    /// Takes back whatever the attachment may have, in the opposite order, before its interface goes.
    pub(crate) fn del(call: &Call, conf: &Conf) -> Result<Closing, CniError> {
        bandwidth::take_off(&mut Kernel::open()?, &conf.name, &call.attachment()?)?;
        Ok(Closing {})
    }

    /// What is not as it was made.
    pub(crate) fn check(&self, call: &Call, _conf: &Conf) -> Result<Vec<String>, CniError> {
        let mut missing = Vec::new();
        if let Some(limits) = &self.limits {
            let mut host = Kernel::open()?;
            let end = bandwidth::host_end(call, &mut host)?;
            missing.extend(limits.missing(&mut host, end)?);
        }
        Ok(missing)
    }

    /// Takes back what belongs to none of the attachments.
    pub(crate) fn gc(conf: &Conf, valid: &[Attachment]) -> Result<(), CniError> {
        match bandwidth::collect(&mut Kernel::open()?, &conf.name, valid)? {
            failed if failed.is_empty() => Ok(()),
            failed => Err(CniError::leftover(failed.join("; "))),
        }
    }
}
