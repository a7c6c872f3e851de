//! String instructions and their repetition.
//!
//! ```text
//!   count 0? ──► done
//!   ┌─► element: check, read, write ── fault ──► registers keep the completed elements
//!   │   advance rSI/rDI, count down
//!   │   count 0, or REPE/REPNE condition fails ──► done
//!   └── fewer than max_iterations done            otherwise ──► Repeating
//! ```

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu;
use super::cpu::rflags::{DF, TF, ZF};
use super::cpu::{Cpu, Finish, SegmentName, reg};
use super::error::{Step, Stop};
use super::memory::Span;
use super::operand::mask;
use super::platform::AccessKind;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StringOp {
    Move,
    Store,
    Load,
    Compare,
    Scan,
    Input,
    Output,
}

/// What stays the same over the repetitions.
#[derive(Clone, Copy)]
struct Shape {
    op: StringOp,
    /// Element width.
    bytes: usize,
    /// Address size.
    address_bytes: usize,
    source: SegmentName,
    step: u64,
}

impl Cpu<'_> {
    pub(super) fn string(&mut self, instruction: &Instruction, op: StringOp) -> Step {
        let bytes = instruction.memory_size().size();
        if !matches!(bytes, 1 | 2 | 4 | 8) {
            return Err(Stop::Unsupported);
        }
        let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        let shape = Shape {
            op,
            bytes,
            address_bytes: address_bytes(instruction)?,
            source: self.operand_segment(instruction).unwrap_or(SegmentName::Ds),
            step: if self.flag(DF) {
                (bytes as u64).wrapping_neg()
            } else {
                bytes as u64
            },
        };
        if matches!(op, StringOp::Input | StringOp::Output) {
            let port = self.part(reg::DX, 2) as u16;
            if !repeated || self.part(reg::CX, shape.address_bytes) != 0 {
                self.check_port(port, bytes as u16)?;
            }
        }
        if !repeated {
            if let Some(flags) = self.element(&shape)? {
                self.set_status(flags);
            }
            return Ok(());
        }
        self.repeat(instruction, &shape)
    }

    fn repeat(&mut self, instruction: &Instruction, shape: &Shape) -> Step {
        let mut count = self.part(reg::CX, shape.address_bytes);
        if count == 0 {
            return Ok(());
        }
        // With TF set, every iteration is followed by a trap.
        let iterations = if self.flags_before & TF != 0 {
            1
        } else {
            self.options.max_iterations.max(1)
        };
        let while_equal = !instruction.has_repne_prefix();
        for _ in 0..iterations {
            let flags = self.element(shape)?;
            count = count.wrapping_sub(1) & mask(shape.address_bytes);
            self.set_part(reg::CX, shape.address_bytes, count);
            self.progress = true;
            if let Some(flags) = flags {
                self.set_status(flags);
                if (flags & ZF != 0) != while_equal {
                    return Ok(());
                }
            }
            if count == 0 {
                return Ok(());
            }
        }
        self.finish = Finish::Repeat;
        Ok(())
    }

    /// One element; the flags for CMPS and SCAS.
    fn element(&mut self, shape: &Shape) -> Step<Option<u64>> {
        let bytes = shape.bytes;
        let mut flags = None;
        match shape.op {
            StringOp::Move => {
                let from = self.source(shape)?;
                let to = self.destination(shape, AccessKind::Write)?;
                let value = self.load(&from)?;
                self.store(&to, value)?;
            }
            StringOp::Store => {
                let to = self.destination(shape, AccessKind::Write)?;
                self.store(&to, self.regs[reg::AX])?;
            }
            StringOp::Load => {
                let from = self.source(shape)?;
                let value = self.load(&from)?;
                self.set_part(reg::AX, bytes, value);
            }
            StringOp::Compare => {
                let from = self.source(shape)?;
                let to = self.destination(shape, AccessKind::Read)?;
                let a = self.load(&from)?;
                let b = self.load(&to)?;
                flags = Some(alu::sub(bytes, a, b, false).1);
            }
            StringOp::Scan => {
                let to = self.destination(shape, AccessKind::Read)?;
                let b = self.load(&to)?;
                flags = Some(alu::sub(bytes, self.regs[reg::AX], b, false).1);
            }
            StringOp::Input => {
                let to = self.destination(shape, AccessKind::Write)?;
                let port = self.part(reg::DX, 2) as u16;
                let value = self.read_port(port, bytes)?;
                self.store(&to, value)?;
            }
            StringOp::Output => {
                let from = self.source(shape)?;
                let value = self.load(&from)?;
                let port = self.part(reg::DX, 2) as u16;
                self.write_port(port, bytes, value)?;
            }
        }
        let (source, destination) = match shape.op {
            StringOp::Move | StringOp::Compare => (true, true),
            StringOp::Load | StringOp::Output => (true, false),
            StringOp::Store | StringOp::Scan | StringOp::Input => (false, true),
        };
        if source {
            self.advance(reg::SI, shape);
        }
        if destination {
            self.advance(reg::DI, shape);
        }
        Ok(flags)
    }

    fn advance(&mut self, index: usize, shape: &Shape) {
        let value = self.regs[index].wrapping_add(shape.step);
        self.set_part(index, shape.address_bytes, value);
    }

    fn source(&mut self, shape: &Shape) -> Step<Span> {
        let offset = self.part(reg::SI, shape.address_bytes);
        self.span(shape.source, offset, shape.bytes, AccessKind::Read)
    }

    fn destination(&mut self, shape: &Shape, kind: AccessKind) -> Step<Span> {
        let offset = self.part(reg::DI, shape.address_bytes);
        self.span(SegmentName::Es, offset, shape.bytes, kind)
    }
}

/// The operation of a string instruction. `MOVSD` and `CMPSD` are also the names of SSE instructions, which
/// have no implicit memory operand.
pub(super) fn string_op(instruction: &Instruction) -> Option<StringOp> {
    Some(match instruction.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsq => StringOp::Move,
        Mnemonic::Movsd if address_bytes(instruction).is_ok() => StringOp::Move,
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => StringOp::Store,
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => StringOp::Load,
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsq => StringOp::Compare,
        Mnemonic::Cmpsd if address_bytes(instruction).is_ok() => StringOp::Compare,
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => StringOp::Scan,
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => StringOp::Input,
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => StringOp::Output,
        _ => return None,
    })
}

fn address_bytes(instruction: &Instruction) -> Step<usize> {
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => return Ok(2),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => return Ok(4),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => return Ok(8),
            _ => {}
        }
    }
    Err(Stop::Unsupported)
}
