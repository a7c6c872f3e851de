//! CPUID: what the hypervisor computes, and results registered over it.
//!
//! ```text
//!   HVCALL_GET_VP_CPUID_VALUES of a throw-away VP ──► supported CPUID
//!   the guest's table ──► HVCALL_REGISTER_INTERCEPT_RESULT, one call an entry, with masks of all ones
//!                         leaves that the hypervisor would show and the table has not: registered as zeros
//! ```
//!
//! A registered result replaces the bits of its mask. `mshv-ioctls` takes the value itself as the mask, which can only switch bits on; a
//! guest that moves needs them switched off too, so the call is made here. Bits that follow the VP's state stay the
//! hypervisor's ([`dynamic`]).

use arch::x86_64::cpuid::{Cpuid, CpuidEntry};
use mshv_bindings::{
    HVCALL_REGISTER_INTERCEPT_RESULT, hv_input_register_intercept_result,
    hv_intercept_type_HV_INTERCEPT_TYPE_X64_CPUID, hv_register_intercept_result_parameters,
    hv_register_x64_cpuid_result_parameters, hv_register_x64_cpuid_result_parameters__bindgen_ty_1,
    hv_register_x64_cpuid_result_parameters__bindgen_ty_2, mshv_root_hvcall,
};
use mshv_ioctls::VcpuFd;

use super::call;
use crate::{Error, Result};

/// Highest leaf of a range that is asked for, should the hypervisor name more.
const MOST_LEAVES: u32 = 0x40;
/// Longest table of a vCPU, the same as KVM's: each entry costs the hypervisor memory.
const MOST_ENTRIES: usize = 256;
/// Most subleaves of a leaf.
const MOST_SUBLEAVES: u32 = 64;

/// Which subleaves a leaf has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Subleaves {
    /// None: ECX does not matter.
    None,
    /// As many as EAX of subleaf 0 says, and that one.
    Counted,
    /// Until one is all zero in the given register's low bits.
    UntilZero,
    /// One for each state component: those in XCR0 and XSS masks, up to 63.
    Components,
}

/// SDM vol. 2A, CPUID; APM vol. 3, section E.4.
fn subleaves(leaf: u32) -> Subleaves {
    match leaf {
        4 | 0xb | 0x12 | 0x1f | 0x8000_001d | 0x8000_0026 => Subleaves::UntilZero,
        7 | 0x14 | 0x17 | 0x18 | 0x1d | 0x20 | 0x23 | 0x24 => Subleaves::Counted,
        0xd => Subleaves::Components,
        0xf | 0x10 => Subleaves::UntilZero,
        _ => Subleaves::None,
    }
}

/// All that the VP shows: basic, hypervisor and extended leaves.
pub(crate) fn enumerate(vp: &VcpuFd) -> Result<Cpuid> {
    walk(|leaf, subleaf| {
        vp.get_cpuid_values(leaf, subleaf, 0, 0)
            .map_err(call("HVCALL_GET_VP_CPUID_VALUES"))
    })
}

/// Walks the leaves of whatever answers `ask`.
fn walk(mut ask: impl FnMut(u32, u32) -> Result<[u32; 4]>) -> Result<Cpuid> {
    let mut entries = Vec::new();
    for base in [0, 0x4000_0000, 0x8000_0000] {
        let [last, ..] = ask(base, 0)?;
        if base != 0 && (last < base || last > base + 0xffff) {
            continue;
        }
        for leaf in base..=last.min(base + MOST_LEAVES) {
            let first = ask(leaf, 0)?;
            let kind = subleaves(leaf);
            let mut push = |subleaf: u32, [eax, ebx, ecx, edx]: [u32; 4]| {
                entries.push(CpuidEntry {
                    leaf,
                    subleaf: (kind != Subleaves::None).then_some(subleaf),
                    eax,
                    ebx,
                    ecx,
                    edx,
                });
            };
            push(0, first);
            match kind {
                Subleaves::None => {}
                Subleaves::Counted => {
                    for subleaf in 1..=first[0].min(MOST_SUBLEAVES) {
                        push(subleaf, ask(leaf, subleaf)?);
                    }
                }
                Subleaves::UntilZero => {
                    for subleaf in 1..MOST_SUBLEAVES {
                        let values = ask(leaf, subleaf)?;
                        let ends = match leaf {
                            // Topology levels end with a type of 0.
                            0xb | 0x1f | 0x8000_0026 => values[2] & 0xff00 == 0,
                            // Caches end with a type of 0.
                            4 | 0x8000_001d => values[0] & 0x1f == 0,
                            _ => values == [0; 4],
                        };
                        // The one that ends the list belongs to it.
                        push(subleaf, values);
                        if ends {
                            break;
                        }
                    }
                }
                Subleaves::Components => {
                    let second = ask(leaf, 1)?;
                    push(1, second);
                    let mask = u64::from(first[0])
                        | u64::from(first[3]) << 32
                        | u64::from(second[2])
                        | u64::from(second[3]) << 32;
                    for subleaf in (2..63).filter(|bit| mask >> bit & 1 != 0) {
                        push(subleaf, ask(leaf, subleaf)?);
                    }
                }
            }
        }
    }
    entries.sort_by_key(|e| (e.leaf, e.subleaf));
    Ok(Cpuid { entries })
}

/// Bits of EAX, EBX, ECX and EDX that follow the VP's state, or that the hypervisor alone may know.
///
/// Leaf 1: APIC on (EDX 9) and OSXSAVE (ECX 27). Leaf 7: OSPKE (ECX 4). Leaf 0xd: the size of the area for what XCR0 and XSS enable
/// (EBX of subleaves 0 and 1).
fn dynamic(leaf: u32, subleaf: u32) -> [u32; 4] {
    match (leaf, subleaf) {
        (1, _) => [0, 0, 1 << 27, 1 << 9],
        (7, 0) => [0, 0, 1 << 4, 0],
        (0xd, 0 | 1) => [0, u32::MAX, 0, 0],
        _ => [0; 4],
    }
}

