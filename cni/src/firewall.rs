//! The plugin `firewall`, and `ingressPolicy` as part of `flannel`: containers may forward packets, and bridges may keep to
//! themselves (upstream: plugins/meta/firewall).
//!
//! Upstream writes rules for every container. Here is nothing per container: FORWARD of iptables accepts the subnet that the container's
//! address is in, and a table of nftables says which bridges keep to themselves, so a DEL that never comes leaves nothing behind.

use std::collections::BTreeSet;

use flannel_core::decide::isolation::{self, Bridges, Policy};
use flannel_core::touch::world::World;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::addr::{Family, InterfaceAddress, Prefix};
use flannel_core::words::fact::{Accept, BridgePort, Change, Fact, LinkKind};
use flannel_core::words::name::LinkName;
use flannel_core::words::territory::Territory;
use serde_json::Value;

use crate::args::{Call, Verb};
use crate::bridge::check::drift;
use crate::conf::Conf;
use crate::json::text;
use crate::previous::{self, Previous};
use crate::result::{Answer, CniError};

/// The chain in which upstream's plugin has rules for every container.
const UPSTREAMS_CHAIN: &str = "CNI-FORWARD";

/// What `ingressPolicy` asks for; none if nothing is said.
pub(crate) fn policy(conf: &Conf) -> Result<Option<Policy>, CniError> {
    match text(&conf.given, "ingressPolicy")?.as_deref() {
        None => Ok(None),
        Some("open") => Ok(Some(Policy::Open)),
        Some("same-bridge") => Ok(Some(Policy::SameBridge)),
        Some("isolated") => Ok(Some(Policy::Isolated)),
        Some(other) => Err(CniError::config(format!("unknown ingress policy: {other:?}"))
            .with_details("there are \"open\", \"same-bridge\" and \"isolated\"")),
    }
}

/// Makes a bridge keep to itself, or not; and the ports of its containers, if they are not to reach each other.
pub(crate) fn isolate(
    host: &mut Kernel,
    bridge: LinkName,
    end: Option<LinkName>,
    policy: Policy,
) -> Result<(), CniError> {
    let have = bridges(host)?;
    if isolation::with(&have, bridge, policy, |_| true) != have {
        // What is written anyway is also swept.
        let mut gone = BTreeSet::new();
        for link in have.keys().filter(|link| **link != bridge) {
            if !host.link_exists(*link)? {
                gone.insert(*link);
            }
        }
        host.netfilter()?.revise(&isolation::table_name(), |table| {
            let have = table.map(isolation::bridges).unwrap_or_default();
            isolation::table(&isolation::with(&have, bridge, policy, |link| !gone.contains(&link)))
        })?;
    }
    // Frames between two ports of a bridge pass no rules, unless the node has br_netfilter.
    if let (Some(link), Policy::Isolated) = (end, policy) {
        let port = Fact::BridgePort(BridgePort { link, bridge, hairpin: false, isolated: true });
        host.apply(&[Change::Create(&port)]).into_iter().collect::<Result<(), _>>()?;
    }
    Ok(())
}

/// What keeps a bridge from its policy, as the lines that would repair it.
pub(crate) fn missing(
    host: &mut Kernel,
    bridge: LinkName,
    end: Option<LinkName>,
    policy: Policy,
) -> Result<Vec<String>, CniError> {
    let mut missing = Vec::new();
    let have = bridges(host)?;
    let wanted = isolation::with(&have, bridge, policy, |_| true);
    if have != wanted {
        missing.push(match isolation::table(&wanted) {
            Some(table) => format!("nft '{table}'"),
            None => format!("nft delete table {}", isolation::table_name()),
        });
    }
    if let (Some(link), Policy::Isolated) = (end, policy) {
        let port = Fact::BridgePort(BridgePort { link, bridge, hairpin: false, isolated: true });
        let territory = Territory { links: BTreeSet::from([link]), ..Territory::default() };
        let seen = host.observe(&territory)?;
        if !seen.get(&port.key()).is_some_and(|seen| port.satisfied_by(seen)) {
            missing.push(port.to_string());
        }
    }
    Ok(missing)
}

