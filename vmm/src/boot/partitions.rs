//! Partition tables: GPT (UEFI Specification 2.10, section 5.3), MBR with logical partitions, or none.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

/// Most partitions that are looked at.
const MOST: usize = 128;
/// Bytes of an MBR's unit, and of a GPT's where it is not 4096.
const SECTOR: u64 = 512;
/// Where the MBR's table is, and its signature.
const TABLE: usize = 446;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// Partition types: a GPT follows; logical partitions are inside.
const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Where the magic of ext2 to ext4 is, and what.
const EXT_MAGIC_AT: u64 = 1024 + 56;
const EXT_MAGIC: [u8; 2] = [0x53, 0xef];

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// None: the whole disk.
    pub(super) number: Option<u32>,
    /// First byte.
    pub(super) start: u64,
    /// Length in bytes; within the disk.
    pub(super) len: u64,
}

/// The parts of a disk that may have a file system.
pub(super) fn of(disk: &File) -> io::Result<Vec<Part>> {
    let mut file = disk;
    // The end of a block device is its size.
    let len = file.seek(SeekFrom::End(0))?;
    let whole = Part {
        number: None,
        start: 0,
        len,
    };
    let mut magic = [0; 2];
    if read(disk, EXT_MAGIC_AT, &mut magic)? && magic == EXT_MAGIC {
        return Ok(vec![whole]);
    }
    let mut first = [0; SECTOR as usize];
    if !read(disk, 0, &mut first)? || first[510..] != SIGNATURE {
        return Ok(Vec::new());
    }
    let mut parts = match entries(&first).any(|entry| entry.kind == PROTECTIVE) {
        true => gpt(disk)?,
        false => mbr(disk, &first)?,
    };
    // What leads beyond the end is not there.
    parts.retain(|part| {
        part.len > 0
            && part
                .start
                .checked_add(part.len)
                .is_some_and(|end| end <= len)
    });
    Ok(parts)
}

/// Reads all of it; false if the disk ends before.
fn read(disk: &File, at: u64, into: &mut [u8]) -> io::Result<bool> {
    match disk.read_exact_at(into, at) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

struct Entry {
    kind: u8,
    start: u64,
    sectors: u64,
}

fn entries(sector: &[u8; SECTOR as usize]) -> impl Iterator<Item = Entry> {
    sector[TABLE..510]
        .as_chunks::<16>()
        .0
        .iter()
        .map(|entry| Entry {
            kind: entry[4],
            start: number(&entry[8..12]),
            sectors: number(&entry[12..16]),
        })
}

/// A little-endian number of at most 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |all, byte| all << 8 | u64::from(*byte))
}

fn part(number: u32, first: u64, sectors: u64, sector: u64) -> Part {
    Part {
        number: Some(number),
        start: first.saturating_mul(sector),
        len: sectors.saturating_mul(sector),
    }
}

fn mbr(disk: &File, first: &[u8; SECTOR as usize]) -> io::Result<Vec<Part>> {
    let mut parts = Vec::new();
    for (index, entry) in (1..).zip(entries(first)) {
        if EXTENDED.contains(&entry.kind) {
            logical(disk, entry.start, &mut parts)?;
        } else if entry.kind != 0 {
            parts.push(part(index, entry.start, entry.sectors, SECTOR));
        }
    }
    parts.sort_by_key(|part| part.number);
    Ok(parts)
}

/// Logical partitions, from number 5 on: each sector has one, and where the next sector is.
fn logical(disk: &File, base: u64, parts: &mut Vec<Part>) -> io::Result<()> {
    let mut at = base;
    for index in 5..5 + MOST as u32 {
        let mut sector = [0; SECTOR as usize];
        if !read(disk, at.saturating_mul(SECTOR), &mut sector)? || sector[510..] != SIGNATURE {
            break;
        }
        let mut both = entries(&sector);
        let (Some(this), Some(next)) = (both.next(), both.next()) else {
            break;
        };
        if this.kind != 0 {
            parts.push(part(
                index,
                at.saturating_add(this.start),
                this.sectors,
                SECTOR,
            ));
        }
        if !EXTENDED.contains(&next.kind) || next.start == 0 {
            break;
        }
        at = base.saturating_add(next.start);
    }
    Ok(())
}

fn gpt(disk: &File) -> io::Result<Vec<Part>> {
    let mut parts = Vec::new();
    for sector in [SECTOR, 4096] {
        let mut header = [0; 92];
        if !read(disk, sector, &mut header)? || !header.starts_with(b"EFI PART") {
            continue;
        }
        let (table, count, size) = (
            number(&header[72..80]),
            number(&header[80..84]),
            number(&header[84..88]),
        );
        // Section 5.3.2: 128 times a power of two.
        if !(128..=4096).contains(&size) {
            continue;
        }
        for (index, at) in (1..=MOST as u32)
            .take(count as usize)
            .zip((0..).map(|index: u64| table.saturating_mul(sector).saturating_add(index * size)))
        {
            let mut entry = [0; 48];
            if !read(disk, at, &mut entry)? {
                break;
            }
            let (first, last) = (number(&entry[32..40]), number(&entry[40..48]));
            if entry[..16] != [0; 16] && first <= last {
                parts.push(part(index, first, (last - first).saturating_add(1), sector));
            }
        }
        break;
    }
    Ok(parts)
}
