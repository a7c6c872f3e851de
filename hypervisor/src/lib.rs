//! The seam between the machine and whatever runs its vCPUs.
//!
//! ```text
//!   vmm ──► dyn Hypervisor ──► dyn Vm ──► dyn Vcpu ── run(&bus) ──► VcpuExit
//!             (host-wide)     (memory,    (one thread)   │ ▲
//!                              interrupts,               ▼ │ port and MMIO accesses are served
//!                              dirty log, clock)       dyn ExitBus      while running
//! ```
//!
//! What the seam promises:
//!
//! - Traits are object-safe; the back end is chosen at run time.
//! - The run loop, and any instruction emulation it needs, live inside the back end.
//! - [`Vcpu::run`] returns [`VcpuExit::Interrupted`] only when no access is half done: a state saved then is
//!   complete.
//! - An optional ability answers "no" by default and costs speed or a clear refusal, never a panic.

mod api;
mod emulated;
pub mod emulator;
mod error;
mod guest_memory;
mod ioevents;
pub mod kvm;
pub mod mshv;
mod msr;
mod signal;
mod state_walk;
mod xsave;

use std::time::{SystemTime, UNIX_EPOCH};

pub use api::*;
pub use error::{Error, Result};

/// Opens the hypervisor of this kind.
///
/// An [`Error::Open`] says what to do about a host that does not have it.
pub fn open(kind: HypervisorKind) -> Result<Box<dyn Hypervisor>> {
    Ok(match kind {
        HypervisorKind::Kvm => Box::new(kvm::Kvm::open()?),
        HypervisorKind::Mshv => Box::new(mshv::Mshv::open()?),
    })
}

/// Opens this host's hypervisor: the Microsoft hypervisor where its device node exists (such a host has no KVM of its own), KVM
/// everywhere else.
pub fn open_default() -> Result<Box<dyn Hypervisor>> {
    open(if std::path::Path::new(mshv::DEVICE).exists() {
        HypervisorKind::Mshv
    } else {
        HypervisorKind::Kvm
    })
}

/// CLOCK_REALTIME in nanoseconds since 1970, which [`arch::x86_64::state::MachineClock`] is paired with.
pub fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}
