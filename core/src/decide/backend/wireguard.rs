//! `wireguard`: encrypted packets in UDP, by the kernel's WireGuard, or by this program where the kernel has none.
//!
//! **Shape** — a device for each family, or one for both (`Mode`); each holds the base address of our subnet, the route to the
//! whole network, and a peer for each lease, which may send from its subnets and is sent what is for them.
//! **Source** — upstream pkg/backend/wireguard (`wireguard.go`, `wireguard_network.go`, `device.go`).

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::decide::scene::{Draft, Peer, Scene};
use crate::words::addr::{Family, InterfaceAddress};
use crate::words::code::Code;
use crate::words::config::{NetworkConfig, WireguardConfig, WireguardMode};
use crate::words::fact::{
    Address, Fact, Link, LinkKind, LinkModes, Route, RouteExtras, RouteProtocol, RouteScope, Sysctl,
};
use crate::words::lease::Advertisement;
use crate::words::name::LinkName;
use crate::words::node::Node;
use crate::words::territory::Territory;
use crate::words::units::{Mtu, OutOfRange, Overhead, Port};
use crate::words::wireguard::{
    KeyPair, PublicKey, WireguardDevice, WireguardPeer, WireguardTunnel, is_private,
};

use super::{Backend, V6_METRIC};

/// Packets in WireGuard.
pub(super) struct Wireguard {
    options: WireguardConfig,
}

/// `BackendData` as it is written: field order is upstream's.
#[derive(Serialize)]
struct Written {
    #[serde(rename = "PublicKey")]
    key: String,
    #[serde(rename = "Port")]
    port: u16,
}

/// A device, and whose packets it carries.
struct Device {
    link: LinkName,
    families: Vec<Family>,
    port: Port,
}

impl Backend for Wireguard {
    /// The port is the one where the device really listens. Go's flanneld names `ListenPortV6` for IPv6 also where one device
    /// listens for both.
    fn advertise(&self, config: &NetworkConfig, node: &Node) -> Advertisement {
        let data = |family: Family| {
            config.range(family)?;
            let key = node.identity.wireguard.as_ref()?.public.to_string();
            let written = Written { key, port: self.port(family).number() };
            serde_json::value::to_raw_value(&written).ok()
        };
        Advertisement { backend: "wireguard".into(), data: data(Family::V4), v6_data: data(Family::V6) }
    }

    /// As upstream has it, whatever the outer family: a peer may be reached by the other one tomorrow.
    fn mtu(&self, _: &NetworkConfig, node: &Node) -> Result<Mtu, OutOfRange> {
        self.options.mtu.unwrap_or(node.uplink.mtu).min(node.uplink.mtu).less(Overhead::WIREGUARD)
    }

    fn plan(&self, scene: &Scene<'_>, draft: &mut Draft) {
        let uplink = &scene.node.uplink;
        if let Some(mtu) = self.options.mtu.filter(|mtu| *mtu > uplink.mtu) {
            let text = format!("MTU is {mtu}, {} has {}, which is used", uplink.link, uplink.mtu);
            draft.find(Code::MTU_ABOVE_UPLINK, text);
        }
        // Loaded before anything is planned with this backend.
        let Some(keys) = &scene.node.identity.wireguard else { return };
        for device in self.devices(scene) {
            self.plan_device(scene, &device, keys, draft);
        }
    }
}

impl Wireguard {
    pub(super) fn new(options: WireguardConfig) -> Self {
        Self { options }
    }

    fn is_separate(&self) -> bool {
        self.options.mode == WireguardMode::Separate
    }

    fn port(&self, family: Family) -> Port {
        match family {
            Family::V6 if self.is_separate() => self.options.port_v6,
            Family::V4 | Family::V6 => self.options.port,
        }
    }

    fn devices(&self, scene: &Scene<'_>) -> Vec<Device> {
        let device = |name: Family, families: Vec<Family>| Device {
            link: scene.network.wireguard(name),
            families,
            port: self.port(name),
        };
        let families: Vec<_> = scene.families().collect();
        match self.is_separate() {
            true => families.into_iter().map(|family| device(family, vec![family])).collect(),
            false => vec![device(Family::V4, families)],
        }
    }

