//! Packed integer operations: those that kernels use for memory, XOR parity and string functions.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::cpu::Cpu;
use super::cpu::rflags::{CF, ZF};
use super::error::{Step, Stop};
use super::lanes::Shift;
use super::vector::{Alignment, Encoding, lanes_to_bytes, operand_vector};

impl Cpu<'_> {
    /// An operation on two vectors, lane by lane.
    pub(super) fn vector_binary(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        operation: fn(u128, u128) -> u128,
    ) -> Step {
        let Some((to, bytes)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let alignment = self.operand_alignment(encoding)?;
        let first = instruction.op_count() - 2;
        let a = self.read_vector(instruction, first, bytes, Alignment::Free)?;
        let b = self.read_vector(instruction, first + 1, bytes, alignment)?;
        let lanes = [
            operation(a[0], b[0]),
            if bytes == 32 {
                operation(a[1], b[1])
            } else {
                0
            },
        ];
        self.set_vector(to, lanes, encoding)
    }

    /// PMOVMSKB, MOVMSKPS, MOVMSKPD: the top bit of every element of `width` bytes.
    pub(super) fn vector_mask(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        width: usize,
    ) -> Step {
        let Some((from, bytes)) = operand_vector(instruction, 1) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let to = self.register(instruction, 0)?;
        let data = lanes_to_bytes(self.get_vector(from)?);
        let mut value = 0;
        for (index, element) in data.chunks_exact(width).take(bytes / width).enumerate() {
            if element.last().is_some_and(|byte| byte & 0x80 != 0) {
                value |= 1 << index;
            }
        }
        self.set(to, value);
        Ok(())
    }

    /// PTEST.
    pub(super) fn vector_test(&mut self, instruction: &Instruction, encoding: Encoding) -> Step {
        let Some((first, bytes)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let alignment = self.operand_alignment(encoding)?;
        let mut a = self.get_vector(first)?;
        if bytes == 16 {
            a[1] = 0;
        }
        let b = self.read_vector(instruction, 1, bytes, alignment)?;
        let zero = a[0] & b[0] == 0 && a[1] & b[1] == 0;
        let carry = !a[0] & b[0] == 0 && !a[1] & b[1] == 0;
        self.set_status(if zero { ZF } else { 0 } | if carry { CF } else { 0 });
        Ok(())
    }

    /// PSHUFD and its relatives: an operation on one vector, lane by lane, with an immediate.
    pub(super) fn vector_shuffle(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        operation: fn(u128, u8) -> u128,
    ) -> Step {
        let Some((to, bytes)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let alignment = self.operand_alignment(encoding)?;
        let order = instruction.immediate8();
        let lanes = self.read_vector(instruction, 1, bytes, alignment)?;
        let shuffled = lanes.map(|lane| operation(lane, order));
        self.set_vector(to, shuffled, encoding)
    }

    /// PALIGNR and SHUFPS: an operation on two vectors, lane by lane, with an immediate.
    pub(super) fn vector_combine(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        operation: fn(u128, u128, u8) -> u128,
    ) -> Step {
        let Some((to, bytes)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let alignment = self.operand_alignment(encoding)?;
        let immediate = instruction.immediate8();
        let first = instruction.op_count() - 3;
        let a = self.read_vector(instruction, first, bytes, Alignment::Free)?;
        let b = self.read_vector(instruction, first + 1, bytes, alignment)?;
        let upper = if bytes == 32 {
            operation(a[1], b[1], immediate)
        } else {
            0
        };
        self.set_vector(to, [operation(a[0], b[0], immediate), upper], encoding)
    }

    /// PSLLW to PSRAD: shifts of elements, by an immediate or by the low 64 bits of a 128-bit operand.
    pub(super) fn vector_shift(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        operation: fn(u128, u64, Shift) -> u128,
        direction: Shift,
    ) -> Step {
        let Some((to, bytes)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let alignment = self.operand_alignment(encoding)?;
        let last = instruction.op_count() - 1;
        let count = if instruction.op_kind(last) == OpKind::Immediate8 {
            u64::from(instruction.immediate8())
        } else {
            self.read_vector(instruction, last, 16, alignment)?[0] as u64
        };
        let lanes = self.read_vector(instruction, last - 1, bytes, Alignment::Free)?;
        let shifted = lanes.map(|lane| operation(lane, count, direction));
        self.set_vector(to, shifted, encoding)
    }

    /// PSLLDQ and PSRLDQ: a shift by whole bytes.
    pub(super) fn vector_byte_shift(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
    ) -> Step {
        let Some((to, bytes)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let from = instruction.op_count() - 2;
        let count = 8 * u32::from(instruction.immediate8().min(16));
        let left = matches!(instruction.mnemonic(), Mnemonic::Pslldq | Mnemonic::Vpslldq);
        let lanes = self.read_vector(instruction, from, bytes, Alignment::Free)?;
        let shifted = lanes.map(|lane| {
            let shifted = if left {
                lane.checked_shl(count)
            } else {
                lane.checked_shr(count)
            };
            shifted.unwrap_or(0)
        });
        self.set_vector(to, shifted, encoding)
    }
}
