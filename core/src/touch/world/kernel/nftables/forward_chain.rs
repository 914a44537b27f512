//! The FORWARD chain that iptables-nft keeps, and our chain in it: exactly what upstream writes with `iptables`.
//!
//! ```text
//! -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
//! -A FLANNEL-FWD -s 10.100.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
//! -A FLANNEL-FWD -d 10.100.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
//! ```
//!
//! The accept of a table of ours cannot outweigh a drop in this one, and on a host with Docker its policy is to drop. The
//! expressions are those of iptables 1.8, so that `iptables -S` and upstream's own agent read and delete them.

use std::collections::BTreeSet;

use super::super::iptables::{CHAIN, COMMENT};
use super::decode::raise;
use super::encode::{prefix_test, write_expressions};
use super::expression::Expression;
use super::iptables_rule;
use super::packet::number_of;
use super::wire::{APPEND, Attributes, Batch, CREATE, Socket, attribute, error_code, kind, long, text};
use crate::touch::world::WorldError;
use crate::words::addr::{Family, Prefix};
use crate::words::rule::{Match, Side, TableFamily, Verdict};

const TABLE: &str = "filter";
const FORWARD: &str = "FORWARD";

/// Others may write rules between our look and our transaction; then we look again.
const TRIES_MAX: usize = 16;

/// Our chain as it is now.
#[derive(Default)]
struct Found {
    /// Rules of FORWARD that do nothing but jump into our chain.
    jumps: Vec<u64>,
    /// Whether our chain is there.
    chain: bool,
    /// The rules in it, and what they accept.
    rules: Vec<(u64, Option<(Side, Prefix)>)>,
}

impl Found {
    fn accepts(&self, side: Side, cidr: &Prefix) -> bool {
        self.rules.iter().any(|(_, accepted)| *accepted == Some((side, *cidr)))
    }

    fn is_complete(&self, cidr: &Prefix) -> bool {
        !self.jumps.is_empty() && self.accepts(Side::Source, cidr) && self.accepts(Side::Destination, cidr)
    }
}

const fn table_family(family: Family) -> TableFamily {
    match family {
        Family::V4 => TableFamily::Ip,
        Family::V6 => TableFamily::Ip6,
    }
}

/// Whether iptables-nft (or ip6tables-nft) keeps a FORWARD chain here.
pub(super) fn exists(socket: &mut Socket, family: Family) -> Result<bool, WorldError> {
    // NFTA_CHAIN_HOOK: without one, no packet passes the chain.
    Ok(chain(socket, family, FORWARD)?.is_some_and(|found| attribute(&found, 4).is_some()))
}

fn chain(socket: &mut Socket, family: Family, name: &str) -> Result<Option<Vec<u8>>, WorldError> {
    let mut wanted = Attributes::default();
    wanted.text(1, TABLE).text(3, name);
    let what = format!("read chain {name} of table {} {TABLE}", table_family(family));
    socket.get(&what, kind::GET_CHAIN, number_of(table_family(family)), &wanted)
}

/// Those of `cidrs` that FORWARD accepts both from and to, by our chain.
pub(super) fn accepted(
    socket: &mut Socket,
    family: Family,
    cidrs: &BTreeSet<Prefix>,
) -> Result<BTreeSet<Prefix>, WorldError> {
    if !cidrs.iter().any(|cidr| cidr.family() == family) || !exists(socket, family)? {
        return Ok(BTreeSet::new());
    }
    let found = look(socket, family)?;
    Ok(cidrs.iter().filter(|cidr| found.is_complete(cidr)).copied().collect())
}

fn look(socket: &mut Socket, family: Family) -> Result<Found, WorldError> {
    let mut found = Found { chain: chain(socket, family, CHAIN)?.is_some(), ..Found::default() };
    if !found.chain {
        return Ok(found);
    }
    for (handle, program) in rules(socket, family, FORWARD)? {
        if program.as_deref().is_some_and(|program| matches!(program, [Expression::Jump(to)] if to == CHAIN))
        {
            found.jumps.push(handle);
        }
    }
    for (handle, program) in rules(socket, family, CHAIN)? {
        found.rules.push((handle, program.and_then(|program| accepted_by(family, &program))));
    }
    Ok(found)
}

/// A rule's handle, and what it does, less comments and counters; none if we cannot read it.
type Program = (u64, Option<Vec<Expression>>);

/// The rules of a chain.
fn rules(socket: &mut Socket, family: Family, chain: &str) -> Result<Vec<Program>, WorldError> {
    let mut wanted = Attributes::default();
    wanted.text(1, TABLE).text(2, chain);
    let what = format!("read rules of chain {chain} of table {} {TABLE}", table_family(family));
    let found = socket.dump(&what, kind::GET_RULE, number_of(table_family(family)), &wanted)?;
    // The filter by chain is newer than the one by table (Linux 4.11); do not depend on it.
    let rules = found.iter().filter(|rule| text(rule, 1) == Some(TABLE) && text(rule, 2) == Some(chain));
    Ok(rules.filter_map(|rule| Some((long(rule, 3)?, program(rule)))).collect())
}

fn program(rule: &[u8]) -> Option<Vec<Expression>> {
    let mut program = Expression::read_all(attribute(rule, 4)?)?;
    program.retain(|step| match step {
        Expression::Extension { name, .. } => name != "comment",
        other => *other != Expression::Counter,
    });
    Some(program)
}

