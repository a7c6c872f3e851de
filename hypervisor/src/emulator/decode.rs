//! From bytes to an instruction, fetching bytes that the hypervisor did not hand over.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction};

use super::cpu::{Cpu, Mode, SegmentName};
use super::error::{EmulationError, Exception, Reason, Step, Stop, vector};
use super::memory::PAGE_BYTES;
use super::platform::AccessKind;
use super::{MAX_INSTRUCTION_BYTES, Vendor};

/// An instruction and the bytes that it was decoded from.
pub(super) struct Fetched {
    bytes: [u8; MAX_INSTRUCTION_BYTES],
    known: usize,
    pub(super) instruction: Instruction,
}

/// Why there is no instruction to execute.
pub(super) enum Failure {
    /// An exception or a failure of the platform.
    Stop(Stop),
    /// The decoder does not know it.
    Undecodable,
}

impl Fetched {
    pub(super) fn new(bytes: &[u8]) -> Self {
        let mut fetched = Self {
            bytes: [0; MAX_INSTRUCTION_BYTES],
            known: bytes.len().min(MAX_INSTRUCTION_BYTES),
            instruction: Instruction::default(),
        };
        for (to, from) in fetched.bytes.iter_mut().zip(bytes) {
            *to = *from;
        }
        fetched
    }

    pub(super) fn error(&self, reason: Reason) -> EmulationError {
        let length = match self.instruction.len() {
            0 => self.known,
            length => length,
        };
        EmulationError {
            mnemonic: self.instruction.mnemonic(),
            bytes: self.bytes,
            length: length.min(MAX_INSTRUCTION_BYTES) as u8,
            reason,
        }
    }
}

impl Cpu<'_> {
    /// Decodes the instruction at RIP and sets `next_rip`.
    pub(super) fn decode(&mut self, fetched: &mut Fetched) -> Result<(), Failure> {
        let bitness = match self.mode {
            Mode::Bits16 => 16,
            Mode::Bits32 => 32,
            Mode::Bits64 => 64,
        };
        let options = match self.options.vendor {
            Vendor::Intel => DecoderOptions::NONE,
            Vendor::Amd => DecoderOptions::AMD,
        };
        loop {
            let known = &fetched.bytes[..fetched.known];
            let Ok(mut decoder) = Decoder::try_with_ip(bitness, known, self.rip, options) else {
                return Err(Failure::Undecodable);
            };
            decoder.decode_out(&mut fetched.instruction);
            match decoder.last_error() {
                DecoderError::None => break,
                DecoderError::NoMoreBytes if fetched.known < MAX_INSTRUCTION_BYTES => {
                    fetched.known += self
                        .fetch(&mut fetched.bytes, fetched.known)
                        .map_err(Failure::Stop)?;
                }
                _ => return Err(self.undecodable(fetched, bitness, options)),
            }
        }
        let (prefixes, _) = fetched
            .bytes
            .split_at(fetched.instruction.len().saturating_sub(1));
        // The decoder takes F3 REX.B 90, an XCHG with R8, for PAUSE.
        if fetched.instruction.code() == Code::Pause
            && self.mode == Mode::Bits64
            && prefixes.last().is_some_and(|last| last & 0xf1 == 0x41)
        {
            return Err(Failure::Stop(Stop::Unsupported));
        }
        self.next_rip = self.mask_rip(self.rip.wrapping_add(fetched.instruction.len() as u64));
        Ok(())
    }

    /// A known instruction in a form that its own rules forbid (LOCK where there is none, a bad register …) is
    /// #UD; anything else is not known.
    fn undecodable(&self, fetched: &Fetched, bitness: u32, options: u32) -> Failure {
        let known = &fetched.bytes[..fetched.known];
        let lenient = options | DecoderOptions::NO_INVALID_CHECK;
        let Ok(mut decoder) = Decoder::try_with_ip(bitness, known, self.rip, lenient) else {
            return Failure::Undecodable;
        };
        let instruction = decoder.decode();
        if instruction.code() != Code::INVALID {
            Failure::Stop(Exception::fault(vector::UD).into())
        } else if instruction.len() == MAX_INSTRUCTION_BYTES {
            // It would go on: longer than an instruction may be.
            Failure::Stop(Exception::with_code(vector::GP, 0).into())
        } else {
            Failure::Undecodable
        }
    }

    /// Fetches bytes from `known` on, up to the end of a page, and says how many.
    fn fetch(&mut self, bytes: &mut [u8; MAX_INSTRUCTION_BYTES], known: usize) -> Step<usize> {
        let offset = self.mask_rip(self.rip.wrapping_add(known as u64));
        let linear = self.linear(SegmentName::Cs, offset, 1, AccessKind::Execute)?;
        let left_in_page = (PAGE_BYTES - linear % PAGE_BYTES) as usize;
        let count = left_in_page.min(MAX_INSTRUCTION_BYTES - known);
        let gpa = self.translate(linear, AccessKind::Execute)?;
        self.platform.read(gpa, &mut bytes[known..known + count])?;
        Ok(count)
    }

    /// RIP as wide as the mode has it.
    pub(super) fn mask_rip(&self, rip: u64) -> u64 {
        match self.mode {
            Mode::Bits64 => rip,
            Mode::Bits16 | Mode::Bits32 => rip & 0xffff_ffff,
        }
    }
}
