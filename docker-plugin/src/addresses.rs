//! Docker's claims in the ledger that CNI shares.
//!
//! An engine asks for an address before it names the endpoint, so a claim is first [`PENDING`] and gets the endpoint's
//! name with CreateEndpoint. A claim that stays pending because the engine died in between is reclaimed after a while.
//! Auxiliary addresses get their network's name with CreateNetwork, and nobody else gets them as long as it lives.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use flannel_core::decide::pool::{Pool, PoolError};
use flannel_core::touch::ledger::{DOCKER, Entry, HeldLedger, Ledger, LedgerError};
use flannel_core::words::addr::{Family, InterfaceAddress, Prefix};
use flannel_core::words::name::{Attachment, NetworkName};

/// How long a claim may wait for its endpoint. An engine asks for both within milliseconds.
pub(crate) const UNCONFIRMED_MAX: Duration = Duration::from_secs(120);

/// After this long, an unconfirmed claim gives way to somebody who asks for exactly this address: a container with a
/// fixed address that its engine starts again after a crash.
const YIELDS_AFTER: Duration = Duration::from_secs(5);

/// Holder of an address whose endpoint is not known yet.
const PENDING: &str = "docker:pending";

/// The interface part of an auxiliary address's holder.
const AUXILIARY: &str = "aux";

/// Why an address could not be claimed or given back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AddressError {
    /// The address cannot be an endpoint's.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A network keeps it from being handed out.
    #[error("{address} is an auxiliary address (--aux-address) of Docker network {network}")]
    Auxiliary {
        /// The address.
        address: IpAddr,
        /// The network's id.
        network: String,
    },
    /// An engine has asked for it and not named its endpoint yet.
    #[error("{address} is already taken by an endpoint that is being created: try again")]
    Pending {
        /// The address.
        address: IpAddr,
    },
    /// Somebody has it, or the ledger cannot be used.
    #[error(transparent)]
    Ledger(LedgerError),
    /// The network has no subnet of the address's family.
    #[error("{0} is of a family that this network does not have here")]
    NoPool(IpAddr),
    /// The same without an address.
    #[error("this network has no {0} here")]
    NoFamily(Family),
    /// Not in the range that the network was created with.
    #[error("no free address in --ip-range {0}")]
    RangeExhausted(Prefix),
}

impl From<LedgerError> for AddressError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Taken { address, owner } if owner.interface == AUXILIARY => {
                let network = owner.container.strip_prefix(DOCKER).unwrap_or(&owner.container).to_owned();
                Self::Auxiliary { address, network }
            }
            LedgerError::Taken { address, owner } if owner.container == PENDING => Self::Pending { address },
            other => Self::Ledger(other),
        }
    }
}

/// The addresses of one flannel network on this node.
pub(crate) struct Addresses {
    ledger: Ledger,
    /// One of each family.
    pools: Vec<Pool>,
    /// Handed out only when nothing else is left, unless asked for by name.
    spared: BTreeSet<IpAddr>,
}

/// The holder's name of an endpoint.
pub(crate) fn owner(endpoint_id: &str) -> Attachment {
    Attachment { container: format!("{DOCKER}{endpoint_id}"), interface: "eth".to_owned() }
}

/// The holder's name of a Docker network's auxiliary addresses.
fn keeper(docker_network: &str) -> Attachment {
    Attachment { container: format!("{DOCKER}{docker_network}"), interface: AUXILIARY.to_owned() }
}

/// Whether an engine asked for the address and has not said what for.
pub(crate) fn is_pending(entry: &Entry) -> bool {
    entry.owner.container == PENDING
}

impl Addresses {
    /// Of a network whose subnets here are these, at most one of a family.
    pub(crate) fn open(
        subnet_file: &Path,
        ledger_dir: &Path,
        network: &NetworkName,
        subnets: &[Prefix],
    ) -> Result<Self, AddressError> {
        let ledger = Ledger::open_for(subnet_file, ledger_dir, network.ledger())?;
        Ok(Self { ledger, pools: pools(subnets)?, spared: BTreeSet::new() })
    }

    /// The same if the network has a ledger, without making one.
    pub(crate) fn find(
        subnet_file: &Path,
        ledger_dir: &Path,
        network: &NetworkName,
        subnets: &[Prefix],
    ) -> Result<Option<Self>, AddressError> {
        let Some(ledger) = Ledger::find(subnet_file, ledger_dir, network.ledger())? else { return Ok(None) };
        Ok(Some(Self { ledger, pools: pools(subnets)?, spared: BTreeSet::new() }))
    }

