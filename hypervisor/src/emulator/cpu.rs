//! The working copy of a vCPU while one instruction is executed.

use arch::x86_64::state::{GeneralRegisters, Segment, SpecialRegisters};

use super::error::{Exception, Step};
use super::platform::{Platform, VectorRegisters};
use super::{CpuState, Options, Vendor};

/// Bits of RFLAGS (SDM vol. 1, section 3.4.3).
pub(super) mod rflags {
    pub(in crate::emulator) const CF: u64 = 1 << 0;
    pub(in crate::emulator) const PF: u64 = 1 << 2;
    pub(in crate::emulator) const AF: u64 = 1 << 4;
    pub(in crate::emulator) const ZF: u64 = 1 << 6;
    pub(in crate::emulator) const SF: u64 = 1 << 7;
    pub(in crate::emulator) const TF: u64 = 1 << 8;
    pub(in crate::emulator) const IF: u64 = 1 << 9;
    pub(in crate::emulator) const DF: u64 = 1 << 10;
    pub(in crate::emulator) const OF: u64 = 1 << 11;
    pub(in crate::emulator) const IOPL: u64 = 3 << 12;
    pub(in crate::emulator) const NT: u64 = 1 << 14;
    pub(in crate::emulator) const RF: u64 = 1 << 16;
    pub(in crate::emulator) const VM: u64 = 1 << 17;
    pub(in crate::emulator) const AC: u64 = 1 << 18;
    pub(in crate::emulator) const ID: u64 = 1 << 21;
    /// The flags that arithmetic changes.
    pub(in crate::emulator) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Bits of CR0, CR4 and EFER (SDM vol. 3, section 2.5).
pub(super) mod control {
    pub(in crate::emulator) const CR0_PE: u64 = 1 << 0;
    pub(in crate::emulator) const CR0_MP: u64 = 1 << 1;
    pub(in crate::emulator) const CR0_EM: u64 = 1 << 2;
    pub(in crate::emulator) const CR0_TS: u64 = 1 << 3;
    pub(in crate::emulator) const CR0_NE: u64 = 1 << 5;
    pub(in crate::emulator) const CR0_AM: u64 = 1 << 18;
    pub(in crate::emulator) const CR4_VME: u64 = 1 << 0;
    pub(in crate::emulator) const CR4_PVI: u64 = 1 << 1;
    pub(in crate::emulator) const CR4_OSFXSR: u64 = 1 << 9;
    pub(in crate::emulator) const CR4_UMIP: u64 = 1 << 11;
    pub(in crate::emulator) const CR4_LA57: u64 = 1 << 12;
    pub(in crate::emulator) const CR4_FSGSBASE: u64 = 1 << 16;
    pub(in crate::emulator) const CR4_CET: u64 = 1 << 23;
    pub(in crate::emulator) const CR4_OSXSAVE: u64 = 1 << 18;
    pub(in crate::emulator) const EFER_LMA: u64 = 1 << 10;
}

/// Interrupt shadow after a load of SS.
pub(super) const SHADOW_MOV_SS: u8 = 1 << 0;
/// Interrupt shadow after STI.
pub(super) const SHADOW_STI: u8 = 1 << 1;
/// DR6.BS: the trap is a single step (SDM vol. 3, section 18.2.3).
pub(super) const DR6_BS: u64 = 1 << 14;

/// Indices into [`Cpu::regs`], in the order of their encoding.
pub(super) mod reg {
    pub(in crate::emulator) const AX: usize = 0;
    pub(in crate::emulator) const CX: usize = 1;
    pub(in crate::emulator) const DX: usize = 2;
    pub(in crate::emulator) const BX: usize = 3;
    pub(in crate::emulator) const SP: usize = 4;
    pub(in crate::emulator) const BP: usize = 5;
    pub(in crate::emulator) const SI: usize = 6;
    pub(in crate::emulator) const DI: usize = 7;
}

/// A segment register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SegmentName {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

/// How a successful instruction ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Finish {
    Next,
    Repeat,
    Halt,
    Raise(Exception),
}

/// The bits of RIP and of the default operand and address sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Bits16,
    Bits32,
    Bits64,
}

