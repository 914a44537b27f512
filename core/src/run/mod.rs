//! The async rim, and the only floor where tasks start.

pub mod cli;
pub mod health;
pub mod kernel_events;
