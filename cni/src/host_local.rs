//! Addresses as host-local gives them (upstream: containernetworking/plugins plugins/ipam/host-local): what a configuration's `ipam`
//! part asks for, and the plugin of that name.

mod resolv;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use flannel_core::act::claim::{self, Request};
use flannel_core::act::life::Unknown;
use flannel_core::decide::ranges::{self, Offer, Range, RangeSet};
use flannel_core::touch::ledger::{DEFAULT_ROOT, Ledger, Maker};
use flannel_core::words::addr::{Family, InterfaceAddress, Prefix};
use serde_json::{Map, Value, json};

use crate::args::{Call, CniArgs, Verb};
use crate::bridge::check::drift;
use crate::conf::Conf;
use crate::json::{Object, asked, list, object, text};
use crate::result::{Answer, CniError, Version};
use crate::upkeep::{self, CachedElsewhere};

/// What an `ipam` part of type host-local asks for.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Ipam {
    /// A container gets an address of each.
    pub(crate) sets: Vec<RangeSet>,
    /// Where the ledgers are.
    root: PathBuf,
    resolv_conf: Option<PathBuf>,
}

/// What a file in the form of resolv.conf(5) says; nothing without one.
pub(crate) fn dns(resolv_conf: Option<&Path>) -> Result<Object, CniError> {
    resolv_conf.map_or_else(|| Ok(Map::new()), resolv::read)
}

impl Ipam {
    /// The ranges of the capability first, then a subnet in the old style, then the list.
    pub(crate) fn read(ipam: &Object, conf: &Conf) -> Result<Self, CniError> {
        let mut sets = Vec::new();
        for (index, set) in list(&conf.runtime, "ipRanges")?.iter().enumerate() {
            sets.push(range_set(set, &format!("runtimeConfig.ipRanges[{index}]")));
        }
        if asked(ipam, "subnet").is_some() {
            sets.push(range(ipam, "ipam").and_then(|range| Ok(RangeSet::new(vec![range])?)));
        }
        for (index, set) in list(ipam, "ranges")?.iter().enumerate() {
            sets.push(range_set(set, &format!("ipam.ranges[{index}]")));
        }
        let numbered = sets.into_iter().enumerate().map(|(index, set)| {
            set.map_err(|error| CniError {
                msg: format!("invalid range set {index}: {}", error.msg),
                ..error
            })
        });
        let sets = numbered.collect::<Result<Vec<_>, _>>()?;
        if sets.is_empty() {
            return Err(CniError::config("no IP ranges specified"));
        }
        let of = |family| sets.iter().filter(|set| set.family() == family).count();
        if conf.version <= Version::V0_2_0 && (of(Family::V4) > 1 || of(Family::V6) > 1) {
            return Err(CniError::config(format!(
                "CNI version {} does not support more than 1 address per family",
                conf.version
            )));
        }
        ranges::apart(&sets)?;
        Ok(Self {
            sets,
            root: text(ipam, "dataDir")?.map_or_else(|| PathBuf::from(DEFAULT_ROOT), PathBuf::from),
            resolv_conf: text(ipam, "resolvConf")?.map(PathBuf::from),
        })
    }

    /// The ledger of a configuration of this name.
    pub(crate) fn ledger(&self, name: &str) -> Ledger {
        Ledger::at(self.root.join(name))
    }

    /// What the file says that the configuration names.
    pub(crate) fn dns(&self) -> Result<Object, CniError> {
        dns(self.resolv_conf.as_deref())
    }
}

fn range_set(set: &Value, place: &str) -> Result<RangeSet, CniError> {
    let set = set.as_array().ok_or_else(|| CniError::decoding(format!("{place} is not a list")))?;
    let ranges = set.iter().enumerate().map(|(index, given)| {
        let place = format!("{place}[{index}]");
        let given = given.as_object().ok_or_else(|| CniError::decoding(format!("{place} is no object")))?;
        range(given, &place)
    });
    Ok(RangeSet::new(ranges.collect::<Result<_, _>>()?)?)
}

fn range(given: &Object, place: &str) -> Result<Range, CniError> {
    let subnet = text(given, "subnet")?
        .ok_or_else(|| CniError::config(format!("{place} has no subnet")))?
        .parse::<Prefix>()
        .map_err(|error| CniError::config(format!("{place}.subnet: {error}")))?;
    let address = |key: &str| -> Result<Option<IpAddr>, CniError> {
        let wrong = |given: &str| CniError::config(format!("{place}.{key}: {given:?} is no address"));
        text(given, key)?.map(|given| given.parse().map_err(|_| wrong(&given))).transpose()
    };
    Ok(Range::new(subnet, address("rangeStart")?, address("rangeEnd")?, address("gateway")?)?)
}

/// Does what the call asks for.
pub(crate) fn run(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let ipam =
        object(&conf.given, "ipam")?.ok_or_else(|| CniError::config("IPAM config missing 'ipam' key"))?;
    match call.verb {
        Verb::Add => add(call, conf, &ipam),
        Verb::Del => {
            let owner = call.attachment()?;
            if let Some(ledger) = existing(&ipam, conf)? {
                ledger.lock()?.release(&owner)?;
            }
            Ok(Answer::Nothing)
        }
        Verb::Check => {
            Ipam::read(&ipam, conf)?;
            check(call, existing(&ipam, conf)?.as_ref())
        }
        Verb::Gc => gc(conf, &ipam),
        Verb::Status => {
            let ipam = Ipam::read(&ipam, conf)?;
            upkeep::has_room(&ipam.ledger(&conf.name), &ipam.sets, &mut Unknown)?;
            Ok(Answer::Nothing)
        }
    }
}

