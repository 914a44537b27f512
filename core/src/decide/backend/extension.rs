//! `extension`: commands of the operator's make the data path; this program tells them who is there.
//!
//! **Shape** — nothing of the kernel is planned. What `PreStartupCommand` printed is our `BackendData`, a JSON string, and
//! whoever takes the lease puts it in; that of a peer is the stdin of the command that is run for it.
//! **Source** — upstream pkg/backend/extension (`extension.go`, `extension_network.go`). Their documentation promises the IPv6
//! variables for peers too; their code gives them to `PostStartupCommand` only.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use serde_json::value::RawValue;

use crate::decide::scene::{Draft, Scene};
use crate::words::addr::{Family, Prefix};
use crate::words::code::Code;
use crate::words::config::NetworkConfig;
use crate::words::extension::{Errand, Errands, ExtensionConfig};
use crate::words::lease::Advertisement;
use crate::words::node::Node;
use crate::words::units::{Mtu, OutOfRange};

use super::Backend;

/// Somebody else's packets.
pub(super) struct Extension {
    options: ExtensionConfig,
}

impl Extension {
    pub(super) fn new(options: ExtensionConfig) -> Self {
        Self { options }
    }
}

impl Backend for Extension {
    fn advertise(&self, _: &NetworkConfig, _: &Node) -> Advertisement {
        Advertisement { backend: "extension".into(), ..Advertisement::default() }
    }

    fn mtu(&self, _: &NetworkConfig, node: &Node) -> Result<Mtu, OutOfRange> {
        Ok(node.uplink.mtu)
    }

    fn plan(&self, scene: &Scene<'_>, draft: &mut Draft) {
        let cidr = |family| scene.config.range(family).map(|range| range.cidr);
        let own = |family| Some((scene.own.subnets.of(family)?, scene.own.value.public(family)?));
        let mut variables = variables(own(Family::V4), own(Family::V6));
        variables.insert("NETWORK".into(), shown(cidr(Family::V4), "0.0.0.0/0"));
        variables.insert("IPV6NETWORK".into(), shown(cidr(Family::V6), "::/0"));
        let own = Errand { variables, input: String::new() };
        draft.errands = Some(Errands { config: self.options.clone(), own, peers: peers(scene, draft) });
    }
}

fn peers(scene: &Scene<'_>, draft: &mut Draft) -> BTreeMap<String, Errand> {
    let mut public: HashMap<Prefix, IpAddr> = HashMap::new();
    for family in scene.families() {
        public.extend(scene.places(family, draft).into_iter().map(|place| (place.subnet, place.public)));
    }
    let mut peers = BTreeMap::new();
    for peer in &scene.peers {
        let place = |family| {
            let subnet = peer.subnets.of(family)?;
            Some((subnet, *public.get(&subnet)?))
        };
        let (v4, v6) = (place(Family::V4), place(Family::V6));
        if v4.is_none() && v6.is_none() {
            continue;
        }
        match peer.value.advertisement.data.as_deref().map_or(Ok(String::new()), text) {
            Ok(input) => {
                peers.insert(peer.subnets.key(), Errand { variables: variables(v4, v6), input });
            }
            Err(cause) => draft.find(Code::PEER_DATA, format!("{peer}: {cause}")),
        }
    }
    peers
}

/// Upstream's four, with its texts for what there is none of.
fn variables(v4: Option<(Prefix, IpAddr)>, v6: Option<(Prefix, IpAddr)>) -> BTreeMap<String, String> {
    let nobody = Ipv4Addr::UNSPECIFIED.to_string();
    [
        ("SUBNET", shown(v4.map(|(subnet, _)| subnet), "0.0.0.0/0")),
        ("PUBLIC_IP", shown(v4.map(|(_, public)| public), &nobody)),
        ("IPV6SUBNET", shown(v6.map(|(subnet, _)| subnet), "::/0")),
        ("PUBLIC_IPV6", shown(v6.map(|(_, public)| public), "<nil>")),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

fn shown(value: Option<impl ToString>, none: &str) -> String {
    value.map_or_else(|| none.to_owned(), |value| value.to_string())
}

fn text(data: &RawValue) -> Result<String, &'static str> {
    serde_json::from_str(data.get()).map_err(|_| "its BackendData is not text")
}
