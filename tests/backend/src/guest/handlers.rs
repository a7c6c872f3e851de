//! The handlers of exceptions and interrupts in long mode.
//!
//! ```text
//!   exception 0–31 ──► stub n: (error code or 0), n ──► common: note it at FAULT, stop; then go on at FAULT.resume
//!   NMI, 32–255    ──► stub n: count at COUNTS[n]   ──► common: EOI (not for an NMI), stop if asked to, IRET
//! ```

use std::sync::OnceLock;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::Ram;
use super::assemble::{Idioms, assemble};
use crate::outcome::Outcome;

/// What is known about the last exception; see [`Fault`].
const FAULT: u64 = 0x10000;
/// Not zero: the handler of interrupts stops.
const STOP_AT_INTERRUPT: u64 = 0x100f8;
/// A quadword a vector: how often it came.
const COUNTS: u64 = 0x10100;
/// The handlers: 16 bytes a vector, then what they share.
pub(super) const HANDLERS: u64 = 0x11000;
/// The local APIC's end-of-interrupt register (SDM vol. 3, section 11.8.5).
const APIC_EOI: u64 = 0xfee0_00b0;

/// Vectors that push an error code (SDM vol. 3, table 6-1).
const ERROR_CODES: [u8; 8] = [8, 10, 11, 12, 13, 14, 17, 21];

/// What the handler of exceptions found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Vector, 0 to 31.
    pub vector: u64,
    /// Error code; 0 where the vector has none.
    pub error: u64,
    /// Saved RIP.
    pub rip: u64,
    /// Saved CS.
    pub cs: u64,
    /// Saved RFLAGS.
    pub rflags: u64,
    /// Saved RSP.
    pub rsp: u64,
    /// CR2 in the handler.
    pub cr2: u64,
    /// DR6 in the handler, for vector 1 only.
    pub dr6: u64,
}

/// The code of all handlers, to lie at [`HANDLERS`].
pub(super) fn handlers() -> Outcome<&'static [u8]> {
    static CODE: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(code) = CODE.get() {
        return Ok(code);
    }
    let (exception, interrupt) = (HANDLERS + 0x1000, HANDLERS + 0x1100);
    let mut code = vec![0; 0x1200];
    let mut put = |at: u64, piece: Vec<u8>| {
        let offset = (at - HANDLERS) as usize;
        code[offset..offset + piece.len()].copy_from_slice(&piece);
    };
    for vector in 0..=255u8 {
        let at = HANDLERS + u64::from(vector) * 16;
        put(
            at,
            assemble(64, at, &|a| match vector {
                2 | 32.. => {
                    a.inc(qword_ptr(COUNTS + u64::from(vector) * 8))?;
                    a.jmp(interrupt + if vector == 2 { 0x40 } else { 0 })
                }
                _ => {
                    if !ERROR_CODES.contains(&vector) {
                        a.push(0)?;
                    }
                    a.push(i32::from(vector))?;
                    a.jmp(exception)
                }
            })?,
        );
    }
    put(exception, assemble(64, exception, &note_exception)?);
    put(interrupt, assemble(64, interrupt, &end_interrupt)?);
    put(
        interrupt + 0x40,
        assemble(64, interrupt + 0x40, &stop_if_asked)?,
    );
    Ok(CODE.get_or_init(|| code))
}

/// On the stack: RAX (pushed here), vector, error code, RIP, CS, RFLAGS, RSP.
fn note_exception(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(rax)?;
    for (slot, field) in [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6)] {
        a.mov(rax, qword_ptr(rsp + slot * 8))?;
        a.mov(qword_ptr(FAULT + field * 8), rax)?;
    }
    a.mov(rax, cr2)?;
    a.mov(qword_ptr(FAULT + 7 * 8), rax)?;
    let mut no_debug = a.create_label();
    a.cmp(qword_ptr(rsp + 8), 1)?;
    a.jne(no_debug)?;
    a.mov(rax, dr6)?;
    a.mov(qword_ptr(FAULT + 8 * 8), rax)?;
    a.set_label(&mut no_debug)?;
    a.mov(rax, qword_ptr(rsp + 3 * 8))?;
    a.mov(qword_ptr(FAULT + 9 * 8), rax)?;
    a.inc(qword_ptr(FAULT))?;
    a.stop()?;
    // The host may have written another place to go on at, or other flags.
    a.mov(rax, qword_ptr(FAULT + 9 * 8))?;
    a.mov(qword_ptr(rsp + 3 * 8), rax)?;
    a.mov(rax, qword_ptr(FAULT + 5 * 8))?;
    a.mov(qword_ptr(rsp + 5 * 8), rax)?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()
}

fn end_interrupt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(rax)?;
    a.mov(eax, APIC_EOI as u32)?;
    a.mov(dword_ptr(rax), 0)?;
    a.pop(rax)?;
    stop_if_asked(a)
}

fn stop_if_asked(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut on = a.create_label();
    a.cmp(qword_ptr(STOP_AT_INTERRUPT), 0)?;
    a.je(on)?;
    a.stop()?;
    a.set_label(&mut on)?;
    a.iretq()
}

/// How many exceptions were noted and not yet taken.
pub(super) fn faults(ram: &Ram) -> u64 {
    ram.read_u64(FAULT)
}

/// Takes the last exception.
pub(super) fn take_fault(ram: &Ram) -> Fault {
    let noted: [u64; 9] = ram.quads(FAULT);
    ram.write_u64(FAULT, 0);
    Fault {
        vector: noted[1],
        error: noted[2],
        rip: noted[3],
        cs: noted[4],
        rflags: noted[5],
        rsp: noted[6],
        cr2: noted[7],
        dr6: noted[8],
    }
}

/// Makes the handler return to another place.
pub(super) fn resume_at(ram: &Ram, rip: u64) {
    ram.write_u64(FAULT + 9 * 8, rip);
}

/// Makes the handler return with other flags.
pub(super) fn resume_with_flags(ram: &Ram, rflags: u64) {
    ram.write_u64(FAULT + 5 * 8, rflags);
}

/// Whether the handler of interrupts stops.
pub(super) fn stop_at_interrupts(ram: &Ram, stop: bool) {
    ram.write_u64(STOP_AT_INTERRUPT, stop.into());
}

/// How often a vector came.
pub(super) fn count(ram: &Ram, vector: u8) -> u64 {
    ram.read_u64(COUNTS + u64::from(vector) * 8)
}
