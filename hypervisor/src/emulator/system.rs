//! MXCSR, and the checks that come before any use of a vector register.

use iced_x86::Instruction;

use super::Vendor;
use super::cpu::{Cpu, control};
use super::error::{Exception, Step, general_protection, invalid_opcode, vector};
use super::vector::Encoding;

/// The bits of MXCSR that every processor has (SDM vol. 1, section 10.2.3).
const MXCSR_COMMON: u32 = 0xffff;
/// MXCSR.MM, which only AMD processors have: the misaligned exception mask.
pub(super) const MXCSR_MM: u32 = 1 << 17;
/// XCR0 with both SSE and AVX state (SDM vol. 1, section 13.3).
const XCR0_AVX: u64 = 3 << 1;

impl Cpu<'_> {
    /// #UD or #NM if the vector registers are not enabled (SDM vol. 2, tables 2-21 and 2-27; vol. 3, table 14-1).
    pub(super) fn check_vectors(&mut self, encoding: Encoding) -> Step {
        match encoding {
            Encoding::Legacy => {
                let enabled = self.special.cr0 & control::CR0_EM == 0
                    && self.special.cr4 & control::CR4_OSFXSR != 0;
                if !enabled {
                    return invalid_opcode();
                }
            }
            Encoding::Vex => {
                let enabled = !self.paragraphs()
                    && self.special.cr4 & control::CR4_OSXSAVE != 0
                    && self.platform.xcr0()? & XCR0_AVX == XCR0_AVX;
                if !enabled {
                    return invalid_opcode();
                }
            }
        }
        if self.special.cr0 & control::CR0_TS != 0 {
            return Err(Exception::fault(vector::NM).into());
        }
        if encoding == Encoding::Vex && self.vectors()?.upper.is_none() {
            return invalid_opcode();
        }
        Ok(())
    }

    /// LDMXCSR.
    pub(super) fn load_mxcsr(&mut self, instruction: &Instruction, encoding: Encoding) -> Step {
        self.check_vectors(encoding)?;
        let value = self.read(instruction, 0)?;
        self.check_mxcsr(value as u32)?;
        self.vectors_mut()?.mxcsr = value as u32;
        Ok(())
    }

    /// #GP(0) if a value has bits that do not exist.
    pub(super) fn check_mxcsr(&self, value: u32) -> Step {
        let existing = match self.options.vendor {
            Vendor::Intel => MXCSR_COMMON,
            Vendor::Amd => MXCSR_COMMON | MXCSR_MM,
        };
        if value & !existing != 0 {
            return general_protection();
        }
        Ok(())
    }

    /// STMXCSR.
    pub(super) fn store_mxcsr(&mut self, instruction: &Instruction, encoding: Encoding) -> Step {
        self.check_vectors(encoding)?;
        let value = u64::from(self.vectors()?.mxcsr);
        self.write(instruction, 0, value)
    }
}
