//! What CPUID shows to a virtual processor.
//!
//! ```text
//!   KVM's supported table ─► minus what the partition's feature banks disable ─► plus Hyper-V's own leaves
//!        ─► identity of the VP ─► results registered for the VP, under their masks ─► KVM_SET_CPUID2
//! ```
//!
//! Bit numbers of the banks: TLFS, HV_PARTITION_PROCESSOR_FEATURES and HV_PARTITION_PROCESSOR_XSAVE_FEATURES; bit numbers
//! of CPUID: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// A register of a CPUID result.
#[derive(Clone, Copy)]
enum Out {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Out::{Eax, Ebx, Ecx, Edx};

/// One feature: its bit in the bank, and its bit in CPUID.
struct Feature {
    bank_bit: u32,
    leaf: u32,
    subleaf: u32,
    register: Out,
    bit: u32,
}

const fn feature(bank_bit: u32, leaf: u32, register: Out, bit: u32) -> Feature {
    Feature {
        bank_bit,
        leaf,
        subleaf: 0,
        register,
        bit,
    }
}

const fn sub(bank_bit: u32, leaf: u32, subleaf: u32, register: Out, bit: u32) -> Feature {
    Feature {
        bank_bit,
        leaf,
        subleaf,
        register,
        bit,
    }
}

/// The processor feature banks; bit 64 is the first of the second bank.
const PROCESSOR: &[Feature] = &[
    feature(0, 1, Ecx, 0),             // SSE3
    feature(1, 0x8000_0001, Ecx, 0),   // LAHF, SAHF
    feature(2, 1, Ecx, 9),             // SSSE3
    feature(3, 1, Ecx, 19),            // SSE4.1
    feature(4, 1, Ecx, 20),            // SSE4.2
    feature(5, 0x8000_0001, Ecx, 6),   // SSE4a
    feature(6, 0x8000_0001, Ecx, 11),  // XOP
    feature(7, 1, Ecx, 23),            // POPCNT
    feature(8, 1, Ecx, 13),            // CMPXCHG16B
    feature(9, 0x8000_0001, Ecx, 4),   // MOV CR8 in other modes
    feature(10, 0x8000_0001, Ecx, 5),  // LZCNT
    feature(11, 0x8000_0001, Ecx, 7),  // misaligned SSE
    feature(12, 0x8000_0001, Edx, 22), // MMX extensions
    feature(13, 0x8000_0001, Edx, 31), // 3DNow!
    feature(14, 0x8000_0001, Edx, 30), // 3DNow! extensions
    feature(15, 0x8000_0001, Edx, 26), // 1 GiB pages
    feature(16, 1, Ecx, 25),           // AES
    feature(17, 1, Ecx, 1),            // PCLMULQDQ
    feature(18, 1, Ecx, 17),           // PCID
    feature(19, 0x8000_0001, Ecx, 16), // FMA4
    feature(20, 1, Ecx, 29),           // F16C
    feature(21, 1, Ecx, 30),           // RDRAND
    feature(22, 7, Ebx, 0),            // FSGSBASE
    feature(23, 7, Ebx, 7),            // SMEP
    feature(24, 7, Ebx, 9),            // enhanced REP MOVSB
    feature(25, 7, Ebx, 3),            // BMI1
    feature(26, 7, Ebx, 8),            // BMI2
    feature(29, 1, Ecx, 22),           // MOVBE
    feature(31, 7, Ebx, 13),           // FPU CS and DS deprecated
    feature(32, 7, Ebx, 18),           // RDSEED
    feature(33, 7, Ebx, 19),           // ADX
    feature(34, 0x8000_0001, Ecx, 8),  // PREFETCHW
    feature(35, 7, Ebx, 20),           // SMAP
    feature(36, 7, Ebx, 4),            // HLE
    feature(37, 7, Ebx, 11),           // RTM
    feature(38, 0x8000_0001, Edx, 27), // RDTSCP
    feature(39, 7, Ebx, 23),           // CLFLUSHOPT
    feature(40, 7, Ebx, 24),           // CLWB
    feature(41, 7, Ebx, 29),           // SHA
    feature(43, 7, Ebx, 10),           // INVPCID
    feature(44, 7, Edx, 26),           // IBRS
    feature(45, 7, Edx, 27),           // STIBP
    feature(46, 0x8000_0008, Ebx, 12), // IBPB
    feature(48, 7, Edx, 31),           // SSBD
    feature(49, 7, Edx, 4),            // fast short REP MOV
    feature(50, 7, Edx, 28),           // L1D_FLUSH
    feature(57, 7, Ecx, 22),           // RDPID
    feature(58, 7, Ecx, 2),            // UMIP
    feature(60, 7, Edx, 10),           // MD_CLEAR
    feature(65, 0x8000_0007, Edx, 8),  // invariant TSC
    feature(66, 0x8000_0008, Ebx, 0),  // CLZERO
    feature(67, 0x8000_0008, Ebx, 4),  // RDPRU
    feature(68, 7, Ecx, 16),           // LA57
    feature(70, 1, Ecx, 5),            // nested virtualisation: VMX
    feature(70, 0x8000_0001, Ecx, 2),  // nested virtualisation: SVM
    feature(72, 7, Ecx, 7),            // shadow stacks
    feature(73, 7, Edx, 20),           // indirect branch tracking
    feature(76, 7, Ecx, 5),            // WAITPKG
    feature(77, 7, Ecx, 27),           // MOVDIRI
    feature(78, 7, Ecx, 28),           // MOVDIR64B
    feature(79, 7, Ecx, 25),           // CLDEMOTE
    feature(80, 7, Edx, 14),           // SERIALIZE
    feature(81, 1, Ecx, 24),           // TSC deadline timer
    feature(82, 7, Ebx, 1),            // TSC_ADJUST
    sub(83, 7, 1, Eax, 10),            // fast zero-length REP MOVSB
    sub(84, 7, 1, Eax, 11),            // fast short REP STOSB
    sub(85, 7, 1, Eax, 12),            // fast short REP CMPSB
];

/// The XSAVE feature bank.
const XSAVE: &[Feature] = &[
    feature(0, 1, Ecx, 26),  // XSAVE
    sub(1, 0xd, 1, Eax, 0),  // XSAVEOPT
    feature(2, 1, Ecx, 28),  // AVX
    feature(3, 7, Ebx, 5),   // AVX2
    feature(4, 1, Ecx, 12),  // FMA
    feature(5, 7, Ebx, 14),  // MPX
    feature(6, 7, Ebx, 16),  // AVX512F
    feature(7, 7, Ebx, 17),  // AVX512DQ
    feature(8, 7, Ebx, 28),  // AVX512CD
    feature(9, 7, Ebx, 30),  // AVX512BW
    feature(10, 7, Ebx, 31), // AVX512VL
    sub(11, 0xd, 1, Eax, 1), // XSAVEC
    sub(12, 0xd, 1, Eax, 3), // XSAVES
    feature(14, 7, Ecx, 12), // BITALG
    feature(15, 7, Ebx, 21), // IFMA
    feature(16, 7, Ecx, 1),  // VBMI
    feature(17, 7, Ecx, 6),  // VBMI2
    feature(18, 7, Ecx, 11), // VNNI
    feature(19, 7, Ecx, 8),  // GFNI
    feature(20, 7, Ecx, 9),  // VAES
    feature(21, 7, Ecx, 14), // VPOPCNTDQ
    feature(22, 7, Ecx, 10), // VPCLMULQDQ
    sub(23, 7, 1, Eax, 5),   // AVX512_BF16
    feature(24, 7, Edx, 8),  // VP2INTERSECT
    feature(25, 7, Edx, 23), // AVX512_FP16
    sub(26, 0xd, 1, Eax, 4), // XFD
    feature(27, 7, Edx, 24), // AMX-TILE
    feature(28, 7, Edx, 22), // AMX-BF16
    feature(29, 7, Edx, 25), // AMX-INT8
    sub(30, 7, 1, Eax, 4),   // AVX-VNNI
    sub(31, 7, 1, Eax, 23),  // AVX-IFMA
];

/// The features of a partition, or of the host: one bit each, in Hyper-V's numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Features {
    pub(crate) processor: [u64; 2],
    pub(crate) xsave: u64,
    pub(crate) synthetic: u64,
    /// Whether the local APICs can be switched to x2APIC mode (MSHV_PT_BIT_X2APIC).
    pub(crate) x2apic: bool,
}

