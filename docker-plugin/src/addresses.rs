//! Docker's claims in the ledger that CNI shares.
//!
//! An engine asks for an address before it names the endpoint, so a claim is first [`PENDING`] and gets the endpoint's
//! name with CreateEndpoint. A claim that stays pending because the engine died in between is reclaimed after a while,
//! unless a network keeps it as an auxiliary address.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use flannel_core::decide::pool::{Pool, PoolError};
use flannel_core::touch::ledger::{DOCKER, Ledger, LedgerError};
use flannel_core::words::addr::{InterfaceAddress, Prefix};
use flannel_core::words::name::{Attachment, NetworkName};

/// How long a claim may wait for its endpoint. An engine asks for both within milliseconds.
pub(crate) const UNCONFIRMED_MAX: Duration = Duration::from_secs(120);

/// After this long, an unconfirmed claim gives way to somebody who asks for exactly this address: a container with a
/// fixed address that its engine starts again after a crash.
const YIELDS_AFTER: Duration = Duration::from_secs(5);

/// Holder of an address whose endpoint is not known yet.
const PENDING: &str = "docker:pending";

/// Why an address could not be claimed or given back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AddressError {
    /// The address cannot be an endpoint's.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// Somebody has it, or the ledger cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Not in the range that the network was created with.
    #[error("no free address in --ip-range {0}")]
    RangeExhausted(Prefix),
}

/// The addresses of one flannel network on this node.
pub(crate) struct Addresses {
    ledger: Ledger,
    pool: Pool,
}

/// The holder's name of an endpoint.
pub(crate) fn owner(endpoint_id: &str) -> Attachment {
    Attachment { container: format!("{DOCKER}{endpoint_id}"), interface: "eth".to_owned() }
}

impl Addresses {
    /// Of a network whose subnet here is `subnet`.
    pub(crate) fn open(
        subnet_file: &Path,
        ledger_dir: &Path,
        network: &NetworkName,
        subnet: Prefix,
    ) -> Result<Self, AddressError> {
        let ledger = Ledger::open_for(subnet_file, ledger_dir, network.ledger())?;
        Ok(Self { ledger, pool: Pool::new(subnet)? })
    }

    /// The same if the network has a ledger, without making one.
    pub(crate) fn find(
        subnet_file: &Path,
        ledger_dir: &Path,
        network: &NetworkName,
        subnet: Prefix,
    ) -> Result<Option<Self>, AddressError> {
        let Some(ledger) = Ledger::find(subnet_file, ledger_dir, network.ledger())? else { return Ok(None) };
        Ok(Some(Self { ledger, pool: Pool::new(subnet)? }))
    }

    /// Claims the next free address, of `range` if there is one.
    pub(crate) fn claim_any(&self, range: Option<Prefix>) -> Result<InterfaceAddress, AddressError> {
        let held = self.ledger.lock()?;
        let taken: BTreeSet<IpAddr> = held.addresses()?.into_iter().collect();
        let address = match range {
            None => self.pool.next(held.last(0), &taken)?,
            Some(range) => self.next_in(range, held.last(0), &taken)?,
        };
        held.claim(address, &pending())?;
        held.set_last(0, address)?;
        Ok(self.pool.admit(address)?)
    }

    /// Claims exactly this address.
    pub(crate) fn claim(
        &self,
        address: IpAddr,
        keeps: impl Fn(IpAddr) -> bool,
    ) -> Result<InterfaceAddress, AddressError> {
        let admitted = self.pool.admit(address)?;
        let held = self.ledger.lock()?;
        match held.claim(address, &pending()) {
            Err(LedgerError::Taken { owner, .. })
                if owner.container == PENDING && !keeps(address) && self.age(address) >= YIELDS_AFTER =>
            {
                held.reassign(address, &pending())?;
            }
            other => other?,
        }
        Ok(admitted)
    }

