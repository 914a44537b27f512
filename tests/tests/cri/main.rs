//! containerd as a kubelet uses it, on two hosts with flanneld and the plugin: pods with host ports and limits, and what is left of
//! them.

mod client;
mod crowd;
mod install;
mod moving;

use std::collections::HashMap;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, ensure};
use client::{Cri, LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata, PortMapping, Protocol};
use flannel_tests::flanneld::{Flanneld, put_config};
use flannel_tests::{
    Container, Daemon, Host, HttpServer, IMAGE_REFERENCE, Lab, LabPlan, Place, blocks, eventually, http_get,
    in_lab, needs, ping_within, secs, seen_as, tcp_opens, unchanged,
};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const DUAL: &str = r#"{"Network":"10.100.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{"Type":"vxlan"}}"#;

/// The node's lease, with no daemon behind it.
const SUBNET_ENV: &str =
    "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET=10.100.5.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// The guide's, and three lines: the image of the pods' first process is the lab's, and a machine of the tests may lack AppArmor
/// and the right to lower a process's badness.
fn containerd_config() -> Result<String> {
    let guide = blocks(include_str!("../../../docs/guides/containerd.md"), "toml of containerd");
    let guide = guide.first().context("the guide has no configuration")?;
    Ok(format!(
        "{guide}\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{IMAGE_REFERENCE}\"\n\
         restrict_oom_score_adj = true\ndisable_apparmor = true\n"
    ))
}

/// Who does the work on a node.
#[derive(Clone, Copy, PartialEq)]
enum Chain {
    /// As it is shipped: one plugin does everything.
    Ours,
    /// kube-flannel's, with what Debian has in its containernetworking-plugins behind our `flannel`.
    Debian,
}

impl Chain {
    /// The network: Debian's bridge of those days takes two seconds for an IPv6 address.
    fn network(self) -> &'static str {
        match self {
            Self::Ours => DUAL,
            Self::Debian => VXLAN,
        }
    }

    fn conflist(self) -> &'static str {
        match self {
            Self::Ours => include_str!("../../../deploy/cni/10-flannel.conflist"),
            Self::Debian => {
                r#"{ "name": "cbr0", "cniVersion": "0.3.1", "plugins": [
                    { "type": "flannel", "delegate": { "hairpinMode": true, "isDefaultGateway": true } },
                    { "type": "portmap", "capabilities": { "portMappings": true } },
                    { "type": "bandwidth", "capabilities": { "bandwidth": true } } ] }"#
            }
        }
    }

    fn install(self, host: &Host) -> Result<()> {
        match self {
            // There is nothing else in the directory.
            Self::Ours => host.out(&["flannel", "--install"]).map(drop),
            Self::Debian => {
                host.install_cni("flannel")?;
                host.write("/etc/cni/net.d/10-flannel.conflist", self.conflist())?;
                host.install_debian_cni()
            }
        }
    }
}

/// A host with flanneld, containerd and the plugin.
struct Node<'a> {
    host: &'a Host,
    cri: Cri,
    _flanneld: Flanneld,
    _containerd: Daemon,
}

struct Pod {
    id: String,
    container: Container,
    ip: String,
    ip6: Option<String>,
}

fn lab(name: &str) -> LabPlan {
    Lab::new(name).etcd().needs(&["containerd", "ctr", "runc"])
}

/// Two hosts with everything running.
fn start_all(lab: &Lab, chain: Chain) -> Result<[Node<'_>; 2]> {
    put_config(lab, chain.network())?;
    thread::scope(|scope| {
        let [one, two] = [1, 2].map(|n| scope.spawn(move || Node::start(lab, lab.host(n), chain)));
        Ok([one.join().expect("no panic")?, two.join().expect("no panic")?])
    })
}

/// containerd with the image, and its socket.
fn start_containerd(host: &Host) -> Result<(Daemon, Cri)> {
    host.write("/etc/containerd/config.toml", containerd_config()?)?;
    let containerd = host.start_containerd()?;
    host.import_image_into("k8s.io")?;
    Ok((containerd, connect(host)?))
}

fn connect(host: &Host) -> Result<Cri> {
    Cri::connect(&host.path("/run/containerd/containerd.sock"))
}

impl<'a> Node<'a> {
    fn start(lab: &Lab, host: &'a Host, chain: Chain) -> Result<Self> {
        let flanneld = Flanneld::start(lab, host)?;
        chain.install(host)?;
        let (containerd, cri) = start_containerd(host)?;
        flanneld.ready()?;
        Ok(Self { host, cri, _flanneld: flanneld, _containerd: containerd })
    }

