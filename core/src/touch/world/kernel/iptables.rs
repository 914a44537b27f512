//! The older iptables (x_tables), which are not nftables: a host may have both, and packets pass both. The only exec for
//! the packet filter; where the tables are not in use, nothing is ever executed.

mod entries;
mod shared;
mod which;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::touch::world::WorldError;
use crate::words::addr::{Family, Prefix};

pub(super) const CHAIN: &str = "FLANNEL-FWD";
pub(super) const COMMENT: &str = "flanneld forward";

pub(super) use self::which::Commands;
use self::which::{legacy as command, legacy_name as program};

/// The x_tables of the namespace this was made in.
pub(super) struct Legacy {
    /// The namespace, to be sure that a command would run in it.
    namespace: PathBuf,
    /// What a command said last of a table, and what the kernel had then.
    read: BTreeMap<(Family, &'static str), Reading>,
}

/// What the kernel has of a table, and what a command says that is.
struct Reading {
    entries: Vec<u8>,
    rules: String,
}

impl Legacy {
    /// Those of the calling thread's namespace.
    pub(super) fn here() -> Result<Self, WorldError> {
        Ok(Self { namespace: namespace()?, read: BTreeMap::new() })
    }

    /// Whether a filter table is in use here, and there is a command to write it with.
    pub(super) fn is_writable(&self, family: Family) -> bool {
        self.in_use(family, "filter")
            && command(family, "-restore").is_some()
            && command(family, "").is_some()
    }

    /// What to tell the operator, if the filter table is in use and we cannot write it.
    pub(super) fn hint(&self) -> Option<String> {
        let family = [Family::V4, Family::V6]
            .into_iter()
            .find(|f| self.in_use(*f, "filter") && !self.is_writable(*f))?;
        Some(format!(
            "this host also has rules of the older {0}, whose FORWARD chain may drop what we forward, and no {0}-restore to \
             add ours with: install it, or accept the network there by hand",
            program(family)
        ))
    }

    /// The kernel lists a table once somebody used it. `thread-self`, because our thread may be in another namespace
    /// than the process; if it has left the one we were made in, we know nothing.
    fn in_use(&self, family: Family, table: &str) -> bool {
        let list = match family {
            Family::V4 => "/proc/thread-self/net/ip_tables_names",
            Family::V6 => "/proc/thread-self/net/ip6_tables_names",
        };
        let names = fs::read_to_string(list).unwrap_or_default();
        names.lines().any(|name| name == table) && namespace().is_ok_and(|here| here == self.namespace)
    }

    /// Those of `cidrs` that our chain accepts; none if the table is not in use or cannot be written.
    pub(super) fn accepted(
        &mut self,
        family: Family,
        cidrs: &BTreeSet<Prefix>,
    ) -> Result<Option<BTreeSet<Prefix>>, WorldError> {
        if !self.is_writable(family) {
            return Ok(None);
        }
        let rules = self.rules(family)?;
        let has = |rule: &str| rules.lines().any(|line| line == rule);
        let complete = |cidr: &&Prefix| {
            has(&jump("-A FORWARD")) && pair(cidr).iter().all(|rule| has(&format!("-A {rule}")))
        };
        Ok(Some(cidrs.iter().filter(|cidr| cidr.family() == family).filter(complete).copied().collect()))
    }

    /// Adds and removes networks with one exec.
    pub(super) fn change(
        &mut self,
        family: Family,
        add: &[Prefix],
        remove: &[Prefix],
    ) -> Result<(), WorldError> {
        let rules = self.rules(family)?;
        let has = |rule: &str| rules.lines().any(|line| line == rule);
        let mut text = String::from("*filter\n");
        let mut left = rules.lines().filter(|line| line.starts_with(&format!("-A {CHAIN} "))).count();
        for rule in remove.iter().filter(|cidr| !add.contains(cidr)).flat_map(pair) {
            if has(&format!("-A {rule}")) {
                text.push_str(&format!("-D {rule}\n"));
                left -= 1;
            }
        }
        if !add.is_empty() && !has(&format!("-N {CHAIN}")) {
            text.push_str(&format!("-N {CHAIN}\n"));
        }
        for rule in add.iter().flat_map(pair) {
            if !has(&format!("-A {rule}")) {
                text.push_str(&format!("-A {rule}\n"));
            }
        }
        let jumps = has(&jump("-A FORWARD"));
        if !add.is_empty() && !jumps {
            text.push_str(&format!("{}\n", jump("-I FORWARD 1")));
        }
        if add.is_empty() && left == 0 && has(&format!("-N {CHAIN}")) {
            if jumps {
                text.push_str(&format!("{}\n", jump("-D FORWARD")));
            }
            text.push_str(&format!("-X {CHAIN}\n"));
        }
        text.push_str("COMMIT\n");
        run(family, "-restore", &["--noflush", "--wait", "5"], &text).map(drop)
    }

