//! Ports of this host that CNI attachments have: nobody but their own records and the kernel knows them.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::addr::{Family, InterfaceAddress, Prefix};
use super::exposure::PublishedPort;
use super::name::Attachment;
use super::rule::OWNER_MAX;

/// The ports of this host that lead into one attachment.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Holding {
    /// The network's name as the runtime knows it.
    pub network: String,
    /// Whose they are.
    pub owner: Attachment,
    /// Its addresses, with the length of their subnets.
    pub addresses: Vec<InterfaceAddress>,
    /// The ports; each leads to one of the addresses.
    pub ports: BTreeSet<PublishedPort>,
    /// Whether callers' source addresses are rewritten.
    #[serde(default)]
    pub masquerade: CallerMasquerade,
}

/// When a connection to a published port gets this host's address as its source.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CallerMasquerade {
    /// Never.
    Never,
    /// Where the answer would not come back through this host otherwise: from the same subnet, and from this host's loopback
    /// addresses.
    #[default]
    Needed,
    /// Always.
    Always,
}

impl Holding {
    /// Who holds the ports, as the kernel's elements say it: network, container and interface, cut off at what fits.
    pub fn tag(&self) -> String {
        let mut tag = format!("{} {} {}", self.network, self.owner.container, self.owner.interface);
        tag.truncate(tag.floor_char_boundary(OWNER_MAX));
        tag
    }

    /// The subnet of the family's address, if it has one.
    pub fn subnet(&self, family: Family) -> Option<Prefix> {
        self.addresses.iter().find(|address| address.family() == family).map(InterfaceAddress::prefix)
    }

    /// The first port of this one that clashes with one of the other's.
    pub fn clash(&self, other: &Self) -> Option<PublishedPort> {
        let clashes = |port: &&PublishedPort| other.ports.iter().any(|held| held.clashes(port));
        self.ports.iter().find(clashes).copied()
    }
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Attachment { container, interface } = &self.owner;
        write!(f, "container {container} ({interface}) on network {}", self.network)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_fits_an_element() {
        let holding = |container: &str| Holding {
            network: "cbr0".to_owned(),
            owner: Attachment { container: container.to_owned(), interface: "eth0".to_owned() },
            addresses: Vec::new(),
            ports: BTreeSet::new(),
            masquerade: CallerMasquerade::default(),
        };
        assert_eq!(holding("c1").tag(), "cbr0 c1 eth0");
        assert_eq!(holding(&"c".repeat(300)).tag().len(), OWNER_MAX);
        assert!(holding(&"ü".repeat(300)).tag().len() <= OWNER_MAX);
    }
}
