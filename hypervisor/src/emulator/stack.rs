//! The stack: PUSH, POP and their relatives.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::cpu::rflags::{AC, DF, ID, IF, IOPL, NT, RF, STATUS, TF, VM};
use super::cpu::{Cpu, SHADOW_MOV_SS, SHADOW_STI, SegmentName, access, control, reg};
use super::error::{Step, Stop, general_protection};
use super::memory::Span;
use super::operand::{Gpr, Place, gpr, is_memory, mask, segment_name};
use super::platform::AccessKind;

impl Cpu<'_> {
    /// Width of the stack pointer in bytes.
    fn stack_bytes(&self) -> usize {
        if self.is_64bit() {
            8
        } else if self.segment(SegmentName::Ss).access & access::BIG != 0 {
            4
        } else {
            2
        }
    }

    pub(super) fn stack_pointer(&self) -> u64 {
        self.part(reg::SP, self.stack_bytes())
    }

    /// Sets as much of RSP as the stack is wide.
    pub(super) fn set_stack_pointer(&mut self, value: u64) {
        let bytes = self.stack_bytes();
        self.set_part(reg::SP, bytes, value & mask(bytes));
    }

    /// The stretch that a push of `bytes` will write, and the stack pointer after it.
    pub(super) fn below(&mut self, bytes: usize) -> Step<(Span, u64)> {
        let pointer = self.stack_pointer().wrapping_sub(bytes as u64) & mask(self.stack_bytes());
        let span = self.span(SegmentName::Ss, pointer, bytes, AccessKind::Write)?;
        Ok((span, pointer))
    }

    pub(super) fn push(&mut self, bytes: usize, value: u64) -> Step {
        let (span, pointer) = self.below(bytes)?;
        self.store(&span, value)?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// PUSH of a register, memory, an immediate or a segment register.
    pub(super) fn push_operand(&mut self, instruction: &Instruction) -> Step {
        let bytes = pushed_bytes(instruction)?;
        let value = match instruction.op0_kind() {
            OpKind::Register if gpr(instruction.op0_register()).is_none() => {
                let name = segment_name(instruction.op0_register()).ok_or(Stop::Unsupported)?;
                u64::from(self.segment(name).selector)
            }
            _ => self.read(instruction, 0)?,
        };
        self.push(bytes, value)
    }

    /// POP to a register, memory or a segment register.
    pub(super) fn pop_operand(&mut self, instruction: &Instruction) -> Step {
        let bytes = pushed_bytes(instruction)?;
        let (value, pointer) = self.top(bytes)?;
        if is_memory(instruction, 0) {
            // An address that uses RSP sees it after the pop.
            self.set_stack_pointer(pointer);
            let span = self.memory(instruction, bytes, AccessKind::Write)?;
            return self.store(&span, value);
        }
        match gpr(instruction.op0_register()) {
            Some(register) => {
                self.set_stack_pointer(pointer);
                self.set(register, value);
            }
            None => {
                let name = segment_name(instruction.op0_register()).ok_or(Stop::Unsupported)?;
                self.load_segment(name, value as u16)?;
                if name == SegmentName::Ss {
                    self.interrupt_shadow = SHADOW_MOV_SS;
                }
                self.set_stack_pointer(pointer);
            }
        }
        Ok(())
    }

    /// PUSHF.
    pub(super) fn push_flags(&mut self, instruction: &Instruction) -> Step {
        self.check_virtual_8086_flags()?;
        let bytes = match instruction.mnemonic() {
            Mnemonic::Pushf => 2,
            Mnemonic::Pushfd => 4,
            _ => 8,
        };
        self.push(bytes, self.flags & !(VM | RF))
    }

    /// POPF. Flags that the privilege level may not change are kept silently (SDM vol. 2, POPF).
    pub(super) fn pop_flags(&mut self, instruction: &Instruction) -> Step {
        self.check_virtual_8086_flags()?;
        let bytes = match instruction.mnemonic() {
            Mnemonic::Popf => 2,
            Mnemonic::Popfd => 4,
            _ => 8,
        };
        let (value, pointer) = self.top(bytes)?;
        let mut changed = STATUS | TF | DF | NT | AC | ID;
        if self.cpl <= self.iopl() {
            changed |= IF;
        }
        if self.cpl == 0 {
            changed |= IOPL;
        }
        self.set_flags(changed & mask(bytes), value);
        self.set_stack_pointer(pointer);
        Ok(())
    }

    fn check_virtual_8086_flags(&self) -> Step {
        if self.virtual_8086() && self.iopl() < 3 {
            if self.special.cr4 & control::CR4_VME != 0 {
                return Err(Stop::Unsupported);
            }
            return general_protection();
        }
        Ok(())
    }

    /// CLI and STI.
    pub(super) fn interrupt_flag(&mut self, instruction: &Instruction) -> Step {
        if self.cpl > self.iopl() {
            let virtual_flag = if self.virtual_8086() {
                control::CR4_VME
            } else {
                control::CR4_PVI
            };
            if self.special.cr4 & virtual_flag != 0 && self.cpl == 3 {
                return Err(Stop::Unsupported);
            }
            return general_protection();
        }
        if instruction.mnemonic() == Mnemonic::Sti {
            if !self.flag(IF) {
                self.interrupt_shadow = SHADOW_STI;
            }
            self.flags |= IF;
        } else {
            self.flags &= !IF;
        }
        Ok(())
    }

    /// PUSHA: eight pushes, all checked before the first is written.
    pub(super) fn push_all(&mut self, instruction: &Instruction) -> Step {
        let bytes = if instruction.code() == Code::Pushad {
            4
        } else {
            2
        };
        let mut pointer = self.stack_pointer();
        let mut spans = [None; 8];
        for span in &mut spans {
            pointer = pointer.wrapping_sub(bytes as u64) & mask(self.stack_bytes());
            *span = Some(self.span(SegmentName::Ss, pointer, bytes, AccessKind::Write)?);
        }
        for (index, span) in spans.iter().flatten().enumerate() {
            self.store(span, self.part(index, bytes))?;
        }
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// POPA. What it finds for SP is skipped.
    pub(super) fn pop_all(&mut self, instruction: &Instruction) -> Step {
        let bytes = if instruction.code() == Code::Popad {
            4
        } else {
            2
        };
        let mut pointer = self.stack_pointer();
        for index in (0..8).rev() {
            let span = self.span(SegmentName::Ss, pointer, bytes, AccessKind::Read)?;
            let value = self.load(&span)?;
            pointer = pointer.wrapping_add(bytes as u64) & mask(self.stack_bytes());
            if index != reg::SP {
                self.set_part(index, bytes, value);
            }
        }
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// ENTER: pushes the frame pointer, copies `level - 1` older ones, and reserves space.
    pub(super) fn enter(&mut self, instruction: &Instruction) -> Step {
        let bytes = match instruction.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        let level = u64::from(instruction.immediate8_2nd() & 31);
        let reserve = u64::from(instruction.immediate16());
        let stack_mask = mask(self.stack_bytes());
        let step = bytes as u64;
        let top = self.stack_pointer();
        let at = |n: u64| top.wrapping_sub(n.wrapping_mul(step)) & stack_mask;
        let frame = at(1);
        let frame_pointer = self.regs[reg::BP];
        // Whatever is written first must be certain to be followed by the rest: check all of it, in the
        // processor's order.
        self.span(SegmentName::Ss, frame, bytes, AccessKind::Write)?;
        for n in 1..level {
            let offset = frame_pointer.wrapping_sub(n * step) & stack_mask;
            self.span(SegmentName::Ss, offset, bytes, AccessKind::Read)?;
            self.span(SegmentName::Ss, at(n + 1), bytes, AccessKind::Write)?;
        }
        let pushes = if level == 0 { 1 } else { level + 1 };
        self.span(SegmentName::Ss, at(pushes), bytes, AccessKind::Write)?;
        let pointer = at(pushes).wrapping_sub(reserve) & stack_mask;
        // The processor proves that the new top can be written (SDM vol. 2, ENTER).
        self.span(SegmentName::Ss, pointer, bytes, AccessKind::Write)?;

        let span = self.span(SegmentName::Ss, frame, bytes, AccessKind::Write)?;
        self.store(&span, frame_pointer & mask(bytes))?;
        for n in 1..level {
            let offset = frame_pointer.wrapping_sub(n * step) & stack_mask;
            let from = self.span(SegmentName::Ss, offset, bytes, AccessKind::Read)?;
            let value = self.load(&from)?;
            let to = self.span(SegmentName::Ss, at(n + 1), bytes, AccessKind::Write)?;
            self.store(&to, value)?;
        }
        if level > 0 {
            let to = self.span(SegmentName::Ss, at(level + 1), bytes, AccessKind::Write)?;
            self.store(&to, frame)?;
        }
        self.set_part(reg::BP, bytes, frame);
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// LEAVE.
    pub(super) fn leave(&mut self, instruction: &Instruction) -> Step {
        let bytes = match instruction.code() {
            Code::Leavew => 2,
            Code::Leaved => 4,
            _ => 8,
        };
        let pointer = self.part(reg::BP, self.stack_bytes());
        let span = self.span(SegmentName::Ss, pointer, bytes, AccessKind::Read)?;
        let value = self.load(&span)?;
        self.set_stack_pointer(pointer.wrapping_add(bytes as u64));
        self.put(
            &Place::Register(Gpr {
                index: reg::BP,
                bytes,
                high: false,
            }),
            value,
        )
    }
}

/// How wide an element is that PUSH or POP moves: the operand size, also for segment registers and
/// sign-extended immediates.
fn pushed_bytes(instruction: &Instruction) -> Step<usize> {
    match instruction.stack_pointer_increment().unsigned_abs() {
        2 => Ok(2),
        4 => Ok(4),
        8 => Ok(8),
        _ => Err(Stop::Unsupported),
    }
}
