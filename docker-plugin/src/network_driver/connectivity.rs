//! Published ports: an engine tells which endpoint they are to reach, and the driver does it.
//!
//! Program replaces what the endpoint had, Revoke takes it away; engines repeat both and leave either out. What is answered is on
//! disk and in the kernel.

use std::sync::Arc;

use crate::answer::{Nothing, Refusal, blocking};
use crate::plugin::Plugin;
use crate::wire;

/// The engine calls this for the one endpoint through which a container's ports are to be published.
pub(super) async fn program_external_connectivity(
    plugin: Arc<Plugin>,
    request: wire::ProgramExternalConnectivity,
) -> Result<Nothing, Refusal> {
    let bindings = wire::port_bindings(&request.options)
        .map_err(|error| Refusal(format!("the published ports cannot be read: {error}")))?;
    let (books, docker_network, id) = (Arc::clone(&plugin), request.network_id, request.endpoint_id.clone());
    let network = blocking(move || books.publish(&docker_network, &id, &bindings)).await?;
    let Some(network) = network else { return Ok(Nothing {}) };
    if let Err(cause) = plugin.expose(&network).await {
        let (books, id) = (Arc::clone(&plugin), request.endpoint_id);
        blocking(move || books.unpublish(&id)).await?;
        plugin.networks().expose_changes();
        return Err(Refusal(format!("the ports could not be published: {cause}")));
    }
    Ok(Nothing {})
}

/// The container's ports are published no more.
pub(super) async fn revoke_external_connectivity(
    plugin: Arc<Plugin>,
    request: wire::Endpoint,
) -> Result<Nothing, Refusal> {
    let (books, id) = (Arc::clone(&plugin), request.endpoint_id);
    if let Some(network) = blocking(move || books.unpublish(&id)).await?
        && let Err(cause) = plugin.expose(&network).await
    {
        // It is booked as gone; the agent tries again.
        tracing::warn!(%network, "ports not taken away yet: {cause}");
    }
    Ok(Nothing {})
}
