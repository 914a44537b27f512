//! Upstream's chains ([`SharedChain`]) in nftables: in the tables that iptables-nft keeps, exactly as upstream's `iptables` would have
//! written them, and in upstream's own tables of nftables.
//!
//! All of them change in one transaction, guarded by the generation of the rules that were looked at: packets never see half of
//! it, and nothing that another program wrote meanwhile is lost. No program is run.

use std::collections::BTreeSet;

use super::decode::{raise, read_base};
use super::encode::{lower, write_base, write_expressions};
use super::expression::Expression;
use super::iptables_rule::{self, table_family};
use super::packet::number_of;
use super::wire::{
    APPEND, Attributes, Batch, CREATE, Socket, attribute, error_code, kind, long, number, text,
};
use crate::touch::world::WorldError;
use crate::words::addr::{Family, Prefix};
use crate::words::fact::shared_chain::{
    ChainName, DOCKER_USER, Entrance, Home, Job, Missing, NftChain, SeenRule, SharedChain, jump,
};
use crate::words::rule::{Base, ChainKind, Hook, Rule, TableName};

/// Others may write rules between our look and our transaction; then we look again.
const TRIES_MAX: usize = 16;

type Seen = SeenRule<u64>;

/// A chain, what of ours it should have (none: nothing), and the networks whose rules in it are ours.
pub(super) type Wanted<'a> = (ChainName, Option<&'a SharedChain>, BTreeSet<Prefix>);

/// What is there of a chain, and around it.
struct Found {
    /// The rules of our chain; none if there is no such chain.
    own: Option<Vec<Seen>>,
    /// Whether our chain is hooked in as it should be, if it is to be.
    hooked: bool,
    /// The rules of iptables' chain that leads to ours; none if there is no such chain.
    outer: Option<Vec<Seen>>,
    /// The rules of Docker's chain for the operator, where what we accept has to be accepted too.
    docker: Option<Vec<Seen>>,
}

/// Where a chain is.
struct Place {
    table: TableName,
    chain: &'static str,
    outer: Option<&'static str>,
}

impl Place {
    fn of(name: &ChainName) -> Self {
        match name.home {
            Home::Nftables => {
                let NftChain { table, name: chain, .. } = NftChain::of(name.family, name.job);
                Self { table, chain, outer: None }
            }
            Home::IptablesNft | Home::IptablesLegacy => Self {
                table: iptables_table(name.family, name.job),
                chain: name.job.chain(),
                outer: Some(name.job.outer()),
            },
        }
    }
}

fn iptables_table(family: Family, job: Job) -> TableName {
    TableName { family: table_family(family), name: job.table().to_owned() }
}

/// Our rules in the chain, if there are any.
pub(super) fn observe(
    socket: &mut Socket,
    name: ChainName,
    cidrs: &BTreeSet<Prefix>,
) -> Result<Option<SharedChain>, WorldError> {
    let found = look(socket, &name)?;
    let mut faults = Vec::new();
    if !found.hooked {
        faults.push("it is not hooked in as it should be".to_owned());
    }
    let mut leftovers = Vec::new();
    if let Some(place) = Place::of(&name).outer {
        let outer = found.outer.unwrap_or_default();
        if !Entrance::of(name.job, &outer, true).is_right() {
            faults.push(format!("{place} does not lead to it as it should"));
        }
        leftovers = name.leftovers(cidrs, &outer).into_iter().filter_map(|seen| seen.rule.clone()).collect();
    }
    if let Some(docker) = found.docker
        && !Entrance::of(name.job, &docker, true).is_right()
    {
        faults.push(format!("{DOCKER_USER} does not lead to it as it should"));
    }
    // Upstream makes a table of each family, also of one that it has no rules for.
    let empty = name.home == Home::Nftables && name.job == Job::Forward && found.own.is_none();
    let own = match empty && is_empty_table(socket, &Place::of(&name).table)? {
        true => Some(Vec::new()),
        false => found.own,
    };
    Ok(name.found(cidrs, own.as_deref(), leftovers, faults))
}

fn is_empty_table(socket: &mut Socket, table: &TableName) -> Result<bool, WorldError> {
    let mut of_table = Attributes::default();
    of_table.text(1, &table.name);
    let what = format!("read table {table}");
    let found = socket.get(&what, kind::GET_TABLE, number_of(table.family), &of_table)?;
    // NFTA_TABLE_USE: how many chains, sets and other things are in it.
    Ok(found.is_some_and(|found| number(&found, 3) == Some(0)))
}

