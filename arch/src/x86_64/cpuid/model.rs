//! CPU models: what a guest is shown of a host.
//!
//! ```text
//!   host's supported CPUID ──► policy ──► host
//!                                └──────► without any hypervisor's interface, deadline timer, protection keys ► bare
//!                                            └──────► with the clock of Hyper-V's interface ───────────────► portable
//! ```
//!
//! A guest that sees KVM's clock cannot go where nobody keeps that clock. [`CpuModel::Portable`] has in its place the part of
//! Hyper-V's interface that KVM has too: reference counter, reference TSC page and frequency registers (TLFS, "Timers"). Their state is
//! a few MSRs and the machine's clock, which both keep. [`CpuModel::Bare`] has neither: it can go wherever the processor's own features
//! are, but its guest must find out by itself how fast its timers run.

use serde::{Deserialize, Serialize};

use super::{Cpuid, CpuidEntry, Vendor, bit, policy};

/// A CPU model by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuModel {
    /// What the host and its hypervisor offer.
    #[default]
    Host,
    /// The same without what only one hypervisor has, and with the clock that KVM and the Microsoft hypervisor both keep: the guest can
    /// move between them.
    Portable,
    /// The same without any hypervisor's interface. It can move like a portable one, also where KVM was built without
    /// Hyper-V's clock; a guest that needs to be told the frequency of its timers does not boot on it.
    Bare,
}

/// Leaf 0x4000_0003 EAX: time reference count (1), reference TSC (9), frequencies (11); and hypercall (5) and VP index (6), without which
/// Linux takes the whole interface for absent. It then sets up a hypercall page and an assist page for each vCPU, whose registers move
/// like the others.
const FEATURES_EAX: u32 = bit(1) | bit(5) | bit(6) | bit(9) | bit(11);
/// Leaf 0x4000_0003 EDX: the frequency registers are there (8).
const FEATURES_EDX: u32 = bit(8);
/// CPUID.1:ECX.TSC_DEADLINE. Not every local APIC of the Microsoft hypervisor has that mode.
const LEAF1_ECX_TSC_DEADLINE: u32 = bit(24);

/// CPUID.1:EDX.MCA: the control registers of the machine-check banks, which a guest sets, are no registers of a VP.
const MCA: u32 = bit(14);
/// CPUID.7:ECX.PKU and OSPKE. The processor feature banks of a partition have no bit for protection keys, so no guest of the Microsoft
/// hypervisor has them.
const LEAF7_ECX_PROTECTION_KEYS: u32 = bit(3) | bit(4);
/// CPUID.7:EDX, IA32_ARCH_CAPABILITIES and IA32_CORE_CAPABILITIES: no register of a VP stands for them, so they cannot be made what they
/// were elsewhere.
const LEAF7_EDX_CAPABILITY_MSRS: u32 = bit(29) | bit(30);
/// CPUID.7:ECX.WAITPKG, .7:EDX.IBT, the instructions of AMX with XFD, and virtual SSBD: each comes with a register that not every version
/// of the hypervisor's interface names (IA32_UMWAIT_CONTROL, IA32_S_CET, IA32_XFD, VIRT_SPEC_CTRL).
const LEAF7_ECX_WAITPKG: u32 = bit(5);
const LEAF7_EDX_IBT: u32 = bit(20);
const LEAF7_EDX_AMX: u32 = bit(22) | bit(24) | bit(25);
const LEAF7_1_EAX_AMX: u32 = bit(21);
const LEAF7_1_EDX_AMX: u32 = bit(8);
const LEAF_D_1_EAX_XFD: u32 = bit(4);
const VIRT_SSBD: u32 = bit(25);
/// XSTATE components (SDM vol. 1, section 13.1).
const PKRU: u32 = 9;
const TILE_CONFIGURATION: u32 = 17;
const TILE_DATA: u32 = 18;
/// End of the header of an XSAVE area (SDM vol. 1, section 13.4.2).
const XSAVE_HEADER_END: u32 = 576;

