//! The async rim, and the only floor where tasks start.

pub mod agent;
pub mod cache;
pub mod cli;
pub mod daemon;
pub mod errands;
mod extension;
pub mod health;
pub mod hold;
mod ipsec;
mod journal;
pub mod kernel_events;
mod reconcile;
pub mod retire;
pub mod settings;
pub mod setup;
pub mod store;
mod survey;
pub mod tenure;
mod udp;
mod wireguard;
