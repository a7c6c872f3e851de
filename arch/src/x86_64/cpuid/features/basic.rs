//! Features in the basic leaves, but leaf 7. Per group: the leaf's part of the SDM's CPUID description and, where AMD has it
//! too, of the APM.

use super::Feature;

/// All groups.
pub(super) const ROWS: &[&[Feature]] = &[
    LEAF_1_EDX,
    LEAF_1_ECX,
    LEAF_5_ECX,
    LEAF_6_EAX,
    LEAF_6_ECX,
    LEAF_D_1_EAX,
    LEAF_F_EDX,
    LEAF_F_1_EDX,
    LEAF_10_EBX,
    LEAF_10_1_ECX,
    LEAF_10_2_ECX,
    LEAF_10_3_ECX,
    LEAF_12_EAX,
    LEAF_14_EBX,
    LEAF_14_ECX,
    LEAF_19_EAX,
    LEAF_19_EBX,
    LEAF_19_ECX,
    LEAF_1C_EAX,
    LEAF_1C_EBX,
    LEAF_1C_ECX,
    LEAF_1E_1_EAX,
    LEAF_20_EBX,
    LEAF_24_EBX,
    LEAF_24_1_ECX,
    LEAF_29_EBX,
];

/// SDM, CPUID.01H:EDX; APM vol. 3, E.3, Fn0000_0001_EDX.
const LEAF_1_EDX: &[Feature] = bits! { 0x1, 0, Edx:
    0 "fpu" also "x87";
    1 "vme";
    2 "de";
    3 "pse";
    4 "tsc";
    5 "msr";
    6 "pae";
    7 "mce";
    8 "cx8" also "cmpxchg8b";
    9 "apic" needs "msr";
    11 "sep" also "sysenter" needs "msr";
    12 "mtrr" needs "msr";
    13 "pge";
    14 "mca" needs "mce", "msr";
    15 "cmov" needs "fxsr";
    16 "pat" needs "msr";
    17 "pse36" needs "pse";
    18 "pn" also "psn";
    19 "clflush" also "clfsh";
    21 "dts" also "ds";
    22 "acpi";
    23 "mmx" needs "fxsr";
    24 "fxsr" needs "fpu";
    25 "sse" needs "fxsr";
    26 "sse2" needs "sse";
    27 "ss" also "self_snoop";
    28 "ht" also "htt";
    29 "tm";
    30 "ia64";
    31 "pbe";
};

/// SDM, CPUID.01H:ECX; APM vol. 3, E.3, Fn0000_0001_ECX.
const LEAF_1_ECX: &[Feature] = bits! { 0x1, 0, Ecx:
    0 "pni" also "sse3" needs "sse2";
    1 "pclmulqdq" also "pclmul", "pclmuldq" needs "sse2";
    2 "dtes64" needs "dts";
    3 "monitor";
    4 "ds_cpl" needs "dts";
    5 "vmx";
    6 "smx";
    7 "est" also "eist";
    8 "tm2";
    9 "ssse3" needs "pni";
    10 "cid" also "cnxt_id";
    11 "sdbg";
    12 "fma" also "fma3" needs "avx";
    13 "cx16" also "cmpxchg16b" needs "lm";
    14 "xtpr";
    15 "pdcm";
    17 "pcid" needs "lm";
    18 "dca";
    19 "sse4_1" needs "ssse3";
    20 "sse4_2" needs "sse4_1";
    21 "x2apic" needs "apic";
    22 "movbe";
    23 "popcnt";
    24 "tsc_deadline_timer" also "tsc_deadline" needs "apic", "tsc";
    25 "aes" also "aesni" needs "sse2";
    26 "xsave" needs "fxsr";
    27 "osxsave" needs "xsave";
    28 "avx" needs "xsave", "sse4_2";
    29 "f16c" needs "avx";
    30 "rdrand" also "rdrnd";
    31 "hypervisor";
};

/// SDM, CPUID.05H:ECX; APM vol. 3, E.3, Fn0000_0005_ECX.
const LEAF_5_ECX: &[Feature] = bits! { 0x5, 0, Ecx:
    0 "mwait_ext" also "emx";
    1 "mwait_irq_break" also "ibe";
};

