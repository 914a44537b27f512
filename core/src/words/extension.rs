//! Commands of the operator's that carry a network: what the extension backend wants beside facts of the kernel.
//!
//! **Source** — upstream pkg/backend/extension/extension.go, Documentation/extension.md.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A command as the config has it. Values reach it in the environment and on stdin only, never in its text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum CommandLine {
    /// Run by `sh -c`.
    Shell(String),
    /// A program and its arguments, as they are: no shell reads them.
    Argv(Vec<String>),
}

impl CommandLine {
    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Shell(line) => line.trim().is_empty(),
            Self::Argv(words) => words.is_empty(),
        }
    }
}

/// Which of the commands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Occasion {
    /// Before the lease; what it prints is our `BackendData`.
    PreStartup,
    /// When there is a lease.
    PostStartup,
    /// When the network leaves this host or this backend.
    Shutdown,
    /// A peer came.
    SubnetAdd,
    /// A peer went.
    SubnetRemove,
}

impl fmt::Display for Occasion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreStartup => "PreStartupCommand",
            Self::PostStartup => "PostStartupCommand",
            Self::Shutdown => "ShutdownCommand",
            Self::SubnetAdd => "SubnetAddCommand",
            Self::SubnetRemove => "SubnetRemoveCommand",
        })
    }
}

/// `Backend` of type extension, with upstream's keys.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ExtensionConfig {
    /// `PreStartupCommand`
    #[serde(rename = "PreStartupCommand", default, skip_serializing_if = "Option::is_none")]
    pub pre_startup: Option<CommandLine>,
    /// `PostStartupCommand`
    #[serde(rename = "PostStartupCommand", default, skip_serializing_if = "Option::is_none")]
    pub post_startup: Option<CommandLine>,
    /// `ShutdownCommand`: upstream's samples have it, and upstream never runs it.
    #[serde(rename = "ShutdownCommand", default, skip_serializing_if = "Option::is_none")]
    pub shutdown: Option<CommandLine>,
    /// `SubnetAddCommand`
    #[serde(rename = "SubnetAddCommand", default, skip_serializing_if = "Option::is_none")]
    pub subnet_add: Option<CommandLine>,
    /// `SubnetRemoveCommand`
    #[serde(rename = "SubnetRemoveCommand", default, skip_serializing_if = "Option::is_none")]
    pub subnet_remove: Option<CommandLine>,
    /// `CommandTimeout` in seconds, our own key: how long each command may take. Absent is 30.
    #[serde(rename = "CommandTimeout", default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u32>,
}

impl ExtensionConfig {
    /// How long a command may take unless the config says otherwise.
    pub const TIMEOUT: Duration = Duration::from_secs(30);

    /// The command for an occasion.
    pub fn command(&self, occasion: Occasion) -> Option<&CommandLine> {
        match occasion {
            Occasion::PreStartup => &self.pre_startup,
            Occasion::PostStartup => &self.post_startup,
            Occasion::Shutdown => &self.shutdown,
            Occasion::SubnetAdd => &self.subnet_add,
            Occasion::SubnetRemove => &self.subnet_remove,
        }
        .as_ref()
    }

    /// How long a command may take.
    pub fn deadline(&self) -> Duration {
        self.timeout.map_or(Self::TIMEOUT, |seconds| Duration::from_secs(seconds.into()))
    }
}

/// What a command is told.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Errand {
    /// In its environment, beside the daemon's own.
    pub variables: BTreeMap<String, String>,
    /// On its stdin, as a line.
    pub input: String,
}

/// What the commands of a network should have been told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Errands {
    /// The commands that this was planned for.
    pub config: ExtensionConfig,
    /// Our own values, for `PostStartupCommand`.
    pub own: Errand,
    /// The peers, by the key of their lease.
    pub peers: BTreeMap<String, Errand>,
}

impl fmt::Display for Errands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, occasion: Occasion, errand: &Errand| {
            let variables: Vec<_> =
                errand.variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
            writeln!(f, "{} {occasion} <<< {:?}", variables.join(" "), errand.input)
        };
        line(f, Occasion::PostStartup, &self.own)?;
        self.peers.values().try_for_each(|errand| line(f, Occasion::SubnetAdd, errand))
    }
}
