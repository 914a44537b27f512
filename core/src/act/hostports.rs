//! Ports of this host for CNI attachments, with no program that stays: each call makes or takes back its own.
//!
//! What is in the kernel follows from records that the caller keeps, one for each attachment, under one lock: whoever calls these
//! functions holds it. A record is written before its elements and removed after them, so elements without a record are dead.
//! If the table is gone, all records make it anew.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::decide::hostports::{emptied, place, plan, rival_place, table_name};
use crate::decide::publish;
use crate::touch::world::kernel::Kernel;
use crate::touch::world::kernel::nftables::conntrack::Changed;
use crate::touch::world::kernel::nftables::{Amended, Netfilter};
use crate::touch::world::{World, WorldError};
use crate::words::exposure::{PublishedPort, Transport};
use crate::words::fact::Change;
use crate::words::hostport::Holding;
use crate::words::name::{LinkName, NetworkName};
use crate::words::rule::{PortMap, PortTarget, Set, Table, TableFamily, TableName};

/// What dead attachments left in the way of a port is cleared, and then it is tried again, this often.
const TRIES_MAX: usize = 8;
/// One port can be held by this many addresses of the host, each by another one.
const RIVALS_MAX: usize = 256;

/// Why an attachment does not get its ports.
#[derive(Debug, thiserror::Error)]
pub enum HostPortError {
    /// Somebody has it.
    #[error(
        "port {port} is taken: {holder} has it on this host; use another hostPort, or remove that container"
    )]
    Held {
        /// What was asked for.
        port: PublishedPort,
        /// Who has it.
        holder: String,
    },
    /// The kernel refused.
    #[error(transparent)]
    World(#[from] WorldError),
    /// Somebody else writes into the table.
    #[error("something else keeps changing the nftables table {0}")]
    Unsettled(TableName),
}

/// The records of the node's holdings.
pub trait Records {
    /// The one whose elements have this tag, if it has a record.
    fn find(&mut self, tag: &str) -> Option<Holding>;
    /// Whether its container still has the interface.
    fn is_alive(&mut self, holding: &Holding) -> bool;
    /// All of them.
    fn all(&mut self) -> Vec<Holding>;
    /// Removes one.
    fn remove(&mut self, holding: &Holding);
}

/// Gives an attachment its ports. Nothing of it is there on failure.
pub fn publish(
    filter: &mut Netfilter,
    records: &mut dyn Records,
    mine: &Holding,
) -> Result<(), HostPortError> {
    refuse_engine_ports(filter, mine)?;
    clear_rivals(filter, records, mine)?;
    let new = plan([mine]);
    let old = emptied(&new);
    for _ in 0..TRIES_MAX {
        match filter.amend(&old, &new)? {
            Amended::Done => return Ok(()),
            Amended::Missing => return Ok(filter.put(&whole(records, mine)?)?),
            Amended::Taken => {
                for port in &mine.ports {
                    let (map, kind, key) = place(port);
                    if let Some(target) = filter.port(&table_name(), (&map, kind), &key)? {
                        clear(filter, records, mine, (port, port), &target)?;
                    }
                }
            }
        }
    }
    Err(HostPortError::Unsettled(table_name()))
}

/// The table with everything that is alive, and with this one.
fn whole(records: &mut dyn Records, mine: &Holding) -> Result<Table, HostPortError> {
    let mut all = vec![mine.clone()];
    for other in records.all() {
        if other.tag() == mine.tag() {
            continue;
        }
        if !records.is_alive(&other) {
            records.remove(&other);
        } else if let Some(port) = mine.clash(&other) {
            return Err(HostPortError::Held { port, holder: other.to_string() });
        } else {
            all.push(other);
        }
    }
    Ok(plan(&all))
}

/// Ports that a container engine's plugin has published are in tables of its own.
fn refuse_engine_ports(filter: &mut Netfilter, mine: &Holding) -> Result<(), HostPortError> {
    let first = NetworkName::default_network().endpoints_table();
    for name in filter.table_names(TableFamily::Inet)? {
        if !name.starts_with(&first) {
            continue;
        }
        let table = TableName { family: TableFamily::Inet, name };
        for port in &mine.ports {
            let (map, kind, key) = place(port);
            let same = filter.port(&table, (&map, kind), &key)?.map(|target| target.address);
            if let Some(address) = same.or(rival(filter, &table, port)?.map(|(_, target)| target.address)) {
                let holder = format!("the container with address {address} of a Docker network");
                return Err(HostPortError::Held { port: *port, holder });
            }
        }
    }
    Ok(())
}

/// Whose attachment has a port, or one that clashes with it: network, container and interface.
pub fn holder(filter: &mut Netfilter, port: &PublishedPort) -> Result<Option<String>, WorldError> {
    let (map, kind, key) = place(port);
    let same = filter.port(&table_name(), (&map, kind), &key)?;
    let found = match same {
        None => rival(filter, &table_name(), port)?.map(|(_, target)| target),
        same => same,
    };
    Ok(found.map(|target| target.owner.unwrap_or_default()))
}

/// Who has the same port on another address, or on all of them: one of possibly many.
fn rival(
    filter: &mut Netfilter,
    table: &TableName,
    port: &PublishedPort,
) -> Result<Option<(PublishedPort, PortTarget)>, WorldError> {
    let (map, kind, key) = rival_place(port);
    let found = match key {
        Some(key) => filter.port(table, (&map, kind), &key)?.map(|target| (key, target)),
        None => filter
            .ports(table, (&map, kind))?
            .into_iter()
            .find(|(key, _)| (key.protocol, key.port) == (port.protocol, port.host_port)),
    };
    Ok(found.map(|(key, target)| (PublishedPort { host_ip: key.address, ..*port }, target)))
}

