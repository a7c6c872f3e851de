//! What an intercept message asks for.
//!
//! ```text
//!   I/O port ──── IN, OUT: bus, RAX, RIP + length          INS, OUTS ─┐
//!   unmapped GPA, GPA intercept ─────────────────────────────────────┼─► emulator ─► bus, memory, registers, exception
//!   APIC EOI ──── bus                                                 ┘
//!   CPUID ─────── the hypervisor's own result, RIP + length
//!   MSR ───────── #GP, as the processor does for an MSR that is not there
//!   halt, unrecoverable exception ──► Halt, Reset
//!   all others ──► Fault
//! ```

use arch::x86_64::state::PendingException;
use mshv_bindings::{
    hv_message, hv_message_type_HVMSG_GPA_INTERCEPT as GPA_INTERCEPT,
    hv_message_type_HVMSG_INVALID_VP_REGISTER_VALUE as INVALID_VP_REGISTER_VALUE,
    hv_message_type_HVMSG_UNMAPPED_GPA as UNMAPPED_GPA,
    hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION as UNRECOVERABLE_EXCEPTION,
    hv_message_type_HVMSG_UNSUPPORTED_FEATURE as UNSUPPORTED_FEATURE,
    hv_message_type_HVMSG_X64_APIC_EOI as APIC_EOI,
    hv_message_type_HVMSG_X64_CPUID_INTERCEPT as CPUID_INTERCEPT,
    hv_message_type_HVMSG_X64_HALT as HALT,
    hv_message_type_HVMSG_X64_INTERRUPTION_DELIVERABLE as INTERRUPTION_DELIVERABLE,
    hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT as IO_PORT_INTERCEPT,
    hv_message_type_HVMSG_X64_MSR_INTERCEPT as MSR_INTERCEPT,
    hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE as ACTIVITY,
    hv_register_name_HV_REGISTER_PENDING_INTERRUPTION as PENDING_INTERRUPTION,
    hv_register_name_HV_X64_REGISTER_RAX as RAX, hv_register_name_HV_X64_REGISTER_RBX as RBX,
    hv_register_name_HV_X64_REGISTER_RCX as RCX, hv_register_name_HV_X64_REGISTER_RDX as RDX,
    hv_register_name_HV_X64_REGISTER_RIP as RIP, hv_register_name_HV_X64_REGISTER_XFEM as XFEM,
};

use super::message::{
    self, Access, ApicEoiMessage, CpuidMessage, InterceptHeader, IoPortMessage, MemoryMessage,
    MsrMessage,
};
use super::registers::{self, Register};
use super::state::{events, xsave};
use super::vcpu::MshvVcpu;
use crate::emulated::{ExtendedState, GuestPlatform};
use crate::emulator::{
    CpuState, Exception, ExceptionKind, Options, Outcome, emulate, exception_vector,
};
use crate::{ExitBus, IoEventAddress, Result, VcpuExit};

/// RFLAGS.TF.
const TRAP_FLAG: u64 = 1 << 8;
/// DR6.BS: the exception is a single step.
const DR6_SINGLE_STEP: u64 = 1 << 14;

/// RAX after an IN of `data` bytes: 32-bit results clear the upper half, shorter ones leave the rest.
fn rax_after_in(rax: u64, data: &[u8]) -> u64 {
    let mut bytes = [0; 4];
    for (to, &from) in bytes.iter_mut().zip(data) {
        *to = from;
    }
    let value = u64::from(u32::from_le_bytes(bytes));
    match data.len() {
        1 => rax & !0xff | value,
        2 => rax & !0xffff | value,
        _ => value,
    }
}

/// Valid instruction bytes of a message.
fn valid(bytes: &[u8; 16], count: u8) -> &[u8] {
    bytes.get(..usize::from(count).min(15)).unwrap_or_default()
}

