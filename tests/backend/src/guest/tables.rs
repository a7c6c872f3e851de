//! Descriptor tables and page tables, as every guest in protected or long mode has them.

use arch::x86_64::state::{DescriptorTable, Segment, SpecialRegisters};

use super::Ram;
use super::handlers::{HANDLERS, handlers};
use crate::outcome::Outcome;

/// The GDT.
const GDT: u64 = 0x4000;
/// The TSS: 104 bytes, then the I/O permission bitmap of all ports.
const TSS: u64 = 0x5000;
/// Length of the TSS with the bitmap and the byte of ones behind it (SDM vol. 1, section 19.5.2).
const TSS_LEN: u64 = 0x68 + 0x2000 + 1;
/// The root of the page tables; the other tables follow.
const PAGE_TABLES: u64 = 0x9000;
/// The IDT.
const IDT: u64 = 0xe000;
/// Top of the stack on which ring 3 is interrupted.
const KERNEL_STACK: u64 = 0x10000;
/// 64-bit code.
pub const CODE64: u16 = 0x08;
/// Flat data.
pub const DATA: u16 = 0x10;
/// Flat 32-bit code.
pub const CODE32: u16 = 0x18;
/// 16-bit code, base 0, limit 64 KiB.
pub const CODE16: u16 = 0x20;
/// 16-bit data, base 0, limit 64 KiB.
pub const DATA16: u16 = 0x28;
/// 64-bit code in ring 3.
pub const USER_CODE64: u16 = 0x33;
/// Flat data in ring 3.
pub const USER_DATA: u16 = 0x3b;
/// Flat 32-bit code in ring 3.
pub const USER_CODE32: u16 = 0x43;
/// The TSS: two entries.
const TASK: u16 = 0x48;
/// Data at [`BASED`], for 32-bit code.
pub const DATA_BASED: u16 = 0x58;
/// Code at [`BASED`], for 32-bit code.
pub const CODE_BASED: u16 = 0x60;
/// The base of [`DATA_BASED`] and [`CODE_BASED`].
pub const BASED: u64 = 0x10_0000;

/// A segment with its hidden part.
pub fn segment(selector: u16, base: u64, limit: u32, access: u32) -> Segment {
    Segment {
        selector,
        base,
        limit,
        access,
    }
}

/// The hidden part that the GDT gives a selector.
pub fn loaded(selector: u16) -> Segment {
    let flat = |access| segment(selector, 0, u32::MAX, access);
    match selector {
        CODE64 => flat(0xa09b),
        CODE32 => flat(0xc09b),
        CODE16 => segment(selector, 0, 0xffff, 0x009b),
        DATA16 => segment(selector, 0, 0xffff, 0x0093),
        USER_CODE64 => flat(0xa0fb),
        USER_DATA => flat(0xc0f3),
        USER_CODE32 => flat(0xc0fb),
        TASK => segment(selector, TSS, TSS_LEN as u32 - 1, 0x8b),
        DATA_BASED => segment(selector, BASED, u32::MAX, 0xc093),
        CODE_BASED => segment(selector, BASED, u32::MAX, 0xc09b),
        _ => flat(0xc093),
    }
}

