//! The last good state of a network on disk: a start without the store plans from it.
//!
//! **Shape** — `<state dir>/<network>/last.json`: `{"config": document, "own": key or null, "leases": {key: value}}`,
//! with keys and values as the store holds them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::touch::whole_file;
use crate::words::lease::{LeaseSet, LeaseValue, Subnets};
use crate::words::name::NetworkName;

/// What was true when the store was last heard of.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LastGood {
    /// The config document.
    pub config: String,
    /// The subnets that this node holds.
    pub own: Option<Subnets>,
    /// Every lease.
    pub leases: LeaseSet,
}

#[derive(Serialize, Deserialize)]
struct Written {
    config: String,
    own: Option<String>,
    leases: BTreeMap<String, String>,
}

/// Directory of a network's state.
pub fn directory(state_dir: &Path, network: &NetworkName) -> PathBuf {
    state_dir.join(network.as_str())
}

fn file(state_dir: &Path, network: &NetworkName) -> PathBuf {
    directory(state_dir, network).join("last.json")
}

/// Reads it. None if there is none or if it cannot be read: it is only a cache, and the store has the truth.
pub fn read(state_dir: &Path, network: &NetworkName) -> Option<LastGood> {
    let path = file(state_dir, network);
    let text = fs::read_to_string(&path).ok()?;
    let written: Written = serde_json::from_str(&text)
        .inspect_err(|error| tracing::warn!("{} is not used: {error}", path.display()))
        .ok()?;
    let leases = written
        .leases
        .iter()
        .filter_map(|(key, value)| Some((Subnets::parse_key(key).ok()?, LeaseValue::from_json(value).ok()?)));
    Some(LastGood {
        config: written.config,
        own: written.own.and_then(|key| Subnets::parse_key(&key).ok()),
        leases: LeaseSet { leases: leases.collect(), ..LeaseSet::default() },
    })
}

/// Writes it in one step.
pub fn write(state_dir: &Path, network: &NetworkName, last: &LastGood) -> io::Result<()> {
    let written = Written {
        config: last.config.clone(),
        own: last.own.map(|own| own.key()),
        leases: last.leases.leases.iter().map(|(subnets, value)| (subnets.key(), value.to_json())).collect(),
    };
    let text = serde_json::to_string(&written)?;
    whole_file::write(&file(state_dir, network), text.as_bytes(), 0o644)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_rubbish_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let network = NetworkName::default_network();
        assert_eq!(read(dir.path(), &network), None);
        let own = Subnets::parse_key("10.5.1.0-24").unwrap();
        let value = LeaseValue::from_json(r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#).unwrap();
        let leases = LeaseSet { leases: [(own, value)].into(), ..LeaseSet::default() };
        let last = LastGood { config: "{}".into(), own: Some(own), leases };
        write(dir.path(), &network, &last).unwrap();
        assert_eq!(read(dir.path(), &network), Some(last));
        fs::write(file(dir.path(), &network), "{").unwrap();
        assert_eq!(read(dir.path(), &network), None);
    }
}
