//! The files of a file system that its guest has written: ext2, ext3 and ext4, by the crate `ext4-view`, journal included.
//!
//! What the crate would believe is checked before, and all that it reads is counted.

use std::cell::Cell;
use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use ext4_view::{Ext4, Ext4Read};

use super::partitions::Part;

/// Largest kernel, and initial RAM file systems together, in bytes.
pub(super) const MOST_KERNEL: u64 = 256 << 20;
pub(super) const MOST_INITRAMFS: u64 = 1 << 30;
/// Largest file that is read as text.
const MOST_TEXT: u64 = 1 << 20;
/// Most entries of a directory.
const MOST_NAMES: usize = 10_000;
/// All that is read of a file system, in bytes: kernel, initial RAM file system, and what describes them.
const MOST_READ: u64 = 4 << 30;
/// Most block groups: 128 TiB with blocks of 4 KiB.
const MOST_GROUPS: u64 = 1 << 20;
/// Largest block: 64 KiB.
const MOST_LOG_BLOCK: u64 = 6;

/// Files of a part of a disk.
pub(super) struct Files(Ext4);

/// A part of a disk, and how much of it may still be read.
struct Window {
    disk: File,
    part: Part,
    left: Rc<Cell<u64>>,
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        start: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        let len = into.len() as u64;
        let end = start.checked_add(len).filter(|end| *end <= self.part.len);
        if end.is_none() {
            return Err("it leads beyond its end".into());
        }
        match self.left.get().checked_sub(len) {
            Some(left) => self.left.set(left),
            None => return Err("it would have too much to be read".into()),
        }
        Ok(self.disk.read_exact_at(into, self.part.start + start)?)
    }
}

/// Checks what decides on how much is kept in memory.
fn check(disk: &File, part: &Part) -> Result<(), String> {
    let mut block = [0; 1024];
    let there = part.len >= 2048
        && disk.read_exact_at(&mut block, part.start + 1024).is_ok()
        && block[56..58] == [0x53, 0xef];
    if !there {
        return Err("no ext4 file system".to_owned());
    }
    let word = |at: usize| {
        u64::from(u32::from_le_bytes([
            block[at],
            block[at + 1],
            block[at + 2],
            block[at + 3],
        ]))
    };
    // s_log_block_size, s_blocks_count_lo and _hi (with the feature 64bit), s_blocks_per_group.
    let (log, low, per_group, high) = (word(24), word(4), word(32), word(0x150));
    let blocks = match word(96) & 0x80 {
        0 => low,
        _ => high << 32 | low,
    };
    if log > MOST_LOG_BLOCK || per_group == 0 {
        return Err("its file system is damaged".to_owned());
    }
    let bytes = u128::from(blocks) << (10 + log);
    if bytes > u128::from(part.len) {
        return Err(format!(
            "its file system is cut off: it has {bytes} bytes, of which {} are there",
            part.len
        ));
    }
    match blocks / per_group > MOST_GROUPS {
        true => Err("its file system has too many block groups".to_owned()),
        false => Ok(()),
    }
}

impl Files {
    /// Opens a file system without a write.
    pub(super) fn open(disk: &File, part: &Part) -> Result<Self, String> {
        check(disk, part)?;
        let window = Window {
            disk: disk.try_clone().map_err(|error| error.to_string())?,
            part: *part,
            left: Rc::new(Cell::new(MOST_READ)),
        };
        Ext4::load(Box::new(window))
            .map(Self)
            .map_err(|error| format!("its ext4 file system cannot be read: {error}"))
    }

    /// Whether it is a file, at the end of links.
    pub(super) fn is_file(&self, path: &str) -> bool {
        self.0
            .metadata(path)
            .is_ok_and(|metadata| metadata.file_type().is_regular_file())
    }

    /// A text; none if it is not there or is none.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        if !self.is_file(path) || self.0.metadata(path).ok()?.len() > MOST_TEXT {
            return None;
        }
        self.0.read_to_string(path).ok()
    }

    /// Names in a directory; none if it is not there.
    pub(super) fn names(&self, path: &str) -> Vec<String> {
        let Ok(all) = self.0.read_dir(path) else {
            return Vec::new();
        };
        all.take(MOST_NAMES)
            .filter_map(|entry| Some(entry.ok()?.file_name().as_str().ok()?.to_owned()))
            .collect()
    }

    /// Copies files, one after the other, into memory of their own.
    pub(super) fn copy(&self, paths: &[String], most: u64) -> Result<File, String> {
        let failed =
            |path: &str, error: &dyn std::fmt::Display| format!("cannot read {path}: {error}");
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let copied = rustix::fs::memfd_create("boot", flags);
        let mut into = File::from(copied.map_err(|error| failed("it", &io::Error::from(error)))?);
        let mut total = 0;
        let mut chunk = vec![0; 1 << 20];
        for path in paths {
            let mut file = self
                .0
                .open(path.as_str())
                .map_err(|error| failed(path, &error))?;
            loop {
                let count = file
                    .read_bytes(&mut chunk)
                    .map_err(|error| failed(path, &error))?;
                if count == 0 {
                    break;
                }
                total += count as u64;
                if total > most {
                    return Err(format!(
                        "{path} is too large: more than {most} bytes are not loaded"
                    ));
                }
                into.write_all(&chunk[..count])
                    .map_err(|error| failed(path, &error))?;
            }
            // Archives follow each other at multiples of four.
            let padding = total.next_multiple_of(4) - total;
            if paths.len() > 1 {
                into.write_all(&[0; 3][..padding as usize])
                    .map_err(|error| failed(path, &error))?;
                total += padding;
            }
        }
        io::Seek::rewind(&mut into).map_err(|error| failed("it", &error))?;
        Ok(into)
    }
}
