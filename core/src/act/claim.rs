//! Addresses for an attachment: claimed before it is made, given back if it cannot be.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::life::{Life, LifeError};
use crate::decide::ranges::{Offer, RangeError, RangeSet};
use crate::touch::ledger::{Claim, Entry, HeldLedger, Ledger, LedgerError, Listing, Maker};
use crate::touch::world::WorldError;
use crate::words::name::Attachment;

/// Why addresses could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The ledger cannot be used, or the address asked for has an owner.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The address asked for is nobody's, or there is none free.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Every range set gives one address, and these are of none of them or more than one of the same.
    #[error("failed to allocate all requested IPs: {left}; addresses come from {sets}, one from each set")]
    Unserved {
        /// The addresses.
        left: String,
        /// What there is.
        sets: String,
    },
    /// The attachment is there, or being made.
    #[error(
        "{interface} is attached already: {address} has been allocated to {container}, duplicate allocation is not allowed; detach it first"
    )]
    Duplicate {
        /// The address.
        address: IpAddr,
        /// The container.
        container: String,
        /// The interface in it.
        interface: String,
    },
    /// The host cannot be looked at.
    #[error(transparent)]
    World(#[from] WorldError),
    /// It failed, and what was claimed could not be given back.
    #[error("{error}; and giving back what was claimed failed too: {undo}")]
    Undo {
        /// What failed first.
        error: Box<Self>,
        /// What failed then.
        undo: LedgerError,
    },
}

impl From<LifeError> for ClaimError {
    fn from(error: LifeError) -> Self {
        match error {
            LifeError::World(error) => Self::World(error),
            LifeError::Ledger(error) => Self::Ledger(error),
        }
    }
}

/// What an attachment asks for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Whose the addresses are to be.
    pub owner: &'a Attachment,
    /// It gets one address from each of these, in this order.
    pub sets: &'a [RangeSet],
    /// These and no others, where given.
    pub wanted: &'a [IpAddr],
    /// Who makes the attachment.
    pub maker: Maker,
}

/// Addresses of an attachment that is being made.
#[derive(Debug)]
pub struct Claimed {
    /// One of each range set, in their order.
    pub offers: Vec<Offer>,
    /// What was freed to that end, because no address was left: attachments that are no more.
    pub reclaimed: Vec<Entry>,
    _claims: Vec<Claim>,
}

/// Claims one address from every set: the ones asked for, else the next free ones. All or none. What an earlier ADD of the same
/// attachment claimed that did not live to make it is given again.
pub fn claim(
    ledger: &HeldLedger<'_>,
    request: &Request<'_>,
    life: &mut dyn Life,
) -> Result<Claimed, ClaimError> {
    let wanted = consume(request)?;
    let listing = ledger.list()?;
    let mut claiming = Claiming { ledger, request, life, listing, claims: Vec::new(), reclaimed: Vec::new() };
    let own = claiming.own()?;
    let mut offers = Vec::new();
    let result = request.sets.iter().zip(wanted).enumerate().try_for_each(|(index, (set, wanted))| {
        offers.push(claiming.one(index, set, wanted, &own)?);
        Ok(())
    });
    let Claiming { claims, reclaimed, .. } = claiming;
    // Of an earlier ADD, and no use to this one: all of them if it failed.
    let used =
        |address: &IpAddr| result.is_ok() && offers.iter().any(|offer| offer.address.address() == *address);
    let claimed = offers.iter().map(|offer| offer.address.address());
    let over: BTreeSet<IpAddr> =
        own.iter().copied().chain(claimed).filter(|address| !used(address)).collect();
    let undone = over.into_iter().try_for_each(|address| ledger.release_address(address));
    match (result, undone) {
        (Ok(()), Ok(())) => Ok(Claimed { offers, reclaimed, _claims: claims }),
        (Ok(()), Err(error)) => Err(error.into()),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(undo)) => Err(ClaimError::Undo { error: Box::new(error), undo }),
    }
}

