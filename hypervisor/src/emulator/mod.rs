//! The x86_64 instruction emulator: executes one instruction that a hypervisor handed over.
//!
//! ```text
//!  caller (a back end)            emulator                              Platform (the caller's)
//!  ───────────────────            ────────                              ───────────────────────
//!  CpuState, bytes at RIP ──► decode ── bytes missing? ───────────────► translate(Execute), read
//!                               │
//!                               ▼
//!                             dispatch by mnemonic
//!                               │   read operands ── segment, limit, ──► translate(Read), read
//!                               │                    canonical, #AC
//!                               │   check the destination, ────────────► translate(Write)
//!                               │   both pages of a crossing one
//!                               │   compute result and flags
//!                               │   write ─────────────────────────────► write | compare_exchange
//!                               ▼                                        | pio_write | set_vectors
//!  Outcome ◄───────────────── commit the registers
//!   Completed   RIP is the next instruction's, registers are the result
//!   Repeating   a REP (or a contended LOCK) wants another call; state is valid, RIP unchanged
//!   Halted      HLT completed
//!   Exception   to be delivered by the caller; see ExceptionKind for what RIP is
//!  EmulationError: unknown or undecodable instruction, or the platform failed
//! ```
//!
//! A caller does:
//!
//! ```text
//!  let mut state = CpuState { general, special, interrupt_shadow };
//!  match emulate(&mut platform, &mut state, &intercept.bytes, &options)? {
//!      Outcome::Completed => write the registers back, run on,
//!      Outcome::Repeating => write them back, look for a kick, run on: the hypervisor exits again,
//!      Outcome::Halted => write them back, wait for an interrupt,
//!      Outcome::Exception(e) => write them back, inject e,
//!  }
//! ```
//!
//! What it promises:
//!
//! - All or nothing. Registers change only when the instruction completes; on an exception or a failure they are
//!   as before, except for the completed iterations of a REP. Memory is written only after every fault has
//!   been ruled out. What cannot be undone is a device's read side effect, and a first page already
//!   written when the platform itself fails on the second.
//! - One access of the instruction is one access of the platform, of the same width, unless it crosses a page.
//! - The order in which faults of one instruction are looked for is: decoding, #UD, #NM, then operands in the
//!   order in which the processor accesses them, each with segment, alignment and page checks in that order.
//! - Bounded work: a call executes at most one instruction and [`Options::max_iterations`] of its repetitions.
//! - No guest state and no guest bytes make it panic.
//! - No allocation per instruction, but for XSAVE and its relatives.
//!
//! What it does not do: far transfers, task switches, moves to and from control and debug registers, MSRs, CPUID, RDTSC, x87
//! and MMX arithmetic, floating-point SSE and AVX, AVX-512. These are [`Reason::Unsupported`] or
//! [`Reason::Undecodable`]; [`covers`] answers for a mnemonic. It emulates what it knows without looking at the guest's
//! CPUID. Debug-register breakpoints on data are not looked for. CR4.VME and CR4.PVI virtual interrupts are unsupported.
//!
//! A platform without a translation service of its own builds [`Platform::translate`] on [`paging::Paging`].
//!
//! Where the folder keeps what: `decode`, `dispatch` (mnemonic to code), `cpu` (the working copy), `memory` (segments,
//! alignment, pages), `operand`; then by kind of instruction `data`, `arithmetic` and `alu` and `shifts`, `bits`, `string`, `stack`,
//! `control`, `segment` and `tables`, `vector` and `packed` and `lanes`, `system`, `xsave`. `area` is for platforms: vector
//! registers from and to an XSAVE area.

mod alu;
mod area;
mod arithmetic;
mod bits;
mod control;
mod cpu;
mod data;
mod decode;
mod dispatch;
mod error;
mod lanes;
mod memory;
mod operand;
mod packed;
pub mod paging;
mod platform;
mod segment;
mod shifts;
mod stack;
mod string;
mod system;
mod tables;
mod vector;
mod xsave;

use arch::x86_64::state::{GeneralRegisters, SpecialRegisters};

pub use error::{EmulationError, Exception, ExceptionKind, Reason, vector as exception_vector};
pub use iced_x86::Mnemonic;
pub use platform::{
    Access, AccessKind, Platform, PlatformError, TranslateFailure, VectorRegisters, XsaveComponent,
};

use cpu::{Cpu, Finish, rflags};
use error::Stop;

/// The longest instruction (SDM vol. 2, section 2.3.11).
pub const MAX_INSTRUCTION_BYTES: usize = 15;

