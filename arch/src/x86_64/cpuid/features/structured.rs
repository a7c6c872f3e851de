//! Features in leaf 7. Per group: the subleaf's part of the SDM's CPUID description; AMD gives the bits it has the same meaning
//! (APM vol. 3, E.3, Fn0000_0007).

use super::Feature;

/// All groups.
pub(super) const ROWS: &[&[Feature]] = &[
    LEAF_7_EBX,
    LEAF_7_ECX,
    LEAF_7_EDX,
    LEAF_7_1_EAX,
    LEAF_7_1_EBX,
    LEAF_7_1_ECX,
    LEAF_7_1_EDX,
    LEAF_7_2_EDX,
];

/// SDM, CPUID.07H.00H:EBX.
const LEAF_7_EBX: &[Feature] = bits! { 0x7, 0, Ebx:
    0 "fsgsbase" needs "lm";
    1 "tsc_adjust" needs "tsc", "msr";
    2 "sgx";
    3 "bmi1";
    4 "hle";
    5 "avx2" needs "avx";
    6 "fdp_excptn_only";
    7 "smep";
    8 "bmi2";
    9 "erms" also "ermsb";
    10 "invpcid";
    11 "rtm";
    12 "cqm" also "rdt_m", "pqm";
    13 "zero_fcs_fds" also "fcs_fds_deprecation";
    14 "mpx" needs "xsave";
    15 "rdt_a" also "pqe";
    16 "avx512f" needs "avx2", "fma", "f16c";
    17 "avx512dq" needs "avx512f";
    18 "rdseed";
    19 "adx";
    20 "smap";
    21 "avx512ifma" needs "avx512f";
    22 "pcommit";
    23 "clflushopt";
    24 "clwb";
    25 "intel_pt" also "pt", "proc_trace";
    26 "avx512pf" needs "avx512f";
    27 "avx512er" needs "avx512f";
    28 "avx512cd" needs "avx512f";
    29 "sha_ni" also "sha" needs "sse2";
    30 "avx512bw" needs "avx512f";
    31 "avx512vl" needs "avx512f";
};

/// SDM, CPUID.07H.00H:ECX. Bits 17-21 are a number.
const LEAF_7_ECX: &[Feature] = bits! { 0x7, 0, Ecx:
    0 "prefetchwt1";
    1 "avx512vbmi" needs "avx512bw";
    2 "umip";
    3 "pku" needs "xsave", "lm";
    4 "ospke" needs "pku";
    5 "waitpkg";
    6 "avx512_vbmi2" needs "avx512bw", "avx512vl";
    7 "shstk" also "cet_ss" needs "xsaves";
    8 "gfni" needs "sse2";
    9 "vaes" needs "avx2", "aes";
    10 "vpclmulqdq" needs "avx", "pclmulqdq";
    11 "avx512_vnni" needs "avx512vl";
    12 "avx512_bitalg" needs "avx512bw", "avx512vl";
    13 "tme" also "tme_en";
    14 "avx512_vpopcntdq" needs "avx512f";
    16 "la57" needs "lm";
    22 "rdpid";
    23 "key_locker" also "kl";
    24 "bus_lock_detect" also "bus_lock_trap", "bld";
    25 "cldemote";
    27 "movdiri";
    28 "movdir64b";
    29 "enqcmd" needs "xsaves";
    30 "sgx_lc" needs "sgx";
    31 "pks" needs "lm";
};

/// SDM, CPUID.07H.00H:EDX. KVM sets `spec_ctrl`, `stibp` and `ssbd` on AMD too, where AMD's own bits say the same.
const LEAF_7_EDX: &[Feature] = bits! { 0x7, 0, Edx:
    1 "sgx_keys" needs "sgx";
    2 "avx512_4vnniw" needs "avx512f";
    3 "avx512_4fmaps" needs "avx512f";
    4 "fsrm";
    5 "uintr" needs "lm";
    8 "avx512_vp2intersect" needs "avx512vl";
    9 "srbds_ctrl" also "mcu_opt_ctrl";
    10 "md_clear";
    11 "rtm_always_abort";
    13 "tsx_force_abort" also "rtm_force_abort";
    14 "serialize";
    15 "hybrid_cpu" also "hybrid";
    16 "tsxldtrk" needs "rtm";
    18 "pconfig";
    19 "arch_lbr" also "arch_lbrs";
    20 "ibt" also "cet_ibt" needs "xsaves";
    22 "amx_bf16" needs "amx_tile";
    23 "avx512_fp16" needs "avx512bw";
    24 "amx_tile" also "amx" needs "xfd", "lm";
    25 "amx_int8" needs "amx_tile";
    26 "spec_ctrl" also "ibrs_ibpb", "ibrsb";
    27 "stibp" also "intel_stibp";
    28 "flush_l1d" also "l1d_flush";
    29 "arch_capabilities" also "arch_caps";
    30 "core_capabilities" also "core_capability", "core_caps";
    31 "ssbd" also "spec_ctrl_ssbd" needs "spec_ctrl";
};

