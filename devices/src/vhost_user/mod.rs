//! Virtio devices that another process serves: the front end of vhost-user (its specification is in QEMU's documentation), for disks,
//! networks and file systems.
//!
//! ```text
//!   driver ─ notify ─ ioeventfd ────────────────────────────────────► back end, another process
//!          ◄─ MSI-X ◄─ keeper's thread ◄── call eventfd ─────────────┤   reads and writes guest memory itself (memory.shared)
//!                            │ its socket ends                        │
//!                            └─► link: gone ··· looks for it ··· back ┤ features, memory, rings at the used ring's position,
//!   transport ─ start_queue, stop_queue ─► link ─► session ─ socket ──┤ its own notes of what was under way (INFLIGHT_SHMFD)
//!   machine ─ start_logging, collect_dirty ─► log, shared memory ◄────┘ pages that it has written
//! ```
//!
//! | file | what |
//! |---|---|
//! | `connection` | one request after the other, each with a limit of time |
//! | `session` | what is agreed on, and the requests |
//! | `link` | the session as it is now, or none; the rings |
//! | `keeper` | the thread |
//! | `kind` | disks, networks, file systems |
//! | `log` | the bitmap of written pages |
//!
//! Promises:
//!
//! - [`crate::virtio::VirtioDevice::stop_queue`] returns when the back end has stopped *and* finished what it had begun: some answer before.
//!   If it does neither in time, its connection is cut.
//! - A back end that goes, is silent or answers nonsense stops nobody for longer than half a minute. Requests wait, the log says so once, and
//!   it is looked for until it is back, in growing intervals.
//! - No request is carried out twice, or forgotten, by a back end that has come back: it must have noted what it had begun. If it does not do
//!   so (`qemu-storage-daemon` does not) and a disk's requests were under way, the device says NEEDS_RESET.
//! - What a back end says is looked at before it is used; it can neither shrink memory that is shared with it nor make this process allocate
//!   more than a message.
//! - A back end is trusted with all of guest memory: that is what vhost-user is.

mod connection;
mod device;
mod error;
mod keeper;
mod kind;
mod link;
mod log;
mod session;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use device::{VhostConfig, VhostUser};
pub use error::VhostError;
pub use kind::VhostKind;
