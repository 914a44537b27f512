//! A JSON object as Go reads it: keys in any case, the last duplicate wins; and every value knows where it stands.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::ConfigError;
use crate::words::code::Code;
use crate::words::extension::CommandLine;
use crate::words::report::Finding;

/// An object and the whole text it stands in.
pub(super) struct Document<'a> {
    text: &'a str,
    path: String,
    entries: Vec<(String, &'a RawValue)>,
}

/// A value under a key.
#[derive(Clone)]
pub(super) struct Value<'a> {
    text: &'a str,
    key: String,
    raw: &'a str,
}

struct Entries<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Entries<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry::<String, &'de RawValue>()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

impl<'a> Document<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, ConfigError> {
        let entries: Entries<'a> = serde_json::from_str(text).map_err(|error| json_error(&error, 0, 0))?;
        Ok(Self { text, path: String::new(), entries: entries.0 })
    }

    /// The last value whose key is this one in any case. To Go `null` says nothing.
    pub(super) fn get(&self, key: &str) -> Option<Value<'a>> {
        self.values(key).find(|value| !value.is_null())
    }

    /// The same where `null` is wrong.
    pub(super) fn get_any(&self, key: &str) -> Option<Value<'a>> {
        self.values(key).next()
    }

    /// The last one first.
    fn values(&self, key: &str) -> impl Iterator<Item = Value<'a>> {
        let named = self.entries.iter().rev().filter(move |(name, _)| name.eq_ignore_ascii_case(key));
        named.map(move |(_, raw)| Value {
            text: self.text,
            key: format!("{}{key}", self.path),
            raw: raw.get(),
        })
    }

    pub(super) fn unknown_keys(&self, known: &[&str]) -> Vec<Finding> {
        self.entries
            .iter()
            .filter(|(name, _)| !known.iter().any(|key| key.eq_ignore_ascii_case(name)))
            .map(|(name, _)| Finding::new(Code::CONFIG_UNKNOWN_KEY, format!("{}{name}", self.path)))
            .collect()
    }
}

impl<'a> Value<'a> {
    pub(super) fn is_null(&self) -> bool {
        self.raw == "null"
    }

    pub(super) fn bool(&self) -> Result<bool, ConfigError> {
        serde_json::from_str(self.raw).map_err(|_| self.error("true or false was wanted"))
    }

    pub(super) fn number(&self) -> Result<u64, ConfigError> {
        serde_json::from_str(self.raw)
            .map_err(|_| self.error("a whole number, not negative and without quotes, was wanted"))
    }

    /// A string; upstream's parser takes addresses without quotes too, but JSON does not.
    pub(super) fn string(&self) -> Result<String, ConfigError> {
        serde_json::from_str(self.raw).map_err(|_| self.error("text in quotes was wanted"))
    }

    /// Text, or a list of texts.
    pub(super) fn command(&self) -> Option<CommandLine> {
        serde_json::from_str(self.raw).ok()
    }

    pub(super) fn document(&self) -> Result<Document<'a>, ConfigError> {
        let entries: Entries<'a> = serde_json::from_str(self.raw)
            .map_err(|_| self.error("an object like {\"Type\":\"vxlan\"} was wanted"))?;
        Ok(Document { text: self.text, path: format!("{}.", self.key), entries: entries.0 })
    }

    pub(super) fn error(&self, cause: impl ToString) -> ConfigError {
        let (line, column) = self.position();
        // Part of an object may be a key of the operator's, and this ends up in the log.
        let secret = self.raw.to_ascii_lowercase().contains("psk") || self.key.ends_with("PSK");
        let found = match self.raw.char_indices().nth(60) {
            _ if secret => "[redacted]".to_owned(),
            Some((end, _)) => format!("{}...", &self.raw[..end]),
            None => self.raw.to_owned(),
        };
        ConfigError::Value { key: self.key.clone(), line, column, found, cause: cause.to_string() }
    }

    /// Line and column of the value in the document, from 1. The raw value borrows from the text, so its address
    /// tells where it stands.
    fn position(&self) -> (usize, usize) {
        let offset = (self.raw.as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize);
        let before = self.text.get(..offset).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }
}

fn json_error(error: &serde_json::Error, line: usize, column: usize) -> ConfigError {
    let text = error.to_string();
    let cause = text.split(" at line ").next().unwrap_or(&text).to_owned();
    ConfigError::Json { line: line + error.line(), column: column + error.column(), cause }
}
