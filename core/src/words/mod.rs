//! Values everyone shares. No I/O, no clock, no randomness, no imports from the other floors.

pub mod addr;
pub mod code;
pub mod config;
pub mod digest;
pub mod exposure;
pub mod extension;
pub mod fact;
pub mod hostport;
pub mod ipsec;
pub mod lease;
pub mod name;
pub mod node;
pub mod report;
pub mod rule;
pub mod secret;
pub mod shaping;
pub mod territory;
pub mod tunnel;
pub mod units;
pub mod wireguard;
