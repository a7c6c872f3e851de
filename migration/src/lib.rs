//! Moving a machine from one process to another while its guest runs.
//!
//! ```text
//!   source process                                            destination process
//!   ──────────────                                            ───────────────────
//!   dyn SourceMachine                                         dyn DestinationMachine
//!        ▲                                                           ▲
//!   send() ── source::driver ◄──► source::engine       receive() ── destination::driver ◄──► destination::engine
//!               │  ▲              (what comes next)                    │  ▲                 (what comes next)
//!               ▼  │                                                   ▼  │
//!            control channel ◄────────── messages ─────────────► control channel
//!            data channel(s) ───────── runs of pages ──────────► data channel(s) ──► guest memory
//!
//!   Connect → Negotiate → Reserve → Precopy(n) → Pause → Handover → Complete
//!       └──────────── failure or cancel: the source's guest runs on ────┘ up to the commit point
//! ```
//!
//! A machine can also go to files and come back from them: [`snapshot`].
//!
//! What this room promises:
//!
//! - At every moment at most one side may run the guest, and after every failure one side still has it. Who that is
//!   follows from the *commit point*: see [`protocol`] for the table of all cases.
//! - A failed or cancelled move leaves the source's guest as it was, running or paused, and the destination's memory
//!   freed. Only if the commit has left and no answer came is the source [`SourceOutcome::InDoubt`]: paused, until
//!   somebody who can see both sides settles it.
//! - No page that the guest or a device has written is lost: a page is re-armed for dirty tracking *before* it is
//!   read, and what is dirty when the guest stands still is sent before the commit.
//! - Nothing that a peer sends causes a panic, an allocation beyond the caps of [`protocol`], or a write outside of
//!   the guest's RAM.
//! - The decisions are made by two state machines without I/O ([`source::engine`], [`destination::engine`]); the
//!   drivers only carry out what those say.

mod channel;
mod clocks;
mod connect;
mod control;
pub mod destination;
mod error;
mod listener;
mod lobby;
mod machine;
mod options;
mod phase;
pub mod protocol;
pub mod snapshot;
pub mod source;
mod url;

pub use control::{MoveControl, Progress, RoundProgress};
pub use destination::receive;
pub use error::{Cause, ReceiveError, SendError, SourceOutcome};
pub use listener::{BindError, Listener};
pub use machine::{
    AcceptedFeatures, CpuContract, DestinationMachine, DeviceState, MachineError, MachineState,
    Manifest, Refusal, RefusalKind, RunState, SourceMachine,
};
pub use options::{ReceiveOptions, ReceiveReport, SendOptions, SendReport, TimeoutStrategy};
pub use phase::Phase;
pub use source::send;
pub use url::{MoveUrl, UrlError};