    /// The same, with addresses that are handed out last.
    pub(crate) fn sparing(self, spared: BTreeSet<IpAddr>) -> Self {
        Self { spared, ..self }
    }

    fn admit(&self, address: IpAddr) -> Result<InterfaceAddress, AddressError> {
        let family = Family::of(address);
        let pool = self.pools.iter().find(|pool| pool.subnet().family() == family);
        Ok(pool.ok_or(AddressError::NoPool(address))?.admit(address)?)
    }

    /// Claims the next free address of a family, of `range` if there is one.
    pub(crate) fn claim_any(
        &self,
        family: Family,
        range: Option<Prefix>,
    ) -> Result<InterfaceAddress, AddressError> {
        self.claim_next(&self.ledger.lock()?, family, range, &pending())
    }

    fn claim_next(
        &self,
        held: &HeldLedger<'_>,
        family: Family,
        range: Option<Prefix>,
        owner: &Attachment,
    ) -> Result<InterfaceAddress, AddressError> {
        let Some(pool) = self.pools.iter().find(|pool| pool.subnet().family() == family) else {
            return Err(AddressError::NoFamily(family));
        };
        // As CNI counts the families of a node that has both; Docker's networks always have the first.
        let index = match family {
            Family::V4 => 0,
            Family::V6 => 1,
        };
        let taken: BTreeSet<IpAddr> = held.addresses()?.into_iter().collect();
        let last = held.last(index);
        let next = |taken: &BTreeSet<IpAddr>| match range {
            None => pool.next(last, taken).map_err(AddressError::from),
            Some(range) => pool.next_in(range, last, taken).ok_or(AddressError::RangeExhausted(range)),
        };
        let address = next(&(&taken | &self.spared)).or_else(|_| next(&taken))?;
        held.claim(address, owner)?;
        held.set_last(index, address)?;
        Ok(pool.admit(address)?)
    }

    /// Claims exactly this address; `makes_way` says of the endpoint that holds it whether it leaves it to us.
    pub(crate) fn claim(
        &self,
        address: IpAddr,
        makes_way: impl FnOnce(&str) -> bool,
    ) -> Result<InterfaceAddress, AddressError> {
        let admitted = self.admit(address)?;
        self.claim_exactly(&self.ledger.lock()?, address, &pending(), makes_way)?;
        Ok(admitted)
    }

    fn claim_exactly(
        &self,
        held: &HeldLedger<'_>,
        address: IpAddr,
        new: &Attachment,
        makes_way: impl FnOnce(&str) -> bool,
    ) -> Result<(), AddressError> {
        let Err(error) = held.claim(address, new) else { return Ok(()) };
        let LedgerError::Taken { owner, .. } = &error else { return Err(error.into()) };
        // One that was written just now has an engine, and a call of ours, that go on with it.
        let free = self.age(address) >= YIELDS_AFTER
            && owner.interface != AUXILIARY
            && owner
                .container
                .strip_prefix(DOCKER)
                .is_some_and(|holder| owner.container == PENDING || makes_way(holder));
        match free {
            true => Ok(held.reassign(address, new)?),
            false => Err(error.into()),
        }
    }

    /// Claims an address of every family for an endpoint that nobody asked for one before: `wanted`, else the next free one. An
    /// endpoint that has one already keeps it. All or none.
    pub(crate) fn claim_for(
        &self,
        endpoint_id: &str,
        wanted: Option<IpAddr>,
        makes_way: impl Fn(&str) -> bool,
    ) -> Result<Vec<InterfaceAddress>, AddressError> {
        let held = self.ledger.lock()?;
        let owner = owner(endpoint_id);
        if let Some(wanted) = wanted {
            self.admit(wanted)?;
        }
        let mut claimed: Vec<InterfaceAddress> = Vec::new();
        for family in self.pools.iter().map(|pool| pool.subnet().family()) {
            let wanted = wanted.filter(|wanted| Family::of(*wanted) == family);
            match self.claim_one(&held, (family, wanted), &owner, &makes_way) {
                Ok(address) => claimed.push(address),
                Err(error) => {
                    claimed.iter().try_for_each(|address| held.release_address(address.address()))?;
                    return Err(error);
                }
            }
        }
        Ok(claimed)
    }

