//! A node with pods goes over from Go's plugins to ours.

use std::path::Path;

use anyhow::ensure;
use flannel_tests::{HttpServer, Lab, http_get, in_lab, needs, ping_within, secs, tcp_opens};

use crate::client::Protocol;
use crate::{Pod, SUBNET_ENV, port, served, start_containerd};

#[test]
fn pods_that_gos_plugins_made_are_taken_down_by_ours() {
    if !Path::new("/usr/lib/cni/portmap").exists() {
        needs::skipped("Debian's containernetworking-plugins in /usr/lib/cni");
        return;
    }
    let plan = Lab::new("cri-moving").hosts(1).outside().needs(&["containerd", "ctr", "runc", "iptables"]);
    in_lab(plan, |lab| {
        let host = lab.host(1);
        host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
        host.install_go_chain()?;
        let (_containerd, cri) = start_containerd(host)?;
        let old = Pod::run(host, &cri, "old", vec![port(Protocol::Tcp, 8080, 80, "")], &[])?;
        let _old = HttpServer::start(&old.container, 80, "old")?;
        let (at_old, at_new) = (format!("{}:8080", host.ip()), format!("{}:8082", host.ip()));
        served(lab.outside(), &at_old, "old")?;

        host.out(&["flannel", "--install", "--force"])?;
        let new = Pod::run(host, &cri, "new", vec![port(Protocol::Tcp, 8082, 80, "")], &[])?;
        let _new = HttpServer::start(&new.container, 80, "new")?;
        served(lab.outside(), &at_old, "old")?;
        served(lab.outside(), &at_new, "new")?;
        ping_within(secs(3), &new.container, &old.ip)?;
        ensure!(http_get(&new.container, &format!("http://{at_old}/"))? == "old");

        cri.stop_pod(&old.id)?;
        ensure!(tcp_opens(lab.outside(), host.ip(), 8080).is_err());
        let rules = host.out(&["iptables", "-t", "nat", "-S"])?;
        ensure!(!rules.contains(&old.id) && !rules.contains("CNI-DN-"), "{rules}");
        served(lab.outside(), &at_new, "new")?;
        cri.remove_pod(&old.id)?;
        cri.stop_pod(&new.id)?;
        cri.remove_pod(&new.id)?;
        host.without_cni_containers()
    });
}
