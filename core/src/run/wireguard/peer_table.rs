//! Who the peers of a device are: by index, by key, and by the addresses that are theirs.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;

use crate::words::addr::{Family, Prefix};
use crate::words::secret::Secret;
use crate::words::wireguard::{PublicKey, WireguardPeer, WireguardTunnel};

/// Handshakes that are taken in a second before their senders must show that they are where they say (its paper, §5.4.7). Each is
/// counted twice.
const HANDSHAKES: u64 = 2 * 200;
/// So often a new peer is greeted, until it answers...
const GREETINGS: u8 = 5;
/// ...and so long apart.
const GREETING: Duration = Duration::from_secs(1);

/// The device's own keys, and what keeps others from having it compute without end.
pub(super) struct Own {
    pub(super) secret: x25519::StaticSecret,
    pub(super) public: x25519::PublicKey,
    pub(super) limiter: Arc<RateLimiter>,
}

impl Own {
    pub(super) fn new(tunnel: &WireguardTunnel) -> Self {
        let secret = x25519::StaticSecret::from(*tunnel.device.key.reveal());
        let public = x25519::PublicKey::from(&secret);
        Self { limiter: Arc::new(RateLimiter::new(&public, HANDSHAKES)), secret, public }
    }
}

/// A peer.
pub(super) struct Peer {
    pub(super) told: WireguardPeer,
    state: Mutex<State>,
}

/// What changes of a peer with every packet.
pub(super) struct State {
    pub(super) session: Tunn,
    /// Where it spoke from last, or was said to be.
    pub(super) endpoint: Option<SocketAddr>,
    greetings: u8,
    greeted: Option<Instant>,
    /// Whether it was sent something, and whether a session was ever agreed on.
    pub(super) called: bool,
    pub(super) met: bool,
}

impl Peer {
    fn new(told: &WireguardPeer, own: &Own, index: u32) -> Self {
        let session = Tunn::new(
            own.secret.clone(),
            x25519::PublicKey::from(told.key.0),
            told.shared.as_ref().map(Secret::reveal).copied(),
            Some(told.keepalive).filter(|seconds| *seconds > 0),
            index,
            Some(own.limiter.clone()),
        );
        let state = State {
            session,
            endpoint: told.endpoint,
            greetings: GREETINGS,
            greeted: None,
            called: false,
            met: false,
        };
        Self { told: told.clone(), state: Mutex::new(state) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What its clock says is due now.
    pub(super) fn tick<'a>(&self, now: Instant, buffer: &'a mut [u8]) -> Option<(&'a [u8], SocketAddr)> {
        let state = &mut *self.state();
        let greets = !state.met
            && state.greetings > 0
            && state.greeted.is_none_or(|greeted| now.duration_since(greeted) >= GREETING);
        let due = if greets {
            state.greetings -= 1;
            state.greeted = Some(now);
            // The clock must run for what follows.
            let _ = state.session.update_timers(&mut [0; 256]);
            state.session.format_handshake_initiation(buffer, true)
        } else {
            state.session.update_timers(buffer)
        };
        match due {
            TunnResult::WriteToNetwork(packet) => Some((packet, state.endpoint?)),
            _ => None,
        }
    }

    /// Whether it was sent something and never agreed on a session.
    pub(super) fn is_silent(&self) -> bool {
        let state = self.state();
        state.called && !state.met
    }

    /// Whether the peer can go on as it is although it is told this now.
    fn serves(&self, told: &WireguardPeer) -> bool {
        self.told.key == told.key && self.told.shared == told.shared && self.told.keepalive == told.keepalive
    }
}

/// All peers of a device; replaced as a whole.
#[derive(Default)]
pub(super) struct Peers {
    /// The device's address, if it has one of IPv4.
    pub(super) address: Option<Ipv4Addr>,
    by_index: HashMap<u32, Arc<Peer>>,
    by_key: HashMap<PublicKey, u32>,
    routes: Routes,
    next: u32,
}

/// The index of a peer is the upper part of what its packets name.
const INDEX_SHIFT: u32 = 8;
const INDEX_MAX: u32 = (1 << 24) - 1;

impl Peers {
    /// As they are wanted now. Who stays keeps its session, and, unless it is told to be elsewhere, where it has roamed to.
    pub(super) fn of(tunnel: &WireguardTunnel, before: &Self, own: &Own) -> Self {
        let mut peers = Self { address: tunnel.address, next: before.next, ..Self::default() };
        for told in &tunnel.peers {
            let known =
                before.by_key.get(&told.key).and_then(|index| Some((*index, before.by_index.get(index)?)));
            let (index, peer) = match known {
                Some((index, peer)) if peer.told == *told => (index, peer.clone()),
                Some((index, peer)) if peer.serves(told) => (index, Arc::new(peer.moved(told, own, index))),
                _ => {
                    let index = peers.free(before);
                    (index, Arc::new(Peer::new(told, own, index)))
                }
            };
            for prefix in &told.allowed {
                peers.routes.add(prefix, index);
            }
            peers.by_key.insert(told.key, index);
            peers.by_index.insert(index, peer);
        }
        peers.routes.sort();
        peers
    }

