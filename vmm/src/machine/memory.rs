//! A machine's memory: what there is at boot, where more may come, and how its hypervisor learns of it.
//!
//! ```text
//!   GuestRam:   RAM below 4 GiB │ RAM above │ region of virtio-mem (the last)
//!   hypervisor: a slot each, mapped from the start; unplugged memory takes none, but a bit a page in each dirty bitmap
//!   boot loader, CMOS: the first two
//! ```
//!
//! A guest hears of the third from its driver only. An SRAT could say at boot that memory may come there; Linux would keep 64 MiB for bounce
//! buffers then, for devices with addresses of 32 bits, of which there are none here.

use std::sync::Arc;

use arch::x86_64::cpuid::Cpuid;
use hypervisor::{HypervisorKind, MemorySlot, Vm};
use memory::{GuestRam, RamRange, RamRegion};

use super::instance::BuildError;
use crate::config::MemoryConfig;

/// Physical address bits of a processor that does not say how many it has (Intel SDM volume 3, section 4.1.4).
const LEAST_BITS: u32 = 36;

/// Refuses memory that the guest's processor could not reach.
pub(super) fn check_addresses(cpuid: &Cpuid, ranges: &[RamRange]) -> Result<(), BuildError> {
    let bits = cpuid
        .get(0x8000_0008, 0)
        .map_or(LEAST_BITS, |leaf| leaf.eax & 0xff);
    let end = ranges.last().and_then(RamRange::end).unwrap_or(u64::MAX);
    if end > 1u64.checked_shl(bits).unwrap_or(u64::MAX) {
        return Err(BuildError::Addresses { end, bits });
    }
    Ok(())
}

/// Maps all of it into the guest.
pub(super) fn map(
    vm: &Arc<dyn Vm>,
    ram: &GuestRam,
    kind: HypervisorKind,
) -> hypervisor::Result<Vec<MemorySlot>> {
    let slots: Vec<MemorySlot> = ram
        .regions()
        .iter()
        .zip(0..)
        .map(|(region, slot)| MemorySlot {
            slot,
            gpa: region.gpa(),
            len: region.len(),
            hva: region.hva(),
            read_only: false,
        })
        .collect();
    for &slot in &slots {
        // SAFETY: the mapping belongs to `ram`, which `Instance` drops after the VM and its vCPUs, and which hands out
        // no Rust reference to guest memory.
        unsafe { vm.map_memory(slot)? };
    }
    if kind == HypervisorKind::Mshv {
        // Some versions of its driver do that to all that is mapped.
        ram.find_pinning();
    }
    Ok(slots)
}

/// The RAM that a guest boots with: address and length of each range.
pub(super) fn at_boot(config: &MemoryConfig, ram: &GuestRam) -> Vec<(u64, u64)> {
    let regions = ram.regions();
    let count = regions.len() - usize::from(hotplug_region(config, ram).is_some());
    regions.iter().take(count).map(extent).collect()
}

/// Index of the region where memory can be added.
pub(super) fn hotplug_region(config: &MemoryConfig, ram: &GuestRam) -> Option<usize> {
    config.hotplug_size?;
    ram.regions().len().checked_sub(1)
}

fn extent(region: &RamRegion) -> (u64, u64) {
    (region.gpa(), region.len())
}

#[cfg(test)]
mod tests {
    use arch::x86_64::cpuid::CpuidEntry;
    use memory::Backing;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_guest_boots_with_its_ram_and_nothing_of_the_rest() {
        for (size, plug, boot, region) in [
            (GIB, None, vec![(0, GIB)], None),
            (GIB, Some(GIB), vec![(0, GIB)], Some((4 * GIB, GIB))),
            (
                5 * GIB,
                Some(GIB),
                vec![(0, 3 * GIB), (4 * GIB, 2 * GIB)],
                Some((6 * GIB, GIB)),
            ),
        ] {
            let config = MemoryConfig {
                size,
                hotplug_size: plug,
                ..MemoryConfig::default()
            };
            let ranges = config.ranges().expect("valid sizes");
            let ram = GuestRam::new(&ranges, Backing::Anonymous { thp: false }).expect("addresses");
            assert_eq!(at_boot(&config, &ram), boot);
            let found = hotplug_region(&config, &ram).map(|at| extent(&ram.regions()[at]));
            assert_eq!(found, region);
        }
    }

    #[test]
    fn memory_beyond_the_processors_addresses_is_refused() {
        let leaf = |bits: u32| CpuidEntry {
            leaf: 0x8000_0008,
            subleaf: None,
            eax: 0x3000 | bits,
            ebx: 0,
            ecx: 0,
            edx: 0,
        };
        let ranges = [RamRange {
            gpa: 0,
            len: 1 << 40,
        }];
        for (bits, fits) in [(39, false), (40, true), (52, true)] {
            let cpuid = Cpuid {
                entries: vec![leaf(bits)],
            };
            assert_eq!(check_addresses(&cpuid, &ranges).is_ok(), fits, "{bits}");
        }
        let silent = Cpuid {
            entries: Vec::new(),
        };
        assert!(check_addresses(&silent, &ranges).is_err());
    }
}
