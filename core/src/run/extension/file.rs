//! What commands were told, on disk: a restart tells the difference only.
//!
//! **Shape** — `<state dir>/<network>/extension.json`: the running boot, the commands, our values, and each peer's. For root
//! only, as the commands may hold secrets. After a reboot nothing stands, so an older boot's file counts for nothing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::decide::errands::Standing;
use crate::run::cache;
use crate::touch::whole_file;
use crate::words::name::NetworkName;

#[derive(Serialize, Deserialize)]
struct Written {
    boot: String,
    #[serde(flatten)]
    standing: Standing,
}

/// Where it is.
pub(super) fn path(state_dir: &Path, network: &NetworkName) -> PathBuf {
    cache::directory(state_dir, network).join("extension.json")
}

/// Identity of the running boot (Documentation/admin-guide/sysctl/kernel.rst, random).
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Reads it. What cannot be read counts as nothing.
pub(super) fn read(path: &Path) -> Standing {
    let Ok(text) = fs::read_to_string(path) else { return Standing::default() };
    match serde_json::from_str::<Written>(&text) {
        Ok(written) if written.boot == boot() => written.standing,
        Ok(_) => Standing::default(),
        Err(error) => {
            tracing::warn!("{} is not used: {error}", path.display());
            Standing::default()
        }
    }
}

/// Writes it in one step; removes it if nothing stands.
pub(super) fn write(path: &Path, standing: &Standing) -> io::Result<()> {
    if standing.config.is_none() {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    let text = serde_json::to_string(&Written { boot: boot(), standing: standing.clone() })?;
    whole_file::write(path, text.as_bytes(), 0o600)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::extension::ExtensionConfig;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_was_told_is_read_again_in_the_same_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path(), &NetworkName::default_network());
        assert_eq!(read(&path), Standing::default());
        let standing = Standing { config: Some(ExtensionConfig::default()), ..Standing::default() };
        write(&path, &standing).unwrap();
        assert_eq!(read(&path), standing);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace(&boot(), "another")).unwrap();
        assert_eq!(read(&path), Standing::default());
        fs::write(&path, "{").unwrap();
        assert_eq!(read(&path), Standing::default());
        write(&path, &Standing::default()).unwrap();
        assert!(!path.exists());
    }
}
