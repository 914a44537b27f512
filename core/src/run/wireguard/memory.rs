//! What is remembered of WireGuard peers from one pass to the next: where they were told to be, and since when they are silent.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::words::code::Code;
use crate::words::fact::{Fact, Facts};
use crate::words::name::LinkName;
use crate::words::report::Finding;
use crate::words::wireguard::{PublicKey, WireguardPeer};

/// A peer that has not answered for so long is told of. A handshake is tried every five seconds.
const PATIENCE: Duration = Duration::from_secs(12);

type Who = (LinkName, PublicKey);

/// What is remembered.
#[derive(Default)]
pub(super) struct Memory {
    endpoints: HashMap<Who, SocketAddr>,
    silent: HashMap<Who, Instant>,
}

impl Memory {
    /// A peer that was told where it is, and is to be told the same again, may have roamed since: the kernel knows better. After a
    /// start of this program all are told once what their leases say.
    pub(super) fn let_roam(&self, facts: &mut Facts) {
        let roams: Vec<WireguardPeer> = peers(facts)
            .filter(|peer| {
                peer.endpoint.is_some() && self.endpoints.get(&who(peer)).copied() == peer.endpoint
            })
            .map(|peer| WireguardPeer { roams: true, ..peer.clone() })
            .collect();
        roams.into_iter().for_each(|peer| facts.set(Fact::WireguardPeer(Box::new(peer))));
    }

    /// The kernel was told all of this.
    pub(super) fn told(&mut self, facts: &Facts) {
        self.endpoints = peers(facts).filter_map(|peer| Some((who(peer), peer.endpoint?))).collect();
    }

    /// Findings about the peers of a plan that are silent now, and were for a while.
    pub(super) fn findings<'a>(
        &mut self,
        peers: impl Iterator<Item = &'a WireguardPeer>,
        silent: &[Who],
        now: Instant,
    ) -> Vec<Finding> {
        self.silent.retain(|who, _| silent.contains(who));
        for who in silent {
            self.silent.entry(*who).or_insert(now);
        }
        let is_due = |peer: &&WireguardPeer| {
            self.silent.get(&who(peer)).is_some_and(|since| now.duration_since(*since) >= PATIENCE)
        };
        peers.filter(is_due).map(finding).collect()
    }
}

fn finding(peer: &WireguardPeer) -> Finding {
    let subnets: Vec<_> = peer.allowed.iter().map(ToString::to_string).collect();
    let place = peer.endpoint.map_or_else(|| "nowhere".to_owned(), |endpoint| endpoint.to_string());
    Finding::new(Code::PEER_SILENT, format!("{} at {place} ({})", subnets.join(" "), peer.link))
}

fn who(peer: &WireguardPeer) -> Who {
    (peer.link, peer.key)
}

pub(super) fn peers(facts: &Facts) -> impl Iterator<Item = &WireguardPeer> {
    facts.iter().filter_map(|fact| match fact {
        Fact::WireguardPeer(peer) => Some(&**peer),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::peer_table::tests::tunnel;
    use super::*;

    fn facts(endpoint: &str) -> Facts {
        let tunnel = tunnel(9, &[(1, endpoint, &["10.100.2.0/24"])]);
        tunnel.peers.into_iter().map(|peer| Fact::WireguardPeer(Box::new(peer))).collect()
    }

    #[test]
    fn a_peer_roams_until_its_lease_names_another_place() {
        let mut memory = Memory::default();
        let roams = |memory: &Memory, endpoint: &str| {
            let mut facts = facts(endpoint);
            memory.let_roam(&mut facts);
            peers(&facts).all(|peer| peer.roams)
        };
        assert!(!roams(&memory, "192.0.2.1:51820"));
        memory.told(&facts("192.0.2.1:51820"));
        assert!(roams(&memory, "192.0.2.1:51820"));
        assert!(!roams(&memory, "192.0.2.2:51820"));
        memory.told(&Facts::default());
        assert!(!roams(&memory, "192.0.2.1:51820"));
    }

    #[test]
    fn silence_is_told_after_a_while_and_is_over_with_an_answer() {
        let (mut memory, start) = (Memory::default(), Instant::now());
        let facts = facts("192.0.2.1:51820");
        let silent: Vec<_> = peers(&facts).map(who).collect();
        let mut told = |silent: &[Who], after: u64| {
            memory.findings(peers(&facts), silent, start + Duration::from_secs(after))
        };
        assert_eq!(told(&silent, 0), []);
        assert_eq!(told(&silent, 11), []);
        let text = "10.100.2.0/24 at 192.0.2.1:51820 (flannel-wg)";
        assert_eq!(told(&silent, 12), [Finding::new(Code::PEER_SILENT, text)]);
        assert_eq!(told(&[], 13), []);
        assert_eq!(told(&silent, 14), []);
    }
}
