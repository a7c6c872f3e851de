//! Tools of the native suite: `vmm` processes, a client for their API, self-checking guests, and a relay that
//! fails a move where a test wants it to.
//!
//! ```text
//!   test ──► Vmm (a real `vmm serve` process) ◄──API socket── Api
//!              │ serial socket ──► Console ──► guests::Report (the guest's own verdict)
//!              └──move──► Relay (cuts, holds or forwards, by frame) ──► Vmm
//! ```

pub mod api;
pub mod back_end;
pub mod console;
pub mod disk_server;
pub mod process;
pub mod relay;
