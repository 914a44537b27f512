//! Kernel settings under /proc/sys. `/proc/sys/net` shows the namespace of the thread that opens it.
//!
//! Inside a managed Docker plugin /proc/sys is read-only, and the host's /proc/sys/net is mounted elsewhere:
//! `FLANNEL_PROC_SYS_NET` says where.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::words::fact::Sysctl;

/// The value as the kernel prints it, with its blanks made single ones; none if there is no such setting.
pub(super) fn read(path: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(place(path)?) {
        Ok(text) => Ok(Some(text.split_ascii_whitespace().collect::<Vec<_>>().join(" "))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the kernel has IPv6 at all (it does not after `ipv6.disable=1`).
pub(super) fn has_ipv6() -> bool {
    place("net/ipv6/conf").is_ok_and(|path| path.exists())
}

/// Sets the value.
pub(super) fn write(sysctl: &Sysctl) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(place(&sysctl.path)?)
        .and_then(|mut file| io::Write::write_all(&mut file, sysctl.value.as_bytes()))
}

/// Says where `net/…` lies when it is not below /proc/sys.
const NET_ROOT: &str = "FLANNEL_PROC_SYS_NET";

/// Below /proc/sys and nowhere else.
fn place(path: &str) -> io::Result<PathBuf> {
    place_with(path, env::var_os(NET_ROOT).filter(|root| !root.is_empty()))
}

fn place_with(path: &str, net_root: Option<OsString>) -> io::Result<PathBuf> {
    let path = Path::new(path);
    if path.as_os_str().is_empty() || !path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a path below /proc/sys"));
    }
    match (net_root, path.strip_prefix("net")) {
        (Some(root), Ok(rest)) => Ok(Path::new(&root).join(rest)),
        _ => Ok(Path::new("/proc/sys").join(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_proc_sys_are_opened() {
        for wrong in ["", "/etc/passwd", "net/../../../etc/passwd", "../x"] {
            assert_eq!(place(wrong).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{wrong}");
        }
        assert_eq!(place("net/ipv4/ip_forward").unwrap(), Path::new("/proc/sys/net/ipv4/ip_forward"));
        let elsewhere = |path| place_with(path, Some("/host/net".into())).unwrap();
        assert_eq!(elsewhere("net/ipv4/ip_forward"), Path::new("/host/net/ipv4/ip_forward"));
        assert_eq!(elsewhere("kernel/x"), Path::new("/proc/sys/kernel/x"));
        assert_eq!(read("net/there/is/none").unwrap(), None);
    }
}
