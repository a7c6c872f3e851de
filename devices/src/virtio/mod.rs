//! Virtio devices (Virtual I/O Device specification, version 1.3).
//!
//! ```text
//!   driver ── config, BAR ──► transport (pci) ─┬─ features, config space ─► VirtioDevice
//!                                              └─ DRIVER_OK, resume ──────► start_queue(Virtqueue)
//!                                                                              │
//!   driver ── notify ── ioeventfd ───────────────────────────────────────► Worker (a thread a queue) ─► QueueHandler ─► back end
//!   driver ◄─ MSI-X ◄─ VirtioInterrupt ◄───────────────────────────────────────┘
//!                                              ┌─ pause, reset, queue reset ─► stop_queue ─► Virtqueue, nothing under way
//! ```
//!
//! Promises:
//!
//! - A queue belongs to the transport or to its worker, never to both: stopping it gives it back with every request that was taken from it
//!   finished. So pause, save, reset and queue reset are one thing.
//! - Whatever a driver writes into rings, descriptors and registers: no panic, no access outside guest RAM, no allocation without bound. A
//!   queue that cannot be right stops, its device says NEEDS_RESET, and everything else goes on.
//! - What a device writes to guest memory is marked dirty after it has been written.

pub mod pci;
pub mod queue;
mod ring;
mod segments;
#[cfg(feature = "fuzzing")]
pub(crate) mod stepped;
#[cfg(test)]
pub(crate) mod testing;
pub mod worker;

use std::io;

pub use queue::{QueueError, VirtioInterrupt, Virtqueue};
pub use segments::{Chain, Segments};
#[cfg(feature = "fuzzing")]
pub use stepped::Worker;
pub use worker::QueueHandler;
#[cfg(not(feature = "fuzzing"))]
pub use worker::Worker;

/// VIRTIO_F_VERSION_1 and what else the transport and the queues bring for every device (section 6): indirect descriptors (28), event
/// indices (29), version 1 (32), queue reset (40).
pub const TRANSPORT_FEATURES: u64 = 1 << 28 | 1 << 29 | 1 << 32 | 1 << 40;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;

/// What kind of device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceType {
    /// Name of its saved state; never changes. `virtio-blk`.
    pub name: &'static str,
    /// Device ID (section 5).
    pub id: u16,
    /// PCI class code: class, subclass, programming interface.
    pub pci_class: [u8; 3],
}

/// A virtio device behind its transport. Calls may come from several threads; the transport makes sure that [`VirtioDevice::start_queue`]
/// and [`VirtioDevice::stop_queue`] come from one at a time.
pub trait VirtioDevice: Send + Sync {
    /// What it is.
    fn device_type(&self) -> DeviceType;
    /// Features of this device type that it offers: bits 0 to 23 and 50 to 127, of which only the first 64 exist.
    fn features(&self) -> u64;
    /// What the specification calls a feature of this device type, by the number of its bit, for messages.
    fn feature_name(&self, bit: u32) -> Option<&'static str> {
        let _ = bit;
        None
    }
    /// Features of transport and queues that it can be offered with, of [`TRANSPORT_FEATURES`]: all, unless somebody else serves the queues.
    fn transport_features(&self) -> u64 {
        TRANSPORT_FEATURES
    }
    /// The largest size of each queue, each a power of two.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Fills `data` from its configuration space; beyond its end with zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Takes a write to its configuration space. Most ignore it.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
    /// The driver has accepted these features. Called before queues start, again after a reset and a restore.
    fn set_features(&self, accepted: u64) {
        let _ = accepted;
    }
    /// How the device tells of a changed configuration; called once, before anything else.
    fn connect(&self, interrupt: std::sync::Arc<dyn VirtioInterrupt>) {
        let _ = interrupt;
    }
    /// Serves a queue from now on.
    fn start_queue(&self, queue: Virtqueue) -> io::Result<()>;
    /// Gives a queue back, with nothing of it under way; none if it does not run.
    fn stop_queue(&self, index: u16) -> Option<Virtqueue>;
    /// The driver has reset the device. No queue runs.
    fn reset(&self) {}
    /// What it keeps besides configuration, features and queues, in a self-describing encoding. No queue runs.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    /// Takes over what [`VirtioDevice::save`] gave, or says why it cannot be right. No queue runs.
    fn restore(&self, saved: &[u8]) -> Result<(), String> {
        let _ = saved;
        Ok(())
    }
}

/// Copies a part of a configuration space that is laid out in `space`.
pub(crate) fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(offset) = usize::try_from(offset) else {
        return;
    };
    if let Some(rest) = space.get(offset..) {
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }
}
