//! What a bridge configuration asks for, be it a `bridge` plugin's own or flannel's `delegate`
//! (upstream: containernetworking/plugins plugins/main/bridge/bridge.go `NetConf`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel_core::decide::endpoint::{EndpointOptions, EndpointVlans};
use flannel_core::words::addr::Mac;
use flannel_core::words::fact::VlanMember;
use flannel_core::words::name::LinkName;
use flannel_core::words::units::Mtu;
use serde_json::Value;

use crate::args::CniArgs;
use crate::conf::Conf;
use crate::json::{Object, asked, flag, list, number, object, text};
use crate::result::CniError;

/// What is asked of the bridge and the endpoint.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Wish {
    /// A bridge by name.
    pub(crate) bridge: Option<LinkName>,
    /// Instead of the network's.
    pub(crate) mtu: Option<Mtu>,
    /// Whether what leaves the network gets the node's address; none if nothing is said.
    pub(crate) ip_masq: Option<bool>,
    /// Whether the bridge has the gateway's address; none if nothing is said.
    pub(crate) gateway: Option<bool>,
    pub(crate) default_gateway: bool,
    pub(crate) hairpin: bool,
    /// The bridge takes frames that are not for it.
    pub(crate) promiscuous: bool,
    /// Take other addresses off the bridge.
    pub(crate) force_address: bool,
    /// Nothing passes between this endpoint and others that are isolated.
    pub(crate) isolated: bool,
    /// The one VLAN that the endpoint, and its gateway, are in.
    pub(crate) vlan: Option<u16>,
    /// VLANs that the endpoint gets with their tags.
    pub(crate) trunk: Vec<u16>,
    /// Not in VLAN 1 beside those.
    pub(crate) not_default_vlan: bool,
    /// What the endpoint sends from another MAC than its own is dropped.
    pub(crate) guarded: bool,
    /// IPv6 addresses wait for objections.
    pub(crate) detect_duplicates: bool,
    /// The container's interface is left down.
    pub(crate) down: bool,
    pub(crate) dns: Object,
    /// These addresses and no others.
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) mac: Option<Mac>,
}

impl Wish {
    /// Reads the object that describes the bridge; `place` is what it is called in messages, with a dot (`delegate.`), or nothing.
    pub(crate) fn read(bridge: &Object, place: &str, conf: &Conf, args: &CniArgs) -> Result<Self, CniError> {
        backend(bridge, place)?;
        let is = |key| flag(bridge, key).map(|flag| flag.unwrap_or(false));
        let mtu = match asked(bridge, "mtu") {
            None => None,
            Some(mtu) => Some(number(mtu, &format!("{place}mtu")).and_then(|bytes| {
                Mtu::new(bytes).map_err(|error| CniError::config(format!("{place}mtu: {error}")))
            })?),
        };
        let name = text(bridge, "bridge")?.map(|name| {
            LinkName::new(&name).map_err(|error| CniError::config(format!("{place}bridge: {error}")))
        });
        let dns = object(bridge, "dns")?.filter(|dns| !dns.is_empty());
        let default_gateway = is("isDefaultGateway")?;
        let wish = Self {
            bridge: name.transpose()?,
            mtu,
            ip_masq: flag(bridge, "ipMasq")?,
            // Who is the way out is a gateway.
            gateway: if default_gateway { Some(true) } else { flag(bridge, "isGateway")? },
            default_gateway,
            hairpin: is("hairpinMode")?,
            promiscuous: is("promiscMode")?,
            force_address: is("forceAddress")?,
            isolated: is("portIsolation")?,
            vlan: match asked(bridge, "vlan") {
                None => None,
                Some(id) => Some(vlan(id, &format!("{place}vlan"))?),
            },
            trunk: trunk(bridge, place)?,
            not_default_vlan: flag(bridge, "preserveDefaultVlan")? == Some(false),
            guarded: is("macspoofchk")?,
            detect_duplicates: is("enabledad")?,
            down: is("disableContainerInterface")?,
            dns: dns.unwrap_or_else(|| conf.dns.clone()),
            ips: conf.ips(args)?,
            mac: conf.mac(args)?,
        };
        wish.refuse_contradictions(place)?;
        Ok(wish)
    }

