//! Linux's 64-bit boot protocol: the zero page and the boot page tables (Linux `Documentation/arch/x86/boot.rst`,
//! `Documentation/arch/x86/zero-page.rst`).
//!
//! ```text
//!   BOOT_PAGE_TABLES ─ PML4 ─► PDPT ─► 4 page directories of 2 MiB pages: 0..4 GiB mapped to itself
//!   ZERO_PAGE        ─ boot_params: the kernel's own setup header, memory map, initramfs, command line, RSDP
//! ```

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, GuestMemory};

use super::error::BootError;
use super::kernel::BzImage;
use super::memory_map::MAX_ENTRIES;
use super::{Loaded, MemoryMap, PAGE, write as write_at};
use crate::x86_64::layout::{BOOT_PAGE_TABLES, CMDLINE, ZERO_PAGE};

/// A boot loader without an assigned number.
const LOADER_UNKNOWN: u8 = 0xff;
/// loadflags bit 0: the kernel is loaded above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// Page directories: one GiB each.
const DIRECTORIES: u64 = 4;
const ENTRIES: u64 = 512;
// SDM vol. 3, table 5-15 and following.
const PRESENT_WRITABLE: u64 = 0b11;
const PAGE_2M: u64 = 1 << 7;

const _: () = assert!(size_of::<boot_params>() as u64 == PAGE);
const _: () = assert!(BOOT_PAGE_TABLES + (2 + DIRECTORIES) * PAGE <= CMDLINE);
const _: () = assert!(ZERO_PAGE + PAGE <= BOOT_PAGE_TABLES);

/// Writes page tables and zero page, and returns the address of the latter.
pub(super) fn write<M: GuestMemory + ?Sized>(
    mem: &M,
    map: &MemoryMap,
    loaded: &Loaded,
    kernel: &BzImage,
) -> Result<u64, BootError> {
    write_at(
        mem,
        "the boot page tables",
        BOOT_PAGE_TABLES,
        &page_tables(),
    )?;
    let params = zero_page(map, loaded, kernel);
    write_at(mem, "the zero page", ZERO_PAGE, params.as_slice())?;
    Ok(ZERO_PAGE)
}

fn zero_page(map: &MemoryMap, loaded: &Loaded, kernel: &BzImage) -> Box<boot_params> {
    let mut params = Box::new(boot_params::default());
    params.hdr = kernel.header;
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    params.hdr.loadflags |= LOADED_HIGH;
    // Below 4 GiB: `identify` has checked it, and these addresses are constants.
    params.hdr.code32_start = kernel.load as u32;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.setup_data = 0;
    params.acpi_rsdp_addr = loaded.rsdp;
    if let Some((gpa, size)) = loaded.initramfs {
        params.hdr.ramdisk_image = gpa as u32;
        params.hdr.ramdisk_size = size as u32;
        params.ext_ramdisk_image = (gpa >> 32) as u32;
        params.ext_ramdisk_size = (size >> 32) as u32;
    }
    let mut table = params.e820_table;
    let mut count = 0;
    for (to, entry) in table.iter_mut().zip(map.entries().iter().take(MAX_ENTRIES)) {
        *to = boot_e820_entry {
            addr: entry.gpa,
            size: entry.len,
            r#type: entry.kind as u32,
        };
        count += 1;
    }
    params.e820_table = table;
    params.e820_entries = count;
    params
}

/// PML4, PDPT and page directories, one after the other.
fn page_tables() -> Vec<u8> {
    let mut tables = vec![0u8; ((2 + DIRECTORIES) * PAGE) as usize];
    let mut set = |table: u64, index: u64, value: u64| {
        let at = (table * PAGE + index * 8) as usize;
        tables[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    set(0, 0, (BOOT_PAGE_TABLES + PAGE) | PRESENT_WRITABLE);
    for directory in 0..DIRECTORIES {
        let table = 2 + directory;
        set(
            1,
            directory,
            (BOOT_PAGE_TABLES + table * PAGE) | PRESENT_WRITABLE,
        );
        for entry in 0..ENTRIES {
            let gpa = (directory * ENTRIES + entry) << 21;
            set(table, entry, gpa | PRESENT_WRITABLE | PAGE_2M);
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the processor would.
    fn translate(tables: &[u8], gva: u64) -> Option<u64> {
        let read = |gpa: u64, index: u64| {
            let at = (gpa - BOOT_PAGE_TABLES + index * 8) as usize;
            let entry = u64::from_le_bytes(tables.get(at..at + 8)?.try_into().ok()?);
            (entry & PRESENT_WRITABLE == PRESENT_WRITABLE).then_some(entry)
        };
        let pml4e = read(BOOT_PAGE_TABLES, gva >> 39 & 0x1ff)?;
        let pdpte = read(pml4e & !0xfff, gva >> 30 & 0x1ff)?;
        let pde = read(pdpte & !0xfff, gva >> 21 & 0x1ff)?;
        (pde & PAGE_2M != 0).then_some((pde & !0x1f_ffff) | (gva & 0x1f_ffff))
    }

    #[test]
    fn the_first_4_gib_map_to_themselves() {
        let tables = page_tables();
        for gva in [
            0,
            0x7000,
            0x20_0000,
            0x100_0200,
            0x3fff_ffff,
            0x4000_0000,
            0xffff_ffff,
        ] {
            assert_eq!(translate(&tables, gva), Some(gva), "{gva:#x}");
        }
        assert_eq!(translate(&tables, 1 << 32), None);
    }
}
