//! Whether all who know something about endpoints say the same: engine, journal, ledger, kernel.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::Host;
use serde_json::Value;

use super::world::World;

/// What the plugin still has and the engine no longer knows: a sweep takes it, in time.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Leftovers {
    /// Docker networks that only the journal knows.
    pub(super) networks: BTreeSet<String>,
    /// Endpoints that only the journal knows, with their stage.
    pub(super) endpoints: BTreeMap<String, String>,
    /// Addresses that no endpoint came for.
    pub(super) claims: BTreeSet<String>,
    /// Flannel networks whose pool was asked for, and no network came: they stay for a while.
    pub(super) pools: BTreeSet<String>,
}

impl Leftovers {
    pub(super) fn count(&self) -> usize {
        self.networks.len() + self.endpoints.len() + self.claims.len() + self.pools.len()
    }
}

/// An endpoint as its engine sees it.
struct Endpoint {
    id: String,
    address: String,
    container: String,
}

/// Everything that the engine believes is so everywhere; the answer is what there is beyond that.
pub(super) fn agree(world: &World<'_>) -> Result<Leftovers> {
    let host = world.host;
    let (networks, endpoints) = engines_view(host)?;
    let mut leftovers = Leftovers::default();

    let journal = records(host, "networks")?;
    for id in &networks {
        ensure!(journal.contains_key(id), "the journal has no record of network {id}");
    }
    leftovers.networks.extend(journal.keys().filter(|id| !networks.contains(*id)).cloned());

    let mut journal = records(host, "endpoints")?;
    let ledger = ledger(host)?;
    let mut held: BTreeMap<&String, &String> = ledger.iter().collect();
    let mut addresses = BTreeSet::new();
    for Endpoint { id, address, container } in &endpoints {
        ensure!(addresses.insert(address), "{address} twice");
        let record =
            journal.remove(id).with_context(|| format!("no record of {container}'s endpoint {id}"))?;
        ensure!(record["stage"] == "joined", "{container}: {record}");
        let recorded = record["address"].as_str().unwrap_or_default();
        ensure!(recorded.starts_with(&format!("{address}/")), "{container}: {address} and {recorded}");
        let owner = held.remove(address);
        ensure!(owner == Some(&format!("docker:{id}")), "{address} of {container} is held by {owner:?}");
        let inside = world.host.docker_container(container)?;
        let seen = flannel_tests::Place::out(&inside, &["ip", "-4", "-o", "addr", "show"])?;
        ensure!(seen.contains(&format!(" {address}/")), "{container} has not {address}:\n{seen}");
    }
    for (id, record) in journal {
        leftovers.endpoints.insert(id, record["stage"].as_str().unwrap_or_default().to_owned());
    }
    for (address, owner) in held {
        let owner = owner.trim_start_matches("docker:");
        if leftovers.endpoints.contains_key(owner) {
            continue;
        }
        // Claimed, and no endpoint came; or its endpoint is gone and the engine never gave the address back.
        leftovers.claims.insert(format!("{address} {owner}"));
    }

    let asked = records(host, "pools")?.into_iter().filter(|(_, pool)| pool["outstanding"] != 0);
    leftovers.pools.extend(asked.map(|(network, _)| network));

    // One port on a bridge for every endpoint, and none but those of endpoints that are still to be cleaned up.
    let ports = host.sh("ip -o link show type veth | grep -c ' master \\(cni0\\|fl-\\)' || true")?;
    let ports: usize = ports.trim().parse()?;
    ensure!(
        ports >= endpoints.len() && ports <= endpoints.len() + leftovers.endpoints.len(),
        "{ports} ports for {} endpoints and {leftovers:?}",
        endpoints.len()
    );
    ports_lead_somewhere(host, &endpoints, &leftovers, &ledger)?;
    world.nobody_panicked()?;
    Ok(leftovers)
}

