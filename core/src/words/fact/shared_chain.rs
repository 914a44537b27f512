//! Upstream's own chains: every flannel agent of a host writes its rules into the same ones, and whoever looks for them
//! (`iptables -S`, a monitoring script, Go flanneld) finds them by these names.
//!
//! What is ours in such a chain follows from what a rule speaks of, and is decided here for every way of reading it.

use std::collections::BTreeSet;
use std::fmt;

use crate::words::addr::{Family, Prefix};
use crate::words::rule::{Base, ChainKind, Hook, Match, Rule, Side, TableFamily, TableName, Verdict};

/// What keeps the chain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Home {
    /// The tables of iptables-nft.
    IptablesNft,
    /// The tables of the older iptables (x_tables).
    IptablesLegacy,
    /// `ip flannel-ipv4` and `ip6 flannel-ipv6` of nftables.
    Nftables,
}

impl Home {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::IptablesNft, Self::IptablesLegacy, Self::Nftables];
}

/// What the chain is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Job {
    /// To give what leaves the network the node's address.
    Masquerade,
    /// To accept what is forwarded from and to the network.
    Forward,
}

impl Job {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Masquerade, Self::Forward];

    /// iptables' table.
    pub const fn table(self) -> &'static str {
        match self {
            Self::Masquerade => "nat",
            Self::Forward => "filter",
        }
    }

    /// iptables' chain that leads to ours.
    pub const fn outer(self) -> &'static str {
        match self {
            Self::Masquerade => "POSTROUTING",
            Self::Forward => "FORWARD",
        }
    }

    /// Our chain in a table of iptables.
    pub const fn chain(self) -> &'static str {
        match self {
            Self::Masquerade => "FLANNEL-POSTRTG",
            Self::Forward => "FLANNEL-FWD",
        }
    }

    /// What every rule of ours in a table of iptables carries.
    pub const fn comment(self) -> &'static str {
        match self {
            Self::Masquerade => "flanneld masq",
            Self::Forward => "flanneld forward",
        }
    }
}

/// Docker's chain for the operator's rules, which every packet passes before Docker's own: what is accepted there no rule of
/// Docker's drops.
pub const DOCKER_USER: &str = "DOCKER-USER";

/// Which chain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ChainName {
    /// What keeps it.
    pub home: Home,
    /// Its family.
    pub family: Family,
    /// What it is for.
    pub job: Job,
}

/// Our rules in one of upstream's chains. That the chain is led to is part of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SharedChain {
    /// Which.
    pub name: ChainName,
    /// Ours, in order. Those of other agents are not in here, and stay where they are.
    pub rules: Vec<Rule>,
    /// What was found that is not as it should be, in a few words each. No plan has any, so whatever has one is written anew.
    pub faults: Vec<String>,
}

/// A rule as it was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SeenRule<Place> {
    /// Where: a handle, or a line.
    pub place: Place,
    /// The comment of iptables, if it has one.
    pub comment: Option<String>,
    /// What it says, if we can say it.
    pub rule: Option<Rule>,
}

/// Whose a rule is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// Ours, by what it speaks of.
    Ours,
    /// The first rule of a masquerading chain, which is everybody's.
    Everybody,
    /// Another flannel agent's.
    Neighbor,
    /// Nobody's who has any business in our chain.
    Stranger,
}

impl ChainName {
    /// Whose a rule of the chain is, where these networks are ours.
    pub fn owner<Place>(&self, cidrs: &BTreeSet<Prefix>, seen: &SeenRule<Place>) -> Owner {
        let commented = self.home == Home::Nftables || seen.comment.as_deref() == Some(self.job.comment());
        let Some(rule) = seen.rule.as_ref().filter(|_| commented) else { return Owner::Stranger };
        let mut spoken_of = addresses(rule).peekable();
        match self.job {
            Job::Masquerade if spoken_of.peek().is_none() => {
                let marked = matches!(rule.matches.as_slice(), [Match::Mark { .. }]);
                if marked && rule.verdict == Verdict::Return { Owner::Everybody } else { Owner::Stranger }
            }
            Job::Masquerade if spoken_of.any(|one| cidrs.iter().any(|cidr| cidr.overlaps(one))) => {
                Owner::Ours
            }
            Job::Masquerade => Owner::Neighbor,
            // The CNI plugins accept subnets of our network here: only the network itself is ours.
            Job::Forward => match (rule.matches.as_slice(), &rule.verdict) {
                ([Match::Address { negated: false, prefix, .. }], Verdict::Accept) => {
                    if cidrs.contains(prefix) { Owner::Ours } else { Owner::Neighbor }
                }
                _ => Owner::Stranger,
            },
        }
    }

