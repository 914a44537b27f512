//! The plugins that this binary is: runtimes and configurations look for them by name, and each is a file that they execute.

use std::ffi::OsString;
use std::path::Path;

/// A plugin, by the name of the file that was executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Plugin {
    Flannel,
    Bridge,
    HostLocal,
    Bandwidth,
    Loopback,
    Portmap,
    Tuning,
    Firewall,
}

impl Plugin {
    pub(crate) const ALL: [Self; 8] = [
        Self::Flannel,
        Self::Bridge,
        Self::HostLocal,
        Self::Bandwidth,
        Self::Loopback,
        Self::Portmap,
        Self::Tuning,
        Self::Firewall,
    ];

    /// The plugin of that name. A name nobody knows is flannel's: somebody keeps two versions side by side.
    pub(crate) fn called_by(argv0: Option<OsString>) -> Self {
        let name = argv0.as_deref().map(Path::new).and_then(Path::file_name);
        Self::ALL
            .into_iter()
            .find(|plugin| name.is_some_and(|name| name == plugin.name()))
            .unwrap_or(Self::Flannel)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Flannel => "flannel",
            Self::Bridge => "bridge",
            Self::HostLocal => "host-local",
            Self::Bandwidth => "bandwidth",
            Self::Loopback => "loopback",
            Self::Portmap => "portmap",
            Self::Tuning => "tuning",
            Self::Firewall => "firewall",
        }
    }
}