/// The ledger if there is one. DEL and GC need not know the ranges.
fn existing(ipam: &Object, conf: &Conf) -> Result<Option<Ledger>, CniError> {
    let root = text(ipam, "dataDir")?.map_or_else(|| PathBuf::from(DEFAULT_ROOT), PathBuf::from);
    let dir = root.join(&conf.name);
    Ok(Path::new(&dir).is_dir().then(|| Ledger::at(dir)))
}

fn add(call: &Call, conf: &Conf, given: &Object) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    let ipam = Ipam::read(given, conf)?;
    let wanted = conf.ips(&CniArgs::parse(&call.args)?)?;
    let routes = routes(given)?;
    let dns = ipam.dns()?;
    let request = Request { owner: &owner, sets: &ipam.sets, wanted: &wanted, maker: Maker::Asker };
    let ledger = ipam.ledger(&conf.name);
    let claimed = claim::claim(&ledger.lock()?, &request, &mut Unknown)?;
    Ok(Answer::Value(render(conf.version, &claimed.offers, &routes, dns)))
}

fn check(call: &Call, ledger: Option<&Ledger>) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    let held = match ledger {
        None => Vec::new(),
        Some(ledger) => ledger.look()?,
    };
    let same = |container: &str, interface: &str| {
        container == owner.container && (interface == owner.interface || interface.is_empty())
    };
    match held.iter().any(|entry| same(&entry.owner.container, &entry.owner.interface)) {
        true => Ok(Answer::Nothing),
        false => {
            Err(drift(format!("host-local: Failed to find address added by container {}", owner.container)))
        }
    }
}

/// Frees what belongs to none of the attachments. Others may share the directory: what they made in their own process, and what
/// libcni remembers under another configuration's name, is theirs.
fn gc(conf: &Conf, ipam: &Object) -> Result<Answer, CniError> {
    let start = SystemTime::now();
    let (Some(valid), Some(ledger)) = (&conf.valid, existing(ipam, conf)?) else {
        return Ok(Answer::Nothing);
    };
    let elsewhere = CachedElsewhere::read(&conf.name);
    let held = ledger.lock()?;
    let entries = held.entries()?;
    for entry in upkeep::candidates(&held, &entries, valid, start)? {
        if !held.is_ours(&entry) && !elsewhere.holds(&entry.owner) {
            held.release_address(entry.address)?;
        }
    }
    Ok(Answer::Nothing)
}

/// `ipam.routes`, handed on as they are: it is the caller who makes them.
fn routes(ipam: &Object) -> Result<Vec<Value>, CniError> {
    let routes = list(ipam, "routes")?;
    for (index, route) in routes.iter().enumerate() {
        destination(route)
            .map_err(|error| CniError { msg: format!("ipam.routes[{index}]{}", error.msg), ..error })?;
    }
    Ok(routes.to_vec())
}

fn destination(route: &Value) -> Result<Prefix, CniError> {
    let route = route.as_object().ok_or_else(|| CniError::decoding(" is no object"))?;
    let given = text(route, "dst")?.ok_or_else(|| CniError::config(" has no dst"))?;
    let parsed = given.parse::<InterfaceAddress>();
    if let Some(via) = text(route, "gw")?.filter(|via| via.parse::<IpAddr>().is_err()) {
        return Err(CniError::config(format!(".gw: {via:?} is no address")));
    }
    Ok(parsed.map_err(|error| CniError::config(format!(".dst: {error}")))?.prefix())
}

/// Addresses without an interface: there is none yet.
fn render(version: Version, offers: &[Offer], routes: &[Value], dns: Object) -> Value {
    let mut result = Map::new();
    if version <= Version::V0_2_0 {
        for (key, family) in [("ip4", Family::V4), ("ip6", Family::V6)] {
            let Some(first) = offers.iter().find(|offer| offer.address.family() == family) else { continue };
            let of_family = |route: &&Value| destination(route).is_ok_and(|to| to.family() == family);
            let routes: Vec<&Value> = routes.iter().filter(of_family).collect();
            let mut ip = json!({ "ip": first.address.to_string(), "gateway": first.gateway.to_string() });
            if !routes.is_empty() {
                ip["routes"] = json!(routes);
            }
            result.insert(key.to_owned(), ip);
        }
    } else {
        let ip = |offer: &Offer| {
            let mut ip =
                json!({ "address": offer.address.to_string(), "gateway": offer.gateway.to_string() });
            if version < Version::V1_0_0 {
                ip["version"] = json!(if offer.address.family() == Family::V4 { "4" } else { "6" });
            }
            ip
        };
        result.insert("ips".to_owned(), offers.iter().map(ip).collect());
        if !routes.is_empty() {
            result.insert("routes".to_owned(), json!(routes));
        }
    }
    result.insert("cniVersion".to_owned(), json!(version.text()));
    if version < Version::V1_0_0 || !dns.is_empty() {
        result.insert("dns".to_owned(), Value::Object(dns));
    }
    Value::Object(result)
}

#[cfg(test)]
mod tests;
