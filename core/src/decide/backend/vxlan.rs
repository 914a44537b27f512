//! `vxlan`: the kernel's VXLAN with static entries, and plain routes to near peers if `DirectRouting` is on.
//!
//! **Shape** — one device per family; per peer a neighbor entry for the base address of its subnet, a forwarding entry for
//! its VtepMAC, and an on-link route through that base address. Peers never answer ARP for it.
//! **Source** — upstream pkg/backend/vxlan (`vxlan.go`, `device.go`, `vxlan_network.go`); RFC 7348.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, Value};

use crate::decide::scene::{Draft, Place, Scene};
use crate::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use crate::words::code::Code;
use crate::words::config::{NetworkConfig, VxlanConfig};
use crate::words::fact::{self, Address, Fact, Forward, Link, LinkKind, LinkModes, Neighbor, Sysctl};
use crate::words::lease::Advertisement;
use crate::words::name::{LinkName, NameError};
use crate::words::node::{Identity, Node};
use crate::words::territory::Territory;
use crate::words::units::{Mtu, OutOfRange, Overhead, Vni};

use super::{Backend, direct, metric, tunneled};

/// Packets in VXLAN.
pub(super) struct Vxlan {
    options: VxlanConfig,
}

/// `BackendData` as it is written: field order is upstream's.
#[derive(Serialize)]
struct Written {
    #[serde(rename = "VNI")]
    vni: Vni,
    #[serde(rename = "VtepMAC")]
    mac: Mac,
}

impl Backend for Vxlan {
    fn advertise(&self, config: &NetworkConfig, node: &Node) -> Advertisement {
        let data = |family: Family| {
            config.range(family)?;
            let written = Written { vni: self.options.vni, mac: mac(&node.identity, family) };
            serde_json::value::to_raw_value(&written).ok()
        };
        Advertisement { backend: "vxlan".into(), data: data(Family::V4), v6_data: data(Family::V6) }
    }

    /// The smallest of the enabled families': a dual-stack container has one MTU for both.
    fn mtu(&self, config: &NetworkConfig, node: &Node) -> Result<Mtu, OutOfRange> {
        [Family::V4, Family::V6]
            .into_iter()
            .filter(|family| config.range(*family).is_some())
            .map(|family| self.device_mtu(node, family))
            .try_fold(node.uplink.mtu, |least, mtu| Ok(least.min(mtu?)))
    }

    fn device(&self) -> [Option<LinkName>; 2] {
        [Family::V4, Family::V6].map(|family| self.name(family).ok())
    }

    fn plan(&self, scene: &Scene<'_>, draft: &mut Draft) {
        if let Some(mtu) = self.options.mtu.filter(|mtu| *mtu > scene.node.uplink.mtu) {
            let uplink = &scene.node.uplink;
            let text = format!("MTU is {mtu}, {} has {}, which is used", uplink.link, uplink.mtu);
            draft.find(Code::MTU_ABOVE_UPLINK, text);
        }
        for family in scene.families() {
            self.plan_family(scene, family, draft);
        }
    }
}

impl Vxlan {
    pub(super) fn new(options: VxlanConfig) -> Self {
        Self { options }
    }

    /// The kernel refuses a device that is larger than its underlay allows (drivers/net/vxlan/vxlan_core.c
    /// `vxlan_change_mtu`), so a larger `MTU` in the config cannot be had.
    fn device_mtu(&self, node: &Node, family: Family) -> Result<Mtu, OutOfRange> {
        let underlay = self.options.mtu.unwrap_or(node.uplink.mtu).min(node.uplink.mtu);
        underlay.less(match family {
            Family::V4 => Overhead::VXLAN_OVER_V4,
            Family::V6 => Overhead::VXLAN_OVER_V6,
        })
    }

    /// Upstream's names. The longest VNIs make one that the kernel does not take.
    fn name(&self, family: Family) -> Result<LinkName, NameError> {
        match family {
            Family::V4 => LinkName::new(&format!("flannel.{}", self.options.vni)),
            Family::V6 => LinkName::new(&format!("flannel-v6.{}", self.options.vni)),
        }
    }

