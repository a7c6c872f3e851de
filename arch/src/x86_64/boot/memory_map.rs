//! The memory map that a kernel is told: the same list for PVH and for the zero page's E820 table.
//!
//! ```text
//!   0 ─ RAM ─ EBDA ─ reserved ─ 0xa0000    0xe0000 ─ reserved (ACPI) ─ 1 MiB ─ RAM ─ low end
//!   0xe000_0000 ─ reserved (ECAM)   IOAPIC, LAPIC, VMX pages: reserved   4 GiB ─ RAM ─ end
//! ```

use super::PAGE;
use super::error::BootError;
use crate::x86_64::layout::{
    ACPI_TABLES, EBDA, HIGH_RAM, IOAPIC_BASE, IOAPIC_SIZE, KVM_IDENTITY_MAP, LAPIC_BASE,
    MMIO_HOLE_END, MMIO_HOLE_START, PCI_ECAM_BASE, PCI_ECAM_SIZE,
};

/// Where the legacy video window begins, which ends conventional memory for good.
const VGA_WINDOW: u64 = 0xa_0000;
/// Least RAM from address 0.
const LEAST_RAM: u64 = 2 << 20;
/// Most entries a zero page takes (E820_MAX_ENTRIES_ZEROPAGE, Linux `arch/x86/include/uapi/asm/bootparam.h`).
pub(super) const MAX_ENTRIES: usize = 128;

/// What a range of guest-physical addresses is for. The numbers are those of ACPI 6.5, table 15.4, and of
/// Xen's `hvm_memmap_table_entry` alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is for.
    pub kind: MemoryKind,
}

/// The whole map, sorted by address, without overlaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    entries: Vec<MemoryMapEntry>,
    low_end: u64,
}

impl MemoryMap {
    /// Makes the map of a machine with the RAM ranges `ram` (address, length).
    pub fn new(ram: &[(u64, u64)]) -> Result<Self, BootError> {
        if ram.len() > MAX_ENTRIES {
            return Err(BootError::TooManyRanges(ram.len()));
        }
        let merged = merge(ram)?;
        let low_end = merged
            .first()
            .filter(|(start, _)| *start == 0)
            .map_or(0, |(_, end)| *end);
        if low_end < LEAST_RAM {
            return Err(BootError::TooLittleRam(low_end));
        }

        let mut entries = Vec::with_capacity(merged.len() + 8);
        let mut add = |kind, start: u64, end: u64| {
            entries.push(MemoryMapEntry {
                gpa: start,
                len: end - start,
                kind,
            });
        };
        add(MemoryKind::Ram, 0, EBDA);
        add(MemoryKind::Reserved, EBDA, VGA_WINDOW);
        add(MemoryKind::Reserved, ACPI_TABLES, HIGH_RAM);
        add(MemoryKind::Ram, HIGH_RAM, low_end);
        for (start, end) in &merged[1..] {
            add(MemoryKind::Ram, *start, *end);
        }
        add(
            MemoryKind::Reserved,
            PCI_ECAM_BASE,
            PCI_ECAM_BASE + PCI_ECAM_SIZE,
        );
        add(MemoryKind::Reserved, IOAPIC_BASE, IOAPIC_BASE + IOAPIC_SIZE);
        add(MemoryKind::Reserved, LAPIC_BASE, LAPIC_BASE + PAGE);
        add(
            MemoryKind::Reserved,
            KVM_IDENTITY_MAP,
            KVM_IDENTITY_MAP + 4 * PAGE,
        );
        entries.sort_by_key(|entry| entry.gpa);
        if entries.len() > MAX_ENTRIES {
            return Err(BootError::TooManyRanges(ram.len()));
        }
        Ok(Self { entries, low_end })
    }

    /// The ranges.
    pub fn entries(&self) -> &[MemoryMapEntry] {
        &self.entries
    }

    /// End of the RAM that begins at address 0.
    pub fn low_end(&self) -> u64 {
        self.low_end
    }
}

/// Sorts the ranges, joins those that touch, and turns lengths into ends.
fn merge(ram: &[(u64, u64)]) -> Result<Vec<(u64, u64)>, BootError> {
    let mut sorted = ram.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(sorted.len());
    for (gpa, len) in sorted {
        let bad = BootError::RamRange { gpa, len };
        let Some(end) = gpa.checked_add(len) else {
            return Err(bad);
        };
        let aligned = gpa % PAGE == 0 && len % PAGE == 0 && len != 0;
        let in_hole = gpa < MMIO_HOLE_END && end > MMIO_HOLE_START;
        if !aligned || in_hole {
            return Err(bad);
        }
        match merged.last_mut() {
            Some((_, last)) if gpa < *last => return Err(bad),
            Some((_, last)) if gpa == *last => *last = end,
            _ => merged.push((gpa, end)),
        }
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn a_small_guest() {
        let map = MemoryMap::new(&[(0, 64 * MIB)]).expect("valid RAM");
        let ram: Vec<_> = map
            .entries()
            .iter()
            .filter(|e| e.kind == MemoryKind::Ram)
            .map(|e| (e.gpa, e.len))
            .collect();
        assert_eq!(ram, [(0, 0x9_fc00), (MIB, 63 * MIB)]);
        assert_eq!(map.low_end(), 64 * MIB);
    }

    #[test]
    fn ram_around_the_hole_is_sorted_joined_and_never_overlaps() {
        let ram = [(4 * GIB, GIB), (2 * GIB, GIB), (0, 2 * GIB), (5 * GIB, GIB)];
        let map = MemoryMap::new(&ram).expect("valid RAM");
        assert_eq!(map.low_end(), 3 * GIB);
        let entries = map.entries();
        assert!(
            entries
                .windows(2)
                .all(|two| two[0].gpa + two[0].len <= two[1].gpa)
        );
        let last = entries.last().expect("not empty");
        assert_eq!(
            (last.gpa, last.len, last.kind),
            (4 * GIB, 2 * GIB, MemoryKind::Ram)
        );
        for reserved in [
            IOAPIC_BASE,
            LAPIC_BASE,
            ACPI_TABLES,
            KVM_IDENTITY_MAP,
            PCI_ECAM_BASE,
        ] {
            assert!(
                entries
                    .iter()
                    .any(|e| e.gpa == reserved && e.kind == MemoryKind::Reserved)
            );
        }
    }

    #[test]
    fn impossible_ram_is_refused() {
        let cases: &[&[(u64, u64)]] = &[
            &[(0, 0)],
            &[(0, 64 * MIB + 1)],
            &[(0, 64 * MIB), (32 * MIB, 64 * MIB)],
            &[(0, 4 * GIB)],
            &[(0, 64 * MIB), (u64::MAX - 4095, 4096 * 2)],
            &[(0, 64 * MIB), (0xfee0_0000, 4096)],
        ];
        for ram in cases {
            assert!(
                matches!(MemoryMap::new(ram), Err(BootError::RamRange { .. })),
                "{ram:x?}"
            );
        }
        for ram in [&[][..], &[(0, MIB)], &[(16 * MIB, GIB)]] {
            assert!(
                matches!(MemoryMap::new(ram), Err(BootError::TooLittleRam(_))),
                "{ram:x?}"
            );
        }
        let many: Vec<_> = (0..200).map(|n| (n * 4 * MIB, 2 * MIB)).collect();
        assert!(matches!(
            MemoryMap::new(&many),
            Err(BootError::TooManyRanges(200))
        ));
        assert!(matches!(
            MemoryMap::new(&many[..125]),
            Err(BootError::TooManyRanges(125))
        ));
    }
}
