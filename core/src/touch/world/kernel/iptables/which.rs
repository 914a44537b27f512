//! Which tables the command `iptables` of this host writes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::words::addr::Family;
use crate::words::fact::shared_chain::Home;

/// Where distributions keep it; PATH of a daemon may have none of them.
pub(super) const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// A command, where distributions keep it.
fn find(name: &str) -> Option<PathBuf> {
    DIRECTORIES.iter().map(|directory| Path::new(directory).join(name)).find(|path| path.exists())
}

/// A command of the older variant.
pub(super) fn legacy(family: Family, suffix: &str) -> Option<PathBuf> {
    find(&format!("{}{suffix}", legacy_name(family)))
}

/// Its name.
pub(super) const fn legacy_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-legacy",
        Family::V6 => "ip6tables-legacy",
    }
}

/// What was found out about commands by running them. That is done once for each, and only if the name that the links lead to does not
/// say it.
#[derive(Default)]
pub(in super::super) struct Commands {
    known: BTreeMap<PathBuf, Option<Kind>>,
}

/// What a command writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) struct Kind {
    /// Which tables.
    pub(in super::super) home: Home,
    /// Whether it knows `--random-fully`.
    pub(in super::super) fully_random: bool,
}

impl Commands {
    /// What `iptables` (or `ip6tables`) writes; none if there is no such command, or we cannot write there.
    pub(in super::super) fn kind(&mut self, family: Family) -> Option<Kind> {
        let name = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let path = fs::canonicalize(find(name)?).ok()?;
        let program = path.file_name()?.to_string_lossy().into_owned();
        let kind = match (program.contains("nft"), program.contains("legacy")) {
            (true, false) => Some(Kind { home: Home::IptablesNft, fully_random: true }),
            // The name is as old as the other variant: 1.8.
            (false, true) => Some(Kind { home: Home::IptablesLegacy, fully_random: true }),
            _ => *self.known.entry(path.clone()).or_insert_with(|| ask(&path)),
        };
        kind.filter(|kind| kind.home == Home::IptablesNft || legacy(family, "-restore").is_some())
    }
}

fn ask(path: &Path) -> Option<Kind> {
    let output = Command::new(path).arg("--version").output().ok()?;
    read_version(&String::from_utf8_lossy(&output.stdout))
}

/// `iptables v1.8.9 (nf_tables)`, `iptables v1.8.9 (legacy)`, `iptables v1.6.1`.
fn read_version(text: &str) -> Option<Kind> {
    let version = text.split_whitespace().find_map(|word| word.strip_prefix('v'))?;
    let parts: Vec<u32> = version.split('.').map_while(|part| part.parse().ok()).collect();
    let home = if text.contains("nf_tables") { Home::IptablesNft } else { Home::IptablesLegacy };
    Some(Kind { home, fully_random: parts.as_slice() >= [1, 6, 2].as_slice() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_say_what_they_write() {
        let kind = |text| read_version(text).map(|kind| (kind.home, kind.fully_random));
        assert_eq!(kind("iptables v1.8.9 (nf_tables)\n"), Some((Home::IptablesNft, true)));
        assert_eq!(kind("ip6tables v1.8.10 (legacy)"), Some((Home::IptablesLegacy, true)));
        assert_eq!(kind("iptables v1.6.2"), Some((Home::IptablesLegacy, true)));
        assert_eq!(kind("iptables v1.6.1"), Some((Home::IptablesLegacy, false)));
        assert_eq!(kind("sh: not found"), None);
    }
}
