//! The page walker, over tables made by hand.

use std::collections::BTreeMap;

use hypervisor::emulator::paging::{Paging, TableMemory};
use hypervisor::emulator::{Access, AccessKind, Exception, PlatformError, TranslateFailure};

use crate::random::Random;

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;

const WP: u64 = 1 << 16;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const LA57: u64 = 1 << 12;
const NXE: u64 = 1 << 11;

/// Tables: 32-bit words by address.
#[derive(Default)]
struct Tables {
    words: BTreeMap<u64, u32>,
    /// Exchanges that fail before one succeeds.
    contended: u32,
}

impl Tables {
    fn set(&mut self, gpa: u64, value: u64) {
        self.words.insert(gpa, value as u32);
        self.words.insert(gpa + 4, (value >> 32) as u32);
    }

    fn get(&self, gpa: u64) -> u64 {
        let word = |gpa| u64::from(self.words.get(&gpa).copied().unwrap_or(0));
        word(gpa) | word(gpa + 4) << 32
    }
}

impl TableMemory for Tables {
    fn read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), PlatformError> {
        assert!(matches!(data.len(), 4 | 8) && gpa.is_multiple_of(data.len() as u64));
        data.copy_from_slice(&self.get(gpa).to_le_bytes()[..data.len()]);
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<bool, PlatformError> {
        if self.contended > 0 {
            self.contended -= 1;
            return Ok(false);
        }
        assert_eq!(&self.get(gpa).to_le_bytes()[..expected.len()], expected);
        for (index, word) in new.chunks_exact(4).enumerate() {
            let word = u32::from_le_bytes(word.try_into().expect("4 bytes"));
            self.words.insert(gpa + 4 * index as u64, word);
        }
        Ok(true)
    }
}

const READ: Access = Access {
    kind: AccessKind::Read,
    user: false,
    implicit: false,
};

fn access(kind: AccessKind, user: bool) -> Access {
    Access { kind, user, ..READ }
}

fn paging(cr4: u64, efer: u64) -> Paging {
    Paging {
        cr0: 1 << 31 | WP | 1,
        cr3: 0x1000,
        cr4,
        efer,
        ac: false,
        pdptrs: None,
        physical_bits: 46,
        gigabyte_pages: true,
    }
}

fn long() -> Paging {
    paging(1 << 5, 1 << 10 | NXE)
}

fn fault_code(paging: &Paging, tables: &mut Tables, gva: u64, access: Access) -> Option<u32> {
    match paging.translate(tables, gva, access) {
        Ok(_) => None,
        Err(TranslateFailure::Exception(Exception {
            vector: 14,
            error_code: Some(code),
            payload: Some(address),
            ..
        })) => {
            assert_eq!(address, gva);
            Some(code)
        }
        Err(other) => panic!("{other:?}"),
    }
}

/// Four levels over `gva` with `flags` in every entry and `leaf` in the last.
fn four_levels(gva: u64, flags: u64, leaf: u64) -> Tables {
    let mut tables = Tables::default();
    let index = |level: u64| (gva >> (12 + 9 * (level - 1)) & 0x1ff) * 8;
    tables.set(0x1000 + index(4), 0x2000 | flags);
    tables.set(0x2000 + index(3), 0x3000 | flags);
    tables.set(0x3000 + index(2), 0x4000 | flags);
    tables.set(0x4000 + index(1), leaf);
    tables
}

const GVA: u64 = 0xffff_8123_4567_8abc;

#[test]
fn no_paging_cuts_to_32_bits() {
    let mut paging = long();
    paging.cr0 = 1;
    let gpa = paging.translate(&mut Tables::default(), 0x1_2345_6789, READ);
    assert_eq!(gpa.expect("no paging"), 0x2345_6789);
}

#[test]
fn four_level_walks_set_accessed_and_dirty() {
    let mut tables = four_levels(GVA, P | W | U, 0x12_3456_7000 | P | W | U);
    let leaf = 0x4000 + (GVA >> 12 & 0x1ff) * 8;
    let top = 0x1000 + (GVA >> 39 & 0x1ff) * 8;
    let gpa = long().translate(&mut tables, GVA, READ).expect("mapped");
    assert_eq!(gpa, 0x12_3456_7abc);
    assert_eq!(tables.get(leaf) & (A | D), A);
    assert_eq!(tables.get(top) & (A | D), A);
    long()
        .translate(&mut tables, GVA, access(AccessKind::Write, true))
        .expect("writable");
    assert_eq!(tables.get(leaf) & (A | D), A | D);
    assert_eq!(tables.get(top) & (A | D), A);
}