/// Makes the VP show `table`, and zeros where `shown` (what the hypervisor would show) has a leaf that the table has not.
pub(crate) fn register(vp: &VcpuFd, index: u32, table: &Cpuid, shown: &Cpuid) -> Result<()> {
    if table.entries.len() > MOST_ENTRIES {
        return Err(Error::Invalid(format!(
            "a CPUID table of {} entries is longer than the {MOST_ENTRIES} that a vCPU takes",
            table.entries.len()
        )));
    }
    for entry in covering(table, shown) {
        register_entry(vp, index, &entry)?;
    }
    Ok(())
}

/// The table, with a zero entry for whatever else is shown.
fn covering(table: &Cpuid, shown: &Cpuid) -> Vec<CpuidEntry> {
    let mut entries = table.entries.clone();
    for entry in &shown.entries {
        let said = table.entries.iter().any(|known| {
            known.leaf == entry.leaf && (known.subleaf.is_none() || known.subleaf == entry.subleaf)
        });
        if !said {
            entries.push(CpuidEntry {
                leaf: entry.leaf,
                subleaf: entry.subleaf,
                ..CpuidEntry::default()
            });
        }
    }
    entries
}

fn register_entry(vp: &VcpuFd, index: u32, entry: &CpuidEntry) -> Result<()> {
    let subleaf = entry.subleaf.unwrap_or(0);
    let [eax, ebx, ecx, edx] = dynamic(entry.leaf, subleaf);
    let parameters = hv_register_x64_cpuid_result_parameters {
        input: hv_register_x64_cpuid_result_parameters__bindgen_ty_1 {
            eax: entry.leaf,
            ecx: subleaf,
            subleaf_specific: entry.subleaf.is_some().into(),
            always_override: 1,
            padding: 0,
        },
        result: hv_register_x64_cpuid_result_parameters__bindgen_ty_2 {
            eax: entry.eax,
            eax_mask: !eax,
            ebx: entry.ebx,
            ebx_mask: !ebx,
            ecx: entry.ecx,
            ecx_mask: !ecx,
            edx: entry.edx,
            edx_mask: !edx,
        },
    };
    let input = hv_input_register_intercept_result {
        vp_index: index,
        intercept_type: hv_intercept_type_HV_INTERCEPT_TYPE_X64_CPUID,
        parameters: hv_register_intercept_result_parameters { cpuid: parameters },
        // The driver fills in the partition.
        ..Default::default()
    };
    let mut arguments = mshv_root_hvcall {
        code: HVCALL_REGISTER_INTERCEPT_RESULT as u16,
        in_sz: size_of_val(&input) as u16,
        in_ptr: std::ptr::addr_of!(input) as u64,
        ..Default::default()
    };
    vp.hvcall(&mut arguments)
        .map_err(call("HVCALL_REGISTER_INTERCEPT_RESULT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_and_subleaf_is_walked_once_and_a_liar_is_not_followed_for_ever() {
        let asked = std::cell::Cell::new(0u32);
        let cpuid = walk(|leaf, subleaf| {
            asked.set(asked.get() + 1);
            Ok(match (leaf, subleaf) {
                (0, _) => [0xd, 1, 2, 3],
                (4, 0..=2) => [0x21, 0, 0, 0],
                (7, 0) => [1, 0, 0, 0],
                (0xb, 0 | 1) => [1, 1, 0x100, 0],
                (0xd, 0) => [0b111, 0, 0, 0],
                (0xd, 1) => [0, 0, 1 << 8, 0],
                (0xd, _) => [8, 8, 0, 0],
                (0x4000_0000, _) => [0, 0, 0, 0],
                (0x8000_0000, _) => [u32::MAX, 0, 0, 0],
                _ => [0; 4],
            })
        })
        .expect("walk");
        let of = |leaf| {
            let entries = cpuid.entries.iter().filter(|e| e.leaf == leaf);
            entries.map(|e| e.subleaf).collect::<Vec<_>>()
        };
        assert_eq!(of(4), [Some(0), Some(1), Some(2), Some(3)]);
        assert_eq!(of(7), [Some(0), Some(1)]);
        assert_eq!(of(0xb), [Some(0), Some(1), Some(2)]);
        assert_eq!(of(0xd), [Some(0), Some(1), Some(2), Some(8)]);
        assert_eq!(of(1), [None]);
        assert!(of(0x8000_0000).is_empty() && of(0x4000_0000).is_empty());
        assert!(asked.get() < 100, "{}", asked.get());
        let liar = walk(|_, _| Ok([u32::MAX; 4])).expect("walk");
        assert!(liar.entries.len() < 5000);
    }

    #[test]
    fn what_the_table_does_not_say_is_shown_as_zero() {
        let entry = |leaf, subleaf, eax| CpuidEntry {
            leaf,
            subleaf,
            eax,
            ..CpuidEntry::default()
        };
        let table = Cpuid {
            entries: vec![entry(1, None, 5), entry(7, Some(0), 6)],
        };
        let shown = Cpuid {
            entries: vec![
                entry(1, None, 9),
                entry(7, Some(0), 9),
                entry(7, Some(1), 9),
                entry(0x4000_0000, None, 9),
            ],
        };
        let all = covering(&table, &shown);
        assert_eq!(all.len(), 4);
        assert_eq!((all[2].leaf, all[2].subleaf, all[2].eax), (7, Some(1), 0));
        assert_eq!((all[3].leaf, all[3].eax), (0x4000_0000, 0));
    }
}
