//! `Backend` of type extension.

use super::document::{Document, Value};
use super::{ConfigError, Finding};
use crate::words::extension::{CommandLine, ExtensionConfig};

const KEYS: &[&str] = &[
    "Type",
    "PreStartupCommand",
    "PostStartupCommand",
    "ShutdownCommand",
    "SubnetAddCommand",
    "SubnetRemoveCommand",
    "CommandTimeout",
];

/// Longest time a command may be given, in seconds.
const TIMEOUT_MAX: u64 = 3600;

pub(super) fn read(
    options: &Document<'_>,
    findings: &mut Vec<Finding>,
) -> Result<ExtensionConfig, ConfigError> {
    findings.extend(options.unknown_keys(KEYS));
    let command = |key: &str| options.get(key).map_or(Ok(None), |value| command(&value));
    Ok(ExtensionConfig {
        pre_startup: command("PreStartupCommand")?,
        post_startup: command("PostStartupCommand")?,
        shutdown: command("ShutdownCommand")?,
        subnet_add: command("SubnetAddCommand")?,
        subnet_remove: command("SubnetRemoveCommand")?,
        timeout: options.get("CommandTimeout").map(|value| timeout(&value)).transpose()?,
    })
}

/// As upstream, an empty one is none.
fn command(value: &Value<'_>) -> Result<Option<CommandLine>, ConfigError> {
    if value.is_null() {
        return Ok(None);
    }
    let line = value.command().ok_or_else(|| {
        value.error("a command for sh in quotes, or a list of a program and its arguments, was wanted")
    })?;
    let nul = match &line {
        CommandLine::Shell(line) => line.contains('\0'),
        CommandLine::Argv(words) => words.iter().any(|word| word.contains('\0')),
    };
    if nul {
        return Err(value.error("no command can hold a NUL"));
    }
    if matches!(&line, CommandLine::Argv(words) if words.first().is_some_and(String::is_empty)) {
        return Err(value.error("the first of the list is the program"));
    }
    Ok(Some(line).filter(|line| !line.is_empty()))
}

fn timeout(value: &Value<'_>) -> Result<u32, ConfigError> {
    let wrong = || value.error(format!("seconds from 1 to {TIMEOUT_MAX} were wanted"));
    let seconds = value.number()?;
    u32::try_from(seconds).ok().filter(|_| (1..=TIMEOUT_MAX).contains(&seconds)).ok_or_else(wrong)
}
