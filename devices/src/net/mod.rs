//! A virtio network device (Virtual I/O Device specification 1.3, section 5.1) on a TAP interface of the host.
//!
//! ```text
//!   driver                           one thread a queue                        host
//!   tx0, tx1, … ── chain ──────────► Tx ── writev of the guest's buffers ────► Tap 0, 1, … (12-byte header, then the frame)
//!   rx0, rx1, … ── empty chains ───► Rx ◄─ readv into the guest's buffers ─── Tap 0, 1, …  polled only while there are buffers
//!               ◄─ filled ──────────┘ │ too little room: the rest waits in the host, for a moment
//!   control ────── command ────────► Control ─┬─► active pairs: attach, detach queues of the Tap
//!               ◄─ OK or ERR ────────────────┘├─► offloads: TUNSETOFFLOAD
//!                                             └─► address, announcement ──► configuration space
//!   vmm ── announce(), send_rarp() after a move
//! ```
//!
//! Promises:
//!
//! - A packet is not copied between guest and kernel, but for what does not fit the buffers that there are at once.
//! - A driver that offers no buffers costs nothing: packets wait in the interface's queue, and the device's thread sleeps.
//! - What a rate limiter holds back waits in the driver's queue or in the interface's, and is not dropped here.
//! - What the host cannot take or give is dropped and counted, and never stops the device. What a driver may not do stops its queue with a
//!   [`crate::virtio::QueueError`], or gets `VIRTIO_NET_ERR` if it is a command.
//! - Between [`crate::virtio::VirtioDevice::stop_queue`] and the next start nothing reads or writes guest memory, and packets wait in the
//!   host.
//! - The driver is shown a packet only once all of it is in its buffers and these are marked dirty.

mod control;
mod counters;
mod device;
mod features;
mod front;
mod ioctl;
mod limits;
mod mac;
mod passed;
mod persist;
pub(crate) mod port;
mod ready;
mod rx;
mod shared;
mod tap;
mod tap_error;
mod tx;

#[cfg(test)]
mod control_tests;
#[cfg(test)]
mod limit_tests;
#[cfg(test)]
mod packet_tests;
#[cfg(test)]
mod tap_tests;
#[cfg(test)]
pub(crate) mod testing;

pub use device::{Net, NetConfig, NetError};
pub use features::Offloads;
pub(crate) use features::{CARRIED, name as feature_name};
pub(crate) use front::NetFront;
pub use mac::{MacAddr, MacError};
pub use port::rarp_frame;
pub use tap::{Tap, TapConfig, TapOffloads};
pub use tap_error::TapError;

/// Most queue pairs of a device.
pub const MAX_QUEUE_PAIRS: u16 = 64;
/// Length of `virtio_net_hdr_v1` (section 5.1.6), in bytes.
const HEADER_LEN: usize = 12;
/// Where its `num_buffers` is.
const NUM_BUFFERS: u64 = 10;
/// Header, Ethernet header with one VLAN tag, and the largest IP packet: no packet with its header has more bytes.
const MAX_PACKET: usize = HEADER_LEN + 18 + 65_535;
/// Most buffers that the system takes in one call (IOV_MAX).
const MAX_IOVECS: usize = 1024;
