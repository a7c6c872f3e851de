//! Branches, software interrupts and HLT.

use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpKind};

use super::cpu::rflags::{CF, OF, PF, SF, ZF};
use super::cpu::{Cpu, Finish, Mode, SegmentName, control, reg};
use super::error::{Exception, ExceptionKind, Step, Stop, general_protection, vector};
use super::operand::mask;
use super::platform::AccessKind;

impl Cpu<'_> {
    /// A condition by its encoding, 0 (O) to 15 (NLE) (SDM vol. 1, appendix B).
    pub(super) fn condition(&self, code: u8) -> bool {
        let flags = self.flags;
        let set = |flag: u64| flags & flag != 0;
        let less = set(SF) != set(OF);
        let holds = match code >> 1 {
            0 => set(OF),
            1 => set(CF),
            2 => set(ZF),
            3 => set(CF | ZF),
            4 => set(SF),
            5 => set(PF),
            6 => less,
            _ => less || set(ZF),
        };
        holds != (code & 1 != 0)
    }

    /// Makes `target` the next RIP if the code segment allows it. In 16- and 32-bit modes it is an offset
    /// already cut to the operand size.
    fn branch(&mut self, target: u64) -> Step {
        let reachable = match self.mode {
            Mode::Bits64 => self.canonical(target),
            Mode::Bits16 | Mode::Bits32 => target <= u64::from(self.segment(SegmentName::Cs).limit),
        };
        if !reachable {
            return general_protection();
        }
        self.next_rip = target;
        Ok(())
    }

    /// Where a near branch leads, and its operand size in bytes.
    fn target(&mut self, instruction: &Instruction) -> Step<(u64, usize)> {
        match instruction.op0_kind() {
            OpKind::NearBranch16 => Ok((instruction.near_branch_target(), 2)),
            OpKind::NearBranch32 => Ok((instruction.near_branch_target(), 4)),
            OpKind::NearBranch64 => Ok((instruction.near_branch_target(), 8)),
            OpKind::Register | OpKind::Memory if !is_far(instruction) => {
                let bytes = self.operand_bytes(instruction, 0)?;
                Ok((self.read(instruction, 0)?, bytes))
            }
            _ => Err(Stop::Unsupported),
        }
    }

    /// Jcc.
    pub(super) fn conditional_jump(&mut self, instruction: &Instruction, condition: u8) -> Step {
        let (target, _) = self.target(instruction)?;
        if self.condition(condition) {
            self.branch(target)?;
        }
        Ok(())
    }

    /// LOOP, LOOPE, LOOPNE, JCXZ, JECXZ, JRCXZ.
    pub(super) fn counted_jump(&mut self, instruction: &Instruction) -> Step {
        let bytes = counter_bytes(instruction.code())?;
        let (target, _) = self.target(instruction)?;
        let count = self.part(reg::CX, bytes);
        let zero = self.flag(ZF);
        let (count_after, taken) = match instruction.mnemonic() {
            Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => (None, count == 0),
            mnemonic => {
                let count = count.wrapping_sub(1) & mask(bytes);
                let wanted = match mnemonic {
                    Mnemonic::Loope => zero,
                    Mnemonic::Loopne => !zero,
                    _ => true,
                };
                (Some(count), count != 0 && wanted)
            }
        };
        if taken {
            self.branch(target)?;
        }
        if let Some(count) = count_after {
            self.set_part(reg::CX, bytes, count);
        }
        Ok(())
    }

    /// JMP near.
    pub(super) fn jump(&mut self, instruction: &Instruction) -> Step {
        let (target, _) = self.target(instruction)?;
        self.branch(target)
    }

    /// CALL near.
    pub(super) fn call(&mut self, instruction: &Instruction) -> Step {
        let (target, bytes) = self.target(instruction)?;
        let back = self.next_rip;
        let (span, pointer) = self.below(bytes)?;
        self.branch(target)?;
        self.store(&span, back)?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// RET near.
    pub(super) fn ret(&mut self, instruction: &Instruction) -> Step {
        let bytes = match instruction.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            Code::Retnq | Code::Retnq_imm16 => 8,
            _ => return Err(Stop::Unsupported),
        };
        let release = match instruction.op_count() {
            0 => 0,
            _ => u64::from(instruction.immediate16()),
        };
        let (target, pointer) = self.top(bytes)?;
        self.branch(target)?;
        self.set_stack_pointer(pointer.wrapping_add(release));
        Ok(())
    }

    /// INT3, INT1, INTO and INT n.
    pub(super) fn software_interrupt(&mut self, instruction: &Instruction) -> Step {
        let length = instruction.len() as u8;
        let (vector, kind) = match instruction.mnemonic() {
            Mnemonic::Int3 => (vector::BP, ExceptionKind::SoftwareException { length }),
            Mnemonic::Into => {
                if !self.flag(OF) {
                    return Ok(());
                }
                (vector::OF, ExceptionKind::SoftwareException { length })
            }
            Mnemonic::Int1 => (
                vector::DB,
                ExceptionKind::PrivilegedSoftwareException { length },
            ),
            _ => {
                let redirected = self.virtual_8086() && self.special.cr4 & control::CR4_VME != 0;
                if redirected {
                    return Err(Stop::Unsupported);
                }
                if self.virtual_8086() && self.iopl() < 3 {
                    return general_protection();
                }
                (
                    instruction.immediate8(),
                    ExceptionKind::SoftwareInterrupt { length },
                )
            }
        };
        self.finish = Finish::Raise(Exception {
            vector,
            error_code: None,
            payload: None,
            kind,
        });
        Ok(())
    }

    /// HLT.
    pub(super) fn halt(&mut self) -> Step {
        if self.cpl != 0 {
            return general_protection();
        }
        self.finish = Finish::Halt;
        Ok(())
    }

    /// The value on top of the stack and the stack pointer above it.
    pub(super) fn top(&mut self, bytes: usize) -> Step<(u64, u64)> {
        let pointer = self.stack_pointer();
        let span = self.span(SegmentName::Ss, pointer, bytes, AccessKind::Read)?;
        Ok((self.load(&span)?, pointer.wrapping_add(bytes as u64)))
    }
}

/// A far pointer in memory, which shares its mnemonic with the near forms.
fn is_far(instruction: &Instruction) -> bool {
    matches!(
        instruction.memory_size(),
        MemorySize::SegPtr16 | MemorySize::SegPtr32 | MemorySize::SegPtr64
    )
}

/// Width of the count register, which the address size decides.
fn counter_bytes(code: Code) -> Step<usize> {
    Ok(match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX
        | Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32 => 2,
        Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX
        | Code::Jecxz_rel8_16
        | Code::Jecxz_rel8_32
        | Code::Jecxz_rel8_64 => 4,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX
        | Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64 => 8,
        _ => return Err(Stop::Unsupported),
    })
}