/// SDM, CPUID.06H:EAX; APM vol. 3, E.3, Fn0000_0006_EAX (ARAT only).
const LEAF_6_EAX: &[Feature] = bits! { 0x6, 0, Eax:
    0 "dtherm";
    1 "ida" also "turbo_boost";
    2 "arat" needs "apic";
    4 "pln";
    5 "ecmd";
    6 "pts";
    7 "hwp";
    8 "hwp_notify" also "hwp_interrupt" needs "hwp";
    9 "hwp_act_window" also "hwp_activity_window" needs "hwp";
    10 "hwp_epp" needs "hwp";
    11 "hwp_pkg_req" also "hwp_request_pkg" needs "hwp";
    13 "hdc";
    14 "turbo_boost_max" also "itbm";
    15 "hwp_highest_perf_change" also "hwp_cap" needs "hwp";
    16 "hwp_peci_override" needs "hwp";
    17 "flexible_hwp" needs "hwp";
    18 "hwp_request_fast_access" needs "hwp";
    19 "hfi" also "hw_feedback";
    20 "hwp_request_ignore_idle" needs "hwp";
    22 "hwp_ctl" needs "hwp";
    23 "thread_director" also "itd" needs "hfi";
};

/// SDM, CPUID.06H:ECX; APM vol. 3, E.3, Fn0000_0006_ECX (EffFreq only).
const LEAF_6_ECX: &[Feature] = bits! { 0x6, 0, Ecx:
    0 "aperfmperf" also "eff_freq";
    3 "epb" also "energy_perf_bias";
};

/// SDM, CPUID.0DH.01H:EAX; APM vol. 3, E.3, Fn0000_000D_EAX_x1.
const LEAF_D_1_EAX: &[Feature] = bits! { 0xd, 1, Eax:
    0 "xsaveopt" needs "xsave";
    1 "xsavec" needs "xsave";
    2 "xgetbv1" needs "xsave";
    3 "xsaves" also "xss" needs "xsave";
    4 "xfd" needs "xsaves", "xgetbv1";
};

/// SDM, CPUID.0FH.00H:EDX; APM vol. 3, E.3, Fn0000_000F_EDX_x0.
const LEAF_F_EDX: &[Feature] = bits! { 0xf, 0, Edx:
    1 "cqm_llc" also "l3_mon" needs "cqm";
};

/// SDM, CPUID.0FH.01H:EDX; APM vol. 3, E.3, Fn0000_000F_EDX_x1.
const LEAF_F_1_EDX: &[Feature] = bits! { 0xf, 1, Edx:
    0 "cqm_occup_llc" also "cmt" needs "cqm_llc";
    1 "cqm_mbm_total" needs "cqm_llc";
    2 "cqm_mbm_local" needs "cqm_llc";
};

/// SDM, CPUID.10H.00H:EBX; APM vol. 3, E.3, Fn0000_0010_EBX_x0.
const LEAF_10_EBX: &[Feature] = bits! { 0x10, 0, Ebx:
    1 "cat_l3" needs "rdt_a";
    2 "cat_l2" needs "rdt_a";
    3 "mba" needs "rdt_a";
    5 "cba" needs "rdt_a";
    6 "resource_priority" needs "rdt_a";
};

/// SDM, CPUID.10H.01H:ECX; APM vol. 3, E.3, Fn0000_0010_ECX_x1.
const LEAF_10_1_ECX: &[Feature] = bits! { 0x10, 1, Ecx:
    2 "cdp_l3" needs "cat_l3";
};

/// SDM, CPUID.10H.02H:ECX.
const LEAF_10_2_ECX: &[Feature] = bits! { 0x10, 2, Ecx:
    2 "cdp_l2" needs "cat_l2";
};

/// SDM, CPUID.10H.03H:ECX.
const LEAF_10_3_ECX: &[Feature] = bits! { 0x10, 3, Ecx:
    0 "per_thread_mba" needs "mba";
};

/// SDM, CPUID.12H.00H:EAX.
const LEAF_12_EAX: &[Feature] = bits! { 0x12, 0, Eax:
    0 "sgx1" needs "sgx";
    1 "sgx2" needs "sgx1";
    5 "sgx_enclv" needs "sgx1";
    6 "sgx_etrackc" needs "sgx1";
    7 "sgx_everifyreport2" needs "sgx1";
    10 "sgx_eupdatesvn" needs "sgx1";
    11 "sgx_edeccssa" needs "sgx1";
};

