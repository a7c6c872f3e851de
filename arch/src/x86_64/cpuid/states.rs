//! State components of the processor in leaf 0xd.

use super::features::{by_name, has, xstate};
use super::{Cpuid, bit};

/// End of the header of an XSAVE area (SDM vol. 1, section 13.4.2).
const XSAVE_HEADER_END: u32 = 576;
/// x87 and SSE, which every XSAVE area has (SDM vol. 1, section 13.4.1).
const LEGACY: u64 = 3;

/// Leaves that describe a feature: key locker, the tiles of AMX, the version of AVX10.
const OF_FEATURES: [(&str, &[u32]); 3] = [
    ("key_locker", &[0x19]),
    ("amx_tile", &[0x1d, 0x1e]),
    ("avx10", &[0x24]),
];

/// Takes every component that none of the guest's features uses out of leaf 0xd: its bit in XCR0 or IA32_XSS, its description, and its
/// part of the largest area. `closed`: also those that this build does not know. Without XSAVE the leaf goes, and so
/// do leaves that describe a feature which the guest does not have.
pub fn trim_states(cpuid: &mut Cpuid, closed: bool) {
    let shows = |name| by_name(name).is_some_and(|feature| has(cpuid, feature));
    let xsave = shows("xsave");
    let gone: Vec<u32> = OF_FEATURES
        .iter()
        .filter(|(name, _)| !shows(name))
        .flat_map(|(_, leaves)| leaves.iter().copied())
        .collect();
    cpuid.entries.retain(|entry| !gone.contains(&entry.leaf));
    if !xsave {
        cpuid.entries.retain(|entry| entry.leaf != 0xd);
        return;
    }
    let known = xstate::all().fold(0, |mask, component| mask | 1 << component.number);
    let unknown = if closed { 0 } else { !known };
    let kept = LEGACY | xstate::of(cpuid) | unknown;
    cpuid.entries.retain(|entry| {
        entry.leaf != 0xd
            || entry.subleaf.is_none_or(|subleaf| {
                subleaf < 2 || kept.checked_shr(subleaf).unwrap_or(0) & 1 != 0
            })
    });
    let ends = cpuid
        .entries
        .iter()
        .filter(|entry| entry.leaf == 0xd && entry.subleaf.is_some_and(|subleaf| subleaf >= 2))
        // Supervisor components (ECX bit 0) are not in the standard format.
        .filter(|entry| entry.ecx & bit(0) == 0)
        .map(|entry| entry.ebx.saturating_add(entry.eax));
    let size = ends.max().unwrap_or(0).max(XSAVE_HEADER_END);
    let (low, high) = (kept as u32, (kept >> 32) as u32);
    if let Some(leaf) = cpuid.get_mut(0xd, 0) {
        leaf.eax &= low;
        leaf.edx &= high;
        leaf.ecx = leaf.ecx.min(size);
    }
    if let Some(leaf) = cpuid.get_mut(0xd, 1) {
        leaf.ecx &= low;
        leaf.edx &= high;
    }
}
