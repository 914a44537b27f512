//! podman with its CNI networks, as Debian 12 ships it: two containers, an address and a MAC that were asked for, published ports, and
//! nothing left.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flannel_tests::{
    Container, Host, HttpServer, Lab, LabPlan, Place, http_get, image_archive, in_lab, needs, ping_within,
    secs, seen_as, tcp_opens, unchanged,
};

/// The plugins of this backend, and what a container of the tests' machines may not do (raise its limits) or has not (systemd).
const CONTAINERS_CONF: &str = r#"
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"

[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"

[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
"#;

/// The node's lease, with no daemon behind it.
const SUBNET_ENV: &str =
    "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET=10.100.5.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// What podman calls an image without a registry.
const IMAGE: &str = "localhost/lab:latest";

fn lab(name: &str) -> LabPlan {
    Lab::new(name).hosts(1).outside().needs(&["podman", "conmon", "runc", "busybox"])
}

/// Gives a host what podman reads before its first start, and the image.
fn prepare(host: &Host) -> Result<()> {
    host.write("/etc/containers/containers.conf", CONTAINERS_CONF)?;
    host.write(
        "/etc/containers/storage.conf",
        "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers\"\ngraphroot = \"/var/lib/containers\"\n",
    )?;
    // It reads Docker's file of credentials, and fails where the variable that names it names none.
    host.write("/run/lab/docker-cli/config.json", "{}")?;
    host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
    host.run_input(&["podman", "load", "-q"], File::open(image_archive()?)?)?.text().map(drop)
}

fn podman(host: &Host, args: &[&str]) -> Result<String> {
    host.out(&[&["podman"], args].concat())
}

fn run(host: &Host, name: &str, args: &[&str]) -> Result<Container> {
    let start = ["run", "-d", "--name", name, "--stop-timeout", "0", "--pull", "never"];
    podman(host, &[&start, args, &[IMAGE, "sleep", "infinity"]].concat())?;
    let pid = podman(host, &["inspect", "-f", "{{.State.Pid}}", name])?;
    host.container(name, pid.parse().with_context(|| format!("podman printed pid {pid:?}"))?)
}

/// What podman installs for its default network.
const PODMAN: &str = r#"{ "cniVersion": "0.4.0", "name": "podman", "plugins": [
    { "type": "bridge", "bridge": "cni-podman0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
      "ipam": { "type": "host-local", "routes": [{ "dst": "0.0.0.0/0" }],
                "ranges": [[{ "subnet": "10.88.0.0/16", "gateway": "10.88.0.1" }]] } },
    { "type": "portmap", "capabilities": { "portMappings": true } },
    { "type": "firewall" },
    { "type": "tuning" } ] }"#;

/// Who does the work.
#[derive(Clone, Copy, PartialEq)]
enum Chain {
    /// As it is shipped: one plugin does everything.
    Ours,
    /// podman's own network, whose plugins are ours.
    Bridge,
    /// Debian's portmap behind our `flannel`.
    Debian,
}

impl Chain {
    /// The network's name and its configuration.
    fn conflist(self) -> (&'static str, &'static str) {
        match self {
            Self::Ours => ("cbr0", include_str!("../../deploy/cni/10-flannel.conflist")),
            Self::Bridge => ("podman", PODMAN),
            Self::Debian => (
                "flannel",
                r#"{ "cniVersion": "0.4.0", "name": "flannel", "plugins": [
                    { "type": "flannel", "delegate": { "hairpinMode": true, "isDefaultGateway": true } },
                    { "type": "portmap", "capabilities": { "portMappings": true } } ] }"#,
            ),
        }
    }

    fn install(self, host: &Host) -> Result<()> {
        match self {
            Self::Ours => host.out(&["flannel", "--install"]).map(drop),
            Self::Bridge => {
                host.write("/etc/cni/net.d/87-podman-bridge.conflist", PODMAN)?;
                host.out(&["flannel", "--install", "--no-conf"]).map(drop)
            }
            Self::Debian => {
                host.write("/etc/cni/net.d/10-flannel.conflist", self.conflist().1)?;
                host.install_cni("flannel")?;
                host.install_debian_cni()
            }
        }
    }

    /// The n-th address of the network on this node.
    fn address(self, n: u8) -> String {
        match self {
            Self::Ours | Self::Debian => format!("10.100.5.{n}"),
            Self::Bridge => format!("10.88.0.{n}"),
        }
    }

    fn bridge(self) -> &'static str {
        match self {
            Self::Ours | Self::Debian => "cni0",
            Self::Bridge => "cni-podman0",
        }
    }
}

