//! What the manuals leave undefined (SDM vol. 2, "Flags Affected"), by the name of the instruction.

use iced_x86::{Instruction, Mnemonic};

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;

/// When a flag is undefined.
#[derive(Clone, Copy)]
enum When {
    Always,
    /// The masked count is not 0.
    Counted,
    /// The masked count is neither 0 nor 1.
    CountAboveOne,
    /// The masked count is at least the operand's width.
    CountAtLeastWidth,
}

const TABLE: &[(&[Mnemonic], u64, When)] = &[
    (
        &[Mnemonic::And, Mnemonic::Or, Mnemonic::Xor, Mnemonic::Test],
        AF,
        When::Always,
    ),
    (
        &[
            Mnemonic::Shl,
            Mnemonic::Sal,
            Mnemonic::Shr,
            Mnemonic::Sar,
            Mnemonic::Shld,
            Mnemonic::Shrd,
        ],
        AF,
        When::Counted,
    ),
    (
        &[
            Mnemonic::Shl,
            Mnemonic::Sal,
            Mnemonic::Shr,
            Mnemonic::Sar,
            Mnemonic::Shld,
            Mnemonic::Shrd,
            Mnemonic::Rol,
            Mnemonic::Ror,
            Mnemonic::Rcl,
            Mnemonic::Rcr,
        ],
        OF,
        When::CountAboveOne,
    ),
    (
        &[Mnemonic::Shl, Mnemonic::Sal, Mnemonic::Shr],
        CF,
        When::CountAtLeastWidth,
    ),
    (
        &[Mnemonic::Mul, Mnemonic::Imul],
        SF | ZF | AF | PF,
        When::Always,
    ),
    (
        &[Mnemonic::Div, Mnemonic::Idiv],
        CF | OF | SF | ZF | AF | PF,
        When::Always,
    ),
    (
        &[Mnemonic::Bsf, Mnemonic::Bsr],
        CF | OF | SF | AF | PF,
        When::Always,
    ),
    (
        &[
            Mnemonic::Bt,
            Mnemonic::Bts,
            Mnemonic::Btr,
            Mnemonic::Btc,
            Mnemonic::Tzcnt,
            Mnemonic::Lzcnt,
        ],
        OF | SF | AF | PF,
        When::Always,
    ),
    (&[Mnemonic::Daa, Mnemonic::Das], OF, When::Always),
    (
        &[Mnemonic::Aaa, Mnemonic::Aas],
        OF | SF | ZF | PF,
        When::Always,
    ),
    (&[Mnemonic::Aam, Mnemonic::Aad], OF | AF | CF, When::Always),
    (&[Mnemonic::Bextr], AF | SF | PF, When::Always),
    (
        &[
            Mnemonic::Andn,
            Mnemonic::Blsi,
            Mnemonic::Blsmsk,
            Mnemonic::Blsr,
            Mnemonic::Bzhi,
        ],
        AF | PF,
        When::Always,
    ),
];

/// The flags that `instruction` leaves undefined; `cl` is CL before it.
pub(crate) fn undefined_flags(instruction: &Instruction, cl: u8) -> u64 {
    let (count, width) = count_and_width(instruction, cl);
    TABLE
        .iter()
        .filter(|(mnemonics, _, when)| {
            let applies = match when {
                When::Always => true,
                When::Counted => count != 0,
                When::CountAboveOne => count > 1,
                When::CountAtLeastWidth => count >= width,
            };
            applies && mnemonics.contains(&instruction.mnemonic())
        })
        .fold(0, |flags, (_, more, _)| flags | more)
}

/// Whether the result itself is undefined, so that nothing can be compared.
pub(crate) fn undefined_result(instruction: &Instruction, cl: u8) -> bool {
    let (count, width) = count_and_width(instruction, cl);
    match instruction.mnemonic() {
        Mnemonic::Shld | Mnemonic::Shrd => count > width,
        Mnemonic::Bswap => width == 16,
        _ => false,
    }
}

fn count_and_width(instruction: &Instruction, cl: u8) -> (u32, u32) {
    let width = match instruction.op0_kind() {
        iced_x86::OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    } as u32
        * 8;
    let last = instruction.op_count().saturating_sub(1);
    let count = instruction
        .try_immediate(last)
        .map_or(u32::from(cl), |immediate| immediate as u32);
    (count & if width == 64 { 63 } else { 31 }, width)
}
