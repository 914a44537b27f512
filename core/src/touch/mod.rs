//! Synchronous effects, one subject each. Nothing here decides.

pub mod world;
