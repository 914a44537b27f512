//! Runs one command in the tests' virtual machine: `target/debug/in_vm ip link add type ipip`. `VM_DEADLINE` is how many seconds it may take.

use std::env;
use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use flannel_tests::secs;
use flannel_tests::vm::{DEADLINE, Vm};

fn main() -> Result<ExitCode> {
    let argv: Vec<String> = env::args().skip(1).collect();
    ensure!(!argv.is_empty(), "usage: in_vm PROGRAM ARGUMENTS...");
    ensure!(Vm::can_run(), "run tests/setup first");
    let deadline = match env::var("VM_DEADLINE") {
        Ok(seconds) => secs(seconds.parse().context("VM_DEADLINE is in seconds")?),
        Err(_) => DEADLINE,
    };
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let mut vm = Vm::default().deadline(deadline);
    for (name, value) in
        env::vars().filter(|(name, _)| name.starts_with("FLANNEL_") || name == "RUST_BACKTRACE")
    {
        vm = vm.env(&name, &value);
    }
    let ended = vm.run(&argv)?;
    io::stdout().write_all(ended.stdout.as_bytes())?;
    io::stderr().write_all(ended.stderr.as_bytes())?;
    Ok(ExitCode::from(u8::try_from(ended.code).unwrap_or(1)))
}
