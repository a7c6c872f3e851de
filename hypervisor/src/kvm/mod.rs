//! The KVM back end.
//!
//! ```text
//!   Kvm ─ open("/dev/kvm") ─ Host: capabilities, CPUID, MSR list, each asked once
//!    │ create_vm
//!    ▼
//!   KvmVm ── slots, dirty log, routes, irqfd, ioeventfd, clock
//!    │ create_vcpu
//!    ▼                      KVM_RUN ──► exit ──► ExitBus (port, MMIO, EOI) ──┐
//!   KvmVcpu ── run() ──────────▲────────────────────────────────────────────┘
//!    │            └─► EINTR, reset, shutdown, fault ──► VcpuExit
//!    ├── save_state / restore_state: one walk over StateElement::ALL (state/)
//!    └── kick_handle ──► KickHandle: immediate_exit + a signal (kick.rs)
//! ```
//!
//! - The local APICs are KVM's, the IOAPIC is not (split irqchip); there is no PIC and no PIT.
//! - `/dev/kvm` is opened once. What a machine does not need at its start (supported CPUID, MSR list, nested trial,
//!   routes) is not asked before someone wants it.
//! - AMX is offered where the kernel permits it: the permission is requested when KVM is opened, before any vCPU can exist,
//!   because the size of the XSAVE area follows from it.
//! - An instruction that KVM cannot emulate is tried by our own emulator (rescue.rs).
//! - An exit that this code does not know becomes [`crate::VcpuExit::Fault`] with the registers; no exit panics.

mod cpuid;
mod dirty;
mod fault;
mod host;
mod ioctl;
mod kick;
mod rescue;
mod routes;
mod state;
mod vcpu;
mod vm;

use std::sync::Arc;

use arch::x86_64::cpuid::Cpuid;
use arch::x86_64::state::Msr;

use crate::{ApicTimer, Capabilities, Error, Hypervisor, HypervisorKind, Result, Vm, VmOptions};
use host::Host;

/// The device node.
const DEVICE: &str = "/dev/kvm";
/// KVM's only API version since 2007.
const API_VERSION: i32 = 12;

/// Linux KVM.
pub struct Kvm {
    host: Arc<Host>,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Self> {
        let fd = kvm_ioctls::Kvm::new().map_err(|error| {
            let source = std::io::Error::from(error);
            Error::Open {
                path: DEVICE,
                advice: advice(&source),
                source,
            }
        })?;
        if fd.get_api_version() != API_VERSION {
            return Err(Error::Missing {
                what: "version 12 of the KVM API",
            });
        }
        Ok(Self {
            host: Arc::new(Host::new(fd)?),
        })
    }
}

/// What to do about a device node that does not open.
fn advice(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "load the kvm module of this processor (modprobe kvm_intel or kvm_amd) and switch virtualisation on \
             in the firmware, or, inside a virtual machine or container, have its host pass /dev/kvm through"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "join the group that owns it (usermod -aG kvm USER, then log in again), or run as root"
        }
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        _ => "see the kernel's log (dmesg)",
    }
}

impl Hypervisor for Kvm {
    fn kind(&self) -> HypervisorKind {
        HypervisorKind::Kvm
    }

    fn capabilities(&self) -> Capabilities {
        use kvm_bindings::{KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE};
        let host = &self.host;
        Capabilities {
            max_vcpus: host.fd.get_max_vcpus().try_into().unwrap_or(u32::MAX),
            max_memory_slots: host.fd.get_nr_memslots().try_into().unwrap_or(u32::MAX),
            manual_dirty_protect: host.dirty_protect
                & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
                != 0,
            dirty_initially_all_set: host.dirty_protect & u64::from(KVM_DIRTY_LOG_INITIALLY_SET)
                != 0,
            tsc_scaling: host.tsc_scaling,
            nested_state: host.nested_works(),
        }
    }

    fn supported_cpuid(&self) -> Result<Cpuid> {
        self.host.supported_cpuid().cloned()
    }

    fn enlightenments(&self) -> Result<Cpuid> {
        self.host.enlightenments()
    }

    fn apic_timer(&self) -> Result<Option<ApicTimer>> {
        Ok(Some(ApicTimer {
            hz: vm::APIC_TIMER_HZ,
            adjustable: self.host.apic_bus_cycles,
        }))
    }

    fn feature_msrs(&self) -> Result<Vec<Msr>> {
        self.host.feature_msrs()
    }

    fn tsc_khz(&self) -> Result<Option<u32>> {
        self.host.tsc_khz()
    }

    fn msr_indices(&self) -> Result<Vec<u32>> {
        self.host.msr_indices().map(<[u32]>::to_vec)
    }

    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>> {
        Ok(Arc::new(vm::KvmVm::new(Arc::clone(&self.host), options)?))
    }
}

/// Makes an [`Error::Call`] of a failed call's errno.
fn call<E: Into<std::io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Call {
        operation,
        source: source.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_fits_the_reason() {
        let of = |errno| advice(&std::io::Error::from_raw_os_error(errno));
        assert!(of(libc::ENOENT).contains("modprobe"));
        assert!(of(libc::EACCES).contains("group"));
        assert!(of(libc::EIO).contains("dmesg"));
    }
}
