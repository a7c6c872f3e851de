//! Intercept messages, built from the state before the instruction (TLFS, "Intercept Message Formats").

use iced_x86::Instruction;
use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events};
use mshv_bindings::*;

use crate::events;
use crate::prestate::{self, Machine};
use crate::registers::to_hv_segment;

/// Who stops, and how it stood before the instruction.
#[derive(Clone, Copy)]
pub(crate) struct Scene<'a> {
    pub(crate) partition: u64,
    pub(crate) vp: u32,
    pub(crate) regs: &'a kvm_regs,
    pub(crate) sregs: &'a kvm_sregs,
    pub(crate) events: &'a kvm_vcpu_events,
}

/// What the instruction did: HV_INTERCEPT_ACCESS_READ and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read = HV_INTERCEPT_ACCESS_READ as isize,
    Write = HV_INTERCEPT_ACCESS_WRITE as isize,
    Execute = HV_INTERCEPT_ACCESS_EXECUTE as isize,
}

impl Scene<'_> {
    fn header(&self, kind: Kind, instruction_length: usize) -> hv_x64_intercept_message_header {
        let mut header = hv_x64_intercept_message_header {
            vp_index: self.vp,
            intercept_access_type: kind as u8,
            execution_state: hv_x64_vp_execution_state {
                as_uint16: self.execution_state(),
            },
            cs_segment: to_hv_segment(&self.sregs.cs),
            rip: self.regs.rip,
            rflags: self.regs.rflags,
            ..Default::default()
        };
        header.set_instruction_length(instruction_length as u8);
        header.set_cr8(self.sregs.cr8 as u8);
        header
    }

    fn execution_state(&self) -> u16 {
        let bit = |set: bool, at: u32| u16::from(set) << at;
        u16::from(self.sregs.ss.dpl & 3)
            | bit(self.sregs.cr0 & 1 != 0, 2)
            | bit(self.sregs.cr0 & 1 << 18 != 0, 3)
            | bit(self.sregs.efer & 1 << 10 != 0, 4)
            | bit(events::pending_interruption(self.events) != 0, 6)
            | bit(self.events.interrupt.shadow != 0, 12)
    }

    /// Puts a payload under a header. Every payload here is plain data of at most 240 bytes.
    fn wrap<T: Copy>(&self, message_type: u32, payload: T) -> hv_message {
        const { assert!(size_of::<T>() <= 240) };
        let mut message = hv_message::default();
        message.header.message_type = message_type;
        message.header.payload_size = size_of::<T>() as u8;
        message.header.__bindgen_anon_1.sender = self.partition;
        // SAFETY: the payload area holds 240 bytes, of which those of a `T` are written, without alignment.
        unsafe { (&raw mut message.u).cast::<T>().write_unaligned(payload) };
        message
    }

    /// HVMSG_X64_IO_PORT_INTERCEPT.
    pub(crate) fn io_port(
        &self,
        kind: Kind,
        port: u16,
        size: usize,
        instruction: Option<&Instruction>,
        code: &[u8],
    ) -> hv_message {
        let string = instruction.is_some_and(prestate::is_string);
        let repeated = string && instruction.is_some_and(prestate::repeats);
        let access = size as u8 & 7 | u8::from(string) << 3 | u8::from(repeated) << 4;
        let (instruction_bytes, instruction_byte_count) = bytes(code);
        self.wrap(
            hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT,
            hv_x64_io_port_intercept_message {
                header: self.header(kind, instruction.map_or(0, Instruction::len)),
                port_number: port,
                access_info: hv_x64_io_port_access_info { as_uint8: access },
                instruction_byte_count,
                reserved: 0,
                rax: self.regs.rax,
                instruction_bytes,
                ds_segment: to_hv_segment(&self.sregs.ds),
                es_segment: to_hv_segment(&self.sregs.es),
                rcx: self.regs.rcx,
                rsi: self.regs.rsi,
                rdi: self.regs.rdi,
            },
        )
    }

    /// HVMSG_UNMAPPED_GPA, or HVMSG_GPA_INTERCEPT for a write to a mapping without that right.
    pub(crate) fn memory(
        &self,
        mapped: bool,
        kind: Kind,
        gpa: u64,
        gva: Option<u64>,
        code: &[u8],
    ) -> hv_message {
        let (instruction_bytes, instruction_byte_count) = bytes(code);
        let access = if gva.is_some() { 3 } else { 0 };
        let message_type = if mapped {
            hv_message_type_HVMSG_GPA_INTERCEPT
        } else {
            hv_message_type_HVMSG_UNMAPPED_GPA
        };
        self.wrap(
            message_type,
            hv_x64_memory_intercept_message {
                // The processor tells no length with a second-level fault.
                header: self.header(kind, 0),
                cache_type: 0,
                instruction_byte_count,
                memory_access_info: hv_x64_memory_access_info { as_uint8: access },
                tpr_priority: self.sregs.cr8 as u8,
                reserved1: 0,
                guest_virtual_address: gva.unwrap_or(0),
                guest_physical_address: gpa,
                instruction_bytes,
            },
        )
    }

    /// HVMSG_X64_MSR_INTERCEPT.
    pub(crate) fn msr(&self, kind: Kind, index: u32, instruction_length: usize) -> hv_message {
        self.wrap(
            hv_message_type_HVMSG_X64_MSR_INTERCEPT,
            hv_x64_msr_intercept_message {
                header: self.header(kind, instruction_length),
                msr_number: index,
                reserved: 0,
                rdx: self.regs.rdx,
                rax: self.regs.rax,
            },
        )
    }

    /// HVMSG_X64_APIC_EOI.
    pub(crate) fn eoi(&self, vector: u8) -> hv_message {
        let payload = hv_x64_apic_eoi_message {
            vp_index: self.vp,
            interrupt_vector: u32::from(vector),
        };
        self.wrap(hv_message_type_HVMSG_X64_APIC_EOI, payload)
    }

    /// HVMSG_UNRECOVERABLE_EXCEPTION: a triple fault.
    pub(crate) fn unrecoverable(&self) -> hv_message {
        let payload = hv_x64_unrecoverable_exception_message {
            header: self.header(Kind::Execute, 0),
        };
        self.wrap(hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION, payload)
    }

    /// HVMSG_X64_INTERRUPTION_DELIVERABLE, for an external interrupt (type 0).
    pub(crate) fn deliverable(&self) -> hv_message {
        let payload = hv_x64_interruption_deliverable_message {
            header: self.header(Kind::Execute, 0),
            deliverable_type: HV_X64_PENDING_INTERRUPT,
            rsvd: 0,
        };
        self.wrap(hv_message_type_HVMSG_X64_INTERRUPTION_DELIVERABLE, payload)
    }
}

/// Instruction bytes as a message carries them: up to 16, and how many.
fn bytes(code: &[u8]) -> ([u8; 16], u8) {
    let mut all = [0; 16];
    let count = code.len().min(16);
    all[..count].copy_from_slice(&code[..count]);
    (all, count as u8)
}

impl Machine<'_> {
    /// The bytes that a message carries of the instruction at `rip`.
    pub(crate) fn message_bytes(&self, rip: u64) -> Vec<u8> {
        let mut code = [0; 16];
        let count = self.code(rip, &mut code);
        code[..count].to_vec()
    }
}
