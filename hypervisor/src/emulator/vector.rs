//! SSE and AVX: moves, and the integer operations that kernels use.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::cpu::rflags::{CF, ZF};
use super::cpu::{Cpu, reg};
use super::error::{Step, Stop};
use super::memory::Span;
use super::operand::{gpr, is_memory, mask, segment_name};
use super::platform::AccessKind;

/// How an instruction is encoded, which decides what becomes of a register's upper half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    /// SSE: bits above 127 stay.
    Legacy,
    /// AVX: bits above the operand become zero.
    Vex,
}

/// Whether a 16- or 32-byte memory operand must be aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alignment {
    Required,
    Free,
}

/// Bits 127:0 and 255:128.
type Lanes = [u128; 2];

/// Index and width in bytes of a vector register.
fn vector_register(register: Register) -> Option<(usize, usize)> {
    let number = register as usize;
    let (xmm, ymm) = (Register::XMM0 as usize, Register::YMM0 as usize);
    if (xmm..xmm + 16).contains(&number) {
        Some((number - xmm, 16))
    } else if (ymm..ymm + 16).contains(&number) {
        Some((number - ymm, 32))
    } else {
        None
    }
}

fn operand_vector(instruction: &Instruction, operand: u32) -> Option<(usize, usize)> {
    if instruction.op_kind(operand) != OpKind::Register {
        return None;
    }
    vector_register(instruction.op_register(operand))
}

fn lanes_to_bytes(lanes: Lanes) -> [u8; 32] {
    let mut data = [0; 32];
    let (low, high) = data.split_at_mut(16);
    low.copy_from_slice(&lanes[0].to_le_bytes());
    high.copy_from_slice(&lanes[1].to_le_bytes());
    data
}

fn bytes_to_lanes(data: &[u8; 32]) -> Lanes {
    let mut lanes = [[0; 16]; 2];
    for (lane, chunk) in lanes.iter_mut().zip(data.chunks_exact(16)) {
        lane.copy_from_slice(chunk);
    }
    lanes.map(u128::from_le_bytes)
}

