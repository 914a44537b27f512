//! Which attachments are certainly no more, though nobody said so: their addresses may be given to others when there are none left.
//!
//! An address that is in use must never be given away twice, so everything here that is not proven is taken for alive.
//!
//! - An attachment that this program made has a veth pair whose host's end is named after it. Pair and namespace go together: no
//!   such interface, no attachment. While it is being made its claim is locked (`Claim`).
//! - One that other plugins made has a veth of any name. Whatever its name, an address that is configured in a namespace behind one of
//!   the host's veths is alive. The reverse is only proven if every port of the bridge leads to a namespace that holds addresses of
//!   the ledger: a port that does not may be the way to anything (a virtual machine that took over the container's address).
//! - host-local claims before the interface is configured, so what it wrote a short time ago is alive.
//! - What Docker's endpoints hold is the Docker driver's to judge.
//!
//! What runtimes remember (libcni's cache) is no sign of life: `ctr` never forgets a container that it started detached.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use crate::touch::ledger::{Entry, HeldLedger, LedgerError};
use crate::touch::world::WorldError;
use crate::touch::world::kernel::{Kernel, Outlet};
use crate::words::name::{Attachment, LinkName};

/// An entry that others wrote is alive for so long, whatever else there is to see: their ADD takes a second or two.
const YOUTH: Duration = Duration::from_secs(60);

/// Who can tell the living from the dead.
pub trait Life {
    /// Whether the attachment is there now.
    fn is_attached(&mut self, owner: &Attachment) -> Result<bool, WorldError>;

    /// Those of the entries whose attachments are certainly no more.
    fn dead(&mut self, held: &HeldLedger<'_>, entries: &[Entry]) -> Result<Vec<Entry>, LifeError>;
}

/// Why it could not be told.
#[derive(Debug, thiserror::Error)]
pub enum LifeError {
    /// The kernel cannot be looked at.
    #[error(transparent)]
    World(#[from] WorldError),
    /// The ledger cannot be.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// Nobody can: the attachments are made by somebody who did not say how.
#[derive(Clone, Copy, Debug)]
pub struct Unknown;

impl Life for Unknown {
    fn is_attached(&mut self, _owner: &Attachment) -> Result<bool, WorldError> {
        Ok(true)
    }

    fn dead(&mut self, _held: &HeldLedger<'_>, _entries: &[Entry]) -> Result<Vec<Entry>, LifeError> {
        Ok(Vec::new())
    }
}

/// The ports of a bridge of this host tell.
#[derive(Clone, Debug)]
pub struct Ports<'a> {
    /// What the host's ends of our veth pairs are named after ([`Attachment::host_link`]).
    pub network: &'a str,
    /// The bridge.
    pub bridge: LinkName,
}

impl Life for Ports<'_> {
    fn is_attached(&mut self, owner: &Attachment) -> Result<bool, WorldError> {
        Kernel::open()?.link_exists(owner.host_link(self.network))
    }

    fn dead(&mut self, held: &HeldLedger<'_>, entries: &[Entry]) -> Result<Vec<Entry>, LifeError> {
        let outlets = Kernel::open()?.outlets()?;
        let all: BTreeSet<IpAddr> = entries.iter().map(|entry| entry.address).collect();
        let told = are_told(&outlets, self.bridge, &all);
        let now = SystemTime::now();
        let mut dead = Vec::new();
        for entry in entries.iter().filter(|entry| !shows(&outlets, self.network, entry)) {
            let certain = match held.is_ours(entry) {
                true => held.begin_again(entry.address)?.is_some(),
                false => told && is_old(held.since(entry.address), now),
            };
            if certain {
                dead.push(entry.clone());
            }
        }
        Ok(dead)
    }
}

/// Whether there is a sign of the attachment.
fn shows(outlets: &[Outlet], network: &str, entry: &Entry) -> bool {
    let name = entry.owner.host_link(network);
    let inside =
        |outlet: &Outlet| outlet.inside.as_ref().is_some_and(|inside| inside.contains(&entry.address));
    entry.is_docker() || outlets.iter().any(|outlet| outlet.name == name || inside(outlet))
}

/// Whether it is known of every port of the bridge whose it is.
fn are_told(outlets: &[Outlet], bridge: LinkName, all: &BTreeSet<IpAddr>) -> bool {
    let known = |outlet: &Outlet| outlet.inside.as_ref().is_some_and(|inside| !inside.is_disjoint(all));
    outlets.iter().filter(|outlet| outlet.bridge == Some(bridge)).all(known)
}

fn is_old(since: Option<SystemTime>, now: SystemTime) -> bool {
    // One from the future says nothing: the clock was set.
    since.and_then(|since| now.duration_since(since).ok()).is_some_and(|age| age > YOUTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outlet(name: &str, bridge: &str, inside: Option<&[&str]>) -> Outlet {
        let link = |name: &str| LinkName::new(name).unwrap();
        let inside = inside.map(|inside| inside.iter().map(|address| address.parse().unwrap()).collect());
        Outlet { name: link(name), bridge: (!bridge.is_empty()).then(|| link(bridge)), carrier: true, inside }
    }

    fn entry(address: &str, container: &str) -> Entry {
        let owner = Attachment { container: container.into(), interface: "eth0".into() };
        Entry { address: address.parse().unwrap(), owner }
    }

    #[test]
    fn an_interface_by_name_or_an_address_behind_one_is_a_sign_of_life() {
        let c1 = entry("10.5.1.2", "c1");
        let named = outlet(c1.owner.host_link("web").as_str(), "cni0", None);
        let elsewhere = outlet("veth12345678", "", Some(&["127.0.0.1", "10.5.1.3"]));
        let outlets = [named, elsewhere];
        assert!(shows(&outlets, "web", &c1));
        assert!(!shows(&outlets, "default", &c1), "of another network");
        assert!(shows(&outlets, "web", &entry("10.5.1.3", "c2")), "wherever the veth is");
        assert!(!shows(&outlets, "web", &entry("10.5.1.4", "c3")));
        assert!(shows(&outlets, "web", &entry("10.5.1.4", "docker:e")));
    }

    #[test]
    fn a_port_that_leads_who_knows_where_leaves_doubts() {
        let bridge = LinkName::new("cni0").unwrap();
        let all: BTreeSet<IpAddr> = ["10.5.1.2", "10.5.1.3"].iter().map(|a| a.parse().unwrap()).collect();
        let known = outlet("veth1", "cni0", Some(&["127.0.0.1", "10.5.1.2"]));
        assert!(are_told(&[], bridge, &all));
        assert!(are_told(&[known.clone(), outlet("veth2", "docker0", None)], bridge, &all));
        for doubt in [None, Some(&[][..]), Some(&["192.0.2.1"][..])] {
            assert!(!are_told(&[known.clone(), outlet("veth2", "cni0", doubt)], bridge, &all), "{doubt:?}");
        }
    }

    #[test]
    fn what_others_wrote_just_now_is_alive() {
        let now = SystemTime::now();
        assert!(is_old(Some(now - Duration::from_secs(90)), now));
        for young in
            [None, Some(now), Some(now - Duration::from_secs(5)), Some(now + Duration::from_secs(500))]
        {
            assert!(!is_old(young, now));
        }
    }
}
