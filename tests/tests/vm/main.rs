//! Scenes on Debian's kernel, which has what this machine's may lack: see `flannel_tests::vm` for how to add one.
//!
//! Emulated, they take minutes: `make vm`, or `FLANNEL_TESTS_LONG=1`, runs them, the ordinary run does not.

mod ipip;
mod ipsec;
mod vxlan;
mod wireguard;

use std::env;

use flannel_tests::vm::Vm;

#[test]
fn scenes_on_debians_kernel() {
    if env::var_os("FLANNEL_TESTS_LONG").is_none_or(|long| long != "1") {
        eprintln!("make vm runs these");
        return;
    }
    if !Vm::can_run() {
        return;
    }
    let test = env::current_exe().expect("this test's binary").display().to_string();
    // One after the other: the processors are emulated, and the scenes time what they see.
    let argv = [test.as_str(), "--ignored", "--test-threads=1"];
    let ended = Vm::default().run(&argv).unwrap_or_else(|error| panic!("{error:#}"));
    assert!(ended.ok() && ended.stdout.contains("test result: ok"), "{ended}");
    eprintln!("{}", ended.stdout);
}
