//! CPUID: neutral entries to and from KVM's, and what is offered beyond what KVM reports.

use arch::x86_64::cpuid::{Cpuid, CpuidEntry};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};

use crate::{Error, Result};

/// XCR0 bits 17 and 18, AMX tile configuration and data (SDM vol. 1, section 13.1).
const XCR0_AMX: u32 = 0b11 << 17;
/// CPUID.1:ECX.TSC_DEADLINE.
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
/// CPUID.1:ECX, "running under a hypervisor".
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// CPUID.1:ECX.VMX.
const LEAF1_ECX_VMX: u32 = 1 << 5;
/// CPUID.80000001H:ECX.SVM (AMD APM vol. 3, appendix E).
const EXT1_ECX_SVM: u32 = 1 << 2;
/// CPUID.7.0:EDX AMX-BF16, AMX-TILE, AMX-INT8.
const LEAF7_EDX_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// CPUID.7.1:EAX AMX-FP16.
const LEAF7_1_EAX_AMX: u32 = 1 << 21;
/// CPUID.7.1:EDX AMX-COMPLEX.
const LEAF7_1_EDX_AMX: u32 = 1 << 8;

/// Neutral form of what KVM lists.
pub(crate) fn from_kvm(entries: &[kvm_cpuid_entry2]) -> Cpuid {
    let mut entries: Vec<_> = entries
        .iter()
        .map(|e| CpuidEntry {
            leaf: e.function,
            subleaf: (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index),
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        })
        .collect();
    entries.sort_by_key(|e| (e.leaf, e.subleaf));
    Cpuid { entries }
}

/// KVM's form of a neutral list.
pub(crate) fn to_kvm(cpuid: &Cpuid) -> Result<CpuId> {
    let entries: Vec<_> = cpuid
        .entries
        .iter()
        .map(|e| kvm_cpuid_entry2 {
            function: e.leaf,
            index: e.subleaf.unwrap_or(0),
            flags: if e.subleaf.is_some() {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            padding: [0; 3],
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| {
        Error::Invalid(format!(
            "a CPUID table of {} entries is longer than the {KVM_MAX_CPUID_ENTRIES} that KVM takes",
            entries.len()
        ))
    })
}

/// What is offered to guests, from what KVM reports.
///
/// - The TSC deadline timer is never reported there, since it needs the local APIC in the kernel, which we always use
///   (Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID). Likewise the hypervisor bit.
/// - AMX appears only when both of its XSTATE components may be used by a guest of this process; KVM drops those from
///   leaf 0DH without a permission, but goes on to report the instructions.
pub(crate) fn offered(mut cpuid: Cpuid, tsc_deadline: bool) -> Cpuid {
    let amx = cpuid
        .get(0xd, 0)
        .is_some_and(|e| e.eax & XCR0_AMX == XCR0_AMX);
    // Tile information and TMUL information. A leaf that is not listed reads as zeros, and some KVMs do not keep these
    // two when they are.
    cpuid
        .entries
        .retain(|entry| amx || !matches!(entry.leaf, 0x1d | 0x1e));
    for entry in &mut cpuid.entries {
        match (entry.leaf, entry.subleaf.unwrap_or(0)) {
            (1, _) => {
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
            }
            (7, 0) if !amx => entry.edx &= !LEAF7_EDX_AMX,
            (7, 1) if !amx => {
                entry.eax &= !LEAF7_1_EAX_AMX;
                entry.edx &= !LEAF7_1_EDX_AMX;
            }
            _ => {}
        }
    }
    cpuid
}

/// Whether a guest that sees this can run guests of its own.
pub(crate) fn offers_virtualisation(cpuid: &Cpuid) -> bool {
    cpuid.get(1, 0).is_some_and(|e| e.ecx & LEAF1_ECX_VMX != 0)
        || cpuid
            .get(0x8000_0001, 0)
            .is_some_and(|e| e.ecx & EXT1_ECX_SVM != 0)
}

/// The XSTATE components (XCR0 bits) that a guest that sees this can enable.
pub(crate) fn xstate_components(cpuid: &Cpuid) -> u64 {
    // x87 and SSE are there whether or not XSAVE is.
    cpuid
        .get(0xd, 0)
        .map_or(0b11, |e| u64::from(e.eax) | u64::from(e.edx) << 32 | 0b11)
}