    fn plan_family(&self, scene: &Scene<'_>, family: Family, draft: &mut Draft) {
        let (Some(own), Some(public)) = (scene.own.subnets.of(family), scene.own.value.public(family)) else {
            draft.find(Code::UPLINK_ABSENT, format!("no public address for {}", scene.own.subnets));
            return;
        };
        // Behind NAT the public address is not this host's, and the kernel sends nothing from an address it does not have.
        let local = scene.node.uplink.address(family).unwrap_or(public);
        let device = match self.name(family) {
            Ok(device) => device,
            Err(error) => {
                draft.find(Code::CONFIG_BROKEN, format!("VNI is {}: {error}", self.options.vni));
                return;
            }
        };
        draft.add(Fact::Link(Box::new(Link {
            name: device,
            kind: LinkKind::Vxlan(fact::Vxlan {
                vni: self.options.vni,
                port: self.options.port,
                local,
                underlay: scene.node.uplink.link,
                learning: self.options.learning,
                gbp: self.options.gbp,
            }),
            // There is one, or there would be no plan: see [`Backend::mtu`].
            mtu: self.device_mtu(scene.node, family).ok(),
            mac: Some(mac(&scene.node.identity, family)),
            alias: Some(Territory::alias_of(scene.network)),
            up: true,
            modes: LinkModes::default(),
        })));
        if scene.node.ipv6 {
            let path = format!("net/ipv6/conf/{device}/accept_ra");
            draft.add(Fact::Sysctl(Sysctl { link: Some(device), path, value: "0".into() }));
        }
        if family == Family::V6 {
            // Hosts whose new interfaces get no IPv6 are many.
            let path = format!("net/ipv6/conf/{device}/disable_ipv6");
            draft.add(Fact::Sysctl(Sysctl { link: Some(device), path, value: "0".into() }));
        }
        if let Ok(address) = InterfaceAddress::new(own.base(), family.bits()) {
            draft.add(Fact::Address(Address {
                link: device,
                address,
                no_prefix_route: false,
                detect_duplicates: false,
            }));
        }
        self.plan_peers(scene, family, device, draft);
    }

    fn plan_peers(&self, scene: &Scene<'_>, family: Family, device: LinkName, draft: &mut Draft) {
        let places = scene.places(family, draft);
        let count = places.len().max(scene.crowd);
        // None is this host.
        let mut macs = HashMap::with_capacity(places.len() + 1);
        macs.insert(mac(&scene.node.identity, family), None);
        for place in places {
            let metric = metric(&place.subnet, count);
            if self.options.direct_routing && scene.node.reaches_directly(place.public) {
                draft.add(direct(scene.node, &place, metric));
                continue;
            }
            let mac = match place.data.map_or(Err("there is no BackendData"), vtep_mac) {
                Ok(mac) => mac,
                Err(cause) => {
                    draft.find(Code::PEER_DATA, format!("{} of {}: {cause}", place.subnet, place.public));
                    continue;
                }
            };
            match macs.get(&mac) {
                // Another subnet of the same host.
                Some(Some((_, public))) if *public == place.public => {}
                Some(first) => {
                    let first = first.map_or_else(
                        || "this host".to_owned(),
                        |first: (Prefix, IpAddr)| format!("{} of {}", first.0, first.1),
                    );
                    let text = format!("{} of {} has {mac}, as {first} has", place.subnet, place.public);
                    draft.find(Code::VTEP_MAC_SHARED, text);
                    continue;
                }
                None => drop(macs.insert(mac, Some((place.subnet, place.public)))),
            }
            tunnel(device, &place, mac, metric).into_iter().for_each(|fact| draft.add(fact));
        }
    }
}

fn mac(identity: &Identity, family: Family) -> Mac {
    match family {
        Family::V4 => identity.vtep_mac,
        Family::V6 => identity.vtep_mac_v6,
    }
}

fn tunnel(device: LinkName, place: &Place<'_>, mac: Mac, metric: u32) -> [Fact; 3] {
    let gateway = place.subnet.base();
    [
        Fact::Neighbor(Neighbor { link: device, ip: gateway, mac }),
        Fact::Forward(Forward { link: device, mac, remote: place.public }),
        tunneled(device, place.subnet, gateway, metric),
    ]
}

/// Reads a peer's `BackendData`: keys in any case as Go matches them, the VNI is the peer's own business.
fn vtep_mac(data: &RawValue) -> Result<Mac, &'static str> {
    let Read(found) = serde_json::from_str(data.get()).map_err(|_| "BackendData is not a JSON object")?;
    let found = found.as_ref().and_then(Value::as_str).ok_or("BackendData has no VtepMAC")?;
    let mac: Mac = found.parse().map_err(|_| "its VtepMAC is not a MAC address")?;
    // The zero address is the kernel's entry for unknown destinations, the group bit marks multicast.
    if mac.0 == [0; 6] || mac.0[0] & 1 == 1 {
        return Err("its VtepMAC is not the address of one host");
    }
    Ok(mac)
}

/// An object's `VtepMAC`, whatever it is. Thousands are read for each plan, so nothing else of them is kept.
struct Read(Option<Value>);

impl<'de> Deserialize<'de> for Read {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Read;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Read, A::Error> {
                let mut found = None;
                while let Some(key) = fields.next_key::<Cow<'_, str>>()? {
                    match key.eq_ignore_ascii_case("VtepMAC") {
                        true => found = Some(fields.next_value()?),
                        false => drop(fields.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(Read(found))
            }
        }

        deserializer.deserialize_map(Fields)
    }
}
