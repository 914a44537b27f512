//! What the packet filter must know of a flannel network's endpoints here: from what the journal says of them and of the
//! Docker networks they are on.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel_core::words::exposure::Exposure;
use flannel_core::words::name::NetworkName;

use crate::journal::{EndpointRecord, Journal, NetworkRecord, Stage};

/// How the endpoints of a Docker network differ from others.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Policy {
    internal: bool,
    closed: bool,
    unmasqueraded: bool,
}

impl Policy {
    fn of(network: &NetworkRecord) -> Self {
        let options = &network.options;
        Self {
            internal: options.internal,
            closed: options.isolated,
            unmasqueraded: options.masquerade == Some(false),
        }
    }
}

/// Whether the packet filter must know of every endpoint of a Docker network, even of one without ports.
pub(crate) fn is_particular(network: &NetworkRecord) -> bool {
    Policy::of(network) != Policy::default()
}

/// All that is particular about the endpoints of a flannel network on this host.
pub(crate) fn of(journal: &Journal, network: &NetworkName) -> Exposure {
    let mut policies = BTreeMap::new();
    journal.networks().each(|id, record| {
        if record.network == *network {
            policies.insert(id.to_owned(), Policy::of(record));
        }
    });
    let mut exposure = Exposure::default();
    journal.endpoints().each(|_, endpoint| {
        if endpoint.network == *network && endpoint.stage != Stage::Deleted {
            let policy = policies.get(&endpoint.docker_network).copied().unwrap_or_default();
            add(&mut exposure, endpoint, policy);
        }
    });
    exposure
}

fn add(exposure: &mut Exposure, endpoint: &EndpointRecord, policy: Policy) {
    for address in addresses(endpoint) {
        for (holds, set) in [
            (policy.internal, &mut exposure.internal),
            (policy.closed, &mut exposure.closed),
            (policy.unmasqueraded, &mut exposure.unmasqueraded),
        ] {
            if holds {
                set.insert(address);
            }
        }
    }
    if !policy.internal {
        exposure.published.extend(&endpoint.ports);
    }
}

/// The addresses of an endpoint.
pub(crate) fn addresses(endpoint: &EndpointRecord) -> impl Iterator<Item = IpAddr> {
    endpoint.addresses().into_iter().map(|address| address.address())
}
