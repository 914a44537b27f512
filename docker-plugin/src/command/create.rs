//! `network create`: what `docker network create` needs for a flannel network, typed by us.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Sockets, ask_plugin};
use crate::definition::IPV6_NETWORK;
use crate::engine::Engine;
use crate::status::Status;

/// Suffix of the network that each node of a swarm keeps its options in.
const CONFIG_SUFFIX: &str = "-config";

/// Create a Docker network: `docker network create` with the options that flannel needs filled in
///
/// The same line on every host. Without --subnet and --network it is the flannel network whose lease this host has. With
/// --swarm, every node gets the local options and a manager the network itself: type it on all workers, then on a manager.
#[derive(Args, Debug)]
pub(super) struct Flags {
    /// Name of the Docker network
    name: String,

    /// CIDR of the whole flannel network (not of this host's part); a second one of IPv6 stands for --ipv6
    #[arg(long = "subnet", value_name = "CIDR")]
    subnets: Vec<String>,

    /// Name of the flannel network
    #[arg(long, value_name = "NAME")]
    network: Option<String>,

    /// Part of this host's subnet to take addresses from
    #[arg(long, value_name = "CIDR")]
    ip_range: Option<String>,

    /// Addresses never to hand out
    #[arg(long, value_name = "NAME=IP", value_parser = pair)]
    aux_address: Vec<(String, String)>,

    /// What a new flannel network is to be: backend=, vni=, subnet-len=, …
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    ipam_opt: Vec<(String, String)>,

    /// Options of the driver
    #[arg(short = 'o', long = "opt", value_name = "KEY=VALUE", value_parser = pair)]
    options: Vec<(String, String)>,

    /// Labels of the Docker network
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,

    /// No way out of the network
    #[arg(long)]
    internal: bool,

    /// IPv6 too
    #[arg(long)]
    ipv6: bool,

    /// A network of the swarm: services use it, and containers by themselves too
    #[arg(long)]
    swarm: bool,

    /// The driver's name, if the plugin does not run yet to be asked (a managed plugin's has a tag: flannel:latest)
    #[arg(long, value_name = "NAME")]
    driver_name: Option<String>,