/// Which of the wanted addresses each set is to give: the first that lies in it. None may be left over.
fn consume(request: &Request<'_>) -> Result<Vec<Option<IpAddr>>, ClaimError> {
    let mut left = request.wanted.to_vec();
    let wanted = request
        .sets
        .iter()
        .map(|set| left.iter().position(|ip| set.contains(*ip)).map(|index| left.remove(index)))
        .collect();
    if left.is_empty() {
        return Ok(wanted);
    }
    Err(ClaimError::Unserved {
        left: left.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" "),
        sets: request.sets.iter().map(RangeSet::to_string).collect::<Vec<_>>().join(" and "),
    })
}

struct Claiming<'a> {
    ledger: &'a HeldLedger<'a>,
    request: &'a Request<'a>,
    life: &'a mut dyn Life,
    listing: Listing,
    claims: Vec<Claim>,
    reclaimed: Vec<Entry>,
}

impl Claiming<'_> {
    /// What the attachment holds already, without being there: its ADD did not live to the end.
    fn own(&mut self) -> Result<Vec<IpAddr>, ClaimError> {
        let owner = self.request.owner;
        let entries = self.ledger.entries_of(&self.listing, &owner.container)?;
        let own: Vec<IpAddr> =
            entries.into_iter().filter(|entry| entry.owner == *owner).map(|entry| entry.address).collect();
        let Some(first) = own.first() else { return Ok(own) };
        let duplicate = |address: IpAddr| ClaimError::Duplicate {
            address,
            container: owner.container.clone(),
            interface: owner.interface.clone(),
        };
        if self.life.is_attached(owner)? {
            return Err(duplicate(*first));
        }
        for address in &own {
            self.claims.push(self.ledger.begin_again(*address)?.ok_or_else(|| duplicate(*address))?);
        }
        Ok(own)
    }

    fn one(
        &mut self,
        index: usize,
        set: &RangeSet,
        wanted: Option<IpAddr>,
        own: &[IpAddr],
    ) -> Result<Offer, ClaimError> {
        let asked = match wanted {
            Some(wanted) => set.admit(wanted)?,
            None => None,
        };
        let offer = match asked {
            Some(offer) => offer,
            None => match own.iter().find_map(|address| set.admit(*address).ok().flatten()) {
                Some(offer) => return Ok(offer),
                None => self.next(index, set)?,
            },
        };
        let address = offer.address.address();
        if !own.contains(&address) {
            let claim = self.ledger.begin(address, self.request.owner, self.request.maker)?;
            self.claims.push(claim);
            self.ledger.set_last(index, address)?;
        }
        Ok(offer)
    }

    fn next(&mut self, index: usize, set: &RangeSet) -> Result<Offer, ClaimError> {
        let last = self.ledger.last(index);
        let full = match set.next(last, self.listing.addresses()) {
            Err(full @ RangeError::Exhausted { .. }) => full,
            found => return Ok(found?),
        };
        // Only now is it worth reading every entry: it frees those whose writer died.
        let entries = self.ledger.entries()?;
        let here: Vec<Entry> = entries.iter().filter(|entry| set.contains(entry.address)).cloned().collect();
        let mut held: BTreeSet<IpAddr> = entries.into_iter().map(|entry| entry.address).collect();
        if let Ok(offer) = set.next(last, &held) {
            return Ok(offer);
        }
        let mut dead = self.life.dead(self.ledger, &here)?;
        dead.sort_by_key(|entry| self.ledger.since(entry.address));
        let Some(oldest) = dead.first().map(|entry| entry.address) else { return Err(full.into()) };
        for entry in &dead {
            self.ledger.release_address(entry.address)?;
            held.remove(&entry.address);
        }
        self.reclaimed.extend(dead);
        Ok(set.admit(oldest)?.map_or_else(|| set.next(last, &held), Ok)?)
    }
}

/// Frees what an attachment could not be made with.
pub fn give_back(ledger: &Ledger, claimed: &Claimed) -> Result<(), LedgerError> {
    let held = ledger.lock()?;
    claimed.offers.iter().try_for_each(|offer| held.release_address(offer.address.address()))
}

#[cfg(test)]
mod tests;