    /// What there is of ours: in the chain (none: there is no such chain), and of old versions beside it; with what is wrong
    /// around it. None if nothing of it is ours.
    pub fn found<Place>(
        &self,
        cidrs: &BTreeSet<Prefix>,
        chain: Option<&[SeenRule<Place>]>,
        leftovers: Vec<Rule>,
        mut faults: Vec<String>,
    ) -> Option<SharedChain> {
        let owners: Vec<Owner> =
            chain.iter().flat_map(|rules| rules.iter()).map(|rule| self.owner(cidrs, rule)).collect();
        let anything =
            owners.contains(&Owner::Ours) || (chain.is_some() && !owners.contains(&Owner::Neighbor));
        if !anything && leftovers.is_empty() {
            return None;
        }
        let strangers = owners.iter().filter(|owner| **owner == Owner::Stranger).count();
        if strangers > 0 {
            faults.push(format!("{strangers} rules in it are not of flannel"));
        }
        // Everybody's comes first, once.
        let commons = owners.iter().filter(|owner| **owner == Owner::Everybody).count();
        if commons > 1 || (commons == 1 && owners.first() != Some(&Owner::Everybody)) {
            faults.push("the rule about marks is not at its head".to_owned());
        }
        let ours = chain.into_iter().flatten().zip(&owners);
        let ours = ours.filter(|(_, owner)| matches!(owner, Owner::Ours | Owner::Everybody));
        let rules = ours.filter_map(|(seen, _)| seen.rule.clone());
        Some(SharedChain { name: *self, rules: leftovers.into_iter().chain(rules).collect(), faults })
    }

    /// The rules of the chain when ours are these (none: when we have left it): everybody's, those of other agents, ours. None is no chain.
    pub fn written<Place>(
        &self,
        cidrs: &BTreeSet<Prefix>,
        chain: &[SeenRule<Place>],
        ours: Option<&[Rule]>,
    ) -> Option<Vec<Rule>> {
        let of = |owner| {
            chain
                .iter()
                .filter(move |rule| self.owner(cidrs, rule) == owner)
                .filter_map(|seen| seen.rule.clone())
        };
        let neighbors: Vec<Rule> = of(Owner::Neighbor).collect();
        let ours = ours.unwrap_or_default();
        if neighbors.is_empty() && ours.is_empty() {
            return None;
        }
        let common = |rule: &&Rule| self.job == Job::Masquerade && addresses(rule).next().is_none();
        let first = ours.iter().find(common).cloned().or_else(|| of(Owner::Everybody).next());
        let ours = ours.iter().filter(|rule| !common(rule)).cloned();
        Some(first.into_iter().chain(neighbors).chain(ours).collect())
    }
}

/// The networks a rule speaks of.
fn addresses(rule: &Rule) -> impl Iterator<Item = &Prefix> {
    rule.matches.iter().filter_map(|test| match test {
        Match::Address { prefix, .. } if *prefix != Prefix::multicast(prefix.family()) => Some(prefix),
        _ => None,
    })
}

/// What is to be done to a chain of iptables that leads to ours: which of its rules go, and where the jump comes in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entrance {
    /// Places of the rules that go.
    pub gone: Vec<usize>,
    /// Where the jump is missing.
    pub missing: Option<Missing>,
}

/// Where a jump belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// Before the rule at this place, because nothing behind that is ever reached.
    Before(usize),
    /// At the end, as upstream has it.
    AtTheEnd,
}

impl Entrance {
    /// That of a chain with these rules, to a chain that is there (or not, when we leave).
    pub fn of<Place>(job: Job, rules: &[SeenRule<Place>], wanted: bool) -> Self {
        let end = rules.iter().position(ends_all);
        let jumps = |(_, seen): &(usize, &SeenRule<Place>)| is_jump(seen, job.chain());
        let good = rules.iter().enumerate().filter(jumps).filter(|(place, seen)| {
            seen.comment.as_deref() == Some(job.comment()) && end.is_none_or(|end| *place < end)
        });
        let kept = good.map(|(place, _)| place).last().filter(|_| wanted);
        let gone = rules.iter().enumerate().filter(jumps).map(|(place, _)| place);
        let missing = end.map_or(Missing::AtTheEnd, Missing::Before);
        Self {
            gone: gone.filter(|place| Some(*place) != kept).collect(),
            missing: (wanted && kept.is_none()).then_some(missing),
        }
    }

