//! The file that upstream's flannel plugin keeps for a container: with it there, a node can go back to upstream's plugin at any
//! time, and containers that upstream's plugin made can be taken down.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use flannel_core::words::name::Attachment;
use serde_json::Value;

use super::conf::{FlannelConf, Worker, worker};
use crate::json::{Object, field, object};
use crate::result::CniError;

/// What this plugin adds to what it keeps, as key and value: upstream's plugins skip keys that they do not know.
pub(super) const MAKER: (&str, &str) = ("madeBy", "flannel-cni");

/// A container's file.
pub(crate) struct Scratch {
    file: PathBuf,
}

impl Scratch {
    pub(crate) fn of(conf: &FlannelConf<'_>, owner: &Attachment) -> Self {
        Self { file: conf.data_dir.join(&owner.container) }
    }

    /// Writes it; true if it was not there before. Upstream's, of another interface, is left as it is: it says what there is to clean
    /// up. Not synced: it is void after a crash of the host.
    pub(crate) fn keep(&self, conf: &Value) -> Result<bool, CniError> {
        self.write(conf.to_string().as_bytes()).map_err(|error| {
            CniError::new(CniError::INPUT, format!("could not write {}", self.file.display()))
                .with_details(error.to_string())
        })
    }

    fn write(&self, text: &[u8]) -> io::Result<bool> {
        let open = |new: bool| {
            let mut options = OpenOptions::new();
            options.write(true).truncate(!new).create_new(new).create(!new).mode(0o600);
            options.open(&self.file)
        };
        let (mut file, fresh) = match open(true) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                if self.read().is_some_and(|kept| kept.is_upstreams()) {
                    return Ok(false);
                }
                (open(false)?, false)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let dir = self.file.parent().unwrap_or_else(|| Path::new("/"));
                fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
                (open(true)?, true)
            }
            Err(error) => return Err(error),
        };
        file.write_all(text)?;
        Ok(fresh)
    }

    /// Whether there is a file, readable or not.
    pub(crate) fn exists(&self) -> bool {
        self.file.symlink_metadata().is_ok()
    }

    /// What was kept; none if there is nothing that can be read.
    pub(crate) fn read(&self) -> Option<Kept> {
        let text = match fs::read_to_string(&self.file) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                say!("flannel: could not read {}: {error}", self.file.display());
                return None;
            }
        };
        match serde_json::from_str(&text) {
            Ok(kept) => Some(Kept(kept)),
            Err(error) => {
                say!("flannel: {} cannot be used: {error}", self.file.display());
                None
            }
        }
    }

    pub(crate) fn remove(&self) {
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                say!("flannel: could not remove {}: {error}", self.file.display());
            }
            _ => {}
        }
    }
}

/// What upstream kept for a container when it made it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Kept(Object);

impl Kept {
    /// Who did the work, and has to undo it.
    pub(crate) fn worker(&self) -> Worker {
        worker(&self.0, &object(&self.0, "ipam").ok().flatten().unwrap_or_default())
    }

    /// Whether upstream's plugins made the container's interface: with a chain of iptables for its masquerading, and one for
    /// its ports if `portmap` came after them.
    pub(crate) fn is_upstreams(&self) -> bool {
        self.0.get(MAKER.0).is_none_or(|maker| maker != MAKER.1)
    }

    /// Name of the configuration that made it.
    pub(crate) fn name(&self) -> Option<&str> {
        field(&self.0, "name").and_then(Value::as_str)
    }

    /// For the plugin that does the work.
    pub(crate) fn into_object(self) -> Object {
        self.0
    }
}
