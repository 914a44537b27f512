//! Synchronous effects, one subject each. Nothing here decides.

pub mod ledger;
pub mod marker;
pub mod subnet_env;
pub mod world;
