//! Control groups of a lab: one group per host in every hierarchy, entered through a cgroup namespace, so that what an
//! engine makes (`/docker/…`, `/default/…`) lands inside and goes away with the lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{AccessFlags, Pid, access};

const MOUNT_ROOT: &str = "/sys/fs/cgroup";

/// How long a group may stay busy after its processes were killed.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);

/// One mounted hierarchy of the machine.
#[derive(Debug, Clone)]
struct Hierarchy {
    mount: PathBuf,
    /// Mount options of a version 1 hierarchy (`memory`, `none,name=systemd`); `None` for version 2.
    v1_options: Option<String>,
}

impl Hierarchy {
    /// Its directory below /sys/fs/cgroup; `.` where the unified hierarchy is all there is.
    fn directory(&self) -> String {
        match self.mount.strip_prefix(MOUNT_ROOT) {
            Ok(rest) if !rest.as_os_str().is_empty() => rest.to_string_lossy().into_owned(),
            _ => ".".to_owned(),
        }
    }
}

/// The groups of one host, one per hierarchy.
#[derive(Debug, Clone, Default)]
pub(crate) struct Groups {
    hierarchies: Vec<Hierarchy>,
    /// `<lab>/<host>` below each mount point.
    path: PathBuf,
}

impl Groups {
    /// Makes the group `lab/host` in every hierarchy of the machine.
    pub(crate) fn create(lab: &str, host: &str) -> Result<Self> {
        let groups = Self { hierarchies: hierarchies()?, path: Path::new(lab).join(host) };
        for hierarchy in &groups.hierarchies {
            let lab_dir = hierarchy.mount.join(lab);
            let dir = hierarchy.mount.join(&groups.path);
            fs::create_dir_all(&dir).with_context(|| format!("could not make cgroup {}", dir.display()))?;
            if hierarchy.v1_options.as_deref().is_some_and(|o| o.split(',').any(|c| c == "cpuset")) {
                // A version 1 cpuset starts empty and takes no process until it is filled.
                for (from, to) in [(&hierarchy.mount, &lab_dir), (&lab_dir, &dir)] {
                    for file in ["cpuset.cpus", "cpuset.mems"] {
                        fs::write(to.join(file), fs::read(from.join(file))?)?;
                    }
                }
            }
            if hierarchy.v1_options.is_none() {
                for above in [&hierarchy.mount, &lab_dir] {
                    // As many as there are; a machine that hands out fewer still runs containers.
                    for controller in ["+cpu", "+memory", "+pids", "+io", "+cpuset"] {
                        let _ = fs::write(above.join("cgroup.subtree_control"), controller);
                    }
                }
            }
        }
        Ok(groups)
    }

    /// The files that a process writes its pid to in order to join, separated by spaces.
    pub(crate) fn join_files(&self) -> String {
        let files = self.hierarchies.iter().map(|h| {
            let dir = h.mount.join(&self.path);
            let init = dir.join(INIT);
            (if init.is_dir() { init } else { dir }).join("cgroup.procs").display().to_string()
        });
        files.collect::<Vec<_>>().join(" ")
    }

    /// Version 2 only gives controllers to the children of a group that holds no process itself: what is in the host's
    /// group moves one down, where later processes go too.
    pub(crate) fn make_room(&self) -> Result<()> {
        for hierarchy in self.hierarchies.iter().filter(|h| h.v1_options.is_none() && h.directory() == ".") {
            let dir = hierarchy.mount.join(&self.path);
            fs::create_dir_all(dir.join(INIT))?;
            for pid in fs::read_to_string(dir.join("cgroup.procs"))?.lines() {
                fs::write(dir.join(INIT).join("cgroup.procs"), pid)?;
            }
        }
        Ok(())
    }

    /// `dir:options` of every version 1 hierarchy, for the setup script.
    pub(crate) fn v1_mounts(&self) -> String {
        let mounts = self
            .hierarchies
            .iter()
            .filter_map(|h| Some(format!("{}:{}", h.directory(), h.v1_options.as_ref()?)));
        mounts.collect::<Vec<_>>().join(" ")
    }

    /// Directory of the version 2 hierarchy, empty when there is none.
    pub(crate) fn v2_mount(&self) -> String {
        self.hierarchies.iter().find(|h| h.v1_options.is_none()).map(Hierarchy::directory).unwrap_or_default()
    }
}

/// The group below a host's group that its processes live in where the unified hierarchy is all there is.
const INIT: &str = "lab-init";

/// Names of the groups directly below the mount points that start with `prefix`: labs that run, or ran.
pub(crate) fn lab_groups(prefix: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for hierarchy in hierarchies().unwrap_or_default() {
        let Ok(entries) = fs::read_dir(&hierarchy.mount) else { continue };
        names.extend(
            entries
                .flatten()
                .filter_map(|e| e.file_name().into_string().ok())
                .filter(|name| name.starts_with(prefix)),
        );
    }
    names.sort();
    names.dedup();
    names
}

/// Kills what is left in the groups of `lab` and removes them from all hierarchies.
pub(crate) fn remove(lab: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let top = hierarchy.mount.join(lab);
        let start = Instant::now();
        while top.exists() {
            remove_tree(&top);
            if !top.exists() {
                break;
            }
            if start.elapsed() > REMOVE_DEADLINE {
                bail!("cgroup {} is still busy after {REMOVE_DEADLINE:?}", top.display());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// One try: children first; processes that are still inside are told to die.
fn remove_tree(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    for line in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Ok(pid @ 2..) = line.parse::<i32>() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    let _ = fs::remove_dir(dir); // busy: the next try
}

/// The hierarchies that the machine has mounted and lets us write to, each once.
fn hierarchies() -> Result<Vec<Hierarchy>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("could not read /proc/self/mountinfo")?;
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in text.lines() {
        let Some((head, tail)) = line.split_once(" - ") else { continue };
        let Some(mount) = head.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut tail = tail.split(' ');
        let (kind, options) = (tail.next().unwrap_or_default(), tail.nth(1).unwrap_or_default());
        if !mount.starts_with(MOUNT_ROOT) || found.iter().any(|h| h.mount == mount) {
            continue;
        }
        // Inside a container they may be read-only: hosts then do without, which is enough where no engine runs.
        if access(&mount, AccessFlags::W_OK).is_err() {
            continue;
        }
        match kind {
            "cgroup2" => found.push(Hierarchy { mount, v1_options: None }),
            "cgroup" => found.push(Hierarchy { mount, v1_options: Some(v1_options(options)) }),
            _ => {}
        }
    }
    Ok(found)
}

/// What to pass to mount(8) for the same hierarchy once more: controllers, or `none,name=…`.
fn v1_options(superblock: &str) -> String {
    let wanted = superblock.split(',').filter(|o| {
        !["rw", "ro", "xattr", "clone_children", "noprefix"].contains(o) && !o.starts_with("release_agent=")
    });
    let options = wanted.collect::<Vec<_>>().join(",");
    if options.starts_with("name=") { format!("none,{options}") } else { options }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_hierarchy_is_mounted_without_controllers() {
        assert_eq!(v1_options("rw,xattr,name=systemd"), "none,name=systemd");
        assert_eq!(v1_options("rw,cpu,cpuacct"), "cpu,cpuacct");
    }
}
