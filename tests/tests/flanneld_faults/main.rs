//! What goes wrong on real hosts: in the config, in etcd, on the host, in the kernel. Each trouble is said once and clearly,
//! leaves nothing half done, and what can be healed heals without a restart.

mod cluster;
mod config;
mod crowd;
mod kernel;
mod leaving;
mod store;
mod subnets;

use std::env;
use std::time::Duration;

pub(crate) const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
pub(crate) const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// How long until a change in etcd is in the kernel of every host.
pub(crate) const FOLLOW: Duration = Duration::from_secs(5);

/// What the kernel lost is back by then.
pub(crate) const REPAIR: Duration = Duration::from_secs(1);

/// Long enough for a second line of a trouble that is told in a loop.
pub(crate) const REPEAT: Duration = Duration::from_millis(2500);

/// Whether there is time for what takes minutes (`FLANNEL_TESTS_LONG=1`).
pub(crate) fn is_long() -> bool {
    env::var_os("FLANNEL_TESTS_LONG").is_some_and(|long| long != "0")
}
