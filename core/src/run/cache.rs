//! The last good state of a network on disk: a start without the store plans from it.
//!
//! **Shape** — `<state dir>/<network>/last.json`: `{"config": document, "own": key or null, "leases": {key: value}}`,
//! with keys and values as the store holds them. Only its owner reads it: the document may hold a key.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

use crate::touch::whole_file;
use crate::words::lease::{LeaseSet, LeaseValue, OwnLease, Subnets};
use crate::words::name::NetworkName;

/// What was true when the store was last heard of.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LastGood {
    /// The config document.
    pub config: String,
    /// What this node holds.
    pub own: Option<OwnLease>,
    /// Every lease; read from disk with our own in it.
    pub leases: Arc<LeaseSet>,
}

#[derive(Serialize)]
struct Written<'a> {
    config: &'a str,
    own: Option<String>,
    leases: Leases<'a>,
}

/// Everybody's, with our own as we know it.
struct Leases<'a>(&'a LastGood);

impl Serialize for Leases<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let own = self.0.own.as_ref();
        let others = self
            .0
            .leases
            .leases
            .iter()
            .map(|(subnets, value)| (subnets, &**value))
            .filter(|(subnets, _)| own.is_none_or(|own| own.subnets != **subnets));
        let own = own.map(|own| (&own.subnets, &own.value));
        serializer.collect_map(
            own.into_iter().chain(others).map(|(subnets, value)| (subnets.key(), value.to_json())),
        )
    }
}

#[derive(Deserialize)]
struct Read {
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
    let text = fs::read_to_string(&path)
        .inspect_err(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!("{} is not used: {error}", path.display());
            }
        })
        .ok()?;
    let written: Read = serde_json::from_str(&text)
        .inspect_err(|error| tracing::warn!("{} is not used: {error}", path.display()))
        .ok()?;
    let leases = written.leases.iter().filter_map(|(key, value)| {
        Some((Subnets::parse_key(key).ok()?, Arc::new(LeaseValue::from_json(value).ok()?)))
    });
    let leases = LeaseSet { leases: leases.collect(), ..LeaseSet::default() };
    let own = written.own.and_then(|key| Subnets::parse_key(&key).ok()).and_then(|subnets| {
        let value = LeaseValue::clone(leases.leases.get(&subnets)?);
        Some(OwnLease { subnets, value })
    });
    Some(LastGood { config: written.config, own, leases: Arc::new(leases) })
}

/// Writes it in one step.
pub fn write(state_dir: &Path, network: &NetworkName, last: &LastGood) -> io::Result<()> {
    let own = last.own.as_ref().map(|own| own.subnets.key());
    let written = Written { config: &last.config, own, leases: Leases(last) };
    whole_file::write_by(&file(state_dir, network), 0o600, |file| Ok(serde_json::to_writer(file, &written)?))
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
        let leases = LeaseSet { leases: [(own, value.clone().into())].into(), ..LeaseSet::default() };
        let own = OwnLease { subnets: own, value };
        let last = LastGood { config: "{}".into(), own: Some(own), leases: Arc::new(leases) };
        write(dir.path(), &network, &last).unwrap();
        assert_eq!(read(dir.path(), &network), Some(last));
        fs::write(file(dir.path(), &network), "{").unwrap();
        assert_eq!(read(dir.path(), &network), None);
    }
}
