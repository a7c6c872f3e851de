//! Random 64-bit instructions, and registers with which their memory operands land on the data pages.

use hypervisor::emulator::covers;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use crate::native::{CODE, DATA, Registers};
use crate::random::Random;

/// Instructions that are not executed natively, and why.
const NOT_NATIVE: &[(Mnemonic, &str)] = &[
    (Mnemonic::In, "the kernel decides about ports"),
    (Mnemonic::Out, "the kernel decides about ports"),
    (Mnemonic::Insb, "the kernel decides about ports"),
    (Mnemonic::Insw, "the kernel decides about ports"),
    (Mnemonic::Insd, "the kernel decides about ports"),
    (Mnemonic::Outsb, "the kernel decides about ports"),
    (Mnemonic::Outsw, "the kernel decides about ports"),
    (Mnemonic::Outsd, "the kernel decides about ports"),
    (Mnemonic::Int, "the kernel answers it"),
    (Mnemonic::Smsw, "UMIP lets the kernel answer it"),
    (Mnemonic::Sgdt, "UMIP lets the kernel answer it"),
    (Mnemonic::Sidt, "UMIP lets the kernel answer it"),
    (Mnemonic::Sldt, "UMIP lets the kernel answer it"),
    (Mnemonic::Str, "UMIP lets the kernel answer it"),
    (Mnemonic::Lar, "needs the kernel's GDT"),
    (Mnemonic::Lsl, "needs the kernel's GDT"),
    (Mnemonic::Verr, "needs the kernel's GDT"),
    (Mnemonic::Verw, "needs the kernel's GDT"),
    (Mnemonic::Rdfsbase, "FS is the test's own"),
    (Mnemonic::Wrfsbase, "FS is the test's own"),
    (Mnemonic::Wrgsbase, "would change GS for the next case"),
    (Mnemonic::Rdsspd, "depends on the kernel's shadow stacks"),
    (Mnemonic::Rdsspq, "depends on the kernel's shadow stacks"),
    (Mnemonic::Fxsave, "the x87 state is not the test's"),
    (Mnemonic::Wait, "the x87 state is not the test's"),
    (Mnemonic::Fxsave64, "the x87 state is not the test's"),
    (Mnemonic::Fxrstor, "the x87 state is not the test's"),
    (Mnemonic::Fxrstor64, "the x87 state is not the test's"),
    (Mnemonic::Lfs, "needs the kernel's GDT"),
    (Mnemonic::Lgs, "needs the kernel's GDT"),
    (Mnemonic::Lss, "needs the kernel's GDT"),
];

/// How the processor decodes, and where its segments are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// 16, 32 or 64.
    pub(crate) bits: u32,
    /// Base of CS, DS, ES, SS and GS.
    pub(crate) cs: u64,
    pub(crate) ds: u64,
    pub(crate) es: u64,
    pub(crate) ss: u64,
    pub(crate) gs: u64,
    pub(crate) decoder_options: u32,
}

impl Layout {
    /// RIP of the instruction.
    pub(crate) fn rip(&self) -> u64 {
        CODE - self.cs
    }

    fn base(&self, segment: Register) -> u64 {
        match segment {
            Register::CS => self.cs,
            Register::ES => self.es,
            Register::SS => self.ss,
            Register::GS => self.gs,
            _ => self.ds,
        }
    }
}

/// An instruction with all it needs.
pub(crate) struct Case {
    pub(crate) bytes: Vec<u8>,
    pub(crate) instruction: Instruction,
}

