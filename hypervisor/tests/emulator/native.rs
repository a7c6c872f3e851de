//! Executes one user-mode instruction on the real processor and says what it did.
//!
//! ```text
//!  run ─► enter: save the host's stack, load YMM, flags, 16 registers from the block ─► jmp [entry]
//!                                                                     │
//!           code page:  the instruction, jmp leave, int3 int3 …  ◄────┘
//!              │ completed                    │ faulted, or branched away
//!              ▼                              ▼
//!           leave: store registers        signal handler (own stack): store registers, go to `resume`
//!              └────────► resume: store YMM, restore the host ─► run returns
//! ```
//!
//! Compatibility mode is entered by a far jump, with data segments from an LDT that `segments` sets up, and left by another one
//! to a 64-bit trampoline on the code page.
//!
//! The block, the code page and the data pages are at fixed low addresses, so that 32-bit addresses reach them
//! and the stub needs no register.

use std::arch::global_asm;
use std::ffi::c_int;
use std::io;
use std::mem::offset_of;
use std::ptr::{null_mut, with_exposed_provenance_mut};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Where the block is.
const BLOCK: usize = 0x2100_0000;
/// Where the instruction is.
pub(crate) const CODE: u64 = 0x2200_0100;
pub(crate) const CODE_PAGE: usize = 0x2200_0000;
/// Where the data pages are: absent, writable, writable, read-only, absent.
pub(crate) const DATA: u64 = 0x2000_0000;
/// Bytes between the instruction's end and the `int3`s.
pub(crate) const EXIT_BYTES: u64 = 8;
/// The way out of compatibility mode: 64-bit code that goes to `leave`.
pub(crate) const TRAMPOLINE: u64 = 0x2200_0f00;
/// Selectors of 64-bit code and of data that Linux gives every process.
const USER_CODE: u16 = 0x33;
const USER_DATA: u16 = 0x2b;
const PAGE: usize = 4096;
/// Flags that the host runs with: IF, and bit 1.
const HOST_FLAGS: u64 = 0x202;

/// Registers before and after an instruction.
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    /// YMM0 to YMM15.
    pub(crate) ymm: [[u8; 32]; 16],
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub(crate) gpr: [u64; 16],
    pub(crate) flags: u64,
    pub(crate) mxcsr: u32,
}

/// What the signal handler saw.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trap {
    taken: u64,
    pub(crate) vector: u64,
    pub(crate) error_code: u64,
    pub(crate) address: u64,
    pub(crate) rip: u64,
}

/// The segment registers that an instruction runs with in compatibility mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Selectors {
    pub(crate) cs: u16,
    pub(crate) ds: u16,
    pub(crate) es: u16,
    pub(crate) ss: u16,
    /// The code segment is a 16-bit one.
    pub(crate) short: bool,
}

#[repr(C, align(64))]
struct Block {
    registers: Registers,
    host_rsp: u64,
    entry: u64,
    leave: u64,
    /// Where the far jump goes: offset and selector.
    far_offset: u32,
    far_selector: u32,
    host_mxcsr: u32,
    compatibility: u32,
    ds: u32,
    es: u32,
    ss: u32,
    active: u64,
    trap: Trap,
}

unsafe extern "C" {
    fn emulator_test_enter();
    fn emulator_test_far();
    fn emulator_test_signal();
    fn emulator_test_leave();
    fn emulator_test_resume();
}

