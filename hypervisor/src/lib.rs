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
mod error;
pub mod kvm;

pub use api::*;
pub use error::{Error, Result};

/// Opens this host's hypervisor.
///
/// An [`Error::Open`] says what to do about a host that has none.
pub fn open_default() -> Result<Box<dyn Hypervisor>> {
    open(HypervisorKind::Kvm)
}

/// Opens one back end.
///
/// An [`Error::Open`] says what to do about a host that lacks it.
pub fn open(kind: HypervisorKind) -> Result<Box<dyn Hypervisor>> {
    match kind {
        HypervisorKind::Kvm => Ok(Box::new(kvm::Kvm::open()?)),
    }
}
