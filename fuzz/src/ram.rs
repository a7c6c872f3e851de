//! Guest memory between pages that nobody may touch.

use std::cell::OnceCell;
use std::sync::Arc;

use memory::{Backing, GuestRam, RamRange};

/// Length of the region at 0 in bytes.
pub const LOW: u64 = 1 << 20;
/// Where the other region is, and its length.
pub const HIGH: RamRange = RamRange {
    gpa: 1 << 32,
    len: 256 << 10,
};

thread_local! {
    static RAM: OnceCell<Arc<GuestRam>> = const { OnceCell::new() };
}

/// The guest's memory, all zero. It is the same each time: what an input has left in it is gone.
pub fn fresh() -> Arc<GuestRam> {
    let ram = RAM.with(|ram| ram.get_or_init(guarded).clone());
    for (index, region) in ram.regions().iter().enumerate() {
        ram.discard(index, 0, region.pages())
            .expect("memory that can be given back");
    }
    ram
}

/// Memory with a page before and behind each region whose access ends the process.
fn guarded() -> Arc<GuestRam> {
    let ranges = [RamRange { gpa: 0, len: LOW }, HIGH];
    for _ in 0..64 {
        let ram = GuestRam::new(&ranges, Backing::Anonymous { thp: false }).expect("memory");
        if ram
            .regions()
            .iter()
            .all(|region| guard(region.hva() - PAGE) && guard(region.hva() + region.len()))
        {
            return Arc::new(ram);
        }
        // Something else lies beside it. It keeps its place, so that the next lies elsewhere.
        std::mem::forget(ram);
    }
    panic!("no place for guards around guest memory");
}

const PAGE: u64 = 4096;

/// Maps a page without access; false if something is there that can be accessed.
fn guard(hva: u64) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: it replaces nothing that is mapped.
    let at = unsafe { libc::mmap(hva as *mut _, PAGE as usize, libc::PROT_NONE, flags, -1, 0) };
    at != libc::MAP_FAILED && at as u64 == hva
}
