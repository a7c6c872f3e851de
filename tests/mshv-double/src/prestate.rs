//! The processor as it was *before* the instruction that left the guest.
//!
//! KVM's emulator reports a store or an OUT after it has retired the instruction: registers have moved on. Hyper-V
//! intercepts before it. So the instruction is looked for backwards, among those that end where RIP now stands:
//!
//! ```text
//!   exit: store of D at P          for length 1..15: decode at RIP - length
//!   registers R, RIP  ──────────►    must end exactly at RIP, and with its side effects undone
//!                                    it must store |D| bytes, D itself where that is known, at P
//!                                  also: REP at RIP itself (iterations leave RIP there),
//!                                        CALL, whose return address is the data stored
//! ```
//!
//! Several instructions may fit. They then do the same (same data, same place, same registers after it), so the longest
//! is taken. Reads need none of this: KVM changes no register before a read is answered.

use iced_x86::{
    Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::gva::{self, Access};
use crate::memory::Memory;

/// The longest instruction (Intel SDM vol. 2, 2.3.11).
const LONGEST: u64 = 15;
const DIRECTION_FLAG: u64 = 1 << 10;

/// What the guest looks like at an exit.
#[derive(Clone, Copy)]
pub(crate) struct Machine<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) sregs: &'a kvm_sregs,
}

/// An instruction found, and the registers before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) regs: kvm_regs,
    pub(crate) instruction: Instruction,
    /// The linear address that is accessed; 0 for port accesses.
    pub(crate) gva: u64,
}

