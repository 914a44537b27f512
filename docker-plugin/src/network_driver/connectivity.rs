//! Published ports: an engine tells which endpoint they are to reach, and the driver does it.

use std::sync::Arc;

use crate::answer::{Nothing, Refusal};
use crate::plugin::Plugin;
use crate::wire;

/// The engine calls this for the one endpoint through which a container's ports are to be published.
pub(super) async fn program_external_connectivity(
    plugin: Arc<Plugin>,
    request: wire::ProgramExternalConnectivity,
) -> Result<Nothing, Refusal> {
    tracing::debug!(docker_network = %request.network_id, endpoint = %request.endpoint_id, "external connectivity");
    let Some(port) = wire::published_ports(&request.options).into_iter().next() else {
        return Ok(Nothing {});
    };
    let protocol = match port.proto {
        6 => "tcp",
        17 => "udp",
        132 => "sctp",
        _ => "?",
    };
    let cidr = plugin.docker_network(&request.network_id).map(|network| network.cidr);
    let reach = cidr.map_or_else(|_| "the network".to_owned(), |cidr| cidr.to_string());
    Err(Refusal(format!(
        "publishing ports is not built yet for flannel networks: leave -p {}:{}/{protocol} out; the container's own address is reached from every host and container of {reach}",
        port.host_port, port.port
    )))
}

/// Nothing is published.
pub(super) async fn revoke_external_connectivity(
    _plugin: Arc<Plugin>,
    request: wire::Endpoint,
) -> Result<Nothing, Refusal> {
    tracing::trace!(docker_network = %request.network_id, endpoint = %request.endpoint_id, "revoked");
    Ok(Nothing {})
}