    fn plan_device(&self, scene: &Scene<'_>, device: &Device, keys: &KeyPair, draft: &mut Draft) {
        // There is one, or there would be no plan: see [`Backend::mtu`].
        let Ok(mtu) = self.mtu(scene.config, scene.node) else { return };
        let link = device.link;
        let peers = self.peers(scene, device, keys, draft);
        let itself = WireguardDevice { link, key: keys.secret.clone(), port: device.port };
        let kernel = scene.node.wireguard;
        draft.add(Fact::Link(Box::new(Link {
            name: link,
            kind: if kernel { LinkKind::Wireguard } else { LinkKind::Given },
            mtu: Some(mtu),
            mac: None,
            alias: Some(Territory::alias_of(scene.network)),
            up: true,
            modes: LinkModes::default(),
        })));
        device.families.iter().for_each(|family| plan_family(scene, link, *family, draft));
        if kernel {
            draft.add(Fact::WireguardDevice(itself));
            peers.into_iter().for_each(|peer| draft.add(Fact::WireguardPeer(Box::new(peer))));
            return;
        }
        let address = match scene.own.subnets.v4().map(|own| own.base()) {
            Some(IpAddr::V4(base)) if device.families.contains(&Family::V4) => Some(base),
            _ => None,
        };
        if address.is_some() {
            // ICMP errors come out of the device with the device's own address, which only our own packets have there.
            let path = format!("net/ipv4/conf/{link}/accept_local");
            draft.add(Fact::Sysctl(Sysctl { link: Some(link), path, value: "1".into() }));
        }
        draft.wireguard.push(WireguardTunnel { device: itself, address, mtu, peers });
    }

    fn peers(
        &self,
        scene: &Scene<'_>,
        device: &Device,
        keys: &KeyPair,
        draft: &mut Draft,
    ) -> Vec<WireguardPeer> {
        let mut holders = HashMap::from([(keys.public, "this host".to_owned())]);
        let mut peers = Vec::with_capacity(scene.peers.len());
        for lease in &scene.peers {
            let subnets = device.families.iter().filter_map(|family| lease.subnets.of(*family));
            let allowed: BTreeSet<_> = subnets.collect();
            if allowed.is_empty() {
                continue;
            }
            if self.is_separate() && device.families == [Family::V6] && has_one_device(lease) {
                let text = format!("{lease} has one WireGuard device for both families, this host two");
                draft.find(Code::PEER_OTHER_BACKEND, text);
                continue;
            }
            let (key, endpoint) = match self.reach(scene, device, lease) {
                Ok(reached) => reached,
                Err(cause) => {
                    draft.find(Code::PEER_DATA, format!("{lease}: {cause}"));
                    continue;
                }
            };
            if let Some(first) = holders.get(&key) {
                draft.find(Code::WIREGUARD_KEY_SHARED, format!("{lease} has the key of {first}, {key}"));
                continue;
            }
            holders.insert(key, lease.to_string());
            let (shared, keepalive) = (self.options.shared.clone(), self.options.keepalive);
            let (link, endpoint, roams) = (device.link, Some(endpoint), false);
            peers.push(WireguardPeer { link, key, shared, endpoint, roams, keepalive, allowed });
        }
        peers
    }

    /// A peer's key, and where it is.
    fn reach(
        &self,
        scene: &Scene<'_>,
        device: &Device,
        lease: &Peer<'_>,
    ) -> Result<(PublicKey, SocketAddr), String> {
        let advertisement = &lease.value.advertisement;
        let (v4, v6) = (advertisement.data.as_deref(), advertisement.v6_data.as_deref());
        // Where one device listens for both, Go's flanneld says where only in the data for IPv4.
        let data = match device.families[..] {
            [Family::V6] => v6.or_else(|| v4.filter(|_| !self.is_separate())),
            _ => v4.or_else(|| v6.filter(|_| !self.is_separate())),
        };
        let (key, port) = data.map_or(Err("there is no BackendData"), read)?;
        let public = |family| scene.reachable(lease, family);
        let address = match (self.options.mode, &device.families[..]) {
            (WireguardMode::Separate, [family, ..]) => public(*family),
            (WireguardMode::Ipv4, _) => public(Family::V4),
            (WireguardMode::Ipv6, _) => public(Family::V6),
            _ => {
                let own = |family| scene.own.value.public(family);
                choose([public(Family::V4), public(Family::V6)], [own(Family::V4), own(Family::V6)])
            }
        };
        let address =
            address.ok_or("it has no public address that a packet of this network can be sent to")?;
        Ok((key, SocketAddr::new(address, port.unwrap_or(device.port).number())))
    }
}

/// Whether a peer says for both families that it listens on the same port: it has another `Mode`. All devices of a host have one key. To
/// greet the one from both of ours would make sessions across: each end has one, neither takes what comes by it, and so they stay.
fn has_one_device(lease: &Peer<'_>) -> bool {
    let port = |data: &Option<Box<RawValue>>| read(data.as_deref()?).ok()?.1;
    let (v4, v6) = (port(&lease.value.advertisement.data), port(&lease.value.advertisement.v6_data));
    v4.is_some() && v4 == v6
}

/// `Mode` auto: IPv4 where that leads anywhere, else IPv6 if it does on both ends, else IPv4. IPv4 before IPv6 in both arrays.
fn choose(peer: [Option<IpAddr>; 2], own: [Option<IpAddr>; 2]) -> Option<IpAddr> {
    let ([v4, v6], [own_v4, own_v6]) = (peer, own);
    let is_global = |address: Option<IpAddr>| address.is_some_and(|address| !is_private(address));
    if v4.is_none() || (own_v4.is_none() && own_v6.is_some()) {
        return v6.or(v4);
    }
    if v6.is_none() || is_global(v4) {
        return v4;
    }
    if is_global(v6) && is_global(own_v6) { v6 } else { v4 }
}

