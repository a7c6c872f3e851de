//! Whole loads: well-formed kernels, every kind of malformed one, and random bytes.

mod bzimage;
mod elf;
mod random;

use std::io::{Cursor, Write};

use vm_memory::GuestMemoryMmap;

use self::bzimage::bzimage;
use self::elf::elf;
use super::*;
use crate::x86_64::layout::HIGH_RAM;

const MIB: u64 = 1 << 20;
const RSDP: u64 = 0xe_0000;
type Memory = GuestMemoryMmap<()>;

fn memory(len: u64) -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), len as usize)]).expect("memory for a test")
}

/// Loads with so many bytes of RAM.
fn load_into(
    mem: &Memory,
    ram: u64,
    kernel: &[u8],
    initramfs: Option<&mut File>,
    cmdline: &str,
) -> Result<BootPlan, BootError> {
    let ram = [(0, ram)];
    let mut kernel = Cursor::new(kernel);
    load(
        mem,
        BootSources {
            kernel: &mut kernel,
            initramfs,
            cmdline,
            ram: &ram,
            rsdp: RSDP,
        },
    )
}

fn load_kernel(kernel: &[u8]) -> Result<BootPlan, BootError> {
    load_into(&memory(64 * MIB), 64 * MIB, kernel, None, "console=ttyS0")
}

fn file_of(len: usize) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    let bytes: Vec<u8> = (0..len).map(|n| n as u8 ^ 0x5a).collect();
    file.write_all(&bytes).expect("writes");
    file
}

fn read<const N: usize>(mem: &Memory, gpa: u64) -> [u8; N] {
    let mut bytes = [0; N];
    mem.read_slice(&mut bytes, GuestAddress(gpa))
        .expect("in RAM");
    bytes
}

fn patch(kernel: &mut [u8], at: usize, bytes: &[u8]) {
    kernel[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn what_is_no_kernel_is_told() {
    let cases: [&[u8]; 5] = [
        b"",
        b"\x7fEL",
        b"#!/bin/sh\necho hello\n",
        &[0; 0x1000],
        &[0x1f, 0x8b, 8, 0, 0, 0],
    ];
    for kernel in cases {
        let error = load_kernel(kernel).expect_err("no kernel");
        assert!(matches!(error, BootError::NotAKernel));
        assert!(
            error
                .to_string()
                .starts_with("not a kernel: neither an ELF with a PVH note nor a bzImage")
        );
    }
}

#[test]
fn the_initramfs_respects_the_kernel_and_its_limit() {
    let load_with = |len: usize, kernel: &[u8], ram: u64| {
        load_into(&memory(64 * MIB), ram, kernel, Some(&mut file_of(len)), "")
    };
    // 24 MiB is where the bzImage ends: 1 MiB is left.
    assert!(load_with(MIB as usize, &bzimage(), 25 * MIB).is_ok());
    assert!(matches!(
        load_with(MIB as usize + 1, &bzimage(), 25 * MIB),
        Err(BootError::InitramfsTooBig { room: MIB, .. })
    ));
    assert!(matches!(
        load_with(0, &bzimage(), 25 * MIB),
        Err(BootError::InitramfsEmpty)
    ));
    let mut limited = bzimage();
    patch(&mut limited, 0x22c, &(26 * MIB as u32 - 1).to_le_bytes());
    let plan = load_with(4096, &limited, 64 * MIB).expect("loads");
    assert_eq!(plan.initramfs, Some((26 * MIB - 4096, 4096)));
    patch(&mut limited, 0x22c, &0u32.to_le_bytes());
    assert!(matches!(
        load_with(1, &limited, 64 * MIB),
        Err(BootError::InitramfsTooBig { room: 0, .. })
    ));
}

#[test]
fn the_command_line_is_bounded() {
    let mem = memory(64 * MIB);
    let longest = "x".repeat(CMDLINE_MAX - 1);
    load_into(&mem, 64 * MIB, &elf(), None, &longest).expect("fits");
    assert_eq!(read::<2>(&mem, CMDLINE + CMDLINE_MAX as u64 - 2), *b"x\0");
    let too_long = "x".repeat(CMDLINE_MAX);
    let error = load_into(&mem, 64 * MIB, &elf(), None, &too_long).expect_err("too long");
    assert!(matches!(
        error,
        BootError::CmdlineTooLong {
            len: 2048,
            max: 2047
        }
    ));
    let error = load_into(&mem, 64 * MIB, &elf(), None, "a\0b").expect_err("zero byte");
    assert!(matches!(error, BootError::CmdlineZero));
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    // The caller says 64 MiB, but has only mapped 3.
    let error = load_into(&memory(3 * MIB), 64 * MIB, &elf(), None, "").expect_err("no memory");
    assert!(matches!(error, BootError::Memory { gpa, .. } if gpa == 4 * MIB));
}

#[test]
fn guest_memory_beside_what_is_loaded_stays_untouched() {
    let mem = memory(64 * MIB);
    mem.write_slice(&[0x77; 4096], GuestAddress(HIGH_RAM))
        .expect("in RAM");
    mem.write_slice(&[0x77; 4096], GuestAddress(32 * MIB))
        .expect("in RAM");
    load_into(&mem, 64 * MIB, &elf(), None, "").expect("loads");
    assert_eq!(read::<4096>(&mem, HIGH_RAM), [0x77; 4096]);
    assert_eq!(read::<4096>(&mem, 32 * MIB), [0x77; 4096]);
}

#[test]
fn the_reset_vector_asks_for_a_reset() {
    let mem = memory(64 * MIB);
    load_into(&mem, 64 * MIB, &elf(), None, "").expect("loads");
    assert_eq!(
        read::<9>(&mem, 0xf_fff0),
        [0xb0, 1, 0xba, 0x02, 0x06, 0xee, 0xf4, 0xeb, 0xfd]
    );
}
