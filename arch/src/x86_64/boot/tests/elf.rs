//! ELF kernels with a PVH note.

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};

use super::*;
use crate::x86_64::layout::{BOOT_GDT, PVH_START_INFO};

const ELF_PHDRS: usize = 64;
const ELF_NOTE: usize = 0x200;
const ELF_CODE: usize = 0x400;
const ELF_CODE_LEN: usize = 0x100;
const ELF_BSS_LEN: usize = 0x3000;
const ELF_GPA: u64 = 2 * MIB;
const ELF_ENTRY: u64 = ELF_GPA + 0x10;

// Offsets within a program header.
const P_OFFSET: usize = 8;
const P_PADDR: usize = 24;
const P_FILESZ: usize = 32;
const P_MEMSZ: usize = 40;

/// Offset of a field of a program header: 0 is the code, 1 the note, 2 more data.
fn phdr(number: usize, field: usize) -> usize {
    ELF_PHDRS + number * 56 + field
}

/// A small PVH kernel: two loadable segments and a note.
pub(super) fn elf() -> Vec<u8> {
    let mut elf = vec![0; 0x600];
    patch(&mut elf, 0, b"\x7fELF\x02\x01\x01");
    patch(&mut elf, 16, &2u16.to_le_bytes());
    patch(&mut elf, 18, &62u16.to_le_bytes());
    patch(&mut elf, 32, &(ELF_PHDRS as u64).to_le_bytes());
    patch(&mut elf, 54, &56u16.to_le_bytes());
    patch(&mut elf, 56, &3u16.to_le_bytes());
    let mut program = |number, kind: u32, offset: usize, gpa: u64, file: usize, mem: usize| {
        patch(&mut elf, phdr(number, 0), &kind.to_le_bytes());
        patch(
            &mut elf,
            phdr(number, P_OFFSET),
            &(offset as u64).to_le_bytes(),
        );
        patch(&mut elf, phdr(number, P_PADDR), &gpa.to_le_bytes());
        patch(
            &mut elf,
            phdr(number, P_FILESZ),
            &(file as u64).to_le_bytes(),
        );
        patch(&mut elf, phdr(number, P_MEMSZ), &(mem as u64).to_le_bytes());
        patch(&mut elf, phdr(number, 48), &4u64.to_le_bytes());
    };
    program(
        0,
        1,
        ELF_CODE,
        ELF_GPA,
        ELF_CODE_LEN,
        ELF_CODE_LEN + ELF_BSS_LEN,
    );
    program(1, 4, ELF_NOTE, 0, 20, 20);
    program(2, 1, 0x500, 4 * MIB, 0x80, 0x80);
    for (at, word) in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), ELF_ENTRY as u32]
        .into_iter()
        .enumerate()
    {
        patch(&mut elf, ELF_NOTE + at * 4, &word.to_le_bytes());
    }
    elf[ELF_CODE..ELF_CODE + ELF_CODE_LEN].fill(0xf4);
    elf[0x500..0x580].fill(0xda);
    elf
}

#[test]
fn a_pvh_kernel_is_loaded() {
    let mem = memory(64 * MIB);
    // What was there before must not be taken for zeroed data.
    mem.write_slice(&[0xee; 16], GuestAddress(ELF_GPA + 0x2000))
        .expect("in RAM");
    let mut initramfs = file_of(10_000);
    let plan = load_into(&mem, 64 * MIB, &elf(), Some(&mut initramfs), "a b=c").expect("loads");

    assert_eq!(
        (plan.protocol, plan.entry, plan.boot_info),
        (Protocol::Pvh, ELF_ENTRY, PVH_START_INFO)
    );
    assert_eq!(plan.kernel, (ELF_GPA, 4 * MIB + 0x80));
    assert_eq!(read::<1>(&mem, ELF_GPA + ELF_CODE_LEN as u64 - 1), [0xf4]);
    assert_eq!(read::<16>(&mem, ELF_GPA + 0x2000), [0; 16]);
    assert_eq!(read::<2>(&mem, 4 * MIB), [0xda; 2]);
    assert_eq!(read::<6>(&mem, CMDLINE), *b"a b=c\0");

    let info: hvm_start_info = mem.read_obj(GuestAddress(plan.boot_info)).expect("in RAM");
    assert_eq!(
        (info.magic, info.version, info.nr_modules),
        (0x336e_c578, 1, 1)
    );
    assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (CMDLINE, RSDP));
    let module: hvm_modlist_entry = mem
        .read_obj(GuestAddress(info.modlist_paddr))
        .expect("in RAM");
    let (start, size) = plan.initramfs.expect("there is one");
    assert_eq!((module.paddr, module.size), (start, size));
    assert_eq!((start, size), (64 * MIB - 12288, 10_000));
    assert_eq!(read::<3>(&mem, start), [0x5a, 0x5b, 0x58]);
    assert_eq!(read::<1>(&mem, start + size), [0]);

    let map = MemoryMap::new(&[(0, 64 * MIB)]).expect("valid RAM");
    assert_eq!(info.memmap_entries as usize, map.entries().len());
    for (number, entry) in (0..).zip(map.entries()) {
        let row: hvm_memmap_table_entry = mem
            .read_obj(GuestAddress(info.memmap_paddr + number * 24))
            .expect("in RAM");
        assert_eq!(
            (row.addr, row.size, row.type_),
            (entry.gpa, entry.len, entry.kind as u32)
        );
    }
    // The code segment's descriptor: 32 bits.
    assert_eq!(
        u64::from_le_bytes(read(&mem, BOOT_GDT + 0x10)),
        0x00cf_9b00_0000_ffff
    );
}