    /// In upstream's words.
    fn refuse_contradictions(&self, place: &str) -> Result<(), CniError> {
        if self.hairpin && self.promiscuous {
            return Err(CniError::config(format!(
                "cannot set hairpin mode and promiscuous mode at the same time: {place}hairpinMode and {place}promiscMode"
            )));
        }
        if self.vlan.is_some() && !self.trunk.is_empty() {
            return Err(CniError::config(format!(
                "cannot set vlan and vlanTrunk at the same time: {place}vlan and {place}vlanTrunk"
            )));
        }
        Ok(())
    }

    /// An interface that stays down has no use for addresses.
    pub(crate) fn refuse_addresses(&self) -> Result<(), CniError> {
        match self.down {
            false => Ok(()),
            true => Err(CniError::config("cannot use IPAM when DisableContainerInterface flag is set")),
        }
    }

    /// Whether the bridge has to keep VLANs apart.
    pub(crate) fn has_vlans(&self) -> bool {
        self.vlan.is_some() || !self.trunk.is_empty()
    }

    /// What it asks of the endpoint, whose MAC this is, beyond the ordinary.
    pub(crate) fn endpoint_options(&self, mac: Option<Mac>) -> EndpointOptions {
        let access = self.vlan.iter().map(|vlan| (*vlan, VlanMember::Access));
        let members: BTreeMap<_, _> =
            access.chain(self.trunk.iter().map(|vlan| (*vlan, VlanMember::Tagged))).collect();
        let not_default = self.not_default_vlan;
        EndpointOptions {
            vlans: self.has_vlans().then_some(EndpointVlans { members, not_default }),
            guard: mac.filter(|_| self.guarded),
            detect_duplicates: self.detect_duplicates,
            down: self.down,
        }
    }
}

/// Who masquerades is no question here: it is one static rule, and both of upstream's ways are as good a wish as none.
fn backend(bridge: &Object, place: &str) -> Result<(), CniError> {
    match text(bridge, "ipMasqBackend")?.as_deref() {
        None | Some("iptables" | "nftables") => Ok(()),
        Some(other) => Err(CniError::config(format!(
            "unknown ipmasq backend {other:?}: {place}ipMasqBackend is \"iptables\" or \"nftables\""
        ))),
    }
}

fn vlan(value: &Value, place: &str) -> Result<u16, CniError> {
    const VLANS: std::ops::RangeInclusive<u64> = 1..=4094;
    let number =
        value.as_i64().ok_or_else(|| number(value, place).err().unwrap_or_else(|| outside(value, place)))?;
    u16::try_from(number)
        .ok()
        .filter(|id| VLANS.contains(&u64::from(*id)))
        .ok_or_else(|| outside(value, place))
}

fn outside(value: &Value, place: &str) -> CniError {
    CniError::config(format!("invalid VLAN ID {value} (must be between 1 and 4094): {place}"))
}

/// `vlanTrunk`: each entry is one `id`, or all from `minID` to `maxID`, or both.
fn trunk(bridge: &Object, place: &str) -> Result<Vec<u16>, CniError> {
    let mut vlans = Vec::new();
    for (index, entry) in list(bridge, "vlanTrunk")?.iter().enumerate() {
        let place = format!("{place}vlanTrunk[{index}]");
        let entry = entry.as_object().ok_or_else(|| CniError::decoding(format!("{place} is no object")))?;
        let one = |key: &str| {
            let value = asked(entry, key);
            value.map(|value| vlan(value, &format!("{place}.{key}"))).transpose()
        };
        let id = one("id")?;
        match (one("minID")?, one("maxID")?) {
            (None, None) if id.is_none() => {
                return Err(CniError::config(format!("{place} has neither id nor minID and maxID")));
            }
            (None, None) => {}
            (Some(first), Some(last)) if first <= last => vlans.extend(first..=last),
            (Some(first), Some(last)) => {
                return Err(CniError::config(format!(
                    "minID is greater than maxID in trunk parameter: {place} is from {first} to {last}"
                )));
            }
            _ => {
                return Err(CniError::config(format!(
                    "minID and maxID should be configured simultaneously: {place} has one of them"
                )));
            }
        }
        vlans.extend(id);
    }
    vlans.sort_unstable();
    vlans.dedup();
    Ok(vlans)
}

#[cfg(test)]
#[path = "wish_tests.rs"]
mod tests;
