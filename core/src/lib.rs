//! flannel core.
pub mod act;
pub mod decide;
#[cfg(feature = "run")]
pub mod run;
pub mod touch;
pub mod words;