    /// Gives a claimed address to an endpoint; `usurps` says of the endpoint that holds it whether it may be replaced.
    pub(crate) fn confirm(
        &self,
        address: IpAddr,
        endpoint_id: &str,
        usurps: impl FnOnce(&str) -> bool,
    ) -> Result<(), AddressError> {
        self.pool.admit(address)?;
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

    /// Frees what nobody will ever ask for again: claims that stayed pending for too long, and those of endpoints that
    /// `lives` does not know.
    pub(crate) fn sweep(
        &self,
        keeps: impl Fn(IpAddr) -> bool,
        lives: impl Fn(&str) -> bool,
    ) -> Result<Vec<IpAddr>, AddressError> {
        // Locking would make a ledger that is not there, or not any more.
        if self.ledger.look()?.is_empty() {
            return Ok(Vec::new());
        }
        let held = self.ledger.lock()?;
        let mut freed = Vec::new();
        for entry in held.entries()? {
            let Some(endpoint) = entry.owner.container.strip_prefix(DOCKER) else { continue };
            let stale = match entry.owner.container == PENDING {
                true => !keeps(entry.address),
                false => !lives(endpoint),
            };
            if stale && self.age(entry.address) >= UNCONFIRMED_MAX {
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

    /// The next free address of a part of the subnet, round and round.
    fn next_in(
        &self,
        range: Prefix,
        last: Option<IpAddr>,
        taken: &BTreeSet<IpAddr>,
    ) -> Result<IpAddr, AddressError> {
        let size = 1u128 << (range.family().bits() - range.len()).min(64);
        let start = last
            .filter(|last| range.contains(*last))
            .map_or(0, |last| (0..size).find(|n| range.nth(*n) == Some(last)).map_or(0, |n| n + 1));
        (start..size)
            .chain(0..start)
            .filter_map(|n| range.nth(n))
            .find(|address| !taken.contains(address) && self.pool.admit(*address).is_ok())
            .ok_or(AddressError::RangeExhausted(range))
    }
}

fn pending() -> Attachment {
    Attachment { container: PENDING.to_owned(), interface: "eth".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(dir: &Path) -> Addresses {
        let network = NetworkName::default_network();
        let subnet = "10.100.5.0/28".parse().unwrap();
        Addresses::open(&dir.join("run/subnet.env"), &dir.join("networks"), &network, subnet).unwrap()
    }

    fn ip(last: u8) -> IpAddr {
        [10, 100, 5, last].into()
    }

    const NEVER: fn(IpAddr) -> bool = |_| false;

    #[test]
    fn claims_go_round_and_do_not_come_back_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        assert_eq!(addresses.claim_any(None).unwrap().to_string(), "10.100.5.2/28");
        assert_eq!(addresses.claim_any(None).unwrap().address(), ip(3));
        addresses.release(ip(2), |_| true).unwrap();
        assert_eq!(addresses.claim_any(None).unwrap().address(), ip(4));
        let error = addresses.claim(ip(4), NEVER).unwrap_err().to_string();
        assert!(error.contains("10.100.5.4 is already taken"), "{error}");
        assert!(addresses.claim(ip(1), NEVER).is_err(), "the gateway");
    }

    #[test]
    fn a_range_is_kept_to() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        let range: Prefix = "10.100.5.12/30".parse().unwrap();
        let given: Vec<_> = (0..3).map(|_| addresses.claim_any(Some(range)).unwrap().address()).collect();
        assert_eq!(given, [ip(12), ip(13), ip(14)]);
        assert!(matches!(addresses.claim_any(Some(range)), Err(AddressError::RangeExhausted(_))));
    }

    #[test]
    fn an_endpoint_takes_its_claim_and_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        let address = addresses.claim_any(None).unwrap().address();
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
    fn nothing_fresh_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = addresses(dir.path());
        let address = addresses.claim_any(None).unwrap().address();
        assert!(addresses.sweep(NEVER, |_| false).unwrap().is_empty());
        let file = std::fs::File::options()
            .write(true)
            .open(addresses.ledger.dir().join(address.to_string()))
            .unwrap();
        file.set_modified(std::time::SystemTime::now() - UNCONFIRMED_MAX).unwrap();
        assert!(addresses.sweep(|_| true, |_| false).unwrap().is_empty(), "an auxiliary address");
        assert!(addresses.claim(address, |_| true).is_err(), "an auxiliary address");
        assert_eq!(addresses.sweep(NEVER, |_| false).unwrap(), [address]);
        assert!(addresses.ledger.lock().unwrap().addresses().unwrap().is_empty());
    }
}
