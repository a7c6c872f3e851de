//! FPU, SSE and AVX registers over exits and moves. All in ring 3: a hypervisor that interprets ring 0 need not know them there.

use hypervisor::Hypervisor;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::is_seen;
use crate::guest::{DATA, Guest, Idioms as _, MMIO, MORE_DATA};
use crate::outcome::{Outcome, ensure, same, skip};

/// AVX and XSAVE.
const AVX: (u32, u32) = (1, 1 << 28);
const XSAVE: (u32, u32) = (1, 1 << 26);
/// XCR0.AVX (SDM vol. 1, section 13.1).
const AVX_STATE: u32 = 1 << 2;

const XMM: [AsmRegisterXmm; 16] = [
    xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14,
    xmm15,
];
const YMM: [AsmRegisterYmm; 16] = [
    ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14,
    ymm15,
];

/// Loads all registers from [`MORE_DATA`], leaves the guest in two ways, and stores them at [`DATA`].
fn sse(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.fninit()?;
    a.fldcw(word_ptr(MORE_DATA + 0x208))?;
    a.fld1()?;
    a.fldpi()?;
    a.ldmxcsr(dword_ptr(MORE_DATA + 0x200))?;
    for (n, register) in (0..).zip(XMM) {
        a.movups(register, xmmword_ptr(MORE_DATA + n * 16))?;
    }
    leave(a)?;
    for (n, register) in (0..).zip(XMM) {
        a.movups(xmmword_ptr(DATA + n * 16), register)?;
    }
    a.stmxcsr(dword_ptr(DATA + 0x200))?;
    a.fnstcw(word_ptr(DATA + 0x208))?;
    a.fstp(qword_ptr(DATA + 0x210))?;
    a.fstp(qword_ptr(DATA + 0x218))?;
    a.stop_for_good()
}

/// A stop, device memory, a port.
fn leave(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.stop()?;
    a.mov(edi, MMIO as u32)?;
    a.mov(dword_ptr(rdi), 5)?;
    a.mov(eax, dword_ptr(rdi))?;
    a.in_(al, 0x51)
}

fn avx(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for (n, register) in (0..).zip(YMM) {
        a.vmovups(register, ymmword_ptr(MORE_DATA + n * 32))?;
    }
    leave(a)?;
    for (n, register) in (0..).zip(YMM) {
        a.vmovups(ymmword_ptr(DATA + n * 32), register)?;
    }
    a.stop_for_good()
}

/// Round towards zero, all exceptions masked (SDM vol. 1, section 10.2.3).
const MXCSR: u32 = 0x7f80;
/// Double precision, all exceptions masked.
const FCW: u16 = 0x27f;

fn pattern() -> [u8; 512] {
    std::array::from_fn(|i| (i as u8).wrapping_mul(37) ^ 0x5a)
}

fn fill(guest: &Guest) {
    guest.ram.write(MORE_DATA, &pattern());
    guest.ram.write(MORE_DATA + 0x200, &MXCSR.to_le_bytes());
    guest.ram.write(MORE_DATA + 0x208, &FCW.to_le_bytes());
}

fn check_sse(guest: &Guest) -> Outcome {
    same!(
        guest.ram.read::<256>(DATA),
        pattern()[..256],
        "XMM registers"
    );
    same!(guest.ram.read_u32(DATA + 0x200), MXCSR, "MXCSR");
    same!(guest.ram.read(DATA + 0x208), FCW.to_le_bytes(), "FCW");
    same!(
        guest.ram.quads(DATA + 0x210).map(f64::from_bits),
        [std::f64::consts::PI, 1.0],
        "the FPU's stack"
    );
    Ok(())
}

pub(super) fn sse_over_exits(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &sse)?;
    fill(&guest);
    guest.run()?;
    guest.run()?;
    check_sse(&guest)
}

/// The vCPU stops with its registers full, and another machine stores them.
pub(super) fn sse_over_a_move(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut first = Guest::user(hypervisor, &sse)?;
    fill(&first);
    first.run()?;
    let state = first.vcpu.save_state()?;
    let mut second = Guest::user(hypervisor, &sse)?;
    second.vcpu.restore_state(&state)?;
    second.run()?;
    check_sse(&second)
}

fn avx_guest(hypervisor: &dyn Hypervisor) -> Outcome<Guest> {
    if !is_seen(hypervisor, XSAVE)? || !is_seen(hypervisor, AVX)? {
        return skip("this host's guests have no XSAVE and AVX");
    }
    let mut guest = Guest::user(hypervisor, &avx)?;
    let mut state = guest.vcpu.save_state()?;
    // OSXSAVE; x87, SSE and AVX state (SDM vol. 1, section 13.3).
    state.special.cr4 |= 1 << 18;
    let xcr0 = state.xcrs.as_mut().and_then(|xcrs| xcrs.first_mut());
    ensure!(xcr0.is_some(), "XSAVE is offered, and no XCR0 was saved");
    if let Some(xcr0) = xcr0 {
        xcr0.value = 7;
    }
    guest.vcpu.restore_state(&state)?;
    fill(&guest);
    Ok(guest)
}

pub(super) fn avx_over_exits(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = avx_guest(hypervisor)?;
    guest.run()?;
    guest.run()?;
    same!(guest.ram.read(DATA), pattern(), "YMM registers");
    Ok(())
}

pub(super) fn avx_over_a_move(hypervisor: &dyn Hypervisor) -> Outcome {
    // Whether the state is kept does not hang on the instructions being offered: a KVM that runs ring 3 natively keeps it anyway.
    let kept = hypervisor
        .supported_cpuid()?
        .get(0xd, 0)
        .is_some_and(|states| states.eax & AVX_STATE != 0);
    if !kept {
        return skip("this host keeps no AVX state for its guests");
    }
    let mut first = avx_guest(hypervisor)?;
    first.run()?;
    let state = first.vcpu.save_state()?;
    let mut second = Guest::user(hypervisor, &avx)?;
    second.vcpu.restore_state(&state)?;
    let again = second.vcpu.save_state()?;
    let xcr0 = again.xcrs.as_deref().and_then(|xcrs| xcrs.first());
    same!(xcr0.map(|xcr| xcr.value), Some(7), "XCR0 after the restore");
    second.run()?;
    same!(second.ram.read(DATA), pattern(), "YMM registers");
    Ok(())
}
