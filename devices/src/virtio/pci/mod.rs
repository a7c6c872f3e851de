//! The PCI transport (Virtual I/O Device specification 1.3, section 4.1), without the legacy interface.
//!
//! ```text
//!   BAR 0   0x0000 common configuration ──► common.rs ─┬─ features, status
//!           0x1000 ISR status                          ├─ DRIVER_OK ───► every enabled queue: VirtioDevice::start_queue
//!           0x2000 device configuration ─► device      ├─ queue_reset ─► VirtioDevice::stop_queue
//!           0x3000 notify, 4 bytes a queue             └─ status 0 ────► all queues stopped, VirtioDevice::reset
//!             └─ ioeventfd, or else an exit ─► kick
//!           0x4000 MSI-X table, 0x5000 pending bits
//!
//!   pause ─► queues stopped (nothing under way), positions kept ─► save    restore ─► resume ─► queues started
//! ```
//!
//! Promises: a driver that breaks the rules (features that were not offered, rings outside RAM, a queue that is not there) gets
//! DEVICE_NEEDS_RESET or nothing; never a panic. While it is paused no thread of the device touches guest memory.

mod common;
mod interrupt;
mod queues;
mod transport;

#[cfg(test)]
pub(crate) mod tests;

use std::io;

use vmm_sys_util::eventfd::EventFd;

pub use queues::QueueState;
pub use transport::{VirtioPci, VirtioPciState};

/// Turns guest writes into events, without an exit to the machine.
pub trait IoEvents: Send + Sync {
    /// A write of any size to `gpa` writes to `event`.
    fn register(&self, gpa: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes it.
    fn unregister(&self, gpa: u64, event: &EventFd) -> io::Result<()>;
}
