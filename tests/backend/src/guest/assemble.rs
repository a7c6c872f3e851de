//! From a list of instructions to bytes at an address.

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

use super::bus::STOP_PORT;
use crate::outcome::Outcome;

/// The code of a program: calls of the assembler's methods.
pub type Code<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Machine code for a mode of `bits` bits that is to lie at `at`.
pub fn assemble(bits: u32, at: u64, code: Code<'_>) -> Outcome<Vec<u8>> {
    let mut assembler = CodeAssembler::new(bits)?;
    code(&mut assembler)?;
    Ok(assembler.assemble(at)?)
}

/// Instructions that programs share.
pub trait Idioms {
    /// Ends [`super::Guest::run`]; a further run goes on behind. Keeps all registers.
    fn stop(&mut self) -> Result<(), IcedError>;
    /// Stops again and again.
    fn stop_for_good(&mut self) -> Result<(), IcedError>;
    /// Spins for ever.
    fn spin(&mut self) -> Result<(), IcedError>;
}

impl Idioms for CodeAssembler {
    fn stop(&mut self) -> Result<(), IcedError> {
        use iced_x86::code_asm::al;
        // The immediate form needs no register, and one byte is enough for the number.
        self.out(u32::from(STOP_PORT), al)
    }

    fn stop_for_good(&mut self) -> Result<(), IcedError> {
        let mut again = self.create_label();
        self.set_label(&mut again)?;
        self.stop()?;
        self.jmp(again)
    }

    fn spin(&mut self) -> Result<(), IcedError> {
        let mut here = self.create_label();
        self.set_label(&mut here)?;
        self.jmp(here)
    }
}