/// A covered instruction that may be executed natively, or `None` if the dice fell otherwise.
pub(crate) fn instruction(random: &mut Random, layout: &Layout) -> Option<Case> {
    let mut bytes = [0; 15];
    random.fill(&mut bytes);
    // One in eight is left as it is: any bytes at all.
    if !random.one_in(8) {
        shape(random, &mut bytes, layout.bits == 64);
    }
    let (bits, rip, options) = (layout.bits, layout.rip(), layout.decoder_options);
    let mut decoder = Decoder::try_with_ip(bits, &bytes, rip, options).ok()?;
    let instruction = decoder.decode();
    if instruction.is_invalid() || !covers(instruction.mnemonic()) {
        return None;
    }
    if NOT_NATIVE
        .iter()
        .any(|(mnemonic, _)| *mnemonic == instruction.mnemonic())
    {
        return None;
    }
    // AMD processors take the condition from a REP prefix, which no manual says.
    let odd_loop = matches!(instruction.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne)
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix() || raw_rep(&bytes));
    if odd_loop {
        return None;
    }
    // The decoder ignores VEX.W outside 64-bit mode; processors do not agree for these.
    let wide = bits != 64
        && matches!(
            instruction.mnemonic(),
            Mnemonic::Vpinsrd | Mnemonic::Vpextrd | Mnemonic::Vmovd
        );
    if wide {
        return None;
    }
    let needs_gdt = matches!(instruction.mnemonic(), Mnemonic::Lds | Mnemonic::Les);
    // GS has no segment in compatibility mode.
    let null = bits != 64 && instruction.memory_segment() == Register::GS;
    if needs_gdt || null {
        return None;
    }
    let loads_segment = matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Pop)
        && instruction.op0_kind() == OpKind::Register
        && is_segment(instruction.op0_register());
    if loads_segment || instruction.memory_segment() == Register::FS {
        return None;
    }
    let offsets = decoder.get_constant_offsets(&instruction);
    let length = instruction.len();
    let mut bytes = bytes[..length].to_vec();
    // A memory operand without registers: patch the displacement.
    let plain = instruction.memory_index() == Register::None
        && matches!(
            instruction.memory_base(),
            Register::None | Register::RIP | Register::EIP
        );
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    if memory && plain && offsets.has_displacement() && !random.one_in(50) {
        let target = data_address(random);
        let from = match instruction.memory_base() {
            Register::None => layout.base(instruction.memory_segment()),
            _ => rip + length as u64,
        };
        let displacement = target.wrapping_sub(from).to_le_bytes();
        let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
        bytes[at..at + size].copy_from_slice(&displacement[..size]);
    }
    let instruction = Decoder::try_with_ip(bits, &bytes, rip, options)
        .ok()?
        .decode();
    Some(Case { bytes, instruction })
}

/// Whether a legacy prefix is F2 or F3; the decoder does not report it where it has no meaning.
fn raw_rep(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .take_while(|byte| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3 | 0x40..=0x4f))
        .any(|byte| matches!(byte, 0xf2 | 0xf3))
}

fn is_segment(register: Register) -> bool {
    (Register::ES as u32..=Register::GS as u32).contains(&(register as u32))
}

/// Opcodes of the two upper VEX maps that have covered instructions.
const VEX_0F38: &[u8] = &[
    0x00, 0x17, 0x18, 0x19, 0x1a, 0x29, 0x2a, 0x37, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f,
    0x40, 0x58, 0x59, 0x5a, 0x78, 0x79, 0xf2, 0xf3, 0xf5, 0xf6, 0xf7,
];
const VEX_0F3A: &[u8] = &[0x14, 0x15, 0x16, 0x18, 0x19, 0x20, 0x22, 0x38, 0x39, 0xf0];

fn vvvv(random: &mut Random) -> u8 {
    if random.one_in(2) { 0x78 } else { 0 }
}

