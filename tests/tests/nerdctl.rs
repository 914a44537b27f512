//! What nerdctl does with networks, replayed: Debian has no nerdctl. Its conflists, its ids, its `CNI_ARGS`; a DEL before every ADD
//! and after it, both without a namespace.

use std::collections::BTreeMap;
use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use flannel_tests::{
    Host, HttpServer, Lab, LabPlan, Place, blocks, http_get, in_lab, ping_within, secs, seen_as, tcp_opens,
    unchanged,
};
use serde_json::{Value, json};

/// nerdctl's network `bridge`, which is there without being made.
const BRIDGE: &str = r#"{ "cniVersion": "1.0.0", "name": "bridge",
    "nerdctlID": "17f29b073143d8cd97b5bbe492bdeffec1c5fee55cc1fe2112c8b9335f8b6121",
    "nerdctlLabels": { "nerdctl/default-network": "true" },
    "plugins": [
        { "type": "bridge", "bridge": "nerdctl0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
          "ipam": { "ranges": [[{ "gateway": "10.4.0.1", "subnet": "10.4.0.0/24" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }], "type": "host-local" } },
        { "type": "portmap", "capabilities": { "portMappings": true } },
        { "type": "firewall", "ingressPolicy": "same-bridge" },
        { "type": "tuning" } ] }"#;

/// As it is shipped; nerdctl uses it by its name.
const FLANNEL: &str = include_str!("../../deploy/cni/10-flannel.conflist");

const SUBNET_ENV: &str =
    "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET=10.100.5.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n";

fn lab(name: &str) -> LabPlan {
    Lab::new(name).hosts(1).outside().needs(&["busybox"])
}

/// A network as the library of nerdctl runs it: plugin after plugin, each with the result of the one before.
struct Network<'a> {
    host: &'a Host,
    name: String,
    version: String,
    plugins: Vec<Value>,
}

/// A container of nerdctl's, by a network namespace; without one, after its end.
struct Container<'a> {
    host: &'a Host,
    name: &'static str,
    id: String,
    args: &'static str,
    capabilities: BTreeMap<&'static str, Value>,
    ip: String,
}

impl<'a> Network<'a> {
    fn new(host: &'a Host, conflist: &str) -> Result<Self> {
        let conflist: Value = serde_json::from_str(conflist)?;
        let text = |key: &str| conflist[key].as_str().map(str::to_owned).context(key.to_owned());
        let plugins = conflist["plugins"].as_array().context("plugins")?.clone();
        Ok(Self { host, name: text("name")?, version: text("cniVersion")?, plugins })
    }

    fn call(
        &self,
        plugin: &Value,
        verb: &str,
        on: &Container<'_>,
        netns: &str,
        previous: &Value,
    ) -> Result<Value> {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let mut conf = plugin.clone();
        conf["name"] = json!(self.name);
        conf["cniVersion"] = json!(self.version);
        for (capability, value) in &on.capabilities {
            if plugin["capabilities"][*capability] == json!(true) {
                conf["runtimeConfig"][*capability] = value.clone();
            }
        }
        if !previous.is_null() {
            conf["prevResult"] = previous.clone();
        }
        let file = format!("/run/conf.{}", CALLS.fetch_add(1, Ordering::Relaxed));
        self.host.write(&file, conf.to_string())?;
        let kind = plugin["type"].as_str().context("type")?;
        let env = [
            format!("CNI_COMMAND={verb}"),
            format!("CNI_CONTAINERID={}", on.id),
            format!("CNI_NETNS={netns}"),
            "CNI_IFNAME=eth0".to_owned(),
            format!("CNI_ARGS={}", on.args),
            "CNI_PATH=/opt/cni/bin".to_owned(),
        ];
        let program = format!("/opt/cni/bin/{kind}");
        let argv: Vec<&str> =
            ["env"].into_iter().chain(env.iter().map(String::as_str)).chain([program.as_str()]).collect();
        let output = self.host.run_input(&argv, File::open(self.host.path(&file))?)?;
        let said = output.text().with_context(|| format!("{verb} of {kind} for {}", on.name))?;
        ensure!(output.stderr.is_empty(), "{kind} talks: {}", output.stderr);
        if said.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&said)?) }
    }

    /// As nerdctl's hooks do it: away with whatever an earlier life left, then the container's place.
    fn add(&self, on: &mut Container<'_>) -> Result<()> {
        self.del(on)?;
        let mut result = Value::Null;
        for plugin in &self.plugins {
            result = self.call(plugin, "ADD", on, &format!("/run/netns/{}", on.name), &result)?;
        }
        let address = result["ips"][0]["address"].as_str().with_context(|| result.to_string())?;
        on.ip = address.split('/').next().unwrap_or_default().to_owned();
        Ok(())
    }

    fn del(&self, on: &Container<'_>) -> Result<()> {
        self.plugins
            .iter()
            .rev()
            .try_for_each(|plugin| self.call(plugin, "DEL", on, "", &Value::Null).map(drop))
    }
}

