//! The lab: several hosts on one machine, made of namespaces, with real engines, a real etcd and the real kernel.
//!
//! # A test in twenty lines
//! ```no_run
//! use anyhow::ensure;
//! use flannel_tests::{Lab, eventually, in_lab, secs};
//!
//! # #[allow(clippy::test_attr_in_doctest)]
//! #[test]
//! fn a_lease_is_written() {
//!     // Skipped by name where the machine lacks something; shows the hosts and their logs when it fails.
//!     in_lab(Lab::new("lease").hosts(2).etcd(), |lab| {
//!         lab.etcdctl(&["put", "/coreos.com/network/config", r#"{"Network":"10.100.0.0/16"}"#])?;
//!         let endpoint = lab.etcd_endpoint();
//!         for host in lab.hosts() {
//!             // The binaries under test are on every host's search path.
//!             host.spawn("flanneld", &["flanneld", "--etcd-endpoints", &endpoint, "--iface", "eth0"], &[])?;
//!         }
//!         for host in lab.hosts() {
//!             let env = eventually("subnet.env", secs(10), || host.read("/run/flannel/subnet.env"))?;
//!             ensure!(env.contains("FLANNEL_NETWORK=10.100.0.0/16"), "{env}");
//!         }
//!         lab.link(lab.host(2), false)?; // pull the cable
//!         Ok(())
//!     });
//! }
//! ```
//!
//! # What a host is
//! A [`Host`] has namespaces of its own (net, mount, uts, ipc, pid, cgroup) held by one process that is process 1 inside. Own are
//! /run, /var/lib, /var/log, /etc, /opt, /sys, /proc, the cgroups; /usr and /tmp are the machine's (`TMPDIR` points elsewhere). What
//! is written to the own ones is on a tmpfs that dies with the host. eth0 leads to the lab's switch, the default route to its
//! router; there is no way out. Addresses: 10.77.0.11, .12, … (fd77::b, …), router .1, etcd .100; 10.77.1.0/24 behind the router.
//!
//! # What a test does there
//! - [`Host`]: `run`, `out`, `sh` for commands, `spawn` for a [`Daemon`], `read`, `write`, `path` for files; `lab.link` pulls a
//!   cable, `lab.reboot` cuts the power, `lab.etcd_stop` and `etcd_start` take the store away and bring it back.
//! - Engines: `start_dockerd`, `load_image`, `docker_run`, `docker`, `start_managed_plugin`; `start_containerd`, `import_image`, `install_cni`, `ctr_run`, `ctr`.
//! - A [`Container`] is a [`Place`] as a host is: commands run in its network namespace with the machine's own programs.
//! - [`Mesh`]: everybody pings everybody, and how long after a cause's end all of them reach each other again.
//! - [`probe`]: `ping`, [`PingStream`] (how many were lost, the longest gap), [`HttpServer`] and `http_get`, `seen_as` (which
//!   source address the other side sees), `largest_packet` (the path's MTU).
//! - `Host::network_state` before and after: equal when nothing was left behind.
//!
//! # How it ends
//! A lab is gone when it is dropped: processes, mounts, links, cgroups, directories. When the test process is killed, the kernel
//! closes the pipe that process 1 of every host reads from, and they end, and everything inside with them; the directory and
//! the empty cgroups are swept by the next lab that starts. Nothing ever appears in the machine's own network namespace.
//!
//! # Rules for suites
//! - Wait with [`eventually`] on a state, never with a sleep for "long enough".
//! - Assert text of the kernel or of the product, not calls.
//! - A test that needs a program says so with [`LabPlan::needs`].

mod alone;
pub mod binaries;
mod cgroup;
mod command;
pub mod conversation;
pub mod crowd;
mod daemon;
mod docker_plugin;
mod engine;
pub mod fake;
pub mod flanneld;
mod go_chain;
mod guide;
mod host;
mod image;
mod lab;
mod leftovers;
mod managed;
mod mesh;
pub mod needs;
pub mod probe;
pub mod vm;

pub use alone::{alone, another_namespace, sh};
pub use command::{COMMAND_DEADLINE, Output};
pub use daemon::{Daemon, Usage};
pub use docker_plugin::{CREATE_WEB, create_network};
pub use engine::Container;
pub use go_chain::{GO_FLANNEL, KUBE_FLANNEL};
pub use guide::blocks;
pub use host::{BIN_DIR, Host, Place, SHARED_DIR};
pub use image::{IMAGE, IMAGE_REFERENCE, archive as image_archive};
pub use lab::{Lab, LabPlan, ids, in_lab, sweep};
pub use managed::{MANAGED, MANAGED_DIR, MANAGED_NEEDS};
pub use mesh::{Mesh, Recovery, now};
pub use nix::sys::signal::Signal;
pub use probe::{
    HttpServer, PingCount, PingStream, eventually, http_get, largest_packet, ping, ping_within, secs,
    seen_as, send_datagrams, tcp_opens, unchanged,
};
