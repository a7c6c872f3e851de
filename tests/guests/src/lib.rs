//! Guest programs that check themselves.
//!
//! ```text
//!  programs/memory.rs ─┐ build.rs: rustc, freestanding, PVH note ┌─> MEMORY ─┐
//!  programs/cpu.rs    ─┤                                         ├─> CPU    ─┼─ Program::write_to(dir)
//!  programs/block.rs  ─┘                                         └─> BLOCK  ─┘
//!
//!  a VMM boots it by PVH ── serial line ──> Report::parse ──> what the guest found out about itself
//!                        <── `v` `q` `r` ── ask for a verdict, power off, reset
//! ```
//!
//! The oracle of a move is the guest: it knows what its memory and its CPU state must be and tells
//! when they are not. Parameters, output and input of each program are in the module text of
//! `programs/memory.rs`, `programs/cpu.rs` and `programs/block.rs`; the run time that they share is `programs/rt`.
//!
//! Promises: the programs run under any VMM that boots a PVH ELF (this project, QEMU, Cloud
//! Hypervisor), on hardware virtualisation, on a KVM that interprets ring 0, and in QEMU's emulator;
//! the first thing they do is write [`FIRST_BYTE`] to the serial port.

#[path = "../programs/block/checksum.rs"]
mod checksum;
mod report;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use report::{BlockCounts, CpuErrors, MemoryErrors, ParseError, Report};

/// The memory guest, an ELF with a PVH note.
pub static MEMORY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/memory.elf"));

/// The CPU guest, an ELF with a PVH note.
pub static CPU: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cpu.elf"));

/// The block guest, an ELF with a PVH note.
pub static BLOCK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/block.elf"));

/// What every program writes to the serial port with its first instructions, before it sets anything
/// up: when it arrives, the guest has started.
pub const FIRST_BYTE: u8 = b'!';

/// Asks a guest for a verdict, on its serial input.
pub const ASK_VERDICT: u8 = b'v';

/// Asks a block guest for a measurement, on its serial input.
pub const ASK_MEASUREMENT: u8 = b'm';

/// Asks a guest to power off, on its serial input.
pub const ASK_POWER_OFF: u8 = b'q';

/// Asks a guest to reset, on its serial input.
pub const ASK_RESET: u8 = b'r';

/// The checksum that a block guest reports of a disk with these contents; what is beyond whole blocks counts for nothing.
pub fn disk_checksum(contents: &[u8]) -> u64 {
    let blocks = contents.as_chunks::<{ checksum::BLOCK }>().0;
    (0..).zip(blocks).fold(0, |sum: u64, (index, block)| {
        sum.wrapping_add(checksum::of_block(index, block))
    })
}

/// The guest programs, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    /// Fills, dirties and verifies memory.
    Memory,
    /// Verifies vCPU state and clocks.
    Cpu,
    /// Reads a virtio disk: measures it and verifies what it reads.
    Block,
}

impl Program {
    /// All of them.
    pub const ALL: [Program; 3] = [Program::Memory, Program::Cpu, Program::Block];

    /// The name, which is also that of the written file without `.elf`.
    pub fn name(self) -> &'static str {
        match self {
            Program::Memory => "memory",
            Program::Cpu => "cpu",
            Program::Block => "block",
        }
    }

    /// The ELF.
    pub fn image(self) -> &'static [u8] {
        match self {
            Program::Memory => MEMORY,
            Program::Cpu => CPU,
            Program::Block => BLOCK,
        }
    }

    /// Writes the program to `dir/NAME.elf` for a VMM to load, and returns that path.
    ///
    /// # Errors
    /// Those of creating and writing a file; `dir` must exist.
    pub fn write_to(self, dir: &Path) -> io::Result<PathBuf> {
        let path = dir.join(self.name()).with_extension("elf");
        fs::write(&path, self.image())?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    /// Program headers as (type, offset, physical address, file size, memory size).
    fn segments(elf: &[u8]) -> Vec<(u32, u64, u64, u64, u64)> {
        assert_eq!(&elf[..6], b"\x7fELF\x02\x01", "not a little-endian ELF64");
        let (table, count) = (u64_at(elf, 32) as usize, u32_at(elf, 56) & 0xffff);
        (0..count as usize)
            .map(|index| {
                let at = table + index * 56;
                let word = |offset| u64_at(elf, at + offset);
                (u32_at(elf, at), word(8), word(24), word(32), word(40))
            })
            .collect()
    }

    #[test]
    fn every_program_has_a_pvh_note_with_an_entry_in_its_segment() {
        for program in Program::ALL {
            let elf = program.image();
            let segments = segments(elf);
            let note = segments
                .iter()
                .find(|segment| segment.0 == 4)
                .expect("a PT_NOTE");
            let note = &elf[note.1 as usize..][..note.3 as usize];
            assert_eq!(
                (u32_at(note, 0), u32_at(note, 4), u32_at(note, 8)),
                (4, 4, 18)
            );
            assert_eq!(&note[12..16], b"Xen\0");
            let entry = u64::from(u32_at(note, 16));
            let loads: Vec<_> = segments.iter().filter(|segment| segment.0 == 1).collect();
            assert_eq!(loads.len(), 1, "{program:?}");
            let &&(_, _, start, in_file, in_memory) = &loads[0];
            assert_eq!(start, 0x10_0000);
            assert!(entry >= start && entry < start + in_file);
            assert!(in_memory >= in_file && in_memory < 16 << 20);
        }
    }

    #[test]
    fn a_program_is_written_whole() {
        let dir = std::env::temp_dir().join(format!("guests-write-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a temporary directory");
        for program in Program::ALL {
            let path = program.write_to(&dir).expect("a written program");
            assert_eq!(fs::read(&path).expect("the file"), program.image());
        }
        assert!(Program::Memory.write_to(&dir.join("missing")).is_err());
        fs::remove_dir_all(&dir).expect("its removal");
    }
}
