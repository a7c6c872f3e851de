//! Features in the extended leaves. Per group: the function's part of APM vol. 3, E.4; what Intel has of it is in the SDM's CPUID
//! description.

use super::Feature;

/// All groups.
pub(super) const ROWS: &[&[Feature]] = &[
    LEAF_1_EDX,
    LEAF_1_ECX,
    LEAF_7_EBX,
    LEAF_7_EDX,
    LEAF_8_EBX,
    LEAF_A_EDX,
    LEAF_A_ECX,
    LEAF_1A_EAX,
    LEAF_1B_EAX,
    LEAF_1F_EAX,
    LEAF_1F_EBX,
    LEAF_20_EBX,
    LEAF_21_EAX,
    LEAF_21_ECX,
    LEAF_22_EAX,
    LEAF_23_EAX,
];

/// APM, Fn8000_0001_EDX; SDM, CPUID.80000001H:EDX. Without the bits that repeat leaf 1
/// ([`AMD_DUPLICATES`](super::AMD_DUPLICATES)).
const LEAF_1_EDX: &[Feature] = bits! { 0x8000_0001, 0, Edx:
    11 "syscall";
    19 "mp";
    20 "nx" also "xd" needs "pae";
    22 "mmxext" needs "mmx";
    25 "fxsr_opt" also "ffxsr" needs "fxsr";
    26 "pdpe1gb" also "page1gb", "gbpages" needs "lm";
    27 "rdtscp" needs "tsc";
    29 "lm" also "long_mode", "i64" needs "pae", "msr";
    30 "3dnowext" needs "3dnow";
    31 "3dnow" needs "mmx";
};

/// APM, Fn8000_0001_ECX; SDM, CPUID.80000001H:ECX.
const LEAF_1_ECX: &[Feature] = bits! { 0x8000_0001, 0, Ecx:
    0 "lahf_lm" also "lahf_sahf" needs "lm";
    1 "cmp_legacy";
    2 "svm";
    3 "extapic" also "ext_apic_space" needs "apic";
    4 "cr8_legacy" also "alt_mov_cr8";
    5 "abm" also "lzcnt";
    6 "sse4a" needs "pni";
    7 "misalignsse" needs "sse";
    8 "3dnowprefetch" also "prefetchw";
    9 "osvw";
    10 "ibs";
    11 "xop" needs "avx";
    12 "skinit";
    13 "wdt";
    15 "lwp" needs "xsave";
    16 "fma4" needs "avx";
    17 "tce";
    19 "nodeid_msr";
    21 "tbm";
    22 "topoext";
    23 "perfctr_core";
    24 "perfctr_nb";
    26 "bpext" also "dbext";
    27 "ptsc";
    28 "perfctr_llc";
    29 "mwaitx" also "monitorx";
    30 "addr_mask_ext";
};

/// APM, Fn8000_0007_EBX.
const LEAF_7_EBX: &[Feature] = bits! { 0x8000_0007, 0, Ebx:
    0 "overflow_recov" needs "mca";
    1 "succor" needs "mca";
    2 "hwa" also "hw_assert" needs "mca";
    3 "smca" needs "mca";
};

/// APM, Fn8000_0007_EDX; SDM, CPUID.80000007H:EDX (invariant TSC only). Bits 5 and 13-15 are in AMD's processor references.
const LEAF_7_EDX: &[Feature] = bits! { 0x8000_0007, 0, Edx:
    0 "ts";
    1 "fid";
    2 "vid";
    3 "ttp";
    4 "htc";
    5 "stc";
    6 "100mhzsteps";
    7 "hw_pstate";
    8 "constant_tsc" also "invtsc", "invariant_tsc", "nonstop_tsc", "tsc_invariant" needs "tsc";
    9 "cpb";
    10 "eff_freq_ro" also "efro";
    11 "proc_feedback";
    12 "acc_power" also "proc_power_reporting";
    13 "connected_standby";
    14 "rapl";
    15 "fast_cppc" also "amd_fast_cppc";
    16 "cppc_perf_prio";
};

