//! No input makes a machine allocate without bound: an allocator that counts, and does not give more.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The most that one allocation may have, in bytes. The largest that a device here needs is some hundred kilobytes.
const MOST_AT_ONCE: usize = 16 << 20;
/// The most that all may have. libFuzzer allocates past this allocator.
const MOST: usize = 256 << 20;

static USED: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: it is the system's, which is asked for less than it could be.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Relaxed) + layout.size();
        if layout.size() > MOST_AT_ONCE || used > MOST {
            // A null pointer ends the process with a message that names the size.
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}