/// A port on one address and the same on all of them are no clash for the kernel, but they are one for us.
fn clear_rivals(
    filter: &mut Netfilter,
    records: &mut dyn Records,
    mine: &Holding,
) -> Result<(), HostPortError> {
    for port in &mine.ports {
        for _ in 0..RIVALS_MAX {
            match rival(filter, &table_name(), port)? {
                Some((other, target)) if target.owner.as_ref() != Some(&mine.tag()) => {
                    clear(filter, records, mine, (port, &other), &target)?;
                }
                _ => break,
            }
        }
    }
    Ok(())
}

/// Removes what is in the way of a port if nobody lives there any more.
fn clear(
    filter: &mut Netfilter,
    records: &mut dyn Records,
    mine: &Holding,
    (wanted, there): (&PublishedPort, &PublishedPort),
    target: &PortTarget,
) -> Result<(), HostPortError> {
    let tag = target.owner.clone().unwrap_or_default();
    let holder = if tag == mine.tag() { None } else { records.find(&tag) };
    match holder {
        Some(holder) if records.is_alive(&holder) => {
            Err(HostPortError::Held { port: *wanted, holder: holder.to_string() })
        }
        Some(dead) => {
            withdraw(filter, &dead)?;
            records.remove(&dead);
            Ok(())
        }
        None => Ok(remove(filter, there, target)?),
    }
}

/// Removes one element.
fn remove(filter: &mut Netfilter, port: &PublishedPort, target: &PortTarget) -> Result<(), WorldError> {
    let (map, kind, key) = place(port);
    let mut old = Table::new(table_name());
    let elements = [(key, target.clone())].into();
    old.maps.insert(map, PortMap { kind, elements });
    filter.amend(&old, &emptied(&old)).map(drop)
}

/// Takes an attachment's ports back, as far as they are there.
pub fn withdraw(filter: &mut Netfilter, holding: &Holding) -> Result<(), WorldError> {
    let old = plan([holding]);
    if filter.amend(&old, &emptied(&old))? != Amended::Missing {
        return Ok(());
    }
    // Somebody was here before: whatever is left of it.
    for port in &holding.ports {
        let (map, kind, key) = place(port);
        if let Some(target) = filter.port(&table_name(), (&map, kind), &key)?
            && target.owner == Some(holding.tag())
        {
            remove(filter, port, &target)?;
        }
    }
    for (name, set) in &old.sets {
        for prefix in &set.elements {
            let mut one = Table::new(table_name());
            let elements = BTreeSet::from([*prefix]);
            one.sets.insert(name.clone(), Set { elements, ..set.clone() });
            filter.amend(&one, &emptied(&one))?;
        }
    }
    Ok(())
}

/// What the kernel lacks of an attachment's ports, as the lines that nft would list.
pub fn missing(filter: &mut Netfilter, holding: &Holding) -> Result<Vec<String>, WorldError> {
    let wanted = plan([holding]);
    let name = table_name();
    let there = filter.chains(&wanted)?;
    let mut missing = Vec::new();
    for (chain, planned) in &wanted.chains {
        match there.get(chain) {
            None => missing.push(format!("chain {chain} of table {name}")),
            Some(found) => missing.extend(
                planned
                    .rules
                    .iter()
                    .filter(|rule| !found.rules.contains(rule))
                    .map(|rule| format!("rule `{rule}` in chain {chain} of table {name}")),
            ),
        }
    }
    for (map, planned) in &wanted.maps {
        for (key, target) in &planned.elements {
            let found = filter.port(&name, (map, planned.kind), key)?;
            if found.as_ref() != Some(target) {
                missing.push(format!("element `{key}{target}` in map {map} of table {name}"));
            }
        }
    }
    for (set, planned) in &wanted.sets {
        for prefix in &planned.elements {
            if !filter.has_address(&name, set, prefix.base())? {
                missing.push(format!("element {} in set {set} of table {name}", prefix.base()));
            }
        }
    }
    Ok(missing)
}

/// Removes elements of a network that no record speaks of.
pub fn sweep(filter: &mut Netfilter, records: &mut dyn Records, network: &str) -> Result<(), WorldError> {
    let Some(table) = filter.table(&table_name())? else { return Ok(()) };
    let mut old = Table::new(table.name);
    let first = format!("{network} ");
    for (name, mut map) in table.maps {
        map.elements.retain(|_, target| {
            let tag = target.owner.as_deref().unwrap_or_default();
            tag.starts_with(&first) && records.find(tag).is_none()
        });
        old.maps.insert(name, map);
    }
    filter.amend(&old, &emptied(&old)).map(drop)
}

/// Lets the host reach published ports by its loopback addresses; the table has the guard that this needs.
pub fn open_localnet(host: &mut Kernel, link: LinkName) -> Result<(), WorldError> {
    let open = publish::localnet(link, true);
    host.apply(&[Change::Create(&open)]).into_iter().collect()
}

/// Makes connections that the kernel remembers follow ports that came or went. TCP needs none of it.
pub fn settle(host: &mut Kernel, gone: &[PublishedPort], come: &[PublishedPort]) -> Result<(), WorldError> {
    if gone.iter().chain(come).all(|port| port.protocol == Transport::Tcp) {
        return Ok(());
    }
    let mut local: Vec<IpAddr> = Vec::new();
    if !come.is_empty() {
        let interfaces = host.interfaces()?;
        let addresses = interfaces.iter().flat_map(|interface| &interface.addresses);
        local.extend(addresses.map(|address| address.address.address()));
    }
    host.netfilter()?.forget(&Changed { gone, come, local: &local }).map(drop)
}