#[test]
fn malformed_elf_kernels_are_refused() {
    type Case = (&'static str, fn(&mut Vec<u8>), fn(&BootError) -> bool);
    let cases: &[Case] = &[
        (
            "cut in the header",
            |e| e.truncate(40),
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "cut in the program headers",
            |e| e.truncate(100),
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "cut in a segment",
            |e| e.truncate(0x510),
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "32-bit",
            |e| e[4] = 1,
            |e| matches!(e, BootError::ElfUnsupported { found: 1, .. }),
        ),
        (
            "big-endian",
            |e| e[5] = 2,
            |e| matches!(e, BootError::ElfUnsupported { found: 2, .. }),
        ),
        (
            "for arm64",
            |e| e[18] = 183,
            |e| matches!(e, BootError::ElfUnsupported { found: 183, .. }),
        ),
        (
            "odd header size",
            |e| e[54] = 55,
            |e| matches!(e, BootError::ElfUnsupported { .. }),
        ),
        (
            "too many headers",
            |e| e[57] = 0xff,
            |e| matches!(e, BootError::Excessive { .. }),
        ),
        (
            "headers beyond everything",
            |e| patch(e, 32, &u64::MAX.to_le_bytes()),
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "no note",
            |e| e[phdr(1, 0)] = 0,
            |e| matches!(e, BootError::NoPvhNote),
        ),
        (
            "another note",
            |e| e[ELF_NOTE + 8] = 17,
            |e| matches!(e, BootError::NoPvhNote),
        ),
        (
            "a huge note segment",
            |e| patch(e, phdr(1, P_FILESZ), &u64::MAX.to_le_bytes()),
            |e| matches!(e, BootError::Excessive { .. }),
        ),
        (
            "a note segment beyond the file",
            |e| patch(e, phdr(1, P_OFFSET), &u64::MAX.to_le_bytes()),
            |e| matches!(e, BootError::Truncated { end: u64::MAX, .. }),
        ),
        (
            "entry outside",
            |e| patch(e, ELF_NOTE + 16, &[0xff; 4]),
            |e| matches!(e, BootError::EntryOutsideSegments(0xffff_ffff)),
        ),
        (
            "entry in zeroed data",
            |e| patch(e, ELF_NOTE + 16, &(ELF_GPA as u32 + 0x1000).to_le_bytes()),
            |e| matches!(e, BootError::EntryOutsideSegments(_)),
        ),
        (
            "a segment beyond the file",
            |e| patch(e, phdr(0, P_OFFSET), &0x10_0000u64.to_le_bytes()),
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "a segment with an overflowing offset",
            |e| patch(e, phdr(0, P_OFFSET), &u64::MAX.to_le_bytes()),
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "a segment larger in the file",
            |e| patch(e, phdr(0, P_MEMSZ), &1u64.to_le_bytes()),
            |e| matches!(e, BootError::SegmentSizes { memory_size: 1, .. }),
        ),
        (
            "a segment over the boot structures",
            |e| patch(e, phdr(0, P_PADDR), &PVH_START_INFO.to_le_bytes()),
            |e| {
                matches!(
                    e,
                    BootError::KernelOutsideRam {
                        start: PVH_START_INFO,
                        ..
                    }
                )
            },
        ),
        (
            "a segment beyond RAM",
            |e| patch(e, phdr(0, P_PADDR), &(64 * MIB - 0x1000).to_le_bytes()),
            |e| matches!(e, BootError::KernelOutsideRam { .. }),
        ),
        (
            "a segment that wraps",
            |e| patch(e, phdr(0, P_PADDR), &(u64::MAX - 1).to_le_bytes()),
            |e| matches!(e, BootError::KernelOutsideRam { end: u64::MAX, .. }),
        ),
        (
            "endless zeroed data",
            |e| patch(e, phdr(0, P_MEMSZ), &u64::MAX.to_le_bytes()),
            |e| matches!(e, BootError::KernelOutsideRam { .. }),
        ),
        (
            "overlapping segments",
            |e| patch(e, phdr(2, P_PADDR), &(ELF_GPA + 0x80).to_le_bytes()),
            |e| matches!(e, BootError::SegmentsOverlap(at) if *at == ELF_GPA + 0x80),
        ),
    ];
    load_kernel(&elf()).expect("the unchanged file is good");
    for (name, change, expected) in cases {
        let mut kernel = elf();
        change(&mut kernel);
        let error = load_kernel(&kernel).expect_err(name);
        assert!(expected(&error), "{name}: {error:?}");
    }
}

#[test]
#[ignore = "needs a stock kernel: VMM_TEST_VMLINUX=/path/vmlinuz"]
fn a_stock_vmlinux_loads() {
    let path = std::env::var_os("VMM_TEST_VMLINUX").expect("VMM_TEST_VMLINUX names a kernel");
    let mut kernel = File::open(&path).expect("VMM_TEST_VMLINUX can be opened");
    let mem = memory(256 * MIB);
    let ram = [(0, 256 * MIB)];
    let mut initramfs = file_of(3 * MIB as usize);
    let sources = BootSources {
        kernel: &mut kernel,
        initramfs: Some(&mut initramfs),
        cmdline: "console=ttyS0",
        ram: &ram,
        rsdp: RSDP,
    };
    let plan = load(&mem, sources).expect("loads");
    assert_eq!(plan.protocol, Protocol::Pvh);
    assert!(plan.kernel.1 - plan.kernel.0 > 8 * MIB, "{plan:x?}");
    println!("{plan:x?}");
}
