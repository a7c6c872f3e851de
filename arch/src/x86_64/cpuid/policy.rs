//! What the CPU model `host` shows a guest: everything the hypervisor offers, except what this project cannot
//! back with a device or carry to another host.

use super::{Cpuid, CpuidEntry, bit};

/// Bits to hide: leaf, subleaf, then EAX, EBX, ECX, EDX, and why.
struct Hidden {
    leaf: u32,
    subleaf: u32,
    registers: [u32; 4],
}

const fn hide(leaf: u32, subleaf: u32, registers: [u32; 4]) -> Hidden {
    Hidden {
        leaf,
        subleaf,
        registers,
    }
}

/// Feature bits that no guest sees (bit names: SDM vol. 2A, CPUID; APM vol. 3, appendix E).
const HIDDEN: [Hidden; 8] = [
    // ECX: DTES64, MONITOR (the idle loop must exit), DS-CPL, VMX (nested guests do not move yet), SMX, EIST,
    // TM2, SDBG, PDCM (no performance monitoring), OSXSAVE (follows CR4, the hypervisor sets it).
    // EDX: DS, ACPI thermal, TM, PBE: they need MSRs that are not there.
    hide(
        1,
        0,
        [
            0,
            0,
            bit(2)
                | bit(3)
                | bit(4)
                | bit(5)
                | bit(6)
                | bit(7)
                | bit(8)
                | bit(11)
                | bit(15)
                | bit(27),
            bit(21) | bit(22) | bit(29) | bit(31),
        ],
    ),
    // Only ARAT: the local APIC's timer always runs. Everything else of leaf 6 is thermal and power management.
    hide(6, 0, [!bit(2), u32::MAX, u32::MAX, u32::MAX]),
    // EBX: SGX (enclaves do not move), RDT monitoring and allocation (no MSRs), processor trace.
    // ECX: OSPKE (follows CR4), shadow stacks (SSP is not part of the saved state), ENQCMD (needs a host PASID), SGX
    // launch control.
    // EDX: hybrid (a move may change the core type), PCONFIG, architectural LBR (needs performance monitoring).
    hide(
        7,
        0,
        [
            0,
            bit(2) | bit(12) | bit(15) | bit(25),
            bit(4) | bit(7) | bit(29) | bit(30),
            bit(15) | bit(18) | bit(19),
        ],
    ),
    // EAX: extended architectural performance monitoring.
    hide(7, 1, [bit(8), 0, 0, 0]),
    // ECX: SVM, IBS, SKINIT, the performance counter extensions, performance TSC, MWAITX, LWP.
    hide(
        0x8000_0001,
        0,
        [
            0,
            0,
            bit(2) | bit(10) | bit(12) | bit(15) | bit(23) | bit(24) | bit(27) | bit(28) | bit(29),
            0,
        ],
    ),
    // EAX, EBX, ECX are RAS and power; EDX keeps only the invariant TSC: a move carries the frequency or is
    // refused.
    hide(0x8000_0007, 0, [u32::MAX, u32::MAX, u32::MAX, !bit(8)]),
    // Memory encryption: an encrypted guest does not move.
    hide(0x8000_001f, 0, [u32::MAX; 4]),
    // Performance monitoring version 2.
    hide(0x8000_0022, 0, [u32::MAX; 4]),
];

/// Leaves that read as zero, all subleaves: MONITOR (5), direct cache access (9), performance monitoring (0xa, 0x23),
/// RDT (0xf, 0x10), SGX (0x12), processor trace (0x14), PCONFIG (0x1b), hybrid (0x1a), LBR (0x1c), SVM
/// (0x8000_000a), IBS (0x8000_001b), LWP (0x8000_001c), QoS (0x8000_0020), AMD's extended topology (0x8000_0026: the
/// older leaves say it).
const ZEROED: [u32; 16] = [
    5,
    9,
    0xa,
    0xf,
    0x10,
    0x12,
    0x14,
    0x1a,
    0x1b,
    0x1c,
    0x23,
    0x8000_000a,
    0x8000_001b,
    0x8000_001c,
    0x8000_0020,
    0x8000_0026,
];

/// KVM's paravirtual features (Linux `Documentation/virt/kvm/x86/cpuid.rst`) that a guest may use: both clocks (0, 3),
/// no I/O delay (1), steal time (5), EOI (6), unhalt (7), TLB flush (9), IPI (11), poll control (12), yield (13), stable
/// clock (24).
///
/// Not among them: asynchronous page faults (4, 10, 14: a fault in flight would have to move too), MMU operations (2,
/// gone), extended MSI destinations (15: the IOAPIC would have to know them), memory attribute and
/// migration hypercalls (16, 17: for encrypted guests).
const KVM_FEATURES: u32 = bit(0)
    | bit(1)
    | bit(3)
    | bit(5)
    | bit(6)
    | bit(7)
    | bit(9)
    | bit(11)
    | bit(12)
    | bit(13)
    | bit(24);

/// What a host's supported CPUID becomes for a guest with the CPU model `host`.
///
/// Under KVM, x2APIC and the TSC deadline timer are added: its local APIC always has both, but older KVMs do not list the
/// latter among what they support.
pub fn policy(host: &Cpuid) -> Cpuid {
    let mut cpuid = host.clone();
    for entry in &mut cpuid.entries {
        if ZEROED.contains(&entry.leaf) {
            [entry.eax, entry.ebx, entry.ecx, entry.edx] = [0; 4];
        }
        for hidden in &HIDDEN {
            if !applies(hidden, entry) {
                continue;
            }
            let [eax, ebx, ecx, edx] = hidden.registers;
            entry.eax &= !eax;
            entry.ebx &= !ebx;
            entry.ecx &= !ecx;
            entry.edx &= !edx;
        }
    }
    if let Some(leaf) = cpuid.get_mut(1, 0) {
        // A hypervisor is present.
        leaf.ecx |= bit(31);
    }
    if let Some(base) = cpuid.kvm_base() {
        if let Some(leaf) = cpuid.get_mut(base + 1, 0) {
            leaf.eax &= KVM_FEATURES;
            // Hints promise how the host schedules; nobody has promised that.
            leaf.edx = 0;
        }
        if let Some(leaf) = cpuid.get_mut(1, 0) {
            leaf.ecx |= bit(21) | bit(24);
        }
    }
    cpuid.entries.sort_unstable_by_key(|e| (e.leaf, e.subleaf));
    cpuid
}

fn applies(hidden: &Hidden, entry: &CpuidEntry) -> bool {
    hidden.leaf == entry.leaf
        && entry
            .subleaf
            .is_none_or(|subleaf| subleaf == hidden.subleaf)
}