/// A published port that leads anywhere leads to an address of its own container, and none to nobody's.
fn ports_lead_somewhere(
    host: &Host,
    endpoints: &[Endpoint],
    leftovers: &Leftovers,
    ledger: &BTreeMap<String, String>,
) -> Result<()> {
    // `tcp . 18080 : 10.100.7.2 . 80`
    let elements =
        host.sh("nft list ruleset | grep -oE '(tcp|udp|sctp) \\. [0-9]+ : [0-9.]+ \\. [0-9]+' || true")?;
    let mut leads: BTreeMap<&str, &str> = BTreeMap::new();
    for element in elements.lines() {
        let words: Vec<&str> = element.split(' ').collect();
        let [_, _, port, _, address, ..] = words[..] else { bail!("{element:?}") };
        ensure!(leads.insert(port, address).is_none(), "port {port} twice:\n{elements}");
        let lives = endpoints.iter().any(|endpoint| endpoint.address == address);
        let owner = ledger.get(address).map(|owner| owner.trim_start_matches("docker:").to_owned());
        let left = owner.is_some_and(|owner| leftovers.endpoints.contains_key(&owner));
        ensure!(lives || left, "port {port} leads to {address}, which is nobody's");
    }
    let mut containers: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for endpoint in endpoints {
        containers.entry(&endpoint.container).or_default().insert(&endpoint.address);
    }
    for (container, addresses) in containers {
        let format = "{{range .HostConfig.PortBindings}}{{range .}}{{.HostPort}} {{end}}{{end}}";
        for port in host.docker(&["inspect", "-f", format, container])?.split_whitespace() {
            let to = leads.get(port).with_context(|| format!("port {port} of {container} leads nowhere"))?;
            ensure!(addresses.contains(to), "port {port} of {container} leads to {to}");
        }
    }
    Ok(())
}

/// The ids of the engine's flannel networks, and the endpoints of running containers on them.
fn engines_view(host: &Host) -> Result<(BTreeSet<String>, Vec<Endpoint>)> {
    let ids = host.docker(&["network", "ls", "-q", "--no-trunc", "--filter", "driver=flannel"])?;
    let ids: BTreeSet<String> = ids.lines().map(str::to_owned).collect();
    let mut endpoints = Vec::new();
    for id in &ids {
        let seen: Value = serde_json::from_str(&host.docker(&["network", "inspect", id])?)?;
        for (container, endpoint) in seen[0]["Containers"].as_object().into_iter().flatten() {
            let text = |key: &str| endpoint[key].as_str().unwrap_or_default();
            // Endpoints of containers that do not run any more are the engine's own leftovers.
            if container.starts_with("ep-") {
                continue;
            }
            let address = text("IPv4Address").split('/').next().unwrap_or_default();
            endpoints.push(Endpoint {
                id: text("EndpointID").to_owned(),
                address: address.to_owned(),
                container: text("Name").to_owned(),
            });
        }
    }
    Ok((ids, endpoints))
}

fn records(host: &Host, kind: &str) -> Result<BTreeMap<String, Value>> {
    let dir = host.path(format!("/var/lib/flannel/docker/{kind}"));
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if let Some(id) = name.strip_suffix(".json") {
            // One that is removed meanwhile is not there.
            if let Ok(text) = std::fs::read_to_string(&path) {
                found.insert(
                    id.to_owned(),
                    serde_json::from_str(&text).with_context(|| format!("{name}: {text}"))?,
                );
            }
        }
        ensure!(!name.ends_with(".unreadable"), "{name}: a record was set aside");
    }
    Ok(found)
}

/// Address to owner, of every network's ledger.
fn ledger(host: &Host) -> Result<BTreeMap<String, String>> {
    let lines = host.sh("cd /var/lib/cni/networks 2>/dev/null || exit 0; \
         for f in */[0-9]*; do [ -f $f ] && echo ${f#*/} $(head -1 $f | tr -d '\\r'); done; true")?;
    lines
        .lines()
        .map(|line| {
            let (address, owner) =
                line.split_once(' ').with_context(|| format!("an entry without an owner: {line}"))?;
            Ok((address.to_owned(), owner.to_owned()))
        })
        .collect()
}