/// Puts prefixes and an opcode map before the random bytes.
fn shape(random: &mut Random, bytes: &mut [u8; 15], long: bool) {
    let mut head = Vec::with_capacity(8);
    if random.one_in(6) {
        head.push(0x66);
    }
    if random.one_in(16) {
        head.push(0x67);
    }
    if random.one_in(8) {
        head.push(0xf2 + random.byte() % 2);
    }
    if random.one_in(10) {
        head.push(0xf0);
    }
    if random.one_in(16) {
        head.push(0x65);
    }
    // Outside 64-bit mode VEX is told from LES and LDS by two set bits.
    let vex = if long { 0 } else { 0xc0 };
    let map = random.below(12);
    match map {
        // VEX, two and three bytes. Where there is no vvvv operand, its bits must be ones.
        0 => {
            head.clear();
            head.extend([0xc5, random.byte() | vvvv(random) | vex]);
        }
        1 => {
            head.clear();
            let map = 1 + random.byte() % 3;
            head.extend([0xc4, random.byte() & 0xe0 | map | vex]);
            head.push(random.byte() | vvvv(random));
            let opcodes: &[u8] = match map {
                2 => VEX_0F38,
                3 => VEX_0F3A,
                _ => &[],
            };
            if !opcodes.is_empty() && random.one_in(2) {
                head.push(opcodes[random.below(opcodes.len() as u64) as usize]);
            }
        }
        _ => {
            if long && random.one_in(2) {
                head.push(0x40 | random.byte() & 15);
            }
            match map {
                2..=4 => head.push(0x0f),
                5 => head.extend([0x0f, 0x38]),
                6 => head.extend([0x0f, 0x3a]),
                _ => {}
            }
        }
    }
    bytes[..head.len()].copy_from_slice(&head);
    // XSAVE and its relatives are rare, too: 0F AE /4 to /6, 0F C7 /3 to /5, with a register that is patched.
    if map == 2 && random.one_in(12) {
        let at = head.len();
        let register = 3 + random.byte() % 4;
        bytes[at] = if random.one_in(2) { 0xae } else { 0xc7 };
        bytes[at + 1] = register << 3 | [3, 6, 7][random.below(3) as usize];
    }
    // String instructions are 10 of 256 opcodes; make them more frequent.
    if map == 11 && random.one_in(3) {
        let opcodes = [0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf];
        bytes[head.len()] = opcodes[random.below(10) as usize];
    }
}

/// An address on the data pages, often near the border of two.
pub(crate) fn data_address(random: &mut Random) -> u64 {
    let page = DATA + 4096 * random.below(5);
    match random.below(8) {
        0 => page.wrapping_add(random.below(64)).wrapping_sub(32),
        1 => DATA + 4096 * (1 + random.below(2)) + random.below(4096) / 32 * 32,
        _ => DATA + 4096 * (1 + random.below(2)) + random.below(4096),
    }
}

/// Index of a 16-, 32- or 64-bit register, as `Registers::gpr` has it.
fn index_of(register: Register) -> Option<usize> {
    let number = register as usize;
    let short = Register::AX as usize;
    let narrow = Register::EAX as usize;
    let wide = Register::RAX as usize;
    if (short..short + 16).contains(&number) {
        Some(number - short)
    } else if (narrow..narrow + 16).contains(&number) {
        Some(number - narrow)
    } else if (wide..wide + 16).contains(&number) {
        Some(number - wide)
    } else {
        None
    }
}

