//! What kind of kernel a file holds, where it goes, and whether it may go there.
//!
//! ```text
//!   first bytes ── "\x7fELF" ─► elf::parse     ─┐
//!               └─ "HdrS"   ─► bzimage::parse ─┴─► Kernel { image, limits } ─► load
//! ```
//!
//! Everything is checked before the first byte goes to guest memory: the file's length bounds what is read, the
//! low RAM above the boot structures bounds where it goes.

mod bzimage;
mod elf;

use std::io::{Read, Seek, SeekFrom};

use vm_memory::{GuestMemory, ReadVolatile};

pub(super) use self::bzimage::BzImage;
pub(super) use self::elf::ElfKernel;
use super::error::BootError;
use super::{MemoryMap, clear, read_into};
use crate::x86_64::layout::{CMDLINE_MAX, HIGH_RAM};

const WHAT: &str = "the kernel";

/// A kernel that can be loaded.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) image: Image,
    pub(super) limits: Limits,
}

/// What the kernel says about its surroundings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// First address the kernel uses.
    pub(super) start: u64,
    /// End of the memory it needs before it has read its memory map.
    pub(super) end: u64,
    /// Last address the initramfs may occupy.
    pub(super) initramfs_max: u64,
    /// Longest command line it takes, without the terminating zero.
    pub(super) cmdline_max: usize,
}

#[derive(Debug)]
pub(super) enum Image {
    Elf(ElfKernel),
    BzImage(Box<BzImage>),
}

/// A part of the file and the memory it goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) file_offset: u64,
    pub(super) file_size: u64,
    pub(super) gpa: u64,
    /// At least `file_size`; the rest is zeroes.
    pub(super) memory_size: u64,
}

impl Segment {
    /// End of its memory. [`check_memory`] has made sure that it exists.
    fn end(&self) -> u64 {
        self.gpa + self.memory_size
    }
}

/// Tells what a file is and checks all of it that says where things go.
pub(super) fn identify<K: Read + Seek>(file: &mut K, map: &MemoryMap) -> Result<Kernel, BootError> {
    let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let mut file = Source { file, len };
    if file.starts_with(0, b"\x7fELF")? {
        let elf = elf::parse(&mut file, map)?;
        let limits = Limits {
            start: elf.segments.iter().map(|s| s.gpa).min().unwrap_or(HIGH_RAM),
            end: elf
                .segments
                .iter()
                .map(Segment::end)
                .max()
                .unwrap_or(HIGH_RAM),
            initramfs_max: u64::from(u32::MAX),
            cmdline_max: CMDLINE_MAX - 1,
        };
        Ok(Kernel {
            image: Image::Elf(elf),
            limits,
        })
    } else if file.starts_with(bzimage::MAGIC_OFFSET, b"HdrS")? {
        let bz = bzimage::parse(&mut file, map)?;
        let limits = bz.limits();
        Ok(Kernel {
            image: Image::BzImage(Box::new(bz)),
            limits,
        })
    } else {
        Err(BootError::NotAKernel)
    }
}

/// Copies the kernel to guest memory.
pub(super) fn load<M, K>(mem: &M, file: &mut K, image: &Image) -> Result<(), BootError>
where
    M: GuestMemory + ?Sized,
    K: Seek + ReadVolatile,
{
    let segments = match image {
        Image::Elf(elf) => elf.segments.as_slice(),
        Image::BzImage(bz) => std::slice::from_ref(&bz.payload),
    };
    for segment in segments {
        file.seek(SeekFrom::Start(segment.file_offset))
            .map_err(failed)?;
        read_into(mem, WHAT, segment.gpa, file, segment.file_size)?;
        clear(
            mem,
            segment.gpa + segment.file_size,
            segment.memory_size - segment.file_size,
        )?;
    }
    Ok(())
}

/// Checks that a kernel may occupy `gpa .. gpa + len`: RAM, and above the boot structures.
fn check_memory(map: &MemoryMap, gpa: u64, len: u64) -> Result<(), BootError> {
    let end = gpa.checked_add(len);
    if gpa >= HIGH_RAM && end.is_some_and(|end| end <= map.low_end()) {
        return Ok(());
    }
    Err(BootError::KernelOutsideRam {
        start: gpa,
        end: end.unwrap_or(u64::MAX),
        low: HIGH_RAM,
        high: map.low_end(),
    })
}

fn failed(source: std::io::Error) -> BootError {
    BootError::Read { what: WHAT, source }
}

/// A file whose every read is checked against its length first.
struct Source<'a, K> {
    file: &'a mut K,
    len: u64,
}

impl<K: Read + Seek> Source<'_, K> {
    fn check(&self, what: &'static str, start: u64, len: u64) -> Result<(), BootError> {
        let end = start.checked_add(len);
        if end.is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        Err(BootError::Truncated {
            what,
            start,
            end: end.unwrap_or(u64::MAX),
            len: self.len,
        })
    }

    fn read(&mut self, what: &'static str, start: u64, buf: &mut [u8]) -> Result<(), BootError> {
        self.check(what, start, buf.len() as u64)?;
        self.file.seek(SeekFrom::Start(start)).map_err(failed)?;
        self.file.read_exact(buf).map_err(failed)
    }

    /// `false` too when the file ends before.
    fn starts_with(&mut self, at: u64, magic: &[u8; 4]) -> Result<bool, BootError> {
        let mut found = [0; 4];
        if self.len < at + 4 {
            return Ok(false);
        }
        self.read(WHAT, at, &mut found)?;
        Ok(found == *magic)
    }
}
