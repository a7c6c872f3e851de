//! Where KVM gives up on an instruction, our emulator goes on.
//!
//! ```text
//!   KVM_EXIT_INTERNAL_ERROR, sub-error EMULATION (KVM has queued #UD meanwhile)
//!        │ nothing else is being delivered?
//!        ▼
//!   registers ──► emulator ──► completed: registers back, #UD taken back ──► KVM_RUN
//!                    ├───────► exception: registers back, the exception instead of #UD ──► KVM_RUN
//!                    └───────► not known either: Fault, which names the instruction
//! ```
//!
//! KVM emulates instructions that access devices, and all of ring 0 where there is no hardware virtualisation; its emulator knows
//! neither POPCNT nor CMPXCHG16B nor most of SSE (Linux `arch/x86/kvm/emulate.c`). Each rescue is counted; the log has the first of
//! each power of ten, so that a guest which needs millions of them does not fill it.

use arch::x86_64::state::{PendingException, PendingInterrupt};

use super::state::{events, registers};
use super::vcpu::KvmVcpu;
use super::{call, ioctl};
use crate::emulated::{ExtendedState, GuestPlatform, vendor};
use crate::emulator::{
    CpuState, Exception, ExceptionKind, Options, Outcome, emulate, exception_vector,
};
use crate::{ExitBus, Result};

/// What became of an instruction that KVM could not emulate.
pub(super) enum Rescue {
    /// The guest goes on.
    GoesOn,
    /// HLT.
    Halted,
    /// It cannot be done here either, and why.
    Failed(String),
}

impl KvmVcpu {
    /// Emulates the instruction at RIP, whose first bytes KVM may have handed over.
    pub(super) fn rescue(&mut self, bytes: &[u8], bus: &dyn ExitBus) -> Result<Rescue> {
        let pending = events::read(self)?;
        let only_undefined = pending
            .exception
            .is_none_or(|exception| exception.vector == exception_vector::UD);
        if !only_undefined || pending.interrupt.is_some() || pending.nmi_injected || pending.smm {
            return Ok(Rescue::Failed(
                "an event is being delivered meanwhile".to_owned(),
            ));
        }
        let before = CpuState {
            general: registers::read_general(self)?,
            special: registers::read_special(self)?,
            interrupt_shadow: pending.interrupt_shadow,
        };
        let mut after = before;
        let vm = std::sync::Arc::clone(&self.vm);
        let cpuid = vm.host.supported_cpuid()?;
        let options = Options {
            vendor: vendor(cpuid),
            check_io_permission: true,
            ..Options::default()
        };
        let mut extended = VcpuExtended(self);
        let mut platform = GuestPlatform::new(&vm.memory, bus, &before, cpuid, &mut extended);
        let outcome = match emulate(&mut platform, &mut after, bytes, &options) {
            Ok(outcome) => outcome,
            Err(error) => {
                vm.emulation.count(false);
                return Ok(Rescue::Failed(error.to_string()));
            }
        };
        vm.emulation.count(true);
        let count = vm.emulation.completed();
        if count.ilog10() != (count - 1).max(1).ilog10() || count == 1 {
            tracing::info!(
                count,
                rip = format_args!("{:#x}", before.general.rip),
                "KVM could not emulate an instruction; it was emulated here"
            );
        }
        let mut events = pending;
        events.exception = None;
        events.interrupt_shadow = after.interrupt_shadow;
        if let Outcome::Exception(exception) = &outcome {
            match exception.kind {
                ExceptionKind::SoftwareInterrupt { .. } => {
                    events.interrupt = Some(PendingInterrupt {
                        vector: exception.vector,
                        soft: true,
                    });
                }
                _ => events.exception = Some(self.pending(exception, &mut after)),
            }
        }
        if before.special != after.special {
            registers::write_special(self, &after.special)?;
        }
        registers::write_general(self, &after.general)?;
        events::write(self, &events)?;
        Ok(if outcome == Outcome::Halted {
            Rescue::Halted
        } else {
            Rescue::GoesOn
        })
    }

    /// An exception as KVM takes it. Without KVM_CAP_EXCEPTION_PAYLOAD the payload goes to its register here.
    fn pending(&self, exception: &Exception, state: &mut CpuState) -> PendingException {
        let payload_known = self.vm.host.exception_payload;
        if let (Some(address), exception_vector::PF, false) =
            (exception.payload, exception.vector, payload_known)
        {
            state.special.cr2 = address;
        }
        // A software exception is delivered with RIP behind its instruction, which an injected one is.
        let software = matches!(
            exception.kind,
            ExceptionKind::SoftwareException { .. }
                | ExceptionKind::PrivilegedSoftwareException { .. }
        );
        PendingException {
            vector: exception.vector,
            error_code: exception.error_code,
            payload: exception.payload.filter(|_| payload_known),
            injected: software,
        }
    }
}

/// The extended state of a vCPU.
struct VcpuExtended<'a>(&'a KvmVcpu);

impl ExtendedState for VcpuExtended<'_> {
    fn load(&mut self) -> Result<Vec<u8>> {
        ioctl::get_xsave(&self.0.fd, self.0.vm.host.xsave_size).map_err(call("KVM_GET_XSAVE2"))
    }

    fn store(&mut self, area: &[u8]) -> Result<()> {
        ioctl::set_xsave(&self.0.fd, self.0.vm.host.xsave_size, area).map_err(call("KVM_SET_XSAVE"))
    }

    fn xcr0(&mut self) -> Result<u64> {
        if !self.0.vm.host.xcrs {
            return Ok(0);
        }
        let xcrs = self.0.fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
        let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
        Ok(xcrs.xcrs[..count]
            .iter()
            .find(|xcr| xcr.xcr == 0)
            .map_or(0, |xcr| xcr.value))
    }
}