    fn claim_one(
        &self,
        held: &HeldLedger<'_>,
        (family, wanted): (Family, Option<IpAddr>),
        owner: &Attachment,
        makes_way: impl FnOnce(&str) -> bool,
    ) -> Result<InterfaceAddress, AddressError> {
        let Some(wanted) = wanted else { return self.claim_next(held, family, None, owner) };
        let admitted = self.admit(wanted)?;
        if held.owner(wanted)?.is_none_or(|holder| holder != *owner) {
            self.claim_exactly(held, wanted, owner, makes_way)?;
        }
        Ok(admitted)
    }

    /// Keeps addresses from being handed out for as long as a Docker network lives: exactly these, no earlier ones. All or none.
    pub(crate) fn keep(&self, docker_network: &str, kept: &BTreeSet<IpAddr>) -> Result<(), AddressError> {
        let held = self.ledger.lock()?;
        let keeper = keeper(docker_network);
        let earlier = held.entries()?.into_iter().filter(|entry| entry.owner == keeper);
        for entry in earlier.filter(|entry| !kept.contains(&entry.address)) {
            held.release_address(entry.address)?;
        }
        let mut claimed = Vec::new();
        for address in kept {
            match self.keep_one(&held, *address, &keeper) {
                Ok(true) => claimed.push(*address),
                Ok(false) => {}
                Err(error) => {
                    claimed.into_iter().try_for_each(|address| held.release_address(address))?;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Whether it was not the keeper's before.
    fn keep_one(
        &self,
        held: &HeldLedger<'_>,
        address: IpAddr,
        keeper: &Attachment,
    ) -> Result<bool, AddressError> {
        self.admit(address)?;
        match held.owner(address)? {
            None => held.claim(address, keeper)?,
            Some(holder) if holder == *keeper => return Ok(false),
            Some(holder) if holder.container == PENDING => held.reassign(address, keeper)?,
            Some(owner) => return Err(LedgerError::Taken { address, owner }.into()),
        }
        Ok(true)
    }

    /// Gives a claimed address to an endpoint; `usurps` says of the endpoint that holds it whether it may be replaced.
    pub(crate) fn confirm(
        &self,
        address: IpAddr,
        endpoint_id: &str,
        usurps: impl FnOnce(&str) -> bool,
    ) -> Result<(), AddressError> {
        self.admit(address)?;
        let held = self.ledger.lock()?;
        let new = owner(endpoint_id);
        let Some(holder) = held.owner(address)? else { return Ok(held.claim(address, &new)?) };
        let replaceable = holder == new
            || holder.container == PENDING
            || holder.container.strip_prefix(DOCKER).is_some_and(usurps);
        match replaceable {
            true => Ok(held.reassign(address, &new)?),
            false => Err(LedgerError::Taken { address, owner: holder }.into()),
        }
    }

    /// Frees an address if Docker holds it and `may` agrees with its holder; anybody else's stays.
    pub(crate) fn release(
        &self,
        address: IpAddr,
        may: impl FnOnce(&str) -> bool,
    ) -> Result<(), AddressError> {
        let held = self.ledger.lock()?;
        let Some(holder) = held.owner(address)? else { return Ok(()) };
        match holder.container.strip_prefix(DOCKER) {
            Some(endpoint) if may(endpoint) => Ok(held.release_address(address)?),
            Some(_) | None => {
                tracing::warn!(%address, %holder, "address is not given back: its holder still has it");
                Ok(())
            }
        }
    }

    /// Frees what nobody will ever ask for again: claims that stayed pending for too long, and those of endpoints and
    /// networks that `lives` does not know.
    pub(crate) fn sweep(&self, lives: impl Fn(&str) -> bool) -> Result<Vec<IpAddr>, AddressError> {
        // Locking would make a ledger that is not there, or not any more.
        if self.ledger.look()?.is_empty() {
            return Ok(Vec::new());
        }
        let held = self.ledger.lock()?;
        let mut freed = Vec::new();
        for entry in held.entries()? {
            let Some(holder) = entry.owner.container.strip_prefix(DOCKER) else { continue };
            if (is_pending(&entry) || !lives(holder)) && self.age(entry.address) >= UNCONFIRMED_MAX {
                held.release_address(entry.address)?;
                freed.push(entry.address);
            }
        }
        Ok(freed)
    }

    /// Frees every address that Docker holds of a network, if the network has a ledger.
    pub(crate) fn give_back_all(
        subnet_file: &Path,
        ledger_dir: &Path,
        network: &NetworkName,
    ) -> Result<(), AddressError> {
        let Some(ledger) = Ledger::find(subnet_file, ledger_dir, network.ledger())? else { return Ok(()) };
        let held = ledger.lock()?;
        for entry in held.entries()?.iter().filter(|entry| entry.is_docker()) {
            held.release_address(entry.address)?;
        }
        Ok(())
    }

    /// How long ago its entry was written.
    fn age(&self, address: IpAddr) -> Duration {
        let written =
            std::fs::metadata(self.ledger.dir().join(address.to_string())).and_then(|found| found.modified());
        written.ok().and_then(|written| written.elapsed().ok()).unwrap_or_default()
    }
}

fn pools(subnets: &[Prefix]) -> Result<Vec<Pool>, AddressError> {
    Ok(subnets.iter().map(|subnet| Pool::new(*subnet)).collect::<Result<_, _>>()?)
}

fn pending() -> Attachment {
    Attachment { container: PENDING.to_owned(), interface: "eth".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(dir: &Path) -> Addresses {
        let network = NetworkName::default_network();
        let subnets = ["10.100.5.0/28".parse().unwrap(), "fd00:100:0:5::/64".parse().unwrap()];
        Addresses::open(&dir.join("run/subnet.env"), &dir.join("networks"), &network, &subnets).unwrap()
    }

    impl Addresses {
        fn claim_v4(&self, range: Option<Prefix>) -> Result<InterfaceAddress, AddressError> {
            self.claim_any(Family::V4, range)
        }
    }

    fn ip(last: u8) -> IpAddr {
        [10, 100, 5, last].into()
    }

    #[test]
    fn what_somebody_asked_for_by_name_is_handed_out_last() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        let spared = BTreeSet::from([ip(3), ip(4)]);
        let addresses = addresses.sparing(spared.clone());
        let given: Vec<_> = (0..13).map(|_| addresses.claim_v4(None).unwrap().address()).collect();
        assert_eq!(given[..2], [ip(2), ip(5)]);
        assert_eq!(given[11..].iter().copied().collect::<BTreeSet<_>>(), spared);
        assert!(addresses.claim_v4(None).is_err());
    }

    #[test]
    fn claims_go_round_and_do_not_come_back_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        assert_eq!(addresses.claim_v4(None).unwrap().to_string(), "10.100.5.2/28");
        assert_eq!(addresses.claim_v4(None).unwrap().address(), ip(3));
        addresses.release(ip(2), |_| true).unwrap();
        assert_eq!(addresses.claim_v4(None).unwrap().address(), ip(4));
        let error = addresses.claim(ip(4), |_| false).unwrap_err().to_string();
        assert!(error.contains("10.100.5.4 is already taken"), "{error}");
        assert!(addresses.claim(ip(1), |_| false).is_err(), "the gateway");
    }

    #[test]
    fn a_range_is_kept_to() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        let range: Prefix = "10.100.5.12/30".parse().unwrap();
        let given: Vec<_> = (0..3).map(|_| addresses.claim_v4(Some(range)).unwrap().address()).collect();
        assert_eq!(given, [ip(12), ip(13), ip(14)]);
        assert!(matches!(addresses.claim_v4(Some(range)), Err(AddressError::RangeExhausted(_))));
    }

    #[test]
    fn each_family_goes_round_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        let next = |family| addresses.claim_any(family, None).unwrap().to_string();
        assert_eq!(next(Family::V6), "fd00:100:0:5::2/64");
        assert_eq!(next(Family::V4), "10.100.5.2/28");
        assert_eq!(next(Family::V6), "fd00:100:0:5::3/64");
        let range: Prefix = "fd00:100:0:5::8000:0/97".parse().unwrap();
        assert_eq!(
            addresses.claim_any(Family::V6, Some(range)).unwrap().to_string(),
            "fd00:100:0:5::8000:0/64"
        );
        assert!(addresses.claim("fd00:100:0:6::2".parse().unwrap(), |_| false).is_err(), "another host's");
        assert!(addresses.claim("fd00:100:0:5::1".parse().unwrap(), |_| false).is_err(), "the gateway");
    }

    #[test]
    fn an_endpoint_takes_its_claim_and_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        let address = addresses.claim_v4(None).unwrap().address();
        addresses.confirm(address, "e1", |_| false).unwrap();
        addresses.confirm(address, "e1", |_| false).unwrap();
        assert!(addresses.confirm(address, "e2", |_| false).is_err());
        addresses.confirm(address, "e2", |holder| holder == "e1").unwrap();
        // What the engine's own IPAM chose was never claimed before.
        addresses.confirm(ip(9), "e3", |_| false).unwrap();
        let held = addresses.ledger.lock().unwrap();
        held.claim(ip(10), &Attachment { container: "cni1".into(), interface: "eth0".into() }).unwrap();
        drop(held);
        assert!(addresses.confirm(ip(10), "e4", |_| true).is_err(), "CNI's");
        addresses.release(ip(10), |_| true).unwrap();
        assert!(addresses.ledger.lock().unwrap().owner(ip(10)).unwrap().is_some(), "CNI's, still");
    }

