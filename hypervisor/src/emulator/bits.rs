//! Bit tests, scans and counts, and the BMI instructions.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::{result_flags, sign};
use super::cpu::rflags::{CF, OF, SF, ZF};
use super::cpu::{Cpu, reg};
use super::error::{Step, invalid_opcode};
use super::operand::{Place, is_memory, mask, sign_extend};
use super::platform::AccessKind;

impl Cpu<'_> {
    /// BT, BTS, BTR, BTC. With a register bit offset, a memory operand is a bit string of any length.
    pub(super) fn bit_test(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 0)?;
        let bits = 8 * bytes as u64;
        let offset = self.read(instruction, 1)?;
        let bit = 1u64 << (offset & (bits - 1));
        let mnemonic = instruction.mnemonic();
        let place = self.bit_place(instruction, bytes, offset)?;
        let change = |a: u64| {
            let value = match mnemonic {
                Mnemonic::Bts => a | bit,
                Mnemonic::Btr => a & !bit,
                Mnemonic::Btc => a ^ bit,
                _ => a,
            };
            (value, a & bit != 0)
        };
        let set = match (place, mnemonic) {
            (Place::Register(register), Mnemonic::Bt) => change(self.get(register)).1,
            (Place::Memory(span), Mnemonic::Bt) => change(self.load(&span)?).1,
            (Place::Register(register), _) => {
                let (value, set) = change(self.get(register));
                self.set(register, value);
                set
            }
            (Place::Memory(span), _) => {
                self.update_span(&span, instruction.has_lock_prefix(), |old| {
                    let (value, set) = change(old as u64);
                    (u128::from(value), set)
                })?
            }
        };
        self.set_flags(CF, if set { CF } else { 0 });
        Ok(())
    }

    fn bit_place(&mut self, instruction: &Instruction, bytes: usize, offset: u64) -> Step<Place> {
        if !is_memory(instruction, 0) {
            return Ok(Place::Register(self.register(instruction, 0)?));
        }
        let kind = if instruction.mnemonic() == Mnemonic::Bt {
            AccessKind::Read
        } else {
            AccessKind::Write
        };
        let string = instruction.op_kind(1) == OpKind::Register;
        let extra = if string {
            let bits = 8 * bytes as i64;
            let index = (sign_extend(offset, bytes) as i64).div_euclid(bits);
            index.wrapping_mul(bytes as i64) as u64
        } else {
            0
        };
        let (segment, address) = self.address_plus(instruction, extra)?;
        let span = self.span(segment, address, bytes, kind)?;
        Ok(Place::Memory(span))
    }

    /// BSF and BSR. A source of 0 leaves the destination alone, as every processor does.
    pub(super) fn bit_scan(&mut self, instruction: &Instruction) -> Step {
        let to = self.register(instruction, 0)?;
        let value = self.read(instruction, 1)?;
        if value == 0 {
            self.set_flags(ZF, ZF);
            return Ok(());
        }
        let index = if instruction.mnemonic() == Mnemonic::Bsf {
            value.trailing_zeros()
        } else {
            63 - value.leading_zeros()
        };
        self.set(to, u64::from(index));
        self.set_flags(ZF, 0);
        Ok(())
    }

    /// TZCNT, LZCNT, POPCNT.
    pub(super) fn bit_count(&mut self, instruction: &Instruction) -> Step {
        let to = self.register(instruction, 0)?;
        let bits = 8 * to.bytes as u32;
        let value = self.read(instruction, 1)?;
        let count = match instruction.mnemonic() {
            Mnemonic::Popcnt => value.count_ones(),
            Mnemonic::Tzcnt => value.trailing_zeros().min(bits),
            _ => value.leading_zeros() - (64 - bits),
        };
        self.set(to, u64::from(count));
        let zero = if count == 0 { ZF } else { 0 };
        if instruction.mnemonic() == Mnemonic::Popcnt {
            self.set_status(zero);
        } else {
            let carry = if value == 0 { CF } else { 0 };
            self.set_flags(CF | ZF, carry | zero);
        }
        Ok(())
    }

    /// ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI, PDEP, PEXT, RORX, SARX, SHLX, SHRX.
    pub(super) fn bit_field(&mut self, instruction: &Instruction) -> Step {
        if self.paragraphs() {
            return invalid_opcode();
        }
        let to = self.register(instruction, 0)?;
        let bytes = to.bytes;
        let bits = 8 * bytes as u64;
        let a = self.read(instruction, 1)?;
        let b = if instruction.op_count() == 3 {
            self.read(instruction, 2)?
        } else {
            0
        };
        let count = (b & (bits - 1)) as u32;
        let carry = |set: bool| Some(if set { CF } else { 0 });
        let (value, flags) = match instruction.mnemonic() {
            Mnemonic::Andn => (!a & b, carry(false)),
            Mnemonic::Bextr => (extract(a, b), carry(false)),
            Mnemonic::Blsi => (a & a.wrapping_neg(), carry(a != 0)),
            Mnemonic::Blsmsk => (a ^ a.wrapping_sub(1), carry(a == 0)),
            Mnemonic::Blsr => (a & a.wrapping_sub(1), carry(a == 0)),
            Mnemonic::Bzhi => {
                let keep = b & 0xff;
                let kept = if keep < bits {
                    a & !(u64::MAX << keep)
                } else {
                    a
                };
                (kept, carry(keep >= bits))
            }
            Mnemonic::Pdep => (deposit(a, b), None),
            Mnemonic::Pext => (gather(a, b), None),
            Mnemonic::Rorx if bytes == 4 => (u64::from((a as u32).rotate_right(count)), None),
            Mnemonic::Rorx => (a.rotate_right(count), None),
            Mnemonic::Sarx => ((sign_extend(a, bytes) as i64 >> count) as u64, None),
            Mnemonic::Shlx => (a << count, None),
            _ => (a >> count, None),
        };
        let value = value & mask(bytes);
        self.set(to, value);
        if let Some(flags) = flags {
            let sign = if sign(value, bytes) != 0 { SF } else { 0 };
            let zero = result_flags(value, bytes) & ZF;
            self.set_flags(CF | ZF | SF | OF, flags | sign | zero);
        }
        Ok(())
    }

    /// MULX.
    pub(super) fn multiply_without_flags(&mut self, instruction: &Instruction) -> Step {
        if self.paragraphs() {
            return invalid_opcode();
        }
        let high = self.register(instruction, 0)?;
        let low = self.register(instruction, 1)?;
        let factor = self.read(instruction, 2)?;
        let product = u128::from(self.part(reg::DX, high.bytes)) * u128::from(factor);
        self.set(low, product as u64);
        self.set(high, (product >> (8 * high.bytes)) as u64);
        Ok(())
    }
}

/// BEXTR: `control` holds the start in bits 7:0 and the length in bits 15:8.
fn extract(value: u64, control: u64) -> u64 {
    let start = control & 0xff;
    let length = control >> 8 & 0xff;
    let shifted = if start < 64 { value >> start } else { 0 };
    if length < 64 {
        shifted & !(u64::MAX << length)
    } else {
        shifted
    }
}

/// PDEP: the low bits of `value` go to the places that `places` has set.
fn deposit(value: u64, places: u64) -> u64 {
    let (mut rest, mut source, mut result) = (places, value, 0);
    while rest != 0 {
        let lowest = rest & rest.wrapping_neg();
        if source & 1 != 0 {
            result |= lowest;
        }
        source >>= 1;
        rest &= rest - 1;
    }
    result
}

/// PEXT: the bits of `value` at the set places of `places`, packed.
fn gather(value: u64, places: u64) -> u64 {
    let (mut rest, mut result, mut to) = (places, 0, 1u64);
    while rest != 0 {
        let lowest = rest & rest.wrapping_neg();
        if value & lowest != 0 {
            result |= to;
        }
        to = to.wrapping_shl(1);
        rest &= rest - 1;
    }
    result
}