/// Bits of HV_PARTITION_SYNTHETIC_PROCESSOR_FEATURES that the double can honour through KVM.
pub(crate) mod synthetic {
    pub(crate) const HYPERVISOR_PRESENT: u64 = 1 << 0;
    pub(crate) const HV1: u64 = 1 << 1;
    pub(crate) const VP_RUNTIME: u64 = 1 << 2;
    pub(crate) const REFERENCE_COUNTER: u64 = 1 << 3;
    pub(crate) const INTERRUPT_CONTROL: u64 = 1 << 6;
    pub(crate) const HYPERCALL: u64 = 1 << 7;
    pub(crate) const VP_INDEX: u64 = 1 << 8;
    pub(crate) const REFERENCE_TSC: u64 = 1 << 9;
    pub(crate) const FREQUENCIES: u64 = 1 << 11;
    /// The bits named `reserved_z*` in the TLFS, and those above the last named one.
    pub(crate) const RESERVED: u64 = 1 << 12
        | 1 << 13
        | 1 << 14
        | 1 << 17
        | 1 << 19
        | 1 << 21
        | 1 << 23
        | 1 << 36
        | 1 << 39
        | 1 << 42
        | 1 << 44
        | 1 << 49
        | !0 << 54;
}

/// XSAVE states (bits of XCR0) and the XSAVE feature that each needs.
const STATES: &[(u64, u32)] = &[(1 << 2, 2), (3 << 3, 5), (7 << 5, 6), (3 << 17, 27)];