    fn pod(&self, name: &str, ports: Vec<PortMapping>, annotations: &[(&str, &str)]) -> Result<Pod> {
        Pod::run(self.host, &self.cri, name, ports, annotations)
    }
}

impl Pod {
    fn run(
        host: &Host,
        cri: &Cri,
        name: &str,
        ports: Vec<PortMapping>,
        annotations: &[(&str, &str)],
    ) -> Result<Self> {
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("{name}-uid"),
            namespace: "default".to_owned(),
            attempt: 0,
        };
        let annotations: HashMap<_, _> =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let config = PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name.to_owned(),
            log_directory: format!("/var/log/pods/{name}"),
            port_mappings: ports,
            annotations,
            linux: Some(LinuxPodSandboxConfig { cgroup_parent: "/kubepods".to_owned() }),
        };
        let id = cri.run_pod(config)?;
        let (addresses, verbose) = cri.pod(&id)?;
        let pid = verbose["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        let container = host.container(name, pid.with_context(|| format!("no pid in {verbose}"))?)?;
        let mut addresses = addresses.into_iter();
        let (ip, ip6) = (addresses.next().context("no address")?, addresses.next());
        ensure!(container.ip()? == ip, "{} is not {ip}", container.ip()?);
        Ok(Self { id, container, ip, ip6 })
    }
}

/// What somebody at `from` gets at a port within a few seconds.
fn served(from: &dyn Place, at: &str, text: &str) -> Result<()> {
    eventually(format!("{} reaches http://{at}/", from.name()), secs(5), || {
        let said = http_get(from, &format!("http://{at}/"))?;
        ensure!(said == text, "{said:?} instead of {text:?}");
        Ok(())
    })
}

fn port(protocol: Protocol, host_port: i32, container_port: i32, host_ip: &str) -> PortMapping {
    PortMapping { protocol: protocol.into(), container_port, host_port, host_ip: host_ip.to_owned() }
}

/// Everybody who may reach the pod's ports does, and nobody else.
fn ports_are_served(lab: &Lab, here: &Node<'_>, pod: &Pod, far: &Pod) -> Result<()> {
    let host = here.host;
    let _server = HttpServer::start(&pod.container, 80, "pod")?;
    let (open, bound) = (format!("{}:8080", host.ip()), format!("{}:8081", host.ip()));
    for from in [lab.outside() as &dyn Place, lab.host(2), host, &far.container, &pod.container] {
        served(from, &open, "pod")?;
    }
    served(host, "127.0.0.1:8080", "pod")?;
    served(lab.outside(), &bound, "pod")?;
    ensure!(tcp_opens(host, "127.0.0.1", 8081).is_err(), "a port of one address answers on another");
    // The pod sees who asks.
    ensure!(seen_as(lab.outside(), host.ip(), 8080)? == "198.51.100.2");
    // Nobody need listen: the kernel counts what came for a port that nobody listens on.
    let heard = || pod.container.sh(r"sed -n 's/^Udp: [0-9]* \([0-9]*\) .*/\1/p' /proc/net/snmp");
    ensure!(heard()? == "0");
    eventually("a datagram comes", secs(10), || {
        lab.outside().out(&["bash", "-c", &format!("echo hello > /dev/udp/{}/5353", host.ip())])?;
        ensure!(heard()? != "0", "none came");
        Ok(())
    })
}

/// The same by the other family.
fn works_by_ipv6(lab: &Lab, here: &Node<'_>, pod: &Pod, far: &Pod) -> Result<()> {
    let (own, peer) = (pod.ip6.as_ref().context("no IPv6 address")?, far.ip6.as_ref().context("nor here")?);
    ping_within(secs(10), &pod.container, peer)?;
    ping_within(secs(10), &far.container, own)?;
    let _server = HttpServer::start_v6(&pod.container, 86, "pod by IPv6")?;
    let node = format!("[{}]", here.host.ip6());
    for from in [lab.outside() as &dyn Place, here.host, &far.container] {
        served(from, &format!("{node}:8086"), "pod by IPv6")?;
    }
    ensure!(seen_as(lab.outside(), &node, 8086)? == lab.outside().ip6().to_string());
    Ok(())
}

