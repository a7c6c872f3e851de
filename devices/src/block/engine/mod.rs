//! How a disk's operations reach the host.
//!
//! ```text
//!   handler ── submit(token, Operation) ──► Running ── call() ──► system call or ring entry
//!                                              ▲ │
//!                 short, EINTR, EAGAIN, a part  └─┴── finished(result)
//!                                                       └─► Completion(token) ── completions() ──► handler
//!
//!   uring   a ring for a queue; kick() submits all at once, its descriptor is readable when something has finished
//!   sync    the same calls one after the other on the queue's thread
//! ```
//!
//! Promises:
//!
//! - An operation is reported once, and as done only when all of it is done.
//! - What the kernel reads and writes lives until the operation has finished: its vectors and bounce buffer in the [`Running`], guest
//!   memory by the engine's own reference. Dropping an engine waits for what is under way.

mod operation;
mod sync;
mod uring;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use memory::GuestMemoryMmap;

pub(super) use operation::Operation;
use operation::Running;

use super::disk::Disk;

/// How the host is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// Asynchronously, by io_uring.
    IoUring,
    /// By a system call that waits.
    Sync,
}

impl EngineKind {
    /// `io_uring` or `sync`.
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::IoUring => "io_uring",
            EngineKind::Sync => "sync",
        }
    }
}

/// An operation that has finished.
#[derive(Debug)]
pub(super) struct Completion {
    /// What it was submitted with.
    pub(super) token: usize,
    pub(super) result: io::Result<()>,
}

/// Where operations work.
pub(super) struct Place {
    pub(super) disk: Arc<Disk>,
    pub(super) memory: GuestMemoryMmap,
}

/// What does a queue's operations. It is not promised that they finish, or take effect, in the order of their submission.
pub(super) trait BlockEngine: Send {
    /// Takes an operation; `durable` says that it has finished only when its effect is on the disk. An error means that the engine cannot
    /// go on; the operation is reported all the same.
    fn submit(&mut self, token: usize, operation: Operation, durable: bool) -> io::Result<()>;
    /// Starts what was submitted.
    fn kick(&mut self) -> io::Result<()>;
    /// Whether something has finished that [`BlockEngine::completions`] would add; a cheap look.
    fn has_finished(&mut self) -> bool;
    /// Adds what has finished, without waiting.
    fn completions(&mut self, into: &mut Vec<Completion>) -> io::Result<()>;
    /// Waits until something has finished, if anything is under way.
    fn wait(&mut self) -> io::Result<()>;
    /// Readable when something has finished; none if all has finished when `submit` returns.
    fn source(&self) -> Option<BorrowedFd<'_>>;
}

/// Makes an engine that has `entries` operations under way at most.
pub(super) fn open(
    kind: EngineKind,
    place: Place,
    entries: u16,
) -> io::Result<Box<dyn BlockEngine>> {
    Ok(match kind {
        EngineKind::IoUring => Box::new(uring::Uring::new(place, entries)?),
        EngineKind::Sync => Box::new(sync::Sync::new(place)),
    })
}

/// Whether the host has io_uring with all that is needed, and lets this process use it.
pub(super) fn probe_uring() -> io::Result<()> {
    uring::probe()
}