/// APM, Fn8000_0008_EBX; SDM, CPUID.80000008H:EBX (WBNOINVD only). KVM sets those about speculation on Intel too. Those that
/// only say how another works (16-19, 30) need nothing: there are clouds that show guests `ibpb_ret` without `ibpb`.
const LEAF_8_EBX: &[Feature] = bits! { 0x8000_0008, 0, Ebx:
    0 "clzero";
    1 "irperf";
    2 "xsaveerptr" also "rstr_fp_err_ptrs" needs "fxsr";
    3 "invlpgb" needs "pcid";
    4 "rdpru";
    6 "amd_mba";
    8 "mcommit";
    9 "wbnoinvd";
    12 "ibpb" also "amd_ibpb";
    13 "int_wbinvd" also "wbinvd_int";
    14 "ibrs" also "amd_ibrs";
    15 "amd_stibp";
    16 "ibrs_always_on";
    17 "stibp_always_on" also "amd_stibp_always_on";
    18 "ibrs_preferred" also "ibrs_fast";
    19 "ibrs_same_mode" also "amd_ibrs_same_mode";
    20 "efer_lmsle_mbz" also "no_lmsl", "no_efer_lmsle" needs "lm";
    21 "invlpgb_nested" also "tlb_flush_nested" needs "invlpgb";
    23 "amd_ppin";
    24 "amd_ssbd";
    25 "virt_ssbd";
    26 "amd_ssb_no" also "amd_no_ssb";
    27 "cppc";
    28 "psfd" also "amd_psfd";
    29 "btc_no";
    30 "ibpb_ret" also "amd_ibpb_ret";
    31 "brs";
};

/// APM, Fn8000_000A_EDX.
const LEAF_A_EDX: &[Feature] = bits! { 0x8000_000a, 0, Edx:
    0 "npt" needs "svm";
    1 "lbrv" needs "svm";
    2 "svm_lock" also "svml" needs "svm";
    3 "nrip_save" also "nrips" needs "svm";
    4 "tsc_scale" also "tsc_rate_msr" needs "svm";
    5 "vmcb_clean" needs "svm";
    6 "flushbyasid" needs "svm";
    7 "decodeassists" needs "svm";
    8 "pmc_virt" needs "svm";
    10 "pausefilter" needs "svm";
    12 "pfthreshold" needs "pausefilter";
    13 "avic" needs "svm";
    15 "v_vmsave_vmload" also "vmsave_virt" needs "svm";
    16 "vgif" needs "svm";
    17 "gmet" needs "npt";
    18 "x2avic" needs "avic";
    19 "sss_check" needs "svm";
    20 "v_spec_ctrl" needs "svm";
    21 "rogpt" needs "npt";
    23 "host_mce_override" needs "svm";
    24 "tlbi_ctl" needs "svm";
    25 "vnmi" needs "svm";
    26 "ibs_virt" needs "svm";
    27 "ext_lvt_avic_access_chg" needs "svm";
    28 "svme_addr_chk" needs "svm";
    29 "bus_lock_threshold" needs "svm";
    30 "idle_hlt" also "idle_hlt_intercept" needs "svm";
};

/// APM, Fn8000_000A_ECX.
const LEAF_A_ECX: &[Feature] = bits! { 0x8000_000a, 0, Ecx:
    4 "pml" needs "npt";
    5 "enhanced_tlbi" needs "svm";
    6 "x2avic_ext" needs "x2avic";
};

/// APM, Fn8000_001A_EAX.
const LEAF_1A_EAX: &[Feature] = bits! { 0x8000_001a, 0, Eax:
    0 "fp128";
    1 "movu";
    2 "fp256";
};

/// APM, Fn8000_001B_EAX.
const LEAF_1B_EAX: &[Feature] = bits! { 0x8000_001b, 0, Eax:
    0 "ibs_ffv" needs "ibs";
    1 "ibs_fetch_sam" needs "ibs";
    2 "ibs_op_sam" needs "ibs";
    3 "ibs_rdwr_op_cnt" needs "ibs";
    4 "ibs_op_cnt" needs "ibs";
    5 "ibs_brn_trgt" needs "ibs";
    6 "ibs_op_cnt_ext" needs "ibs";
    7 "ibs_rip_invalid_chk" needs "ibs";
    8 "ibs_op_brn_fuse" needs "ibs";
    9 "ibs_fetch_ctl_extd" needs "ibs";
    10 "ibs_op_data4" needs "ibs";
    11 "ibs_l3_miss_filtering" needs "ibs";
};