    fn free(&mut self, before: &Self) -> u32 {
        loop {
            self.next = (self.next + 1) & INDEX_MAX;
            if !before.by_index.contains_key(&self.next) && !self.by_index.contains_key(&self.next) {
                return self.next;
            }
        }
    }

    /// Who has an address.
    pub(super) fn holder(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        self.by_index.get(&self.routes.find(address)?)
    }

    /// Whom a packet is for that names this session.
    pub(super) fn of_session(&self, session: u32) -> Option<&Arc<Peer>> {
        self.by_index.get(&(session >> INDEX_SHIFT))
    }

    pub(super) fn of_key(&self, key: &[u8; 32]) -> Option<&Arc<Peer>> {
        self.by_index.get(self.by_key.get(&PublicKey(*key))?)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_index.values()
    }
}

impl Peer {
    /// The same peer with the same session, told something else.
    fn moved(&self, told: &WireguardPeer, own: &Own, index: u32) -> Self {
        let fresh = Self::new(told, own, index);
        {
            let (mut old, mut new) = (self.state(), fresh.state());
            std::mem::swap(&mut old.session, &mut new.session);
            (new.greetings, new.greeted, new.called, new.met) =
                (old.greetings, old.greeted, old.called, old.met);
            if self.told.endpoint == told.endpoint {
                new.endpoint = old.endpoint;
            }
        }
        fresh
    }
}

/// Which addresses are whose: the longest prefix counts.
#[derive(Default)]
struct Routes {
    groups: Vec<Group>,
}

/// Prefixes of one family and length, sorted by their base.
struct Group {
    family: Family,
    len: u8,
    holders: Vec<(u128, u32)>,
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn mask(len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)
}

impl Routes {
    fn add(&mut self, prefix: &Prefix, index: u32) {
        let (family, len, holder) = (prefix.family(), prefix.len(), (bits(prefix.base()), index));
        match self.groups.iter_mut().find(|group| group.family == family && group.len == len) {
            Some(group) => group.holders.push(holder),
            None => self.groups.push(Group { family, len, holders: vec![holder] }),
        }
    }

    fn sort(&mut self) {
        self.groups.sort_unstable_by_key(|group| std::cmp::Reverse(group.len));
        self.groups.iter_mut().for_each(|group| group.holders.sort_unstable());
    }

