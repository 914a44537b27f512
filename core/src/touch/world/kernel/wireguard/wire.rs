//! Messages of the generic netlink family "wireguard".
//!
//! **Source** — uapi/linux/wireguard.h, uapi/linux/genetlink.h; the layout of addresses is uapi/linux/in.h and in6.h.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use netlink_packet_core::NetlinkSerializable;

use crate::touch::world::kernel::netlink::{attributes, ip_of, u32_at};
use crate::words::addr::Prefix;
use crate::words::fact::Fact;
use crate::words::name::LinkName;
use crate::words::secret::Secret;
use crate::words::units::Port;
use crate::words::wireguard::{KEY_BYTES, PublicKey, SecretKey, WireguardDevice, WireguardPeer};

/// The family that knows the numbers of the others.
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const WG_CMD_GET_DEVICE: u8 = 0;
const WG_CMD_SET_DEVICE: u8 = 1;
const WG_GENL_VERSION: u8 = 1;

const WGDEVICE_A_IFINDEX: u16 = 1;
const WGDEVICE_A_IFNAME: u16 = 2;
const WGDEVICE_A_PRIVATE_KEY: u16 = 3;
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_PEERS: u16 = 8;

const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_PRESHARED_KEY: u16 = 2;
const WGPEER_A_FLAGS: u16 = 3;
const WGPEER_A_ENDPOINT: u16 = 4;
const WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL: u16 = 5;
const WGPEER_A_LAST_HANDSHAKE_TIME: u16 = 6;
const WGPEER_A_TX_BYTES: u16 = 8;
const WGPEER_A_ALLOWEDIPS: u16 = 9;
const WGPEER_F_REMOVE_ME: u32 = 1;
const WGPEER_F_REPLACE_ALLOWEDIPS: u32 = 2;

const WGALLOWEDIP_A_FAMILY: u16 = 1;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

const NLA_F_NESTED: u16 = 0x8000;
/// `struct genlmsghdr`
const HEADER: usize = 4;

/// A message on its way to the kernel.
pub(super) struct Message {
    kind: u16,
    bytes: Vec<u8>,
    /// Peers, which follow everything else.
    peers: Vec<u8>,
    count: u16,
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len() + if self.count > 0 { 4 + self.peers.len() } else { 0 }
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let mut bytes = self.bytes.clone();
        if self.count > 0 {
            put(&mut bytes, WGDEVICE_A_PEERS | NLA_F_NESTED, &self.peers);
        }
        buffer.copy_from_slice(&bytes);
    }
}

