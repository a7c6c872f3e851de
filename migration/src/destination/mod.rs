//! The side that a guest comes to.
//!
//! ```text
//!   driver ──── Action ◄──── engine       what comes next, and whether the guest may run (no I/O)
//!     │  └────── Event ─────►  │
//!     └── inflow                          one thread a data channel
//!           └── pages                     batches of runs, checked, straight into guest memory
//! ```
//!
//! [`receive`] leaves a machine that runs (or is paused, if it was) on success, and nothing at all on failure.

mod driver;
pub mod engine;
mod inflow;
mod pages;

pub use driver::receive;
