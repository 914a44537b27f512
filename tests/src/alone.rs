//! A test alone with the kernel: on a thread in a network namespace of its own, for suites that need no hosts.

use std::process::Command;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use flannel_core::touch::world::kernel::Namespace;
use nix::sched::{CloneFlags, unshare};

use crate::needs::require_root_and_namespaces;

/// Runs the test on a thread in a network namespace of its own, which ends with it; skips by name where the machine has
/// none.
///
/// # Panics
/// If the test fails.
pub fn alone(test: impl FnOnce() -> Result<()> + Send) {
    if !require_root_and_namespaces() {
        return;
    }
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
        test()
    };
    let result = thread::scope(|scope| scope.spawn(inside).join());
    match result {
        Ok(Ok(())) => {}
        Ok(Err(error)) => panic!("{error:#}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Another namespace, that lives as long as the answer.
pub fn another_namespace() -> Result<Namespace> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let made = unshare(CloneFlags::CLONE_NEWNET).map_err(Into::into).and_then(|()| Namespace::current());
        let _ = send.send(made);
    });
    Ok(receive.recv()??)
}

/// Output of a shell line in this thread's namespace.
pub fn sh(line: &str) -> Result<String> {
    let output = Command::new("sh").args(["-c", line]).output()?;
    ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
