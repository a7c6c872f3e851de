//! The files of a snapshot: a paused machine as a directory, and back.
//!
//! ```text
//!   DIR/manifest   header ─ magic, format version, length, checksums      (32 bytes, read before anything else)
//!                  body   ─ Manifest, MachineState, and of `memory`: its length, its id, a checksum for each chunk
//!   DIR/memory     RAM regions one after the other, lowest address first; zero pages are holes
//!                  last page ─ magic and id: it belongs to this manifest
//!
//!   save:     .NAME.….partial/memory ─► …/manifest ─► fsync ─► rename to DIR ─► fsync       cancel, failure: removed
//!                                                              └─ too late to cancel
//!   restore:  header ─► body ─► memory's length and id ─► reserve ─► memory ─┬─ Lazy:     mapped, copy on write
//!                                                                            └─ Verified: read, every chunk checked
//!                     ─► state ─► paused machine
//! ```
//!
//! What this module promises:
//!
//! - What is under a snapshot's name is whole: it appears by one rename once everything is on the disk. What a crash leaves
//!   behind has another name, which begins with a dot and ends with `.partial`.
//! - A snapshot is never changed by restoring it, and can be restored any number of times, also at once.
//! - Nothing in the files causes a panic, an unbounded allocation, or a machine built from bytes that are not those that were
//!   written: a file that is damaged, foreign or of another version is refused with the reason.
//! - One thing is *not* promised: a lazy restore does not read the memory, which is its point, so it finds a `memory` that was cut
//!   or belongs to another snapshot, but not a flipped bit in it. [`Loading::Verified`] does, and [`Snapshot::verify`].
//! - While a lazily restored guest lives, its `memory` must not be changed or cut. The directory may be removed or renamed.
//!
//! The rule for changes: what is added to the body as a field with a default does not change the version; whatever an older
//! build would misread does. A reader refuses versions that it does not know.

mod contents;
mod error;
mod format;
mod restore;
mod save;

pub use error::{RestoreError, SnapshotError};
pub use restore::{Loading, RestoreReport, Snapshot, restore};
pub use save::{SaveReport, save};

/// Name of the file with everything but memory.
pub const MANIFEST: &str = "manifest";
/// Name of the file with the memory.
pub const MEMORY: &str = "memory";

#[cfg(test)]
mod tests;