impl MshvVcpu {
    /// Serves a message. `None`: the guest goes on.
    pub(super) fn serve(
        &self,
        message: &hv_message,
        bus: &dyn ExitBus,
    ) -> Result<Option<VcpuExit>> {
        match message::kind(message) {
            IO_PORT_INTERCEPT => {
                let io: IoPortMessage = message::payload(message);
                if io.is_string() || io.header.instruction_length() == 0 {
                    let bytes = valid(&io.instruction_bytes, io.instruction_byte_count);
                    self.emulate(&io.header, bytes, bus)
                } else {
                    self.port(&io, bus).map(|()| None)
                }
            }
            UNMAPPED_GPA | GPA_INTERCEPT => {
                let access: MemoryMessage = message::payload(message);
                let bytes = valid(&access.instruction_bytes, access.instruction_byte_count);
                if access.header.access() == Access::Execute {
                    let reason = format!(
                        "the guest executes at guest-physical {:#x} (linear {:#x}), where there is no memory",
                        access.gpa, access.gva
                    );
                    return Ok(Some(self.fault(reason, bytes)));
                }
                self.emulate(&access.header, bytes, bus)
            }
            APIC_EOI => {
                let eoi: ApicEoiMessage = message::payload(message);
                // Vectors are 8 bits; the field is wider.
                bus.end_of_interrupt(eoi.vector as u8);
                Ok(None)
            }
            CPUID_INTERCEPT => {
                let cpuid: CpuidMessage = message::payload(message);
                let results = [
                    Register::new(RAX, cpuid.default_rax),
                    Register::new(RBX, cpuid.default_rbx),
                    Register::new(RCX, cpuid.default_rcx),
                    Register::new(RDX, cpuid.default_rdx),
                ];
                self.complete(&cpuid.header, &results).map(|()| None)
            }
            MSR_INTERCEPT => {
                let msr: MsrMessage = message::payload(message);
                tracing::debug!(
                    msr = format_args!("{:#x}", msr.msr),
                    access = ?msr.header.access(),
                    value = format_args!("{:#x}", msr.rdx << 32 | msr.rax & 0xffff_ffff),
                    "the guest uses an MSR that is not there"
                );
                let fault = Exception::with_code(exception_vector::GP, 0);
                self.raise(&fault, msr.header.rip).map(|()| None)
            }
            HALT => Ok(Some(VcpuExit::Halt)),
            UNRECOVERABLE_EXCEPTION => Ok(Some(VcpuExit::Reset { triple_fault: true })),
            // Only comes when it was asked for, and then means nothing beyond the run.
            INTERRUPTION_DELIVERABLE => Ok(None),
            INVALID_VP_REGISTER_VALUE => Ok(Some(
                self.fault(
                    "the processor refused to enter the guest: a register has an invalid value"
                        .to_owned(),
                    &[],
                ),
            )),
            UNSUPPORTED_FEATURE => Ok(Some(self.fault(
                "the guest uses a feature that the hypervisor does not support".to_owned(),
                &[],
            ))),
            other => Ok(Some(
                self.fault(format!("unexpected intercept message {other:#x}"), &[]),
            )),
        }
    }

    /// IN or OUT.
    fn port(&self, io: &IoPortMessage, bus: &dyn ExitBus) -> Result<()> {
        let size = io.size().min(4);
        if io.header.access() == Access::Write {
            let rax = io.rax.to_le_bytes();
            let data = &rax[..size];
            let at = IoEventAddress::Pio(io.port);
            if !self.vm.io_events.write(at, data) {
                bus.pio_write(io.port, data);
            }
            return self.complete(&io.header, &[]);
        }
        let mut data = [0xff; 4];
        let data = &mut data[..size];
        bus.pio_read(io.port, data);
        self.complete(
            &io.header,
            &[Register::new(RAX, rax_after_in(io.rax, data))],
        )
    }

    /// Ends an instruction that was served here: results, RIP, interrupt shadow, single step.
    fn complete(&self, header: &InterceptHeader, results: &[Register]) -> Result<()> {
        let mut table = results.to_vec();
        table.push(Register::new(
            RIP,
            header.rip.wrapping_add(header.instruction_length()),
        ));
        if header.interrupt_shadow() {
            let [state] = registers::read_array(&self.fd, &[events::SHADOW_REGISTER])?;
            table.push(events::without_shadow(state));
        }
        if header.rflags & TRAP_FLAG != 0 {
            table.push(events::exception_event(&PendingException {
                vector: exception_vector::DB,
                payload: Some(DR6_SINGLE_STEP),
                ..PendingException::default()
            }));
        }
        registers::write(&self.fd, &table)
    }

