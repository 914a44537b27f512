//! Shaping: how fast an endpoint's packets may go.

use std::fmt;

use super::digest::sha512_hex;
use super::name::{Attachment, LinkName, NameError};

/// A token bucket (`tc` calls it `tbf`): packets pass as long as there are tokens for their bytes, and wait for tokens
/// otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bucket {
    /// Tokens that come in, in bytes per second.
    pub rate: u64,
    /// Tokens that can be saved up, in bytes: what passes at once after a rest.
    pub burst: u32,
    /// Bytes that may wait for tokens. What comes on top is lost.
    pub limit: u32,
}

impl fmt::Display for Bucket {
    /// As `tc` wants it; its `bps` are bytes per second.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tbf rate {}bps burst {} limit {}", self.rate, self.burst, self.limit)
    }
}

/// How fast an endpoint's packets may go; unlimited where there is no bucket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Shaping {
    /// To the container.
    pub ingress: Option<Bucket>,
    /// From the container.
    pub egress: Option<Bucket>,
}

impl Shaping {
    /// Whether nothing is limited.
    pub const fn is_none(&self) -> bool {
        self.ingress.is_none() && self.egress.is_none()
    }
}

/// The interface that packets from a container wait in (`ifb`): the kernel shapes only what leaves an interface, and
/// what comes from a container enters one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Funnel {
    /// The name that Go's bandwidth plugin gives it (plugins: plugins/meta/bandwidth/main.go `getIfbDeviceName`), so that
    /// each deletes what the other made. It knows nothing of a container's second interface.
    pub shared_name: LinkName,
    /// The name for an interface that finds the other one taken.
    pub own_name: LinkName,
    /// Mark of the owner in its alias.
    pub alias: String,
}

/// Begins every alias.
const MARK: &str = "flannel-cni";
/// IFALIASZ less the final NUL (uapi/linux/if.h).
const ALIAS_MAX: usize = 255;

impl Funnel {
    /// What all names begin with.
    pub const PREFIX: &str = "bwp";

    /// That of an attachment to the CNI network of this name.
    ///
    /// # Errors
    /// Never in practice: the names are made of letters and digits.
    pub fn of(network: &str, owner: &Attachment) -> Result<Self, NameError> {
        let name =
            |text: String| LinkName::new(&format!("{}{}", Self::PREFIX, sha512_hex(text.as_bytes(), 12)));
        let Attachment { container, interface } = owner;
        let plain = format!("{}{container}/{interface}", Self::mark(network));
        let alias = match plain.len() <= ALIAS_MAX {
            true => plain,
            false => format!("{}{}", Self::mark(network), sha512_hex(owner.to_string().as_bytes(), 32)),
        };
        Ok(Self {
            shared_name: name(format!("{network}{container}"))?,
            own_name: name(format!("{network}\0{container}\0{interface}"))?,
            alias,
        })
    }

    /// What the aliases of one network's begin with.
    pub fn mark(network: &str) -> String {
        match network.len() <= 64 {
            true => format!("{MARK} {network} "),
            false => format!("{MARK} {} ", sha512_hex(network.as_bytes(), 32)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(container: &str, interface: &str) -> Attachment {
        Attachment { container: container.to_owned(), interface: interface.to_owned() }
    }

    #[test]
    fn the_name_is_that_of_gos_plugin_and_the_second_interface_has_another() {
        // printf cbr0c1 | sha512sum
        let first = Funnel::of("cbr0", &owner("c1", "eth0")).unwrap();
        assert_eq!(first.shared_name.as_str(), "bwp68f1f1eeb62c");
        let second = Funnel::of("cbr0", &owner("c1", "eth1")).unwrap();
        assert_eq!(first.shared_name, second.shared_name);
        assert_ne!(first.own_name, second.own_name);
        assert_ne!(first.own_name, first.shared_name);
        assert_eq!(first.alias, "flannel-cni cbr0 c1/eth0");
    }

    #[test]
    fn an_alias_names_its_owner_however_long_that_is() {
        let (long, longer) = ("n".repeat(300), "c".repeat(300));
        let one = Funnel::of(&long, &owner(&longer, "eth0")).unwrap().alias;
        let other = Funnel::of(&long, &owner(&longer, "eth1")).unwrap().alias;
        assert!(one != other && one.len() <= ALIAS_MAX, "{one} {other}");
        assert!(one.starts_with(&Funnel::mark(&long)));
        assert!(!one.starts_with(&Funnel::mark("n")));
    }
}
