//! The guest's first file system: busybox, the modules that its root needs, and two scripts.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Modules without which there is no root.
const MODULES: &[&str] = &["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio-rng"];

const INIT: &str = include_str!("init.sh");
const ROOT: &str = include_str!("root.sh");

/// Makes it; `command` is the script to run in the end.
pub(super) fn make(kernel: &Path, command: &str) -> Result<Vec<u8>> {
    let modules = kernel.join("lib/modules");
    let version = fs::read_dir(&modules)?.next().context("no modules")??.path();
    let dependencies = fs::read_to_string(version.join("modules.dep"))?;
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "modules"] {
        archive.entry(dir, 0o40_755, b"");
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find_map(|path| fs::read(path).ok());
    archive.entry("bin/busybox", 0o100_755, &busybox.context("no busybox")?);
    let mut names = String::new();
    for (place, path) in needed(&dependencies).iter().enumerate() {
        archive.entry(&format!("modules/{place}.ko"), 0o100_644, &fs::read(version.join(path))?);
        names.push_str(&format!("{place} "));
    }
    archive.entry("modules/order", 0o100_644, names.as_bytes());
    let root = ROOT.replace("@MODULES@", &modules.display().to_string());
    for (name, text) in [("init", INIT), ("root", &root), ("command", command)] {
        archive.entry(name, 0o100_755, text.as_bytes());
    }
    Ok(archive.finish())
}

/// Paths of the modules and of what they stand on, those first. What is built in is not in the list (modules.dep(5)).
fn needed(dependencies: &str) -> Vec<String> {
    let name = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split('.').next().unwrap_or(file).replace('-', "_")
    };
    let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
    for module in MODULES {
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| name(path) == module.replace('-', "_"));
        let Some((path, on)) = line else { continue };
        // The last one is to be loaded first.
        for path in on.split_whitespace().rev().chain([path]) {
            if seen.insert(path) {
                order.push(path.to_owned());
            }
        }
    }
    order
}

/// A cpio archive as the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst, "newc").
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        // Inode, mode, uid, gid, links, time, size, four device numbers, length of the name, checksum.
        let fields =
            [self.entries, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, b"");
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_stands_on_is_loaded_first_and_once() {
        let dependencies = "kernel/fs/overlayfs/overlay.ko:\n\
            kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/fscache/fscache.ko kernel/fs/netfs/netfs.ko\n\
            kernel/net/9p/9pnet_virtio.ko: kernel/net/9p/9pnet.ko\nkernel/net/ipv4/ipip.ko: kernel/net/ipv4/ip_tunnel.ko\n";
        let files: Vec<_> =
            needed(dependencies).iter().map(|path| path.rsplit('/').next().unwrap().to_owned()).collect();
        assert_eq!(files, ["9pnet.ko", "9pnet_virtio.ko", "netfs.ko", "fscache.ko", "9p.ko", "overlay.ko"]);
    }

    #[test]
    fn an_archive_is_what_cpio_unpacks() {
        use std::io::Write as _;
        use std::process::{Command, Stdio};
        let mut archive = Archive::default();
        archive.entry("bin", 0o40_755, b"");
        archive.entry("bin/x", 0o100_755, b"text");
        let list = Command::new("busybox")
            .args(["cpio", "-tv"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut list) = list else { return };
        list.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let said = list.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.contains("drwxr-xr-x") && said.contains(" 4 ") && said.contains("bin/x"), "{said}");
    }
}
