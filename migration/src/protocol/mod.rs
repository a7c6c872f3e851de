//! What travels between two processes, and what each may conclude from it.
//!
//! ```text
//!   source                          control channel                         destination
//!     │ ── Hello {versions, features} ───────────────────────────────────────────► │   Negotiate
//!     │ ◄─────────────────────────────────────────── Hello {versions, features} ── │
//!     │ ── Manifest ─────────────────────────────────────────────────────────────► │   Reserve
//!     │ ◄────────────────────────────── Accept {session, channels} or Refuse ───── │
//!     │                            data channel(s)                                 │
//!     │ ══ Attach {session, index, count} ═══════════════════════════════════════► │
//!     │ ══ batch, batch, … round end 1 ══════════════════════════════════════════► │   Precopy
//!     │ ◄───────────────────────────────────────────────────── RoundDone {1} ───── │
//!     │ ══ batch, … round end 2 ═════════════════════════════════════════════════► │
//!     │ ◄───────────────────────────────────────────────────── RoundDone {2} ───── │
//!     │   (the guest is paused)                                                    │   Pause
//!     │ ══ batch, … round end n ═════════════════════════════════════════════════► │   Handover
//!     │ ── State {n} ────────────────────────────────────────────────────────────► │
//!     │ ◄───────────────────────────────────────────────────── RoundDone {n} ───── │
//!     │ ◄───────────────────────────────────────────────────────────── Ready ───── │
//!     │ ── Commit ───────────────────────────────────────────────────────────────► │   ← the commit point
//!     │ ◄─────────────────────────────────────────────────────────── Resumed ───── │   Complete
//!
//!   Either side may say Abort instead of anything else: the source before Commit, the destination until it says Resumed.
//! ```
//!
//! # The commit point
//!
//! Exactly one side owns the right to run the guest. The source gives it away with the first byte of `Commit`, and gets
//! it back only by the destination's own word.
//!
//! | what happens | source | destination |
//! |---|---|---|
//! | any failure or cancel at the source before `Commit` | resumes its guest | gets `Abort` or loses the connection: discards |
//! | any failure or cancel at the destination before `Ready` | gets `Abort`, `Refuse` or loses the connection: resumes | discards |
//! | the same between `Ready` and the arrival of `Commit` | as above, if `Commit` has not left; else see below | discards |
//! | sending `Commit` fails and not a byte of it was taken | resumes | loses the connection: discards |
//! | `Commit` arrives, the guest starts, `Resumed` arrives | done; its copy never runs again | runs the guest |
//! | `Commit` arrives, the guest starts, `Resumed` is lost | in doubt: stays paused | runs the guest |
//! | `Commit` arrives, the guest does not start | gets `Abort`: resumes | says `Abort`, discards |
//! | the same, and `Abort` is lost | in doubt: stays paused | discards |
//! | `Commit` or a part of it is lost | in doubt: stays paused | loses the connection: discards |
//! | `Commit` has left and the destination had said `Abort` before | gets `Abort`: resumes | has discarded |
//! | no answer to `Commit` in time, or one that makes no sense | in doubt: stays paused | either |
//!
//! `Abort` and `Refuse` from a destination are therefore a *proof*: the guest has not run there and never will. The
//! destination says so only when no way leads to running the guest any more.
//!
//! # Forms
//!
//! All numbers are little-endian. A [`hello::HelloHeader`] can be read without knowing anything else. Control messages
//! are a [`message::FrameHeader`] and a msgpack map with field names. Data channels carry [`batch::Attach`], then
//! batches: [`batch::BatchHeader`], a table of [`batch::RunDescriptor`], and the contents of the raw runs one
//! after the other. Every length is checked against its cap before anything is allocated, and memory for a message grows
//! only as its bytes arrive.
//!
//! # How to change it
//!
//! - A new field in a message: give it a serde default. Older readers skip it. No new version.
//! - A new message that the other side may ignore: a new kind, sent with [`message::OPTIONAL`]. No new version.
//! - A new ability that must be agreed on (an encoding, a phase): a named feature in the hello, used only if both
//!   sides have it. No new version.
//! - Anything that an older reader would misunderstand (forms, order, meaning): [`VERSIONS`] grows by one, and the old
//!   way stays for as long as its number is in the range. The hello's form and the magics never change.

pub mod batch;
pub mod hello;
pub mod message;

pub use hello::VersionRange;
pub use message::Message;

/// The protocol versions that this build speaks.
pub const VERSIONS: VersionRange = VersionRange { min: 1, max: 1 };

/// Something from the other side that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The first bytes are not those of this protocol.
    #[error("it does not speak this protocol: it began with {found:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 8],
    },
    /// No protocol version is common to both.
    #[error(
        "no common protocol version: this side speaks {ours}, the other {theirs}; use builds that are closer"
    )]
    Versions {
        /// This side's.
        ours: VersionRange,
        /// The other side's.
        theirs: VersionRange,
    },
    /// A length is over its cap.
    #[error("{what} of {found} is more than the {limit} allowed")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Length or number found.
        found: u64,
        /// The cap.
        limit: u64,
    },
    /// A message cannot be decoded.
    #[error("its {message} cannot be understood: {reason}")]
    Malformed {
        /// Name of the message.
        message: &'static str,
        /// What the decoder says.
        reason: String,
    },
    /// A message of an unknown kind, which may not be skipped.
    #[error("message kind {kind} is unknown")]
    UnknownKind {
        /// The kind.
        kind: u16,
    },
    /// A message that does not belong here.
    #[error("it sent {found} while {expected} was expected")]
    Unexpected {
        /// Name of the message.
        found: &'static str,
        /// What should have come.
        expected: &'static str,
    },
    /// A batch of pages contradicts itself or the move.
    #[error("a batch of pages has {field} {found:#x}: {reason}")]
    Batch {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Pages outside of the guest's RAM.
    #[error("a batch of pages writes {pages} pages at {gpa:#x}, which are not in the guest's RAM")]
    OutsideRam {
        /// First guest-physical address.
        gpa: u64,
        /// Number of pages.
        pages: u32,
    },
    /// The memory that was reserved is not the memory of the manifest.
    #[error("the reserved memory does not match the manifest's RAM ranges")]
    MemoryMismatch,
    /// A number that should repeat does not.
    #[error("its {field} is {found}, but {expected} was expected")]
    Mismatch {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it should be.
        expected: u64,
    },
}
