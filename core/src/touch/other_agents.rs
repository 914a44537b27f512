//! Agents on this host that know nothing of our lock: upstream's flanneld, and the one inside k3s.
//!
//! They are found by their processes, because nothing else of them ends when they end: `subnet.env` stays.
//!
//! **Source** — upstream main.go `--subnet-file` and its variable `FLANNELD_SUBNET_FILE`; k3s pkg/agent/flannel/setup.go, which
//! writes the standard file and keeps its configuration in `K3S_CONFIG`.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::subnet_env;

/// There on nodes whose k3s runs flannel; a k3s without it (`--flannel-backend=none`) writes no `subnet.env`.
const K3S_CONFIG: &str = "/var/lib/rancher/k3s/agent/etc/flannel/net-conf.json";

/// A process that serves a network without holding our lock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OtherAgent {
    pid: u32,
    program: String,
}

impl OtherAgent {
    /// One that writes this subnet file. `lock` is the open file of our own lock: a process that has it open is one of
    /// ours, for which the lock speaks. Only processes of the calling thread's network namespace count, as far as the kernel lets us know.
    pub fn find(subnet_file: &Path, lock: &File) -> Option<Self> {
        Self::find_in(Path::new("/proc"), subnet_file, lock)
    }

    fn find_in(proc: &Path, subnet_file: &Path, lock: &File) -> Option<Self> {
        let here = fs::read_link(proc.join("thread-self/ns/net")).ok();
        let lock = lock.metadata().ok().map(|file| (file.dev(), file.ino()));
        for entry in fs::read_dir(proc).ok()?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let dir = entry.path();
            let Some(agent) = Self::at(pid, &dir) else { continue };
            let elsewhere = fs::read_link(dir.join("ns/net")).is_ok_and(|net| Some(net) != here);
            if pid != std::process::id()
                && !elsewhere
                && agent.writes(&dir, subnet_file)
                && !has_open(&dir, lock)
            {
                return Some(agent);
            }
        }
        None
    }

    /// Whether it still runs.
    pub fn lives(&self) -> bool {
        Self::at(self.pid, &Path::new("/proc").join(self.pid.to_string())).as_ref() == Some(self)
    }

    /// None if the process is gone, dead but not yet reaped (then it has no command line), or no agent.
    fn at(pid: u32, dir: &Path) -> Option<Self> {
        let program = fs::read_to_string(dir.join("comm")).ok()?.trim_end().to_owned();
        let agent = matches!(program.as_str(), "flanneld" | "k3s" | "k3s-server" | "k3s-agent");
        (agent && !fs::read(dir.join("cmdline")).ok()?.is_empty()).then_some(Self { pid, program })
    }

    fn writes(&self, dir: &Path, subnet_file: &Path) -> bool {
        match self.program.as_str() {
            "flanneld" => told_file(dir) == subnet_file,
            _ => subnet_file == Path::new(subnet_env::DEFAULT_PATH) && Path::new(K3S_CONFIG).exists(),
        }
    }
}

impl fmt::Display for OtherAgent {
    /// As our own lock names its holder.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.program, self.pid)
    }
}

/// The subnet file that a flanneld was started with.
fn told_file(dir: &Path) -> PathBuf {
    let words = strings(&dir.join("cmdline"));
    let flag = words.iter().enumerate().find_map(|(index, word)| {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), words.get(index + 1).cloned()),
        };
        matches!(name, "-subnet-file" | "--subnet-file").then_some(value)?
    });
    let variable = || {
        let variables = strings(&dir.join("environ"));
        variables.iter().find_map(|variable| Some(variable.strip_prefix("FLANNELD_SUBNET_FILE=")?.to_owned()))
    };
    flag.or_else(variable).unwrap_or_else(|| subnet_env::DEFAULT_PATH.to_owned()).into()
}

/// Of a program with more rights than ours the kernel tells nothing.
fn strings(path: &Path) -> Vec<String> {
    let bytes = fs::read(path).unwrap_or_default();
    bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

fn has_open(dir: &Path, file: Option<(u64, u64)>) -> bool {
    let Ok(open) = fs::read_dir(dir.join("fd")) else { return false };
    open.flatten().any(|entry| {
        let found = fs::metadata(entry.path()).ok().map(|open| (open.dev(), open.ino()));
        found.is_some() && found == file
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A directory that looks like /proc to us.
    struct Processes(tempfile::TempDir);

    impl Processes {
        fn new() -> Self {
            let proc = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(proc.0.path().join("thread-self/ns")).unwrap();
            symlink("net:[1]", proc.0.path().join("thread-self/ns/net")).unwrap();
            proc
        }

        fn add(&self, pid: u32, comm: &str, cmdline: &str, net: &str) -> PathBuf {
            let dir = self.0.path().join(pid.to_string());
            fs::create_dir_all(dir.join("ns")).unwrap();
            fs::create_dir_all(dir.join("fd")).unwrap();
            fs::write(dir.join("comm"), format!("{comm}\n")).unwrap();
            fs::write(dir.join("cmdline"), cmdline.replace(' ', "\0")).unwrap();
            symlink(net, dir.join("ns/net")).unwrap();
            dir
        }

        fn find(&self, file: &str, lock: &File) -> Option<u32> {
            OtherAgent::find_in(self.0.path(), Path::new(file), lock).map(|agent| agent.pid)
        }
    }

    #[test]
    fn an_agent_is_who_writes_the_file_in_our_network_namespace() {
        const FILE: &str = "/run/flannel/subnet.env";
        let proc = Processes::new();
        let lock = tempfile::NamedTempFile::new().unwrap();
        let find = |file| proc.find(file, lock.as_file());
        proc.add(4_000_001, "bash", "bash flanneld", "net:[1]");
        proc.add(4_000_002, "flanneld", "flanneld", "net:[2]");
        proc.add(4_000_003, "flanneld", "", "net:[1]");
        proc.add(4_000_004, "flanneld", "flanneld --subnet-file=/run/web.env -v 4", "net:[1]");
        let ours = proc.add(4_000_005, "flanneld", "flanneld", "net:[1]");
        symlink(lock.path(), ours.join("fd/7")).unwrap();
        assert_eq!(find(FILE), None);
        assert_eq!(find("/run/web.env"), Some(4_000_004));
        let told = proc.add(4_000_006, "flanneld", "flanneld -ip-masq", "net:[1]");
        assert_eq!(find(FILE), Some(4_000_006));
        fs::write(told.join("environ"), "A=b\0FLANNELD_SUBNET_FILE=/run/x.env\0").unwrap();
        assert_eq!((find(FILE), find("/run/x.env")), (None, Some(4_000_006)));
        fs::write(told.join("cmdline"), "flanneld\0-subnet-file\0/run/y.env\0").unwrap();
        assert_eq!((find("/run/x.env"), find("/run/y.env")), (None, Some(4_000_006)));
    }

    #[test]
    fn a_process_that_has_ended_lives_no_more() {
        let gone = OtherAgent { pid: u32::MAX, program: "flanneld".into() };
        assert!(!gone.lives());
        assert_eq!(gone.to_string(), "flanneld (process 4294967295)");
    }
}