impl Machine<'_> {
    /// 16, 32 or 64, as the code segment says.
    pub(crate) fn bitness(&self) -> u32 {
        if self.sregs.efer & 1 << 10 != 0 && self.sregs.cs.l != 0 {
            64
        } else if self.sregs.cs.db != 0 {
            32
        } else {
            16
        }
    }

    fn wrap(&self, rip: u64) -> u64 {
        if self.bitness() == 64 {
            rip
        } else {
            rip & 0xffff_ffff
        }
    }

    /// Reads what can be read of the bytes at an instruction pointer.
    pub(crate) fn code(&self, rip: u64, buffer: &mut [u8]) -> usize {
        let base = if self.bitness() == 64 {
            0
        } else {
            self.sregs.cs.base
        };
        gva::read_linear(self.memory, self.sregs, base.wrapping_add(rip), buffer)
    }

    /// Decodes the instruction at an instruction pointer.
    pub(crate) fn decode(&self, rip: u64) -> Option<Instruction> {
        let mut bytes = [0; LONGEST as usize];
        let length = self.code(rip, &mut bytes);
        let instruction =
            Decoder::with_ip(self.bitness(), &bytes[..length], rip, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    fn physical(&self, linear: u64) -> Option<u64> {
        gva::translate(
            self.memory,
            self.sregs,
            linear,
            Access {
                exempt: true,
                ..Default::default()
            },
        )
        .ok()
    }

    fn segment(&self, register: Register) -> Option<&kvm_segment> {
        Some(match register {
            Register::ES => &self.sregs.es,
            Register::CS => &self.sregs.cs,
            Register::SS => &self.sregs.ss,
            Register::DS => &self.sregs.ds,
            Register::FS => &self.sregs.fs,
            Register::GS => &self.sregs.gs,
            _ => return None,
        })
    }

    /// A register's value, or a segment's base, for address computations.
    fn value(&self, regs: &kvm_regs, register: Register) -> Option<u64> {
        if let Some(segment) = self.segment(register) {
            let flat = self.bitness() == 64 && !matches!(register, Register::FS | Register::GS);
            return Some(if flat { 0 } else { segment.base });
        }
        general(regs, register)
    }

    /// The linear addresses that an instruction may access with these registers, with sizes; `writes` picks stores.
    fn accesses(
        &self,
        instruction: &Instruction,
        regs: &kvm_regs,
        writes: bool,
    ) -> Vec<(u64, usize)> {
        let value = |register, _, _| self.value(regs, register);
        if is_string(instruction) {
            let size = instruction.memory_size().size();
            return (0..instruction.op_count())
                .filter(|operand| is_memory(instruction.op_kind(*operand)))
                .filter_map(|operand| Some((instruction.virtual_address(operand, 0, value)?, size)))
                .collect();
        }
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(instruction);
        info.used_memory()
            .iter()
            .filter(|used| {
                !writes
                    || matches!(
                        used.access(),
                        OpAccess::Write
                            | OpAccess::CondWrite
                            | OpAccess::ReadWrite
                            | OpAccess::ReadCondWrite
                    )
            })
            .filter_map(|used| {
                let mut linear = used.virtual_address(0, value)?;
                if self.bitness() != 64 {
                    linear &= 0xffff_ffff;
                }
                Some((linear, used.memory_size().size()))
            })
            .collect()
    }

    /// The linear address with which an instruction reaches a guest physical address, if one of its operands does.
    pub(crate) fn reaches(
        &self,
        instruction: &Instruction,
        regs: &kvm_regs,
        gpa: u64,
    ) -> Option<u64> {
        self.accesses(instruction, regs, false)
            .into_iter()
            .find(|(linear, size)| {
                self.physical(*linear) == Some(gpa)
                    // The second half of an access that crosses into a page of devices.
                    || (linear & 4095) + *size as u64 > 4096
                        && gpa & 4095 == 0
                        && self.physical((linear | 4095) + 1) == Some(gpa)
            })
            .map(|(linear, _)| {
                if self.physical(linear) == Some(gpa) {
                    linear
                } else {
                    (linear | 4095) + 1
                }
            })
    }

    /// All instructions that end at, or repeat at, the present RIP.
    fn candidates(&self, now: &kvm_regs) -> Vec<Instruction> {
        let mut found: Vec<Instruction> = (1..=LONGEST)
            .filter_map(|length| {
                let instruction = self.decode(self.wrap(now.rip.wrapping_sub(length)))?;
                (instruction.len() as u64 == length).then_some(instruction)
            })
            .collect();
        if let Some(repeated) = self.decode(now.rip)
            && is_string(&repeated)
            && repeats(&repeated)
        {
            found.push(repeated);
        }
        found
    }

    /// The instruction that stored `data` at `gpa`, given the registers after it.
    pub(crate) fn before_store(&self, now: &kvm_regs, gpa: u64, data: &[u8]) -> Option<Found> {
        let mut candidates = self.candidates(now);
        candidates.retain(|instruction| instruction.flow_control() == iced_x86::FlowControl::Next);
        candidates.extend(self.calls(now, data));
        candidates
            .into_iter()
            .filter_map(|instruction| {
                let regs = self.undo(&instruction, now, 1, data);
                let writes = self.accesses(&instruction, &regs, true);
                let (gva, skipped) = writes.into_iter().find_map(|(linear, size)| {
                    // A store that crosses from RAM into a page of devices leaves with its second half only, and one
                    // the other way round with its first.
                    let first = (4096 - (linear & 4095) as usize).min(size);
                    let whole = size == data.len() || first == data.len();
                    if whole && self.physical(linear) == Some(gpa) {
                        return Some((linear, 0));
                    }
                    let second = linear.wrapping_add(first as u64);
                    let half = first < size && size - first == data.len();
                    (half && self.physical(second) == Some(gpa)).then_some((second, first))
                })?;
                let agrees = self.stored(&instruction, &regs).is_none_or(|value| {
                    let known = value.to_le_bytes();
                    let length = data.len().min(8usize.saturating_sub(skipped));
                    known[skipped.min(8)..].starts_with(&data[..length])
                });
                agrees.then_some(Found {
                    regs,
                    instruction,
                    gva,
                })
            })
            .max_by_key(|found| found.instruction.len())
    }

    /// Near calls: the return address is what was stored, and RIP is already at the target.
    fn calls(&self, now: &kvm_regs, data: &[u8]) -> Vec<Instruction> {
        if !matches!(data.len(), 2 | 4 | 8) {
            return Vec::new();
        }
        let mut raw = [0; 8];
        raw[..data.len()].copy_from_slice(data);
        let back = u64::from_le_bytes(raw);
        (2..=LONGEST)
            .filter_map(|length| {
                let instruction = self.decode(self.wrap(back.wrapping_sub(length)))?;
                let target = match instruction.op0_kind() {
                    OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                        instruction.near_branch_target()
                    }
                    OpKind::Register => general(now, instruction.op0_register())?,
                    // Through memory: what was there is not read again.
                    OpKind::Memory => now.rip,
                    _ => return None,
                };
                let near_call =
                    instruction.mnemonic() == Mnemonic::Call && !instruction.is_call_far_indirect();
                (near_call && instruction.len() as u64 == length && target == now.rip)
                    .then_some(instruction)
            })
            .collect()
    }

    /// The instruction that wrote `data` (elements of `size` bytes) to a port, given the registers after it.
    pub(crate) fn before_out(
        &self,
        now: &kvm_regs,
        port: u16,
        size: usize,
        data: &[u8],
    ) -> Option<Found> {
        let count = (data.len() / size.max(1)) as u64;
        self.candidates(now)
            .into_iter()
            .filter_map(|instruction| {
                let (width, string) = out_width(&instruction)?;
                let regs = self.undo(&instruction, now, count, data);
                let through = match instruction.op0_kind() {
                    OpKind::Immediate8 => u16::from(instruction.immediate8()),
                    _ => regs.rdx as u16,
                };
                let agrees = if string {
                    let value = |register, _, _| self.value(&regs, register);
                    let source = instruction.virtual_address(1, 0, value)?;
                    self.physical(source).is_none_or(|gpa| {
                        let mut there = vec![0; size];
                        !self.memory.read(gpa, &mut there) || there == data[..size.min(data.len())]
                    })
                } else {
                    regs.rax
                        .to_le_bytes()
                        .starts_with(&data[..data.len().min(8)])
                };
                (width == size && through == port && agrees).then_some(Found {
                    regs,
                    instruction,
                    gva: 0,
                })
            })
            .max_by_key(|found| found.instruction.len())
    }

    /// The registers before an instruction, from those after it: RIP, the counters of string instructions, the stack
    /// pointer, and registers that were exchanged with memory.
    fn undo(&self, instruction: &Instruction, now: &kvm_regs, count: u64, data: &[u8]) -> kvm_regs {
        let mut regs = *now;
        regs.rip = instruction.ip();
        if is_string(instruction) {
            let size = instruction.memory_size().size() as u64 * count;
            let step = if now.rflags & DIRECTION_FLAG != 0 {
                size
            } else {
                size.wrapping_neg()
            };
            let mut width = u64::MAX;
            for operand in 0..instruction.op_count() {
                let (index, mask) = match instruction.op_kind(operand) {
                    OpKind::MemorySegSI => (&mut regs.rsi, 0xffff),
                    OpKind::MemorySegESI => (&mut regs.rsi, 0xffff_ffff),
                    OpKind::MemorySegRSI => (&mut regs.rsi, u64::MAX),
                    OpKind::MemoryESDI => (&mut regs.rdi, 0xffff),
                    OpKind::MemoryESEDI => (&mut regs.rdi, 0xffff_ffff),
                    OpKind::MemoryESRDI => (&mut regs.rdi, u64::MAX),
                    _ => continue,
                };
                *index = merge(*index, index.wrapping_add(step), mask);
                width = mask;
            }
            if repeats(instruction) {
                regs.rcx = merge(regs.rcx, regs.rcx.wrapping_add(count), width);
            }
            return regs;
        }
        let moved = i64::from(instruction.stack_pointer_increment());
        if moved != 0 {
            let mask = match (self.bitness(), self.sregs.ss.db) {
                (64, _) => u64::MAX,
                (_, 0) => 0xffff,
                _ => 0xffff_ffff,
            };
            regs.rsp = merge(regs.rsp, regs.rsp.wrapping_add_signed(-moved), mask);
        }
        if matches!(instruction.mnemonic(), Mnemonic::Xchg | Mnemonic::Xadd)
            && instruction.op1_kind() == OpKind::Register
            && data.len() <= 8
        {
            let register = instruction.op1_register();
            let mut raw = [0; 8];
            raw[..data.len()].copy_from_slice(data);
            let stored = u64::from_le_bytes(raw);
            let old = general(now, register).unwrap_or(0);
            let before = if instruction.mnemonic() == Mnemonic::Xadd {
                stored.wrapping_sub(old)
            } else {
                stored
            };
            set_general(&mut regs, register, before);
        }
        regs
    }

    /// What an instruction stores, where registers or an immediate tell.
    fn stored(&self, instruction: &Instruction, regs: &kvm_regs) -> Option<u64> {
        match instruction.mnemonic() {
            Mnemonic::Mov | Mnemonic::Movnti => match instruction.op1_kind() {
                OpKind::Register => match self.segment(instruction.op1_register()) {
                    Some(segment) => Some(u64::from(segment.selector)),
                    None => general(regs, instruction.op1_register()),
                },
                kind if is_immediate(kind) => Some(instruction.immediate(1)),
                _ => None,
            },
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => Some(regs.rax),
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq
                if is_string(instruction) =>
            {
                let source = instruction
                    .virtual_address(1, 0, |register, _, _| self.value(regs, register))?;
                let mut there = [0; 8];
                let size = instruction.memory_size().size().min(8);
                (gva::read_linear(self.memory, self.sregs, source, &mut there[..size]) == size)
                    .then_some(u64::from_le_bytes(there))
            }
            Mnemonic::Push => match instruction.op0_kind() {
                OpKind::Register => match self.segment(instruction.op0_register()) {
                    Some(segment) => Some(u64::from(segment.selector)),
                    None => general(regs, instruction.op0_register()),
                },
                kind if is_immediate(kind) => Some(instruction.immediate(0)),
                _ => None,
            },
            _ => None,
        }
    }
}