    #[test]
    fn auxiliary_addresses_are_kept_all_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        // Asked for by our own IPAM driver's engine, or never asked for: an engine's own IPAM.
        addresses.claim(ip(5), |_| false).unwrap();
        for _ in 0..2 {
            addresses.keep("n1", &[ip(5), ip(6)].into()).unwrap();
        }
        let error = addresses.claim(ip(5), |_| false).unwrap_err().to_string();
        assert_eq!(error, "10.100.5.5 is an auxiliary address (--aux-address) of Docker network n1");
        assert!(addresses.confirm(ip(6), "e1", |_| false).is_err());
        assert!(addresses.keep("n2", &[ip(4), ip(5)].into()).is_err());
        assert!(addresses.claim_for("e1", Some(ip(4)), |_| false).is_ok(), "nothing of what failed is left");
        addresses.keep("n1", &BTreeSet::new()).unwrap();
        addresses.claim(ip(5), |_| false).unwrap();
    }

    #[test]
    fn an_endpoint_without_an_ipam_driver_claims_for_itself() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        let claim = |endpoint: &str, wanted: Option<IpAddr>| {
            let claimed = addresses.claim_for(endpoint, wanted, |_| false).unwrap();
            claimed.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(claim("e1", None), ["10.100.5.2/28", "fd00:100:0:5::2/64"]);
        assert_eq!(claim("e2", Some(ip(7))), ["10.100.5.7/28", "fd00:100:0:5::3/64"]);
        assert_eq!(claim("e2", Some(ip(7)))[0], "10.100.5.7/28", "it has it already");
        let v6: IpAddr = "fd00:100:0:5::77".parse().unwrap();
        assert_eq!(claim("e4", Some(v6)), ["10.100.5.3/28", "fd00:100:0:5::77/64"]);
        // What fails in one family leaves nothing in the other.
        let before = addresses.ledger.lock().unwrap().addresses().unwrap();
        assert!(addresses.claim_for("e5", Some(v6), |_| false).is_err());
        assert_eq!(addresses.ledger.lock().unwrap().addresses().unwrap(), before);
        assert!(addresses.claim_for("e3", Some(ip(7)), |_| false).is_err());
        assert!(addresses.claim_for("e3", Some(ip(1)), |_| false).is_err(), "the gateway");
    }

    #[test]
    fn nothing_fresh_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        let address = addresses.claim_v4(None).unwrap().address();
        assert!(addresses.sweep(|_| false).unwrap().is_empty());
        let age = |address: IpAddr| {
            let file = addresses.ledger.dir().join(address.to_string());
            let file = std::fs::File::options().write(true).open(file).unwrap();
            file.set_modified(std::time::SystemTime::now() - UNCONFIRMED_MAX).unwrap();
        };
        age(address);
        assert_eq!(addresses.sweep(|_| true).unwrap(), [address]);
        addresses.keep("n1", &[ip(9)].into()).unwrap();
        age(ip(9));
        assert!(addresses.sweep(|holder| holder == "n1").unwrap().is_empty(), "an auxiliary address");
        assert_eq!(addresses.sweep(|_| false).unwrap(), [ip(9)], "of a network that is gone");
        assert!(addresses.ledger.lock().unwrap().addresses().unwrap().is_empty());
    }
}
