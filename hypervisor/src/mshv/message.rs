//! Intercept messages: why the hypervisor has stopped a VP.
//!
//! ```text
//!   hv_message (256 bytes) = header (16: type, payload size, …) + payload (240), which for most types begins with
//!   InterceptHeader (40): which instruction, in which state, how it accesses
//! ```
//!
//! The structures have the names and the layout of the TLFS ("Intercept messages") and of Linux `include/hyperv/hvhdk.h`. Reading one
//! never fails for its content: every bit pattern is a value, and a payload is always as long as the longest type.

use mshv_bindings::hv_message;
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// HV_X64_SEGMENT_REGISTER.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SegmentRegister([u64; 2]);

impl SegmentRegister {
    /// The neutral segment.
    #[cfg(test)]
    fn segment(&self) -> arch::x86_64::state::Segment {
        super::registers::segment_from(self.0)
    }
}

/// HV_X64_INTERCEPT_MESSAGE_HEADER.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct InterceptHeader {
    /// Which VP.
    pub vp_index: u32,
    /// Bits 3:0 the instruction's length, 7:4 CR8.
    pub length_and_cr8: u8,
    /// HV_INTERCEPT_ACCESS_*.
    pub access_type: u8,
    /// HV_X64_VP_EXECUTION_STATE.
    pub execution_state: u16,
    /// CS.
    pub cs: SegmentRegister,
    /// Address of the instruction.
    pub rip: u64,
    /// RFLAGS before it.
    pub rflags: u64,
}

/// What an instruction does to what it accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
    /// A value that is not defined.
    Unknown(u8),
}

impl InterceptHeader {
    /// Length of the instruction in bytes; 0 when the hypervisor does not know it.
    pub(crate) fn instruction_length(&self) -> u64 {
        u64::from(self.length_and_cr8 & 0xf)
    }

    /// How it accesses.
    pub(crate) fn access(&self) -> Access {
        match self.access_type {
            0 => Access::Read,
            1 => Access::Write,
            2 => Access::Execute,
            other => Access::Unknown(other),
        }
    }

    /// Bit 6 of the execution state: an event was being delivered, so that the access belongs to no instruction.
    pub(crate) fn interruption_pending(&self) -> bool {
        self.execution_state & 1 << 6 != 0
    }

    /// Bit 12 of the execution state: the instruction before was STI or MOV SS.
    pub(crate) fn interrupt_shadow(&self) -> bool {
        self.execution_state & 1 << 12 != 0
    }
}

/// HV_X64_IO_PORT_INTERCEPT_MESSAGE.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IoPortMessage {
    pub header: InterceptHeader,
    /// The port.
    pub port: u16,
    /// Bits 2:0 size in bytes, 3 string instruction, 4 REP prefix.
    pub access_info: u8,
    /// How many of `instruction_bytes` are valid.
    pub instruction_byte_count: u8,
    reserved: u32,
    pub rax: u64,
    pub instruction_bytes: [u8; 16],
    ds: SegmentRegister,
    es: SegmentRegister,
    rcx: u64,
    rsi: u64,
    rdi: u64,
}

impl IoPortMessage {
    /// Size of the access in bytes.
    pub(crate) fn size(&self) -> usize {
        usize::from(self.access_info & 0b111)
    }

    /// INS or OUTS.
    pub(crate) fn is_string(&self) -> bool {
        self.access_info & 1 << 3 != 0
    }
}

/// HV_X64_MEMORY_INTERCEPT_MESSAGE.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct MemoryMessage {
    pub header: InterceptHeader,
    cache_type: u32,
    /// How many of `instruction_bytes` are valid.
    pub instruction_byte_count: u8,
    access_info: u8,
    tpr_priority: u8,
    reserved: u8,
    pub gva: u64,
    pub gpa: u64,
    pub instruction_bytes: [u8; 16],
}

