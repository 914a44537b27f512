//! A rule as iptables 1.8 composes it: what it says itself in expressions of nftables, its extensions (comment, mark, MASQUERADE) with
//! their own binary arguments, as every version of iptables-nft reads them.

use super::decode::raise;
use super::encode::lower;
use super::expression::{Expression, Meta};
use super::wire::attribute;
use crate::words::addr::Family;
use crate::words::rule::{Match, Rule, TableFamily, Verdict};

/// NF_NAT_RANGE_PROTO_RANDOM_FULLY (uapi/linux/netfilter/nf_nat.h).
const FULLY_RANDOM: u32 = 0x10;
/// Arguments are as long as their C structure, padded to the alignment of a 64-bit number (XT_ALIGN).
const ALIGN: usize = 8;

/// The family of iptables' tables.
pub(super) const fn table_family(family: Family) -> TableFamily {
    match family {
        Family::V4 => TableFamily::Ip,
        Family::V6 => TableFamily::Ip6,
    }
}

/// The expressions of a rule with a comment.
pub(super) fn compose(family: Family, rule: &Rule, comment_text: &str) -> Vec<Expression> {
    let mut program = Vec::new();
    for test in &rule.matches {
        match test {
            Match::Mark { mask, value } => program.push(mark(*mask, *value)),
            other => {
                let alone = Rule { matches: vec![other.clone()], counter: false, verdict: Verdict::Return };
                program.extend(lower(table_family(family), &alone));
                program.pop();
            }
        }
    }
    program.push(comment(comment_text));
    program.push(Expression::Counter);
    match &rule.verdict {
        Verdict::Masquerade { fully_random } => program.push(masquerade(family, *fully_random)),
        verdict => {
            let alone = Rule { matches: Vec::new(), counter: false, verdict: verdict.clone() };
            program.extend(lower(table_family(family), &alone));
        }
    }
    program
}

/// The comment of a rule and what it says, by the attributes the kernel lists.
pub(super) fn read(family: Family, rule: &[u8]) -> (Option<String>, Option<Rule>) {
    let Some(program) = attribute(rule, 4).and_then(Expression::read_all) else { return (None, None) };
    let mut comment = None;
    let mut plain = Vec::new();
    for step in program {
        match step {
            Expression::Counter => {}
            Expression::Extension { name, argument, .. } if name == "comment" => {
                let length = argument.iter().position(|byte| *byte == 0).unwrap_or(argument.len());
                comment = Some(String::from_utf8_lossy(&argument[..length]).into_owned());
            }
            Expression::Extension { name, revision: 1, argument } if name == "mark" => {
                match marked(&argument) {
                    Some(expressions) => plain.extend(expressions),
                    None => return (comment, None),
                }
            }
            Expression::Target { name, argument, .. } if name == "MASQUERADE" => {
                match masqueraded(family, &argument) {
                    Some(expression) => plain.push(expression),
                    None => return (comment, None),
                }
            }
            // Of no rule of ours, but nothing behind it is reached.
            Expression::Target { name, .. } if name == "REJECT" => plain.push(Expression::Drop),
            other => plain.push(other),
        }
    }
    let rule = raise(table_family(family), &Default::default(), &plain);
    (comment, rule)
}

/// `-m comment --comment TEXT` (uapi/linux/netfilter/xt_comment.h: 256 bytes, NUL-terminated).
pub(super) fn comment(text: &str) -> Expression {
    const XT_MAX_COMMENT_LEN: usize = 256;
    let mut argument = text.as_bytes().to_vec();
    argument.resize(XT_MAX_COMMENT_LEN, 0);
    Expression::Extension { name: "comment".to_owned(), revision: 0, argument }
}

/// `-m mark` (uapi/linux/netfilter/xt_mark.h `xt_mark_mtinfo1`: mark, mask, whether inverted).
fn mark(mask: u32, value: u32) -> Expression {
    let mut argument = [value.to_ne_bytes(), mask.to_ne_bytes()].concat();
    argument.push(0);
    argument.resize(argument.len().next_multiple_of(ALIGN), 0);
    Expression::Extension { name: "mark".to_owned(), revision: 1, argument }
}

fn marked(argument: &[u8]) -> Option<[Expression; 3]> {
    let (value, mask) = (argument.get(..4)?, argument.get(4..8)?);
    (argument.get(8) == Some(&0)).then_some(())?;
    Some([
        Expression::Meta(Meta::Mark),
        Expression::Mask(mask.to_vec()),
        Expression::Compare { equal: true, value: value.to_vec() },
    ])
}

/// Where the flags are in MASQUERADE's argument, and how long it is: for IPv4 `nf_nat_ipv4_multi_range_compat` (a count of 1, flags,
/// two addresses, two ports), for IPv6 `nf_nat_range` (flags, two addresses, two ports).
const fn masquerade_layout(family: Family) -> (usize, usize) {
    match family {
        Family::V4 => (4, 20),
        Family::V6 => (0, 40),
    }
}

fn masquerade(family: Family, fully_random: bool) -> Expression {
    let (flags, length) = masquerade_layout(family);
    let mut argument = vec![0; length.next_multiple_of(ALIGN)];
    if family == Family::V4 {
        argument[..4].copy_from_slice(&1u32.to_ne_bytes());
    }
    let bits = if fully_random { FULLY_RANDOM } else { 0 };
    argument[flags..flags + 4].copy_from_slice(&bits.to_ne_bytes());
    Expression::Target { name: "MASQUERADE".to_owned(), revision: 0, argument }
}

/// None if it says more than that, ports for example.
fn masqueraded(family: Family, argument: &[u8]) -> Option<Expression> {
    let expression = |fully_random| masquerade(family, fully_random);
    let same = |known: &Expression| matches!(known, Expression::Target { argument: written, .. } if written == argument);
    let fully_random = [false, true].into_iter().find(|random| same(&expression(*random)))?;
    Some(Expression::Masquerade { flags: if fully_random { FULLY_RANDOM } else { 0 } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::touch::world::kernel::nftables::encode::write_expressions;
    use crate::touch::world::kernel::nftables::wire::Attributes;
    use crate::words::rule::Side;

    #[test]
    fn a_rule_is_read_as_written() {
        for family in [Family::V4, Family::V6] {
            let prefix = if family == Family::V4 { "10.5.0.0/17" } else { "fd42::/47" }.parse().unwrap();
            let address = Match::Address { side: Side::Destination, negated: true, prefix };
            let mark = Match::Mark { mask: 0x4000, value: 0x4000 };
            for verdict in [
                Verdict::Masquerade { fully_random: true },
                Verdict::Masquerade { fully_random: false },
                Verdict::Return,
                Verdict::Accept,
                Verdict::Jump("FLANNEL-FWD".into()),
            ] {
                for matches in
                    [vec![], vec![address.clone()], vec![mark.clone()], vec![mark.clone(), address.clone()]]
                {
                    let rule = Rule { matches, counter: false, verdict: verdict.clone() };
                    let mut out = Attributes::default();
                    write_expressions(&mut out, &compose(family, &rule, "flanneld masq"));
                    assert_eq!(read(family, out.as_bytes()), (Some("flanneld masq".to_owned()), Some(rule)));
                }
            }
        }
    }
}
