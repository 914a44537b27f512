//! WireGuard devices: what they are told, over generic netlink.
//!
//! The kernel takes a device's peers in one message or in several, and shows them in as many as it needs; a peer that does not fit
//! goes on in the next (uapi/linux/wireguard.h). A peer that keeps its key keeps its session, whatever else of it changes.

mod wire;

use std::collections::BTreeMap;
use std::io;

use self::wire::{Message, Said};
use super::netlink::{Batch, Protocol, Refusal, Socket};
use super::netns::Namespace;
use super::{action, again, io_error, refused};
use crate::touch::world::WorldError;
use crate::words::fact::{Change, Fact, Facts};
use crate::words::name::LinkName;
use crate::words::wireguard::PublicKey;

/// Bytes of peers in one message: the attribute that holds them ends at 64 KiB.
const PEERS_BYTES: usize = 24 * 1024;

/// The kernel's WireGuard.
pub(super) struct Wireguard {
    socket: Socket,
    family: u16,
    /// Peers that were sent something and never answered, at the last look.
    silent: Vec<(LinkName, PublicKey)>,
}

impl Wireguard {
    /// None if this kernel has no WireGuard. Asking loads the module, where there is one.
    pub(super) fn open(namespace: Option<&Namespace>) -> io::Result<Option<Self>> {
        let mut socket = Socket::open(Protocol::Generic, namespace)?;
        let found = socket.ask(&[Message::family()], wire::family)?;
        match found.into_iter().next() {
            Some(Ok(Some(family))) => Ok(Some(Self { socket, family, silent: Vec::new() })),
            Some(Err(Refusal { errno, .. })) if errno != libc::ENOENT && errno != libc::EOPNOTSUPP => {
                Err(io::Error::from_raw_os_error(errno))
            }
            _ => Ok(None),
        }
    }

    /// What devices are told now, by their index and name.
    pub(super) fn observe(
        &mut self,
        devices: &[(u32, LinkName)],
        facts: &mut Facts,
    ) -> Result<(), WorldError> {
        const LOOK: &str = "look at the WireGuard devices";
        self.silent.clear();
        for (index, link) in devices {
            let mut said = Said::new(*link);
            let question = Message::get(self.family, *index);
            let asked = self.socket.dump(&question, |_, body| {
                said.read(body);
                None::<()>
            });
            match asked.map_err(|error| io_error(LOOK, error))? {
                // It is gone since it was seen.
                Err(Refusal { errno: libc::ENODEV | libc::EOPNOTSUPP, .. }) => continue,
                answer => answer.map_err(|refusal| refused(LOOK, refusal))?,
            };
            self.silent.extend(said.silent().map(|key| (*link, key)));
            said.into_facts().for_each(|fact| facts.set(fact));
        }
        Ok(())
    }

    pub(super) fn silent(&self) -> &[(LinkName, PublicKey)] {
        &self.silent
    }

    /// Makes changes about devices and peers: those of a device go together. If the kernel refuses, each is tried by itself, so that
    /// one that is wrong does not keep the others away.
    pub(super) fn apply(&mut self, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
        let mut results: Vec<_> = changes.iter().map(|_| Ok(())).collect();
        let mut devices: BTreeMap<LinkName, Vec<usize>> = BTreeMap::new();
        for (place, change) in changes.iter().enumerate() {
            if let Some(link) = change.fact().link() {
                devices.entry(link).or_default().push(place);
            }
        }
        for (link, places) in devices {
            let mut rest = &places[..];
            while !rest.is_empty() {
                let (message, taken) = self.gather(link, changes, rest);
                let (now, later) = rest.split_at(taken);
                rest = later;
                match (self.send(&message), now) {
                    (Ok(None), _) => {}
                    (Ok(Some(_)), [_, _, ..]) => {
                        for place in now {
                            let (message, _) = self.gather(link, changes, &[*place]);
                            let sent = self.send(&message);
                            settle(&mut results, changes, *place, sent);
                        }
                    }
                    (sent, _) => {
                        for place in now {
                            let sent = match &sent {
                                Ok(refusal) => Ok(refusal.clone()),
                                Err(error) => Err(again(error)),
                            };
                            settle(&mut results, changes, *place, sent);
                        }
                    }
                }
            }
        }
        results
    }

    /// One message about a device with as many of the changes as fit, and how many these are.
    fn gather(&self, link: LinkName, changes: &[Change<'_>], places: &[usize]) -> (Message, usize) {
        let mut message = Message::set(self.family, link);
        let mut taken = 0;
        for change in places.iter().filter_map(|place| changes.get(*place)) {
            match (change, change.fact()) {
                // A device's settings go with the device, and nothing else may be said of it.
                (Change::Delete(_), Fact::WireguardDevice(_)) => {}
                (_, Fact::WireguardDevice(device)) if taken == 0 => message.device(device),
                (_, Fact::WireguardDevice(_)) => break,
                (Change::Delete(_), Fact::WireguardPeer(peer)) => message.remove(&peer.key),
                (Change::Replace { old: Fact::WireguardPeer(old), .. }, Fact::WireguardPeer(new)) => {
                    message.peer(new, Some(old));
                }
                (_, Fact::WireguardPeer(peer)) => message.peer(peer, None),
                _ => {}
            }
            taken += 1;
            if message.peers_len() >= PEERS_BYTES {
                break;
            }
        }
        (message, taken.max(1))
    }

    fn send(&mut self, message: &Message) -> io::Result<Option<Refusal>> {
        let mut batch = Batch::default();
        batch.push(message, 0);
        let refusals = self.socket.write(&mut batch)?;
        Ok(refusals.into_iter().next().map(|(_, refusal)| refusal))
    }
}

/// Records what became of a change. What should go and went with its device is gone.
fn settle(
    results: &mut [Result<(), WorldError>],
    changes: &[Change<'_>],
    place: usize,
    sent: io::Result<Option<Refusal>>,
) {
    let (Some(result), Some(change)) = (results.get_mut(place), changes.get(place)) else { return };
    let deletes = matches!(change, Change::Delete(_));
    *result = match sent {
        Ok(None) => Ok(()),
        Ok(Some(Refusal { errno: libc::ENODEV | libc::EOPNOTSUPP, .. })) if deletes => Ok(()),
        Ok(Some(refusal)) => Err(refused(action(change), refusal)),
        Err(error) => Err(io_error(action(change), error)),
    };
}