fn bridges(host: &mut Kernel) -> Result<Bridges, CniError> {
    let table = host.netfilter()?.table(&isolation::table_name())?;
    Ok(table.as_ref().map(isolation::bridges).unwrap_or_default())
}

/// The bridge of a result: the first interface on the host that is one.
pub(crate) fn bridge(host: &mut Kernel, previous: &Previous<'_>) -> Result<Option<LinkName>, CniError> {
    for name in previous.on_host() {
        if host.link(name)?.is_some_and(|link| matches!(link.kind, LinkKind::Bridge)) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Does what the call asks for, behind a plugin that made the interface.
pub(crate) fn run(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    match call.verb {
        Verb::Add => add(call, conf),
        Verb::Del => del(call, conf),
        Verb::Check => check(call, conf),
        Verb::Gc => Ok(Answer::Nothing),
        Verb::Status => refuse_what_is_not_served(conf).map(|()| Answer::Nothing),
    }
}

/// firewalld has rules of its own that no accept elsewhere outweighs; only it can change them.
fn refuse_what_is_not_served(conf: &Conf) -> Result<(), CniError> {
    let unsupported = |what: &str, hint: &str| {
        Err(CniError::unsupported(format!("{what} is not supported")).with_details(hint))
    };
    match text(&conf.given, "backend")?.as_deref() {
        None | Some("iptables") => {}
        Some("firewalld") => {
            return unsupported(
                "backend \"firewalld\"",
                "leave backend out, and let firewalld trust the containers once and for all: firewall-cmd --permanent \
                 --zone=trusted --add-source=SUBNET",
            );
        }
        Some(other) => return unsupported(&format!("backend {other:?}"), "there is \"iptables\""),
    }
    if text(&conf.given, "firewalldZone")?.is_some() {
        return unsupported("firewalldZone", "it belongs to the backend \"firewalld\"");
    }
    if text(&conf.given, "iptablesAdminChainName")?.is_some() {
        return unsupported(
            "iptablesAdminChainName",
            "a drop in a table of nftables of your own outweighs whatever is accepted here",
        );
    }
    Ok(())
}

fn add(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    refuse_what_is_not_served(conf)?;
    let policy = policy(conf)?;
    let result = Value::Object(previous::required(conf)?);
    let mut host = Kernel::open()?;
    let accepts = accepts(call, &result);
    let missing = not_accepted(&mut host, &accepts)?;
    if !missing.is_empty() {
        let changes: Vec<Change<'_>> = missing.iter().map(Change::Create).collect();
        host.apply(&changes).into_iter().collect::<Result<(), _>>()?;
    }
    if let Some(policy) = policy {
        let (bridge, end) = place(&mut host, &result, policy)?;
        if let Some(bridge) = bridge {
            isolate(&mut host, bridge, end, policy)?;
        }
    }
    Ok(Answer::Value(result))
}

/// The bridge and the host's end of a result. Only a bridge can keep to itself.
fn place(
    host: &mut Kernel,
    result: &Value,
    policy: Policy,
) -> Result<(Option<LinkName>, Option<LinkName>), CniError> {
    let previous = Previous::read(result);
    let bridge = match &previous {
        Some(previous) => bridge(host, previous)?,
        None => None,
    };
    if bridge.is_none() && policy != Policy::Open {
        return Err(CniError::config(
            "ingressPolicy asks for a bridge, and the plugin before this one names none",
        )
        .with_details("make sure to chain \"firewall\" with \"bridge\" or \"flannel\""));
    }
    Ok((bridge, previous.and_then(|previous| previous.host_veth())))
}

/// The networks that FORWARD has to accept for a container: the subnets of its addresses.
fn accepts(call: &Call, result: &Value) -> BTreeSet<Prefix> {
    let addresses = addresses(call, result);
    addresses.iter().map(InterfaceAddress::prefix).collect()
}

fn addresses(call: &Call, result: &Value) -> Vec<InterfaceAddress> {
    let link = call.link().ok();
    let previous = Previous::read(result);
    link.and_then(|link| Some(previous?.addresses(link))).unwrap_or_default()
}

/// Those of the networks that a FORWARD chain of this node does not accept.
fn not_accepted(host: &mut Kernel, cidrs: &BTreeSet<Prefix>) -> Result<Vec<Fact>, CniError> {
    let chains: BTreeSet<Family> = host.netfilter()?.forward_chains()?;
    let wanted: Vec<Fact> = cidrs
        .iter()
        .filter(|cidr| chains.contains(&cidr.family()))
        .map(|cidr| Fact::Accept(Accept { cidr: *cidr }))
        .collect();
    if wanted.is_empty() {
        return Ok(wanted);
    }
    let seen = host.observe(&Territory::of(&wanted))?;
    Ok(wanted.into_iter().filter(|fact| seen.get(&fact.key()).is_none()).collect())
}

/// What belongs to a network stays for its other containers. What upstream's plugin made for this one goes, and so does what was
/// accepted for an address that is a network of its own.
fn del(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    call.attachment()?;
    let Some(previous) = &conf.previous else { return Ok(Answer::Nothing) };
    let addresses = addresses(call, previous);
    if addresses.is_empty() {
        return Ok(Answer::Nothing);
    }
    let mut host = Kernel::open()?;
    for address in addresses {
        host.netfilter()?.remove_rules_about(UPSTREAMS_CHAIN, address.address())?;
        if address.len() == address.family().bits() {
            let accept = Fact::Accept(Accept { cidr: address.prefix() });
            host.apply(&[Change::Delete(&accept)]).into_iter().collect::<Result<(), _>>()?;
        }
    }
    Ok(Answer::Nothing)
}

fn check(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    refuse_what_is_not_served(conf)?;
    let policy = policy(conf)?;
    let result = Value::Object(previous::required(conf)?);
    let mut host = Kernel::open()?;
    let accepts = accepts(call, &result);
    let mut wrong: Vec<String> = not_accepted(&mut host, &accepts)?.iter().map(Fact::to_string).collect();
    if let Some(policy) = policy
        && let (Some(bridge), end) = place(&mut host, &result, policy)?
    {
        wrong.extend(missing(&mut host, bridge, end, policy)?);
    }
    if wrong.is_empty() { Ok(Answer::Nothing) } else { Err(drift(wrong.join("; "))) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn conf(value: &Value) -> Conf {
        Conf::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn policies_have_upstreams_names() {
        let read = |policy: &str| super::policy(&conf(&json!({ "name": "n", "ingressPolicy": policy })));
        assert_eq!(read("").unwrap(), None);
        assert_eq!(read("same-bridge").unwrap(), Some(Policy::SameBridge));
        assert_eq!(read("isolated").unwrap(), Some(Policy::Isolated));
        assert_eq!(read("open").unwrap(), Some(Policy::Open));
        let error = read("closed").unwrap_err();
        assert!(error.code == 7 && error.msg == "unknown ingress policy: \"closed\"", "{error}");
    }

    #[test]
    fn what_only_firewalld_could_do_is_refused() {
        for backend in ["", "iptables"] {
            refuse_what_is_not_served(&conf(&json!({ "name": "n", "backend": backend }))).unwrap();
        }
        for (key, value) in [
            ("backend", "firewalld"),
            ("backend", "nftables"),
            ("firewalldZone", "public"),
            ("iptablesAdminChainName", "MINE"),
        ] {
            let error = refuse_what_is_not_served(&conf(&json!({ "name": "n", key: value }))).unwrap_err();
            assert!(error.code == 2 && error.msg.starts_with(key), "{error}");
        }
    }
}
