//! The same host when leases come, move and go.

use proptest::collection::vec;
use proptest::prelude::*;

use super::{Other, Scene, Wish, other};

/// Who else there may be.
pub(crate) fn peers() -> impl Strategy<Value = Vec<Other>> {
    vec(other(), 0..7)
}

impl Scene {
    /// The same now, among these.
    pub(crate) fn among(&self, peers: Vec<Other>) -> Self {
        Self { now: Wish { peers, ..self.now.clone() }, ..self.clone() }
    }
}