/// A segment as the GDT holds it (SDM vol. 3, section 3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    let granular = segment.access & 0x8000 != 0;
    let limit = u64::from(if granular {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.access);
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | (access & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (access >> 12 & 0xf) << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Writes all tables and handlers.
pub(super) fn write(ram: &Ram) -> Outcome {
    for selector in [
        CODE64,
        DATA,
        CODE32,
        CODE16,
        DATA16,
        USER_CODE64,
        USER_DATA,
        USER_CODE32,
        DATA_BASED,
        CODE_BASED,
    ] {
        ram.write_u64(
            GDT + u64::from(selector & !7),
            descriptor(&loaded(selector)),
        );
    }
    // Not busy, so that a guest may load it.
    let task = Segment {
        access: 0x89,
        ..loaded(TASK)
    };
    ram.write_u64(GDT + u64::from(TASK), descriptor(&task));
    ram.write_u64(GDT + u64::from(TASK) + 8, TSS >> 32);
    ram.write_u64(TSS + 4, KERNEL_STACK);
    // Every port is allowed to ring 3: the bits are clear. See `IOPL_3`.
    ram.write(TSS + 0x66, &0x68u16.to_le_bytes());
    ram.write(TSS + TSS_LEN - 1, &[0xff]);
    page_tables(ram);
    for vector in 0..=255 {
        gate(ram, vector, HANDLERS + u64::from(vector) * 16);
    }
    ram.write(HANDLERS, handlers()?);
    Ok(())
}

/// Present, writable, user, accessed, dirty: the processor never needs to write to the tables.
const TABLE: u64 = 0x67;
/// The same of a page of 2 MiB.
const PAGE_2M: u64 = 0xe7;

/// Maps the first GiB and the last one below 4 GiB one to one in 2 MiB pages, for all rings.
fn page_tables(ram: &Ram) {
    let [directories, first, last] = [1, 2, 3].map(|page| PAGE_TABLES + page * 0x1000);
    ram.write_u64(PAGE_TABLES, directories | TABLE);
    ram.write_u64(directories, first | TABLE);
    ram.write_u64(directories + 3 * 8, last | TABLE);
    for index in 0..512u64 {
        ram.write_u64(first + index * 8, index << 21 | PAGE_2M);
        ram.write_u64(last + index * 8, 3 << 30 | index << 21 | PAGE_2M);
    }
}

/// Maps a 2 MiB page below 2 GiB; the second GiB gets its table when it is first used.
pub(super) fn map_2m(ram: &Ram, virtual_address: u64, gpa: u64) {
    let (first, second) = (PAGE_TABLES + 0x2000, PAGE_TABLES + 0x4000);
    let table = if virtual_address < 1 << 30 {
        first
    } else {
        ram.write_u64(PAGE_TABLES + 0x1008, second | TABLE);
        second
    };
    ram.write_u64(table + (virtual_address >> 21 & 511) * 8, gpa | PAGE_2M);
}

/// Writes a 64-bit interrupt gate that ring 3 may use (SDM vol. 3, figure 6-8).
pub(super) fn gate(ram: &Ram, vector: u8, target: u64) {
    let at = IDT + u64::from(vector) * 16;
    let low =
        target & 0xffff | u64::from(CODE64) << 16 | 0xee00 << 32 | (target >> 16 & 0xffff) << 48;
    ram.write_u64(at, low);
    ram.write_u64(at + 8, target >> 32);
}

/// Sets the port's bit in the permission bitmap.
pub(super) fn deny_port(ram: &Ram, port: u16) {
    let at = TSS + 0x68 + u64::from(port) / 8;
    let [byte] = ram.read(at);
    ram.write(at, &[byte | 1 << (port % 8)]);
}

/// Puts the vCPU into long mode in a ring.
pub(super) fn enter_long_mode(special: &mut SpecialRegisters, ring: u16) {
    let (code, data) = if ring == 0 {
        (CODE64, DATA)
    } else {
        (USER_CODE64, USER_DATA)
    };
    enter(special, code, data);
    // PG, NE, ET, MP, PE; PAE, OSFXSR, OSXMMEXCPT; LMA, LME, SCE.
    (special.cr0, special.cr3) = (0x8000_0033, PAGE_TABLES);
    (special.cr4, special.efer) = (0x620, 0x501);
}

/// Puts the vCPU into 32-bit protected mode without paging.
pub(super) fn enter_protected_mode(special: &mut SpecialRegisters, code: u16) {
    enter(special, code, DATA);
    special.cr0 = 0x31;
}

fn enter(special: &mut SpecialRegisters, code: u16, data: u16) {
    special.cs = loaded(code);
    let data = loaded(data);
    (special.ds, special.es, special.ss, special.fs, special.gs) = (data, data, data, data, data);
    special.tr = loaded(TASK);
    special.gdt = DescriptorTable {
        base: GDT,
        limit: 0x6f,
    };
    special.idt = DescriptorTable {
        base: IDT,
        limit: 0xfff,
    };
}
