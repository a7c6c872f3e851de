//! What both back ends must know of single model-specific registers.

use arch::x86_64::state::Msr;

/// The time-stamp counter, its adjustment, and the deadline of the local APIC's timer.
pub(crate) const IA32_TSC: u32 = 0x10;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_SMBASE: u32 = 0x9e;
const SMBASE_AFTER_RESET: u64 = 0x3_0000;
const IA32_PERF_CAPABILITIES: u32 = 0x345;

/// Whether nothing is lost by leaving a register as it is here, or without one: what some hosts give every vCPU though no guest of ours is
/// told of it in CPUID, what only describes the host, and what still has its value after reset.
pub(crate) fn cannot_have_used(msr: Msr) -> bool {
    match msr.index {
        // APIC base, EFER, the bases of FS and GS: they belong to the special registers.
        0x1b | 0xc000_0080 | 0xc000_0100 | 0xc000_0101 => true,
        // CPUID.1:ECX.PDCM is hidden.
        IA32_PERF_CAPABILITIES => true,
        // Of Hyper-V's interface a guest has at most identity, hypercall page, reference TSC and assist page, the counter that follows the
        // machine's clock, its index, and frequencies that it cannot set.
        0x4000_0000 | 0x4000_0001 | 0x4000_0021 | 0x4000_0073 => false,
        0x4000_0002..=0x4000_01ff => true,
        // Where it is after reset: the guest has never been in system management mode.
        IA32_SMBASE => msr.value == SMBASE_AFTER_RESET,
        // Describe the host and cannot be written by a guest: microcode revision, platform information, MTRR and machine-check
        // capabilities.
        0x8b | 0xce | 0xfe | 0x179 => true,
        // Locked, with VMX and SGX hidden: a guest can do nothing with it.
        0x3a => true,
        // Fast string operations, which are on after reset.
        0x1a0 => msr.value & !1 == 0,
        // Machine-check banks: a control register with everything enabled.
        0x400..=0x47f => msr.index.is_multiple_of(4) && msr.value == u64::MAX,
        // AMD: the TSC counts at the rate of P0 (HWCR 24), LFENCE serialises (DE_CFG 1), no TSC ratio.
        0xc001_0015 => msr.value & !(1 << 24) == 0,
        0xc001_1029 => msr.value & !(1 << 1) == 0,
        0xc000_0104 => msr.value == 1 << 32,
        // OS-visible workarounds: which errata the processor has.
        0xc001_0140 | 0xc001_0141 => true,
        // KVM polls before it halts a vCPU.
        0x4b56_4d05 => msr.value == 1,
        _ => false,
    }
}

/// By index, but the TSC, its adjustment and the deadline last, in this order: a deadline is armed against the TSC.
pub(crate) fn in_order(msrs: &[Msr]) -> Vec<Msr> {
    let rank = |msr: &Msr| match msr.index {
        IA32_TSC => 1,
        IA32_TSC_ADJUST => 2,
        IA32_TSC_DEADLINE => 3,
        _ => 0,
    };
    let mut ordered = msrs.to_vec();
    ordered.sort_by_key(|msr| (rank(msr), msr.index));
    ordered
}

/// Why a register is refused. `here` is its value on this host, if it exists.
pub(crate) fn refusal(wanted: Msr, here: Option<u64>) -> String {
    let Msr { index, value } = wanted;
    let name = name(index);
    match here {
        Some(here) => format!(
            "{name} (MSR {index:#x}) is {value:#x} in the guest, {here:#x} here, and cannot be set"
        ),
        None => {
            format!("{name} (MSR {index:#x}) is {value:#x} in the guest and does not exist here")
        }
    }
}

/// The manual's name of a register, for messages.
fn name(index: u32) -> &'static str {
    match index {
        0x10 => "IA32_TSC",
        0x3a => "IA32_FEATURE_CONTROL",
        0x3b => "IA32_TSC_ADJUST",
        0x48 => "IA32_SPEC_CTRL",
        0x8b => "IA32_BIOS_SIGN_ID",
        0xce => "MSR_PLATFORM_INFO",
        0xc1..=0xc8 => "IA32_PMCx",
        0xe1 => "IA32_UMWAIT_CONTROL",
        0x10a => "IA32_ARCH_CAPABILITIES",
        0x122 => "IA32_TSX_CTRL",
        0x140 => "MISC_FEATURES_ENABLES",
        0x174..=0x176 => "IA32_SYSENTER",
        0x179..=0x17b => "IA32_MCG",
        0x186..=0x18d => "IA32_PERFEVTSELx",
        0x1a0 => "IA32_MISC_ENABLE",
        0x1c4 => "IA32_XFD",
        0x1c5 => "IA32_XFD_ERR",
        0x1d9 => "IA32_DEBUGCTL",
        0x200..=0x20f | 0x250..=0x26f | 0x2ff => "IA32_MTRR",
        0x277 => "IA32_PAT",
        0x345 => "IA32_PERF_CAPABILITIES",
        0x309..=0x30c | 0x38d..=0x390 => "IA32_FIXED_CTR",
        0x400..=0x47f => "IA32_MCi",
        0x480..=0x493 => "IA32_VMX",
        0x6a0..=0x6a8 => "IA32_CET",
        0x6e0 => "IA32_TSC_DEADLINE",
        0xda0 => "IA32_XSS",
        0xc000_0080 => "IA32_EFER",
        0xc000_0081..=0xc000_0084 => "IA32_STAR",
        0xc000_0100..=0xc000_0102 => "IA32_FS_GS_BASE",
        0xc000_0103 => "IA32_TSC_AUX",
        0xc000_0104 => "AMD_TSC_RATIO",
        0xc001_0015 => "AMD_HWCR",
        0xc001_011f => "AMD_VIRT_SPEC_CTRL",
        0xc001_0140 => "OSVW_ID_LENGTH",
        0xc001_0141 => "OSVW_STATUS",
        0x4000_0000..=0x4000_01ff => "HYPERV",
        0x11 | 0x12 | 0x4b56_4d00..=0x4b56_4d08 => "KVM",
        _ => "a register without a name",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_register_and_values() {
        let text = refusal(
            Msr {
                index: 0x10a,
                value: 0x42,
            },
            Some(0),
        );
        assert!(
            text.contains("IA32_ARCH_CAPABILITIES")
                && text.contains("0x10a")
                && text.contains("0x42"),
            "{text}"
        );
        assert!(
            refusal(
                Msr {
                    index: 0x1c4,
                    value: 1
                },
                None
            )
            .contains("does not exist")
        );
    }

    #[test]
    fn the_time_stamp_counter_comes_last_and_the_deadline_after_it() {
        let msrs: Vec<_> = [0x10, 0x3b, 0x174, 0x6e0, 0x4b56_4d01, 0xc000_0081]
            .map(|index| Msr { index, value: 0 })
            .to_vec();
        let order: Vec<_> = in_order(&msrs).iter().map(|msr| msr.index).collect();
        assert_eq!(order, [0x174, 0x4b56_4d01, 0xc000_0081, 0x10, 0x3b, 0x6e0]);
    }
}
