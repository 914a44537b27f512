//! Leasing, planning, reconciling and attaching: what flanneld, the Docker plugin and the CNI binary share.
//!
//! A **fact** is one thing that is true of a kernel, or should be. Everything here is one of four verbs on sets of them:
//!
//! ```text
//! plan    (network, node, leases, endpoints) -> desired facts    decide, pure
//! observe (territory)                        -> observed facts   touch
//! diff    (desired, observed)                -> changes          words, pure
//! apply   (changes)                          -> ()               touch
//! ```
//!
//! Five floors; imports point down only, and `decide` and `touch` never meet:
//!
//! - [`words`]: values. Start with [`words::fact`] and [`words::territory`].
//! - [`decide`]: pure functions from words to words. [`decide::plan`] folds the planners into one plan.
//! - [`touch`]: synchronous effects, one subject a file. [`touch::world::kernel`] is the kernel of one namespace.
//! - [`act`]: where the two meet: [`act::pass`] for a node, [`act::attach`] for an endpoint.
//! - `run` (feature `run`): stores, tenure, the agent, the command line; the only floor with an async runtime.

#![warn(missing_docs)]

pub mod act;
pub mod decide;
pub mod touch;
pub mod words;

#[cfg(feature = "run")]
pub mod run;
