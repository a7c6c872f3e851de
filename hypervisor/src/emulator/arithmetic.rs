//! Integer arithmetic and logic, and the exchanges that go with LOCK.

use iced_x86::{Code, Instruction, Mnemonic};

use super::alu::{self, add, logic, sub};
use super::cpu::rflags::{self, AF, CF, OF, STATUS, ZF};
use super::cpu::{Cpu, reg};
use super::error::{Exception, Step, Stop, invalid_opcode, vector};
use super::operand::{Gpr, Place, is_memory, mask, sign_extend};
use super::platform::AccessKind;

impl Cpu<'_> {
    /// ADD, ADC, SUB, SBB, AND, OR, XOR.
    pub(super) fn binary(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 0)?;
        let b = self.read(instruction, 1)?;
        let carry = self.flag(CF);
        let mnemonic = instruction.mnemonic();
        let flags = self.update(instruction, |a| match mnemonic {
            Mnemonic::Add => add(bytes, a, b, false),
            Mnemonic::Adc => add(bytes, a, b, carry),
            Mnemonic::Sub => sub(bytes, a, b, false),
            Mnemonic::Sbb => sub(bytes, a, b, carry),
            Mnemonic::And => logic(bytes, a & b),
            Mnemonic::Or => logic(bytes, a | b),
            _ => logic(bytes, a ^ b),
        })?;
        self.set_status(flags);
        Ok(())
    }

    /// CMP and TEST.
    pub(super) fn compare(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 0)?;
        let a = self.read(instruction, 0)?;
        let b = self.read(instruction, 1)?;
        let (_, flags) = if instruction.mnemonic() == Mnemonic::Cmp {
            sub(bytes, a, b, false)
        } else {
            logic(bytes, a & b)
        };
        self.set_status(flags);
        Ok(())
    }

    /// NOT, NEG, INC, DEC.
    pub(super) fn unary(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 0)?;
        let mnemonic = instruction.mnemonic();
        let flags = self.update(instruction, |a| match mnemonic {
            Mnemonic::Not => (!a & mask(bytes), 0),
            Mnemonic::Neg => sub(bytes, 0, a, false),
            Mnemonic::Inc => add(bytes, a, 1, false),
            _ => sub(bytes, a, 1, false),
        })?;
        match mnemonic {
            Mnemonic::Not => {}
            Mnemonic::Neg => self.set_status(flags),
            _ => self.set_flags(STATUS & !CF, flags),
        }
        Ok(())
    }

    /// MUL and the one-operand IMUL.
    pub(super) fn multiply(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 0)?;
        let factor = self.read(instruction, 0)?;
        let a = self.part(reg::AX, bytes);
        let (low, high, overflow) = if instruction.mnemonic() == Mnemonic::Mul {
            let product = u128::from(a) * u128::from(factor);
            let high = (product >> (8 * bytes)) as u64 & mask(bytes);
            (product as u64 & mask(bytes), high, high != 0)
        } else {
            signed_product(bytes, a, factor)
        };
        if bytes == 1 {
            self.set_part(reg::AX, 2, high << 8 | low);
        } else {
            self.set_part(reg::AX, bytes, low);
            self.set_part(reg::DX, bytes, high);
        }
        self.multiply_flags(bytes, low, overflow);
        Ok(())
    }

    /// IMUL with two or three operands.
    pub(super) fn multiply_signed(&mut self, instruction: &Instruction) -> Step {
        let to = self.register(instruction, 0)?;
        let (a, b) = if instruction.op_count() == 3 {
            (self.read(instruction, 1)?, self.read(instruction, 2)?)
        } else {
            (self.get(to), self.read(instruction, 1)?)
        };
        let (low, _, overflow) = signed_product(to.bytes, a, b & mask(to.bytes));
        self.set(to, low);
        self.multiply_flags(to.bytes, low, overflow);
        Ok(())
    }

    /// CF and OF say that the upper half matters; the others are undefined.
    fn multiply_flags(&mut self, bytes: usize, low: u64, overflow: bool) {
        let carry = if overflow { CF | OF } else { 0 };
        self.set_status(alu::result_flags(low, bytes) & !ZF | carry);
    }

    /// DIV and IDIV.
    pub(super) fn divide(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 0)?;
        let divisor = self.read(instruction, 0)?;
        let bits = 8 * bytes as u32;
        let dividend = if bytes == 1 {
            u128::from(self.part(reg::AX, 2))
        } else {
            u128::from(self.part(reg::DX, bytes)) << bits | u128::from(self.part(reg::AX, bytes))
        };
        let divided = if instruction.mnemonic() == Mnemonic::Div {
            unsigned_quotient(bytes, dividend, divisor)
        } else {
            signed_quotient(bytes, dividend, divisor)
        };
        let Some((quotient, remainder)) = divided else {
            return Err(Exception::fault(vector::DE).into());
        };
        if bytes == 1 {
            self.set_part(reg::AX, 2, (remainder & mask(1)) << 8 | quotient & mask(1));
        } else {
            self.set_part(reg::AX, bytes, quotient);
            self.set_part(reg::DX, bytes, remainder);
        }
        Ok(())
    }

    /// XADD.
    pub(super) fn exchange_add(&mut self, instruction: &Instruction) -> Step {
        let from = self.register(instruction, 1)?;
        let b = self.get(from);
        let place = self.place(instruction, 0)?;
        let change = |a: u64| {
            let (sum, flags) = add(from.bytes, a, b, false);
            (sum, (a, flags))
        };
        let (old, flags) = match place {
            Place::Register(to) => {
                let (sum, (old, flags)) = change(self.get(to));
                // The source first: where both are the same register, the sum stays.
                self.set(from, old);
                self.set(to, sum);
                self.set_status(flags);
                return Ok(());
            }
            Place::Memory(span) => {
                self.update_span(&span, instruction.has_lock_prefix(), |old| {
                    let (sum, result) = change(old as u64);
                    (u128::from(sum), result)
                })?
            }
        };
        self.set(from, old);
        self.set_status(flags);
        Ok(())
    }

    /// XCHG; with memory it is atomic whether or not there is a LOCK prefix.
    pub(super) fn exchange_operands(&mut self, instruction: &Instruction) -> Step {
        let memory = u32::from(is_memory(instruction, 1));
        let other = self.register(instruction, 1 - memory)?;
        let value = self.get(other);
        match self.place(instruction, memory)? {
            Place::Register(register) => {
                let old = self.get(register);
                self.set(register, value);
                self.set(other, old);
            }
            Place::Memory(span) => {
                let old = self.update_span(&span, true, |old| (u128::from(value), old as u64))?;
                self.set(other, old);
            }
        }
        Ok(())
    }

    /// CMPXCHG. The destination is written back unchanged on a mismatch if it is memory, as the processor does.
    pub(super) fn compare_exchange(&mut self, instruction: &Instruction) -> Step {
        let from = self.register(instruction, 1)?;
        let bytes = from.bytes;
        let value = self.get(from);
        let expected = self.part(reg::AX, bytes);
        let old = match self.place(instruction, 0)? {
            Place::Register(to) => {
                let old = self.get(to);
                // A mismatch leaves the register alone, including the upper half of a 32-bit one.
                if old == expected {
                    self.set(to, value);
                }
                old
            }
            Place::Memory(span) => {
                self.update_span(&span, instruction.has_lock_prefix(), |old| {
                    let old = old as u64;
                    let new = if old == expected { value } else { old };
                    (u128::from(new), old)
                })?
            }
        };
        let (_, flags) = sub(bytes, expected, old, false);
        if old != expected {
            self.set_part(reg::AX, bytes, old);
        }
        self.set_status(flags);
        Ok(())
    }

    /// CMPXCHG8B and CMPXCHG16B.
    pub(super) fn compare_exchange_double(&mut self, instruction: &Instruction) -> Step {
        let half = if instruction.mnemonic() == Mnemonic::Cmpxchg16b {
            8
        } else {
            4
        };
        let bits = 8 * half as u32;
        let pair = |high: u64, low: u64| u128::from(high) << bits | u128::from(low);
        let expected = pair(self.part(reg::DX, half), self.part(reg::AX, half));
        let value = pair(self.part(reg::CX, half), self.part(reg::BX, half));
        let (segment, offset) = self.address(instruction)?;
        let span = if half == 8 {
            self.aligned_span(segment, offset, 16, AccessKind::Write)?
        } else {
            self.span(segment, offset, 8, AccessKind::Write)?
        };
        let old = self.update_span(&span, instruction.has_lock_prefix(), |old| {
            if old == expected {
                (value, old)
            } else {
                (old, old)
            }
        })?;
        if old == expected {
            self.set_flags(ZF, ZF);
        } else {
            self.set_part(reg::AX, half, old as u64 & mask(half));
            self.set_part(reg::DX, half, (old >> bits) as u64 & mask(half));
            self.set_flags(ZF, 0);
        }
        Ok(())
    }

    /// ADCX and ADOX.
    pub(super) fn add_carry_only(&mut self, instruction: &Instruction) -> Step {
        let to = self.register(instruction, 0)?;
        let b = self.read(instruction, 1)?;
        let flag = if instruction.mnemonic() == Mnemonic::Adcx {
            CF
        } else {
            OF
        };
        let (sum, flags) = add(to.bytes, self.get(to), b, self.flag(flag));
        self.set(to, sum);
        self.set_flags(flag, if flags & CF != 0 { flag } else { 0 });
        Ok(())
    }

    /// DAA, DAS, AAA, AAS, AAM, AAD (16- and 32-bit modes only).
    pub(super) fn decimal(&mut self, instruction: &Instruction) -> Step {
        let al = self.part(reg::AX, 1);
        let low_digit = al & 0xf > 9 || self.flag(AF);
        match instruction.mnemonic() {
            mnemonic @ (Mnemonic::Daa | Mnemonic::Das) => {
                let up = mnemonic == Mnemonic::Daa;
                let adjust = |value: u64, by: u64| {
                    if up {
                        value.wrapping_add(by)
                    } else {
                        value.wrapping_sub(by)
                    }
                };
                let high_digit = al > 0x99 || self.flag(CF);
                let mut value = al;
                let mut flags = 0;
                if low_digit {
                    flags |= AF;
                    value = adjust(value, 6);
                    // DAS keeps the borrow of this step even where the next is not taken.
                    if !up && al < 6 {
                        flags |= CF;
                    }
                }
                if high_digit {
                    flags |= CF;
                    value = adjust(value, 0x60);
                }
                self.set_part(reg::AX, 1, value);
                self.set_status(flags | alu::result_flags(value, 1));
            }
            mnemonic @ (Mnemonic::Aaa | Mnemonic::Aas) => {
                let ax = self.part(reg::AX, 2);
                let value = match (low_digit, mnemonic == Mnemonic::Aaa) {
                    (false, _) => ax,
                    (true, true) => ax.wrapping_add(0x106),
                    (true, false) => ax.wrapping_sub(0x106),
                };
                self.set_part(reg::AX, 2, value & 0xff0f);
                let carry = if low_digit { AF | CF } else { 0 };
                self.set_status(carry | alu::result_flags(value & 0xf, 1));
            }
            Mnemonic::Aam => {
                let base = self.read(instruction, 0)? & 0xff;
                if base == 0 {
                    return Err(Exception::fault(vector::DE).into());
                }
                self.set_part(reg::AX, 2, ((al / base) << 8) | (al % base));
                self.set_status(alu::result_flags(al % base, 1));
            }
            _ => {
                let base = self.read(instruction, 0)? & 0xff;
                let ah = self.part(reg::AX, 2) >> 8;
                let value = al.wrapping_add(ah.wrapping_mul(base)) & 0xff;
                self.set_part(reg::AX, 2, value);
                self.set_status(alu::result_flags(value, 1));
            }
        }
        Ok(())
    }

    /// BOUND.
    pub(super) fn bound(&mut self, instruction: &Instruction) -> Step {
        let index = self.register(instruction, 0)?;
        let bytes = index.bytes;
        let value = sign_extend(self.get(index), bytes) as i64;
        let mut bounds = [0; 2];
        for (bound, extra) in bounds.iter_mut().zip([0, bytes as u64]) {
            let (segment, offset) = self.address_plus(instruction, extra)?;
            let span = self.span(segment, offset, bytes, AccessKind::Read)?;
            *bound = sign_extend(self.load(&span)?, bytes) as i64;
        }
        let [lower, upper] = bounds;
        if value < lower || value > upper {
            return Err(Exception::fault(vector::BR).into());
        }
        Ok(())
    }

    /// CRC32: polynomial 11EDC6F41H, reflected.
    pub(super) fn crc32(&mut self, instruction: &Instruction) -> Step {
        let to = self.register(instruction, 0)?;
        let bytes = self.operand_bytes(instruction, 1)?;
        let data = self.read(instruction, 1)?;
        let mut crc = self.part(to.index, 4) as u32;
        for byte in data.to_le_bytes().iter().take(bytes) {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                let polynomial = if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
                crc = crc >> 1 ^ polynomial;
            }
        }
        self.set(to, u64::from(crc));
        Ok(())
    }

    /// CBW, CWDE, CDQE, CWD, CDQ, CQO.
    pub(super) fn widen(&mut self, instruction: &Instruction) -> Step {
        let (bytes, into_dx) = match instruction.code() {
            Code::Cbw => (2, false),
            Code::Cwde => (4, false),
            Code::Cdqe => (8, false),
            Code::Cwd => (2, true),
            Code::Cdq => (4, true),
            Code::Cqo => (8, true),
            _ => return Err(Stop::Unsupported),
        };
        if into_dx {
            let negative = alu::sign(self.regs[reg::AX], bytes) != 0;
            self.set_part(reg::DX, bytes, if negative { u64::MAX } else { 0 });
        } else {
            let value = sign_extend(self.regs[reg::AX], bytes / 2);
            self.set_part(reg::AX, bytes, value);
        }
        Ok(())
    }

    /// CLC, STC, CMC, CLD, STD, LAHF, SAHF, CLAC, STAC.
    pub(super) fn flag_instruction(&mut self, instruction: &Instruction) -> Step {
        let low = STATUS & 0xff;
        match instruction.mnemonic() {
            Mnemonic::Clc => self.flags &= !CF,
            Mnemonic::Stc => self.flags |= CF,
            Mnemonic::Cmc => self.flags ^= CF,
            Mnemonic::Cld => self.flags &= !rflags::DF,
            Mnemonic::Std => self.flags |= rflags::DF,
            Mnemonic::Lahf => {
                let value = self.flags & low | 2;
                self.set(
                    Gpr {
                        index: reg::AX,
                        bytes: 1,
                        high: true,
                    },
                    value,
                );
            }
            Mnemonic::Sahf => {
                let value = self.part(reg::AX, 2) >> 8;
                self.set_flags(low, value);
            }
            mnemonic @ (Mnemonic::Clac | Mnemonic::Stac) => {
                if self.cpl != 0 || self.virtual_8086() {
                    return invalid_opcode();
                }
                if mnemonic == Mnemonic::Stac {
                    self.flags |= rflags::AC;
                } else {
                    self.flags &= !rflags::AC;
                }
            }
            _ => return Err(Stop::Unsupported),
        }
        Ok(())
    }
}

