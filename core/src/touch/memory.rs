//! Memory of this process.

/// Gives the system back what is free: what a look at thousands of peers took is of no use until the next one. Costs a
/// walk through the free lists (some 0.1 ms for 10 MB).
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "nix has no malloc_trim")]
    // SAFETY: it takes no pointer, and may be called by any thread at any time (MT-Safe, malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}
