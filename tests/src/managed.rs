//! The Docker plugin as a managed plugin: its directory as `make rootfs` makes it, but of the binary under test.

use anyhow::Result;

use crate::host::{BIN_DIR, Host};
use crate::lab::Lab;

/// The managed plugin's name, which is its driver's name as well.
pub const MANAGED: &str = "flannel:latest";

/// Programs of the machine that making it takes.
pub const MANAGED_NEEDS: &[&str] = &["ldd", "strip"];

/// Where [`Lab::build_managed_plugin`] puts it, as every host sees it.
pub const MANAGED_DIR: &str = "/run/lab/shared/managed-plugin";

impl Lab {
    /// Makes the plugin's directory, [`MANAGED_DIR`], once for all hosts: config.json and rootfs. A binary that is not static gets its libraries.
    pub fn build_managed_plugin(&self) -> Result<()> {
        let dir = MANAGED_DIR;
        let host = self.host(1);
        host.sh(&format!("mkdir -p {dir}/rootfs"))?;
        host.write(&format!("{dir}/config.json"), include_bytes!("../../config.json"))?;
        host.sh(&format!(
            "cd {dir}; strip -o rootfs/flannel-docker-plugin {BIN_DIR}/flannel-docker-plugin; \
             for lib in $(ldd rootfs/flannel-docker-plugin | grep -o '/[^ ]*' || true); do \
                 mkdir -p rootfs$(dirname $lib); cp -L $lib rootfs$lib; \
             done"
        ))
        .map(drop)
    }
}

impl Host {
    /// Gives dockerd the plugin that [`Lab::build_managed_plugin`] made, with these settings (`NAME=value`), disabled.
    pub fn create_managed_plugin(&self, settings: &[&str]) -> Result<()> {
        self.docker(&["plugin", "create", MANAGED, MANAGED_DIR])?;
        if !settings.is_empty() {
            self.docker(&[&["plugin", "set", MANAGED], settings].concat())?;
        }
        Ok(())
    }

    /// Same, enabled.
    pub fn start_managed_plugin(&self, settings: &[&str]) -> Result<()> {
        self.create_managed_plugin(settings)?;
        self.docker(&["plugin", "enable", MANAGED]).map(drop)
    }
}
