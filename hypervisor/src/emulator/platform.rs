//! What the emulator needs from whoever runs the vCPU.

use super::error::Exception;

/// A failure of the platform itself, passed through to the caller of the emulator.
pub type PlatformError = Box<dyn std::error::Error + Send + Sync>;

/// What an access wants to do with a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// Read data.
    Read,
    /// Write data, or read it and write it back.
    Write,
    /// Fetch an instruction.
    Execute,
}

/// An access for which a linear address is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Read, write or execute.
    pub kind: AccessKind,
    /// It is a user-mode access: CPL 3, and not implicit.
    pub user: bool,
    /// It is an implicit supervisor access (to a descriptor table or TSS): SMAP holds whatever RFLAGS.AC
    /// says (SDM vol. 3, section 5.6).
    pub implicit: bool,
}

/// Why a linear address has no guest physical address.
#[derive(Debug)]
pub enum TranslateFailure {
    /// The guest gets an exception: #PF with its error code and CR2 (see [`Exception::page_fault`]).
    Exception(Exception),
    /// The platform failed.
    Platform(PlatformError),
}

/// The SSE and AVX registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VectorRegisters {
    /// XMM0 to XMM15: bits 127:0 of each register, little-endian.
    pub xmm: [u128; 16],
    /// Bits 255:128 of YMM0 to YMM15; `None` on a vCPU without AVX state, which makes every VEX instruction #UD.
    pub upper: Option<[u128; 16]>,
    /// MXCSR.
    pub mxcsr: u32,
    /// Only in [`Platform::set_vectors`]: bit *n* says that register *n* was written by a VEX instruction, so
    /// that bits above 255 (of AVX-512) become zero, where the vCPU has them.
    pub zero_above: u16,
}

/// Where the XSAVE area holds a component of the extended state (CPUID 0DH, sub-leaf of its number; SDM vol. 1, section
/// 13.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XsaveComponent {
    /// Offset in the standard format, in bytes (EBX).
    pub offset: u32,
    /// Size in bytes (EAX).
    pub bytes: u32,
    /// Aligned to 64 bytes in the compacted format (ECX bit 1).
    pub aligned: bool,
}

/// Memory, ports, translations and vector registers of the vCPU whose instruction is emulated.
///
/// Every method may fail with an error of the platform's own; the emulation then ends with it and leaves
/// the registers alone. `read`, `write` and `compare_exchange` get guest physical addresses of RAM and of
/// devices alike (the routing is the platform's), need not be aligned, and never cross a 4 KiB page.
/// One access of the instruction is one call, unless it crosses a page: an 8-byte store to
/// a device arrives as one 8-byte write. The widest access is 32 bytes
/// (AVX), but for XSAVE and its relatives, which move parts of a page as one.
pub trait Platform {
    /// Translates the linear address `gva`, checking that `access` is allowed. It sets accessed and
    /// dirty bits as the processor would. Answers are reused for other addresses of the same 4 KiB page,
    /// while one instruction lasts.
    fn translate(&mut self, gva: u64, access: Access) -> Result<u64, TranslateFailure>;

    /// Reads guest physical memory or a device.
    fn read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), PlatformError>;

    /// Writes guest physical memory or a device.
    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), PlatformError>;

    /// Atomically replaces `expected` by `new`, and says whether memory held `expected`. Both have the same length
    /// of 1, 2, 4, 8 or 16 bytes. `gpa` may be unaligned; no atomicity is expected then.
    ///
    /// The emulator has read `expected` from the same place just before. A device, which no other vCPU can change
    /// behind the bus, is simply written.
    fn compare_exchange(
        &mut self,
        gpa: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<bool, PlatformError>;

    /// Reads 1, 2 or 4 bytes from an I/O port.
    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> Result<(), PlatformError>;

    /// Writes 1, 2 or 4 bytes to an I/O port.
    fn pio_write(&mut self, port: u16, data: &[u8]) -> Result<(), PlatformError>;

    /// The vector registers; asked for only by instructions that use them, once each.
    fn vectors(&mut self) -> Result<VectorRegisters, PlatformError>;

    /// Stores vector registers that an instruction has changed.
    fn set_vectors(&mut self, vectors: &VectorRegisters) -> Result<(), PlatformError>;

    /// XCR0, asked for by VEX instructions only (AVX needs bits 2:1 set). 0 on a vCPU without XSAVE.
    fn xcr0(&mut self) -> Result<u64, PlatformError>;

    /// The whole extended state, as an XSAVE area in the standard format (SDM vol. 1, section 13.4.2). `None`, the default,
    /// makes FXSAVE, XSAVE and their relatives unsupported.
    fn xsave_area(&mut self) -> Result<Option<Vec<u8>>, PlatformError> {
        Ok(None)
    }

    /// Replaces the extended state. `area` is what [`Self::xsave_area`] gave, with changes.
    fn set_xsave_area(&mut self, _area: &[u8]) -> Result<(), PlatformError> {
        Err("this vCPU does not offer its extended state".into())
    }

    /// The layout of component `index` (2 to 62), if the vCPU has it.
    fn xsave_component(&mut self, _index: u32) -> Option<XsaveComponent> {
        None
    }

    /// IA32_XSS, asked for by XSAVES and XRSTORS. Supervisor components are not supported.
    fn xss(&mut self) -> Result<u64, PlatformError> {
        Ok(0)
    }
}
