//! The subnet file: what containers' tools read, written once there is a data path.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::gateway;
use super::Work;
use crate::touch::subnet_env::SubnetEnv;
use crate::words::addr::Family;
use crate::words::units::Mtu;

impl Work {
    /// After the first pass, so that whoever waits for the file finds a data path.
    pub(super) fn write_subnet_file(&mut self, mtu: Option<Mtu>) -> bool {
        let (Some(config), Some(own), Some(mtu)) = (&self.served, &self.own, mtu) else { return false };
        // After a change of Network the old subnet is kept until there is one of the new; the file never names both.
        let fits = |family| match (config.range(family), own.subnets.of(family)) {
            (Some(range), Some(subnet)) => range.cidr.covers(&subnet),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if !Family::BOTH.into_iter().all(fits) {
            return false;
        }
        let env = SubnetEnv {
            networks: config.cidrs().collect(),
            subnets: Family::BOTH.into_iter().filter_map(|family| gateway(&own.subnets, family)).collect(),
            mtu,
            ip_masq: self.settings.masquerade,
        };
        if self.env.as_ref() == Some(&env) && self.settings.subnet_file.exists() {
            return true;
        }
        let path = self.settings.subnet_file.display();
        match env.write(&self.settings.subnet_file) {
            Ok(()) => {
                tracing::info!(network = %self.settings.network, "Wrote subnet file to {path}");
                self.file = inode(&self.settings.subnet_file);
                self.env = Some(env);
                true
            }
            Err(error) => {
                tracing::error!("Failed to write subnet file: {}", crate::act::pass::chain(&error));
                false
            }
        }
    }
}

/// Everybody replaces a subnet file whole, so another file is another writer's.
pub(super) fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|file| file.ino())
}