fn look(socket: &mut Socket, name: &ChainName) -> Result<Found, WorldError> {
    let Place { table, chain, outer } = Place::of(name);
    let own_chain = get_chain(socket, &table, chain)?;
    let own = match own_chain {
        Some(_) => Some(rules(socket, name, &table, chain)?),
        None => None,
    };
    let wanted = (name.home == Home::Nftables).then(|| NftChain::of(name.family, name.job).base);
    let hooked =
        own_chain.is_none_or(|found| attribute(&found, 4).and_then(|hook| read_base(&found, hook)) == wanted);
    let mut around = |chain: &str| match get_chain(socket, &table, chain)? {
        Some(_) => rules(socket, name, &table, chain).map(Some),
        None => Ok(None),
    };
    let outer = outer.map(&mut around).transpose()?.flatten();
    let docker = match (name.home, name.job) {
        (Home::IptablesNft, Job::Forward) => around(DOCKER_USER)?,
        _ => None,
    };
    Ok(Found { own, hooked, outer, docker })
}

fn get_chain(socket: &mut Socket, table: &TableName, chain: &str) -> Result<Option<Vec<u8>>, WorldError> {
    let mut wanted = Attributes::default();
    wanted.text(1, &table.name).text(3, chain);
    let what = format!("read chain {chain} of table {table}");
    socket.get(&what, kind::GET_CHAIN, number_of(table.family), &wanted)
}

fn rules(
    socket: &mut Socket,
    name: &ChainName,
    table: &TableName,
    chain: &str,
) -> Result<Vec<Seen>, WorldError> {
    let mut wanted = Attributes::default();
    wanted.text(1, &table.name).text(2, chain);
    let what = format!("read rules of chain {chain} of table {table}");
    let found = socket.dump(&what, kind::GET_RULE, number_of(table.family), &wanted)?;
    // The filter by chain is newer than the one by table (Linux 4.11); do not depend on it.
    let of_chain =
        found.iter().filter(|rule| text(rule, 1) == Some(&table.name) && text(rule, 2) == Some(chain));
    Ok(of_chain.filter_map(|rule| Some(read(name, long(rule, 3)?, rule))).collect())
}

fn read(name: &ChainName, place: u64, rule: &[u8]) -> Seen {
    let (comment, rule) = match name.home {
        Home::Nftables => {
            let program = attribute(rule, 4).and_then(Expression::read_all);
            (
                None,
                program.and_then(|program| raise(table_family(name.family), &Default::default(), &program)),
            )
        }
        Home::IptablesNft | Home::IptablesLegacy => iptables_rule::read(name.family, rule),
    };
    Seen { place, comment, rule }
}

/// Whether iptables-nft keeps a FORWARD chain here that may drop what it does not know.
pub(super) fn may_drop(socket: &mut Socket, family: Family) -> Result<bool, WorldError> {
    const POLICY_ACCEPT: u32 = 1;
    let name = ChainName { home: Home::IptablesNft, family, job: Job::Forward };
    let table = iptables_table(family, Job::Forward);
    let Some(chain) =
        get_chain(socket, &table, Job::Forward.outer())?.filter(|found| attribute(found, 4).is_some())
    else {
        return Ok(false);
    };
    if number(&chain, 5) != Some(POLICY_ACCEPT) {
        return Ok(true);
    }
    let rules = rules(socket, &name, &table, Job::Forward.outer())?;
    Ok(Entrance::of(Job::Forward, &rules, false).gone.len() < rules.len())
}

