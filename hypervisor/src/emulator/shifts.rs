//! Shifts and rotates.

use iced_x86::{Instruction, Mnemonic};

use super::alu::{Computed, result_flags, sign};
use super::cpu::Cpu;
use super::cpu::rflags::{CF, OF, STATUS};
use super::error::{Step, Stop};
use super::operand::{mask, sign_extend};

/// What a shift does with `count` (masked, not 0): the result, the flags and which of them it changes.
type Shifted = (u64, u64, u64);

fn bit(value: u64, index: u32, flag: u64) -> u64 {
    if index < 64 && value >> index & 1 != 0 {
        flag
    } else {
        0
    }
}

fn overflow(differs: u64) -> u64 {
    if differs & 1 != 0 { OF } else { 0 }
}

fn with_result_flags((value, flags): Computed, bytes: usize) -> Shifted {
    let value = value & mask(bytes);
    (value, flags | result_flags(value, bytes), STATUS)
}

fn shl(bytes: usize, a: u64, count: u32) -> Shifted {
    let bits = 8 * bytes as u32;
    let value = a << count & mask(bytes);
    let carry = if count <= bits {
        bit(a, bits - count, CF)
    } else {
        0
    };
    let flags = carry | overflow(sign(value, bytes) ^ u64::from(carry != 0));
    with_result_flags((value, flags), bytes)
}

fn shr(bytes: usize, a: u64, count: u32) -> Shifted {
    let flags = bit(a, count - 1, CF) | overflow(sign(a, bytes));
    with_result_flags((a >> count, flags), bytes)
}

fn sar(bytes: usize, a: u64, count: u32) -> Shifted {
    let wide = sign_extend(a, bytes) as i64;
    let flags = bit((wide >> (count - 1)) as u64, 0, CF);
    with_result_flags(((wide >> count) as u64, flags), bytes)
}

fn rol(bytes: usize, a: u64, count: u32) -> Shifted {
    let bits = 8 * bytes as u32;
    let turn = count % bits;
    let value = match turn {
        0 => a,
        turn => (a << turn | a >> (bits - turn)) & mask(bytes),
    };
    let flags = bit(value, 0, CF) | overflow(sign(value, bytes) ^ value);
    (value, flags, CF | OF)
}

fn ror(bytes: usize, a: u64, count: u32) -> Shifted {
    let bits = 8 * bytes as u32;
    let (value, _, changed) = rol(bytes, a, bits - count % bits);
    let flags = bit(value, bits - 1, CF) | overflow(sign(value, bytes) ^ value >> (bits - 2));
    (value, flags, changed)
}

/// Rotates `bits + 1` bits, with CF on top.
fn rotate_carry(bytes: usize, a: u64, carry: bool, left: u32) -> (u64, u64) {
    let bits = 8 * bytes as u32;
    let wide = u128::from(a) | u128::from(carry) << bits;
    let turned = match left {
        0 => wide,
        left => wide << left | wide >> (bits + 1 - left),
    };
    let value = turned as u64 & mask(bytes);
    let carry = if turned >> bits & 1 != 0 { CF } else { 0 };
    (value, carry)
}

fn rcl(bytes: usize, a: u64, count: u32, carry: bool) -> Shifted {
    let bits = 8 * bytes as u32;
    let (value, carry) = rotate_carry(bytes, a, carry, count % (bits + 1));
    let flags = carry | overflow(sign(value, bytes) ^ u64::from(carry != 0));
    (value, flags, CF | OF)
}

fn rcr(bytes: usize, a: u64, count: u32, carry: bool) -> Shifted {
    let bits = 8 * bytes as u32;
    let left = (bits + 1 - count % (bits + 1)) % (bits + 1);
    let (value, carry) = rotate_carry(bytes, a, carry, left);
    let flags = carry | overflow(sign(value, bytes) ^ value >> (bits - 2));
    (value, flags, CF | OF)
}

/// `a:filler` shifted left. A 16-bit shift by more than 16 (undefined) goes on with `a`.
fn shld(bytes: usize, a: u64, filler: u64, count: u32) -> Shifted {
    let bits = 8 * bytes as u32;
    let (carry, value) = if bits == 16 {
        let triple = a << 32 | filler << 16 | a;
        (bit(triple, 48 - count, CF), triple << count >> 32)
    } else {
        let double = u128::from(a) << bits | u128::from(filler);
        (bit(a, bits - count, CF), (double << count >> bits) as u64)
    };
    let value = value & mask(bytes);
    let flags = carry | overflow(sign(value, bytes) ^ sign(a, bytes));
    with_result_flags((value, flags), bytes)
}

/// `filler:a` shifted right.
fn shrd(bytes: usize, a: u64, filler: u64, count: u32) -> Shifted {
    let bits = 8 * bytes as u32;
    let (carry, value) = if bits == 16 {
        let triple = a << 32 | filler << 16 | a;
        (bit(triple, count - 1, CF), triple >> count)
    } else {
        let double = u128::from(filler) << bits | u128::from(a);
        (bit(a, count - 1, CF), (double >> count) as u64)
    };
    let value = value & mask(bytes);
    let flags = carry | overflow(sign(value, bytes) ^ sign(a, bytes));
    with_result_flags((value, flags), bytes)
}

impl Cpu<'_> {
    /// SHL, SHR, SAR, ROL, ROR, RCL, RCR by an immediate, 1 or CL.
    pub(super) fn shift(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 0)?;
        let count = self.read(instruction, 1)? as u32 & count_mask(bytes);
        let carry = self.flag(CF);
        let mnemonic = instruction.mnemonic();
        let (flags, changed) = self.update(instruction, |a| {
            if count == 0 {
                return (a, (0, 0));
            }
            let (value, flags, changed) = match mnemonic {
                Mnemonic::Shl | Mnemonic::Sal => shl(bytes, a, count),
                Mnemonic::Shr => shr(bytes, a, count),
                Mnemonic::Sar => sar(bytes, a, count),
                Mnemonic::Rol => rol(bytes, a, count),
                Mnemonic::Ror => ror(bytes, a, count),
                Mnemonic::Rcl => rcl(bytes, a, count, carry),
                _ => rcr(bytes, a, count, carry),
            };
            (value, (flags, changed))
        })?;
        self.set_flags(changed, flags);
        Ok(())
    }

    /// SHLD and SHRD.
    pub(super) fn double_shift(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 0)?;
        if bytes == 1 {
            return Err(Stop::Unsupported);
        }
        let filler = self.read(instruction, 1)?;
        let count = self.read(instruction, 2)? as u32 & count_mask(bytes);
        let left = instruction.mnemonic() == Mnemonic::Shld;
        let (flags, changed) = self.update(instruction, |a| {
            if count == 0 {
                return (a, (0, 0));
            }
            let (value, flags, changed) = if left {
                shld(bytes, a, filler, count)
            } else {
                shrd(bytes, a, filler, count)
            };
            (value, (flags, changed))
        })?;
        self.set_flags(changed, flags);
        Ok(())
    }
}

fn count_mask(bytes: usize) -> u32 {
    if bytes == 8 { 0x3f } else { 0x1f }
}
