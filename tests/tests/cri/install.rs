//! `flannel --install` on a node whose runtime waits for a network, and over a plugin that is being executed.

use anyhow::{Result, ensure};
use flannel_tests::{Host, Lab, eventually, in_lab, secs};

use crate::client::Cri;
use crate::{Pod, SUBNET_ENV, start_containerd};

fn becomes_ready(cri: &Cri) -> Result<()> {
    eventually("containerd has a network", secs(20), || {
        let (ready, message) = cri.network_ready()?;
        ensure!(ready, "{message}");
        Ok(())
    })
}

/// A plugin of a runtime that is slow with its configuration. While it runs its file cannot be written.
fn busy(host: &Host) -> Result<flannel_tests::Daemon> {
    let call = "sleep 600 | env CNI_COMMAND=STATUS CNI_PATH=/opt/cni/bin /opt/cni/bin/flannel";
    let daemon = host.spawn("busy", &["sh", "-c", call], &[])?;
    // Looked at, not tried: while somebody writes to it, it could not be executed either.
    eventually("the plugin runs", secs(20), || -> Result<()> {
        let running = host.sh("readlink /proc/[0-9]*/exe || true")?;
        ensure!(running.lines().any(|program| program == "/opt/cni/bin/flannel"), "{running}");
        Ok(())
    })?;
    let said = host.run(&["cp", "/run/lab/bin/flannel", "/opt/cni/bin/flannel"])?;
    ensure!(said.stderr.contains("Text file busy"), "{said}");
    Ok(daemon)
}

#[test]
fn a_node_is_installed_while_its_runtime_runs() {
    let plan = Lab::new("cri-install").hosts(1).needs(&["containerd", "ctr", "runc"]);
    in_lab(plan, |lab| {
        let host = lab.host(1);
        host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
        let (_containerd, cri) = start_containerd(host)?;
        let (ready, message) = cri.network_ready()?;
        ensure!(!ready && message.contains("cni plugin not initialized"), "{message}");

        let said = host.out(&["flannel", "--install"])?;
        for line in ["installed /opt/cni/bin/flannel (", "installed /etc/cni/net.d/10-flannel.conflist"] {
            ensure!(said.contains(line), "{said}");
        }
        becomes_ready(&cri)?;
        let pod = Pod::run(host, &cri, "a", Vec::new(), &[])?;

        // A new version, while the old one is being executed and has a pod to look after.
        let running = busy(host)?;
        host.sh("cp /run/lab/bin/flannel /run/newer; echo >> /run/newer")?;
        let said = host.out(&["/run/newer", "--install"])?;
        ensure!(said.contains("installed /opt/cni/bin/flannel ("), "{said}");
        ensure!(said.contains("unchanged /etc/cni/net.d/10-flannel.conflist"), "{said}");
        ensure!(running.alive(), "the running plugin ended\n{}", running.tail());
        host.out(&["cmp", "/run/newer", "/opt/cni/bin/flannel"])?;
        cri.stop_pod(&pod.id)?;
        cri.remove_pod(&pod.id)?;
        host.without_cni_containers()?;

        // The network goes and comes back; containerd sees it both times.
        host.out(&["rm", "/etc/cni/net.d/10-flannel.conflist"])?;
        eventually("containerd has no network", secs(20), || {
            cri.network_ready().is_ok_and(|(ready, _)| !ready)
        })?;
        host.out(&["/run/newer", "--install"])?;
        becomes_ready(&cri)?;
        let strays = host.sh("ls -A /opt/cni/bin /etc/cni/net.d")?;
        ensure!(!strays.contains(".tmp"), "{strays}");
        Ok(())
    });
}