impl Features {
    /// What the host offers: every feature whose CPUID bit KVM supports.
    pub(crate) fn of_host(table: &[kvm_cpuid_entry2]) -> Self {
        let present = |features: &[Feature]| {
            features
                .iter()
                .filter(|feature| feature.is_set(table))
                .fold(0u128, |bits, one| bits | 1 << one.bank_bit)
        };
        let processor = present(PROCESSOR);
        // A KVM without hardware virtualisation does not offer XSAVE, whose instruction its interpreter lacks, but lists the states: its
        // ring 3 runs natively and has them all, so they are kept as on a host that offers it.
        let listed = find(table, 0xd, 0).map_or(0, |entry| u64::from(entry.eax));
        let kept = STATES
            .iter()
            .filter(|(bits, _)| listed & bits == *bits)
            .fold(u64::from(listed != 0), |kept, (_, needs)| kept | 1 << needs);
        Features {
            processor: [processor as u64, (processor >> 64) as u64],
            xsave: present(XSAVE) as u64 | kept,
            synthetic: !synthetic::RESERVED,
            x2apic: true,
        }
    }

    /// The states of XCR0 that these features make available.
    pub(crate) fn xsave_states(&self) -> u64 {
        if self.xsave & 1 == 0 {
            return 3;
        }
        STATES
            .iter()
            .filter(|(_, needs)| self.xsave >> needs & 1 != 0)
            .fold(3, |states, (bits, _)| states | bits)
    }
}

impl Feature {
    fn is_set(&self, table: &[kvm_cpuid_entry2]) -> bool {
        find(table, self.leaf, self.subleaf)
            .is_some_and(|entry| value(entry, self.register) >> self.bit & 1 != 0)
    }
}

fn value(entry: &kvm_cpuid_entry2, register: Out) -> u32 {
    match register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    }
}

