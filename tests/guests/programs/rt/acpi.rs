//! ACPI tables: how to find one, and the APIC ids of the machine's CPUs from the MADT (ACPI 6.5, section
//! 5.2.12).

use super::machine::MAX_CPUS;

/// APIC ids in the order of the table; the first `len` count.
pub struct ApicIds {
    /// The ids.
    pub ids: [u32; MAX_CPUS],
    /// How many there are.
    pub len: usize,
}

const HEADER: u64 = 36;
/// No sane table is larger; a wild length must not walk through RAM.
const MAX_TABLE: u32 = 1 << 16;

/// Reads from a table.
///
/// # Safety
/// `at` must be a mapped guest-physical address.
pub(super) unsafe fn read<T: Copy>(at: u64) -> T {
    // SAFETY: the caller's promise; tables are not aligned.
    unsafe { (at as *const T).read_unaligned() }
}

/// Addresses that the boot page tables map.
pub(super) fn mapped(at: u64) -> bool {
    at != 0 && at < (1 << 32) - u64::from(MAX_TABLE)
}

/// The first table with this signature.
pub(super) fn find_table(rsdp: u64, signature: &[u8; 4]) -> Option<u64> {
    if !mapped(rsdp) {
        return None;
    }
    // SAFETY: every address is checked to be mapped before it is read, lengths are bounded.
    unsafe {
        if &read::<[u8; 8]>(rsdp) != b"RSD PTR " {
            return None;
        }
        let revision: u8 = read(rsdp + 15);
        let xsdt: u64 = if revision >= 2 { read(rsdp + 24) } else { 0 };
        let (root, entry_size) = if mapped(xsdt) {
            (xsdt, 8)
        } else {
            (u64::from(read::<u32>(rsdp + 16)), 4)
        };
        if !mapped(root) {
            return None;
        }
        let length = u64::from(read::<u32>(root + 4).min(MAX_TABLE));
        let mut at = HEADER;
        while at + entry_size <= length {
            let table = if entry_size == 8 {
                read::<u64>(root + at)
            } else {
                u64::from(read::<u32>(root + at))
            };
            if mapped(table) && &read::<[u8; 4]>(table) == signature {
                return Some(table);
            }
            at += entry_size;
        }
    }
    None
}

/// Address of the ECAM window of bus 0 on, from the MCFG (PCI Firmware Specification 3.0, section 4.1.2), if the first 4 GiB have it.
pub fn ecam(rsdp: u64) -> Option<u64> {
    let table = find_table(rsdp, b"MCFG")?;
    // SAFETY: `find_table` returned a mapped table; the first entry is looked at only if it is long enough.
    let (base, first_bus): (u64, u8) = unsafe {
        if u64::from(read::<u32>(table + 4)) < HEADER + 8 + 16 {
            return None;
        }
        (read(table + HEADER + 8), read(table + HEADER + 8 + 10))
    };
    (mapped(base) && first_bus == 0).then_some(base)
}

/// The enabled CPUs, or `None` without usable tables.
pub fn apic_ids(rsdp: u64) -> Option<ApicIds> {
    let madt = find_table(rsdp, b"APIC")?;
    let mut found = ApicIds {
        ids: [0; MAX_CPUS],
        len: 0,
    };
    // SAFETY: `find_table` returned a mapped table; its length is bounded.
    unsafe {
        let length = u64::from(read::<u32>(madt + 4).min(MAX_TABLE));
        let mut at = HEADER + 8;
        while at + 2 <= length {
            let (kind, size): (u8, u8) = (read(madt + at), read(madt + at + 1));
            let (id, flags): (u32, u32) = match kind {
                0 => (u32::from(read::<u8>(madt + at + 3)), read(madt + at + 4)),
                9 => (read(madt + at + 4), read(madt + at + 8)),
                _ => (0, 0),
            };
            if flags & 1 != 0 && found.len < MAX_CPUS {
                found.ids[found.len] = id;
                found.len += 1;
            }
            if size < 2 {
                break;
            }
            at += u64::from(size);
        }
    }
    (found.len > 0).then_some(found)
}