#[test]
fn large_pages_keep_more_of_the_address() {
    for (level, flags, size) in [(3u64, PS, 30u32), (2, PS, 21)] {
        let mut tables = four_levels(GVA, P | W, P);
        let table = 0x1000 * (5 - level);
        let index = (GVA >> (12 + 9 * (level - 1)) & 0x1ff) * 8;
        let page = 0x2a_c000_0000 & !((1 << size) - 1);
        // Bit 12 of a large page is PAT, not an address bit.
        tables.set(table + index, page | P | W | flags | 1 << 12);
        let gpa = long().translate(&mut tables, GVA, READ).expect("mapped");
        assert_eq!(gpa, page | GVA & ((1 << size) - 1));
        // Address bits below the page's size are reserved.
        tables.set(table + index, page | P | W | flags | 1 << 13);
        assert_eq!(fault_code(&long(), &mut tables, GVA, READ), Some(9));
    }
    // No 1 GiB pages: PS is reserved there, and in a PML4E always.
    let mut without = long();
    without.gigabyte_pages = false;
    let mut tables = four_levels(GVA, P | W, P);
    tables.set(0x2000 + (GVA >> 30 & 0x1ff) * 8, P | PS);
    assert_eq!(fault_code(&without, &mut tables, GVA, READ), Some(9));
    let mut tables = four_levels(GVA, P | W | PS, P);
    assert_eq!(fault_code(&long(), &mut tables, GVA, READ), Some(9));
}

/// Leaf flags, bits to set in CR4 and clear in CR0, RFLAGS.AC, access; the error code.
#[test]
fn permissions() {
    use AccessKind::{Execute, Read, Write};
    type Row = (u64, u64, u64, bool, AccessKind, bool, Option<u32>);
    let rows: &[Row] = &[
        // User accesses.
        (P | W | U, 0, 0, false, Read, true, None),
        (P | W | U, 0, 0, false, Write, true, None),
        (P | W | U, 0, 0, false, Execute, true, None),
        (P | W, 0, 0, false, Read, true, Some(5)),
        (P | W, 0, 0, false, Write, true, Some(7)),
        (P | W, 0, 0, false, Execute, true, Some(0x15)),
        (P | U, 0, 0, false, Write, true, Some(7)),
        (P | U, 0, WP, false, Write, true, Some(7)),
        (P | U | NX, 0, 0, false, Execute, true, Some(0x15)),
        (P | U | NX, 0, 0, false, Read, true, None),
        (0, 0, 0, false, Read, true, Some(4)),
        (0, 0, 0, false, Execute, true, Some(0x14)),
        // Supervisor accesses.
        (P, 0, 0, false, Write, false, Some(3)),
        (P, 0, WP, false, Write, false, None),
        (P | U, 0, 0, false, Read, false, None),
        (P | U, SMAP, 0, false, Read, false, Some(1)),
        (P | U, SMAP, 0, true, Read, false, None),
        (P | U | W, SMAP, 0, false, Write, false, Some(3)),
        (P | U | W, SMAP, 0, true, Write, false, None),
        (P, SMAP, 0, false, Read, false, None),
        (P | U, SMAP, 0, false, Read, true, None),
        (P | U, SMAP, 0, false, Execute, false, None),
        (P | U, SMEP, 0, false, Execute, false, Some(0x11)),
        (P | U, SMEP, 0, false, Execute, true, None),
        (P | U, SMEP, 0, false, Read, false, None),
        (P | NX, 0, 0, false, Execute, false, Some(0x11)),
    ];
    for &(flags, cr4, cr0_off, ac, kind, user, expected) in rows {
        let mut tables = four_levels(GVA, P | W | U, 0x7000 | flags);
        let mut paging = long();
        paging.cr4 |= cr4;
        paging.cr0 &= !cr0_off;
        paging.ac = ac;
        let code = fault_code(&paging, &mut tables, GVA, access(kind, user));
        assert_eq!(
            code, expected,
            "{flags:x} {cr4:x} {cr0_off:x} {ac} {kind:?} {user}"
        );
        // A refused access leaves no dirty bit.
        let leaf = tables.get(0x4000 + (GVA >> 12 & 0x1ff) * 8);
        assert_eq!(leaf & D != 0, code.is_none() && kind == Write);
    }
    // SMAP holds for implicit accesses whatever AC says.
    let mut tables = four_levels(GVA, P | W | U, 0x7000 | P | U);
    let mut paging = long();
    paging.cr4 |= SMAP;
    paging.ac = true;
    let implicit = Access {
        implicit: true,
        ..READ
    };
    assert_eq!(fault_code(&paging, &mut tables, GVA, implicit), Some(1));
}

