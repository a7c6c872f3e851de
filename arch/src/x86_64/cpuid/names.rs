//! Names of feature bits, as `/proc/cpuinfo` and the manuals spell them, for messages.

use super::compare::Register;

type Names = &'static [(u32, &'static str)];

/// The name of a feature bit, if it is a well-known one.
pub(super) fn feature(
    leaf: u32,
    subleaf: u32,
    register: Register,
    bit: u32,
) -> Option<&'static str> {
    let names = match (leaf, subleaf, register) {
        (1, _, Register::Ecx) => LEAF_1_ECX,
        (1, _, Register::Edx) => LEAF_1_EDX,
        (7, 0, Register::Ebx) => LEAF_7_EBX,
        (7, 0, Register::Ecx) => LEAF_7_ECX,
        (7, 0, Register::Edx) => LEAF_7_EDX,
        (7, 1, Register::Eax) => LEAF_7_1_EAX,
        (0xd, 0, Register::Eax) => XCR0,
        (0xd, 1, Register::Eax) => XSAVE,
        (0x4000_0001, _, Register::Eax) => KVM,
        (0x8000_0001, _, Register::Ecx) => EXTENDED_ECX,
        (0x8000_0001, _, Register::Edx) => EXTENDED_EDX,
        (0x8000_0007, _, Register::Edx) => &[(8, "constant_tsc")],
        (0x8000_0008, _, Register::Ebx) => AMD_EBX,
        _ => return None,
    };
    names
        .iter()
        .find(|(number, _)| *number == bit)
        .map(|(_, name)| *name)
}

const LEAF_1_ECX: Names = &[
    (0, "sse3"),
    (1, "pclmulqdq"),
    (3, "monitor"),
    (5, "vmx"),
    (9, "ssse3"),
    (12, "fma"),
    (13, "cx16"),
    (17, "pcid"),
    (19, "sse4_1"),
    (20, "sse4_2"),
    (21, "x2apic"),
    (22, "movbe"),
    (23, "popcnt"),
    (24, "tsc_deadline_timer"),
    (25, "aes"),
    (26, "xsave"),
    (28, "avx"),
    (29, "f16c"),
    (30, "rdrand"),
];

const LEAF_1_EDX: Names = &[
    (0, "fpu"),
    (1, "vme"),
    (2, "de"),
    (3, "pse"),
    (4, "tsc"),
    (5, "msr"),
    (6, "pae"),
    (7, "mce"),
    (8, "cx8"),
    (9, "apic"),
    (11, "sep"),
    (12, "mtrr"),
    (13, "pge"),
    (14, "mca"),
    (15, "cmov"),
    (16, "pat"),
    (17, "pse36"),
    (19, "clflush"),
    (23, "mmx"),
    (24, "fxsr"),
    (25, "sse"),
    (26, "sse2"),
    (27, "ss"),
];

const LEAF_7_EBX: Names = &[
    (0, "fsgsbase"),
    (1, "tsc_adjust"),
    (3, "bmi1"),
    (4, "hle"),
    (5, "avx2"),
    (7, "smep"),
    (8, "bmi2"),
    (9, "erms"),
    (10, "invpcid"),
    (11, "rtm"),
    (14, "mpx"),
    (16, "avx512f"),
    (17, "avx512dq"),
    (18, "rdseed"),
    (19, "adx"),
    (20, "smap"),
    (21, "avx512ifma"),
    (23, "clflushopt"),
    (24, "clwb"),
    (28, "avx512cd"),
    (29, "sha_ni"),
    (30, "avx512bw"),
    (31, "avx512vl"),
];

const LEAF_7_ECX: Names = &[
    (1, "avx512vbmi"),
    (2, "umip"),
    (3, "pku"),
    (5, "waitpkg"),
    (6, "avx512_vbmi2"),
    (7, "shstk"),
    (8, "gfni"),
    (9, "vaes"),
    (10, "vpclmulqdq"),
    (11, "avx512_vnni"),
    (12, "avx512_bitalg"),
    (14, "avx512_vpopcntdq"),
    (16, "la57"),
    (22, "rdpid"),
    (24, "bus_lock_detect"),
    (25, "cldemote"),
    (27, "movdiri"),
    (28, "movdir64b"),
];

const LEAF_7_EDX: Names = &[
    (4, "fsrm"),
    (8, "avx512_vp2intersect"),
    (10, "md_clear"),
    (14, "serialize"),
    (16, "tsxldtrk"),
    (20, "ibt"),
    (22, "amx_bf16"),
    (23, "avx512_fp16"),
    (24, "amx_tile"),
    (25, "amx_int8"),
    (26, "spec_ctrl"),
    (27, "stibp"),
    (28, "flush_l1d"),
    (29, "arch_capabilities"),
    (31, "ssbd"),
];

const LEAF_7_1_EAX: Names = &[
    (4, "avx_vnni"),
    (5, "avx512_bf16"),
    (7, "cmpccxadd"),
    (10, "fzrm"),
    (11, "fsrs"),
    (12, "fsrc"),
    (21, "amx_fp16"),
    (23, "avx_ifma"),
    (26, "lam"),
];

const XCR0: Names = &[
    (0, "x87 state"),
    (1, "SSE state"),
    (2, "AVX state"),
    (3, "MPX bounds state"),
    (4, "MPX configuration state"),
    (5, "AVX-512 opmask state"),
    (6, "AVX-512 ZMM_Hi256 state"),
    (7, "AVX-512 Hi16_ZMM state"),
    (9, "PKRU state"),
    (17, "AMX tile configuration state"),
    (18, "AMX tile data state"),
];

const XSAVE: Names = &[
    (0, "xsaveopt"),
    (1, "xsavec"),
    (2, "xgetbv1"),
    (3, "xsaves"),
    (4, "xfd"),
];

const KVM: Names = &[
    (0, "kvmclock"),
    (1, "kvm_nopiodelay"),
    (3, "kvmclock2"),
    (5, "kvm_steal_time"),
    (6, "kvm_pv_eoi"),
    (7, "kvm_pv_unhalt"),
    (9, "kvm_pv_tlb_flush"),
    (11, "kvm_pv_ipi"),
    (12, "kvm_poll_control"),
    (13, "kvm_pv_sched_yield"),
    (24, "kvmclock_stable"),
];

const EXTENDED_ECX: Names = &[
    (0, "lahf_lm"),
    (2, "svm"),
    (4, "cr8_legacy"),
    (5, "abm"),
    (6, "sse4a"),
    (7, "misalignsse"),
    (8, "3dnowprefetch"),
    (9, "osvw"),
    (11, "xop"),
    (16, "fma4"),
    (21, "tbm"),
    (22, "topoext"),
];

const EXTENDED_EDX: Names = &[
    (11, "syscall"),
    (20, "nx"),
    (22, "mmxext"),
    (25, "fxsr_opt"),
    (26, "pdpe1gb"),
    (27, "rdtscp"),
    (29, "lm"),
    (30, "3dnowext"),
    (31, "3dnow"),
];

const AMD_EBX: Names = &[
    (0, "clzero"),
    (2, "xsaveerptr"),
    (4, "rdpru"),
    (9, "wbnoinvd"),
    (12, "ibpb"),
    (14, "ibrs"),
    (15, "stibp"),
    (24, "ssbd"),
    (25, "virt_ssbd"),
    (28, "psfd"),
];