    /// Deletes a chain of table `nat` and the rules that jump there; false if there is none. Two commands at most, and none
    /// where the table is not in use.
    pub(super) fn remove_nat_chain(&mut self, family: Family, chain: &str) -> Result<bool, WorldError> {
        if !self.in_use(family, "nat") || command(family, "").is_none() {
            return Ok(false);
        }
        let rules = self.table(family, "nat")?;
        if !rules.lines().any(|line| line == format!("-N {chain}")) {
            return Ok(false);
        }
        let mut text = String::from("*nat\n");
        for rule in rules.lines().filter_map(|line| line.strip_prefix("-A ")) {
            let mut words = rule.split(' ').rev();
            if words.next() == Some(chain) && matches!(words.next(), Some("-j" | "-g")) {
                text.push_str(&format!("-D {rule}\n"));
            }
        }
        text.push_str(&format!("-F {chain}\n-X {chain}\nCOMMIT\n"));
        run(family, "-restore", &["--noflush", "--wait", "5"], &text).map(|_| true)
    }

    /// Deletes the rules of a chain of table `filter` that name this address alone, and says how many; as above.
    pub(super) fn remove_rules_about(&mut self, chain: &str, address: IpAddr) -> Result<usize, WorldError> {
        let family = Family::of(address);
        if !self.is_writable(family) {
            return Ok(0);
        }
        let (rules, prefix) = (self.rules(family)?, Prefix::host(address).to_string());
        let of_chain = rules.lines().filter_map(|line| line.strip_prefix("-A "));
        let is_meant =
            |rule: &&str| rule.split(' ').next() == Some(chain) && rule.split(' ').any(|word| word == prefix);
        let meant: Vec<&str> = of_chain.filter(is_meant).collect();
        if !meant.is_empty() {
            let lines: String = meant.iter().map(|rule| format!("-D {rule}\n")).collect();
            run(family, "-restore", &["--noflush", "--wait", "5"], &format!("*filter\n{lines}COMMIT\n"))?;
        }
        Ok(meant.len())
    }

    fn rules(&mut self, family: Family) -> Result<String, WorldError> {
        self.table(family, "filter")
    }

    /// The rules of a table as `iptables-legacy -S` prints them. The command runs only if the kernel has other entries than when
    /// it ran last.
    fn table(&mut self, family: Family, table: &'static str) -> Result<String, WorldError> {
        let now = entries::read(family, table);
        if let (Some(now), Some(last)) = (&now, self.read.get(&(family, table)))
            && last.entries == *now
        {
            return Ok(last.rules.clone());
        }
        let rules = run(family, "", &["--wait", "5", "-t", table, "-S"], "")?;
        // If somebody wrote meanwhile, these entries are older than the rules, and the next look runs it again.
        if let Some(entries) = now {
            self.read.insert((family, table), Reading { entries, rules: rules.clone() });
        }
        Ok(rules)
    }

    /// Whether FORWARD may drop what it does not know.
    pub(super) fn may_drop(&mut self, family: Family) -> Result<bool, WorldError> {
        if !self.is_writable(family) {
            return Ok(false);
        }
        let rules = self.rules(family)?;
        let of_others = |line: &str| line.starts_with("-A FORWARD ") && line != jump("-A FORWARD");
        Ok(rules
            .lines()
            .any(|line| line.starts_with("-P FORWARD ") && !line.ends_with(" ACCEPT") || of_others(line)))
    }
}

/// The two rules of a network, as `iptables -S` prints them behind `-A`.
fn pair(cidr: &Prefix) -> [String; 2] {
    ["-s", "-d"].map(|side| format!("{CHAIN} {side} {cidr} -m comment --comment \"{COMMENT}\" -j ACCEPT"))
}

fn jump(verb: &str) -> String {
    format!("{verb} -m comment --comment \"{COMMENT}\" -j {CHAIN}")
}

fn namespace() -> Result<PathBuf, WorldError> {
    let path = "/proc/thread-self/ns/net";
    fs::read_link(path).map_err(|source| WorldError::Io { action: format!("read {path}"), source })
}

fn run(family: Family, suffix: &str, arguments: &[&str], input: &str) -> Result<String, WorldError> {
    let action = format!("run {}{suffix}", program(family));
    let path = command(family, suffix).ok_or_else(|| WorldError::Unsupported {
        action: action.clone(),
        what: format!("it is in none of {}", which::DIRECTORIES.join(", ")),
    })?;
    let talk = || -> io::Result<std::process::Output> {
        let mut child = Command::new(path)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = talk().map_err(|source| WorldError::Io { action: action.clone(), source })?;
    if !output.status.success() {
        let detail = Some(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "));
        let source = io::Error::other(output.status.to_string());
        return Err(WorldError::Refused { action, detail, source });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
