//! Operands: registers, memory and immediates, read and written as numbers of up to 64 bits.

use iced_x86::{Instruction, OpKind, Register};

use super::cpu::{Cpu, SegmentName};
use super::error::{Step, Stop};
use super::memory::Span;
use super::platform::AccessKind;

/// A general register, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gpr {
    /// Index in the order of the encoding.
    pub(super) index: usize,
    /// 1, 2, 4 or 8.
    pub(super) bytes: usize,
    /// AH, CH, DH or BH.
    pub(super) high: bool,
}

/// The general register that the decoder names, if it is one.
pub(super) fn gpr(register: Register) -> Option<Gpr> {
    let number = register as usize;
    let from = |first: Register| number - first as usize;
    let (index, bytes, high) = if number < Register::AL as usize {
        return None;
    } else if number < Register::AX as usize {
        match from(Register::AL) {
            low @ 0..4 => (low, 1, false),
            high @ 4..8 => (high - 4, 1, true),
            rest => (rest - 4, 1, false),
        }
    } else if number < Register::EAX as usize {
        (from(Register::AX), 2, false)
    } else if number < Register::RAX as usize {
        (from(Register::EAX), 4, false)
    } else if number < Register::EIP as usize {
        (from(Register::RAX), 8, false)
    } else {
        return None;
    };
    Some(Gpr { index, bytes, high })
}

/// The segment register that the decoder names, if it is one.
pub(super) fn segment_name(register: Register) -> Option<SegmentName> {
    Some(match register {
        Register::ES => SegmentName::Es,
        Register::CS => SegmentName::Cs,
        Register::SS => SegmentName::Ss,
        Register::DS => SegmentName::Ds,
        Register::FS => SegmentName::Fs,
        Register::GS => SegmentName::Gs,
        _ => return None,
    })
}

/// All ones in the low `bytes` bytes (1 to 8).
pub(super) const fn mask(bytes: usize) -> u64 {
    u64::MAX >> (64 - 8 * bytes as u32)
}

/// Sign-extends the low `bytes` bytes (1 to 8).
pub(super) const fn sign_extend(value: u64, bytes: usize) -> u64 {
    let unused = 64 - 8 * bytes as u32;
    ((value << unused) as i64 >> unused) as u64
}

/// Whether the operand is in memory, in any form.
pub(super) fn is_memory(instruction: &Instruction, operand: u32) -> bool {
    instruction.op_kind(operand) == OpKind::Memory
}

/// Where an operand is, checked for what is to be done with it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Register(Gpr),
    Memory(Span),
}