/// APM, Fn8000_001F_EAX.
const LEAF_1F_EAX: &[Feature] = bits! { 0x8000_001f, 0, Eax:
    0 "sme";
    1 "sev";
    2 "vm_page_flush" also "page_flush_msr";
    3 "sev_es" needs "sev";
    4 "sev_snp" needs "sev_es";
    5 "vmpl" needs "sev_snp";
    6 "rmpquery" needs "sev_snp";
    7 "vmpl_sss" needs "vmpl";
    8 "snp_secure_tsc" also "secure_tsc" needs "sev_snp";
    9 "v_tsc_aux" also "tsc_aux_virtualization" needs "sev_es";
    10 "sme_coherent" also "hw_enf_cache_coh";
    11 "sev_64bit_host" needs "sev";
    12 "restricted_injection" needs "sev_snp";
    13 "alternate_injection" needs "sev_snp";
    14 "debug_swap" also "debug_virt" needs "sev_es";
    15 "prevent_host_ibs" needs "sev_es";
    16 "vte" needs "sev";
    17 "vmgexit_parameter" needs "sev_es";
    18 "virtual_tom_msr" needs "sev_es";
    19 "ibs_virt_guest_ctl" needs "sev_es";
    20 "pmc_virt_guest_ctl" needs "sev_es";
    21 "rmpread" needs "sev_snp";
    22 "guest_intercept_ctl" needs "sev_es";
    23 "segmented_rmp" needs "sev_snp";
    24 "vmsa_reg_prot" needs "sev_es";
    25 "smt_protection" needs "sev_es";
    26 "secure_avic" needs "sev_snp";
    27 "allowed_sev_features" needs "sev_es";
    28 "svsm" also "svsm_comm_page_msr" needs "sev_snp";
    29 "nested_virt_snp_msr" needs "sev_snp";
    30 "hv_inuse_wr_allowed" needs "sev_snp";
    31 "ibpb_on_entry" needs "sev_es";
};

/// APM, Fn8000_001F_EBX. The rest are numbers.
const LEAF_1F_EBX: &[Feature] = bits! { 0x8000_001f, 0, Ebx:
    31 "coherency_sfw_no";
};

/// APM, Fn8000_0020_EBX_x0.
const LEAF_20_EBX: &[Feature] = bits! { 0x8000_0020, 0, Ebx:
    1 "l3mbe" needs "rdt_a";
    2 "smba" also "l3smbe" needs "rdt_a";
    3 "bmec" needs "cqm_mbm_total", "cqm_mbm_local";
    4 "l3rr";
    5 "abmc";
    6 "sdciae" needs "cat_l3";
};

/// APM, Fn8000_0021_EAX. Bits 5 (AMD, "Transient Scheduler Attacks"), 12, 14, 21 and 22 are in papers and processor references.
const LEAF_21_EAX: &[Feature] = bits! { 0x8000_0021, 0, Eax:
    0 "no_nested_data_bp";
    1 "wrmsr_xx_base_ns" also "fs_gs_base_ns", "fs_gs_base_write_not_serializing";
    2 "lfence_rdtsc" also "lfence_always_serializing", "lfence_dispatch";
    3 "smm_pg_cfg_lock";
    5 "verw_clear";
    6 "null_sel_clr_base" also "null_select_clears_base", "nscb";
    7 "upper_address_ignore" also "uai" needs "lm";
    8 "autoibrs" also "automatic_ibrs";
    9 "no_smm_ctl_msr";
    10 "amd_fsrs";
    11 "amd_fsrc";
    12 "pmc2_precise_retire";
    13 "prefetch_ctl_msr";
    14 "l2_tlb_size_x32";
    15 "amd_ermsb";
    16 "opcode_0f017_reclaim";
    17 "gp_on_user_cpuid" also "cpuid_user_dis";
    18 "epsf";
    19 "fast_rep_scasb" also "fsrsc";
    20 "prefetchi" also "amd_prefetchi";
    21 "fp512_downgrade";
    22 "wl_class_support" also "amd_workload_class";
    23 "avx512_bmm" needs "avx512bw";
    24 "eraps";
    27 "sbpb";
    28 "ibpb_brtype";
    29 "srso_no";
    30 "srso_user_kernel_no" also "srso_us_no";
    31 "srso_msr_fix" also "srso_bp_spec_reduce";
};

/// APM, Fn8000_0021_ECX.
const LEAF_21_ECX: &[Feature] = bits! { 0x8000_0021, 0, Ecx:
    1 "tsa_sq_no";
    2 "tsa_l1_no";
};

/// APM, Fn8000_0022_EAX.
const LEAF_22_EAX: &[Feature] = bits! { 0x8000_0022, 0, Eax:
    0 "perfmon_v2";
    1 "amd_lbr_v2" also "lbr_stack";
    2 "amd_lbr_pmc_freeze" also "lbr_and_pmc_freeze";
};

/// APM, Fn8000_0023_EAX.
const LEAF_23_EAX: &[Feature] = bits! { 0x8000_0023, 0, Eax:
    0 "mem_hmk";
};
