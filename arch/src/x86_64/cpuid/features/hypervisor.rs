//! Features that hypervisors offer, under names that begin like QEMU's.

use super::Feature;

/// All groups.
pub(super) const ROWS: &[&[Feature]] = &[KVM_EAX, KVM_EDX, HYPERV_EAX, HYPERV_EDX];

/// Linux, `Documentation/virt/kvm/x86/cpuid.rst`, KVM_CPUID_FEATURES.
const KVM_EAX: &[Feature] = bits! { 0x4000_0001, 0, Eax:
    0 "kvmclock";
    1 "kvm_nopiodelay";
    2 "kvm_mmu";
    3 "kvmclock2";
    4 "kvm_asyncpf";
    5 "kvm_steal_time";
    6 "kvm_pv_eoi";
    7 "kvm_pv_unhalt";
    9 "kvm_pv_tlb_flush";
    10 "kvm_asyncpf_vmexit" needs "kvm_asyncpf";
    11 "kvm_pv_ipi" also "kvm_pv_send_ipi";
    12 "kvm_poll_control";
    13 "kvm_pv_sched_yield";
    14 "kvm_asyncpf_int" needs "kvm_asyncpf";
    15 "kvm_msi_ext_dest_id";
    16 "kvm_hc_map_gpa_range";
    17 "kvm_migration_control";
    24 "kvmclock_stable" also "kvmclock_stable_bit";
};

/// The same, hints.
const KVM_EDX: &[Feature] = bits! { 0x4000_0001, 0, Edx:
    0 "kvm_hint_dedicated" also "kvm_hints_realtime";
};

/// TLFS, "Feature discovery", hypervisor feature identification, EAX: the low half of HV_PARTITION_PRIVILEGE_MASK.
const HYPERV_EAX: &[Feature] = bits! { 0x4000_0003, 0, Eax:
    0 "hv_vp_runtime" also "hv_runtime";
    1 "hv_time_ref_count";
    2 "hv_synic";
    3 "hv_stimer" needs "hv_synic";
    4 "hv_intr_ctrl_regs" also "hv_vapic";
    5 "hv_hypercall_msrs";
    6 "hv_vp_index";
    7 "hv_reset";
    8 "hv_stats";
    9 "hv_reference_tsc";
    10 "hv_guest_idle_reg";
    11 "hv_frequency_regs" also "hv_frequencies" needs "hv_frequency_msrs";
    12 "hv_debug_regs";
    13 "hv_reenlightenment";
};

/// The same, EDX.
const HYPERV_EDX: &[Feature] = bits! { 0x4000_0003, 0, Edx:
    0 "hv_mwait";
    1 "hv_guest_debugging";
    2 "hv_perf_monitor";
    3 "hv_cpu_dynamic_partitioning";
    4 "hv_xmm_input";
    5 "hv_guest_idle";
    6 "hv_sleep_state";
    7 "hv_numa_distance";
    8 "hv_frequency_msrs" also "hv_timer_frequencies";
    9 "hv_synthetic_machine_check";
    10 "hv_crash" also "hv_guest_crash_msrs";
    11 "hv_debug_msrs";
    12 "hv_npiep";
    13 "hv_disable_hypervisor";
    14 "hv_extended_gva_ranges";
    15 "hv_xmm_output";
    17 "hv_sint_polling";
    18 "hv_hypercall_msr_lock";
    19 "hv_stimer_direct" needs "hv_stimer";
    20 "hv_vsm_pat";
    21 "hv_vsm_bndcfgs";
    23 "hv_unhalted_timer";
    26 "hv_lbr";
};
