//! What a lab leaves on the machine while it runs, and removing what a dead one left.
//!
//! A lab owns a state directory and groups in the cgroup hierarchies, all of one name: `flannel-lab.<name>.<pid>.<start>.<n>`.
//! Pid and start time (proc_pid_stat(5), field 22) are those of the test process, so anybody can tell whether it still lives.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, process};

use anyhow::{Context, Result};

use crate::cgroup;

pub(crate) const PREFIX: &str = "flannel-lab.";

/// A name that no other lab of this machine has.
pub(super) fn new_id(name: &str) -> Result<String> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let pid = process::id();
    let start = start_time(pid).context("could not read when this process started")?;
    Ok(format!("{PREFIX}{name}.{pid}.{start}.{}", COUNT.fetch_add(1, Ordering::Relaxed)))
}

/// The state directory of a lab.
pub(super) fn state_dir(id: &str) -> PathBuf {
    env::temp_dir().join(id)
}

/// Removes what labs left whose test process is gone. Their processes ended with it; directories and groups stay until
/// somebody sweeps. Every start of a lab does; best effort, since two may sweep at once.
pub fn sweep() {
    for id in ids() {
        if owner(&id).is_some_and(|(pid, start)| start_time(pid) != Some(start)) {
            let _ = cgroup::remove(&id);
            let _ = fs::remove_dir_all(state_dir(&id));
        }
    }
}

/// The names of all labs that have something on this machine, alive or dead.
pub fn ids() -> Vec<String> {
    let mut ids = cgroup::lab_groups(PREFIX);
    let entries = fs::read_dir(env::temp_dir()).into_iter().flatten().flatten();
    ids.extend(
        entries.filter_map(|e| e.file_name().into_string().ok()).filter(|name| name.starts_with(PREFIX)),
    );
    ids.sort();
    ids.dedup();
    ids
}

fn owner(id: &str) -> Option<(u32, u64)> {
    let mut parts = id.rsplit('.').skip(1);
    let start = parts.next()?.parse().ok()?;
    Some((parts.next()?.parse().ok()?, start))
}

/// When a process started, in ticks since boot; `None` when there is no such process, or only a zombie of it.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    if rest.starts_with('Z') {
        return None;
    }
    rest.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_read_back_from_the_name() {
        let id = new_id("two.hosts").unwrap();
        assert!(id.starts_with("flannel-lab.two-hosts."), "{id}");
        let (pid, start) = owner(&id).unwrap();
        assert_eq!(pid, process::id());
        assert_eq!(start_time(pid), Some(start));
    }
}
