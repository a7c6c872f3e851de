//! Guest RAM: regions and their backings, page bitmaps, zero pages, vectored I/O.
//!
//! ```text
//!   size ──► layout::ram_ranges ──► GuestRam::new(ranges, backing)
//!                                        │  one mapping a range
//!              ┌─────────────────────────┼───────────────────────────┐
//!              ▼                         ▼                           ▼
//!        guest_memory()             regions()                     pages()
//!        vm-memory view for      gpa, length, hva for         bounds-checked raw view:
//!        loaders and devices,    the hypervisor's slots       zero scan, send, receive
//!        writes set dirty bits
//!              │                                                     ▲
//!              └── take_device_dirty() ──► PageBitmap ── runs() ─────┘
//!                  populated()         ──►     ▲
//!                  (hypervisor's log)  ────────┘
//! ```
//!
//! What this room promises:
//!
//! - Guest memory is never seen as a Rust slice or reference: the guest and its devices write it at any
//!   moment. It is reached through raw pointers, volatile reads and the kernel's own copies.
//! - Every view of guest memory is checked against the region once, when it is made, and cannot outlive
//!   the [`GuestRam`].
//! - A page that the guest has never touched is not touched by asking about it ([`GuestRam::populated`]).
//! - Memory that began as a file ([`GuestRam::map_file`]) is like any other: what was not used yet counts as populated, and
//!   what is given back reads as zeros, not as the file.
//! - A region's blocks can be absent ([`GuestRam::set_present`]: memory hotplug): then nothing is looked for in them, so nothing of
//!   them is sent or saved. They stay mapped.
//! - Memory that a hypervisor's driver has pinned ([`GuestRam::find_pinning`]) is never taken out of its place: the guest would keep
//!   the old pages. What is given back is zeroed there then.
//! - Fresh guest memory reads as zeros, is not written to core dumps, and is returned to the host on drop.

mod backing;
mod bitmap;
mod error;
pub mod layout;
mod pages;
mod populated;
mod present;
mod ram;
mod vectored;
mod zero;

pub use backing::Backing;
pub use bitmap::{PageBitmap, Runs};
pub use error::Error;
pub use layout::RamRange;
pub use pages::{GuestPages, PageRun};
pub use ram::{GuestRam, RamRegion};
pub use vectored::{Piece, recv_vectored, send_vectored};

/// Size of a page in bytes: the unit of dirty tracking and of a move.
pub const PAGE_SIZE: u64 = 4096;

/// Size in bytes of the blocks in which memory can be absent: one huge page, so that a block that goes frees its page whole.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// The view of guest memory that loaders and devices use. Writes through it are remembered in a bitmap.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;
