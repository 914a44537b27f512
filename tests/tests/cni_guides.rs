//! The commands of the CNI guides in docs/guides, run as they stand there.
//!
//! A block that says `sh on the node` is typed there, line by line; `make cni-install`, which builds first, is what it does after
//! that.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flannel_tests::{
    Container, Daemon, GO_FLANNEL, Host, IMAGE_REFERENCE, KUBE_FLANNEL, Lab, blocks, eventually,
    image_archive, in_lab, needs, ping_within, secs,
};

/// The node's lease, with no daemon behind it.
const SUBNET_ENV: &str =
    "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET=10.100.5.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

const BUSYBOX: &str = "docker.io/library/busybox:latest";

/// Types a block of a guide, returns what it printed.
fn type_block(host: &Host, block: &str) -> Result<String> {
    let mut said = String::new();
    for line in block.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let line = line.replace("make cni-install", "flannel --install");
        said += &host.sh(&line).with_context(|| line.clone())?;
        said.push('\n');
    }
    Ok(said)
}

#[test]
fn containerd() {
    let plan = Lab::new("guide-containerd").hosts(1).needs(&["containerd", "ctr", "runc"]);
    in_lab(plan, |lab| {
        let host = lab.host(1);
        let steps = blocks(include_str!("../../docs/guides/containerd.md"), "sh on the node");
        let [install, run, look] = steps.as_slice() else { anyhow::bail!("{} steps", steps.len()) };
        host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
        let _containerd = host.start_containerd()?;
        host.import_image()?;
        host.ctr(&["image", "tag", IMAGE_REFERENCE, BUSYBOX])?;
        let said = type_block(host, install)?;
        ensure!(said.contains("installed /etc/cni/net.d/10-flannel.conflist"), "{said}");
        let said = type_block(host, run)?;
        ensure!(said.contains("inet 10.100.5.2/24"), "{said}");
        let said = type_block(host, look)?;
        ensure!(!said.contains("veth") && !said.contains("10.100."), "{said}");
        Ok(())
    });
}

#[test]
fn podman() {
    let plan = Lab::new("guide-podman").hosts(1).needs(&["podman", "conmon", "runc", "busybox", "curl"]);
    in_lab(plan, |lab| {
        let host = lab.host(1);
        let guide = include_str!("../../docs/guides/podman.md");
        let backend = blocks(guide, "toml of podman").first().copied().context("no backend")?;
        let steps = blocks(guide, "sh on the node");
        // What a container of the tests' machines may not do (raise its limits) and has not (systemd).
        let here = "[engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n\
                    [containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n";
        host.write("/etc/containers/containers.conf", format!("{backend}\n{here}"))?;
        host.write("/etc/containers/storage.conf", "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers\"\ngraphroot = \"/var/lib/containers\"\n")?;
        host.write("/run/lab/docker-cli/config.json", "{}")?;
        host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
        host.run_input(&["podman", "load", "-q"], File::open(image_archive()?)?)?.text()?;
        host.out(&["podman", "tag", "localhost/lab:latest", BUSYBOX])?;
        let said = type_block(host, steps[0])?;
        ensure!(said.lines().any(|line| line.contains("cbr0") && line.contains("flannel")), "{said}");
        let said = type_block(host, steps[1])?;
        ensure!(said.lines().filter(|line| *line == "hello").count() == 2, "{said}");
        let said = type_block(host, steps[2])?;
        ensure!(said.contains("inet 10.89.0.2/24"), "{said}");
        ensure!(!host.out(&["ip", "-br", "link"])?.contains("veth"));
        Ok(())
    });
}

/// A container that `ctr run` waits for, so that its end is told to the plugin.
struct Run {
    container: Container,
    ctr: Daemon,
}

fn run(host: &Host, name: &str) -> Result<Run> {
    let argv = ["ctr", "run", "--rm", "--cni", "--null-io", IMAGE_REFERENCE, name, "sleep", "infinity"];
    let ctr = host.spawn(name, &argv, &[])?;
    let container = eventually(format!("{name} runs"), secs(20), || {
        ensure!(host.ctr(&["task", "ls"])?.lines().any(|l| l.starts_with(name) && l.contains("RUNNING")));
        host.ctr_container(name)
    })
    .with_context(|| ctr.tail())?;
    Ok(Run { container, ctr })
}

