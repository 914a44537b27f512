//! flannel core.
pub mod act;
pub mod touch;
pub mod words;
