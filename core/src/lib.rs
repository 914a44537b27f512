//! flannel core.
pub mod act;
#[cfg(feature = "run")]
pub mod run;
pub mod touch;
pub mod words;
