//! Pure functions from words to words: what should be true. No I/O, no clock, no randomness.

pub mod allocate;
pub mod associations;
pub mod backend;
pub mod bridge;
pub mod changes;
pub mod delta;
pub mod endpoint;
pub mod errands;
pub mod firewall;
pub mod hostports;
pub mod isolation;
pub mod plan;
pub mod pool;
pub mod publish;
pub mod ranges;
pub mod reader;
pub mod scene;
pub mod shaping;
mod tunnel_guard;
pub mod vanished;