/// HV_X64_MSR_INTERCEPT_MESSAGE.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct MsrMessage {
    pub header: InterceptHeader,
    pub msr: u32,
    reserved: u32,
    pub rdx: u64,
    pub rax: u64,
}

/// HV_X64_CPUID_INTERCEPT_MESSAGE.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct CpuidMessage {
    pub header: InterceptHeader,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub default_rax: u64,
    pub default_rcx: u64,
    pub default_rdx: u64,
    pub default_rbx: u64,
}

/// HV_X64_APIC_EOI_MESSAGE.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ApicEoiMessage {
    vp_index: u32,
    pub vector: u32,
}

/// HV_MESSAGE_TYPE.
pub(crate) fn kind(message: &hv_message) -> u32 {
    message.header.message_type
}

/// The payload as one of the structures above.
pub(crate) fn payload<T: FromBytes + Default>(message: &hv_message) -> T {
    // SAFETY: `u` is a union of byte and word arrays that the whole message's default or the hypervisor has initialised.
    let bytes: [u8; size_of::<hv_message>() - 16] = unsafe {
        std::ptr::addr_of!(message.u)
            .cast::<[u8; size_of::<hv_message>() - 16]>()
            .read_unaligned()
    };
    T::read_from_prefix(&bytes).map_or_else(|_| T::default(), |(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mshv_bindings as hv;
    use std::mem::{offset_of, size_of};

    /// Our structures against those that the bindings have from the kernel's headers.
    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(
            size_of::<InterceptHeader>(),
            size_of::<hv::hv_x64_intercept_message_header>()
        );
        assert_eq!(
            size_of::<IoPortMessage>(),
            size_of::<hv::hv_x64_io_port_intercept_message>()
        );
        assert_eq!(
            size_of::<MemoryMessage>(),
            size_of::<hv::hv_x64_memory_intercept_message>()
        );
        assert_eq!(
            size_of::<MsrMessage>(),
            size_of::<hv::hv_x64_msr_intercept_message>()
        );
        assert_eq!(
            size_of::<CpuidMessage>(),
            size_of::<hv::hv_x64_cpuid_intercept_message>()
        );
        assert_eq!(
            size_of::<ApicEoiMessage>(),
            size_of::<hv::hv_x64_apic_eoi_message>()
        );
        assert_eq!(
            offset_of!(MemoryMessage, gpa),
            offset_of!(hv::hv_x64_memory_intercept_message, guest_physical_address)
        );
        assert_eq!(
            offset_of!(IoPortMessage, rax),
            offset_of!(hv::hv_x64_io_port_intercept_message, rax)
        );
        assert_eq!(offset_of!(hv_message, u), 16);
    }

    #[test]
    fn fields_are_read_from_their_bits() {
        let mut message = hv_message::default();
        let mut raw = hv::hv_x64_io_port_intercept_message {
            port_number: 0x3f8,
            rax: 0x41,
            ..Default::default()
        };
        raw.header.set_instruction_length(2);
        raw.header.intercept_access_type = hv::HV_INTERCEPT_ACCESS_WRITE as u8;
        raw.header.cs_segment.base = 0xf_0000;
        // SAFETY: writing one view of a union of integers; the payload is longer than this message.
        unsafe {
            raw.access_info.__bindgen_anon_1.set_access_size(4);
            raw.access_info.__bindgen_anon_1.set_string_op(1);
            raw.header
                .execution_state
                .__bindgen_anon_1
                .set_interrupt_shadow(1);
            std::ptr::addr_of_mut!(message.u)
                .cast::<hv::hv_x64_io_port_intercept_message>()
                .write_unaligned(raw);
        }
        let io: IoPortMessage = payload(&message);
        assert_eq!((io.port, io.rax, io.size()), (0x3f8, 0x41, 4));
        assert!(io.is_string() && io.header.interrupt_shadow());
        assert_eq!(io.header.instruction_length(), 2);
        assert_eq!(io.header.access(), Access::Write);
        assert_eq!(io.header.cs.segment().base, 0xf_0000);
    }
}
