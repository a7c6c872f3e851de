//! Which pages may hold something, found without touching them.
//!
//! ```text
//!   anonymous ─────────────► /proc/self/pagemap: present or swapped
//!   hugetlbfs ─────────────► the same; every page if the file holds more than that: another process has filled some
//!   private file mapping ──► the same, and SEEK_DATA on the file: what nobody has used yet is only there
//!   memfd                ──► SEEK_DATA / SEEK_HOLE on the file (its pages need not be in our page tables)
//!   neither readable     ──► every page
//! ```

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

use crate::backing::{Backing, Mapping};
use crate::{PAGE_SIZE, PageBitmap};

/// Bit 63 of a pagemap entry: the page is present (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
/// Bit 62: the page is swapped out.
const SWAPPED: u64 = 1 << 62;
/// Entries read at a time: 256 KiB of them, for 128 MiB of memory.
const ENTRIES: usize = 32 * 1024;

/// Sets in `into` those of `pages` that may hold something else than zeros. On an error some may be missing: the caller
/// then has to take all of `pages`.
pub(crate) fn find(
    mapping: &Mapping,
    pagemap: Option<&File>,
    pages: Range<u64>,
    into: &mut PageBitmap,
) -> io::Result<()> {
    match (mapping.backing(), mapping.file()) {
        (Backing::Memfd { .. }, Some(file)) => from_file(file, 0, pages, into),
        _ => {
            let Some(pagemap) = pagemap else {
                return Err(io::Error::other("the page map is not at hand"));
            };
            if let Some(origin) = mapping.origin() {
                // Parts that were given back since are found too; they only cost a look.
                from_file(origin.file.as_fd(), origin.offset, pages.clone(), into)?;
            }
            if let (Backing::Hugetlbfs { page_size }, Some(file)) =
                (mapping.backing(), mapping.file())
            {
                only_ours(mapping, pagemap, file, page_size)?;
            }
            from_pagemap(mapping, pagemap, pages, into)
        }
    }
}

fn from_pagemap(
    mapping: &Mapping,
    pagemap: &File,
    pages: Range<u64>,
    into: &mut PageBitmap,
) -> io::Result<()> {
    let base_page = mapping.base().as_ptr().addr() as u64 / PAGE_SIZE;
    let mut entries = vec![0u8; ENTRIES.min((pages.end - pages.start) as usize) * 8];
    let mut page = pages.start;
    while page < pages.end {
        let count = ((pages.end - page) as usize).min(ENTRIES);
        let chunk = &mut entries[..count * 8];
        pagemap.read_exact_at(chunk, (base_page + page) * 8)?;
        let (entries, _) = chunk.as_chunks::<8>();
        for (block, at) in entries.chunks(64).zip((page..).step_by(64)) {
            let mut word = 0u64;
            for (bit, entry) in block.iter().enumerate() {
                let populated = u64::from_ne_bytes(*entry) & (PRESENT | SWAPPED) != 0;
                word |= u64::from(populated) << bit;
            }
            if word == u64::MAX {
                into.set_range(at..at + 64);
            } else {
                while word != 0 {
                    into.set(at + u64::from(word.trailing_zeros()));
                    word &= word - 1;
                }
            }
        }
        page += count as u64;
    }
    Ok(())
}

/// An error if the file has huge pages that are not in our page tables: what a back end in another process was first to write.
fn only_ours(
    mapping: &Mapping,
    pagemap: &File,
    file: BorrowedFd<'_>,
    page_size: u64,
) -> io::Result<()> {
    // In units of 512 bytes, whatever the size of a block (stat(2)).
    let held =
        u64::try_from(rustix::fs::fstat(file)?.st_blocks).unwrap_or(u64::MAX) / (page_size / 512);
    let base_page = mapping.base().as_ptr().addr() as u64 / PAGE_SIZE;
    let mut ours = 0;
    for page in (0..mapping.len() as u64 / PAGE_SIZE).step_by((page_size / PAGE_SIZE) as usize) {
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, (base_page + page) * 8)?;
        ours += u64::from(u64::from_ne_bytes(entry) & (PRESENT | SWAPPED) != 0);
    }
    if held > ours {
        return Err(io::Error::other("another process has filled some pages"));
    }
    Ok(())
}

/// Page 0 is at `offset` in the file.
fn from_file(
    file: BorrowedFd<'_>,
    offset: u64,
    pages: Range<u64>,
    into: &mut PageBitmap,
) -> io::Result<()> {
    let end = offset + pages.end * PAGE_SIZE;
    let mut at = offset + pages.start * PAGE_SIZE;
    while at < end {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            // Nothing but a hole up to the end of the file, or of what is asked for.
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?.min(end);
        into.set_range((data - offset) / PAGE_SIZE..(hole - offset).div_ceil(PAGE_SIZE));
        at = hole.max(data + PAGE_SIZE);
    }
    Ok(())
}
