//! SSE and AVX registers, and their moves.

use iced_x86::{Instruction, OpKind, Register};

use super::Vendor;
use super::cpu::{Cpu, reg};
use super::error::{Step, Stop};
use super::memory::Span;
use super::operand::{gpr, is_memory, mask};
use super::platform::AccessKind;
use super::system::MXCSR_MM;

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
pub(super) type Lanes = [u128; 2];

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

pub(super) fn operand_vector(instruction: &Instruction, operand: u32) -> Option<(usize, usize)> {
    if instruction.op_kind(operand) != OpKind::Register {
        return None;
    }
    vector_register(instruction.op_register(operand))
}

pub(super) fn lanes_to_bytes(lanes: Lanes) -> [u8; 32] {
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
    pub(super) fn get_vector(&mut self, index: usize) -> Step<Lanes> {
        let vectors = self.vectors()?;
        let upper = vectors.upper.as_ref().map_or(0, |upper| upper[index & 15]);
        Ok([vectors.xmm[index & 15], upper])
    }

    pub(super) fn set_vector(&mut self, index: usize, lanes: Lanes, encoding: Encoding) -> Step {
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

    /// Whether a memory operand of an operation (not a move) must be aligned. On AMD processors MXCSR.MM lifts the demand
    /// (APM vol. 2, section 4.2.2).
    pub(super) fn operand_alignment(&mut self, encoding: Encoding) -> Step<Alignment> {
        if encoding == Encoding::Vex {
            return Ok(Alignment::Free);
        }
        let lifted = self.options.vendor == Vendor::Amd && self.vectors()?.mxcsr & MXCSR_MM != 0;
        Ok(if lifted {
            Alignment::Free
        } else {
            Alignment::Required
        })
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
            // #AC asks for 16 bytes even of a 32-byte operand, as processors do it.
            Alignment::Free => self.span_of(segment, offset, bytes, 16, kind),
        }
    }

    /// A vector operand, `bytes` (16 or 32) wide, zero above.
    pub(super) fn read_vector(
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
        let segment = self.operand_segment(instruction)?;
        let start = self.part(reg::DI, address_bytes);
        // All 16 bytes must be writable, whichever are chosen.
        let whole = self.span_of(segment, start, 16, 8, AccessKind::Write)?;
        let mut index = 0;
        while index < 16 {
            let length = (index..16).take_while(|&n| chosen(n)).count();
            if length > 0 {
                let (_, rest) = data.split_at(index);
                self.write_span(&whole.part(index, length), rest)?;
            }
            index += length.max(1);
        }
        Ok(())
    }
}