global_asm!(
    ".macro all_ymm op, to_memory",
    "  .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "    .if \\to_memory",
    "      vmovdqu ymmword ptr [{block} + {ymm} + 32 * \\n], ymm\\n",
    "    .else",
    "      vmovdqu ymm\\n, ymmword ptr [{block} + {ymm} + 32 * \\n]",
    "    .endif",
    "  .endr",
    ".endm",
    "emulator_test_enter:",
    "  push rbx",
    "  push rbp",
    "  push r12",
    "  push r13",
    "  push r14",
    "  push r15",
    "  mov [{block} + {host_rsp}], rsp",
    "  stmxcsr dword ptr [{block} + {host_mxcsr}]",
    "  ldmxcsr dword ptr [{block} + {mxcsr}]",
    "  all_ymm op, 0",
    "  cmp dword ptr [{block} + {compatibility}], 0",
    "  je 2f",
    "  mov ds, word ptr [{block} + {ds}]",
    "  mov es, word ptr [{block} + {es}]",
    "  mov ss, word ptr [{block} + {ss}]",
    "2:",
    "  push qword ptr [{block} + {flags}]",
    "  popfq",
    "  mov rax, [{block} + {gpr}]",
    "  mov rcx, [{block} + {gpr} + 8]",
    "  mov rdx, [{block} + {gpr} + 16]",
    "  mov rbx, [{block} + {gpr} + 24]",
    "  mov rbp, [{block} + {gpr} + 40]",
    "  mov rsi, [{block} + {gpr} + 48]",
    "  mov rdi, [{block} + {gpr} + 56]",
    "  mov r8, [{block} + {gpr} + 64]",
    "  mov r9, [{block} + {gpr} + 72]",
    "  mov r10, [{block} + {gpr} + 80]",
    "  mov r11, [{block} + {gpr} + 88]",
    "  mov r12, [{block} + {gpr} + 96]",
    "  mov r13, [{block} + {gpr} + 104]",
    "  mov r14, [{block} + {gpr} + 112]",
    "  mov r15, [{block} + {gpr} + 120]",
    "  mov rsp, [{block} + {gpr} + 32]",
    "  jmp qword ptr [{block} + {entry}]",
    // The kernel leaves AC set, which compiled code cannot bear.
    "emulator_test_signal:",
    "  push {host_flags}",
    "  popfq",
    "  jmp {on_signal}",
    "emulator_test_far:",
    // jmp fword ptr [far_offset]
    "  .byte 0xff, 0x2c, 0x25",
    "  .long {block} + {far}",
    "emulator_test_leave:",
    "  mov [{block} + {gpr}], rax",
    "  mov [{block} + {gpr} + 8], rcx",
    "  mov [{block} + {gpr} + 16], rdx",
    "  mov [{block} + {gpr} + 24], rbx",
    "  mov [{block} + {gpr} + 32], rsp",
    "  mov [{block} + {gpr} + 40], rbp",
    "  mov [{block} + {gpr} + 48], rsi",
    "  mov [{block} + {gpr} + 56], rdi",
    "  mov [{block} + {gpr} + 64], r8",
    "  mov [{block} + {gpr} + 72], r9",
    "  mov [{block} + {gpr} + 80], r10",
    "  mov [{block} + {gpr} + 88], r11",
    "  mov [{block} + {gpr} + 96], r12",
    "  mov [{block} + {gpr} + 104], r13",
    "  mov [{block} + {gpr} + 112], r14",
    "  mov [{block} + {gpr} + 120], r15",
    "  mov rsp, [{block} + {host_rsp}]",
    "  pushfq",
    "  pop qword ptr [{block} + {flags}]",
    "emulator_test_resume:",
    "  push {host_flags}",
    "  popfq",
    "  cmp dword ptr [{block} + {compatibility}], 0",
    "  je 2f",
    "  mov eax, {user_data}",
    "  mov ss, eax",
    "  xor eax, eax",
    "  mov ds, eax",
    "  mov es, eax",
    "2:",
    "  all_ymm op, 1",
    "  vzeroupper",
    "  stmxcsr dword ptr [{block} + {mxcsr}]",
    "  ldmxcsr dword ptr [{block} + {host_mxcsr}]",
    "  pop r15",
    "  pop r14",
    "  pop r13",
    "  pop r12",
    "  pop rbp",
    "  pop rbx",
    "  ret",
    block = const BLOCK,
    ymm = const offset_of!(Block, registers) + offset_of!(Registers, ymm),
    gpr = const offset_of!(Block, registers) + offset_of!(Registers, gpr),
    flags = const offset_of!(Block, registers) + offset_of!(Registers, flags),
    mxcsr = const offset_of!(Block, registers) + offset_of!(Registers, mxcsr),
    host_mxcsr = const offset_of!(Block, host_mxcsr),
    host_rsp = const offset_of!(Block, host_rsp),
    entry = const offset_of!(Block, entry),
    host_flags = const HOST_FLAGS,
    on_signal = sym on_signal,
    compatibility = const offset_of!(Block, compatibility),
    far = const offset_of!(Block, far_offset),
    ds = const offset_of!(Block, ds),
    es = const offset_of!(Block, es),
    ss = const offset_of!(Block, ss),
    user_data = const USER_DATA,
);

