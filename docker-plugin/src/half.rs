//! The IPv6 half of what a node holds of a flannel network: a network without one is of IPv4 alone.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use flannel_core::run::agent::Leased;
use flannel_core::words::addr::{Family, InterfaceAddress, Prefix};
use flannel_core::words::name::NetworkName;

use crate::answer::Refusal;
use crate::definition::IPV6_NETWORK;
use crate::wire;

/// This node's IPv6 half.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Half {
    /// All of the network.
    pub(crate) cidr: Prefix,
    /// What this node holds of it.
    pub(crate) subnet: Prefix,
    /// The gateway, on the bridge.
    pub(crate) gateway: InterfaceAddress,
}

impl Half {
    /// That of a lease.
    pub(crate) fn of(lease: &Leased) -> Option<Self> {
        Some(Self {
            cidr: lease.network(Family::V6)?,
            subnet: lease.subnets.v6()?,
            gateway: lease.gateway(Family::V6)?,
        })
    }

    /// The gateway's address, as engines want it.
    pub(crate) fn gateway(&self) -> IpAddr {
        self.gateway.address()
    }

    /// Whether an engine's pool is this one.
    pub(crate) fn check(&self, pool: &wire::PoolData) -> Result<(), Refusal> {
        let subnet: Prefix =
            pool.pool.parse().map_err(|error| Refusal(format!("the pool {:?}: {error}", pool.pool)))?;
        if subnet != self.subnet {
            return Err(Refusal(format!(
                "subnet {subnet} is not this host's IPv6 part of the same flannel network, which is {} of {}: name both CIDRs of one network, --subnet (IPv4) --subnet {}",
                self.subnet, self.cidr, self.cidr
            )));
        }
        match pool.gateway.as_deref().map(str::parse::<InterfaceAddress>).transpose() {
            Ok(Some(gateway)) if gateway.address() != self.gateway() => Err(Refusal(format!(
                "gateway {}: the gateway of this host's subnet {} is {}",
                gateway.address(),
                self.subnet,
                self.gateway()
            ))),
            Ok(Some(_) | None) => Ok(()),
            Err(error) => Err(Refusal(format!("the gateway: {error}"))),
        }
    }
}

/// How long after the call for IPv4 the one for IPv6 of the same `docker network create` may come. They follow each other within
/// milliseconds.
const TOGETHER: Duration = Duration::from_secs(5);

/// Networks whose IPv4 half an engine has just got: a call for IPv6 that names nothing means the same one, and only the order
/// says so.
#[derive(Default)]
pub(crate) struct Halves(Mutex<Vec<(NetworkName, Instant)>>);

impl Halves {
    fn lock(&self) -> MutexGuard<'_, Vec<(NetworkName, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An engine got the IPv4 half.
    pub(crate) fn ask(&self, network: &NetworkName) {
        let mut asked = self.lock();
        asked.retain(|(_, at)| at.elapsed() < TOGETHER);
        asked.push((network.clone(), Instant::now()));
    }

    /// The engine has made a network of it, or has given it back.
    pub(crate) fn settle(&self, network: &NetworkName) {
        let mut asked = self.lock();
        if let Some(first) = asked.iter().position(|(name, _)| name == network) {
            asked.remove(first);
        }
    }

    /// The network that is meant, if there is one; refused if there are several.
    pub(crate) fn only(&self) -> Result<Option<NetworkName>, Refusal> {
        let asked = self.lock();
        let recent: BTreeSet<&NetworkName> =
            asked.iter().filter(|(_, at)| at.elapsed() < TOGETHER).map(|(name, _)| name).collect();
        let mut recent = recent.into_iter();
        match (recent.next(), recent.next()) {
            (one, None) => Ok(one.cloned()),
            (Some(one), Some(other)) => Err(Refusal(format!(
                "Docker networks are being created on {one} and on {other}: name the IPv6 CIDR that is meant with a second --subnet, or try again"
            ))),
            (None, Some(_)) => Ok(None),
        }
    }
}

/// The command that makes a network of both families.
pub(crate) fn create_command(driver: &str, v4: Option<Prefix>, v6: Option<Prefix>) -> String {
    let v4 = v4.map_or_else(|| "10.100.0.0/16".to_owned(), |cidr| cidr.to_string());
    let v6 = v6.map_or_else(|| "fd00:100::/48".to_owned(), |cidr| cidr.to_string());
    format!(
        "docker network create -d {driver} --ipam-driver {driver} --ipv6 --subnet {v4} --subnet {v6} --ipam-opt {IPV6_NETWORK}={v6} NAME"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_for_ipv6_follows_the_one_for_ipv4() {
        let (web, blue) = (NetworkName::new("web").unwrap(), NetworkName::new("blue").unwrap());
        let halves = Halves::default();
        assert_eq!(halves.only().unwrap(), None);
        halves.ask(&web);
        halves.ask(&web);
        assert_eq!(halves.only().unwrap(), Some(web.clone()));
        halves.ask(&blue);
        assert!(halves.only().unwrap_err().0.contains("on blue and on web"));
        halves.settle(&web);
        assert!(halves.only().is_err(), "one of two was settled");
        halves.settle(&web);
        halves.settle(&web);
        assert_eq!(halves.only().unwrap(), Some(blue));
    }

    #[test]
    fn an_engines_pool_is_compared_with_the_half() {
        let prefix = |text: &str| text.parse::<Prefix>().unwrap();
        let half = Half {
            cidr: prefix("fd00:100::/48"),
            subnet: prefix("fd00:100:0:5::/64"),
            gateway: "fd00:100:0:5::1/64".parse().unwrap(),
        };
        let pool = |pool: &str, gateway: Option<&str>| wire::PoolData {
            address_space: String::new(),
            pool: pool.to_owned(),
            gateway: gateway.map(str::to_owned),
            aux_addresses: Default::default(),
        };
        assert!(half.check(&pool("fd00:100:0:5::/64", Some("fd00:100:0:5::1/64"))).is_ok());
        assert!(half.check(&pool("fd00:100:0:5::/64", None)).is_ok());
        for (wrong, said) in [
            (pool("fd00:100:0:6::/64", None), "--subnet fd00:100::/48"),
            (pool("fd00:100:0:5::/64", Some("fd00:100:0:5::9/64")), "is fd00:100:0:5::1"),
            (pool("x", None), "the pool \"x\""),
            (pool("fd00:100:0:5::/64", Some("y")), "the gateway"),
        ] {
            let error = half.check(&wrong).unwrap_err();
            assert!(error.0.contains(said), "{error}");
        }
    }
}
