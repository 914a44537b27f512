//! Where deciding meets touching, synchronously: all that the CNI binary needs.

pub mod attach;
pub mod claim;
pub mod hostports;
pub mod life;
pub mod pass;
