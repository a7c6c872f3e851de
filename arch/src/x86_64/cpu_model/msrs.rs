//! Model-specific registers that tell a guest what its processor can do.
//!
//! ```text
//!   host's value ──► model's pattern ──► the guest's, written once, read back, part of the contract
//!   destination: every bit of it that promises something must be set in its own host's register
//! ```

use super::error::Unavailable;
use super::model::CpuModel;
use crate::x86_64::cpuid::Cpuid;
use crate::x86_64::cpuid::features::{by_name, has};
use crate::x86_64::state::Msr;

/// IA32_ARCH_CAPABILITIES.
pub const ARCH_CAPABILITIES: u32 = 0x10a;
/// IA32_CORE_CAPABILITIES.
pub(super) const CORE_CAPABILITIES: u32 = 0xcf;

/// The registers, by index.
pub const FEATURE_MSRS: [u32; 2] = [CORE_CAPABILITIES, ARCH_CAPABILITIES];

/// The manual's name of a feature register; nothing for any other register.
pub fn feature_msr_name(index: u32) -> Option<&'static str> {
    match index {
        ARCH_CAPABILITIES => Some("IA32_ARCH_CAPABILITIES"),
        CORE_CAPABILITIES => Some("IA32_CORE_CAPABILITIES"),
        _ => None,
    }
}

/// The feature that tells a guest of a register.
fn shown_by(index: u32) -> &'static str {
    match index {
        ARCH_CAPABILITIES => "arch_capabilities",
        _ => "core_capabilities",
    }
}

/// Whether a guest that is shown `cpuid` knows of a register.
pub(super) fn is_shown(index: u32, cpuid: &Cpuid) -> bool {
    by_name(shown_by(index)).is_some_and(|feature| has(cpuid, feature))
}

/// Bits of IA32_ARCH_CAPABILITIES that warn instead of promising (SDM vol. 4, table 2-2): RSBA (2) and RRSBA (19).
const WARNINGS: u64 = 1 << 2 | 1 << 19;

/// The bits of a register that promise a guest something.
pub(super) fn promises(index: u32) -> u64 {
    match index {
        ARCH_CAPABILITIES => !WARNINGS,
        CORE_CAPABILITIES => u64::MAX,
        _ => 0,
    }
}

/// The name of a bit of IA32_ARCH_CAPABILITIES, in the manual's spelling (SDM vol. 4, table 2-2).
pub(super) fn capability_name(index: u32, bit: u32) -> Option<&'static str> {
    if index != ARCH_CAPABILITIES {
        return None;
    }
    Some(match bit {
        0 => "RDCL_NO",
        1 => "IBRS_ALL",
        2 => "RSBA",
        3 => "SKIP_L1DFL_VMENTRY",
        4 => "SSB_NO",
        5 => "MDS_NO",
        6 => "IF_PSCHANGE_MC_NO",
        7 => "TSX_CTRL",
        8 => "TAA_NO",
        9 => "MCU_CONTROL",
        10 => "MISC_PACKAGE_CTLS",
        11 => "ENERGY_FILTERING_CTL",
        12 => "DOITM",
        13 => "SBDR_SSDP_NO",
        14 => "FBSDP_NO",
        15 => "PSDP_NO",
        17 => "FB_CLEAR",
        18 => "FB_CLEAR_CTRL",
        19 => "RRSBA",
        20 => "BHI_NO",
        21 => "XAPIC_DISABLE_STATUS",
        23 => "OVERCLOCKING_STATUS",
        24 => "PBRSB_NO",
        25 => "GDS_CTRL",
        26 => "GDS_NO",
        27 => "RFDS_NO",
        28 => "RFDS_CLEAR",
        62 => "ITS_NO",
        _ => return None,
    })
}

/// The bits that `guest` promises and `host` does not.
pub fn unkept_promises(guest: Msr, host: u64) -> u64 {
    guest.value & !host & promises(guest.index)
}

/// Bits of a register by name, or by number.
pub fn bit_names(index: u32, bits: u64) -> String {
    (0..u64::BITS)
        .filter(|bit| bits >> bit & 1 != 0)
        .map(|bit| capability_name(index, bit).map_or_else(|| format!("bit {bit}"), str::to_owned))
        .collect::<Vec<_>>()
        .join(", ")
}

/// The features that bring a register, where it comes with any: a guest that has none of them cannot have used it. Nothing is said of a
/// register that comes with none, or that is not known here.
fn brought_by(index: u32) -> &'static [&'static str] {
    match index {
        0x3b => &["tsc_adjust"],
        // IA32_SPEC_CTRL.
        0x48 => &[
            "spec_ctrl",
            "stibp",
            "ssbd",
            "ibrs",
            "amd_stibp",
            "amd_ssbd",
            "autoibrs",
        ],
        // IA32_UMWAIT_CONTROL.
        0xe1 => &["waitpkg"],
        ARCH_CAPABILITIES => &["arch_capabilities"],
        CORE_CAPABILITIES => &["core_capabilities"],
        // IA32_XFD and IA32_XFD_ERR.
        0x1c4 | 0x1c5 => &["xfd"],
        // IA32_U_CET to IA32_INTERRUPT_SSP_TABLE_ADDR.
        0x6a0..=0x6a8 => &["shstk", "ibt"],
        // IA32_TSC_DEADLINE.
        0x6e0 => &["tsc_deadline_timer"],
        // IA32_PKRS.
        0x6e1 => &["pks"],
        // IA32_BNDCFGS.
        0xd90 => &["mpx"],
        // IA32_XSS.
        0xda0 => &["xsaves"],
        // IA32_TSC_AUX.
        0xc000_0103 => &["rdtscp", "rdpid"],
        0xc001_011f => &["virt_ssbd"],
        0x4b56_4d01 => &["kvmclock2"],
        0x4b56_4d03 => &["kvm_steal_time"],
        0x4b56_4d04 => &["kvm_pv_eoi"],
        0x4b56_4d05 => &["kvm_poll_control"],
        _ => &[],
    }
}

/// Registers that a guest which is shown `cpuid` could have used and that a host does not carry.
pub(super) fn not_carried(guest: &[u32], cpuid: &Cpuid, host: &[u32]) -> Vec<u32> {
    let used = |index: u32| {
        let features = brought_by(index).iter();
        let mut known = features.filter_map(|name| by_name(name));
        known.any(|feature| has(cpuid, feature))
    };
    guest
        .iter()
        .copied()
        .filter(|index| !host.contains(index) && used(*index))
        .collect()
}

impl CpuModel {
    /// The feature registers of a guest that is shown `cpuid` by this model on a host with these, or everything that the host cannot give.
    pub fn apply_msrs(&self, cpuid: &Cpuid, host: &[Msr]) -> Result<Vec<Msr>, Vec<Unavailable>> {
        let mut missing = Vec::new();
        let mut registers = Vec::new();
        for index in FEATURE_MSRS {
            if !is_shown(index, cpuid) {
                continue;
            }
            let here = host.iter().find(|msr| msr.index == index);
            let pattern = self.msrs.get(&index).copied().unwrap_or_default();
            let Some(here) = here else {
                if pattern.ones() != 0 {
                    missing.push(Unavailable::Msr {
                        index,
                        bits: pattern.ones(),
                    });
                }
                continue;
            };
            let value = pattern.apply(here.value);
            let bits = unkept_promises(Msr { index, value }, here.value);
            if bits != 0 {
                missing.push(Unavailable::Msr { index, bits });
            }
            registers.push(Msr { index, value });
        }
        if missing.is_empty() {
            Ok(registers)
        } else {
            Err(missing)
        }
    }
}
