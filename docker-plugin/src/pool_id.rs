//! What our pools are called: by an engine, which hands the name back with every call.

use std::fmt;
use std::str::FromStr;

use flannel_core::words::addr::Prefix;
use flannel_core::words::name::NetworkName;

use crate::answer::Refusal;

/// Address space that our pools of local networks are in; tells our pools from those of an engine's own IPAM.
pub(crate) const LOCAL_SPACE: &str = "flannel-local";
/// The same for networks of a swarm.
pub(crate) const GLOBAL_SPACE: &str = "flannel-global";

/// What an engine asks first; the answers are always the same.
/// What a PoolID says, so that it means the same after any restart: `flannel/<network>/<subnet>[/<range>]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct PoolId {
    pub(crate) network: NetworkName,
    pub(crate) subnet: Prefix,
    pub(crate) range: Option<Prefix>,
}

impl fmt::Display for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "flannel/{}/{}", self.network, self.subnet)?;
        self.range.map_or(Ok(()), |range| write!(f, "/{range}"))
    }
}

impl FromStr for PoolId {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let wrong = || Refusal(format!("pool {text:?} is none of this plugin's"));
        let parts: Vec<&str> = text.split('/').collect();
        let prefix =
            |address: &str, len: &str| format!("{address}/{len}").parse::<Prefix>().map_err(|_| wrong());
        let (network, subnet, range) = match parts.as_slice() {
            ["flannel", network, a, l] => (network, prefix(a, l)?, None),
            ["flannel", network, a, l, ra, rl] => (network, prefix(a, l)?, Some(prefix(ra, rl)?)),
            _ => return Err(wrong()),
        };
        Ok(Self { network: NetworkName::new(network).map_err(|_| wrong())?, subnet, range })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_id_says_what_it_is() {
        for text in [
            "flannel/default/10.100.5.0/24",
            "flannel/web/10.100.5.0/24/10.100.5.128/25",
            "flannel/web/fd00:100:0:5::/64",
            "flannel/web/fd00:100:0:5::/64/fd00:100:0:5:1::/80",
        ] {
            let pool: PoolId = text.parse().unwrap();
            assert_eq!(pool.to_string(), text);
        }
        for wrong in
            ["", "other/default/10.100.5.0/24", "flannel/default/10.100.5.0", "flannel/config/10.0.0.0/8"]
        {
            assert!(wrong.parse::<PoolId>().is_err(), "{wrong}");
        }
    }
}