/// Two containers, one with ports, the other with an address and a MAC of its own.
fn a_day_with_podman(lab: &Lab, chain: Chain) -> Result<()> {
    let host = lab.host(1);
    prepare(host)?;
    chain.install(host)?;
    let before = host.network_state()?;
    let network = chain.conflist().0;
    let ports = ["-p", "127.0.0.1:8080:80", "-p", "8081:80", "-p", "5353:53/udp"];
    let one = run(host, "one", &[&["--network", network], &ports[..]].concat())?;
    let (address, mac) = (chain.address(77), "02:00:00:00:00:77");
    let two = run(host, "two", &["--network", network, "--ip", &address, "--mac-address", mac])?;
    ensure!(two.ip()? == address && one.ip()? == chain.address(2), "{} and {}", one.ip()?, two.ip()?);
    let link = two.out(&["ip", "link", "show", "eth0"])?;
    ensure!(link.contains(mac), "{link}");
    let format = format!("{{{{(index .NetworkSettings.Networks {network:?}).IPAddress}}}}");
    ensure!(podman(host, &["inspect", "-f", &format, "two"])? == address);

    ping_within(secs(3), &one, &address)?;
    let _server = HttpServer::start(&one, 80, "one")?;
    ensure!(seen_as(&two, one.ip()?, 80)? == address);
    ensure!(http_get(host, "http://127.0.0.1:8080/")? == "one");
    ensure!(http_get(lab.outside(), &format!("http://{}:8081/", host.ip()))? == "one");
    ensure!(http_get(&two, &format!("http://{}:8081/", host.ip()))? == "one");
    ensure!(seen_as(lab.outside(), host.ip(), 8081)? == "198.51.100.2");
    ensure!(tcp_opens(lab.outside(), host.ip(), 8080).is_err(), "a port of 127.0.0.1 answers outside");

    podman(host, &["rm", "-f", "-t", "0", "one"])?;
    ensure!(tcp_opens(host, "127.0.0.1", 8080).is_err());
    // An address that was given back is given out again.
    let again = run(host, "again", &["--network", network, "--ip", &chain.address(2)])?;
    ping_within(secs(3), &again, &address)?;
    podman(host, &["rm", "-f", "-t", "0", "two", "again"])?;
    host.without_cni_containers()?;
    host.remove_cni_network(chain.bridge())?;
    if chain != Chain::Debian {
        // Debian's portmap leaves its chains.
        unchanged("the kernel after the last container", &before, &host.network_state()?)?;
    }
    Ok(())
}

#[test]
fn flannel_alone() {
    in_lab(lab("podman-flannel"), |lab| a_day_with_podman(lab, Chain::Ours));
}

#[test]
fn podmans_own_network_with_our_plugins() {
    in_lab(lab("podman-own"), |lab| a_day_with_podman(lab, Chain::Bridge));
}

#[test]
fn flannel_with_debians_portmap() {
    if !Path::new("/usr/lib/cni/portmap").exists() {
        needs::skipped("Debian's containernetworking-plugins in /usr/lib/cni");
        return;
    }
    let plan = lab("podman-debian").needs(&["iptables"]);
    in_lab(plan, |lab| a_day_with_podman(lab, Chain::Debian));
}
