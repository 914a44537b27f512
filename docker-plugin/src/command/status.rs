//! `status`: what is served here, with the engine's names, and every place where plugin, engine and kernel disagree.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Deserializer};

use super::{Sockets, ask_plugin};
use crate::engine::{Engine, EngineError};
use crate::status::{EndpointStatus, Status};

/// Show networks, leases, containers and ports, and where plugin, engine and kernel disagree
///
/// Exit status: 0 if everything agrees, 1 if something is wrong or the plugin does not run.
#[derive(Args, Debug)]
pub(super) struct Flags {
    /// Print JSON: what the plugin knows, without the engine's view
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    sockets: Sockets,
}

/// A network as the engine inspects it.
#[derive(Deserialize, Clone, Debug)]
#[serde(rename_all = "PascalCase")]
struct EngineNetwork {
    name: String,
    id: String,
    #[serde(default)]
    driver: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    containers: BTreeMap<String, EngineContainer>,
}

#[derive(Deserialize, Clone, Debug)]
struct EngineContainer {
    #[serde(rename = "Name")]
    name: String,
    #[serde(rename = "EndpointID")]
    endpoint: String,
}

fn null_is_empty<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

pub(super) async fn run(flags: Flags) -> anyhow::Result<ExitCode> {
    let status = ask_plugin(&flags.sockets.socket).await.context(
        "flannel-docker-plugin does not answer (containers that run keep their network meanwhile); start it, or name its --socket",
    )?;
    if flags.json {
        say(&format!("{}\n", serde_json::to_string_pretty(&status)?));
        return Ok(ExitCode::SUCCESS);
    }
    let engine = engine_view(&Engine::at(&flags.sockets.docker_socket), &status).await;
    let (engine, unknown) = match engine {
        Ok(engine) => (engine, None),
        Err(error) => (Vec::new(), Some(format!("what the engine believes is not known: {error}"))),
    };
    let mut wrong = differences(&status, unknown.is_none().then_some(&engine));
    wrong.extend(unknown);
    say(&table(&status, &engine));
    for line in &wrong {
        say(&format!("! {line}\n"));
    }
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[expect(clippy::print_stdout, reason = "the table is what the command is for")]
fn say(text: &str) {
    print!("{text}");
}

/// The engine's networks of our driver, with their containers.
async fn engine_view(engine: &Engine, status: &Status) -> Result<Vec<EngineNetwork>, EngineError> {
    let listed: Vec<EngineNetwork> = engine.get("/networks").await?;
    let mut networks = Vec::new();
    for network in listed {
        let known = status.docker_networks.iter().any(|ours| ours.id == network.id);
        if !known && network.driver != status.driver {
            continue;
        }
        // Only an inspection tells the containers; a network may be removed in between.
        match engine.get(&format!("/networks/{}", network.id)).await {
            Ok(inspected) => networks.push(inspected),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(networks)
}

/// Everything that is not as it should be, a line each.
fn differences(status: &Status, engine: Option<&Vec<EngineNetwork>>) -> Vec<String> {
    let mut wrong = Vec::new();
    for network in &status.networks {
        if let Some(waiting) = &network.waiting {
            wrong.push(format!("flannel network {}: {waiting}", network.name));
        } else if !network.ready {
            wrong.push(format!(
                "flannel network {}: the kernel is not yet as planned; see the plugin's log",
                network.name
            ));
        }
    }
    for endpoint in status.endpoints.iter().filter(|endpoint| endpoint.stage == "joined") {
        if endpoint.link_exists == Some(false) {
            wrong.push(format!(
                "endpoint {} ({}): the kernel has no link {}",
                short(&endpoint.id),
                endpoint.address,
                endpoint.link
            ));
        }
    }
    if let Some(engine) = engine {
        wrong.extend(disagreements(status, engine));
    }
    wrong
}

/// Where the engine and the plugin do not know of the same things.
fn disagreements(status: &Status, engine: &[EngineNetwork]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut believed = BTreeMap::new();
    for network in engine {
        // A node of a swarm that has no task on a network knows of the network and has not created it.
        if !status.docker_networks.iter().any(|ours| ours.id == network.id) && !network.containers.is_empty()
        {
            wrong.push(format!(
                "network {} ({}): known to the engine, not to the plugin; remove and create it",
                network.name,
                short(&network.id)
            ));
        }
        for container in network.containers.values() {
            believed.insert(container.endpoint.as_str(), (network, container));
        }
    }
    for ours in &status.docker_networks {
        if !engine.iter().any(|network| network.id == ours.id) {
            wrong.push(format!(
                "network {} of flannel network {}: known to the plugin, not to the engine",
                short(&ours.id),
                ours.network
            ));
        }
    }
    let joined =
        |id: &str| status.endpoints.iter().any(|endpoint| endpoint.id == id && endpoint.stage == "joined");
    for (id, (network, container)) in &believed {
        if !joined(id) && status.docker_networks.iter().any(|ours| ours.id == network.id) {
            wrong.push(format!(
                "container {} on {}: the plugin has no endpoint {}",
                container.name,
                network.name,
                short(id)
            ));
        }
    }
    for endpoint in status.endpoints.iter().filter(|endpoint| endpoint.stage == "joined") {
        if !believed.contains_key(endpoint.id.as_str()) {
            wrong.push(format!(
                "endpoint {} ({}): known to the plugin, not to the engine",
                short(&endpoint.id),
                endpoint.address
            ));
        }
    }
    wrong
}

/// Ids as docker prints them.
fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// Everything as tables.
fn table(status: &Status, engine: &[EngineNetwork]) -> String {
    let mut text = format!(
        "flannel-docker-plugin {}, driver {}, leases in {}\n\n",
        status.version, status.driver, status.store
    );
    let none = || "-".to_owned();
    let networks = status.networks.iter().map(|network| {
        let state = if network.ready { "ready" } else { "not ready" };
        let others = || network.holder.as_ref().map(|holder| format!("of {holder}"));
        [
            network.name.clone(),
            network.cidrs.join(","),
            network.subnets.join(","),
            network.backend.clone().or_else(others).unwrap_or_else(none),
            network.mtu.map_or_else(none, |mtu| mtu.to_string()),
            network.bridge.clone().unwrap_or_else(none),
            state.to_owned(),
        ]
    });
    columns(
        &mut text,
        ["FLANNEL NETWORK", "CIDR", "SUBNET HERE", "BACKEND", "MTU", "BRIDGE", "STATE"],
        networks,
    );
    let docker = status.docker_networks.iter().map(|ours| {
        let name = engine
            .iter()
            .find(|network| network.id == ours.id)
            .map_or_else(none, |network| network.name.clone());
        [short(&ours.id).to_owned(), name, ours.network.clone(), ours.subnet.clone(), ours.ipam.clone()]
    });
    columns(&mut text, ["NETWORK ID", "NAME", "FLANNEL NETWORK", "SUBNET", "IPAM"], docker);
    let endpoints = status.endpoints.iter().map(|endpoint| {
        let (network, container) = names(endpoint, engine);
        [
            container.unwrap_or_else(none),
            network.unwrap_or_else(|| short(&endpoint.docker_network).to_owned()),
            endpoint.address.clone(),
            endpoint.mac.clone(),
            short(&endpoint.id).to_owned(),
            endpoint.stage.clone(),
            if endpoint.ports.is_empty() { none() } else { endpoint.ports.join(",") },
        ]
    });
    columns(&mut text, ["CONTAINER", "NETWORK", "ADDRESS", "MAC", "ENDPOINT", "STATE", "PORTS"], endpoints);
    text
}

/// The engine's names of an endpoint's network and container.
fn names(endpoint: &EndpointStatus, engine: &[EngineNetwork]) -> (Option<String>, Option<String>) {
    let network = engine.iter().find(|network| network.id == endpoint.docker_network);
    let container =
        network.and_then(|network| network.containers.values().find(|c| c.endpoint == endpoint.id));
    (network.map(|network| network.name.clone()), container.map(|container| container.name.clone()))
}

/// Rows below a heading, as wide as they need.
fn columns<const N: usize>(text: &mut String, heading: [&str; N], rows: impl Iterator<Item = [String; N]>) {
    let rows: Vec<[String; N]> = std::iter::once(heading.map(str::to_owned)).chain(rows).collect();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in &rows {
        let line: String = row.iter().zip(&widths).fold(String::new(), |mut line, (cell, width)| {
            // Into a text nothing can fail.
            let _ = write!(line, "{cell:width$}   ");
            line
        });
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{DockerNetworkStatus, NetworkStatus};

    fn status() -> Status {
        Status {
            version: "0.1.0".into(),
            driver: "flannel".into(),
            store: "/var/lib/flannel/store, for this machine only".into(),
            networks: vec![NetworkStatus {
                name: "default".into(),
                cidrs: vec!["10.100.0.0/16".into()],
                subnets: vec!["10.100.5.0/24".into()],
                backend: Some("vxlan".into()),
                holder: None,
                mtu: Some(1450),
                bridge: Some("cni0".into()),
                ready: true,
                waiting: None,
            }],
            docker_networks: vec![DockerNetworkStatus {
                id: "n".repeat(64),
                network: "default".into(),
                subnet: "10.100.5.0/24".into(),
                ipam: "flannel".into(),
            }],
            endpoints: vec![EndpointStatus {
                id: "e".repeat(64),
                docker_network: "n".repeat(64),
                address: "10.100.5.2/24".into(),
                mac: "0a:58:0a:64:05:02".into(),
                stage: "joined".into(),
                ports: vec!["0.0.0.0:8080->10.100.5.2:80/tcp".into()],
                link: "veth1".into(),
                link_exists: Some(true),
            }],
        }
    }

    fn engine() -> Vec<EngineNetwork> {
        let container = EngineContainer { name: "web1".into(), endpoint: "e".repeat(64) };
        vec![EngineNetwork {
            name: "web".into(),
            id: "n".repeat(64),
            driver: "flannel".into(),
            containers: BTreeMap::from([("c".repeat(64), container)]),
        }]
    }

    #[test]
    fn agreement_is_silent_and_shows_the_engines_names() {
        let (status, engine) = (status(), engine());
        assert_eq!(differences(&status, Some(&engine)), Vec::<String>::new());
        let text = table(&status, &engine);
        assert!(text.contains("default           10.100.0.0/16   10.100.5.0/24   vxlan"), "{text}");
        assert!(text.contains("web1        web       10.100.5.2/24"), "{text}");
        assert!(text.contains("joined   0.0.0.0:8080->10.100.5.2:80/tcp"), "{text}");
    }

    #[test]
    fn every_disagreement_has_a_line() {
        let mut status = status();
        if let Some(endpoint) = status.endpoints.first_mut() {
            endpoint.link_exists = Some(false);
            endpoint.id = "f".repeat(64);
        }
        if let Some(network) = status.networks.first_mut() {
            network.waiting = Some("E109 the store is away".into());
        }
        let lines = differences(&status, Some(&engine())).join("\n");
        for said in [
            "flannel network default: E109 the store is away",
            "endpoint ffffffffffff (10.100.5.2/24): the kernel has no link veth1",
            "container web1 on web: the plugin has no endpoint eeeeeeeeeeee",
            "endpoint ffffffffffff (10.100.5.2/24): known to the plugin, not to the engine",
        ] {
            assert!(lines.contains(said), "{said}\nin\n{lines}");
        }
        status.docker_networks.clear();
        let lines = differences(&status, Some(&engine())).join("\n");
        assert!(
            lines.contains("network web (nnnnnnnnnnnn): known to the engine, not to the plugin"),
            "{lines}"
        );
    }
}