    /// Emulates the instruction at RIP.
    fn emulate(
        &self,
        header: &InterceptHeader,
        bytes: &[u8],
        bus: &dyn ExitBus,
    ) -> Result<Option<VcpuExit>> {
        if header.interruption_pending() {
            let reason = "the guest's event cannot be delivered: its descriptor, handler's stack or shadow is no memory";
            return Ok(Some(self.fault(reason.to_owned(), bytes)));
        }
        let before = CpuState {
            general: registers::general(&self.fd)?,
            special: registers::special(&self.fd)?,
            interrupt_shadow: u8::from(header.interrupt_shadow()) << 1,
        };
        let cpuid = self.vm.host.supported_cpuid()?;
        let options = Options {
            vendor: crate::emulated::vendor(cpuid),
            ..Options::default()
        };
        let mut after = before;
        let mut extended = VpState(self);
        let vm = &self.vm;
        let mut platform = GuestPlatform::new(
            &vm.memory,
            &vm.io_events,
            bus,
            &before,
            cpuid,
            &mut extended,
        );
        // A REP that is not finished comes back as the next intercept, with a chance for interrupts and kicks in between.
        let outcome = match emulate(&mut platform, &mut after, bytes, &options) {
            Ok(outcome) => outcome,
            Err(error) => {
                self.vm.emulation.count(false);
                self.write_back(&before, &after)?;
                return Ok(Some(self.fault(error.to_string(), bytes)));
            }
        };
        self.vm.emulation.count(true);
        if let Outcome::Exception(exception) = &outcome {
            let length = software_length(exception);
            after.general.rip = after.general.rip.wrapping_sub(length);
        }
        self.write_back(&before, &after)?;
        match outcome {
            Outcome::Completed | Outcome::Repeating => {}
            Outcome::Halted => registers::write(&self.fd, &[Register::new(ACTIVITY, 1 << 1)])?,
            Outcome::Exception(exception) => self.raise(&exception, after.general.rip)?,
        }
        Ok(None)
    }

    fn write_back(&self, before: &CpuState, after: &CpuState) -> Result<()> {
        registers::set_general_changes(&self.fd, &before.general, &after.general)?;
        registers::set_special_changes(&self.fd, &before.special, &after.special)?;
        if before.interrupt_shadow != after.interrupt_shadow {
            let [state] = registers::read_array(&self.fd, &[events::SHADOW_REGISTER])?;
            let shadow = u64::from(after.interrupt_shadow != 0);
            registers::write(
                &self.fd,
                &[Register::new(
                    events::SHADOW_REGISTER,
                    state[0] & !1 | shadow,
                )],
            )?;
        }
        Ok(())
    }

    /// Has the hypervisor deliver an exception. `rip` is where it belongs to, and is written already.
    fn raise(&self, exception: &Exception, rip: u64) -> Result<()> {
        let register = match exception.kind {
            ExceptionKind::Fault | ExceptionKind::Trap => {
                events::exception_event(&PendingException {
                    vector: exception.vector,
                    error_code: exception.error_code,
                    payload: exception.payload,
                    injected: false,
                })
            }
            ExceptionKind::SoftwareInterrupt { length } => software(4, length, exception.vector),
            ExceptionKind::SoftwareException { length } => software(6, length, exception.vector),
            ExceptionKind::PrivilegedSoftwareException { length } => {
                software(5, length, exception.vector)
            }
        };
        tracing::trace!(?exception, rip, "raised");
        registers::write(&self.fd, &[register])
    }
}

/// Bytes of the instruction that made a software interrupt or exception; 0 for all others.
fn software_length(exception: &Exception) -> u64 {
    match exception.kind {
        ExceptionKind::Fault | ExceptionKind::Trap => 0,
        ExceptionKind::SoftwareInterrupt { length }
        | ExceptionKind::SoftwareException { length }
        | ExceptionKind::PrivilegedSoftwareException { length } => length.into(),
    }
}

/// A software event that is delivered with RIP at its instruction (HV_X64_PENDING_INTERRUPTION_REGISTER, see `state::events`).
fn software(kind: u64, length: u8, vector: u8) -> Register {
    Register::new(
        PENDING_INTERRUPTION,
        1 | kind << 1 | u64::from(length) << 5 | u64::from(vector) << 16,
    )
}

/// The extended state of a VP.
struct VpState<'a>(&'a MshvVcpu);

impl ExtendedState for VpState<'_> {
    fn load(&mut self) -> Result<Vec<u8>> {
        xsave::read_standard(self.0)
    }

    fn store(&mut self, area: &[u8]) -> Result<()> {
        xsave::write_standard(self.0, area)
    }

    fn xcr0(&mut self) -> Result<u64> {
        let [[value, _]] = registers::read_array(&self.0.fd, &[XFEM])?;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_changes_as_much_of_rax_as_the_processor_does() {
        let rax = 0x1122_3344_5566_7788;
        assert_eq!(rax_after_in(rax, &[0xaa]), 0x1122_3344_5566_77aa);
        assert_eq!(rax_after_in(rax, &[0xaa, 0xbb]), 0x1122_3344_5566_bbaa);
        assert_eq!(rax_after_in(rax, &[1, 2, 3, 4]), 0x0403_0201);
    }

    #[test]
    fn a_count_beyond_the_longest_instruction_is_cut() {
        assert_eq!(valid(&[1; 16], 255).len(), 15);
        assert!(valid(&[1; 16], 0).is_empty());
    }
}
