//! The PVH boot protocol: `hvm_start_info` and what it points to (Xen `docs/misc/pvh.pandoc`,
//! `xen/include/public/arch-x86/hvm/start_info.h`).
//!
//! ```text
//!   PVH_START_INFO ─ hvm_start_info (version 1)
//!            +0x40 ─ module list: the initramfs
//!            +0x80 ─ memory map
//! ```

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, GuestMemory};

use super::error::BootError;
use super::memory_map::MAX_ENTRIES;
use super::{Loaded, MemoryMap, write as write_at};
use crate::x86_64::layout::{CMDLINE, PVH_START_INFO, ZERO_PAGE};

const MODULES: u64 = PVH_START_INFO + 0x40;
const MEMORY_MAP: u64 = PVH_START_INFO + 0x80;

const _: () = assert!(size_of::<hvm_start_info>() as u64 <= MODULES - PVH_START_INFO);
const _: () = assert!(size_of::<hvm_modlist_entry>() as u64 <= MEMORY_MAP - MODULES);
const _: () = assert!(
    (MAX_ENTRIES * size_of::<hvm_memmap_table_entry>()) as u64 <= ZERO_PAGE - MEMORY_MAP,
    "the memory map may not run into the zero page"
);

/// Writes the start info and returns its address.
pub(super) fn write<M: GuestMemory + ?Sized>(
    mem: &M,
    map: &MemoryMap,
    loaded: &Loaded,
) -> Result<u64, BootError> {
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: loaded.rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.entries().len() as u32,
        ..hvm_start_info::default()
    };
    if let Some((paddr, size)) = loaded.initramfs {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES;
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..hvm_modlist_entry::default()
        };
        write_at(mem, "the PVH module list", MODULES, module.as_slice())?;
    }
    let mut table = Vec::with_capacity(map.entries().len() * size_of::<hvm_memmap_table_entry>());
    for entry in map.entries() {
        let row = hvm_memmap_table_entry {
            addr: entry.gpa,
            size: entry.len,
            type_: entry.kind as u32,
            reserved: 0,
        };
        table.extend_from_slice(row.as_slice());
    }
    write_at(mem, "the PVH memory map", MEMORY_MAP, &table)?;
    write_at(mem, "the PVH start info", PVH_START_INFO, info.as_slice())?;
    Ok(PVH_START_INFO)
}