#[test]
fn rights_are_those_of_every_level() {
    for (level, missing, kind, user, code) in [
        (4u64, W, AccessKind::Write, true, 7),
        (3, W, AccessKind::Write, false, 3),
        (3, U, AccessKind::Read, true, 5),
        (2, U, AccessKind::Execute, true, 0x15),
        (4, P, AccessKind::Read, false, 0),
        (2, P, AccessKind::Write, true, 6),
    ] {
        let mut tables = four_levels(GVA, P | W | U, 0x7000 | P | W | U);
        let entry = 0x1000 * (5 - level) + (GVA >> (12 + 9 * (level - 1)) & 0x1ff) * 8;
        tables.set(entry, tables.get(entry) & !missing);
        let found = fault_code(&long(), &mut tables, GVA, access(kind, user));
        assert_eq!(found, Some(code), "level {level}");
    }
    let mut tables = four_levels(GVA, P | W | U, 0x7000 | P | W | U);
    let entry = 0x3000 + (GVA >> 21 & 0x1ff) * 8;
    tables.set(entry, tables.get(entry) | NX);
    let execute = access(AccessKind::Execute, false);
    assert_eq!(fault_code(&long(), &mut tables, GVA, execute), Some(0x11));
    // Without NXE the bit is reserved, and a fetch is not told apart.
    let mut paging = long();
    paging.efer &= !NXE;
    assert_eq!(fault_code(&paging, &mut tables, GVA, execute), Some(9));
}

#[test]
fn physical_addresses_have_an_end() {
    for bit in [46, 47, 51] {
        let mut tables = four_levels(GVA, P | W | U, 0x7000 | P | 1 << bit);
        assert_eq!(
            fault_code(&long(), &mut tables, GVA, READ),
            Some(9),
            "bit {bit}"
        );
    }
    // Bits 52 to 58 are the guest's own.
    let mut tables = four_levels(GVA, P | W | U, 0x7000 | P | 1 << 52 | 1 << 58);
    assert_eq!(fault_code(&long(), &mut tables, GVA, READ), None);
}

#[test]
fn five_levels() {
    let gva = 0xff12_3456_789a_bcde;
    let mut tables = Tables::default();
    for level in 1..=5u64 {
        let entry = 0x1000 * (6 - level) + (gva >> (12 + 9 * (level - 1)) & 0x1ff) * 8;
        tables.set(entry, (0x1000 * (7 - level)) | P | W);
    }
    let mut paging = long();
    paging.cr4 |= LA57;
    assert_eq!(
        paging.translate(&mut tables, gva, READ).expect("mapped"),
        0x6cde
    );
}

#[test]
fn pae_walks_start_at_the_pdptes() {
    let mut tables = Tables::default();
    let gva = 0xc123_4567;
    // CR3 is aligned to 32 bytes only.
    tables.set(0x1020 + 3 * 8, 0x2000 | P);
    tables.set(0x2000 + (gva >> 21 & 0x1ff) * 8, 0x3000 | P | W | U);
    tables.set(
        0x3000 + (gva >> 12 & 0x1ff) * 8,
        0x9_8765_4000 | P | W | U | NX,
    );
    let mut pae = paging(1 << 5, NXE);
    pae.cr3 = 0x1020;
    let user = access(AccessKind::Write, true);
    assert_eq!(
        pae.translate(&mut tables, gva, user).expect("mapped"),
        0x9_8765_4567
    );
    let execute = access(AccessKind::Execute, false);
    assert_eq!(fault_code(&pae, &mut tables, gva, execute), Some(0x11));
    // The registers count, where they are known.
    pae.pdptrs = Some([0x2000 | P, 0, 0, 0]);
    assert_eq!(fault_code(&pae, &mut tables, gva, READ), Some(0));
    assert_eq!(fault_code(&pae, &mut tables, gva & 0x3fff_ffff, READ), None);
    // Bits 62:52 are reserved here.
    tables.set(0x3000 + (gva >> 12 & 0x1ff) * 8, 0x4000 | P | 1 << 52);
    assert_eq!(
        fault_code(&pae, &mut tables, gva & 0x3fff_ffff, READ),
        Some(9)
    );
}