/// What the emulator reads and changes of a vCPU. Vector registers come through [`Platform::vectors`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// General registers, RIP and RFLAGS.
    pub general: GeneralRegisters,
    /// Segments, tables and control registers. The emulator changes at most one segment register.
    pub special: SpecialRegisters,
    /// Interrupt shadow as in [`arch::x86_64::state::PendingEvents::interrupt_shadow`]: STI (bit 1) or
    /// MOV SS (bit 0). A completed instruction clears it, or sets it anew.
    pub interrupt_shadow: u8,
}

/// Whose processor to be where they differ in what a guest can see. The AMD side is what comparison with one showed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vendor {
    /// Near branches in 64-bit mode ignore the operand-size prefix; a REP that faults leaves RFLAGS as they were.
    #[default]
    Intel,
    /// Near branches in 64-bit mode obey the operand-size prefix (APM vol. 3, section 1.2.7); a REP that faults leaves
    /// the flags of its last iteration; MXCSR.MM exists; a prefetch (0F 0D) of a register is #UD; `MOVSXD` to
    /// 16 bits reads four bytes.
    Amd,
}

/// How to emulate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whose processor the guest believes to have.
    pub vendor: Vendor,
    /// Check IOPL and the TSS's I/O permission bitmap in port instructions. Off where the hypervisor has
    /// done so before it intercepted.
    pub check_io_permission: bool,
    /// After how many iterations of a REP instruction to return [`Outcome::Repeating`]. 0 counts as 1.
    pub max_iterations: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            vendor: Vendor::Intel,
            check_io_permission: false,
            max_iterations: 4096,
        }
    }
}

/// What an emulated instruction led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// It completed.
    Completed,
    /// It is not finished: RIP still points at it and the state is valid. Either [`Options::max_iterations`] of
    /// a REP are done, or a LOCK form lost against other writers again and again (nothing is done then).
    Repeating,
    /// HLT completed: RIP is the next instruction's.
    Halted,
    /// The guest gets an exception. Registers are unchanged, but for a REP's completed iterations, or for
    /// an advanced RIP where [`ExceptionKind`] says so.
    Exception(Exception),
}

/// Emulates the instruction at RIP of `state`.
///
/// `bytes` are the first bytes at RIP, as many as are known (further ones than the instruction's do not matter);
/// if they are fewer than the instruction has, the rest is fetched through `platform`.
///
/// # Errors
///
/// See [`Reason`]. The registers are then as on an exception.
pub fn emulate(
    platform: &mut dyn Platform,
    state: &mut CpuState,
    bytes: &[u8],
    options: &Options,
) -> Result<Outcome, EmulationError> {
    let mut cpu = Cpu::new(platform, state, options);
    let mut fetched = decode::Fetched::new(bytes);
    let result = match cpu.decode(&mut fetched) {
        Ok(()) => cpu.execute(&fetched.instruction),
        Err(decode::Failure::Stop(stop)) => Err(stop),
        Err(decode::Failure::Undecodable) => return Err(fetched.error(Reason::Undecodable)),
    };
    let result = result.and_then(|()| cpu.store_vectors());
    let single_step = cpu.flags_before & rflags::TF != 0;
    let real_mode = !cpu.protected();
    let commit = cpu.finish();
    match result {
        Ok(()) => {
            let (outcome, complete) = match commit.finish {
                Finish::Next => (Outcome::Completed, true),
                Finish::Halt => (Outcome::Halted, true),
                Finish::Raise(exception) => (Outcome::Exception(exception), true),
                Finish::Repeat => (Outcome::Repeating, false),
            };
            let shadowed = commit.interrupt_shadow & cpu::SHADOW_MOV_SS != 0;
            commit.complete(state, complete);
            let step = matches!(outcome, Outcome::Completed | Outcome::Repeating);
            if single_step && step && !shadowed {
                return Ok(Outcome::Exception(Exception {
                    vector: exception_vector::DB,
                    error_code: None,
                    payload: Some(cpu::DR6_BS),
                    kind: ExceptionKind::Trap,
                }));
            }
            Ok(outcome)
        }
        Err(stop) => {
            if commit.progress {
                commit.iterations(state, options.vendor);
            }
            match stop {
                Stop::Exception(mut exception) => {
                    if real_mode {
                        exception.error_code = None;
                    }
                    Ok(Outcome::Exception(exception))
                }
                Stop::Retry => Ok(Outcome::Repeating),
                Stop::Unsupported => Err(fetched.error(Reason::Unsupported)),
                Stop::Platform(error) => Err(fetched.error(Reason::Platform(error))),
            }
        }
    }
}

/// Whether the emulator has semantics for some form of `mnemonic`: the list of what it covers.
pub fn covers(mnemonic: Mnemonic) -> bool {
    dispatch::covered(mnemonic)
}
