//! The side that a guest leaves.
//!
//! ```text
//!   driver ──── Action ◄──── engine       what comes next, and who owns the guest (no I/O)
//!     │  └────── Event ─────►  │
//!     │                        └── convergence   another round, pause, or give up (no I/O)
//!     ├── link                           the connections, and what it means when they fail
//!     └── round                          one round: re-arm, find zeros, send runs
//! ```
//!
//! [`send`] leaves the machine paused for good on success, and as it was on failure; the one exception,
//! [`SourceOutcome::InDoubt`](crate::SourceOutcome::InDoubt), is explained in [`crate::protocol`].

pub mod convergence;
mod driver;
pub mod engine;
mod link;
mod round;

pub use driver::send;
