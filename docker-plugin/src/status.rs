//! What this host serves, as one value: answered at `GET /status` on the plugin's socket and printed by the command `status`.

use serde::{Deserialize, Serialize};

use crate::journal::{EndpointRecord, Journal, NetworkRecord, Stage};
use crate::settings::Settings;
use crate::veth;

/// All of it.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Status {
    /// Of the software.
    pub(crate) version: String,
    /// What follows `docker network create -d`.
    pub(crate) driver: String,
    /// Where the leases are: etcd's endpoints, or a directory.
    pub(crate) store: String,
    /// Flannel networks that run here.
    pub(crate) networks: Vec<NetworkStatus>,
    /// Docker networks on them.
    pub(crate) docker_networks: Vec<DockerNetworkStatus>,
    /// Containers' places on those.
    pub(crate) endpoints: Vec<EndpointStatus>,
}

/// A flannel network on this host.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct NetworkStatus {
    pub(crate) name: String,
    /// All of it, one CIDR per address family; none before there is a lease.
    pub(crate) cidrs: Vec<String>,
    /// This host's part.
    pub(crate) subnets: Vec<String>,
    /// None if another agent of this host holds the lease.
    pub(crate) backend: Option<String>,
    /// That other agent.
    #[serde(default)]
    pub(crate) holder: Option<String>,
    /// Largest packet of a container, bytes.
    pub(crate) mtu: Option<u32>,
    pub(crate) bridge: Option<String>,
    /// Whether the kernel is as planned.
    pub(crate) ready: bool,
    /// What it waits for, or what is wrong.
    pub(crate) waiting: Option<String>,
}

/// A network of the engine.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct DockerNetworkStatus {
    pub(crate) id: String,
    /// The flannel network behind it.
    pub(crate) network: String,
    pub(crate) subnet: String,
    /// Who hands addresses out.
    pub(crate) ipam: String,
}

/// A container's place on a network.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct EndpointStatus {
    pub(crate) id: String,
    pub(crate) docker_network: String,
    /// With the length of the subnet; of two families separated by a comma.
    pub(crate) address: String,
    pub(crate) mac: String,
    /// `created`, `joined` or `deleted`.
    pub(crate) stage: String,
    /// Ports of this host that lead to it, like `0.0.0.0:8080->10.100.5.2:80/tcp`.
    #[serde(default)]
    pub(crate) ports: Vec<String>,
    /// The host's end of its veth pair.
    pub(crate) link: String,
    /// Whether the kernel has that link; none if it could not be asked.
    pub(crate) link_exists: Option<bool>,
}

impl Status {
    /// Of a running plugin. Looks at the kernel once, changes nothing.
    pub(crate) fn of(settings: &Settings, journal: &Journal, networks: Vec<NetworkStatus>) -> Self {
        let links = veth::existing();
        if let Err(refusal) = &links {
            tracing::warn!("the kernel's links are not known: {refusal}");
        }
        let endpoint = |(id, record): (String, EndpointRecord)| {
            let (link, _) = veth::ends(&id, &record.network);
            let addresses: Vec<_> = record.addresses().iter().map(ToString::to_string).collect();
            EndpointStatus {
                docker_network: record.docker_network,
                address: addresses.join(","),
                mac: record.mac.to_string(),
                stage: stage(record.stage).to_owned(),
                ports: record.ports.iter().map(ToString::to_string).collect(),
                link_exists: links.as_ref().ok().map(|links| links.contains(&link)),
                link: link.to_string(),
                id,
            }
        };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            driver: settings.driver_name.clone(),
            store: store(settings),
            networks,
            docker_networks: journal.networks().all().into_iter().map(docker_network).collect(),
            endpoints: journal.endpoints().all().into_iter().map(endpoint).collect(),
        }
    }
}

fn docker_network((id, record): (String, NetworkRecord)) -> DockerNetworkStatus {
    DockerNetworkStatus {
        id,
        network: record.network.to_string(),
        subnet: record.pool.to_string(),
        ipam: format!("{:?}", record.ipam).to_lowercase(),
    }
}

fn stage(stage: Stage) -> &'static str {
    match stage {
        Stage::Created => "created",
        Stage::Joined => "joined",
        Stage::Deleted => "deleted",
    }
}

fn store(settings: &Settings) -> String {
    match settings.embedded_store() {
        Some(dir) => format!("{}, for this machine only", dir.display()),
        None => format!(
            "etcd at {} below {}",
            without_passwords(settings.common.etcd_endpoints.as_deref().unwrap_or_default()),
            settings.common.etcd_prefix
        ),
    }
}

/// URLs without what stands before an `@`.
fn without_passwords(urls: &str) -> String {
    let bare = |url: &str| match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
        _ => url.to_owned(),
    };
    urls.split(',').map(|url| bare(url.trim())).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_in_a_url_is_not_shown() {
        let text = without_passwords("http://u:secret@10.0.0.5:2379, https://10.0.0.6:2379");
        assert_eq!(text, "http://10.0.0.5:2379,https://10.0.0.6:2379");
    }
}
