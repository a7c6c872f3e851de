//! The back end for the Microsoft hypervisor, through Linux's driver (`drivers/hv/mshv_root_main.c`; newer than 6.15's, which passes
//! no hypercalls on for the host itself).
//!
//! ```text
//!   Mshv ─ open("/dev/mshv") ─ Host: processor features, CPUID and MSRs of a throw-away VP, each asked once
//!    │ create_vm
//!    ▼
//!   MshvVm ── slots (guest_memory.rs), dirty log (dirty.rs), routes, irqfd, ioeventfd (interrupts.rs, ../ioevents.rs), time (time.rs)
//!    │ create_vcpu
//!    ▼              MSHV_RUN_VP ──► intercept message ──► intercept.rs ──┐
//!   MshvVcpu ── run() ──▲          port, memory, EOI: ExitBus;           │
//!    │            │     │          string I/O, memory: the emulator      │
//!    │            │     └────────── registers changed, RIP advanced ─────┘
//!    │            └─► kick, reset, fault ──► VcpuExit
//!    ├── save_state / restore_state: one walk over StateElement::ALL (state/)
//!    └── kick_handle ──► KickHandle (kick.rs)
//! ```
//!
//! - The hypervisor stops a VP *before* an instruction that it cannot finish and says which; nothing is ever pending in it, so a
//!   state saved between two runs is complete.
//! - Nearly everything beyond running is a hypercall that the driver passes on; those that `mshv-ioctls` has wrapped are used as
//!   they are, others are made with its `hvcall`.
//! - Guest memory may be pinned by the driver as long as it is mapped (it depends on its version): then a machine takes all of it at once.
//! - The partition's time stands still while no VP is inside [`crate::Vcpu::run`] ([`time`]).
//! - A message that this code does not know becomes [`crate::VcpuExit::Fault`] with the registers; no message panics.

mod cpuid;
mod dirty;
mod host;
mod intercept;
mod interrupts;
mod kick;
mod message;
mod partition;
mod registers;
mod state;
mod time;
mod vcpu;

use std::sync::Arc;

use arch::x86_64::cpuid::Cpuid;
use mshv_ioctls::MshvError;

use crate::{ApicTimer, Capabilities, Error, Hypervisor, HypervisorKind, Result, Vm, VmOptions};
use host::Host;

/// The device node.
pub const DEVICE: &str = "/dev/mshv";

/// MSHV_MAX_VPS (Linux `drivers/hv/mshv_root.h`), without the one that `mshv-ioctls`'s 8-bit index cannot name.
const MAX_VCPUS: u32 = 255;

/// The Microsoft hypervisor.
pub struct Mshv {
    host: Arc<Host>,
}

impl Mshv {
    /// Opens `/dev/mshv`.
    pub fn open() -> Result<Self> {
        let fd = mshv_ioctls::Mshv::new().map_err(|error| {
            let source = io_error(error);
            Error::Open {
                path: DEVICE,
                advice: advice(&source),
                source,
            }
        })?;
        Ok(Self {
            host: Arc::new(Host::new(fd)?),
        })
    }
}

/// What to do about a device node that does not open.
fn advice(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "it exists only in the root partition of a Microsoft hypervisor host, with the mshv_root module loaded; use KVM elsewhere"
        }
        Some(libc::EACCES | libc::EPERM) => "run as root or have its owner changed",
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        _ => "see the kernel's log (dmesg)",
    }
}

impl Hypervisor for Mshv {
    fn kind(&self) -> HypervisorKind {
        HypervisorKind::Mshv
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            max_vcpus: MAX_VCPUS,
            // The driver keeps a list.
            max_memory_slots: u32::MAX,
            // See `dirty`.
            manual_dirty_protect: false,
            dirty_initially_all_set: false,
            tsc_scaling: false,
            nested_state: false,
        }
    }

    fn supported_cpuid(&self) -> Result<Cpuid> {
        self.host.supported_cpuid().cloned()
    }

    fn enlightenments(&self) -> Result<Cpuid> {
        let mut cpuid = self.supported_cpuid()?;
        cpuid
            .entries
            .retain(|entry| (0x4000_0000..0x4000_0100).contains(&entry.leaf));
        Ok(cpuid)
    }

    fn apic_timer(&self) -> Result<Option<ApicTimer>> {
        let hz = self.host.apic_timer_hz()?;
        Ok(hz.map(|hz| ApicTimer {
            hz,
            adjustable: false,
        }))
    }

    fn tsc_khz(&self) -> Result<Option<u32>> {
        self.host.tsc_khz()
    }

    fn msr_indices(&self) -> Result<Vec<u32>> {
        self.host.msr_indices().map(<[u32]>::to_vec)
    }

    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>> {
        // The IOAPIC's pins need not be known: every level-triggered interrupt's end is reported.
        let host = Arc::clone(&self.host);
        if let Some(wanted) = options.apic_timer_hz
            && let Some(hz) = host.apic_timer_hz()?
            && wanted != hz
        {
            return Err(Error::Invalid(format!(
                "local APIC timers run at {hz} Hz here, not at {wanted} Hz"
            )));
        }
        Ok(Arc::new(partition::MshvVm::new(host, options.hyperv)?))
    }
}

/// The system's reason of a failed call; a failed hypercall keeps the hypervisor's status in its text.
fn io_error(error: MshvError) -> std::io::Error {
    match error {
        MshvError::Errno(errno) => std::io::Error::from_raw_os_error(errno.errno()),
        hypercall @ MshvError::Hypercall { .. } => std::io::Error::other(hypercall.to_string()),
    }
}

/// A reason that [`call`] takes.
trait Reason {
    fn into_io(self) -> std::io::Error;
}

impl Reason for MshvError {
    fn into_io(self) -> std::io::Error {
        io_error(self)
    }
}

impl Reason for std::io::Error {
    fn into_io(self) -> std::io::Error {
        self
    }
}

/// Makes an [`Error::Call`] of a failed call's reason.
fn call<E: Reason>(operation: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Call {
        operation,
        source: source.into_io(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_fits_the_reason() {
        let of = |errno| advice(&std::io::Error::from_raw_os_error(errno));
        assert!(of(libc::ENOENT).contains("root partition"));
        assert!(of(libc::EACCES).contains("root"));
        assert!(of(libc::EIO).contains("dmesg"));
    }

    #[test]
    fn a_hypercall_that_failed_keeps_its_status() {
        let error = io_error(MshvError::Hypercall {
            code: 0x51,
            status_raw: 5,
            status: mshv_bindings::HvError::try_from(5u16).ok(),
        });
        assert!(error.to_string().contains("InvalidParameter"), "{error}");
    }
}
