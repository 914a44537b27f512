//! The CNI plugin as a runtime sees it: the built binary, called in namespaces as containerd, podman and CRI-O call it.

mod bandwidth;
mod bridge;
mod delegates;
mod faults;
mod firewall;
mod go;
mod host_local;
mod input;
mod lifecycle;
mod loopback;
mod mixed;
mod node;
mod pod;
mod ports;
mod ports_beside;
mod remains;
mod results;
mod tuning;
mod walk;
mod wishes;

use flannel_tests::{secs, vm};

#[test]
fn on_debians_kernel() {
    let names = ["bridge::endpoints_of_one_vlan_reach_each_other", "ports::sctp_reaches_a_published_port"];
    vm::again(&names, secs(600));
}