/// Fills `registers` for the instruction.
pub(crate) fn registers(
    random: &mut Random,
    case: &Case,
    layout: &Layout,
    registers: &mut Registers,
) {
    const STATUS: u64 = 0x8d5;
    const DF: u64 = 1 << 10;
    const AC: u64 = 1 << 18;
    const ID: u64 = 1 << 21;
    let instruction = &case.instruction;
    for register in &mut registers.gpr {
        *register = random.interesting();
    }
    for ymm in &mut registers.ymm {
        if random.one_in(4) {
            random.fill(ymm);
        }
    }
    registers.flags = 0x202 | random.next() & (STATUS | ID);
    if random.one_in(4) {
        registers.flags |= DF;
    }
    if random.one_in(16) {
        registers.flags |= AC;
    }
    registers.mxcsr = 0x1f80 | random.next() as u32 & 0xe07f;
    if layout.decoder_options & DecoderOptions::AMD != 0
        && !reads_half(instruction.mnemonic())
        && random.one_in(8)
    {
        // MXCSR.MM: misaligned operands are no fault.
        registers.mxcsr |= 1 << 17;
    }
    let gpr = &mut registers.gpr;
    // RSP, RSI and RDI point to data, and RBP for ENTER and LEAVE.
    gpr[4] = data_address(random).wrapping_sub(layout.ss);
    if !random.one_in(4) {
        gpr[4] &= !7;
    }
    let string = (0..instruction.op_count()).any(|n| {
        !matches!(
            instruction.op_kind(n),
            OpKind::Register | OpKind::Memory | OpKind::Immediate8
        )
    });
    if string {
        gpr[6] = data_address(random).wrapping_sub(layout.ds);
        gpr[7] = data_address(random).wrapping_sub(layout.es);
        if random.one_in(2) {
            gpr[1] = random.below(40);
        }
        if random.one_in(8) {
            gpr[7] = gpr[6];
        }
    }
    if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        gpr[1] = random.below(200);
    }
    if matches!(instruction.mnemonic(), Mnemonic::Enter | Mnemonic::Leave) {
        gpr[5] = data_address(random).wrapping_sub(layout.ss);
    }
    if instruction.mnemonic() == Mnemonic::Xlatb {
        gpr[3] = (data_address(random) & !0xff).wrapping_sub(layout.ds);
    }
    if instruction.mnemonic() == Mnemonic::Cmpxchg && random.one_in(2) {
        // An equal comparison with a register operand.
        if let Some(index) = index_of(instruction.op0_register()) {
            gpr[0] = gpr[index];
        }
    }
    let bit_string = matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    );
    if bit_string && let Some(index) = index_of(instruction.op1_register()) {
        gpr[index] = random.below(4096).wrapping_sub(2048);
    }
    if is_xsave(instruction.mnemonic()) {
        // SSE and AVX only.
        gpr[0] = random.below(4) << 1;
        gpr[2] = 0;
    }
    if random.one_in(200) {
        return;
    }
    let segment = layout.base(instruction.memory_segment());
    let mut target = data_address(random).wrapping_sub(segment);
    if !random.one_in(4) {
        let align = match instruction.memory_size().size() {
            size @ (16 | 32) => size as u64,
            _ if is_xsave(instruction.mnemonic()) => 64,
            _ => 1,
        };
        target &= !(align - 1);
    }
    let base = index_of(instruction.memory_base());
    let index = index_of(instruction.memory_index());
    let scale = u64::from(instruction.memory_index_scale());
    let displacement = instruction.memory_displacement64();
    match (base, index) {
        (Some(base), None) => gpr[base] = target.wrapping_sub(displacement),
        (Some(base), Some(index)) if base != index => {
            if random.one_in(2) {
                gpr[index] = random.below(1 << 12);
            }
            gpr[base] = target
                .wrapping_sub(displacement)
                .wrapping_sub(gpr[index].wrapping_mul(scale));
        }
        (Some(index), Some(_)) => {
            gpr[index] = target.wrapping_sub(displacement) / (scale + 1);
        }
        (None, Some(index)) => gpr[index] = target.wrapping_sub(displacement) / scale,
        (None, None) => {}
    }
}

/// SSE instructions that use 64 bits of a 128-bit operand. With MXCSR.MM set, AMD processors read no more, over a page's
/// end; the emulator always reads 128 bits, as the manuals say.
fn reads_half(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Punpcklbw
            | Mnemonic::Punpcklwd
            | Mnemonic::Punpckldq
            | Mnemonic::Punpcklqdq
            | Mnemonic::Unpcklps
            | Mnemonic::Unpcklpd
            | Mnemonic::Psllw
            | Mnemonic::Pslld
            | Mnemonic::Psllq
            | Mnemonic::Psrlw
            | Mnemonic::Psrld
            | Mnemonic::Psrlq
            | Mnemonic::Psraw
            | Mnemonic::Psrad
    )
}

/// XSAVE, XRSTOR and their relatives.
pub(crate) fn is_xsave(mnemonic: Mnemonic) -> bool {
    let (first, last) = (Mnemonic::Xrstor as u32, Mnemonic::Xsaves64 as u32);
    (first..=last).contains(&(mnemonic as u32))
}

/// The decoder's options for this machine's processor.
pub(crate) fn decoder_options(amd: bool) -> u32 {
    if amd {
        DecoderOptions::AMD
    } else {
        DecoderOptions::NONE
    }
}