    #[command(flatten)]
    sockets: Sockets,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("KEY=VALUE was wanted".to_owned()),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Created {
    id: String,
    #[serde(default)]
    warning: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Inspected {
    swarm: Swarm,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Swarm {
    local_node_state: String,
    control_available: bool,
}

pub(super) async fn run(flags: Flags) -> anyhow::Result<ExitCode> {
    let plugin = ask_plugin(&flags.sockets.socket).await;
    let (driver, status) = match (&flags.driver_name, plugin) {
        (Some(name), plugin) => (name.clone(), plugin.ok()),
        (None, Ok(status)) => (status.driver.clone(), Some(status)),
        (None, Err(error)) => {
            return Err(error).context("the plugin does not answer; start it, or say --driver-name");
        }
    };
    let engine = Engine::at(&flags.sockets.docker_socket);
    match flags.swarm {
        true => in_swarm(&engine, &flags, &driver, status.as_ref()).await?,
        false => create(&engine, &request(&flags, &driver, status.as_ref())).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The node's own options first; then, on a manager, the network that takes them.
async fn in_swarm(
    engine: &Engine,
    flags: &Flags,
    driver: &str,
    status: Option<&Status>,
) -> anyhow::Result<()> {
    let swarm = engine.get::<Inspected>("/info").await?.swarm;
    if swarm.local_node_state != "active" {
        bail!("this engine is in no swarm: docker swarm init, or docker swarm join …; or leave --swarm out");
    }
    if !driver.contains(':') {
        bail!(
            "engines refuse services on a driver that is no managed plugin ({driver} is a service's socket): install the plugin with docker plugin install"
        );
    }
    let config = format!("{}{CONFIG_SUFFIX}", flags.name);
    match engine.get::<Value>(&format!("/networks/{config}")).await {
        Ok(_) => eprintln!("{config} is here already"),
        Err(error) if error.is_not_found() => {
            create(engine, &config_only(request(flags, driver, status), &config)).await?;
        }
        Err(error) => return Err(error.into()),
    }
    match swarm.control_available {
        true => create(engine, &of_swarm(flags, driver, &config)).await,
        false => {
            eprintln!("this node is a worker: type the same on every other node, on a manager last");
            Ok(())
        }
    }
}

async fn create(engine: &Engine, request: &Value) -> anyhow::Result<()> {
    let created: Created = engine.post("/networks/create", request).await?;
    if !created.warning.is_empty() {
        eprintln!("{}", created.warning);
    }
    say(&created.id);
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the id is what the command is for, as docker prints it")]
fn say(id: &str) {
    println!("{id}");
}

/// What `docker network create` would send.
fn request(flags: &Flags, driver: &str, status: Option<&Status>) -> Value {
    let mut options: BTreeMap<&str, &str> = flags.ipam_opt.iter().map(|(k, v)| (&**k, &**v)).collect();
    options.extend(flags.network.as_deref().map(|network| ("network", network)));
    // The call that defines a network is told of IPv6 by options only.
    let v6 = flags.subnets.iter().find(|cidr| cidr.contains(':'));
    if let Some(cidr) = v6 {
        options.entry(IPV6_NETWORK).or_insert(cidr);
    }
    let aux: BTreeMap<&str, &str> = flags.aux_address.iter().map(|(k, v)| (&**k, &**v)).collect();
    let mut configs: Vec<Value> =
        subnets(flags, status).into_iter().map(|cidr| json!({"Subnet": cidr})).collect();
    if let Some(first) = configs.first_mut().and_then(Value::as_object_mut) {
        first.extend(flags.ip_range.as_ref().map(|range| ("IPRange".to_owned(), json!(range))));
        first.extend((!aux.is_empty()).then(|| ("AuxiliaryAddresses".to_owned(), json!(aux))));
    }
    json!({
        "Name": flags.name,
        "CheckDuplicate": true,
        "Driver": driver,
        "IPAM": {"Driver": driver, "Config": configs, "Options": options},
        "Internal": flags.internal,
        "EnableIPv6": flags.ipv6 || v6.is_some(),
        "Options": flags.options.iter().cloned().collect::<BTreeMap<_, _>>(),
        "Labels": flags.label.iter().cloned().collect::<BTreeMap<_, _>>(),
    })
}

/// The CIDRs to name: those given, else those of the network meant, if it runs here. A pool that is not named cannot be
/// given to a second Docker network, and `docker run --ip` does not work with it.
fn subnets(flags: &Flags, status: Option<&Status>) -> Vec<String> {
    if !flags.subnets.is_empty() {
        return flags.subnets.clone();
    }
    let wanted = flags.network.as_deref().unwrap_or("default");
    let network = status.and_then(|status| status.networks.iter().find(|network| network.name == wanted));
    let cidrs = network.map(|network| network.cidrs.as_slice()).unwrap_or_default();
    cidrs.iter().filter(|cidr| flags.ipv6 || !cidr.contains(':')).cloned().collect()
}

/// The same as a network that only holds options.
fn config_only(mut request: Value, name: &str) -> Value {
    if let Some(fields) = request.as_object_mut() {
        fields.insert("Name".into(), json!(name));
        fields.insert("ConfigOnly".into(), json!(true));
        // Engines refuse a config-only network that names a driver.
        fields.remove("Driver");
        fields.remove("Labels");
    }
    request
}

/// The network of the swarm that takes each node's options.
fn of_swarm(flags: &Flags, driver: &str, config: &str) -> Value {
    json!({
        "Name": flags.name,
        "CheckDuplicate": true,
        "Driver": driver,
        "Scope": "swarm",
        "Attachable": true,
        "ConfigFrom": {"Network": config},
        "Labels": flags.label.iter().cloned().collect::<BTreeMap<_, _>>(),
    })
}