fn value_mut(entry: &mut kvm_cpuid_entry2, register: Out) -> &mut u32 {
    match register {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

fn indexed(entry: &kvm_cpuid_entry2) -> bool {
    entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0
}

/// The entry that CPUID would answer with.
pub(crate) fn find(
    table: &[kvm_cpuid_entry2],
    leaf: u32,
    subleaf: u32,
) -> Option<&kvm_cpuid_entry2> {
    table
        .iter()
        .find(|entry| entry.function == leaf && (!indexed(entry) || entry.index == subleaf))
}

/// A result registered by HvCallRegisterInterceptResult: values and masks of EAX, EBX, ECX, EDX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Registered {
    pub(crate) leaf: u32,
    /// None: all subleaves.
    pub(crate) subleaf: Option<u32>,
    pub(crate) always: bool,
    pub(crate) values: [u32; 4],
    pub(crate) masks: [u32; 4],
}

impl Registered {
    fn apply(&self, table: &mut Vec<kvm_cpuid_entry2>) {
        let mut met = false;
        for entry in table.iter_mut().filter(|entry| entry.function == self.leaf) {
            if self
                .subleaf
                .is_some_and(|subleaf| indexed(entry) && entry.index != subleaf)
            {
                continue;
            }
            met = true;
            let empty = entry.eax | entry.ebx | entry.ecx | entry.edx == 0;
            if !empty || self.always {
                self.merge(entry);
            }
        }
        if !met && self.always {
            let mut entry = kvm_cpuid_entry2 {
                function: self.leaf,
                ..Default::default()
            };
            if let Some(subleaf) = self.subleaf {
                entry.index = subleaf;
                entry.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            }
            self.merge(&mut entry);
            table.push(entry);
        }
    }

    fn merge(&self, entry: &mut kvm_cpuid_entry2) {
        for (index, register) in [Eax, Ebx, Ecx, Edx].into_iter().enumerate() {
            let slot = value_mut(entry, register);
            *slot = *slot & !self.masks[index] | self.values[index] & self.masks[index];
        }
    }
}

/// The table before results are applied: what the hypervisor computes for a VP of a partition with these features.
pub(crate) fn base(
    supported: &[kvm_cpuid_entry2],
    features: &Features,
    vp: u32,
) -> Vec<kvm_cpuid_entry2> {
    let states = features.xsave_states();
    let mut table: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .copied()
        .filter(|entry| entry.function >> 28 != 4)
        .filter(|entry| {
            entry.function != 0xd
                || entry.index < 2
                || (entry.index < 64 && states >> entry.index & 1 != 0)
        })
        .collect();
    let banks = u128::from(features.processor[0]) | u128::from(features.processor[1]) << 64;
    for entry in &mut table {
        for (list, enabled) in [(PROCESSOR, banks), (XSAVE, u128::from(features.xsave))] {
            let leaf = entry.function;
            for feature in list.iter().filter(|one| one.leaf == leaf) {
                let same_subleaf = !indexed(entry) || entry.index == feature.subleaf;
                if same_subleaf && enabled >> feature.bank_bit & 1 == 0 {
                    *value_mut(entry, feature.register) &= !(1 << feature.bit);
                }
            }
        }
        restrict(entry, features, states, vp);
    }
    table.extend(hypervisor_leaves(features));
    table
}

/// The parts of an entry that are not plain feature bits.
fn restrict(entry: &mut kvm_cpuid_entry2, features: &Features, states: u64, vp: u32) {
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = entry.ebx & 0x00ff_ffff | vp << 24;
            entry.ecx &= !(1 << 31);
            if !features.x2apic {
                entry.ecx &= !(1 << 21);
            }
            if features.synthetic & synthetic::HYPERVISOR_PRESENT != 0 {
                entry.ecx |= 1 << 31;
            }
        }
        // Protection keys have no bit in the banks, so no partition has them.
        (7, 0) => entry.ecx &= !(1 << 3 | 1 << 4),
        (0xd, _) if features.xsave & 1 == 0 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        (0xd, 0) => {
            entry.eax &= states as u32;
            entry.edx &= (states >> 32) as u32;
        }
        // No supervisor state is offered.
        (0xd, 1) => (entry.ecx, entry.edx) = (0, 0),
        (0xb | 0x1f, _) => entry.edx = vp,
        (0x8000_001e, _) => entry.eax = vp,
        _ => {}
    }
}

/// Leaves 0x40000000 and up (TLFS, "Feature and Interface Discovery").
fn hypervisor_leaves(features: &Features) -> Vec<kvm_cpuid_entry2> {
    use synthetic::*;
    if features.synthetic & (HYPERVISOR_PRESENT | HV1) != HYPERVISOR_PRESENT | HV1 {
        return Vec::new();
    }
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    // Not among them: synthetic interrupts and timers. A guest that saw them would use them.
    let privileges = [
        (VP_RUNTIME, 0),
        (REFERENCE_COUNTER, 1),
        (INTERRUPT_CONTROL, 4),
        (HYPERCALL, 5),
        (VP_INDEX, 6),
        (REFERENCE_TSC, 9),
        (FREQUENCIES, 11),
    ];
    let access = privileges
        .iter()
        .filter(|(bit, _)| features.synthetic & bit != 0)
        .fold(0u32, |bits, (_, privilege)| bits | 1 << privilege);
    let frequencies = if features.synthetic & FREQUENCIES != 0 {
        1 << 8
    } else {
        0
    };
    // Relaxed timing is the one hint that costs nothing on KVM.
    let hints = 1 << 5;
    vec![
        leaf(
            0x4000_0000,
            0x4000_0006,
            word(b"Micr"),
            word(b"osof"),
            word(b"t Hv"),
        ),
        leaf(0x4000_0001, word(b"Hv#1"), 0, 0, 0),
        leaf(0x4000_0002, 0x6583, 0x000a_0000, 0, 0),
        leaf(0x4000_0003, access, 0, 0, frequencies),
        leaf(0x4000_0004, hints, 0xffff_ffff, 0, 0),
        leaf(0x4000_0005, 240, 512, 0, 0),
        leaf(0x4000_0006, 0, 0, 0, 0),
    ]
}

