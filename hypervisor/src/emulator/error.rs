//! What an emulation can end with, other than success.

use iced_x86::Mnemonic;

use super::platform::PlatformError;

/// Vectors of the exceptions that the emulator raises (SDM vol. 3, table 7-1).
pub mod vector {
    /// #DE, divide error.
    pub const DE: u8 = 0;
    /// #DB, debug.
    pub const DB: u8 = 1;
    /// #BP, breakpoint.
    pub const BP: u8 = 3;
    /// #OF, overflow.
    pub const OF: u8 = 4;
    /// #BR, bound range exceeded.
    pub const BR: u8 = 5;
    /// #UD, invalid opcode.
    pub const UD: u8 = 6;
    /// #NM, device not available.
    pub const NM: u8 = 7;
    /// #NP, segment not present.
    pub const NP: u8 = 11;
    /// #SS, stack fault.
    pub const SS: u8 = 12;
    /// #GP, general protection.
    pub const GP: u8 = 13;
    /// #PF, page fault.
    pub const PF: u8 = 14;
    /// #MF, x87 floating-point error.
    pub const MF: u8 = 16;
    /// #AC, alignment check.
    pub const AC: u8 = 17;
}

/// An exception for the caller to deliver to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its vector, or for `INT n` the interrupt's.
    pub vector: u8,
    /// The error code to push, for the vectors that have one. `None` in real mode, where none is pushed.
    pub error_code: Option<u32>,
    /// CR2 for #PF, the bits to set in DR6 for #DB. Not yet written to either register.
    pub payload: Option<u64>,
    /// How it relates to the instruction.
    pub kind: ExceptionKind,
}

/// How an exception relates to the instruction that raised it, in the terms of the VM-entry
/// interruption-information field (SDM vol. 3, table 26-15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExceptionKind {
    /// RIP is the instruction's: it did not complete.
    Fault,
    /// RIP is the next instruction's: the single step that RFLAGS.TF asks for.
    Trap,
    /// `INT n`. RIP is the next instruction's, which is the return address to push; `length` bytes before it
    /// is the instruction, where a fault in the delivery (gate privilege) belongs.
    SoftwareInterrupt {
        /// Length of the instruction in bytes.
        length: u8,
    },
    /// `INT3` or `INTO`; RIP as for [`Self::SoftwareInterrupt`].
    SoftwareException {
        /// Length of the instruction in bytes.
        length: u8,
    },
    /// `INT1`; RIP as for [`Self::SoftwareInterrupt`], and no gate privilege is checked.
    PrivilegedSoftwareException {
        /// Length of the instruction in bytes.
        length: u8,
    },
}

impl Exception {
    /// A fault without error code.
    pub const fn fault(vector: u8) -> Self {
        Self {
            vector,
            error_code: None,
            payload: None,
            kind: ExceptionKind::Fault,
        }
    }

    /// A fault that pushes `error_code`.
    pub const fn with_code(vector: u8, error_code: u32) -> Self {
        Self {
            vector,
            error_code: Some(error_code),
            payload: None,
            kind: ExceptionKind::Fault,
        }
    }

    /// A page fault at the linear address `address`.
    pub const fn page_fault(error_code: u32, address: u64) -> Self {
        Self {
            vector: vector::PF,
            error_code: Some(error_code),
            payload: Some(address),
            kind: ExceptionKind::Fault,
        }
    }
}

/// Why an instruction was not emulated. The registers are as before, but for the completed
/// iterations of a REP instruction.
#[derive(Debug, thiserror::Error)]
#[error("cannot emulate {mnemonic:?} (bytes {}): {reason}", Hex(.bytes, *.length))]
pub struct EmulationError {
    /// The instruction; `INVALID` if it could not be decoded.
    pub mnemonic: Mnemonic,
    /// Its bytes, of which the first `length` count.
    pub bytes: [u8; 15],
    /// How many of `bytes` were known.
    pub length: u8,
    /// Why.
    #[source]
    pub reason: Reason,
}

/// The reason of an [`EmulationError`].
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// A valid instruction that the emulator has no semantics for.
    #[error("the emulator does not know it")]
    Unsupported,
    /// The bytes are no instruction in this mode, as far as the decoder knows. A real processor raises #UD, or
    /// is newer than the decoder.
    #[error("no such instruction is known")]
    Undecodable,
    /// Memory, a port, a translation or the vector registers could not be accessed.
    #[error("the platform failed: {0}")]
    Platform(#[source] PlatformError),
}

struct Hex<'a>(&'a [u8; 15], u8);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, byte) in self.0.iter().take(usize::from(self.1)).enumerate() {
            let gap = if index == 0 { "" } else { " " };
            write!(f, "{gap}{byte:02x}")?;
        }
        Ok(())
    }
}

/// Why the execution of an instruction stopped early.
#[derive(Debug)]
pub(super) enum Stop {
    /// An exception, which is a result like any other.
    Exception(Exception),
    /// No semantics for this form.
    Unsupported,
    /// The platform failed.
    Platform(PlatformError),
    /// A LOCK form lost against other writers too often: try again later.
    Retry,
}

impl From<Exception> for Stop {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

impl From<PlatformError> for Stop {
    fn from(error: PlatformError) -> Self {
        Self::Platform(error)
    }
}

/// What one step of an execution returns.
pub(super) type Step<T = ()> = Result<T, Stop>;

/// #UD.
pub(super) fn invalid_opcode<T>() -> Step<T> {
    Err(Exception::fault(vector::UD).into())
}

/// #GP(0).
pub(super) fn general_protection<T>() -> Step<T> {
    Err(Exception::with_code(vector::GP, 0).into())
}
