//! `host-gw`: a plain route to each peer's subnet through the peer's own address. All hosts must share one link.

use crate::decide::scene::{Draft, Scene};
use crate::words::addr::Family;
use crate::words::code::Code;
use crate::words::config::NetworkConfig;
use crate::words::lease::Advertisement;
use crate::words::node::Node;
use crate::words::units::{Mtu, OutOfRange};

use super::{Backend, direct, metric};

/// Routes through the peers themselves.
pub(super) struct HostGw;

impl Backend for HostGw {
    fn advertise(&self, _: &NetworkConfig, _: &Node) -> Advertisement {
        Advertisement { backend: "host-gw".into(), ..Advertisement::default() }
    }

    fn mtu(&self, _: &NetworkConfig, node: &Node) -> Result<Mtu, OutOfRange> {
        Ok(node.uplink.mtu)
    }

    fn plan(&self, scene: &Scene<'_>, draft: &mut Draft) {
        for family in scene.families() {
            if own_address_is_public(scene, family, draft) {
                plan_family(scene, family, draft);
            }
        }
    }
}

/// Peers use our public address as a gateway, so it must answer on the uplink itself.
fn own_address_is_public(scene: &Scene<'_>, family: Family, draft: &mut Draft) -> bool {
    let uplink = &scene.node.uplink;
    let (on_link, public) = (uplink.address(family), scene.own.value.public(family));
    if public.is_some() && public == on_link {
        return true;
    }
    let shown = |ip: Option<std::net::IpAddr>| ip.map_or_else(|| "none".to_owned(), |ip| ip.to_string());
    draft.find(
        Code::PUBLIC_IP_FOREIGN,
        format!("the public address is {}, {} has {}", shown(public), uplink.link, shown(on_link)),
    );
    false
}

fn plan_family(scene: &Scene<'_>, family: Family, draft: &mut Draft) {
    let uplink = scene.node.uplink.link;
    let places = scene.places(family, draft);
    let count = places.len().max(scene.crowd);
    for place in places {
        if !scene.node.reaches_directly(place.public) {
            let text =
                format!("{} is at {}, which is not on {uplink}'s own link", place.subnet, place.public);
            draft.find(Code::PEER_UNREACHABLE, text);
            continue;
        }
        draft.add(direct(scene.node, &place, metric(&place.subnet, count)));
    }
}
