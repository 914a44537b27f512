//! Scenes that need more of the kernel than this machine's may have: see `flannel_tests::vm` for how to add one.

mod ipip;
mod ipsec;
mod wireguard;

use flannel_tests::{secs, vm};

#[test]
fn on_debians_kernel() {
    vm::again(&["ipip::three_hosts", "ipip::a_device_is", "ipsec::", "wireguard::"], secs(3600));
}
