//! `alloc`: a lease and nothing else; somebody else carries the packets.

use crate::decide::scene::{Draft, Scene};
use crate::words::config::NetworkConfig;
use crate::words::lease::Advertisement;
use crate::words::node::Node;
use crate::words::units::{Mtu, OutOfRange};

use super::Backend;

/// Leases only.
pub(super) struct Alloc;

impl Backend for Alloc {
    fn advertise(&self, _: &NetworkConfig, _: &Node) -> Advertisement {
        Advertisement::default()
    }

    fn mtu(&self, _: &NetworkConfig, node: &Node) -> Result<Mtu, OutOfRange> {
        Ok(node.uplink.mtu)
    }

    fn plan(&self, _: &Scene<'_>, _: &mut Draft) {}
}
