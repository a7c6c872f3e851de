//! Which hypervisor's interface a guest is shown.
//!
//! ```text
//!   host's supported CPUID ──► policy ──► Host
//!                                └──────► without any hypervisor's interface, and what only one keeps ► None
//!                                            └──────► with the clock of Hyper-V's interface ─────────► Hyperv
//! ```
//!
//! A guest that sees KVM's clock cannot go where nobody keeps that clock. [`Interface::Hyperv`] has in its place the part of
//! Hyper-V's interface that KVM has too: reference counter, reference TSC page and frequency registers (TLFS, "Timers"). Their state is
//! a few MSRs and the machine's clock, which both keep. [`Interface::None`] has neither: such a guest can go wherever the processor's own
//! features are, but it must find out by itself how fast its timers run.

use serde::{Deserialize, Serialize};

use super::features::{by_name, set};
use super::{Cpuid, CpuidEntry, bit, policy, trim_states};

/// What of the hypervisor a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interface {
    /// That of the host's hypervisor.
    #[default]
    Host,
    /// The clock that KVM and the Microsoft hypervisor both keep: the guest can move between them.
    Hyperv,
    /// Nothing. The guest can move between them, also where KVM was built without Hyper-V's clock; one
    /// that needs to be told the frequency of its timers does not boot.
    None,
}

impl Interface {
    /// The one that a guest sees.
    pub fn of(cpuid: &Cpuid) -> Self {
        let ours =
            |leaf: &CpuidEntry| leaf.eax & !FEATURES_EAX == 0 && leaf.edx & !FEATURES_EDX == 0;
        if has_hyperv(cpuid) && cpuid.get(0x4000_0003, 0).is_some_and(ours) {
            Self::Hyperv
        } else if cpuid.get(0x4000_0000, 0).is_some() {
            Self::Host
        } else {
            Self::None
        }
    }

    /// Names of the features that a guest with this interface cannot have, because not both hypervisors can keep them.
    pub fn hides(self) -> &'static [&'static str] {
        match self {
            Self::Host => &[],
            Self::Hyperv | Self::None => &NOT_BOTH,
        }
    }
}

impl std::fmt::Display for Interface {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Hyperv => "hyperv",
            Self::None => "none",
        })
    }
}

/// What only KVM can give a guest and take along:
/// - the deadline timer: not every local APIC of the Microsoft hypervisor has that mode;
/// - the machine-check banks: their control registers, which a guest sets, are no registers of a VP;
/// - protection keys: the processor feature banks of a partition have no bit for them;
/// - IA32_ARCH_CAPABILITIES and IA32_CORE_CAPABILITIES: no register of a VP stands for them;
/// - WAITPKG, IBT, AMX with XFD, virtual SSBD: each comes with a register that not every version of the hypervisor's interface names
///   (IA32_UMWAIT_CONTROL, IA32_S_CET, IA32_XFD, VIRT_SPEC_CTRL).
const NOT_BOTH: [&str; 15] = [
    "tsc_deadline_timer",
    "mca",
    "pku",
    "ospke",
    "arch_capabilities",
    "core_capabilities",
    "waitpkg",
    "ibt",
    "amx_bf16",
    "amx_tile",
    "amx_int8",
    "amx_fp16",
    "amx_complex",
    "xfd",
    "virt_ssbd",
];

/// Leaf 0x4000_0003 EAX: time reference count (1), reference TSC (9), frequencies (11); and hypercall (5) and VP index (6), without which
/// Linux takes the whole interface for absent. It then sets up a hypercall page and an assist page for each vCPU, whose registers move
/// like the others.
const FEATURES_EAX: u32 = bit(1) | bit(5) | bit(6) | bit(9) | bit(11);
/// Leaf 0x4000_0003 EDX: the frequency registers are there (8).
const FEATURES_EDX: u32 = bit(8);

/// Hyper-V's leaves as a guest sees them (TLFS, "Feature and interface discovery"): vendor, interface, version, features,
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

/// What a host's supported CPUID becomes for a guest that sees this interface.
pub fn of_interface(supported: &Cpuid, interface: Interface) -> Cpuid {
    let mut cpuid = policy(supported);
    if interface != Interface::Host {
        cpuid.entries.retain(|entry| !is_interface(entry.leaf));
        for feature in interface.hides().iter().filter_map(|name| by_name(name)) {
            set(&mut cpuid, feature, false);
        }
        trim_states(&mut cpuid, false);
        if interface == Interface::Hyperv {
            cpuid.entries.extend(hyperv_leaves());
        }
        cpuid.entries.sort_unstable_by_key(|e| (e.leaf, e.subleaf));
    }
    cpuid
}

/// Whether a leaf belongs to hypervisors (SDM vol. 2A, CPUID: no processor answers it).
pub(crate) fn is_interface(leaf: u32) -> bool {
    (0x4000_0000..0x5000_0000).contains(&leaf)
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
                leaf(1, 0, 0, bit(24) | bit(20), bit(14) | bit(7)),
                leaf(0x4000_0000, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
                leaf(0x4000_0001, u32::MAX, 0, 0, 0),
            ],
        }
    }

    #[test]
    fn a_portable_guest_sees_no_kvm_and_the_clock_that_both_have() {
        let portable = of_interface(&host(), Interface::Hyperv);
        assert_eq!(portable.kvm_base(), None);
        assert!(can_be_portable(&portable));
        assert_eq!(Interface::of(&portable), Interface::Hyperv);
        // The Microsoft hypervisor's own, which has more.
        let mut own = portable.clone();
        own.get_mut(0x4000_0003, 0).expect("features").eax |= bit(4);
        assert_eq!(Interface::of(&own), Interface::Host);
        let leaf = portable.get(1, 0).expect("leaf 1");
        assert_eq!(leaf.edx, bit(7));
        assert_eq!(leaf.ecx & (bit(20) | bit(24) | bit(31)), bit(20) | bit(31));
        assert!(
            portable
                .entries
                .windows(2)
                .all(|pair| (pair[0].leaf, pair[0].subleaf) < (pair[1].leaf, pair[1].subleaf))
        );
        assert_eq!(of_interface(&host(), Interface::Host), policy(&host()));
        let bare = of_interface(&host(), Interface::None);
        assert!(!has_hyperv(&bare) && bare.kvm_base().is_none());
        assert_eq!(Interface::of(&bare), Interface::None);
        assert_eq!(bare.get(1, 0), portable.get(1, 0));
    }

    #[test]
    fn protection_keys_go_with_their_state() {
        let mut host = host();
        // XSAVE and AVX.
        host.get_mut(1, 0).expect("leaf 1").ecx |= bit(26) | bit(28);
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
        let bare = of_interface(&host, Interface::None);
        assert_eq!(bare.get(7, 0).expect("leaf 7").ecx, bit(2));
        let states = bare.get(0xd, 0).expect("leaf 0xd");
        assert_eq!((states.eax, states.ecx), (7, 0x340));
        assert!(
            !bare
                .entries
                .iter()
                .any(|entry| (entry.leaf, entry.subleaf) == (0xd, Some(9)))
        );
        let all = of_interface(&host, Interface::Host);
        assert_eq!(all.get(0xd, 0).expect("leaf 0xd").eax, 0x207);
    }

    #[test]
    fn a_host_without_the_clock_cannot_have_portable_guests() {
        assert!(!can_be_portable(&host()));
        let mut less = of_interface(&host(), Interface::Hyperv);
        less.get_mut(0x4000_0003, 0).expect("features").eax &= !bit(9);
        assert!(!can_be_portable(&less));
    }
}
