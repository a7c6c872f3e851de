//! What the program runs on: RAM, CPUs, command line; the page tables for all of RAM; a bump
//! allocator.
//!
//! `boot.s` maps the first 4 GiB. What lies above is mapped here, in ring 3, where it is native: page
//! directories are filled while nothing uses them yet, then hung in with one write per GiB.

use core::sync::atomic::{AtomicU64, Ordering};

use super::acpi::{self, ApicIds};
use super::params::Params;
use super::{clock, power, serial, service};

/// Most CPUs; `boot.s` has tables for as many.
pub const MAX_CPUS: usize = 64;
/// Most RAM ranges looked at.
pub const MAX_RANGES: usize = 32;
/// Bytes of a page.
pub const PAGE: u64 = 4096;

const GIB: u64 = 1 << 30;
/// What one page directory pointer table maps; RAM above is left alone.
const TOP: u64 = 512 * GIB;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const MEMMAP_RAM: u32 = 1;

/// `struct hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h), version 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

/// `struct hvm_memmap_table_entry`.
#[repr(C)]
#[derive(Clone, Copy)]
struct MemmapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// A range of RAM, page aligned.
#[derive(Clone, Copy)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
}

impl Range {
    /// Whole pages in it.
    pub fn pages(&self) -> u64 {
        self.end.saturating_sub(self.start) / PAGE
    }
}

/// The machine.
pub struct Machine {
    /// The command line.
    pub params: Params,
    /// APIC ids of all CPUs.
    pub apic_ids: ApicIds,
    /// Where PCI configuration space is, if ACPI says so.
    pub ecam: Option<u64>,
    ranges: [Range; MAX_RANGES],
    range_count: usize,
}

/// Next free byte in the range that holds the program.
static FREE: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    static page_directory_pointers: [AtomicU64; 512];
    static __image_end: u8;
}

impl Machine {
    /// Reads the start info, maps all RAM.
    pub(super) fn discover(start_info: usize) -> Machine {
        let mut machine = Machine {
            params: Params::empty(),
            apic_ids: ApicIds {
                ids: [0; MAX_CPUS],
                len: 0,
            },
            ecam: None,
            ranges: [Range { start: 0, end: 0 }; MAX_RANGES],
            range_count: 0,
        };
        // SAFETY: the loader's pointer, in the first 4 GiB, which are mapped.
        let info = unsafe { (start_info as *const StartInfo).read_unaligned() };
        assert!(info.magic == START_INFO_MAGIC, "no PVH start info in ebx");
        assert!(
            info.version >= 1 && info.memmap_entries > 0,
            "the start info has no memory map"
        );
        if info.cmdline_paddr != 0 {
            // SAFETY: as above.
            machine.params = unsafe { Params::copy(info.cmdline_paddr as *const u8) };
        }
        machine.read_memmap(&info);
        machine.map_high_ram();
        clock::calibrate();
        power::discover(info.rsdp_paddr);
        machine.ecam = acpi::ecam(info.rsdp_paddr);
        machine.apic_ids = acpi::apic_ids(info.rsdp_paddr).unwrap_or_else(|| {
            // Without tables: ids 0, 1, … as every VMM gives them to few CPUs.
            let cpus = machine
                .params
                .number("cpus")
                .unwrap_or(1)
                .clamp(1, MAX_CPUS as u64) as usize;
            let mut ids = [0; MAX_CPUS];
            for (index, id) in ids.iter_mut().enumerate() {
                *id = index as u32;
            }
            ApicIds { ids, len: cpus }
        });
        machine
    }

    fn read_memmap(&mut self, info: &StartInfo) {
        let image_end = (&raw const __image_end) as u64;
        for index in 0..u64::from(info.memmap_entries.min(256)) {
            let at = info.memmap_paddr + index * size_of::<MemmapEntry>() as u64;
            // SAFETY: the loader's table, in the first 4 GiB, which are mapped.
            let entry = unsafe { (at as *const MemmapEntry).read_unaligned() };
            let start = entry.addr.next_multiple_of(PAGE);
            let end = entry.addr.saturating_add(entry.size).min(TOP) & !(PAGE - 1);
            // RAM below 1 MiB belongs to the loader's tables and to the trampoline.
            if entry.kind != MEMMAP_RAM || end <= start || start < (1 << 20) && end <= (1 << 20) {
                continue;
            }
            let mut range = Range {
                start: start.max(1 << 20),
                end,
            };
            if range.start < image_end {
                range.start = image_end.min(range.end);
                FREE.store(range.start, Ordering::Relaxed);
            }
            if self.range_count < MAX_RANGES {
                self.ranges[self.range_count] = range;
                self.range_count += 1;
            }
        }
        assert!(
            FREE.load(Ordering::Relaxed) != 0,
            "the memory map does not cover the program"
        );
    }

    fn map_high_ram(&self) {
        let top = self
            .ranges()
            .iter()
            .map(|range| range.end)
            .max()
            .unwrap_or(0);
        let mut gib = 4;
        while gib * GIB < top {
            let directory = self.allocate(PAGE, PAGE) as *mut u64;
            for entry in 0..512 {
                let page = gib * GIB + entry * (2 << 20);
                // SAFETY: a fresh page of our own.
                unsafe { directory.add(entry as usize).write(page | 0x87) };
            }
            // SAFETY: the entry was not present; no mapping in use changes.
            let pointers = unsafe { &*(&raw const page_directory_pointers) };
            pointers[gib as usize].store(directory as u64 | 7, Ordering::Release);
            gib += 1;
        }
    }

    /// Takes memory for the program's own use from the range that holds it.
    pub fn allocate(&self, bytes: u64, align: u64) -> u64 {
        let start = FREE.load(Ordering::Relaxed).next_multiple_of(align);
        let end = start.checked_add(bytes).expect("allocation overflows");
        let fits = self
            .ranges()
            .iter()
            .any(|range| range.start <= start && end <= range.end);
        assert!(fits, "out of memory: {bytes} bytes more");
        FREE.store(end, Ordering::Relaxed);
        start
    }

    /// RAM ranges above the program (which may still take from the first by `allocate`).
    pub fn ranges(&self) -> &[Range] {
        &self.ranges[..self.range_count]
    }

    /// RAM that is free after all allocations.
    pub fn free_ranges(&self) -> ([Range; MAX_RANGES], usize) {
        let free = FREE.load(Ordering::Relaxed).next_multiple_of(PAGE);
        let mut ranges = self.ranges;
        for range in &mut ranges[..self.range_count] {
            if range.start < free && free <= range.end {
                range.start = free;
            }
        }
        (ranges, self.range_count)
    }

    /// How many CPUs to use: all, or fewer by `cpus=`.
    pub fn wanted_cpus(&self) -> usize {
        match self.params.number("cpus") {
            Some(cpus) => (cpus.max(1) as usize).min(self.apic_ids.len),
            None => self.apic_ids.len,
        }
    }

    /// APIC id of the CPU that runs this.
    pub fn own_apic_id(&self) -> u32 {
        // CPUID.1: initial APIC id in ebx[31:24]; enough for the boot CPU.
        service::cpuid(1, 0)[1] >> 24
    }

    /// Tells that the program cannot go on and stops this CPU.
    pub fn give_up(&self, why: &str) -> ! {
        serial::line(format_args!("guest: {why}"));
        service::halt()
    }
}
