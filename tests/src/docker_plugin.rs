//! The Docker plugin on a host, and the network that its users create.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::conversation::PLUGIN_SOCKET;
use crate::daemon::Daemon;
use crate::host::Host;
use crate::probe::eventually;

/// `docker` with these arguments creates the network `web` of 10.100.0.0/16.
pub const CREATE_WEB: &[&str] = &create_network("10.100.0.0/16", "web");

/// Arguments of `docker` that create a network of the plugin's.
pub const fn create_network<'a>(subnet: &'a str, name: &'a str) -> [&'a str; 9] {
    ["network", "create", "-d", "flannel", "--ipam-driver", "flannel", "--subnet", subnet, name]
}

impl Host {
    /// Starts the plugin with these flags on its usual socket, and waits until it listens there.
    pub fn start_plugin(&self, flags: &[&str]) -> Result<Daemon> {
        let argv = [&["flannel-docker-plugin"], flags].concat();
        let daemon = self.spawn("flannel-docker-plugin", &argv, &[])?;
        eventually("the plugin's socket", Duration::from_secs(10), || self.exists(PLUGIN_SOCKET))
            .with_context(|| daemon.tail())?;
        Ok(daemon)
    }
}