    /// Whether nothing is to be done.
    pub fn is_right(&self) -> bool {
        self.gone.is_empty() && self.missing.is_none()
    }
}

impl ChainName {
    /// What an old version of upstream, before it had chains, wrote into the outer chain for these networks.
    pub fn leftovers<'a, Place>(
        &self,
        cidrs: &BTreeSet<Prefix>,
        outer: &'a [SeenRule<Place>],
    ) -> Vec<&'a SeenRule<Place>> {
        outer.iter().filter(|seen| self.owner(cidrs, seen) == Owner::Ours).collect()
    }
}

fn is_jump<Place>(seen: &SeenRule<Place>, to: &str) -> bool {
    seen.rule
        .as_ref()
        .is_some_and(|rule| rule.matches.is_empty() && rule.verdict == Verdict::Jump(to.to_owned()))
}

/// Whatever comes to this rule ends there.
fn ends_all<Place>(seen: &SeenRule<Place>) -> bool {
    let ends = |rule: &Rule| matches!(rule.verdict, Verdict::Accept | Verdict::Drop | Verdict::Return);
    seen.rule.as_ref().is_some_and(|rule| rule.matches.is_empty() && ends(rule))
}

/// Upstream's chain of nftables (pkg/trafficmngr/nftables).
pub struct NftChain {
    /// Its table.
    pub table: TableName,
    /// The table's comment.
    pub table_comment: String,
    /// Its name.
    pub name: &'static str,
    /// Its comment.
    pub comment: &'static str,
    /// Where it is hooked in.
    pub base: Base,
}

impl NftChain {
    /// The one for a job.
    pub fn of(family: Family, job: Job) -> Self {
        let (family, name) = match family {
            Family::V4 => (TableFamily::Ip, "flannel-ipv4"),
            Family::V6 => (TableFamily::Ip6, "flannel-ipv6"),
        };
        let table = TableName { family, name: name.to_owned() };
        let table_comment = format!("rules for {name}");
        match job {
            Job::Masquerade => Self {
                table,
                table_comment,
                name: "postrtg",
                comment: "chain to manage traffic masquerading by flannel",
                base: Base { kind: ChainKind::Nat, hook: Hook::Postrouting, priority: 100 },
            },
            Job::Forward => Self {
                table,
                table_comment,
                name: "forward",
                comment: "chain to accept flannel traffic",
                base: Base { kind: ChainKind::Filter, hook: Hook::Forward, priority: 0 },
            },
        }
    }
}

impl SharedChain {
    /// The networks it speaks of.
    pub fn cidrs(&self) -> impl Iterator<Item = Prefix> {
        self.rules.iter().flat_map(addresses).copied()
    }
}

/// A rule as `iptables -S` prints it behind `-A CHAIN`.
pub fn iptables_line(job: Job, rule: &Rule) -> String {
    let mut line = String::new();
    for test in &rule.matches {
        match test {
            Match::Address { side, negated, prefix } => {
                let flag = if *side == Side::Source { "-s" } else { "-d" };
                line.push_str(&format!("{}{flag} {prefix} ", if *negated { "! " } else { "" }));
            }
            Match::Mark { mask, value } => line.push_str(&format!("-m mark --mark {value:#x}/{mask:#x} ")),
            // No plan of ours has any other in such a chain.
            other => line.push_str(&format!("{other} ")),
        }
    }
    let target = match &rule.verdict {
        Verdict::Accept => "ACCEPT".to_owned(),
        Verdict::Drop => "DROP".to_owned(),
        Verdict::Return => "RETURN".to_owned(),
        Verdict::Masquerade { fully_random: true } => "MASQUERADE --random-fully".to_owned(),
        Verdict::Masquerade { fully_random: false } => "MASQUERADE".to_owned(),
        Verdict::Jump(chain) => chain.clone(),
        other => other.to_string(),
    };
    format!("{line}-m comment --comment \"{}\" -j {target}", job.comment())
}

