//! The container's network namespace, by the path that the runtime gives.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use flannel_core::act::pass::chain;
use flannel_core::touch::world::kernel::{Kernel, Namespace};

use crate::args::Call;
use crate::result::CniError;

/// Opens the container's namespace.
pub(crate) fn open(call: &Call) -> Result<Namespace, CniError> {
    in_place(call).map_err(|error| unusable(call, &error))
}

/// To be entered by this thread, which is the only one: to start another costs more than all of CHECK.
fn in_place(call: &Call) -> io::Result<Namespace> {
    Namespace::open(Path::new(&call.netns))?.in_place()
}

/// The namespace of a container to be: held by who works in it, and by who makes interfaces in it from outside.
pub(crate) struct Home {
    pub(crate) inside: Namespace,
    pub(crate) beside: Namespace,
}

impl Home {
    pub(crate) fn open(call: &Call) -> Result<Self, CniError> {
        let inside = open(call)?;
        let beside = inside.try_clone().map_err(|error| unusable(call, &error))?;
        Ok(Self { inside, beside })
    }
}

/// The container's kernel if there still is one: runtimes leave the file behind that it was mounted on.
pub(crate) fn find(call: &Call) -> Option<Kernel> {
    if call.netns.is_empty() || is_own(call) {
        return None;
    }
    let namespace = in_place(call).ok()?;
    Kernel::open_inside(namespace).inspect_err(|error| say!("flannel: taken for gone: {}", chain(error))).ok()
}

/// ADD into the host's own namespace would take the host's interface for a container's.
pub(crate) fn refuse_own(call: &Call) -> Result<(), CniError> {
    if is_own(call) && !call.any_netns {
        return Err(CniError::new(
            CniError::NETNS,
            format!("plugin's netns and netns from CNI_NETNS should not be the same: {}", call.netns),
        ));
    }
    Ok(())
}

fn is_own(call: &Call) -> bool {
    let place = |path: &str| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let own = place("/proc/self/ns/net");
    own.is_some() && place(&call.netns) == own
}

fn unusable(call: &Call, error: &io::Error) -> CniError {
    CniError::new(CniError::NETNS, format!("failed to open netns {:?}", call.netns))
        .with_details(error.to_string())
}
