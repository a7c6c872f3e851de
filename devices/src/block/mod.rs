//! The virtio block device (Virtual I/O Device specification 1.3, section 5.2) on a raw image or a block device of the host.
//!
//! ```text
//!   Virtqueue ── pop ──► Request::parse ──► RateLimiter ──► BlockEngine ── submit, once a batch ──► host file
//!                           │ refused           │ too fast        │
//!                           ▼                   ▼                 ▼ completions
//!                        status byte        unpop, timeout     mark dirty ─► status byte ─► used ring ─► interrupt
//!
//!   Block   features, configuration space, resize, counters; a Worker with a Handler and a BlockEngine for each queue
//!   Disk    the file: opened, locked, measured          engine/   io_uring, or a system call after the other
//! ```
//!
//! Promises:
//!
//! - A request is OK only when all of it is done: short transfers go on, and a host's error is the guest's IOERR and a line in the log.
//! - A flush is an `fdatasync` that starts after every write which the guest was told of. A driver that did not take VIRTIO_BLK_F_FLUSH
//!   cannot flush, and gets no answer to a write before the data is on the disk.
//! - One image has one writer: it is locked while it is open, and no queue starts without the lock.
//! - The guest reaches no byte outside the disk's capacity, and none at all for writing if the disk is read-only.
//! - Under way are at most as many requests as the queue has descriptors; stopping a queue waits for them. A request that waits for the
//!   rate limiter is still in the ring, so it is nobody's state.
//! - Of a disk, the size is saved that its guest knows: a smaller image is refused at a restore. All else the configuration makes, and what
//!   the driver accepted is told again.

mod config_space;
mod counters;
mod device;
mod disk;
mod engine;
mod error;
mod handler;
mod host;
mod polling;
mod request;
mod slab;

#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod host_tests;
#[cfg(test)]
mod life_tests;
#[cfg(test)]
mod request_tests;
#[cfg(test)]
mod testing;

pub(crate) use config_space::feature_name;
pub use device::Block;
pub use disk::{Disk, DiskConfig, SECTOR};
pub use engine::EngineKind;
pub use error::DiskError;