fn plan_family(scene: &Scene<'_>, link: LinkName, family: Family, draft: &mut Draft) {
    let (Some(own), Some(range)) = (scene.own.subnets.of(family), scene.config.range(family)) else { return };
    if family == Family::V6 {
        // Hosts whose new interfaces get no IPv6 are many.
        let path = format!("net/ipv6/conf/{link}/disable_ipv6");
        draft.add(Fact::Sysctl(Sysctl { link: Some(link), path, value: "0".into() }));
    }
    if let Ok(address) = InterfaceAddress::new(own.base(), family.bits()) {
        let (no_prefix_route, detect_duplicates) = (false, false);
        draft.add(Fact::Address(Address { link, address, no_prefix_route, detect_duplicates }));
    }
    draft.add(Fact::Route(Route {
        destination: range.cidr,
        via: None,
        link,
        onlink: false,
        // IPv6 has no scopes, and always a metric.
        metric: if family == Family::V6 { V6_METRIC } else { 0 },
        scope: if family == Family::V6 { RouteScope::Global } else { RouteScope::Link },
        source: None,
        protocol: RouteProtocol::BOOT,
        extras: RouteExtras::default(),
    }));
}

/// Reads a peer's `BackendData`, keys in any case as Go matches them: its key, and its port, which leases of old versions do not
/// have.
fn read(data: &RawValue) -> Result<(PublicKey, Option<Port>), &'static str> {
    let fields: HashMap<String, Value> =
        serde_json::from_str(data.get()).map_err(|_| "BackendData is not a JSON object")?;
    let field =
        |name: &str| fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value);
    let key = field("PublicKey").and_then(Value::as_str).ok_or("BackendData has no PublicKey")?;
    let key = key.parse().map_err(|_| "its PublicKey is no WireGuard key")?;
    let port = match field("Port") {
        None | Some(Value::Null) => None,
        Some(value) => match value.as_u64().ok_or("its Port is no number")? {
            0 => None,
            number => Some(Port::new(number).map_err(|_| "its Port is no port")?),
        },
    };
    Ok((key, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_prefers_what_leads_somewhere() {
        let ip = |text: &str| (!text.is_empty()).then(|| text.parse::<IpAddr>().unwrap());
        for (peer, own, chosen) in [
            // As upstream's four rules have it.
            (["10.1.0.2", ""], ["10.1.0.1", "2001:db8::1"], "10.1.0.2"),
            (["192.0.2.2", "2001:db8::2"], ["10.1.0.1", "2001:db8::1"], "192.0.2.2"),
            (["10.1.0.2", "2001:db8::2"], ["10.1.0.1", "2001:db8::1"], "2001:db8::2"),
            (["10.1.0.2", "fd00::2"], ["10.1.0.1", "2001:db8::1"], "10.1.0.2"),
            (["10.1.0.2", "2001:db8::2"], ["10.1.0.1", "fd00::1"], "10.1.0.2"),
            (["10.1.0.2", "2001:db8::2"], ["10.1.0.1", ""], "10.1.0.2"),
            // Where there is no IPv4 at one of the ends.
            (["", "fd00::2"], ["", "fd00::1"], "fd00::2"),
            (["10.1.0.2", "fd00::2"], ["", "fd00::1"], "fd00::2"),
            (["", ""], ["10.1.0.1", "fd00::1"], ""),
        ] {
            assert_eq!(choose(peer.map(ip), own.map(ip)), ip(chosen), "{peer:?} {own:?}");
        }
    }

    #[test]
    fn data_of_peers_is_read_as_go_reads_it() {
        let key = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
        let read = |json: &str| super::read(&RawValue::from_string(json.to_owned()).unwrap());
        let port = |json: &str| read(json).unwrap().1.map(Port::number);
        assert_eq!(port(&format!(r#"{{"PublicKey":"{key}","Port":51821}}"#)), Some(51_821));
        assert_eq!(port(&format!(r#"{{"publickey":"{key}","port":0}}"#)), None);
        assert_eq!(port(&format!(r#"{{"PublicKey":"{key}"}}"#)), None);
        assert_eq!(read(&format!(r#"{{"PublicKey":"{key}"}}"#)).unwrap().0, PublicKey([7; 32]));
        for wrong in [
            "null".to_owned(),
            "{}".to_owned(),
            r#"{"PublicKey":"abc"}"#.to_owned(),
            format!(r#"{{"PublicKey":"{key}","Port":"51820"}}"#),
            format!(r#"{{"PublicKey":"{key}","Port":70000}}"#),
        ] {
            assert!(read(&wrong).is_err(), "{wrong}");
        }
    }
}
