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
//! each power of two, so that a guest which needs millions of them does not fill it.

use std::sync::Arc;

use arch::x86_64::state::{GeneralRegisters, PendingException, PendingInterrupt};
use kvm_bindings::{KVM_MP_STATE_HALTED, kvm_mp_state};

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
    /// It cannot be done here either, and why.
    Failed(String),
}

/// CR4.PKE and CR4.PKS: accesses are checked against keys that the page walk does not know.
const CR4_PROTECTION_KEYS: u64 = 1 << 22 | 1 << 24;

/// How often an instruction may come back with nothing changed before it is given up.
const MOST_IN_VAIN: u32 = 16;

/// What the vCPU remembers of its rescues.
#[derive(Default)]
pub(super) struct Rescued {
    /// The registers before the last one, and how often they have been the same.
    last: GeneralRegisters,
    in_vain: u32,
    /// A software exception or interrupt that is injected and not yet delivered: the registers before its instruction, and RIP behind it.
    software: Option<(GeneralRegisters, u64)>,
}

impl KvmVcpu {
    /// Emulates the instruction at RIP, whose first bytes KVM may have handed over.
    pub(super) fn rescue(&mut self, bytes: &[u8], bus: &dyn ExitBus) -> Result<Rescue> {
        let pending = events::read(self)?;
        let only_undefined = pending
            .exception
            .is_none_or(|exception| exception.vector == exception_vector::UD);
        if !only_undefined || pending.interrupt.is_some() || pending.nmi_injected || pending.smm {
            return Ok(failed("an event is being delivered meanwhile"));
        }
        let before = CpuState {
            general: registers::read_general(self)?,
            special: registers::read_special(self)?,
            interrupt_shadow: pending.interrupt_shadow,
        };
        if before.special.cr4 & CR4_PROTECTION_KEYS != 0 {
            return Ok(failed("the guest uses protection keys"));
        }
        if !self.rescued.may_try(&before.general) {
            return Ok(failed("it comes back again and again"));
        }
        let mut after = before;
        let vm = Arc::clone(&self.vm);
        let cpuid = vm.host.supported_cpuid()?;
        let options = Options {
            vendor: vendor(cpuid),
            check_io_permission: true,
            ..Options::default()
        };
        let mut extended = VcpuExtended(self);
        let mut platform = GuestPlatform::new(
            &vm.memory,
            &vm.io_events,
            bus,
            &before,
            cpuid,
            &mut extended,
        );
        let outcome = match emulate(&mut platform, &mut after, bytes, &options) {
            Ok(outcome) => outcome,
            Err(error) => {
                vm.emulation.count(false);
                return Ok(failed(error.to_string()));
            }
        };
        let mut events = pending;
        events.exception = None;
        events.interrupt_shadow = after.interrupt_shadow;
        if let Outcome::Exception(exception) = &outcome {
            if is_software(exception) && has_hardware_virtualisation() {
                // Such a KVM wants RIP at the instruction, and its length, which cannot be said.
                return Ok(failed("it is a software interrupt or exception"));
            }
            match exception.kind {
                ExceptionKind::SoftwareInterrupt { .. } => {
                    events.interrupt = Some(PendingInterrupt {
                        vector: exception.vector,
                        soft: true,
                    });
                }
                _ => events.exception = Some(self.pending(exception, &mut after)),
            }
            self.rescued.software =
                is_software(exception).then_some((before.general, after.general.rip));
        }
        let count = vm.emulation.count(true);
        if count.is_power_of_two() {
            tracing::info!(
                count,
                rip = format_args!("{:#x}", before.general.rip),
                "KVM could not emulate an instruction; it was emulated here"
            );
        }
        if before.special != after.special {
            registers::write_special(self, &after.special)?;
        }
        registers::write_general(self, &after.general)?;
        events::write_delivered(self, &events)?;
        if outcome == Outcome::Halted {
            self.fd
                .set_mp_state(kvm_mp_state {
                    mp_state: KVM_MP_STATE_HALTED,
                })
                .map_err(call("KVM_SET_MP_STATE"))?;
        }
        Ok(Rescue::GoesOn)
    }

    /// The vCPU has left the guest without an exit. A software exception that KVM has not delivered is taken back, to be met again: a saved
    /// state could not express it.
    pub(super) fn take_back_software(&mut self) -> Result<()> {
        let Some((before, behind)) = self.rescued.software.take() else {
            return Ok(());
        };
        if registers::read_general(self)?.rip != behind {
            return Ok(());
        }
        let mut events = events::read(self)?;
        events.exception = None;
        events.interrupt = None;
        registers::write_general(self, &before)?;
        events::write_delivered(self, &events)
    }

    /// The vCPU has left the guest with an exit: whatever was injected has been delivered.
    pub(super) fn software_delivered(&mut self) {
        self.rescued.software = None;
    }

    /// An exception as KVM takes it. Without KVM_CAP_EXCEPTION_PAYLOAD the address of a page fault goes to CR2 here.
    fn pending(&self, exception: &Exception, state: &mut CpuState) -> PendingException {
        let payload_known = self.vm.host.exception_payload;
        if let (Some(address), exception_vector::PF, false) =
            (exception.payload, exception.vector, payload_known)
        {
            state.special.cr2 = address;
        }
        PendingException {
            vector: exception.vector,
            error_code: exception.error_code,
            payload: exception.payload.filter(|_| payload_known),
            injected: is_software(exception),
        }
    }
}

impl Rescued {
    /// Whether to try once more.
    fn may_try(&mut self, registers: &GeneralRegisters) -> bool {
        if self.last == *registers {
            self.in_vain += 1;
        } else {
            self.last = *registers;
            self.in_vain = 0;
        }
        self.in_vain < MOST_IN_VAIN
    }
}

fn failed(why: impl Into<String>) -> Rescue {
    Rescue::Failed(why.into())
}

/// Whether it was an instruction that asked for it: RIP is behind it then.
fn is_software(exception: &Exception) -> bool {
    !matches!(exception.kind, ExceptionKind::Fault | ExceptionKind::Trap)
}

/// CPUID.1:ECX.VMX or CPUID.80000001H:ECX.SVM of this host.
fn has_hardware_virtualisation() -> bool {
    let vmx = std::arch::x86_64::__cpuid(1).ecx & 1 << 5 != 0;
    let svm = std::arch::x86_64::__cpuid(0x8000_0001).ecx & 1 << 2 != 0;
    vmx || svm
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
