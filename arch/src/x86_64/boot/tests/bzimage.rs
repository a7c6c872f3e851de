//! bzImages.

use linux_loader::loader::bootparam::boot_params;

use super::*;
use crate::x86_64::layout::{BOOT_GDT, BOOT_PAGE_TABLES, ZERO_PAGE};

const BZ_LOAD: u64 = 16 * MIB;
const BZ_SETUP: usize = 5 * 512;

/// A small bzImage of boot protocol 2.15 with four setup sectors.
pub(super) fn bzimage() -> Vec<u8> {
    let mut bz = vec![0xcc; BZ_SETUP + 0x1000];
    bz[..BZ_SETUP].fill(0);
    bz[0x1f1] = 4;
    patch(&mut bz, 0x1fe, &0xaa55u16.to_le_bytes());
    patch(&mut bz, 0x200, &[0xeb, 0x6a]);
    patch(&mut bz, 0x202, b"HdrS");
    patch(&mut bz, 0x206, &0x20fu16.to_le_bytes());
    bz[0x211] = 1;
    patch(&mut bz, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    patch(&mut bz, 0x230, &0x20_0000u32.to_le_bytes());
    bz[0x234] = 1;
    patch(&mut bz, 0x236, &1u16.to_le_bytes());
    patch(&mut bz, 0x238, &2047u32.to_le_bytes());
    patch(&mut bz, 0x258, &BZ_LOAD.to_le_bytes());
    patch(&mut bz, 0x260, &(8 * MIB as u32).to_le_bytes());
    // Not part of the setup header any more: must not reach the zero page.
    patch(&mut bz, 0x26c, &[0x99; 32]);
    bz
}

#[test]
fn a_bzimage_is_loaded() {
    let mem = memory(64 * MIB);
    let mut initramfs = file_of(5000);
    let plan = load_into(&mem, 64 * MIB, &bzimage(), Some(&mut initramfs), "quiet").expect("loads");
    assert_eq!(plan.protocol, Protocol::Linux64);
    assert_eq!((plan.entry, plan.boot_info), (BZ_LOAD + 0x200, ZERO_PAGE));
    assert_eq!(plan.kernel, (BZ_LOAD, 24 * MIB), "init_size counts");
    assert_eq!(read::<2>(&mem, BZ_LOAD + 0xffe), [0xcc; 2]);
    assert_eq!(read::<2>(&mem, BZ_LOAD + 0x1000), [0; 2]);

    let params: boot_params = mem.read_obj(GuestAddress(ZERO_PAGE)).expect("in RAM");
    let header = params.hdr;
    assert_eq!({ header.version }, 0x20f);
    assert_eq!(header.type_of_loader, 0xff);
    assert_eq!({ header.cmd_line_ptr }, CMDLINE as u32);
    let (start, size) = plan.initramfs.expect("there is one");
    assert_eq!(
        ({ header.ramdisk_image }, { header.ramdisk_size }),
        (start as u32, size as u32)
    );
    assert_eq!({ params.acpi_rsdp_addr }, RSDP);
    let pad = params._pad7;
    assert!(
        pad.iter().all(|byte| *byte == 0),
        "code after the header is not copied"
    );
    let map = MemoryMap::new(&[(0, 64 * MIB)]).expect("valid RAM");
    assert_eq!(usize::from(params.e820_entries), map.entries().len());
    let table = params.e820_table;
    assert_eq!(
        ({ table[0].addr }, { table[0].size }, { table[0].r#type }),
        (0, 0x9_fc00, 1)
    );
    // PML4's first entry leads to the next page.
    assert_eq!(
        u64::from_le_bytes(read(&mem, BOOT_PAGE_TABLES)),
        (BOOT_PAGE_TABLES + 0x1000) | 3
    );
    assert_eq!(
        u64::from_le_bytes(read(&mem, BOOT_GDT + 0x10)),
        0x00af_9b00_0000_ffff
    );
}

#[test]
fn malformed_bzimages_are_refused() {
    type Case = (&'static str, fn(&mut Vec<u8>), fn(&BootError) -> bool);
    let cases: &[Case] = &[
        (
            "old",
            |b| b[0x206] = 0x0b,
            |e| matches!(e, BootError::BzImageTooOld(0x20b)),
        ),
        (
            "ancient",
            |b| b[0x207] = 0,
            |e| matches!(e, BootError::BzImageTooOld(0x00f)),
        ),
        (
            "no signature",
            |b| b[0x1fe] = 0,
            |e| matches!(e, BootError::BzImageMalformed(_)),
        ),
        (
            "zImage",
            |b| b[0x211] = 0,
            |e| matches!(e, BootError::BzImageMalformed(_)),
        ),
        (
            "32-bit",
            |b| b[0x236] = 0,
            |e| matches!(e, BootError::BzImageNot64Bit),
        ),
        (
            "cut in the header",
            |b| b.truncate(0x220),
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "cut before the kernel",
            |b| b.truncate(BZ_SETUP),
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "cut before the entry",
            |b| b.truncate(BZ_SETUP + 0x200),
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "more setup than file",
            |b| b[0x1f1] = 255,
            |e| matches!(e, BootError::Truncated { .. }),
        ),
        (
            "more init_size than RAM",
            |b| patch(b, 0x260, &u32::MAX.to_le_bytes()),
            |e| matches!(e, BootError::KernelOutsideRam { .. }),
        ),
        (
            "preferred address beyond RAM",
            |b| patch(b, 0x258, &u64::MAX.to_le_bytes()),
            |e| matches!(e, BootError::KernelOutsideRam { .. }),
        ),
        (
            "preferred over the boot structures and not relocatable",
            |b| {
                patch(b, 0x258, &ZERO_PAGE.to_le_bytes());
                b[0x234] = 0;
            },
            |e| {
                matches!(
                    e,
                    BootError::KernelOutsideRam {
                        start: ZERO_PAGE,
                        ..
                    }
                )
            },
        ),
        (
            "alignment of nothing",
            |b| patch(b, 0x230, &0u32.to_le_bytes()),
            |e| matches!(e, BootError::BzImageMalformed(_)),
        ),
        (
            "a short command line",
            |b| patch(b, 0x238, &4u32.to_le_bytes()),
            |e| matches!(e, BootError::CmdlineTooLong { len: 13, max: 4 }),
        ),
    ];
    load_kernel(&bzimage()).expect("the unchanged file is good");
    for (name, change, expected) in cases {
        let mut kernel = bzimage();
        change(&mut kernel);
        let error = load_kernel(&kernel).expect_err(name);
        assert!(expected(&error), "{name}: {error:?}");
    }
}

#[test]
fn a_relocatable_kernel_without_a_place_of_its_own_goes_to_aligned_memory() {
    let mut kernel = bzimage();
    patch(&mut kernel, 0x258, &0u64.to_le_bytes());
    assert_eq!(load_kernel(&kernel).expect("loads").entry, 2 * MIB + 0x200);
}

#[test]
#[ignore = "needs a stock kernel: VMM_TEST_BZIMAGE=/path/vmlinuz"]
fn a_stock_bzimage_loads() {
    let path = std::env::var_os("VMM_TEST_BZIMAGE").expect("VMM_TEST_BZIMAGE names a kernel");
    let mut kernel = File::open(&path).expect("VMM_TEST_BZIMAGE can be opened");
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
    assert_eq!(plan.protocol, Protocol::Linux64);
    assert!(plan.kernel.1 - plan.kernel.0 > 8 * MIB, "{plan:x?}");
    println!("{plan:x?}");
}