/// The table with a VP's registered results applied, in the order of registration.
pub(crate) fn with_results(
    mut table: Vec<kvm_cpuid_entry2>,
    results: &[Registered],
) -> Vec<kvm_cpuid_entry2> {
    results.iter().for_each(|result| result.apply(&mut table));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, flags: u32, values: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = values;
        kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let indexed = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        vec![
            entry(0, 0, 0, [0x1f, 1, 2, 3]),
            entry(
                1,
                0,
                0,
                [
                    0x800f12,
                    0x0010_0800,
                    1 << 26 | 1 << 28 | 1 << 23 | 1,
                    0x178b_fbff,
                ],
            ),
            entry(7, 0, indexed, [1, 1 << 5 | 1 << 16, 1 << 3, 0]),
            entry(7, 1, indexed, [1 << 4, 0, 0, 0]),
            entry(0xd, 0, indexed, [0xe7, 0xa80, 0xa80, 0]),
            entry(0xd, 1, indexed, [0xf, 0, 0, 0]),
            entry(0xd, 2, indexed, [0x100, 0x240, 0, 0]),
            entry(0xd, 5, indexed, [0x40, 0x440, 0, 0]),
            entry(
                0x4000_0000,
                0,
                0,
                [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
            ),
        ]
    }

    #[test]
    fn host_features_are_read_from_cpuid() {
        let host = Features::of_host(&supported());
        assert_eq!(host.processor, [1 | 1 << 7, 0]);
        assert_eq!(
            host.xsave,
            1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 30
        );
        assert_eq!(host.xsave_states(), 0xe7);
    }

    #[test]
    fn a_disabled_feature_disappears_and_with_it_its_state() {
        let mut features = Features::of_host(&supported());
        features.xsave &= !(1 << 6);
        features.processor[0] &= !(1 << 7);
        let table = base(&supported(), &features, 3);
        assert_eq!(find(&table, 7, 0).map(|leaf| leaf.ebx), Some(1 << 5));
        assert_eq!(find(&table, 1, 0).map(|leaf| leaf.ecx >> 23 & 1), Some(0));
        assert_eq!(find(&table, 0xd, 0).map(|leaf| leaf.eax), Some(7));
        assert!(find(&table, 0xd, 5).is_none());
        assert_eq!(find(&table, 1, 0).map(|leaf| leaf.ebx >> 24), Some(3));
    }

    #[test]
    fn the_hypervisor_names_itself_only_if_asked() {
        let mut features = Features::of_host(&supported());
        let table = base(&supported(), &features, 0);
        assert_eq!(
            find(&table, 0x4000_0000, 0).map(|leaf| leaf.ebx),
            Some(u32::from_le_bytes(*b"Micr"))
        );
        features.synthetic = 0;
        let table = base(&supported(), &features, 0);
        assert!(find(&table, 0x4000_0000, 0).is_none());
        assert_eq!(find(&table, 1, 0).map(|leaf| leaf.ecx >> 31), Some(0));
    }

    #[test]
    fn results_change_the_bits_under_their_mask_only() {
        let result = Registered {
            leaf: 1,
            subleaf: None,
            always: true,
            values: [0xffff_ffff, 0, 0, 0],
            masks: [0xff, 0, 1, 0],
        };
        let table = with_results(supported(), &[result]);
        let leaf = find(&table, 1, 0).expect("it was there");
        assert_eq!(leaf.eax, 0x800fff);
        assert_eq!(leaf.ecx & 1, 0);
        assert_eq!(leaf.edx, 0x178b_fbff);
    }

    #[test]
    fn a_subleaf_is_added_only_when_overriding() {
        let mut result = Registered {
            leaf: 0x1f,
            subleaf: Some(1),
            always: false,
            values: [7, 8, 9, 10],
            masks: [!0; 4],
        };
        assert!(find(&with_results(supported(), &[result]), 0x1f, 1).is_none());
        result.always = true;
        let table = with_results(supported(), &[result]);
        assert_eq!(
            find(&table, 0x1f, 1).map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]),
            Some([7, 8, 9, 10])
        );
        assert!(find(&table, 0x1f, 0).is_none());
    }
}
