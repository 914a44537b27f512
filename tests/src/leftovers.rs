//! What a CNI network leaves on a host when its last container has gone, and what it must not.

use anyhow::{Result, ensure};

use crate::host::Host;

/// Files that belong to a network or to its agent, not to a container.
const STAYS: [&str; 8] = [
    "lock",
    "boot_id",
    "last_reserved_ip.0",
    "last_reserved_ip.1",
    "default.agent",
    "subnet.env",
    "subnet.ledger",
    "subnet.bridge",
];

impl Host {
    /// An error if anything of a container is there: an address, a file, a namespace, an interface, a host port.
    pub fn without_cni_containers(&self) -> Result<()> {
        let left = self.sh("cd /; find var/lib/cni run/flannel run/netns -not -type d 2>/dev/null | sort")?;
        let stays = |file: &&str| STAYS.contains(&file.rsplit('/').next().unwrap_or_default());
        let stray: Vec<_> = left.lines().filter(|file| !stays(file)).collect();
        ensure!(stray.is_empty(), "{}: {stray:?} in\n{left}", self.name());
        let links = self.out(&["ip", "-br", "link"])?;
        ensure!(!["veth", "bwp", "ifb"].iter().any(|kind| links.contains(kind)), "{}: {links}", self.name());
        let ports = self.sh("nft list table inet flannel_cni_ports 2>/dev/null || true")?;
        ensure!(!ports.contains("elements"), "{}: {ports}", self.name());
        Ok(())
    }

    /// Takes away what stays of a network without containers: its bridge, and the tables that all networks share.
    pub fn remove_cni_network(&self, bridge: &str) -> Result<()> {
        self.out(&["ip", "link", "del", bridge])?;
        let tables = self.out(&["nft", "list", "tables"])?;
        for table in tables.lines().filter(|table| table.starts_with("table inet flannel_cni")) {
            self.sh(&format!("nft delete {table}"))?;
        }
        Ok(())
    }
}
