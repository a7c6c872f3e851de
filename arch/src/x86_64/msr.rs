//! Model-specific registers: the numbers this project needs by name, and the values firmware would
//! leave in them when it hands over to a kernel.
//!
//! Numbers and layouts: SDM vol. 4, table 2-2 (architectural MSRs).

use super::state::{Msr, VcpuState};

/// IA32_TIME_STAMP_COUNTER.
pub const IA32_TSC: u32 = 0x10;
/// IA32_APIC_BASE.
pub const IA32_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_ADJUST.
pub const IA32_TSC_ADJUST: u32 = 0x3b;
/// IA32_MTRRCAP (read only).
pub const IA32_MTRRCAP: u32 = 0xfe;
/// IA32_MISC_ENABLE.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// IA32_MISC_ENABLE bit 0: fast string operations.
pub const MISC_ENABLE_FAST_STRINGS: u64 = 1;
/// IA32_MTRR_PHYSBASE0; the mask follows each base, and there are [`MTRR_VARIABLE_PAIRS`] pairs.
pub const IA32_MTRR_PHYSBASE0: u32 = 0x200;
/// How many variable-range MTRR pairs hypervisors offer (KVM reports 8 in IA32_MTRRCAP).
pub const MTRR_VARIABLE_PAIRS: u32 = 8;
/// The eleven fixed-range MTRRs.
pub const IA32_MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
/// IA32_PAT.
pub const IA32_PAT: u32 = 0x277;
/// IA32_PAT after reset (SDM vol. 3, table 12-12): WB, WT, UC-, UC, twice.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// IA32_MTRR_DEF_TYPE.
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// IA32_MTRR_DEF_TYPE: MTRRs enabled (bit 11).
pub const MTRR_ENABLE: u64 = 1 << 11;
/// IA32_MTRR_DEF_TYPE: memory type write-back.
pub const MTRR_TYPE_WRITE_BACK: u64 = 6;
/// IA32_TSC_DEADLINE.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_XSS.
pub const IA32_XSS: u32 = 0xda0;
/// IA32_EFER.
pub const IA32_EFER: u32 = 0xc000_0080;

/// EFER bit 8: long mode enable.
pub const EFER_LME: u64 = 1 << 8;
/// EFER bit 10: long mode active.
pub const EFER_LMA: u64 = 1 << 10;

/// Every MTRR that holds state, sorted.
///
/// KVM takes and gives all of them but (at least up to 6.18) names none in KVM_GET_MSR_INDEX_LIST:
/// whoever saves a vCPU by that list alone loses the guest's memory types.
pub fn mtrrs() -> Vec<u32> {
    let variable = IA32_MTRR_PHYSBASE0..IA32_MTRR_PHYSBASE0 + 2 * MTRR_VARIABLE_PAIRS;
    variable
        .chain(IA32_MTRR_FIXED)
        .chain([IA32_MTRR_DEF_TYPE])
        .collect()
}

/// Puts into a freshly reset vCPU the MSR values that firmware leaves behind; for the boot processor and for all
/// others alike, so that a kernel finds them consistent.
///
/// IA32_MTRR_DEF_TYPE is always written: with MTRRs off, as after reset, some Linux kernels (6.1) turn PAT off too and
/// take all memory for uncacheable. The others are written only where the state lists them, which means that the
/// host has them.
pub fn apply_boot_values(state: &mut VcpuState) {
    if let Some(misc) = find(state, IA32_MISC_ENABLE) {
        misc.value |= MISC_ENABLE_FAST_STRINGS;
    }
    if let Some(pat) = find(state, IA32_PAT) {
        pat.value = PAT_RESET;
    }
    set(
        state,
        IA32_MTRR_DEF_TYPE,
        MTRR_ENABLE | MTRR_TYPE_WRITE_BACK,
    );
}

/// Gives a freshly reset vCPU these values.
pub fn apply(state: &mut VcpuState, msrs: &[Msr]) {
    for msr in msrs {
        set(state, msr.index, msr.value);
    }
}

/// Lets a saved vCPU's TSC go on by the time that has passed since it was saved. Without a known frequency it stays.
pub fn advance_tsc(state: &mut VcpuState, khz: Option<u32>, passed_ns: u64) {
    let Some(khz) = khz else {
        return;
    };
    let ticks = u128::from(passed_ns) * u128::from(khz) / 1_000_000;
    let ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
    if let Some(tsc) = find(state, IA32_TSC) {
        tsc.value = tsc.value.wrapping_add(ticks);
    }
}

fn find(state: &mut VcpuState, index: u32) -> Option<&mut Msr> {
    state.msrs.iter_mut().find(|msr| msr.index == index)
}

/// Sets an MSR, keeping the list sorted.
fn set(state: &mut VcpuState, index: u32, value: u64) {
    match state.msrs.binary_search_by_key(&index, |msr| msr.index) {
        Ok(at) => state.msrs[at].value = value,
        Err(at) => state.msrs.insert(at, Msr { index, value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_values_touch_only_what_the_host_has() {
        let mut state = VcpuState {
            msrs: vec![
                Msr {
                    index: IA32_TSC,
                    value: 7,
                },
                Msr {
                    index: IA32_MISC_ENABLE,
                    value: 0x800,
                },
            ],
            ..VcpuState::default()
        };
        apply_boot_values(&mut state);
        assert_eq!(
            state.msrs,
            [
                Msr {
                    index: IA32_TSC,
                    value: 7
                },
                Msr {
                    index: IA32_MISC_ENABLE,
                    value: 0x801
                },
                Msr {
                    index: IA32_MTRR_DEF_TYPE,
                    value: 0x806
                },
            ]
        );
        apply_boot_values(&mut state);
        assert_eq!(state.msrs.len(), 3, "a second time changes nothing");
    }

    #[test]
    fn a_tsc_goes_on_by_the_time_that_has_passed() {
        let tsc = |value| VcpuState {
            msrs: vec![Msr {
                index: IA32_TSC,
                value,
            }],
            ..VcpuState::default()
        };
        let mut state = tsc(5);
        advance_tsc(&mut state, Some(2_500_000), 4);
        assert_eq!(state, tsc(15));
        advance_tsc(&mut state, None, 4);
        assert_eq!(state, tsc(15));
        advance_tsc(&mut state, Some(u32::MAX), u64::MAX);
        let mut without = VcpuState::default();
        advance_tsc(&mut without, Some(1), 1);
        assert_eq!(without, VcpuState::default());
    }

    #[test]
    fn mtrrs_are_complete_and_sorted() {
        let all = mtrrs();
        assert_eq!(all.len(), 16 + 11 + 1);
        assert!(all.is_sorted());
        assert!(all.contains(&0x20f) && all.contains(&0x26f));
    }
}
