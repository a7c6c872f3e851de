//! Moves between general registers, memory, immediates and ports.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::Vendor;
use super::cpu::{Cpu, SHADOW_MOV_SS, SegmentName, reg, rflags};
use super::error::{Step, Stop, invalid_opcode};
use super::operand::{gpr, is_memory, mask, segment_name, sign_extend};
use super::platform::AccessKind;

impl Cpu<'_> {
    /// MOV and MOVNTI. Control and debug registers are not covered.
    pub(super) fn mov(&mut self, instruction: &Instruction) -> Step {
        if let Some(name) = operand_segment(instruction, 0) {
            let selector = self.read(instruction, 1)? as u16;
            self.load_segment(name, selector)?;
            if name == SegmentName::Ss {
                self.interrupt_shadow = SHADOW_MOV_SS;
            }
            return Ok(());
        }
        if let Some(name) = operand_segment(instruction, 1) {
            let selector = u64::from(self.segment(name).selector);
            return self.write(instruction, 0, selector);
        }
        if !is_memory(instruction, 0) && gpr(instruction.op0_register()).is_none() {
            return Err(Stop::Unsupported);
        }
        let value = self.read(instruction, 1)?;
        self.write(instruction, 0, value)
    }

    /// MOVZX.
    pub(super) fn move_zero_extended(&mut self, instruction: &Instruction) -> Step {
        let value = self.read(instruction, 1)?;
        self.write(instruction, 0, value)
    }

    /// MOVSX and MOVSXD.
    pub(super) fn move_sign_extended(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 1)?;
        let value = if instruction.code() == Code::Movsxd_r16_rm16
            && is_memory(instruction, 1)
            && self.options.vendor == Vendor::Amd
        {
            // AMD processors read four bytes all the same.
            let span = self.memory(instruction, 4, AccessKind::Read)?;
            self.load(&span)?
        } else {
            self.read(instruction, 1)?
        };
        self.write(instruction, 0, sign_extend(value, bytes))
    }

    /// MOVBE.
    pub(super) fn move_swapped(&mut self, instruction: &Instruction) -> Step {
        let bytes = self.operand_bytes(instruction, 0)?;
        let value = self.read(instruction, 1)?;
        self.write(instruction, 0, swap(value, bytes))
    }

    /// BSWAP. With a 16-bit register the result is undefined; processors clear it.
    pub(super) fn swap_bytes(&mut self, instruction: &Instruction) -> Step {
        let register = self.register(instruction, 0)?;
        let value = match register.bytes {
            2 => 0,
            bytes => swap(self.get(register), bytes),
        };
        self.set(register, value);
        Ok(())
    }

    /// LEA.
    pub(super) fn load_address(&mut self, instruction: &Instruction) -> Step {
        let to = self.register(instruction, 0)?;
        // The segment is of no interest, but `address` wants one.
        let (_, offset) = self.address(instruction)?;
        self.set(to, offset);
        Ok(())
    }

    /// XLAT.
    pub(super) fn translate_byte(&mut self, instruction: &Instruction) -> Step {
        let name = self.operand_segment(instruction)?;
        let base = gpr(instruction.memory_base()).ok_or(Stop::Unsupported)?;
        let offset = self.get(base).wrapping_add(self.part(reg::AX, 1)) & mask(base.bytes);
        let span = self.span(name, offset, 1, AccessKind::Read)?;
        let value = self.load(&span)?;
        self.set_part(reg::AX, 1, value);
        Ok(())
    }

    /// CMOVcc. The source is read whether or not the condition holds.
    pub(super) fn conditional_move(&mut self, instruction: &Instruction, condition: u8) -> Step {
        let to = self.register(instruction, 0)?;
        let value = self.read(instruction, 1)?;
        let value = if self.condition(condition) {
            value
        } else {
            self.get(to)
        };
        self.set(to, value);
        Ok(())
    }

    /// SETcc.
    pub(super) fn set_condition(&mut self, instruction: &Instruction, condition: u8) -> Step {
        let value = u64::from(self.condition(condition));
        self.write(instruction, 0, value)
    }

    /// IN and OUT.
    pub(super) fn port(&mut self, instruction: &Instruction) -> Step {
        let input = instruction.mnemonic() == Mnemonic::In;
        let (data, port) = if input { (0, 1) } else { (1, 0) };
        let data = self.register(instruction, data)?;
        let port = self.read(instruction, port)? as u16;
        self.check_port(port, data.bytes as u16)?;
        if input {
            let value = self.read_port(port, data.bytes)?;
            self.set(data, value);
            Ok(())
        } else {
            self.write_port(port, data.bytes, self.get(data))
        }
    }

    pub(super) fn read_port(&mut self, port: u16, bytes: usize) -> Step<u64> {
        let mut value = [0; 8];
        let (data, _) = value.split_at_mut(bytes.min(4));
        self.platform.pio_read(port, data)?;
        Ok(u64::from_le_bytes(value))
    }

    pub(super) fn write_port(&mut self, port: u16, bytes: usize, value: u64) -> Step {
        let value = value.to_le_bytes();
        let (data, _) = value.split_at(bytes.min(4));
        self.platform.pio_write(port, data)?;
        Ok(())
    }

    /// LDS, LES, LFS, LGS, LSS.
    pub(super) fn load_far_pointer(&mut self, instruction: &Instruction) -> Step {
        let to = self.register(instruction, 0)?;
        let name = match instruction.mnemonic() {
            Mnemonic::Lds => SegmentName::Ds,
            Mnemonic::Les => SegmentName::Es,
            Mnemonic::Lfs => SegmentName::Fs,
            Mnemonic::Lgs => SegmentName::Gs,
            _ => SegmentName::Ss,
        };
        let span = self.memory(instruction, to.bytes + 2, AccessKind::Read)?;
        let pointer = self.load_wide(&span)?;
        self.load_segment(name, (pointer >> (8 * to.bytes)) as u16)?;
        self.set(to, pointer as u64);
        Ok(())
    }

    /// The opcodes that are reserved for hints. 0F 0D, a prefetch on AMD, is #UD there with a register.
    pub(super) fn reserved_nop(&self, instruction: &Instruction) -> Step {
        let prefetch = matches!(
            instruction.code(),
            Code::Reservednop_rm16_r16_0F0D
                | Code::Reservednop_rm32_r32_0F0D
                | Code::Reservednop_rm64_r64_0F0D
        );
        if prefetch && !is_memory(instruction, 0) && self.options.vendor == Vendor::Amd {
            return invalid_opcode();
        }
        Ok(())
    }

    /// SALC.
    pub(super) fn set_al_from_carry(&mut self) -> Step {
        let value = if self.flag(rflags::CF) { 0xff } else { 0 };
        self.set_part(reg::AX, 1, value);
        Ok(())
    }
}

/// Reverses the low `bytes` bytes.
fn swap(value: u64, bytes: usize) -> u64 {
    value.swap_bytes() >> (64 - 8 * bytes as u32)
}

fn operand_segment(instruction: &Instruction, operand: u32) -> Option<SegmentName> {
    if instruction.op_kind(operand) != OpKind::Register {
        return None;
    }
    match instruction.op_register(operand) {
        Register::None => None,
        register => segment_name(register),
    }
}