impl Cpu<'_> {
    pub(super) fn get(&self, register: Gpr) -> u64 {
        let value = self.regs[register.index & 15];
        let value = if register.high { value >> 8 } else { value };
        value & mask(register.bytes)
    }

    /// Writes a register; 32-bit writes clear the upper half, narrower ones keep the rest.
    pub(super) fn set(&mut self, register: Gpr, value: u64) {
        let slot = &mut self.regs[register.index & 15];
        *slot = match (register.bytes, register.high) {
            (8, _) => value,
            (4, _) => value & 0xffff_ffff,
            (2, _) => *slot & !0xffff | value & 0xffff,
            (_, false) => *slot & !0xff | value & 0xff,
            (_, true) => *slot & !0xff00 | (value & 0xff) << 8,
        };
    }

    /// As [`Self::set`], by index and width.
    pub(super) fn set_part(&mut self, index: usize, bytes: usize, value: u64) {
        self.set(
            Gpr {
                index,
                bytes,
                high: false,
            },
            value,
        );
    }

    /// The low `bytes` bytes of a register.
    pub(super) fn part(&self, index: usize, bytes: usize) -> u64 {
        self.regs[index & 15] & mask(bytes)
    }

    /// The general register of a register operand.
    pub(super) fn register(&self, instruction: &Instruction, operand: u32) -> Step<Gpr> {
        gpr(instruction.op_register(operand)).ok_or(Stop::Unsupported)
    }

    /// Width of a register or memory operand in bytes: 1, 2, 4 or 8.
    pub(super) fn operand_bytes(&self, instruction: &Instruction, operand: u32) -> Step<usize> {
        let bytes = match instruction.op_kind(operand) {
            OpKind::Register => return Ok(self.register(instruction, operand)?.bytes),
            OpKind::Memory => instruction.memory_size().size(),
            _ => return Err(Stop::Unsupported),
        };
        match bytes {
            1 | 2 | 4 | 8 => Ok(bytes),
            _ => Err(Stop::Unsupported),
        }
    }

    /// Segment and offset of the memory operand; the offset is as wide as the address size.
    pub(super) fn address(&self, instruction: &Instruction) -> Step<(SegmentName, u64)> {
        self.address_plus(instruction, 0)
    }

    /// The segment of a memory operand. In 64-bit mode overrides other than FS and GS are ignored, also in the choice
    /// between #SS and #GP.
    pub(super) fn operand_segment(&self, instruction: &Instruction) -> Step<SegmentName> {
        let name = segment_name(instruction.memory_segment()).ok_or(Stop::Unsupported)?;
        if !self.is_64bit() || matches!(name, SegmentName::Fs | SegmentName::Gs) {
            return Ok(name);
        }
        Ok(match instruction.memory_base() {
            Register::RSP | Register::RBP | Register::ESP | Register::EBP => SegmentName::Ss,
            _ => SegmentName::Ds,
        })
    }

    /// As [`Self::address`], with `extra` bytes added to the offset before it is cut to the address size.
    pub(super) fn address_plus(
        &self,
        instruction: &Instruction,
        extra: u64,
    ) -> Step<(SegmentName, u64)> {
        let segment = self.operand_segment(instruction)?;
        let mut offset = instruction.memory_displacement64().wrapping_add(extra);
        let mut bytes = 0;
        match instruction.memory_base() {
            Register::None => {}
            // The decoder has added RIP to the displacement.
            Register::RIP => bytes = 8,
            Register::EIP => bytes = 4,
            base => {
                let base = gpr(base).ok_or(Stop::Unsupported)?;
                offset = offset.wrapping_add(self.get(base));
                bytes = base.bytes;
            }
        }
        if let Some(index) = gpr(instruction.memory_index()) {
            let scaled = self
                .get(index)
                .wrapping_mul(u64::from(instruction.memory_index_scale()));
            offset = offset.wrapping_add(scaled);
            bytes = index.bytes;
        } else if instruction.memory_index() != Register::None {
            return Err(Stop::Unsupported);
        }
        if bytes == 0 {
            bytes = match instruction.memory_displ_size() {
                2 => 2,
                8 => 8,
                _ => 4,
            };
        }
        Ok((segment, offset & mask(bytes)))
    }

    /// Checks the memory operand, `bytes` wide, for an access.
    pub(super) fn memory(
        &mut self,
        instruction: &Instruction,
        bytes: usize,
        kind: AccessKind,
    ) -> Step<Span> {
        let (segment, offset) = self.address(instruction)?;
        self.span(segment, offset, bytes, kind)
    }

    /// Reads an operand, zero-extended; an immediate is sign-extended as the instruction says.
    pub(super) fn read(&mut self, instruction: &Instruction, operand: u32) -> Step<u64> {
        match instruction.op_kind(operand) {
            OpKind::Register => Ok(self.get(self.register(instruction, operand)?)),
            OpKind::Memory => {
                let bytes = self.operand_bytes(instruction, operand)?;
                let span = self.memory(instruction, bytes, AccessKind::Read)?;
                self.load(&span)
            }
            _ => instruction
                .try_immediate(operand)
                .map_err(|_| Stop::Unsupported),
        }
    }

    /// Checks an operand that will be written.
    pub(super) fn place(&mut self, instruction: &Instruction, operand: u32) -> Step<Place> {
        match instruction.op_kind(operand) {
            OpKind::Register => Ok(Place::Register(self.register(instruction, operand)?)),
            OpKind::Memory => {
                let bytes = self.operand_bytes(instruction, operand)?;
                Ok(Place::Memory(self.memory(
                    instruction,
                    bytes,
                    AccessKind::Write,
                )?))
            }
            _ => Err(Stop::Unsupported),
        }
    }

    /// Writes a checked operand.
    pub(super) fn put(&mut self, place: &Place, value: u64) -> Step {
        match place {
            Place::Register(register) => {
                self.set(*register, value);
                Ok(())
            }
            Place::Memory(span) => self.store(span, value),
        }
    }

    /// Writes an operand.
    pub(super) fn write(&mut self, instruction: &Instruction, operand: u32, value: u64) -> Step {
        let place = self.place(instruction, operand)?;
        self.put(&place, value)
    }

    /// Replaces the first operand by what `change` makes of it, atomically with a LOCK prefix, and returns
    /// what `change` adds. `change` may be called more than once.
    pub(super) fn update<T>(
        &mut self,
        instruction: &Instruction,
        change: impl Fn(u64) -> (u64, T),
    ) -> Step<T> {
        match self.place(instruction, 0)? {
            Place::Register(register) => {
                let (value, result) = change(self.get(register));
                self.set(register, value);
                Ok(result)
            }
            Place::Memory(span) => self.update_span(&span, instruction.has_lock_prefix(), |old| {
                let (value, result) = change(old as u64);
                (u128::from(value), result)
            }),
        }
    }
}
