//! The one container image of the tests: a static busybox with a link for each of its programs.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use anyhow::{Context, Result};
use serde_json::json;

use crate::command::{self, COMMAND_DEADLINE};

/// Its name for Docker.
pub const IMAGE: &str = "lab";

/// Its name for containerd, which knows no short ones.
pub const IMAGE_REFERENCE: &str = "docker.io/library/lab:latest";

/// Counts up when the image changes.
const VERSION: u32 = 1;

const BUSYBOX: &str = "/bin/busybox";

/// The image as `docker load` and `ctr images import` read it. Made once and kept beside the test binaries.
pub fn archive() -> Result<PathBuf> {
    let test = env::current_exe().context("could not find out where this test runs from")?;
    let beside = test.parent().context("the test's binary is in no directory")?;
    let busybox = fs::metadata(BUSYBOX)
        .with_context(|| format!("could not find {BUSYBOX} (package busybox-static)"))?;
    let path = beside.join(format!("lab-image-{VERSION}-{}-{}.tar", busybox.size(), busybox.mtime()));
    if !path.exists() {
        let work =
            tempfile::tempdir_in(beside).context("could not make a directory to build the image in")?;
        let built = build(work.path()).context("could not build the image")?;
        // Several tests may build it at once; renaming makes the last one win and none see half of it.
        let ready = beside.join(format!("lab-image.{}.tmp", process::id()));
        fs::rename(built, &ready)?;
        fs::rename(&ready, &path)?;
    }
    Ok(path)
}

/// Docker's archive format: one layer, its configuration and a manifest naming both.
fn build(work: &Path) -> Result<PathBuf> {
    let root = work.join("root");
    for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var", "www"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy(BUSYBOX, root.join("bin/busybox"))?;
    for name in run(Command::new(BUSYBOX).arg("--list"))?.lines().filter(|&name| name != "busybox") {
        symlink("busybox", root.join("bin").join(name))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;

    let layer = work.join("layer.tar");
    run(tar(&layer, &root).arg("."))?;
    let sum = run(Command::new("sha256sum").arg(&layer))?;
    let sum = sum.split_whitespace().next().context("sha256sum printed nothing")?;
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "created": "2000-01-01T00:00:00Z",
        "config": { "Env": ["PATH=/bin"], "Cmd": ["sleep", "infinity"], "StopSignal": "SIGKILL" },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{sum}")] },
        "history": [{ "created": "2000-01-01T00:00:00Z", "created_by": "busybox" }],
    });
    fs::write(work.join("config.json"), config.to_string())?;
    let manifest = json!([{ "Config": "config.json", "RepoTags": [format!("{IMAGE}:latest")], "Layers": ["layer.tar"] }]);
    fs::write(work.join("manifest.json"), manifest.to_string())?;
    let archive = work.join("image.tar");
    run(tar(&archive, work).args(["manifest.json", "config.json", "layer.tar"]))?;
    Ok(archive)
}

/// The archive, open for reading from its start.
pub(crate) fn open() -> Result<File> {
    let path = archive()?;
    File::open(&path).with_context(|| format!("could not open {}", path.display()))
}

fn tar(to: &Path, from: &Path) -> Command {
    let mut command = Command::new("tar");
    command.args(["--owner=0", "--group=0", "--numeric-owner", "-cf"]).arg(to).arg("-C").arg(from);
    command
}

fn run(command: &mut Command) -> Result<String> {
    let label = format!("{command:?}");
    command::run(command, &label, COMMAND_DEADLINE)?.text()
}

/// Docker's (Go's) name for this processor.
fn architecture() -> &'static str {
    match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