/// The rule of the outer chain that leads to ours, behind `-A CHAIN`.
pub fn iptables_jump(job: Job) -> String {
    iptables_line(job, &jump(job))
}

/// The same as a rule.
pub fn jump(job: Job) -> Rule {
    Rule { matches: Vec::new(), counter: false, verdict: Verdict::Jump(job.chain().to_owned()) }
}

/// Reads what [`iptables_line`] writes, of whoever wrote it; the place is the line.
pub fn read_iptables_line(line: &str) -> SeenRule<String> {
    let (comment, rest) = match line.split_once("-m comment --comment ") {
        Some((before, after)) => match after.strip_prefix('"').and_then(|quoted| quoted.split_once('"')) {
            Some((comment, after)) => (Some(comment.to_owned()), format!("{before}{}", after.trim_start())),
            None => {
                let (comment, after) = after.split_once(' ').unwrap_or((after, ""));
                (Some(comment.to_owned()), format!("{before}{after}"))
            }
        },
        None => (None, line.to_owned()),
    };
    let words: Vec<&str> = rest.split_whitespace().collect();
    SeenRule { place: line.to_owned(), comment, rule: read_words(&words) }
}

fn read_words(mut words: &[&str]) -> Option<Rule> {
    let mut matches = Vec::new();
    loop {
        let negated = words.first() == Some(&"!");
        words = if negated { &words[1..] } else { words };
        match words {
            [flag @ ("-s" | "-d"), prefix, rest @ ..] => {
                let side = if *flag == "-s" { Side::Source } else { Side::Destination };
                matches.push(Match::Address { side, negated, prefix: prefix.parse().ok()? });
                words = rest;
            }
            ["-m", "mark", rest @ ..] if !negated => words = rest,
            ["--mark", mark, rest @ ..] if !negated => {
                let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
                let (value, mask) = mark.split_once('/').unwrap_or((mark, "0xffffffff"));
                matches.push(Match::Mark { mask: number(mask)?, value: number(value)? });
                words = rest;
            }
            ["-j", target, rest @ ..] if !negated => {
                let verdict = match (*target, rest) {
                    ("ACCEPT", []) => Verdict::Accept,
                    // Both end all that comes to them; no rule of ours is either.
                    ("DROP", []) | ("REJECT", _) => Verdict::Drop,
                    ("RETURN", []) => Verdict::Return,
                    ("MASQUERADE", []) => Verdict::Masquerade { fully_random: false },
                    ("MASQUERADE", ["--random-fully"]) => Verdict::Masquerade { fully_random: true },
                    (chain, []) => Verdict::Jump(chain.to_owned()),
                    _ => return None,
                };
                return Some(Rule { matches, counter: false, verdict });
            }
            _ => return None,
        }
    }
}

/// As lines of `iptables-restore`, or of `nft -f`.
impl fmt::Display for SharedChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ChainName { home, family, job } = self.name;
        let program = match (home, family) {
            (Home::IptablesNft, Family::V4) => "iptables-nft-restore",
            (Home::IptablesNft, Family::V6) => "ip6tables-nft-restore",
            (Home::IptablesLegacy, Family::V4) => "iptables-legacy-restore",
            (Home::IptablesLegacy, Family::V6) => "ip6tables-legacy-restore",
            (Home::Nftables, _) => return self.write_nft(f),
        };
        writeln!(f, "{program} --noflush '*{}", job.table())?;
        writeln!(f, "-A {} {}", job.outer(), iptables_jump(job))?;
        for rule in &self.rules {
            writeln!(f, "-A {} {}", job.chain(), iptables_line(job, rule))?;
        }
        self.faults.iter().try_for_each(|fault| writeln!(f, "# {fault}"))?;
        f.write_str("COMMIT'")
    }
}

impl SharedChain {
    fn write_nft(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let upstream = NftChain::of(self.name.family, self.name.job);
        let (table, chain) = (upstream.table, upstream.name);
        writeln!(f, "nft 'table {table} {{\n\tchain {chain} {{\n\t\t{}", upstream.base)?;
        self.rules.iter().try_for_each(|rule| writeln!(f, "\t\t{rule}"))?;
        self.faults.iter().try_for_each(|fault| writeln!(f, "\t\t# {fault}"))?;
        f.write_str("\t}\n}'")
    }
}
