//! Upstream's chains ([`SharedChain`]) in the older tables: both tables of a family are written by one `iptables-legacy-restore`.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::which::legacy as command;
use super::{Legacy, run};
use crate::touch::world::WorldError;
use crate::words::addr::{Family, Prefix};
use crate::words::fact::shared_chain::{
    ChainName, DOCKER_USER, Entrance, Job, Missing, SeenRule, SharedChain, iptables_jump, iptables_line,
    read_iptables_line,
};

type Seen = SeenRule<String>;

/// What a table's listing says of the chains around ours.
struct Found {
    own: Option<Vec<Seen>>,
    outer: Vec<Seen>,
    docker: Option<Vec<Seen>>,
}

impl Found {
    fn read(job: Job, listing: &str) -> Self {
        let exists = |chain: &str| listing.lines().any(|line| line.strip_prefix("-N ") == Some(chain));
        let rules = |chain: &str| -> Vec<Seen> {
            let start = format!("-A {chain} ");
            listing.lines().filter_map(|line| line.strip_prefix(&start)).map(read_iptables_line).collect()
        };
        Self {
            own: exists(job.chain()).then(|| rules(job.chain())),
            outer: rules(job.outer()),
            docker: (job == Job::Forward && exists(DOCKER_USER)).then(|| rules(DOCKER_USER)),
        }
    }
}

impl Legacy {
    /// Our rules in the chain, if there are any.
    pub(in super::super) fn observe_shared(
        &mut self,
        name: ChainName,
        cidrs: &BTreeSet<Prefix>,
    ) -> Result<Option<SharedChain>, WorldError> {
        let table = name.job.table();
        if !self.in_use(name.family, table) || command(name.family, "-restore").is_none() {
            return Ok(None);
        }
        let found = Found::read(name.job, &self.table(name.family, table)?);
        let mut faults = Vec::new();
        for (chain, rules) in [(name.job.outer(), Some(&found.outer)), (DOCKER_USER, found.docker.as_ref())] {
            if rules.is_some_and(|rules| !Entrance::of(name.job, rules, true).is_right()) {
                faults.push(format!("{chain} does not lead to it as it should"));
            }
        }
        let leftovers = name.leftovers(cidrs, &found.outer);
        let leftovers = leftovers.into_iter().filter_map(|seen| seen.rule.clone()).collect();
        Ok(name.found(cidrs, found.own.as_deref(), leftovers, faults))
    }

    /// Makes the chains of a family what they should be (none: nothing of ours), by one command.
    pub(in super::super) fn change_shared(
        &mut self,
        family: Family,
        wanted: &[(ChainName, Option<&SharedChain>, BTreeSet<Prefix>)],
    ) -> Result<(), WorldError> {
        let mut text = String::new();
        for (name, wanted, cidrs) in wanted {
            let table = name.job.table();
            // A table that nobody uses has nothing, and is made by the command.
            let listing = match self.in_use(family, table) {
                true => self.table(family, table)?,
                false => String::new(),
            };
            let found = Found::read(name.job, &listing);
            let _ = writeln!(text, "*{table}");
            write(&mut text, name, cidrs, &found, *wanted);
            text.push_str("COMMIT\n");
        }
        run(family, "-restore", &["--noflush", "--wait", "5"], &text).map(drop)
    }
}

fn write(
    text: &mut String,
    name: &ChainName,
    cidrs: &BTreeSet<Prefix>,
    found: &Found,
    wanted: Option<&SharedChain>,
) {
    let chain = name.job.chain();
    let own = found.own.as_deref().unwrap_or_default();
    let rules = name.written(cidrs, own, wanted.map(|chain| chain.rules.as_slice()));
    if let Some(rules) = &rules {
        // This line makes the chain, or empties it.
        let _ = writeln!(text, ":{chain} - [0:0]");
        for rule in rules {
            let _ = writeln!(text, "-A {chain} {}", iptables_line(name.job, rule));
        }
    }
    lead(text, name, cidrs, (name.job.outer(), &found.outer), rules.is_some());
    if let Some(docker) = &found.docker {
        // Not for neighbors alone: whoever takes the last rule may not know of this jump.
        lead(text, name, cidrs, (DOCKER_USER, docker), wanted.is_some());
    }
    if rules.is_none() && found.own.is_some() {
        let _ = writeln!(text, "-F {chain}\n-X {chain}");
    }
}

/// Makes another chain lead to ours, or not.
fn lead(
    text: &mut String,
    name: &ChainName,
    cidrs: &BTreeSet<Prefix>,
    (chain, seen): (&str, &[Seen]),
    wanted: bool,
) {
    let entrance = Entrance::of(name.job, seen, wanted);
    let leftovers = name.leftovers(cidrs, seen);
    // First what comes, while the numbers of the rules are those that were seen.
    match entrance.missing {
        None => {}
        Some(Missing::AtTheEnd) => {
            let _ = writeln!(text, "-A {chain} {}", iptables_jump(name.job));
        }
        Some(Missing::Before(place)) => {
            let _ = writeln!(text, "-I {chain} {} {}", place + 1, iptables_jump(name.job));
        }
    }
    let gone = entrance.gone.iter().filter_map(|place| seen.get(*place));
    for rule in gone.chain(leftovers) {
        let _ = writeln!(text, "-D {chain} {}", rule.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::fact::shared_chain::Home;

    #[test]
    fn one_text_for_whatever_is_there() {
        let name = ChainName { home: Home::IptablesLegacy, family: Family::V4, job: Job::Forward };
        let cidrs = BTreeSet::from(["10.5.0.0/16".parse().unwrap()]);
        let listing = "-P FORWARD DROP\n-N DOCKER-USER\n-N FLANNEL-FWD\n-A FORWARD -j DOCKER-USER\n\
            -A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n\
            -A FORWARD -s 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
            -A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n\
            -A DOCKER-USER -i eth9 -j DROP\n-A DOCKER-USER -j RETURN\n\
            -A FLANNEL-FWD -s 10.6.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
            -A FLANNEL-FWD -p tcp -j DROP\n";
        let rules = ["-s 10.5.0.0/16 -j ACCEPT", "-d 10.5.0.0/16 -j ACCEPT"];
        let rules = rules.iter().filter_map(|line| read_iptables_line(line).rule).collect();
        let chain = SharedChain { name, rules, faults: Vec::new() };
        let mut text = String::new();
        write(&mut text, &name, &cidrs, &Found::read(Job::Forward, listing), Some(&chain));
        let comment = "-m comment --comment \"flanneld forward\"";
        assert_eq!(
            text,
            format!(
                ":FLANNEL-FWD - [0:0]\n\
                -A FLANNEL-FWD -s 10.6.0.0/16 {comment} -j ACCEPT\n\
                -A FLANNEL-FWD -s 10.5.0.0/16 {comment} -j ACCEPT\n\
                -A FLANNEL-FWD -d 10.5.0.0/16 {comment} -j ACCEPT\n\
                -D FORWARD {comment} -j FLANNEL-FWD\n\
                -D FORWARD -s 10.5.0.0/16 {comment} -j ACCEPT\n\
                -I DOCKER-USER 2 {comment} -j FLANNEL-FWD\n"
            )
        );
        let mut text = String::new();
        write(&mut text, &name, &cidrs, &Found::read(Job::Forward, ""), None);
        assert_eq!(text, "", "there is nothing to take away");
    }
}