/// Takes an XSTATE component out of leaf 0xd: its bit, its description, and its part of the largest area.
fn without_state(cpuid: &mut Cpuid, component: u32) {
    cpuid
        .entries
        .retain(|entry| (entry.leaf, entry.subleaf) != (0xd, Some(component)));
    let ends = cpuid
        .entries
        .iter()
        .filter(|entry| entry.leaf == 0xd && entry.subleaf.is_some_and(|subleaf| subleaf >= 2))
        // Supervisor components (ECX bit 0) are not in the standard format.
        .filter(|entry| entry.ecx & 1 == 0)
        .map(|entry| entry.ebx.saturating_add(entry.eax));
    let size = ends.max().unwrap_or(0).max(XSAVE_HEADER_END);
    if let Some(leaf) = cpuid.get_mut(0xd, 0)
        && leaf.eax & bit(component) != 0
    {
        leaf.eax &= !bit(component);
        leaf.ecx = size;
    }
}

/// Hyper-V's leaves as a portable guest sees them (TLFS, "Feature and interface discovery"): vendor, interface, version, features,
/// recommendations (none; EBX: never report long spin waits), limits (none stated).
fn hyperv_leaves() -> [CpuidEntry; 6] {
    let text = |at: &[u8; 4]| u32::from_le_bytes(*at);
    let leaf = |leaf, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry {
        leaf,
        subleaf: None,
        eax,
        ebx,
        ecx,
        edx,
    };
    [
        leaf(
            0x4000_0000,
            [0x4000_0005, text(b"Micr"), text(b"osof"), text(b"t Hv")],
        ),
        leaf(0x4000_0001, [text(b"Hv#1"), 0, 0, 0]),
        leaf(0x4000_0002, [0, 0xa_0000, 0, 0]),
        leaf(0x4000_0003, [FEATURES_EAX, 0, 0, FEATURES_EDX]),
        leaf(0x4000_0004, [0, u32::MAX, 0, 0]),
        leaf(0x4000_0005, [0, 0, 0, 0]),
    ]
}

/// What a host's supported CPUID becomes for a guest of this model.
pub fn of_model(host: &Cpuid, model: CpuModel) -> Cpuid {
    let mut cpuid = policy(host);
    if model != CpuModel::Host {
        cpuid
            .entries
            .retain(|entry| !(0x4000_0000..0x5000_0000).contains(&entry.leaf));
        if let Some(leaf) = cpuid.get_mut(1, 0) {
            leaf.ecx &= !LEAF1_ECX_TSC_DEADLINE;
            leaf.edx &= !MCA;
        }
        // AMD's extended leaf says it again.
        if cpuid.vendor() == Vendor::Amd
            && let Some(leaf) = cpuid.get_mut(0x8000_0001, 0)
        {
            leaf.edx &= !MCA;
        }
        if let Some(leaf) = cpuid.get_mut(7, 0) {
            leaf.ecx &= !(LEAF7_ECX_PROTECTION_KEYS | LEAF7_ECX_WAITPKG);
            leaf.edx &= !(LEAF7_EDX_CAPABILITY_MSRS | LEAF7_EDX_IBT | LEAF7_EDX_AMX);
        }
        if let Some(leaf) = cpuid.get_mut(7, 1) {
            leaf.eax &= !LEAF7_1_EAX_AMX;
            leaf.edx &= !LEAF7_1_EDX_AMX;
        }
        if let Some(leaf) = cpuid.get_mut(0x8000_0008, 0) {
            leaf.ebx &= !VIRT_SSBD;
        }
        if let Some(leaf) = cpuid.get_mut(0xd, 1) {
            leaf.eax &= !LEAF_D_1_EAX_XFD;
        }
        cpuid
            .entries
            .retain(|entry| !matches!(entry.leaf, 0x1d | 0x1e));
        for component in [PKRU, TILE_CONFIGURATION, TILE_DATA] {
            without_state(&mut cpuid, component);
        }
        if model == CpuModel::Portable {
            cpuid.entries.extend(hyperv_leaves());
        }
        cpuid.entries.sort_unstable_by_key(|e| (e.leaf, e.subleaf));
    }
    cpuid
}

