//! Placeholder while the floors are built.
