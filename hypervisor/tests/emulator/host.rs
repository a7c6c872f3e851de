//! What the tests know of the machine that they run on, and how its state translates to the emulator's.

use arch::x86_64::state::{DescriptorTable, GeneralRegisters, Segment, SpecialRegisters};
use hypervisor::emulator::{CpuState, VectorRegisters};

use crate::native::Registers;

/// A number from the environment.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.replace('_', "").parse().ok())
        .unwrap_or(default)
}

/// Whether AMD made this processor.
pub(crate) fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    leaf.ebx == u32::from_le_bytes(*b"Auth")
}

/// Whether the processor has every instruction set that the emulator covers.
pub(crate) fn has_what_is_compared() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2")
        && has!("sse4.2")
        && has!("popcnt")
        && has!("lzcnt")
        && has!("bmi1")
        && has!("bmi2")
        && has!("adx")
        && has!("movbe")
        && has!("cmpxchg16b")
}

/// The processor's XCR0: VEX instructions ask for it.
pub(crate) fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: XGETBV of register 0 reads; a processor without it has no AVX, which these tests need anyway.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// What FXSAVE stores as MXCSR_MASK.
pub(crate) fn mxcsr_mask() -> u32 {
    #[repr(C, align(16))]
    struct Area([u8; 512]);
    let mut area = Area([0; 512]);
    // SAFETY: the area has FXSAVE's size and alignment.
    unsafe { std::arch::x86_64::_fxsave64(area.0.as_mut_ptr()) };
    u32::from_le_bytes(area.0[28..32].try_into().expect("4 bytes"))
}

/// The state that Linux gives a 64-bit process.
pub(crate) fn user_mode(gs_base: u64) -> SpecialRegisters {
    let flat = |selector: u16, access: u32| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
    };
    let null = Segment {
        access: 1 << 16,
        ..Segment::default()
    };
    SpecialRegisters {
        cs: flat(0x33, 0xa0fb),
        ss: flat(0x2b, 0xc0f3),
        ds: null,
        es: null,
        fs: null,
        gs: Segment {
            base: gs_base,
            ..null
        },
        gdt: DescriptorTable::default(),
        // PE, MP, ET, NE, WP, AM, PG.
        cr0: 0x8005_0033,
        // PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE.
        cr4: 0x5_0620,
        // LME, LMA, NXE, SCE.
        efer: 0xd01,
        ..SpecialRegisters::default()
    }
}

/// The emulator's registers from the processor's.
pub(crate) fn general(registers: &Registers, rip: u64) -> GeneralRegisters {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = registers.gpr;
    GeneralRegisters {
        rax,
        rbx,
        rcx,
        rdx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags: registers.flags,
    }
}

/// As [`general`], the vector registers.
pub(crate) fn to_vectors(registers: &Registers) -> VectorRegisters {
    let mut vectors = VectorRegisters {
        mxcsr: registers.mxcsr,
        ..VectorRegisters::default()
    };
    let mut upper = [0; 16];
    for (index, ymm) in registers.ymm.iter().enumerate() {
        vectors.xmm[index] = u128::from_le_bytes(ymm[..16].try_into().expect("16 bytes"));
        upper[index] = u128::from_le_bytes(ymm[16..].try_into().expect("16 bytes"));
    }
    vectors.upper = Some(upper);
    vectors
}

/// The processor's registers from the emulator's.
pub(crate) fn from_state(state: &CpuState, vectors: &VectorRegisters) -> Registers {
    let g = &state.general;
    let mut ymm = [[0; 32]; 16];
    for (index, register) in ymm.iter_mut().enumerate() {
        register[..16].copy_from_slice(&vectors.xmm[index].to_le_bytes());
        let upper = vectors.upper.map_or(0, |upper| upper[index]);
        register[16..].copy_from_slice(&upper.to_le_bytes());
    }
    Registers {
        ymm,
        gpr: [
            g.rax, g.rcx, g.rdx, g.rbx, g.rsp, g.rbp, g.rsi, g.rdi, g.r8, g.r9, g.r10, g.r11,
            g.r12, g.r13, g.r14, g.r15,
        ],
        flags: g.rflags,
        mxcsr: vectors.mxcsr,
    }
}