/// SDM, CPUID.07H.01H:EAX; ISE reference (RAO-INT, NMI source, MOVRS).
const LEAF_7_1_EAX: &[Feature] = bits! { 0x7, 1, Eax:
    0 "sha512" needs "avx2";
    1 "sm3" needs "avx";
    2 "sm4" needs "avx2";
    3 "rao_int";
    4 "avx_vnni" needs "avx2";
    5 "avx512_bf16" needs "avx512bw", "avx512vl";
    6 "lass" needs "smap", "lm";
    7 "cmpccxadd" needs "lm";
    8 "arch_perfmon_ext";
    10 "fzrm";
    11 "fsrs";
    12 "fsrc" also "fsrcs";
    17 "fred" needs "lkgs", "lm";
    18 "lkgs" needs "lm";
    19 "wrmsrns" needs "msr";
    20 "nmi_src" also "nmi_source" needs "fred";
    21 "amx_fp16" needs "amx_tile";
    22 "hreset";
    23 "avx_ifma" needs "avx2";
    26 "lam" needs "lm";
    27 "msrlist" needs "msr", "lm";
    30 "invd_disable_post_bios_done" also "no_invd";
    31 "movrs";
};

/// SDM, CPUID.07H.01H:EBX.
const LEAF_7_1_EBX: &[Feature] = bits! { 0x7, 1, Ebx:
    0 "intel_ppin" also "ppin";
    1 "pbndkb" also "tse";
    3 "cpuidmaxval_lim_rmv";
};

/// SDM, CPUID.07H.01H:ECX; ISE reference (MSR_IMM).
const LEAF_7_1_ECX: &[Feature] = bits! { 0x7, 1, Ecx:
    0 "rdt_m_asym";
    1 "rdt_a_asym";
    5 "msr_imm" needs "msr", "lm";
};

/// SDM, CPUID.07H.01H:EDX; ISE reference (user timer, USER_MSR, APX). AVX10 has all of Granite Rapids' AVX-512 (SDM vol. 1,
/// AVX10).
const LEAF_7_1_EDX: &[Feature] = bits! { 0x7, 1, Edx:
    4 "avx_vnni_int8" needs "avx2";
    5 "avx_ne_convert" needs "avx2";
    8 "amx_complex" needs "amx_tile";
    10 "avx_vnni_int16" needs "avx2";
    13 "user_timer" also "utmr" needs "uintr";
    14 "prefetchiti" also "intel_prefetchi";
    15 "user_msr" needs "msr", "lm";
    17 "uiret_uif" needs "uintr";
    18 "cet_sss" needs "shstk";
    19 "avx10"
        needs "avx512cd", "avx512dq", "avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg",
            "avx512_vpopcntdq", "avx512_bf16", "avx512_fp16", "gfni", "vaes", "vpclmulqdq";
    21 "apx" also "apx_f" needs "xsave", "lm";
    23 "mwait";
    24 "slsm";
};

/// SDM, CPUID.07H.02H:EDX. The first five are bits of IA32_SPEC_CTRL.
const LEAF_7_2_EDX: &[Feature] = bits! { 0x7, 2, Edx:
    0 "intel_psfd" needs "spec_ctrl";
    1 "ipred_ctrl" needs "spec_ctrl";
    2 "rrsba_ctrl" needs "spec_ctrl";
    3 "ddpd_u" also "ddp_ctrl" needs "spec_ctrl";
    4 "bhi_ctrl" needs "spec_ctrl";
    5 "mcdt_no";
    6 "uc_lock_disable" also "uc_lock_dis";
    7 "monitor_mitg_no";
};