/// A pod with a limit of 10 Mbit/s both ways gets little more, and not much less.
fn limits_hold(far: &Pod, pod: &Pod) -> Result<()> {
    let server = pod.container.spawn("iperf3", &["iperf3", "-s"], &[])?;
    for direction in [&[][..], &["-R"]] {
        let argv = [&["iperf3", "-c", &pod.ip, "-t", "2", "-J"], direction].concat();
        // The server may not listen yet, or not be done with the one before; iperf3 says that in its answer.
        let rate = eventually("the server serves", secs(20), || -> Result<f64> {
            let said: serde_json::Value = serde_json::from_str(&far.container.out(&argv)?)?;
            let rate = said["end"]["sum_received"]["bits_per_second"].as_f64();
            rate.with_context(|| said["error"].to_string())
        })?;
        ensure!((2e6..15e6).contains(&rate), "{:.1} Mbit/s {direction:?}", rate / 1e6);
    }
    server.crash()
}

/// Two pods, on two hosts; one has all that a pod can ask of its network.
fn a_pod_gets_what_it_asks_for(lab: &Lab, chain: Chain) -> Result<()> {
    let nodes = start_all(lab, chain)?;
    let [one, two] = &nodes;
    for node in &nodes {
        let (ready, message) = node.cri.network_ready()?;
        ensure!(ready, "{message}");
    }
    let before = one.host.network_state()?;
    let address = one.host.ip().to_string();
    let ports = vec![
        port(Protocol::Tcp, 8080, 80, ""),
        port(Protocol::Udp, 5353, 53, ""),
        port(Protocol::Sctp, 5000, 5000, ""),
        port(Protocol::Tcp, 8086, 86, ""),
        port(Protocol::Tcp, 8081, 80, &address),
    ];
    let limits = [("kubernetes.io/ingress-bandwidth", "10M"), ("kubernetes.io/egress-bandwidth", "10M")];
    let pod = one.pod("a", ports, &limits)?;
    let far = two.pod("b", Vec::new(), &[])?;

    ping_within(secs(3), &pod.container, &far.ip)?;
    ping_within(secs(3), &far.container, &pod.ip)?;
    let server = HttpServer::start(&far.container, 80, "far")?;
    ensure!(seen_as(&pod.container, &far.ip, 80)? == pod.ip);
    server.stop()?;
    ports_are_served(lab, one, &pod, &far)?;
    if chain.network() == DUAL {
        works_by_ipv6(lab, one, &pod, &far)?;
    }
    let rules = one.host.out(&["nft", "list", "ruleset"])?;
    ensure!(rules.lines().any(|line| line.contains("sctp") && line.contains("5000")), "{rules}");
    let shaping = one.host.out(&["tc", "qdisc", "show"])?;
    ensure!(shaping.matches("qdisc tbf").count() == 2, "{shaping}");
    if chain == Chain::Ours {
        // What containerd asks for beside the rate is a burst of 512 MB, which Debian's plugin grants.
        limits_hold(&far, &pod)?;
        let clash = one.pod("clash", vec![port(Protocol::Udp, 5353, 5353, "")], &[]);
        let error = format!("{:#}", clash.err().context("a port that is taken was given again")?);
        ensure!(error.contains(&pod.id) && error.contains("5353"), "{error}");
    }

    // Both take the network down: the second with no namespace any more.
    one.cri.stop_pod(&pod.id)?;
    one.host.without_cni_containers()?;
    ensure!(tcp_opens(lab.outside(), one.host.ip(), 8080).is_err());
    one.cri.remove_pod(&pod.id)?;
    one.host.without_cni_containers()?;
    one.host.remove_cni_network("cni0")?;
    if chain != Chain::Debian {
        // Debian's portmap leaves its chains.
        unchanged("the kernel after the last pod", &before, &one.host.network_state()?)?;
    }
    Ok(())
}

#[test]
fn pods_with_one_plugin_for_everything() {
    let plan = lab("cri-ours").outside().needs(&["iperf3"]);
    in_lab(plan, |lab| a_pod_gets_what_it_asks_for(lab, Chain::Ours));
}

#[test]
fn pods_with_debians_plugins_behind_ours() {
    if !Path::new("/usr/lib/cni/portmap").exists() {
        needs::skipped("Debian's containernetworking-plugins in /usr/lib/cni");
        return;
    }
    let plan = lab("cri-debian").outside().needs(&["iptables"]);
    in_lab(plan, |lab| a_pod_gets_what_it_asks_for(lab, Chain::Debian));
}
