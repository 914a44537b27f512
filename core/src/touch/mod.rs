//! Synchronous effects, one subject each. Nothing here decides.

pub mod identity;
pub mod ledger;
pub mod marker;
pub mod memory;
pub mod other_agents;
pub mod subnet_env;
pub mod uplink;
pub mod whole_file;
pub mod wireguard_key;
pub mod world;
