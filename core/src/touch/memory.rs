//! Memory of this process.

/// Has the allocator be thrifty. By default it makes a heap for each thread, and what one thread allocates and another one frees, as
/// leases and plans do, leaves holes in all of them; and once something large was freed, it keeps as much of every heap for the
/// next large thing. Call it before there are threads; nothing here allocates so often that one heap is a bottleneck.
pub fn be_thrifty() {
    #[cfg(target_env = "gnu")]
    {
        /// From this size on, memory is taken from the system by itself, and goes back to it by itself.
        const LARGE: libc::c_int = 128 * 1024;
        /// So much may be free at the end of the heap.
        const SPARE: libc::c_int = 512 * 1024;
        for (what, value) in
            [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, SPARE)]
        {
            #[expect(unsafe_code, reason = "nix has no mallopt")]
            // SAFETY: it takes two numbers, and no other thread runs yet (mallopt(3): MT-Unsafe init).
            unsafe {
                libc::mallopt(what, value);
            }
        }
    }
}

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