    fn find(&self, address: IpAddr) -> Option<u32> {
        let (family, address) = (Family::of(address), bits(address));
        self.groups.iter().filter(|group| group.family == family).find_map(|group| {
            let base = address & mask(group.len);
            let at = group.holders.binary_search_by_key(&base, |(base, _)| *base).ok()?;
            group.holders.get(at).map(|(_, index)| *index)
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::words::name::LinkName;
    use crate::words::units::{Mtu, Port};
    use crate::words::wireguard::WireguardDevice;

    pub(in crate::run::wireguard) fn tunnel(secret: u8, peers: &[(u8, &str, &[&str])]) -> WireguardTunnel {
        let link = LinkName::new("flannel-wg").unwrap();
        let told = |(key, endpoint, allowed): &(u8, &str, &[&str])| WireguardPeer {
            link,
            key: super::super::public_key(&Secret::new([*key; 32])),
            shared: None,
            endpoint: endpoint.parse().ok(),
            roams: false,
            keepalive: 0,
            allowed: allowed.iter().map(|prefix| prefix.parse().unwrap()).collect(),
        };
        WireguardTunnel {
            device: WireguardDevice { link, key: Secret::new([secret; 32]), port: Port::WIREGUARD },
            address: Some(Ipv4Addr::new(10, 100, 1, 0)),
            mtu: Mtu::new(1420).unwrap(),
            peers: peers.iter().map(told).collect(),
        }
    }

    #[test]
    fn addresses_have_holders_and_the_longest_prefix_wins() {
        let tunnel = tunnel(
            9,
            &[
                (1, "192.0.2.1:51820", &["10.100.2.0/24", "fd42:cafe:0:2::/64"]),
                (2, "192.0.2.2:51820", &["10.100.2.128/25"]),
                (3, "192.0.2.3:51820", &["10.0.0.0/8", "fd42:cafe::/48"]),
            ],
        );
        let peers = Peers::of(&tunnel, &Peers::default(), &Own::new(&tunnel));
        let holder = |address: &str| {
            let peer = peers.holder(address.parse().unwrap())?;
            Some(peer.told.endpoint?.ip().to_string())
        };
        assert_eq!(holder("10.100.2.127").as_deref(), Some("192.0.2.1"));
        assert_eq!(holder("10.100.2.128").as_deref(), Some("192.0.2.2"));
        assert_eq!(holder("10.100.3.1").as_deref(), Some("192.0.2.3"));
        assert_eq!(holder("fd42:cafe:0:2::9").as_deref(), Some("192.0.2.1"));
        assert_eq!(holder("fd42:cafe:0:3::9").as_deref(), Some("192.0.2.3"));
        assert_eq!(holder("192.0.2.1"), None);
        assert_eq!(holder("a64:200::1"), None);
        assert!(Peers::default().holder("10.100.2.1".parse().unwrap()).is_none());
    }

    #[test]
    fn who_stays_keeps_its_session_and_its_place_and_who_moves_is_told() {
        let first = tunnel(
            9,
            &[(1, "192.0.2.1:51820", &["10.100.2.0/24"]), (2, "192.0.2.2:51820", &["10.100.3.0/24"])],
        );
        let own = Own::new(&first);
        let before = Peers::of(&first, &Peers::default(), &own);
        let find = |peers: &Peers, address: &str| peers.holder(address.parse().unwrap()).cloned();
        let roamed: SocketAddr = "198.51.100.7:1024".parse().unwrap();
        find(&before, "10.100.2.1").unwrap().state().endpoint = Some(roamed);
        find(&before, "10.100.3.1").unwrap().state().endpoint = Some(roamed);

        // Another subnet for the one, another address for the other, and a third.
        let second = tunnel(
            9,
            &[
                (1, "192.0.2.1:51820", &["10.100.7.0/24"]),
                (2, "192.0.2.22:51820", &["10.100.3.0/24"]),
                (3, "192.0.2.3:51820", &["10.100.4.0/24"]),
            ],
        );
        let after = Peers::of(&second, &before, &own);
        assert_eq!(find(&after, "10.100.7.1").unwrap().state().endpoint, Some(roamed));
        assert_eq!(find(&after, "10.100.3.1").unwrap().state().endpoint, "192.0.2.22:51820".parse().ok());
        assert!(find(&after, "10.100.2.1").is_none());
        let index = |peers: &Peers, key: u8| {
            let key = super::super::public_key(&Secret::new([key; 32]));
            *peers.by_key.get(&key).unwrap()
        };
        assert_eq!((index(&before, 1), index(&before, 2)), (index(&after, 1), index(&after, 2)));
        // Nothing changed: the very same.
        let again = Peers::of(&second, &after, &own);
        assert!(Arc::ptr_eq(&find(&after, "10.100.3.1").unwrap(), &find(&again, "10.100.3.1").unwrap()));
        // Another shared key is another session.
        let mut third = second.clone();
        third.peers[0].shared = Some(Secret::new([5; 32]));
        assert_ne!(index(&Peers::of(&third, &after, &own), 1), index(&after, 1));
    }
}