/// Appends an attribute.
fn put(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend(((4 + value.len()) as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

impl Message {
    fn new(kind: u16, command: u8, version: u8) -> Self {
        Self { kind, bytes: vec![command, version, 0, 0], peers: Vec::new(), count: 0 }
    }

    /// Which number does the family have?
    pub(super) fn family() -> Self {
        let mut message = Self::new(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1);
        put(&mut message.bytes, CTRL_ATTR_FAMILY_NAME, b"wireguard\0");
        message
    }

    /// What is the device told?
    pub(super) fn get(family: u16, index: u32) -> Self {
        let mut message = Self::new(family, WG_CMD_GET_DEVICE, WG_GENL_VERSION);
        put(&mut message.bytes, WGDEVICE_A_IFINDEX, &index.to_ne_bytes());
        message
    }

    /// Tells a device something; nothing yet.
    pub(super) fn set(family: u16, link: LinkName) -> Self {
        let mut message = Self::new(family, WG_CMD_SET_DEVICE, WG_GENL_VERSION);
        put(&mut message.bytes, WGDEVICE_A_IFNAME, format!("{link}\0").as_bytes());
        message
    }

    /// Its own key and port.
    pub(super) fn device(&mut self, device: &WireguardDevice) {
        put(&mut self.bytes, WGDEVICE_A_PRIVATE_KEY, device.key.reveal());
        put(&mut self.bytes, WGDEVICE_A_LISTEN_PORT, &device.port.number().to_ne_bytes());
    }

    /// A peer goes.
    pub(super) fn remove(&mut self, key: &PublicKey) {
        let mut peer = Vec::new();
        put(&mut peer, WGPEER_A_PUBLIC_KEY, &key.0);
        put(&mut peer, WGPEER_A_FLAGS, &WGPEER_F_REMOVE_ME.to_ne_bytes());
        self.nest(&peer);
    }

    /// A peer as it should be. Of one that is there only what differs is said.
    pub(super) fn peer(&mut self, new: &WireguardPeer, old: Option<&WireguardPeer>) {
        let mut peer = Vec::new();
        let differs = |same: &dyn Fn(&WireguardPeer) -> bool| old.is_none_or(|old| !same(old));
        put(&mut peer, WGPEER_A_PUBLIC_KEY, &new.key.0);
        if differs(&|old| old.shared == new.shared) {
            let shared = new.shared.as_ref().map_or([0; KEY_BYTES], |shared| *shared.reveal());
            put(&mut peer, WGPEER_A_PRESHARED_KEY, &shared);
        }
        if let Some(endpoint) = new.endpoint.filter(|_| differs(&|old| new.is_at(old.endpoint))) {
            put(&mut peer, WGPEER_A_ENDPOINT, &socket_address(endpoint));
        }
        if differs(&|old| old.keepalive == new.keepalive) {
            put(&mut peer, WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, &new.keepalive.to_ne_bytes());
        }
        if differs(&|old| old.allowed == new.allowed) {
            put(&mut peer, WGPEER_A_FLAGS, &WGPEER_F_REPLACE_ALLOWEDIPS.to_ne_bytes());
            let mut allowed = Vec::new();
            for (n, prefix) in new.allowed.iter().enumerate() {
                put(&mut allowed, n as u16 | NLA_F_NESTED, &allowed_ip(prefix));
            }
            put(&mut peer, WGPEER_A_ALLOWEDIPS | NLA_F_NESTED, &allowed);
        }
        self.nest(&peer);
    }

    fn nest(&mut self, peer: &[u8]) {
        put(&mut self.peers, self.count | NLA_F_NESTED, peer);
        self.count += 1;
    }

    pub(super) fn peers_len(&self) -> usize {
        self.peers.len()
    }
}

fn allowed_ip(prefix: &Prefix) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (family, address) = match prefix.base() {
        IpAddr::V4(v4) => (libc::AF_INET as u16, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6 as u16, v6.octets().to_vec()),
    };
    put(&mut bytes, WGALLOWEDIP_A_FAMILY, &family.to_ne_bytes());
    put(&mut bytes, WGALLOWEDIP_A_IPADDR, &address);
    put(&mut bytes, WGALLOWEDIP_A_CIDR_MASK, &[prefix.len()]);
    bytes
}

/// `struct sockaddr_in`, `struct sockaddr_in6`
fn socket_address(endpoint: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    match endpoint {
        SocketAddr::V4(v4) => {
            bytes.extend((libc::AF_INET as u16).to_ne_bytes());
            bytes.extend(v4.port().to_be_bytes());
            bytes.extend(v4.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(v6) => {
            bytes.extend((libc::AF_INET6 as u16).to_ne_bytes());
            bytes.extend(v6.port().to_be_bytes());
            bytes.extend(v6.flowinfo().to_ne_bytes());
            bytes.extend(v6.ip().octets());
            bytes.extend(v6.scope_id().to_ne_bytes());
        }
    }
    bytes
}

fn endpoint_of(bytes: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match i32::from(u16_of(bytes)?) {
        libc::AF_INET => {
            let address: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
            Some((Ipv4Addr::from(address), port).into())
        }
        libc::AF_INET6 => {
            let address: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            let (flow, scope) = (u32_at(bytes, 4)?, u32_at(bytes, 24)?);
            Some(SocketAddrV6::new(Ipv6Addr::from(address), port, flow, scope).into())
        }
        _ => None,
    }
}

fn u16_of(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.first_chunk()?))
}

/// A key of which the kernel says that there is one: all zeros is none.
fn key_of(bytes: &[u8]) -> Option<SecretKey> {
    let key: [u8; KEY_BYTES] = bytes.try_into().ok()?;
    (key != [0; KEY_BYTES]).then(|| Secret::new(key))
}

/// The number of the family.
pub(super) fn family(kind: u16, body: &[u8]) -> Option<u16> {
    let mut found = attributes(body.get(HEADER..)?).filter(|_| kind == GENL_ID_CTRL);
    found.find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID).and_then(|(_, value)| u16_of(value))
}

/// What the kernel said of a device, over all messages.
pub(super) struct Said {
    link: LinkName,
    key: Option<SecretKey>,
    port: Option<Port>,
    peers: BTreeMap<PublicKey, SaidPeer>,
}

#[derive(Default)]
struct SaidPeer {
    shared: Option<SecretKey>,
    endpoint: Option<SocketAddr>,
    keepalive: u16,
    allowed: BTreeSet<Prefix>,
    sent: bool,
    met: bool,
}

impl Said {
    pub(super) fn new(link: LinkName) -> Self {
        Self { link, key: None, port: None, peers: BTreeMap::new() }
    }

    /// Takes one message.
    pub(super) fn read(&mut self, body: &[u8]) {
        for (kind, value) in attributes(body.get(HEADER..).unwrap_or_default()) {
            match kind & !NLA_F_NESTED {
                WGDEVICE_A_PRIVATE_KEY => self.key = key_of(value),
                WGDEVICE_A_LISTEN_PORT => {
                    self.port = u16_of(value).and_then(|port| Port::new(port.into()).ok());
                }
                WGDEVICE_A_PEERS => attributes(value).for_each(|(_, peer)| self.read_peer(peer)),
                _ => {}
            }
        }
    }

    /// A peer, or what did not fit of the one before.
    fn read_peer(&mut self, bytes: &[u8]) {
        let key = attributes(bytes).find(|(kind, _)| *kind == WGPEER_A_PUBLIC_KEY);
        let Some(key) = key.and_then(|(_, key)| <[u8; KEY_BYTES]>::try_from(key).ok()) else { return };
        let peer = self.peers.entry(PublicKey(key)).or_default();
        let is_some = |value: &[u8]| value.iter().any(|byte| *byte != 0);
        for (kind, value) in attributes(bytes) {
            match kind & !NLA_F_NESTED {
                WGPEER_A_PRESHARED_KEY => peer.shared = key_of(value),
                WGPEER_A_ENDPOINT => peer.endpoint = endpoint_of(value),
                WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL => peer.keepalive = u16_of(value).unwrap_or(0),
                WGPEER_A_LAST_HANDSHAKE_TIME => peer.met = is_some(value),
                WGPEER_A_TX_BYTES => peer.sent = is_some(value),
                WGPEER_A_ALLOWEDIPS => {
                    peer.allowed.extend(attributes(value).filter_map(|(_, ip)| prefix_of(ip)));
                }
                _ => {}
            }
        }
    }

    /// Peers that were sent something and never agreed on a session.
    pub(super) fn silent(&self) -> impl Iterator<Item = PublicKey> {
        self.peers.iter().filter(|(_, peer)| peer.sent && !peer.met).map(|(key, _)| *key)
    }

    pub(super) fn into_facts(self) -> impl Iterator<Item = Fact> {
        let Self { link, key, port, peers } = self;
        let device =
            key.zip(port).map(|(key, port)| Fact::WireguardDevice(WireguardDevice { link, key, port }));
        let peers = peers.into_iter().map(move |(key, peer)| {
            let SaidPeer { shared, endpoint, keepalive, allowed, .. } = peer;
            let roams = false;
            Fact::WireguardPeer(Box::new(WireguardPeer {
                link,
                key,
                shared,
                endpoint,
                roams,
                keepalive,
                allowed,
            }))
        });
        device.into_iter().chain(peers)
    }
}

fn prefix_of(bytes: &[u8]) -> Option<Prefix> {
    let (mut address, mut len) = (None, None);
    for (kind, value) in attributes(bytes) {
        match kind {
            WGALLOWEDIP_A_IPADDR => address = ip_of(value),
            WGALLOWEDIP_A_CIDR_MASK => len = value.first().copied(),
            _ => {}
        }
    }
    Prefix::containing(address?, len?).ok()
}

#[cfg(test)]
mod tests;