fn end(run: Run, name: &str) -> Result<()> {
    run.container.host().ctr(&["task", "kill", "-s", "KILL", name])?;
    let status = run.ctr.wait(secs(20))?;
    // 137: what `ctr run` says of a container that was killed.
    ensure!(status.code() == Some(137), "{status}\n{}", run.ctr.tail());
    Ok(())
}

/// A node with Go's chain goes over to ours and back, with containers that live through every step; whoever is there takes down
/// what the other made.
#[test]
fn from_go_cni() {
    if !Path::new("/usr/lib/cni/portmap").exists() {
        needs::skipped("Debian's containernetworking-plugins in /usr/lib/cni");
        return;
    }
    let plan = Lab::new("guide-go").hosts(1).needs(&["containerd", "ctr", "runc", "iptables"]);
    in_lab(plan, |lab| {
        let host = lab.host(1);
        let guide = include_str!("../../docs/guides/from-go-cni.md");
        let steps = blocks(guide, "sh on the node");
        let [keep, replace, all] = steps.as_slice() else { anyhow::bail!("{} steps", steps.len()) };
        let back = blocks(guide, "sh back on the node").first().copied().context("no way back")?;

        host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
        host.install_go_chain()?;
        let _containerd = host.start_containerd()?;
        host.import_image()?;
        let (go1, go2, go3) = (run(host, "go1")?, run(host, "go2")?, run(host, "go3")?);
        let reach = |from: &Run, to: &Run| ping_within(secs(5), &from.container, to.container.ip()?);
        reach(&go1, &go2)?;

        type_block(host, keep)?;
        let said = type_block(host, replace)?;
        for line in [
            "installed /opt/cni/bin/flannel (",
            "kept /etc/cni/net.d/10-flannel.conflist: it differs; --force replaces it",
        ] {
            ensure!(said.contains(line), "{said}");
        }
        // The same command is what the guide for Kubernetes has.
        let kubernetes = blocks(include_str!("../../docs/guides/kubernetes.md"), "sh on the node");
        let said = type_block(host, kubernetes.first().copied().context("no command for Kubernetes")?)?;
        ensure!(
            said.contains("unchanged /opt/cni/bin/flannel") && said.contains("kept /etc/cni/net.d"),
            "{said}"
        );
        let (ours1, ours2) = (run(host, "ours1")?, run(host, "ours2")?);
        reach(&go1, &ours1)?;
        reach(&ours1, &go2)?;
        end(go1, "go1")?;
        reach(&go2, &ours2)?;

        let said = type_block(host, all)?;
        ensure!(
            said.contains("installed /etc/cni/net.d/10-flannel.conflist") && !said.contains("kept"),
            "{said}"
        );
        let ours3 = run(host, "ours3")?;
        reach(&ours3, &go2)?;
        end(go2, "go2")?;
        end(ours1, "ours1")?;

        type_block(host, back)?;
        ensure!(host.read("/opt/cni/bin/flannel")? == GO_FLANNEL);
        host.out(&["cmp", "/usr/lib/cni/bridge", "/opt/cni/bin/bridge"])?;
        ensure!(host.read("/etc/cni/net.d/10-flannel.conflist")? == KUBE_FLANNEL);
        let go4 = run(host, "go4")?;
        reach(&go4, &ours3)?;
        for (container, name) in [(ours2, "ours2"), (ours3, "ours3"), (go3, "go3"), (go4, "go4")] {
            end(container, name)?;
        }
        let left = host.sh("find /var/lib/cni/flannel /var/lib/cni/results /var/lib/cni/networks -type f")?;
        let stays =
            |file: &&str| ["lock", "boot_id", "last_reserved_ip.0"].iter().any(|own| file.ends_with(own));
        ensure!(left.lines().all(|file| stays(&file)), "{left}");
        let links = host.out(&["ip", "-br", "link"])?;
        ensure!(!links.contains("veth"), "{links}");
        Ok(())
    });
}