#[test]
fn legacy_walks_have_4_mib_pages_up_to_40_bits() {
    let gva = 0x1234_5678;
    let mut tables = Tables::default();
    let pde = 0x1000 + (gva >> 22) * 4;
    tables.words.insert(pde, 0x2000 | (P | W | U) as u32);
    tables.words.insert(
        0x2000 + (gva >> 12 & 0x3ff) * 4,
        0xabcd_e000 | (P | W | U) as u32,
    );
    let mut legacy = paging(0, 0);
    assert_eq!(
        legacy.translate(&mut tables, gva, READ).expect("mapped"),
        0xabcd_e678
    );
    // PS means nothing without CR4.PSE.
    tables.words.insert(pde, 0x2000 | (P | W | U | PS) as u32);
    assert_eq!(
        legacy.translate(&mut tables, gva, READ).expect("mapped"),
        0xabcd_e678
    );
    legacy.cr4 = 1 << 4;
    tables
        .words
        .insert(pde, 0xab40_0000 | 0x12 << 13 | (P | W | U | PS) as u32);
    let gpa = legacy.translate(&mut tables, gva, access(AccessKind::Write, true));
    assert_eq!(gpa.expect("mapped"), 0x12_ab40_0000 | gva & 0x3f_ffff);
    assert_eq!(u64::from(tables.words[&pde]) & (A | D), A | D);
    // Bit 21 is reserved, and so are address bits that do not exist.
    tables
        .words
        .insert(pde, 0xab40_0000 | 1 << 21 | (P | PS) as u32);
    assert_eq!(fault_code(&legacy, &mut tables, gva, READ), Some(9));
    legacy.physical_bits = 36;
    tables
        .words
        .insert(pde, 0xab40_0000 | 0x10 << 13 | (P | PS) as u32);
    assert_eq!(fault_code(&legacy, &mut tables, gva, READ), Some(9));
    // A fetch is not told apart without NX and SMEP.
    tables.words.insert(pde, 0);
    let execute = access(AccessKind::Execute, true);
    assert_eq!(fault_code(&legacy, &mut tables, gva, execute), Some(4));
}

#[test]
fn a_changing_entry_starts_the_walk_over() {
    let mut tables = four_levels(GVA, P | W | U, 0x7000 | P);
    tables.contended = 10;
    assert_eq!(
        long().translate(&mut tables, GVA, READ).expect("settles"),
        0x7abc
    );
    let mut tables = four_levels(GVA, P | W | U, 0x7000 | P);
    tables.contended = u32::MAX;
    let Err(TranslateFailure::Platform(error)) = long().translate(&mut tables, GVA, READ) else {
        panic!("it never settles");
    };
    assert_eq!(
        error.to_string(),
        format!("the page tables for {GVA:#x} keep changing")
    );
}

#[test]
fn any_tables_are_walked_without_harm() {
    struct Noise(Random);
    impl TableMemory for Noise {
        fn read(&mut self, _: u64, data: &mut [u8]) -> Result<(), PlatformError> {
            self.0.fill(data);
            if !self.0.one_in(4) {
                data[0] |= 1;
            }
            Ok(())
        }

        fn compare_exchange(&mut self, _: u64, _: &[u8], _: &[u8]) -> Result<bool, PlatformError> {
            Ok(self.0.one_in(3))
        }
    }
    let mut random = Random::new(3);
    let mut noise = Noise(Random::new(4));
    for _ in 0..200_000 {
        let paging = Paging {
            cr0: random.next(),
            cr3: random.next(),
            cr4: random.next(),
            efer: random.next(),
            ac: random.one_in(2),
            pdptrs: random.one_in(2).then(|| [random.next(); 4]),
            physical_bits: random.byte(),
            gigabyte_pages: random.one_in(2),
        };
        let kinds = [AccessKind::Read, AccessKind::Write, AccessKind::Execute];
        let access = Access {
            kind: kinds[random.below(3) as usize],
            user: random.one_in(2),
            implicit: random.one_in(4),
        };
        let _ = paging.translate(&mut noise, random.interesting(), access);
    }
}