/// SDM, CPUID.14H.00H:EBX.
const LEAF_14_EBX: &[Feature] = bits! { 0x14, 0, Ebx:
    0 "pt_cr3_filter" needs "intel_pt";
    1 "pt_psb_cyc" needs "intel_pt";
    2 "pt_ip_filter" needs "intel_pt";
    3 "pt_mtc" needs "intel_pt";
    4 "ptwrite" needs "intel_pt";
    5 "pt_power_event_trace" needs "intel_pt";
    6 "pt_psb_pmi_preserve" needs "intel_pt";
    7 "pt_event_trace" needs "intel_pt";
    8 "pt_tnt_disable" needs "intel_pt";
    9 "pt_trigger_tracing" also "pttt" needs "intel_pt";
};

/// SDM, CPUID.14H.00H:ECX.
const LEAF_14_ECX: &[Feature] = bits! { 0x14, 0, Ecx:
    0 "pt_topa_output" needs "intel_pt";
    1 "pt_topa_entries" needs "intel_pt";
    2 "pt_single_range_output" needs "intel_pt";
    3 "pt_trace_transport" needs "intel_pt";
    31 "pt_lip" also "intel_pt_lip" needs "intel_pt";
};

/// SDM, CPUID.19H:EAX.
const LEAF_19_EAX: &[Feature] = bits! { 0x19, 0, Eax:
    0 "kl_cpl0_only" needs "key_locker";
    1 "kl_no_encrypt" needs "key_locker";
    2 "kl_no_decrypt" needs "key_locker";
};

/// SDM, CPUID.19H:EBX.
const LEAF_19_EBX: &[Feature] = bits! { 0x19, 0, Ebx:
    0 "aeskle" needs "key_locker";
    2 "aes_wide" also "widekl" needs "key_locker";
    4 "iwkeybackup" needs "key_locker";
};

/// SDM, CPUID.19H:ECX.
const LEAF_19_ECX: &[Feature] = bits! { 0x19, 0, Ecx:
    0 "kl_no_backup" needs "key_locker";
    1 "kl_rand_iwkey" needs "key_locker";
};

/// SDM, CPUID.1CH:EAX.
const LEAF_1C_EAX: &[Feature] = bits! { 0x1c, 0, Eax:
    30 "lbr_deep_c_reset" needs "arch_lbr";
    31 "lbr_lip" needs "arch_lbr";
};

/// SDM, CPUID.1CH:EBX.
const LEAF_1C_EBX: &[Feature] = bits! { 0x1c, 0, Ebx:
    0 "lbr_cpl" needs "arch_lbr";
    1 "lbr_branch_filter" needs "arch_lbr";
    2 "lbr_call_stack" needs "arch_lbr";
};

/// SDM, CPUID.1CH:ECX.
const LEAF_1C_ECX: &[Feature] = bits! { 0x1c, 0, Ecx:
    0 "lbr_mispredict" needs "arch_lbr";
    1 "lbr_timed" needs "arch_lbr";
    2 "lbr_branch_type" needs "arch_lbr";
};

/// ISE reference, CPUID.1EH.01H:EAX. The first four say again what leaf 7 says.
const LEAF_1E_1_EAX: &[Feature] = bits! { 0x1e, 1, Eax:
    0 "amx_int8_alias" needs "amx_int8";
    1 "amx_bf16_alias" needs "amx_bf16";
    2 "amx_complex_alias" needs "amx_complex";
    3 "amx_fp16_alias" needs "amx_fp16";
    4 "amx_fp8" needs "amx_tile";
    6 "amx_tf32" needs "amx_tile";
    7 "amx_avx512" needs "amx_tile", "avx512f";
    8 "amx_movrs" needs "amx_tile", "movrs";
};

/// SDM, CPUID.20H:EBX.
const LEAF_20_EBX: &[Feature] = bits! { 0x20, 0, Ebx:
    0 "hreset_thread_director" needs "hreset";
};

/// SDM, CPUID.24H.00H:EBX, with the names that its bits had before they became always 1.
const LEAF_24_EBX: &[Feature] = bits! { 0x24, 0, Ebx:
    16 "avx10_128" needs "avx10";
    17 "avx10_256" needs "avx10_128";
    18 "avx10_512" needs "avx10_256";
};

/// ISE reference, CPUID.24H.01H:ECX.
const LEAF_24_1_ECX: &[Feature] = bits! { 0x24, 1, Ecx:
    2 "avx10_vnni_int" also "avx10_v1_aux" needs "avx10";
};

/// ISE reference, CPUID.29H.00H:EBX.
const LEAF_29_EBX: &[Feature] = bits! { 0x29, 0, Ebx:
    0 "apx_nci_ndd_nf" needs "apx";
};
