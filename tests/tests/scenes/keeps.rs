//! What an agent may be told to do beside its backend.

use proptest::prelude::*;

/// What the agent does beside the backend.
#[derive(Clone, Debug)]
pub(crate) struct Keeps {
    pub(super) bridge: bool,
    pub(super) masquerade: bool,
    pub(super) forward: bool,
    pub(super) chains: bool,
    pub(super) guard: bool,
}

pub(super) fn keeps() -> impl Strategy<Value = Keeps> {
    any::<[bool; 5]>().prop_map(|[bridge, masquerade, forward, chains, guard]| Keeps {
        bridge,
        masquerade,
        forward,
        chains,
        guard,
    })
}
