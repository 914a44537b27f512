//! The async rim, and the only floor where tasks start.

pub mod cache;
pub mod cli;
pub mod health;
pub mod hold;
pub mod kernel_events;