impl<'a> Container<'a> {
    fn new(host: &'a Host, name: &'static str, args: &'static str, ports: Value) -> Result<Self> {
        host.sh(&format!("ip netns add {name}; ip -n {name} link set lo up"))?;
        let id = format!("default-{}", host.sh(&format!("echo {name} | sha256sum | cut -c1-64"))?);
        let capabilities =
            if ports.is_null() { BTreeMap::new() } else { BTreeMap::from([("portMappings", ports)]) };
        Ok(Self { host, name, id, args, capabilities, ip: String::new() })
    }

    /// The namespace is gone before nerdctl hears of it.
    fn end(&self, network: &Network<'_>) -> Result<()> {
        self.host.out(&["ip", "netns", "del", self.name])?;
        network.del(self)?;
        network.del(self)
    }
}

impl Place for Container<'_> {
    fn name(&self) -> String {
        format!("{} on {}", self.name, self.host.name())
    }

    fn host(&self) -> &Host {
        self.host
    }

    fn enter(&self, argv: &[&str]) -> Command {
        self.host.enter_netns(self.name, argv)
    }
}

/// As nerdctl's library writes them: capital letters, and an address always.
fn ports() -> Value {
    json!([
        { "HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "0.0.0.0" },
        { "HostPort": 8081, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "127.0.0.1" },
    ])
}

/// Two containers come and go on a network; `nth` is its n-th address, `asked` the one that the second asks for.
fn two_containers(lab: &Lab, conflist: &str, args: &'static str, asked: &str, bridge: &str) -> Result<()> {
    let host = lab.host(1);
    host.write("/run/flannel/subnet.env", SUBNET_ENV)?;
    host.out(&["flannel", "--install"])?;
    let before = host.network_state()?;
    let network = Network::new(host, conflist)?;
    let mut one = Container::new(host, "one", "", ports())?;
    let mut two = Container::new(host, "two", args, Value::Null)?;
    network.add(&mut one)?;
    network.add(&mut two)?;
    ensure!(two.ip == asked, "{} instead of {asked}", two.ip);
    ping_within(secs(3), &one, &two.ip)?;
    let _server = HttpServer::start(&one, 80, "one")?;
    ensure!(seen_as(&two, &one.ip, 80)? == two.ip);
    ensure!(http_get(lab.outside(), &format!("http://{}:8080/", host.ip()))? == "one");
    ensure!(http_get(host, "http://127.0.0.1:8081/")? == "one");
    ensure!(tcp_opens(lab.outside(), host.ip(), 8081).is_err(), "a port of 127.0.0.1 answers outside");
    let _outside = HttpServer::start(lab.outside(), 8000, "outside")?;
    ensure!(seen_as(&two, lab.outside().ip(), 8000)? == host.ip().to_string(), "not masqueraded");

    one.end(&network)?;
    two.end(&network)?;
    // nerdctl itself looks for rules with the container's id, because Go's plugins leave some.
    let rules = host.sh("iptables-save; nft list ruleset")?;
    ensure!(!rules.contains(&one.id) && !rules.contains("8080"), "{rules}");
    host.without_cni_containers()?;
    host.remove_cni_network(bridge)?;
    unchanged("the kernel after the last container", &before, &host.network_state()?)
}

#[test]
fn its_own_network() {
    let args = "IgnoreUnknown=1;NERDCTL_CNI_DHCP_HOSTNAME=two;IP=10.4.0.77;MAC=02:00:00:00:00:77";
    in_lab(lab("nerdctl-own"), |lab| two_containers(lab, BRIDGE, args, "10.4.0.77", "nerdctl0"));
}

#[test]
fn a_flannel_network() {
    let args = "IgnoreUnknown=1;NERDCTL_CNI_DHCP_HOSTNAME=two;IP=10.100.5.77";
    in_lab(lab("nerdctl-flannel"), |lab| two_containers(lab, FLANNEL, args, "10.100.5.77", "cni0"));
}

/// nerdctl isolates networks where `firewall` says that it is 1.1.0 or newer, and has more to choose from 1.7.1 on.
#[test]
fn firewall_says_what_it_is() {
    in_lab(lab("nerdctl-about"), |lab| {
        let host = lab.host(1);
        host.out(&["flannel", "--install"])?;
        let guide = blocks(include_str!("../../docs/guides/nerdctl.md"), "sh on the node");
        let command = guide.first().context("the guide has no command")?.trim();
        let said = host.run(&["sh", "-c", command])?;
        let version = said.stderr.lines().find_map(|line| line.strip_prefix("CNI firewall plugin v"));
        let version = version.with_context(|| format!("{said}"))?;
        let numbers = version.split('+').next().unwrap_or_default().split('.').map(str::parse::<u32>);
        let numbers = numbers.collect::<Result<Vec<_>, _>>().with_context(|| version.to_owned())?;
        ensure!(said.ok() && said.stdout.is_empty() && numbers >= vec![1, 7, 1], "{said}");
        Ok(())
    });
}