/// Whether completing the instruction with made-up data may change more than general registers.
pub(crate) fn touches_vectors(instruction: &Instruction) -> bool {
    let wide = |register: Register| {
        register.is_vector_register()
            || register.is_mm()
            || register.is_st()
            || register.is_k()
            || register.is_bnd()
    };
    (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register && wide(instruction.op_register(operand))
    }) || instruction.is_save_restore_instruction()
        || matches!(
            instruction.mnemonic(),
            Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr
        )
        || instruction.code().cpuid_features().iter().any(|feature| {
            matches!(
                feature,
                iced_x86::CpuidFeature::FPU
                    | iced_x86::CpuidFeature::FPU287
                    | iced_x86::CpuidFeature::FPU387
            )
        })
}

/// Whether this is one of MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS (and not the SSE MOVSD or CMPSD).
pub(crate) fn is_string(instruction: &Instruction) -> bool {
    instruction.is_string_instruction()
}

/// Whether a REP, REPE or REPNE prefix is in effect.
pub(crate) fn repeats(instruction: &Instruction) -> bool {
    instruction.has_rep_prefix() || instruction.has_repne_prefix()
}

fn is_memory(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Memory
            | OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI
    )
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// The element size of an OUT or OUTS, and whether it is the string form.
fn out_width(instruction: &Instruction) -> Option<(usize, bool)> {
    Some(match instruction.code() {
        Code::Out_imm8_AL | Code::Out_DX_AL => (1, false),
        Code::Out_imm8_AX | Code::Out_DX_AX => (2, false),
        Code::Out_imm8_EAX | Code::Out_DX_EAX => (4, false),
        Code::Outsb_DX_m8 => (1, true),
        Code::Outsw_DX_m16 => (2, true),
        Code::Outsd_DX_m32 => (4, true),
        _ => return None,
    })
}

/// Replaces the bits of `mask`; a 32-bit result clears the upper half, as in long mode.
fn merge(old: u64, new: u64, mask: u64) -> u64 {
    if mask == 0xffff {
        old & !mask | new & mask
    } else {
        new & mask
    }
}

fn slot(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register.full_register() {
        Register::RAX => &mut regs.rax,
        Register::RBX => &mut regs.rbx,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}

fn shift_and_mask(register: Register) -> (u32, u64) {
    let high = matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    );
    let mask = match register.size() {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    (if high { 8 } else { 0 }, mask)
}

/// The value of a general register of any width.
fn general(regs: &kvm_regs, register: Register) -> Option<u64> {
    let mut copy = *regs;
    let (shift, mask) = shift_and_mask(register);
    slot(&mut copy, register).map(|value| *value >> shift & mask)
}

fn set_general(regs: &mut kvm_regs, register: Register, value: u64) {
    let (shift, mask) = shift_and_mask(register);
    if let Some(slot) = slot(regs, register) {
        *slot = *slot & !(mask << shift) | (value & mask) << shift;
    }
}
