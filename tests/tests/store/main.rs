//! What a store promises, kept by both kinds: one suite against a real etcd on loopback and against a directory. And what
//! holding a lease in it means.

#![expect(clippy::unwrap_used, reason = "a test may panic, and so may what only tests call")]

mod contract;
mod crowd;
mod directory;
mod etcd;
mod fixture;
mod gate;
mod tenure;
mod twins;