impl Cpu<'_> {
    fn get_vector(&mut self, index: usize) -> Step<Lanes> {
        let vectors = self.vectors()?;
        let upper = vectors.upper.as_ref().map_or(0, |upper| upper[index & 15]);
        Ok([vectors.xmm[index & 15], upper])
    }

    fn set_vector(&mut self, index: usize, lanes: Lanes, encoding: Encoding) -> Step {
        let index = index & 15;
        let vectors = self.vectors_mut()?;
        vectors.xmm[index] = lanes[0];
        if encoding == Encoding::Vex {
            vectors.zero_above |= 1 << index;
            if let Some(upper) = &mut vectors.upper {
                upper[index] = lanes[1];
            }
        }
        Ok(())
    }

    fn vector_span(
        &mut self,
        instruction: &Instruction,
        bytes: usize,
        kind: AccessKind,
        alignment: Alignment,
    ) -> Step<Span> {
        let (segment, offset) = self.address(instruction)?;
        match alignment {
            Alignment::Required => self.aligned_span(segment, offset, bytes, kind),
            Alignment::Free => self.span(segment, offset, bytes, kind),
        }
    }

    /// A vector operand, `bytes` (16 or 32) wide, zero above.
    fn read_vector(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        bytes: usize,
        alignment: Alignment,
    ) -> Step<Lanes> {
        if let Some((index, _)) = operand_vector(instruction, operand) {
            let [low, high] = self.get_vector(index)?;
            return Ok([low, if bytes == 32 { high } else { 0 }]);
        }
        if !is_memory(instruction, operand) {
            return Err(Stop::Unsupported);
        }
        let span = self.vector_span(instruction, bytes, AccessKind::Read, alignment)?;
        let mut data = [0; 32];
        self.read_span(&span, &mut data)?;
        Ok(bytes_to_lanes(&data))
    }

    /// The low `bytes` (up to 8) of a vector register, a general register or memory.
    fn read_low(&mut self, instruction: &Instruction, operand: u32, bytes: usize) -> Step<u64> {
        if let Some((index, _)) = operand_vector(instruction, operand) {
            return Ok(self.get_vector(index)?[0] as u64 & mask(bytes));
        }
        if is_memory(instruction, operand) {
            let span = self.memory(instruction, bytes, AccessKind::Read)?;
            return self.load(&span);
        }
        Ok(self.get(self.register(instruction, operand)?) & mask(bytes))
    }

    fn write_low(&mut self, instruction: &Instruction, bytes: usize, value: u64) -> Step {
        if is_memory(instruction, 0) {
            let span = self.memory(instruction, bytes, AccessKind::Write)?;
            return self.store(&span, value);
        }
        let register = self.register(instruction, 0)?;
        self.set(register, value);
        Ok(())
    }

    /// MOVAPS and all other moves of a whole register.
    pub(super) fn vector_move(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        alignment: Alignment,
    ) -> Step {
        let operands = (
            operand_vector(instruction, 0),
            operand_vector(instruction, 1),
        );
        let Some(bytes) = operands.0.or(operands.1).map(|(_, bytes)| bytes) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let lanes = self.read_vector(instruction, 1, bytes, alignment)?;
        if let Some((index, _)) = operands.0 {
            return self.set_vector(index, lanes, encoding);
        }
        let span = self.vector_span(instruction, bytes, AccessKind::Write, alignment)?;
        self.write_span(&span, &lanes_to_bytes(lanes))
    }

    /// MOVD and MOVQ, but for the MMX forms.
    pub(super) fn vector_word(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        bytes: usize,
    ) -> Step {
        let known = |operand| {
            is_memory(instruction, operand)
                || operand_vector(instruction, operand).is_some()
                || gpr(instruction.op_register(operand)).is_some()
        };
        if !known(0) || !known(1) {
            return Err(Stop::Unsupported);
        }
        self.check_vectors(encoding)?;
        let value = self.read_low(instruction, 1, bytes)?;
        match operand_vector(instruction, 0) {
            Some((index, _)) => self.set_vector(index, [u128::from(value), 0], encoding),
            None => self.write_low(instruction, bytes, value),
        }
    }

    /// MOVSS and MOVSD.
    pub(super) fn vector_scalar(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        bytes: usize,
    ) -> Step {
        self.check_vectors(encoding)?;
        let last = instruction.op_count() - 1;
        let value = self.read_low(instruction, last, bytes)?;
        let Some((index, _)) = operand_vector(instruction, 0) else {
            return self.write_low(instruction, bytes, value);
        };
        let merged = if is_memory(instruction, last) {
            u128::from(value)
        } else {
            let rest = self.read_vector(instruction, last - 1, 16, Alignment::Free)?[0];
            rest & !u128::from(mask(bytes)) | u128::from(value)
        };
        self.set_vector(index, [merged, 0], encoding)
    }

    /// MOVLPS, MOVHPS, MOVLPD, MOVHPD, MOVHLPS, MOVLHPS: one half of a register.
    pub(super) fn vector_half(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        from_high: bool,
        to_high: bool,
    ) -> Step {
        self.check_vectors(encoding)?;
        let last = instruction.op_count() - 1;
        let value = if is_memory(instruction, last) {
            self.read_low(instruction, last, 8)?
        } else {
            let lane = self.read_vector(instruction, last, 16, Alignment::Free)?[0];
            (if from_high { lane >> 64 } else { lane }) as u64
        };
        let Some((index, _)) = operand_vector(instruction, 0) else {
            return self.write_low(instruction, 8, value);
        };
        // Two operands: the other half is the destination's own. Three: it is the second's.
        let other = if last == 2 { 1 } else { 0 };
        let old = self.read_vector(instruction, other, 16, Alignment::Free)?[0];
        let merged = if to_high {
            old & u128::from(u64::MAX) | u128::from(value) << 64
        } else {
            old & !u128::from(u64::MAX) | u128::from(value)
        };
        self.set_vector(index, [merged, 0], encoding)
    }

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
        let (first, alignment) = match encoding {
            Encoding::Legacy => (0, Alignment::Required),
            Encoding::Vex => (1, Alignment::Free),
        };
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
        let alignment = match encoding {
            Encoding::Legacy => Alignment::Required,
            Encoding::Vex => Alignment::Free,
        };
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

    /// PSHUFD.
    pub(super) fn vector_shuffle(&mut self, instruction: &Instruction, encoding: Encoding) -> Step {
        let Some((to, bytes)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let alignment = match encoding {
            Encoding::Legacy => Alignment::Required,
            Encoding::Vex => Alignment::Free,
        };
        let order = instruction.immediate8();
        let lanes = self.read_vector(instruction, 1, bytes, alignment)?;
        let shuffled = lanes.map(|lane| {
            (0..4u32).fold(0, |result, n| {
                let from = order >> (2 * n) & 3;
                let element = lane >> (32 * u32::from(from)) & 0xffff_ffff;
                result | element << (32 * n)
            })
        });
        self.set_vector(to, shuffled, encoding)
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

    /// PEXTRB, PEXTRW, PEXTRD, PEXTRQ: an element of `width` bytes to a register or memory.
    pub(super) fn vector_extract(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        width: usize,
    ) -> Step {
        let Some((from, _)) = operand_vector(instruction, 1) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let index = usize::from(instruction.immediate8()) & (16 / width - 1);
        let value = (self.get_vector(from)?[0] >> (8 * width * index)) as u64 & mask(width);
        self.write_low(instruction, width, value)
    }

    /// PINSRB, PINSRW, PINSRD, PINSRQ.
    pub(super) fn vector_insert(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
        width: usize,
    ) -> Step {
        let Some((to, _)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let source = instruction.op_count() - 2;
        let old = self.read_vector(instruction, source - 1, 16, Alignment::Free)?[0];
        let value = self.read_low(instruction, source, width)?;
        let shift = 8 * width * (usize::from(instruction.immediate8()) & (16 / width - 1));
        let merged = old & !(u128::from(mask(width)) << shift) | u128::from(value) << shift;
        self.set_vector(to, [merged, 0], encoding)
    }

    /// VEXTRACTF128 and VEXTRACTI128.
    pub(super) fn vector_extract_lane(&mut self, instruction: &Instruction) -> Step {
        let Some((from, _)) = operand_vector(instruction, 1) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(Encoding::Vex)?;
        let lanes = self.get_vector(from)?;
        let lane = lanes[usize::from(instruction.immediate8() & 1)];
        if let Some((to, _)) = operand_vector(instruction, 0) {
            return self.set_vector(to, [lane, 0], Encoding::Vex);
        }
        let span = self.vector_span(instruction, 16, AccessKind::Write, Alignment::Free)?;
        self.write_span(&span, &lane.to_le_bytes())
    }

    /// VINSERTF128 and VINSERTI128.
    pub(super) fn vector_insert_lane(&mut self, instruction: &Instruction) -> Step {
        let Some((to, _)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(Encoding::Vex)?;
        let mut lanes = self.read_vector(instruction, 1, 32, Alignment::Free)?;
        let lane = self.read_vector(instruction, 2, 16, Alignment::Free)?[0];
        lanes[usize::from(instruction.immediate8() & 1)] = lane;
        self.set_vector(to, lanes, Encoding::Vex)
    }

    /// VPBROADCASTB/W/D/Q, VBROADCASTSS/SD and VBROADCASTF128/I128: an element of `width` bytes everywhere.
    pub(super) fn vector_broadcast(&mut self, instruction: &Instruction, width: usize) -> Step {
        let Some((to, bytes)) = operand_vector(instruction, 0) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(Encoding::Vex)?;
        let lane = if width == 16 {
            self.read_vector(instruction, 1, 16, Alignment::Free)?[0]
        } else {
            let element = u128::from(self.read_low(instruction, 1, width)?);
            (0..16 / width).fold(0, |lane, n| lane | element << (8 * width * n))
        };
        let upper = if bytes == 32 { lane } else { 0 };
        self.set_vector(to, [lane, upper], Encoding::Vex)
    }

    /// VZEROUPPER and VZEROALL.
    pub(super) fn vector_zero(&mut self, all: bool) -> Step {
        self.check_vectors(Encoding::Vex)?;
        let count = if self.is_64bit() { 16 } else { 8 };
        for index in 0..count {
            let low = if all { 0 } else { self.get_vector(index)?[0] };
            self.set_vector(index, [low, 0], Encoding::Vex)?;
        }
        Ok(())
    }

    /// MASKMOVDQU: the bytes whose mask byte has its top bit set, at rDI. Each run of them is one write.
    pub(super) fn vector_masked_store(
        &mut self,
        instruction: &Instruction,
        encoding: Encoding,
    ) -> Step {
        let count = instruction.op_count();
        let (Some((data, _)), Some((selected, _))) = (
            operand_vector(instruction, count - 2),
            operand_vector(instruction, count - 1),
        ) else {
            return Err(Stop::Unsupported);
        };
        self.check_vectors(encoding)?;
        let address_bytes = match instruction.op0_kind() {
            OpKind::MemorySegDI => 2,
            OpKind::MemorySegEDI => 4,
            _ => 8,
        };
        let data = self.get_vector(data)?[0].to_le_bytes();
        let selected = self.get_vector(selected)?[0].to_le_bytes();
        let chosen = |index: usize| selected.get(index).is_some_and(|byte| byte & 0x80 != 0);
        let segment = segment_name(instruction.memory_segment()).ok_or(Stop::Unsupported)?;
        let start = self.part(reg::DI, address_bytes);
        let mut runs = [None; 8];
        let (mut index, mut used) = (0, 0);
        while index < 16 {
            let length = (index..16).take_while(|&n| chosen(n)).count();
            if length > 0 {
                let offset = start.wrapping_add(index as u64) & mask(address_bytes);
                let linear = self.linear(segment, offset, length as u64, AccessKind::Write)?;
                let span = self.span_at(linear, length, AccessKind::Write)?;
                if let Some(run) = runs.get_mut(used) {
                    *run = Some((span, index));
                }
                used += 1;
            }
            index += length.max(1);
        }
        for (span, index) in runs.into_iter().flatten() {
            let (_, rest) = data.split_at(index);
            self.write_span(&span, rest)?;
        }
        Ok(())
    }
}

/// Applies an operation to every element of `width` bytes.
fn elements(a: u128, b: u128, width: usize, operation: impl Fn(u64, u64) -> u64) -> u128 {
    (0..16 / width).fold(0, |result, n| {
        let shift = 8 * width * n;
        let element = |value: u128| (value >> shift) as u64 & mask(width);
        let value = operation(element(a), element(b)) & mask(width);
        result | u128::from(value) << shift
    })
}

/// What [`Cpu::vector_binary`] can do.
pub(super) mod lane {
    use super::elements;
    use crate::emulator::operand::sign_extend;

    fn all_ones(condition: bool) -> u64 {
        if condition { u64::MAX } else { 0 }
    }

    pub(in crate::emulator) fn xor(a: u128, b: u128) -> u128 {
        a ^ b
    }

    pub(in crate::emulator) fn or(a: u128, b: u128) -> u128 {
        a | b
    }

    pub(in crate::emulator) fn and(a: u128, b: u128) -> u128 {
        a & b
    }

    pub(in crate::emulator) fn and_not(a: u128, b: u128) -> u128 {
        !a & b
    }

    pub(in crate::emulator) fn add<const WIDTH: usize>(a: u128, b: u128) -> u128 {
        elements(a, b, WIDTH, u64::wrapping_add)
    }

    pub(in crate::emulator) fn sub<const WIDTH: usize>(a: u128, b: u128) -> u128 {
        elements(a, b, WIDTH, u64::wrapping_sub)
    }

    pub(in crate::emulator) fn equal<const WIDTH: usize>(a: u128, b: u128) -> u128 {
        elements(a, b, WIDTH, |a, b| all_ones(a == b))
    }

    pub(in crate::emulator) fn greater<const WIDTH: usize>(a: u128, b: u128) -> u128 {
        elements(a, b, WIDTH, |a, b| {
            all_ones(sign_extend(a, WIDTH) as i64 > sign_extend(b, WIDTH) as i64)
        })
    }

    pub(in crate::emulator) fn minimum_bytes(a: u128, b: u128) -> u128 {
        elements(a, b, 1, u64::min)
    }

    pub(in crate::emulator) fn maximum_bytes(a: u128, b: u128) -> u128 {
        elements(a, b, 1, u64::max)
    }

    pub(in crate::emulator) fn unpack_low<const WIDTH: usize>(a: u128, b: u128) -> u128 {
        let half = u128::from(u64::MAX);
        interleave(a & half, b & half, WIDTH)
    }

    pub(in crate::emulator) fn unpack_high<const WIDTH: usize>(a: u128, b: u128) -> u128 {
        interleave(a >> 64, b >> 64, WIDTH)
    }

    fn interleave(a: u128, b: u128, width: usize) -> u128 {
        let mask = u128::from(crate::emulator::operand::mask(width));
        (0..8 / width).fold(0, |result, n| {
            let from = 8 * width * n;
            let to = 2 * from;
            result | (a >> from & mask) << to | (b >> from & mask) << (to + 8 * width)
        })
    }
}