/// Registers as the instruction leaves them; committed by [`Commit::complete`].
pub(super) struct Cpu<'a> {
    pub(super) platform: &'a mut dyn Platform,
    pub(super) special: &'a SpecialRegisters,
    pub(super) options: &'a Options,
    pub(super) mode: Mode,
    pub(super) cpl: u8,
    /// RIP of the instruction.
    pub(super) rip: u64,
    /// RFLAGS before the instruction.
    pub(super) flags_before: u64,
    /// RIP after it: the next instruction, unless a branch says otherwise.
    pub(super) next_rip: u64,
    /// In the order of [`reg`].
    pub(super) regs: [u64; 16],
    pub(super) flags: u64,
    pub(super) segment_load: Option<(SegmentName, Segment)>,
    pub(super) interrupt_shadow: u8,
    pub(super) finish: Finish,
    /// `regs` holds completed iterations, valid even if a later one fails.
    pub(super) progress: bool,
    vectors: Option<VectorRegisters>,
    vectors_changed: bool,
    /// Page translations made for this instruction: for reads and for writes, as (page, gpa of it).
    pub(super) pages: [Option<(u64, u64)>; 2],
}

impl<'a> Cpu<'a> {
    pub(super) fn new(
        platform: &'a mut dyn Platform,
        state: &'a CpuState,
        options: &'a Options,
    ) -> Self {
        let general = &state.general;
        let special = &state.special;
        let protected = special.cr0 & control::CR0_PE != 0;
        let long = special.efer & control::EFER_LMA != 0;
        let virtual_8086 = protected && !long && general.rflags & rflags::VM != 0;
        let mode = if virtual_8086 {
            Mode::Bits16
        } else if long && special.cs.access & access::LONG != 0 {
            Mode::Bits64
        } else if special.cs.access & access::BIG != 0 {
            Mode::Bits32
        } else {
            Mode::Bits16
        };
        let cpl = if virtual_8086 {
            3
        } else if protected {
            access::dpl(&special.ss)
        } else {
            0
        };
        Self {
            platform,
            special,
            options,
            mode,
            cpl,
            rip: general.rip,
            flags_before: general.rflags,
            next_rip: general.rip,
            regs: [
                general.rax,
                general.rcx,
                general.rdx,
                general.rbx,
                general.rsp,
                general.rbp,
                general.rsi,
                general.rdi,
                general.r8,
                general.r9,
                general.r10,
                general.r11,
                general.r12,
                general.r13,
                general.r14,
                general.r15,
            ],
            flags: general.rflags,
            segment_load: None,
            interrupt_shadow: 0,
            finish: Finish::Next,
            progress: false,
            vectors: None,
            vectors_changed: false,
            pages: [None; 2],
        }
    }

    pub(super) fn protected(&self) -> bool {
        self.special.cr0 & control::CR0_PE != 0
    }

    pub(super) fn long_mode_active(&self) -> bool {
        self.special.efer & control::EFER_LMA != 0
    }

    pub(super) fn virtual_8086(&self) -> bool {
        self.protected() && !self.long_mode_active() && self.flags_before & rflags::VM != 0
    }

    /// Real or virtual-8086 mode: segments are plain paragraphs.
    pub(super) fn paragraphs(&self) -> bool {
        !self.protected() || self.virtual_8086()
    }

    pub(super) fn is_64bit(&self) -> bool {
        self.mode == Mode::Bits64
    }

    pub(super) fn iopl(&self) -> u8 {
        ((self.flags_before & rflags::IOPL) >> 12) as u8
    }

    pub(super) fn segment(&self, name: SegmentName) -> &Segment {
        match name {
            SegmentName::Es => &self.special.es,
            SegmentName::Cs => &self.special.cs,
            SegmentName::Ss => &self.special.ss,
            SegmentName::Ds => &self.special.ds,
            SegmentName::Fs => &self.special.fs,
            SegmentName::Gs => &self.special.gs,
        }
    }

    pub(super) fn flag(&self, mask: u64) -> bool {
        self.flags & mask != 0
    }

    pub(super) fn set_flags(&mut self, mask: u64, flags: u64) {
        self.flags = self.flags & !mask | flags & mask;
    }

    /// Replaces the status flags.
    pub(super) fn set_status(&mut self, flags: u64) {
        self.set_flags(rflags::STATUS, flags);
    }

