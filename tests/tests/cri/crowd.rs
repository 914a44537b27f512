//! What a node does to its runtime: many pods at once, before there is even a bridge, and a power cut.

use std::collections::BTreeSet;
use std::thread;

use anyhow::{Context, Result, ensure};
use flannel_tests::{Lab, LabPlan, in_lab, ping_within, secs};

use crate::client::Protocol;
use crate::{Pod, SUBNET_ENV, connect, port, start_containerd};

const PODS: i32 = 8;

fn lab(name: &str) -> LabPlan {
    Lab::new(name).hosts(1).needs(&["containerd", "ctr", "runc"])
}

/// As after a node's start, when the kubelet wants all its pods at once.
#[test]
fn many_pods_come_and_go_at_once() {
    in_lab(lab("cri-crowd"), |lab| {
        let host = lab.host(1);
        host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
        host.out(&["flannel", "--install"])?;
        let (_containerd, _) = start_containerd(host)?;
        let pods: Vec<Pod> = thread::scope(|scope| {
            let starting: Vec<_> = (0..PODS)
                .map(|n| {
                    scope.spawn(move || {
                        let ports = vec![port(Protocol::Tcp, 9000 + n, 80, "")];
                        Pod::run(host, &connect(host)?, &format!("p{n}"), ports, &[])
                    })
                })
                .collect();
            starting.into_iter().map(|pod| pod.join().expect("no panic")).collect::<Result<_>>()
        })?;
        let distinct: BTreeSet<&String> = pods.iter().map(|pod| &pod.ip).collect();
        ensure!(distinct.len() == pods.len(), "{distinct:?}");
        let (first, last) = (&pods[0], &pods[pods.len() - 1]);
        ping_within(secs(5), &first.container, &last.ip)?;
        let rules = host.out(&["nft", "list", "ruleset"])?;
        ensure!((0..PODS).all(|n| rules.contains(&format!("{}", 9000 + n))), "{rules}");
        thread::scope(|scope| {
            let ending: Vec<_> = pods
                .iter()
                .map(|pod| {
                    scope.spawn(move || {
                        let cri = connect(host)?;
                        cri.stop_pod(&pod.id)?;
                        cri.remove_pod(&pod.id)
                    })
                })
                .collect();
            ending.into_iter().try_for_each(|pod| pod.join().expect("no panic"))
        })?;
        host.without_cni_containers()?;
        let rules = host.out(&["nft", "list", "ruleset"])?;
        ensure!(!(0..PODS).any(|n| rules.contains(&format!("{}", 9000 + n))), "{rules}");
        Ok(())
    });
}

/// The disk remembers pods, leases and results; the kernel does not.
#[test]
fn a_power_cut_leaves_nothing() {
    in_lab(lab("cri-power"), |lab| {
        let host = lab.host(1);
        host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
        host.out(&["flannel", "--install"])?;
        let (containerd, cri) = start_containerd(host)?;
        let old = Pod::run(host, &cri, "old", vec![port(Protocol::Tcp, 8080, 80, "")], &[])?;
        Pod::run(host, &cri, "other", Vec::new(), &[])?;
        lab.reboot(host)?;
        drop((containerd, cri));

        host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
        let (_containerd, cri) = start_containerd(host)?;
        // The same port, before the runtime has taken the old pod down.
        let new = Pod::run(host, &cri, "new", vec![port(Protocol::Tcp, 8080, 80, "")], &[])?;
        let ids = cri.pods()?;
        ensure!(ids.len() == 3 && ids.contains(&old.id), "{ids:?}");
        for id in ids.iter().filter(|id| **id != new.id) {
            cri.stop_pod(id)?;
            cri.remove_pod(id)?;
        }
        let rules = host.out(&["nft", "list", "ruleset"])?;
        ensure!(rules.contains("8080"), "the old pod's end took the new one's port\n{rules}");
        let held = host.sh("find /var/lib/cni/networks -name '10.*'")?;
        ensure!(held.ends_with(&new.ip) && held.lines().count() == 1, "{held}");
        cri.stop_pod(&new.id)?;
        cri.remove_pod(&new.id)?;
        host.without_cni_containers().context("after the last pod")
    });
}