fn block() -> *mut Block {
    with_exposed_provenance_mut(BLOCK)
}

/// The processor, set up once and lent to one test at a time.
pub(crate) struct Processor {
    /// GS base of the thread that runs instructions.
    pub(crate) gs_base: u64,
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It went on behind itself.
    Next,
    /// It went on elsewhere, or faulted: the trap says.
    Trapped(Trap),
}

/// Borrows the processor.
pub(crate) fn processor() -> MutexGuard<'static, Processor> {
    static PROCESSOR: OnceLock<Mutex<Processor>> = OnceLock::new();
    PROCESSOR
        .get_or_init(|| {
            set_up().expect("memory and signal handlers");
            Mutex::new(Processor { gs_base: 0 })
        })
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

fn map(address: usize, bytes: usize, protection: c_int) -> io::Result<()> {
    // SAFETY: MAP_FIXED_NOREPLACE takes only addresses that nothing uses.
    let mapped = unsafe {
        libc::mmap(
            with_exposed_provenance_mut(address),
            bytes,
            protection,
            libc::MAP_PRIVATE
                | libc::MAP_ANONYMOUS
                | libc::MAP_FIXED_NOREPLACE
                | libc::MAP_POPULATE,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set_up() -> io::Result<()> {
    let (read, write, execute) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    map(BLOCK, 2 * PAGE, read | write)?;
    map(CODE_PAGE, PAGE, read | write | execute)?;
    let data = DATA as usize;
    map(data, PAGE, libc::PROT_NONE)?;
    map(data + PAGE, 3 * PAGE, read | write)?;
    map(data + 4 * PAGE, PAGE, libc::PROT_NONE)?;
    // SAFETY: a stack of its own for handlers that nothing else uses; the handler only touches the block.
    unsafe {
        std::ptr::write_bytes(with_exposed_provenance_mut::<u8>(CODE_PAGE), 0xcc, PAGE);
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
        ] {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = emulator_test_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            if libc::sigaction(signal, &action, null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

extern "C" fn on_signal(signal: c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let block = block();
    // SAFETY: the kernel hands over a valid context; the block is mapped since before the handler was installed.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        if (*block).active == 0 {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        let order = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        for (slot, register) in order.into_iter().enumerate() {
            (*block).registers.gpr[slot] = registers[register as usize] as u64;
        }
        (*block).registers.flags = registers[libc::REG_EFL as usize] as u64;
        (*block).trap = Trap {
            taken: 1,
            vector: registers[libc::REG_TRAPNO as usize] as u64,
            error_code: registers[libc::REG_ERR as usize] as u64,
            address: registers[libc::REG_CR2 as usize] as u64,
            rip: registers[libc::REG_RIP as usize] as u64,
        };
        // CS in the low 16 bits, SS in the high ones.
        let selectors = &mut registers[libc::REG_CSGSFS as usize];
        let kept = *selectors as u64 & 0x0000_ffff_ffff_0000;
        *selectors = (kept | u64::from(USER_CODE) | u64::from(USER_DATA) << 48) as i64;
        registers[libc::REG_RIP as usize] = emulator_test_resume as *const () as i64;
        registers[libc::REG_RSP as usize] = (*block).host_rsp as i64;
        registers[libc::REG_EFL as usize] = HOST_FLAGS as i64;
    }
}

impl Processor {
    /// Gives the calling thread a stack for signal handlers and the GS base `base`.
    pub(crate) fn attach(&mut self, base: u64) {
        let stack = vec![0u8; 1 << 17].leak();
        let alternate = libc::stack_t {
            ss_sp: stack.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: stack.len(),
        };
        const ARCH_SET_GS: c_int = 0x1001;
        // SAFETY: the stack lives for ever; GS is not used by anything in user space on x86_64 Linux.
        unsafe {
            assert_eq!(libc::sigaltstack(&alternate, null_mut()), 0);
            assert_eq!(libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base), 0);
        }
        self.gs_base = base;
    }

    /// The writable and read-only data, 3 pages from `DATA + 4096` on.
    pub(crate) fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped by `set_up`, and lent to one test at a time.
        unsafe {
            std::slice::from_raw_parts_mut(
                with_exposed_provenance_mut(DATA as usize + PAGE),
                3 * PAGE,
            )
        }
    }

    /// Fills the data pages, the read-only one too.
    pub(crate) fn fill(&mut self, contents: &[u8]) {
        self.protect_last_page(libc::PROT_READ | libc::PROT_WRITE);
        self.data().copy_from_slice(contents);
        self.protect_last_page(libc::PROT_READ);
    }

    fn protect_last_page(&mut self, protection: c_int) {
        let page = with_exposed_provenance_mut(DATA as usize + 3 * PAGE);
        // SAFETY: the page is `set_up`'s, and written by `fill` only, while it may be.
        assert_eq!(unsafe { libc::mprotect(page, PAGE, protection) }, 0);
    }

    /// Executes `instruction` with `registers`, which become what it left: in 64-bit mode, or in
    /// compatibility mode with the given segments.
    pub(crate) fn run(
        &mut self,
        instruction: &[u8],
        registers: &mut Registers,
        selectors: Option<Selectors>,
    ) -> End {
        assert!(instruction.len() <= 15);
        let block = block();
        let leave = emulator_test_leave as *const () as u64;
        // SAFETY: the caller vouches, by having emulated it, that the instruction only touches the data pages,
        // registers and flags; the stub preserves everything that Rust relies on.
        unsafe {
            let code = with_exposed_provenance_mut::<u8>(CODE as usize);
            std::ptr::write_bytes(code, 0xcc, 32);
            std::ptr::copy_nonoverlapping(instruction.as_ptr(), code, instruction.len());
            let exit = code.add(instruction.len());
            match selectors {
                None => write_leave(exit),
                Some(selectors) => {
                    write_leave(with_exposed_provenance_mut(TRAMPOLINE as usize));
                    write_far_jump(exit, selectors.short);
                }
            }
            (*block).compatibility = u32::from(selectors.is_some());
            (*block).entry = CODE;
            if let Some(selectors) = selectors {
                (*block).ds = selectors.ds.into();
                (*block).es = selectors.es.into();
                (*block).ss = selectors.ss.into();
                (*block).far_offset = if selectors.short {
                    (CODE as usize - CODE_PAGE) as u32
                } else {
                    CODE as u32
                };
                (*block).far_selector = selectors.cs.into();
                (*block).entry = emulator_test_far as *const () as u64;
            }
            (*block).leave = leave;
            (*block).registers = registers.clone();
            (*block).trap = Trap::default();
            (*block).active = 1;
            std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
            emulator_test_enter();
            std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
            (*block).active = 0;
            *registers = (*block).registers.clone();
            if (*block).trap.taken == 0 {
                End::Next
            } else {
                End::Trapped((*block).trap)
            }
        }
    }
}

/// Writes `jmp qword ptr [the block's leave]`: through an aligned pointer, because AC may be set.
///
/// # Safety
///
/// `to` must have room for 7 bytes on the code page.
unsafe fn write_leave(to: *mut u8) {
    let pointer = (BLOCK + offset_of!(Block, leave)) as u32;
    // SAFETY: the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping([0xff, 0x24, 0x25].as_ptr(), to, 3);
        to.add(3).cast::<u32>().write_unaligned(pointer);
    }
}

/// Writes a far jump to the trampoline, for 16- or 32-bit code.
///
/// # Safety
///
/// `to` must have room for 8 bytes on the code page.
unsafe fn write_far_jump(to: *mut u8, short: bool) {
    let mut code = Vec::with_capacity(8);
    if short {
        code.push(0x66);
    }
    code.push(0xea);
    code.extend((TRAMPOLINE as u32).to_le_bytes());
    code.extend(USER_CODE.to_le_bytes());
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), to, code.len()) };
}