    /// The vector registers, fetched on first use.
    pub(super) fn vectors(&mut self) -> Step<&mut VectorRegisters> {
        let vectors = match self.vectors.take() {
            Some(vectors) => vectors,
            None => self.platform.vectors()?,
        };
        Ok(self.vectors.insert(vectors))
    }

    /// As [`Self::vectors`], and they will be stored.
    pub(super) fn vectors_mut(&mut self) -> Step<&mut VectorRegisters> {
        self.vectors_changed = true;
        self.vectors()
    }

    /// Hands changed vector registers to the platform, the last thing before the commit.
    pub(super) fn store_vectors(&mut self) -> Step {
        if let (true, Some(vectors)) = (self.vectors_changed, &self.vectors) {
            self.platform.set_vectors(vectors)?;
        }
        Ok(())
    }

    /// Ends the borrow of the state.
    pub(super) fn finish(self) -> Commit {
        Commit {
            regs: self.regs,
            next_rip: self.next_rip,
            flags: self.flags,
            segment_load: self.segment_load,
            interrupt_shadow: self.interrupt_shadow,
            finish: self.finish,
            progress: self.progress,
        }
    }
}

/// What an instruction wants changed.
pub(super) struct Commit {
    regs: [u64; 16],
    next_rip: u64,
    flags: u64,
    segment_load: Option<(SegmentName, Segment)>,
    pub(super) interrupt_shadow: u8,
    pub(super) finish: Finish,
    pub(super) progress: bool,
}

impl Commit {
    /// Commits the completed iterations of a REP instruction that failed or faulted later. Intel restores RFLAGS to what
    /// they were before the instruction (SDM vol. 2, REP); AMD processors keep those of the last iteration.
    pub(super) fn iterations(&self, state: &mut CpuState, vendor: Vendor) {
        let general = &mut state.general;
        store_registers(general, &self.regs);
        if vendor == Vendor::Amd {
            general.rflags = self.flags;
        }
    }

    /// Commits an instruction that is `complete`, or one that repeats.
    pub(super) fn complete(&self, state: &mut CpuState, complete: bool) {
        let general = &mut state.general;
        store_registers(general, &self.regs);
        general.rflags = self.flags;
        if complete {
            general.rip = self.next_rip;
            general.rflags &= !rflags::RF;
            state.interrupt_shadow = self.interrupt_shadow;
        }
        if let Some((name, segment)) = self.segment_load {
            let special = &mut state.special;
            *match name {
                SegmentName::Es => &mut special.es,
                SegmentName::Cs => &mut special.cs,
                SegmentName::Ss => &mut special.ss,
                SegmentName::Ds => &mut special.ds,
                SegmentName::Fs => &mut special.fs,
                SegmentName::Gs => &mut special.gs,
            } = segment;
        }
    }
}

fn store_registers(general: &mut GeneralRegisters, regs: &[u64; 16]) {
    [
        general.rax,
        general.rcx,
        general.rdx,
        general.rbx,
        general.rsp,
        general.rbp,
        general.rsi,
        general.rdi,
        general.r8,
        general.r9,
        general.r10,
        general.r11,
        general.r12,
        general.r13,
        general.r14,
        general.r15,
    ] = *regs;
}

/// Access rights of a segment, in the format of [`Segment::access`].
pub(super) mod access {
    use super::Segment;

    pub(in crate::emulator) const ACCESSED: u32 = 1 << 0;
    /// Data: writable. Code: readable.
    pub(in crate::emulator) const WRITABLE_OR_READABLE: u32 = 1 << 1;
    /// Data: expand-down. Code: conforming.
    pub(in crate::emulator) const DOWN_OR_CONFORMING: u32 = 1 << 2;
    pub(in crate::emulator) const CODE: u32 = 1 << 3;
    /// Code or data, as opposed to a system segment.
    pub(in crate::emulator) const NOT_SYSTEM: u32 = 1 << 4;
    pub(in crate::emulator) const PRESENT: u32 = 1 << 7;
    pub(in crate::emulator) const LONG: u32 = 1 << 13;
    pub(in crate::emulator) const BIG: u32 = 1 << 14;
    pub(in crate::emulator) const GRANULAR: u32 = 1 << 15;
    pub(in crate::emulator) const UNUSABLE: u32 = 1 << 16;

    pub(in crate::emulator) fn dpl(segment: &Segment) -> u8 {
        (segment.access >> 5 & 3) as u8
    }
}