fn accepted_by(family: Family, program: &[Expression]) -> Option<(Side, Prefix)> {
    let rule = raise(table_family(family), &Default::default(), program)?;
    match (rule.matches.as_slice(), &rule.verdict) {
        ([Match::Address { side, negated: false, prefix }], Verdict::Accept) => Some((*side, *prefix)),
        _ => None,
    }
}

/// Adds and removes networks in one transaction. What is as wanted already is left alone; our chain and the jump go
/// with the last rule.
pub(super) fn change(
    socket: &mut Socket,
    family: Family,
    add: &[Prefix],
    remove: &[Prefix],
) -> Result<(), WorldError> {
    for _ in 0..TRIES_MAX {
        let generation = socket.generation()?;
        if !exists(socket, family)? {
            return missing(family, add);
        }
        let found = look(socket, family)?;
        match socket.commit(transaction(family, generation, &found, add, remove)) {
            // Somebody else was faster.
            Err(error) if error_code(&error) == Some(libc::ERESTART) => {}
            other => return other,
        }
    }
    Err(WorldError::Unsupported {
        action: format!("write chain {CHAIN} of table {} {TABLE}", table_family(family)),
        what: format!("others changed the rules of this host {TRIES_MAX} times meanwhile"),
    })
}

fn missing(family: Family, add: &[Prefix]) -> Result<(), WorldError> {
    match add {
        [] => Ok(()),
        [cidr, ..] => Err(WorldError::Unsupported {
            action: format!("accept {cidr} in chain {FORWARD}"),
            what: format!("there is no chain {FORWARD} in table {} {TABLE}", table_family(family)),
        }),
    }
}

fn transaction(family: Family, generation: u32, found: &Found, add: &[Prefix], remove: &[Prefix]) -> Batch {
    let mut batch = Batch::new(Some(generation));
    let to = Writer { family };
    let goes = |accepted: &Option<(Side, Prefix)>| {
        accepted.is_some_and(|(_, cidr)| remove.contains(&cidr) && !add.contains(&cidr))
    };
    for (handle, _) in found.rules.iter().filter(|(_, accepted)| goes(accepted)) {
        to.delete_rule(&mut batch, CHAIN, *handle);
    }
    if add.is_empty() && found.rules.iter().all(|(_, accepted)| goes(accepted)) {
        for handle in &found.jumps {
            to.delete_rule(&mut batch, FORWARD, *handle);
        }
        if found.chain {
            to.chain(&mut batch, kind::DELETE_CHAIN, 0);
        }
    }
    if !add.is_empty() && !found.chain {
        to.chain(&mut batch, kind::NEW_CHAIN, CREATE);
    }
    for cidr in add {
        for side in [Side::Source, Side::Destination] {
            if !found.accepts(side, cidr) {
                to.accept(&mut batch, side, cidr);
            }
        }
    }
    if !add.is_empty() && found.jumps.is_empty() {
        // Without NLM_F_APPEND: at the head, before anything that may drop.
        to.rule(&mut batch, FORWARD, CREATE, Vec::new(), Expression::Jump(CHAIN.to_owned()));
    }
    batch
}

struct Writer {
    family: Family,
}

impl Writer {
    fn number(&self) -> u8 {
        number_of(table_family(self.family))
    }

    fn chain(&self, batch: &mut Batch, kind: u8, flags: u16) {
        let verb = if kind == kind::DELETE_CHAIN { "delete" } else { "write" };
        let step = format!("{verb} chain {CHAIN} of table {} {TABLE}", table_family(self.family));
        batch.step(step, (kind, flags), self.number(), |out| {
            out.text(1, TABLE).text(3, CHAIN);
        });
    }

    fn delete_rule(&self, batch: &mut Batch, chain: &str, handle: u64) {
        let step = format!("delete a rule of chain {chain} of table {} {TABLE}", table_family(self.family));
        batch.step(step, (kind::DELETE_RULE, 0), self.number(), |out| {
            out.text(1, TABLE).text(2, chain).long(3, handle);
        });
    }

    fn accept(&self, batch: &mut Batch, side: Side, cidr: &Prefix) {
        let mut tests = Vec::new();
        prefix_test(&mut tests, side, false, cidr);
        self.rule(batch, CHAIN, CREATE | APPEND, tests, Expression::Accept);
    }

    /// A rule as iptables 1.8 composes it: tests, comment, counter, verdict.
    fn rule(&self, batch: &mut Batch, chain: &str, flags: u16, tests: Vec<Expression>, verdict: Expression) {
        let mut program = tests;
        program.push(iptables_rule::comment(COMMENT));
        program.push(Expression::Counter);
        program.push(verdict);
        let step = format!("write a rule into chain {chain} of table {} {TABLE}", table_family(self.family));
        batch.step(step, (kind::NEW_RULE, flags), self.number(), |out| {
            out.text(1, TABLE).text(2, chain);
            write_expressions(out, &program);
            // NFTA_RULE_COMPAT, what iptables extensions want to know about the rule: any protocol, not inverted.
            out.nest(5, |out| {
                out.number(1, 0).number(2, 0);
            });
        });
    }
}
