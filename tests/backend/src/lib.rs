//! The back-end conformance suite: small guest programs with one body for every hypervisor.
//!
//! ```text
//!   BACK_ENDS ──► hypervisor::open(kind) ──► for each of PROGRAMS: fn(&dyn Hypervisor) -> Outcome
//!   (back_ends)        │                          │
//!                      │                          ├─ Guest: RAM, vCPU, Bus, tables, handlers     guest/
//!                      │                          ├─ code from a CodeAssembler                   guest/assemble
//!                      │                          └─ run ── watchdog kicks a guest that hangs    watchdog
//!                      ▼                                     │
//!   the `backend` binary (cli) ─┐                            ▼
//!   the test target (trials) ───┴──────────────── ok │ SKIP: reason │ FAILED: reason             harness
//! ```
//!
//! What it promises:
//!
//! - A program knows no back end: what one of them cannot do stands in one table with its reason
//!   ([`back_ends::EXCEPTIONS`]); what a *host* lacks the program asks of CPUID or of the capabilities, and says so.
//! - A program that fails, panics or hangs costs the others nothing.
//! - The programs keep to instructions that a hypervisor which interprets ring 0 knows; what needs more runs in ring 3.

pub mod back_ends;
pub mod cli;
pub mod guest;
mod harness;
mod host;
mod outcome;
mod programs;
pub mod trials;
mod watchdog;

pub use harness::{Program, Verdict, run};
pub use outcome::{Outcome, Stop};
pub use programs::PROGRAMS;