fn signed_product(bytes: usize, a: u64, b: u64) -> (u64, u64, bool) {
    let a = i128::from(sign_extend(a, bytes) as i64);
    let b = i128::from(sign_extend(b, bytes) as i64);
    let product = a * b;
    let low = product as u64 & mask(bytes);
    let high = (product >> (8 * bytes)) as u64 & mask(bytes);
    let fits = i128::from(sign_extend(low, bytes) as i64) == product;
    (low, high, !fits)
}

fn unsigned_quotient(bytes: usize, dividend: u128, divisor: u64) -> Option<(u64, u64)> {
    let quotient = dividend.checked_div(u128::from(divisor))?;
    let remainder = dividend.checked_rem(u128::from(divisor))?;
    (quotient <= u128::from(mask(bytes))).then_some((quotient as u64, remainder as u64))
}

fn signed_quotient(bytes: usize, dividend: u128, divisor: u64) -> Option<(u64, u64)> {
    let unused = 128 - 16 * bytes as u32;
    let dividend = (dividend << unused) as i128 >> unused;
    let divisor = i128::from(sign_extend(divisor, bytes) as i64);
    let quotient = dividend.checked_div(divisor)?;
    let remainder = dividend.checked_rem(divisor)?;
    let low = quotient as u64 & mask(bytes);
    let fits = i128::from(sign_extend(low, bytes) as i64) == quotient;
    fits.then_some((low, remainder as u64 & mask(bytes)))
}
