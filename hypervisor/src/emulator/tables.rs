//! Instructions that look at descriptor tables, FS and GS bases, XCR0 and caches without changing them, but for
//! WRFSBASE and WRGSBASE.

use arch::x86_64::state::Segment;
use iced_x86::{Instruction, Mnemonic};

use super::cpu::rflags::ZF;
use super::cpu::{Cpu, SegmentName, access, control, reg};
use super::error::{Step, Stop, general_protection, invalid_opcode};
use super::operand::{is_memory, mask};
use super::platform::AccessKind;

impl Cpu<'_> {
    /// SGDT and SIDT: limit and base.
    pub(super) fn store_table(&mut self, instruction: &Instruction) -> Step {
        self.check_user_mode_prevention()?;
        let table = if instruction.mnemonic() == Mnemonic::Sgdt {
            self.special.gdt
        } else {
            self.special.idt
        };
        let bytes = if self.is_64bit() { 10 } else { 6 };
        let (segment, offset) = self.address(instruction)?;
        let span = self.span_of(segment, offset, bytes, 2, AccessKind::Write)?;
        let value = u128::from(table.limit) | u128::from(table.base) << 16;
        self.write_span(&span, &value.to_le_bytes())
    }

    /// SLDT and STR.
    pub(super) fn store_selector(&mut self, instruction: &Instruction) -> Step {
        if self.paragraphs() {
            return invalid_opcode();
        }
        self.check_user_mode_prevention()?;
        let selector = if instruction.mnemonic() == Mnemonic::Sldt {
            self.special.ldt.selector
        } else {
            self.special.tr.selector
        };
        self.write(instruction, 0, u64::from(selector))
    }

    /// SMSW.
    pub(super) fn store_machine_status(&mut self, instruction: &Instruction) -> Step {
        self.check_user_mode_prevention()?;
        self.write(instruction, 0, self.special.cr0)
    }

    /// CR4.UMIP.
    fn check_user_mode_prevention(&self) -> Step {
        if self.special.cr4 & control::CR4_UMIP != 0 && self.cpl != 0 {
            return general_protection();
        }
        Ok(())
    }

    /// LAR, LSL, VERR, VERW: ZF says whether the selector can be used.
    pub(super) fn examine_selector(&mut self, instruction: &Instruction) -> Step {
        if self.paragraphs() {
            return invalid_opcode();
        }
        let mnemonic = instruction.mnemonic();
        let source = instruction.op_count() - 1;
        let selector = if is_memory(instruction, source) {
            let span = self.memory(instruction, 2, AccessKind::Read)?;
            self.load(&span)?
        } else {
            self.read(instruction, source)?
        } as u16;
        let found = self.descriptor(selector)?;
        let usable = found.filter(|found| self.may_examine(mnemonic, selector, &found.segment));
        let Some(found) = usable else {
            self.set_flags(ZF, 0);
            return Ok(());
        };
        match mnemonic {
            Mnemonic::Lar => self.write(instruction, 0, found.raw >> 32 & 0xff_ff00)?,
            Mnemonic::Lsl => self.write(instruction, 0, u64::from(found.segment.limit))?,
            _ => {}
        }
        self.set_flags(ZF, ZF);
        Ok(())
    }

    fn may_examine(&self, mnemonic: Mnemonic, selector: u16, segment: &Segment) -> bool {
        let rights = segment.access;
        let code = rights & access::CODE != 0;
        let enabled = rights & access::WRITABLE_OR_READABLE != 0;
        let system = rights & access::NOT_SYSTEM == 0;
        let conforming = !system && code && rights & access::DOWN_OR_CONFORMING != 0;
        let privileged = access::dpl(segment) >= self.cpl.max((selector & 3) as u8);
        let kind = match mnemonic {
            // System types with a limit: TSSs and LDT; LAR also takes gates (SDM vol. 2, LAR and LSL).
            Mnemonic::Lsl | Mnemonic::Lar if system => {
                let gates = mnemonic == Mnemonic::Lar;
                match (rights & 0xf, self.long_mode_active()) {
                    (2 | 9 | 11, _) => true,
                    (1 | 3, long) => !long,
                    (12, _) => gates,
                    (4 | 5, long) => gates && !long,
                    _ => false,
                }
            }
            Mnemonic::Lsl | Mnemonic::Lar => true,
            Mnemonic::Verr => !system && (!code || enabled),
            _ => return !system && !code && enabled && privileged,
        };
        kind && (conforming || privileged)
    }

    /// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
    pub(super) fn segment_base(&mut self, instruction: &Instruction) -> Step {
        if !self.is_64bit() || self.special.cr4 & control::CR4_FSGSBASE == 0 {
            return invalid_opcode();
        }
        let name = match instruction.mnemonic() {
            Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => SegmentName::Fs,
            _ => SegmentName::Gs,
        };
        let register = self.register(instruction, 0)?;
        let segment = *self.segment(name);
        if matches!(
            instruction.mnemonic(),
            Mnemonic::Rdfsbase | Mnemonic::Rdgsbase
        ) {
            self.set(register, segment.base);
            return Ok(());
        }
        let base = self.get(register);
        if !self.canonical(base) {
            return general_protection();
        }
        self.segment_load = Some((name, Segment { base, ..segment }));
        Ok(())
    }

    /// XGETBV of XCR0.
    pub(super) fn get_xcr(&mut self) -> Step {
        if self.special.cr4 & control::CR4_OSXSAVE == 0 {
            return invalid_opcode();
        }
        match self.part(reg::CX, 4) {
            0 => {}
            // Which components are in use is the hypervisor's to say.
            1 => return Err(Stop::Unsupported),
            _ => return general_protection(),
        }
        let value = self.platform.xcr0()?;
        self.set_part(reg::AX, 4, value & mask(4));
        self.set_part(reg::DX, 4, value >> 32);
        Ok(())
    }

    /// CLFLUSH, CLFLUSHOPT, CLWB: they fault as a read of a byte does.
    pub(super) fn cache_line(&mut self, instruction: &Instruction) -> Step {
        self.memory(instruction, 1, AccessKind::Read)?;
        Ok(())
    }

    /// WBINVD, WBNOINVD, INVD: memory is coherent without them.
    pub(super) fn cache_all(&mut self) -> Step {
        if self.cpl != 0 {
            return general_protection();
        }
        Ok(())
    }

    /// RDSSPD and RDSSPQ, which do nothing where there are no shadow stacks.
    pub(super) fn shadow_stack_pointer(&mut self) -> Step {
        if self.special.cr4 & control::CR4_CET != 0 {
            return Err(Stop::Unsupported);
        }
        Ok(())
    }
}
