//! What a node makes once and keeps: the MACs of its VXLAN devices, and the mark that it signs its leases with. A restart changes
//! nothing on the wire.
//!
//! **Shape** — `<state dir>/<network>/identity.json`: `{"vtep_mac": "...", "vtep_mac_v6": "..."}`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::whole_file;
use super::world::WorldError;
use super::world::kernel::Kernel;
use crate::words::addr::Mac;
use crate::words::fact::LinkKind;
use crate::words::name::{LinkName, NetworkName};
use crate::words::node::Identity;

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The kernel could not be asked.
    #[error(transparent)]
    World(#[from] WorldError),
    /// The file cannot be written.
    #[error("could not keep this node's identity in {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq)]
struct Kept {
    vtep_mac: Mac,
    vtep_mac_v6: Mac,
}

/// By which this node knows what it wrote into the store, whatever its address was then: made once, random.
///
/// **Shape** — `<state dir>/<network>/node-id`: eight hexadecimal digits.
pub fn mark(state_dir: &Path, network: &NetworkName) -> Result<u32, IdentityError> {
    let path = state_dir.join(network.as_str()).join("node-id");
    let read = || u32::from_str_radix(fs::read_to_string(&path).ok()?.trim(), 16).ok();
    if let Some(kept) = read() {
        return Ok(kept);
    }
    let mark = fastrand::u32(..);
    match whole_file::write(&path, format!("{mark:08x}\n").as_bytes(), 0o644) {
        Ok(()) => Ok(mark),
        Err(source) => Err(IdentityError::Io { path, source }),
    }
}

/// The identity: what an existing device says (Go's flanneld may have made it), else what was kept, else made now.
/// `devices` are the names of the IPv4 and the IPv6 device, as far as the backend has any.
pub fn load(
    kernel: &mut Kernel,
    state_dir: &Path,
    network: &NetworkName,
    devices: [Option<LinkName>; 2],
) -> Result<Identity, IdentityError> {
    let path = state_dir.join(network.as_str()).join("identity.json");
    let kept = read(&path);
    let mut adopted = |device: Option<LinkName>| match device {
        Some(device) => mac(kernel, device),
        None => Ok(None),
    };
    let [v4, v6] = [adopted(devices[0])?, adopted(devices[1])?];
    let now = Kept {
        vtep_mac: v4.or_else(|| kept.map(|kept| kept.vtep_mac)).unwrap_or_else(random),
        vtep_mac_v6: v6.or_else(|| kept.map(|kept| kept.vtep_mac_v6)).unwrap_or_else(random),
    };
    if kept != Some(now) {
        write(&path, now).map_err(|source| IdentityError::Io { path, source })?;
    }
    Ok(Identity { vtep_mac: now.vtep_mac, vtep_mac_v6: now.vtep_mac_v6, wireguard: None })
}

fn mac(kernel: &mut Kernel, device: LinkName) -> Result<Option<Mac>, WorldError> {
    let ours = kernel.link(device)?.filter(|link| matches!(link.kind, LinkKind::Vxlan(_)));
    Ok(ours.and_then(|link| link.mac))
}

fn random() -> Mac {
    Mac::locally_administered(std::array::from_fn(|_| fastrand::u8(..)))
}

/// A file that cannot be read is made anew: peers learn a new MAC as they learn any change.
fn read(path: &Path) -> Option<Kept> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn write(path: &Path, kept: Kept) -> io::Result<()> {
    whole_file::write(path, serde_json::to_string(&kept)?.as_bytes(), 0o644)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_kept_and_rubbish_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("default/identity.json");
        assert!(read(&path).is_none());
        let kept = Kept { vtep_mac: random(), vtep_mac_v6: random() };
        write(&path, kept).unwrap();
        assert!(read(&path) == Some(kept));
        fs::write(&path, "{").unwrap();
        assert!(read(&path).is_none());
    }

    #[test]
    fn a_mark_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let network = NetworkName::default_network();
        let first = mark(dir.path(), &network).unwrap();
        assert_eq!(mark(dir.path(), &network).unwrap(), first);
        fs::write(dir.path().join("default/node-id"), "rubbish").unwrap();
        let again = mark(dir.path(), &network).unwrap();
        assert_eq!(mark(dir.path(), &network).unwrap(), again);
    }
}