/// Whether a guest that sees this has Hyper-V's interface.
pub fn has_hyperv(cpuid: &Cpuid) -> bool {
    cpuid
        .get(0x4000_0001, 0)
        .is_some_and(|leaf| leaf.eax == u32::from_le_bytes(*b"Hv#1"))
}

/// Whether the Hyper-V interface that a host can offer has all that a portable guest is shown.
pub fn can_be_portable(offered: &Cpuid) -> bool {
    has_hyperv(offered)
        && offered.get(0x4000_0003, 0).is_some_and(|leaf| {
            leaf.eax & FEATURES_EAX == FEATURES_EAX && leaf.edx & FEATURES_EDX == FEATURES_EDX
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Cpuid {
        let leaf = |leaf, eax, ebx, ecx, edx| CpuidEntry {
            leaf,
            subleaf: None,
            eax,
            ebx,
            ecx,
            edx,
        };
        Cpuid {
            entries: vec![
                leaf(0, 1, 0, 0, 0),
                leaf(1, 0, 0, bit(24) | bit(20), MCA | bit(7)),
                leaf(0x4000_0000, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
                leaf(0x4000_0001, u32::MAX, 0, 0, 0),
            ],
        }
    }

    #[test]
    fn a_portable_guest_sees_no_kvm_and_the_clock_that_both_have() {
        let portable = of_model(&host(), CpuModel::Portable);
        assert_eq!(portable.kvm_base(), None);
        assert!(can_be_portable(&portable));
        let leaf = portable.get(1, 0).expect("leaf 1");
        assert_eq!(leaf.edx, bit(7));
        assert_eq!(leaf.ecx & (bit(20) | bit(24) | bit(31)), bit(20) | bit(31));
        assert!(
            portable
                .entries
                .windows(2)
                .all(|pair| (pair[0].leaf, pair[0].subleaf) < (pair[1].leaf, pair[1].subleaf))
        );
        assert_eq!(of_model(&host(), CpuModel::Host), policy(&host()));
        let bare = of_model(&host(), CpuModel::Bare);
        assert!(!has_hyperv(&bare) && bare.kvm_base().is_none());
        assert_eq!(bare.get(1, 0), portable.get(1, 0));
    }

    #[test]
    fn protection_keys_go_with_their_state() {
        let mut host = host();
        let leaf = |leaf, subleaf, eax, ebx, ecx| CpuidEntry {
            leaf,
            subleaf: Some(subleaf),
            eax,
            ebx,
            ecx,
            edx: 0,
        };
        host.entries.extend([
            leaf(7, 0, 0, 0, bit(3) | bit(2)),
            leaf(0xd, 0, 0x207, 0xa88, 0xa88),
            leaf(0xd, 2, 0x100, 0x240, 0),
            leaf(0xd, 9, 8, 0xa80, 0),
        ]);
        let bare = of_model(&host, CpuModel::Bare);
        assert_eq!(bare.get(7, 0).expect("leaf 7").ecx, bit(2));
        let states = bare.get(0xd, 0).expect("leaf 0xd");
        assert_eq!((states.eax, states.ecx), (7, 0x340));
        assert!(
            !bare
                .entries
                .iter()
                .any(|entry| (entry.leaf, entry.subleaf) == (0xd, Some(9)))
        );
        let all = of_model(&host, CpuModel::Host);
        assert_eq!(all.get(0xd, 0).expect("leaf 0xd").eax, 0x207);
    }

    #[test]
    fn a_host_without_the_clock_cannot_have_portable_guests() {
        assert!(!can_be_portable(&host()));
        let mut less = of_model(&host(), CpuModel::Portable);
        less.get_mut(0x4000_0003, 0).expect("features").eax &= !bit(9);
        assert!(!can_be_portable(&less));
    }
}
