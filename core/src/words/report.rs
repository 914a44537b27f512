//! What a pass did, and why it ran.

use std::fmt;

use super::code::Code;

/// Why a pass runs. In order of weight: if several came together, the first is named.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reason {
    /// The agent has just started.
    Startup,
    /// The network config changed.
    Config,
    /// Our lease, or a peer's.
    Leases,
    /// The uplink or its address changed.
    Uplink,
    /// A container came or went.
    Endpoint,
    /// Something failed last time.
    Retry,
    /// The kernel said that something of interest changed.
    Kernel,
    /// Time for a look.
    Resync,
}

impl Reason {
    /// Whether the inputs changed. If they did not, every change of the pass repairs something that was true before.
    pub fn inputs_changed(self) -> bool {
        match self {
            Self::Startup | Self::Config | Self::Leases | Self::Uplink | Self::Endpoint => true,
            Self::Retry | Self::Kernel | Self::Resync => false,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Startup => "startup",
            Self::Config => "config",
            Self::Leases => "leases",
            Self::Uplink => "uplink",
            Self::Endpoint => "endpoint",
            Self::Retry => "retry",
            Self::Kernel => "kernel",
            Self::Resync => "resync",
        })
    }
}

/// Something the operator should know.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Finding {
    /// What kind.
    pub code: Code,
    /// What exactly.
    pub text: String,
}

impl Finding {
    /// A finding.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {} (hint: {})", self.code, self.code.title(), self.text, self.code.remedy())
    }
}

/// One change that was made, or could not be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Made {
    /// `added`, `replaced` or `removed`.
    pub verb: &'static str,
    /// Kind of the fact.
    pub kind: &'static str,
    /// The fact as iproute2 would say it; empty for all but the first few of a large pass.
    pub text: String,
}

/// What a pass did. A pass never fails as a whole: what failed is here, and in the next diff.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// How often it looked at the kernel before nothing was left to do.
    pub looks: usize,
    /// Facts wanted.
    pub desired: usize,
    /// Changes that were made.
    pub made: Vec<Made>,
    /// Changes that failed, with the reason.
    pub failed: Vec<(Made, String)>,
    /// How many more failed only because an interface they need is among those.
    pub in_wake: usize,
    /// Whether the kernel now is as planned.
    pub clean: bool,
}