/// Makes chains what they should be (none: nothing of ours), all in one transaction.
pub(super) fn change(socket: &mut Socket, wanted: &[Wanted<'_>]) -> Result<(), WorldError> {
    for _ in 0..TRIES_MAX {
        let mut batch = Batch::new(Some(socket.generation()?));
        for (name, wanted, cidrs) in wanted {
            let found = look(socket, name)?;
            Writer { name, place: Place::of(name), cidrs }.write(&mut batch, &found, *wanted);
        }
        clear_tables(socket, wanted, &mut batch)?;
        clear_outer(socket, wanted, &mut batch)?;
        match socket.commit(batch) {
            // Somebody else was faster.
            Err(error) if matches!(error_code(&error), Some(libc::ERESTART)) => {}
            other => return other,
        }
    }
    Err(WorldError::Unsupported {
        action: "write the chains of flannel".to_owned(),
        what: format!("others changed the rules of this host {TRIES_MAX} times meanwhile"),
    })
}

/// Upstream's tables go with their last chain.
fn clear_tables(socket: &mut Socket, wanted: &[Wanted<'_>], batch: &mut Batch) -> Result<(), WorldError> {
    for family in [Family::V4, Family::V6] {
        let leaving = wanted.iter().any(|(name, wanted, _)| {
            name.home == Home::Nftables && name.family == family && wanted.is_none()
        });
        let staying = wanted.iter().any(|(name, wanted, _)| {
            name.home == Home::Nftables && name.family == family && wanted.is_some()
        });
        if !leaving || staying {
            continue;
        }
        let table = NftChain::of(family, Job::Forward).table;
        let what = format!("read chains of table {table}");
        let chains = socket.dump(&what, kind::GET_CHAIN, number_of(table.family), &Attributes::default())?;
        let mut left = 0;
        for chain in chains.iter().filter(|chain| text(chain, 1) == Some(&table.name)) {
            let ours = wanted.iter().find(|(name, _, _)| {
                let place = Place::of(name);
                place.table == table && text(chain, 3) == Some(place.chain)
            });
            left += match ours {
                Some((name, None, cidrs)) => {
                    let seen = rules(socket, name, &table, Place::of(name).chain)?;
                    usize::from(name.written(cidrs, &seen, None).is_some())
                }
                _ => 1,
            };
        }
        let mut of_table = Attributes::default();
        of_table.text(1, &table.name);
        if left == 0 && socket.get(&what, kind::GET_TABLE, number_of(table.family), &of_table)?.is_some() {
            batch.step(
                format!("delete table {table}"),
                (kind::DELETE_TABLE, 0),
                number_of(table.family),
                |out| {
                    out.text(1, &table.name);
                },
            );
        }
    }
    Ok(())
}

/// What leads to our chains in the tables of iptables-nft goes as it came: a chain that nobody else has a rule in and that accepts
/// everything, and the table if there is no other chain in it. Whoever wants them makes them anew, as we did.
fn clear_outer(socket: &mut Socket, wanted: &[Wanted<'_>], batch: &mut Batch) -> Result<(), WorldError> {
    const POLICY_ACCEPT: u32 = 1;
    for (name, wanted, cidrs) in wanted {
        let place = Place::of(name);
        let (Home::IptablesNft, Some(outer), None) = (name.home, place.outer, wanted) else { continue };
        let found = look(socket, name)?;
        let own = found.own.as_deref().unwrap_or_default();
        let accepts = get_chain(socket, &place.table, outer)?
            .is_some_and(|chain| attribute(&chain, 4).is_some() && number(&chain, 5) == Some(POLICY_ACCEPT));
        let rules = found.outer.unwrap_or_default();
        let going = Entrance::of(name.job, &rules, false).gone.len() + name.leftovers(cidrs, &rules).len();
        if !accepts || going < rules.len() || name.written(cidrs, own, None).is_some() {
            continue;
        }
        let number = number_of(place.table.family);
        batch.step(
            format!("delete chain {outer} of table {}", place.table),
            (kind::DELETE_CHAIN, 0),
            number,
            |out| {
                out.text(1, &place.table.name).text(3, outer);
            },
        );
        let what = format!("read chains of table {}", place.table);
        let chains = socket.dump(&what, kind::GET_CHAIN, number, &Attributes::default())?;
        let others = chains.iter().filter(|chain| text(chain, 1) == Some(&place.table.name));
        let mut others = others.filter(|chain| ![Some(outer), Some(place.chain)].contains(&text(chain, 3)));
        if others.next().is_none() {
            batch.step(format!("delete table {}", place.table), (kind::DELETE_TABLE, 0), number, |out| {
                out.text(1, &place.table.name);
            });
        }
    }
    Ok(())
}

struct Writer<'a> {
    name: &'a ChainName,
    place: Place,
    cidrs: &'a BTreeSet<Prefix>,
}

impl Writer<'_> {
    fn family(&self) -> u8 {
        number_of(self.place.table.family)
    }

    fn write(&self, batch: &mut Batch, found: &Found, wanted: Option<&SharedChain>) {
        let own = found.own.as_deref().unwrap_or_default();
        let rules = self.name.written(self.cidrs, own, wanted.map(|chain| chain.rules.as_slice()));
        if let Some(rules) = &rules {
            self.fill(batch, found, rules);
        }
        if let Some(outer) = self.place.outer {
            self.lead(batch, outer, found.outer.as_deref().unwrap_or_default(), rules.is_some());
        }
        if let Some(docker) = &found.docker {
            // Not for neighbors alone: whoever takes the last rule may not know of this jump.
            self.lead(batch, DOCKER_USER, docker, wanted.is_some());
        }
        if rules.is_none() && found.own.is_some() {
            self.flush(batch);
            self.chain(batch, kind::DELETE_CHAIN, |_| {});
        }
    }

    fn fill(&self, batch: &mut Batch, found: &Found, rules: &[Rule]) {
        let table = &self.place.table;
        let nft = (self.name.home == Home::Nftables).then(|| NftChain::of(self.name.family, self.name.job));
        batch.step(format!("write table {table}"), (kind::NEW_TABLE, CREATE), self.family(), |out| {
            out.text(1, &table.name);
            if let Some(nft) = &nft {
                out.bytes(6, &user_comment(&nft.table_comment));
            }
        });
        if found.own.is_some() {
            self.flush(batch);
        }
        if found.own.is_some() && !found.hooked {
            self.chain(batch, kind::DELETE_CHAIN, |_| {});
        }
        if found.own.is_none() || !found.hooked {
            self.chain(batch, kind::NEW_CHAIN, |out| {
                if let Some(nft) = &nft {
                    write_base(out, &nft.base);
                    out.bytes(12, &user_comment(nft.comment));
                }
            });
        }
        for rule in rules {
            self.rule(batch, self.place.chain, None, rule);
        }
        if let (Some(outer), None) = (self.place.outer, &found.outer) {
            let base = match self.name.job {
                Job::Masquerade => Base { kind: ChainKind::Nat, hook: Hook::Postrouting, priority: 100 },
                Job::Forward => Base { kind: ChainKind::Filter, hook: Hook::Forward, priority: 0 },
            };
            let step = format!("write chain {outer} of table {table}");
            batch.step(step, (kind::NEW_CHAIN, CREATE), self.family(), |out| {
                out.text(1, &table.name).text(3, outer);
                write_base(out, &base);
            });
        }
    }

    /// Makes another chain lead to ours, or not.
    fn lead(&self, batch: &mut Batch, chain: &str, seen: &[Seen], wanted: bool) {
        let leftovers: Vec<u64> =
            self.name.leftovers(self.cidrs, seen).into_iter().map(|seen| seen.place).collect();
        let entrance = Entrance::of(self.name.job, seen, wanted);
        match entrance.missing {
            None => {}
            Some(Missing::AtTheEnd) => self.rule(batch, chain, None, &jump(self.name.job)),
            Some(Missing::Before(place)) => {
                let place = seen.get(place).map(|seen| seen.place);
                self.rule(batch, chain, place, &jump(self.name.job));
            }
        }
        let gone = entrance.gone.iter().filter_map(|place| seen.get(*place)).map(|seen| seen.place);
        for handle in gone.chain(leftovers) {
            let table = &self.place.table;
            let step = format!("delete a rule of chain {chain} of table {table}");
            batch.step(step, (kind::DELETE_RULE, 0), self.family(), |out| {
                out.text(1, &table.name).text(2, chain).long(3, handle);
            });
        }
    }

    fn chain(&self, batch: &mut Batch, kind: u8, fill: impl FnOnce(&mut Attributes)) {
        let (verb, flags) = match kind {
            kind::DELETE_CHAIN => ("delete", 0),
            _ => ("write", CREATE),
        };
        let step = format!("{verb} chain {} of table {}", self.place.chain, self.place.table);
        batch.step(step, (kind, flags), self.family(), |out| {
            out.text(1, &self.place.table.name).text(3, self.place.chain);
            fill(out);
        });
    }

    fn flush(&self, batch: &mut Batch) {
        let step = format!("empty chain {} of table {}", self.place.chain, self.place.table);
        batch.step(step, (kind::DELETE_RULE, 0), self.family(), |out| {
            out.text(1, &self.place.table.name).text(2, self.place.chain);
        });
    }

    /// A rule at the end, or before the one with this handle.
    fn rule(&self, batch: &mut Batch, chain: &str, before: Option<u64>, rule: &Rule) {
        let table = &self.place.table;
        let flags = if before.is_some() { CREATE } else { CREATE | APPEND };
        let step = format!("write rule `{rule}` into chain {chain} of table {table}");
        batch.step(step, (kind::NEW_RULE, flags), self.family(), |out| {
            out.text(1, &table.name).text(2, chain);
            match self.name.home {
                Home::Nftables => write_expressions(out, &lower(table.family, rule)),
                Home::IptablesNft | Home::IptablesLegacy => {
                    let comment = self.name.job.comment();
                    write_expressions(out, &iptables_rule::compose(self.name.family, rule, comment));
                    // NFTA_RULE_COMPAT, what iptables extensions want to know about the rule: any protocol, not inverted.
                    out.nest(5, |out| {
                        out.number(1, 0).number(2, 0);
                    });
                }
            }
            // NFTA_RULE_POSITION
            if let Some(handle) = before {
                out.long(6, handle);
            }
        });
    }
}

/// What `nft` lists as a comment of a table or chain: type 0, a length of one byte, text with a NUL
/// (libnftnl `NFTNL_UDATA_TABLE_COMMENT`, `NFTNL_UDATA_CHAIN_COMMENT`).
fn user_comment(text: &str) -> Vec<u8> {
    let mut bytes = vec![0, text.len() as u8 + 1];
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(0);
    bytes
}
