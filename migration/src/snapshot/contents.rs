//! The memory file: where pages are in it, how they are written, read and mapped.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memory::{GuestPages, GuestRam, PAGE_SIZE, PageBitmap};
use rustix::fs::SeekFrom;

use super::SnapshotError;
use super::format::MemoryFile;

/// Bytes that have one checksum, in snapshots that are written here.
pub(super) const CHUNK: usize = 2 << 20;
/// Length of a snapshot's id in bytes.
pub(super) const ID: usize = 16;
const MAGIC: [u8; 8] = *b"VMMSNAPM";
const PAGE: usize = PAGE_SIZE as usize;

/// The page behind the memory, by which a file is known to belong to its manifest.
pub(super) fn last_page(id: &[u8]) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (to, from) in page.iter_mut().zip(MAGIC.iter().chain(id)) {
        *to = *from;
    }
    page
}

/// A part of a region in a part of the file.
struct Part<'a> {
    region: usize,
    first_page: u64,
    pages: u64,
    /// Where it is in the chunk.
    at: usize,
    ram: &'a GuestRam,
}

impl<'a> Part<'a> {
    fn view(&self, first_page: u64, pages: u64) -> Result<GuestPages<'a>, memory::Error> {
        self.ram.pages(self.region, first_page, pages)
    }

    /// Where in the chunk a page of the region is.
    fn offset(&self, page: u64) -> usize {
        self.at + ((page - self.first_page) * PAGE_SIZE) as usize
    }
}

/// The regions' parts that a range of bytes of the file holds.
fn parts(ram: &GuestRam, bytes: Range<u64>) -> impl Iterator<Item = Part<'_>> {
    let mut start = 0;
    ram.regions()
        .iter()
        .enumerate()
        .filter_map(move |(index, region)| {
            let begins = start;
            start += region.len();
            let (from, to) = (bytes.start.max(begins), bytes.end.min(start));
            (from < to).then(|| Part {
                region: index,
                first_page: (from - begins) / PAGE_SIZE,
                pages: (to - from) / PAGE_SIZE,
                at: (from - bytes.start) as usize,
                ram,
            })
        })
}

/// Copies guest memory to a file, a chunk at a time.
pub(super) struct Writer<'a> {
    ram: &'a GuestRam,
    file: &'a File,
    path: &'a Path,
    populated: Vec<PageBitmap>,
    chunk: Vec<u8>,
    /// All of `chunk` is zero.
    clean: bool,
    zero_sum: u32,
}

impl<'a> Writer<'a> {
    pub(super) fn new(ram: &'a GuestRam, file: &'a File, path: &'a Path) -> Self {
        let chunk = vec![0; CHUNK];
        Self {
            ram,
            file,
            path,
            populated: ram
                .regions()
                .iter()
                .map(|region| PageBitmap::new(region.pages()))
                .collect(),
            zero_sum: crc32c::crc32c(&chunk),
            chunk,
            clean: true,
        }
    }

    /// Writes these bytes of the file, at most a chunk, as far as they are not zero. Returns their checksum and how many
    /// were written.
    pub(super) fn write(&mut self, bytes: Range<u64>) -> Result<(u32, u64), SnapshotError> {
        if !self.clean {
            self.chunk.fill(0);
            self.clean = true;
        }
        let mut written = 0;
        for part in parts(self.ram, bytes.clone()) {
            let pages = part.first_page..part.first_page + part.pages;
            let populated = &mut self.populated[part.region];
            self.ram
                .populated_in(part.region, pages.clone(), populated)?;
            for (first, count) in populated.runs_in(pages) {
                let view = part.view(first, count)?;
                for run in view.zero_runs().filter(|run| !run.zero) {
                    let at = part.offset(first + run.first);
                    let data = &mut self.chunk[at..at + (run.pages * PAGE_SIZE) as usize];
                    // What is written and what is summed are the same bytes, whatever happens to the memory meanwhile.
                    view.part(run.first, run.pages).read_into(data);
                    self.clean = false;
                    self.file
                        .write_all_at(data, bytes.start + at as u64)
                        .map_err(SnapshotError::file("write", self.path))?;
                    written += data.len() as u64;
                }
            }
        }
        let length = (bytes.end - bytes.start) as usize;
        let sum = match self.clean && length == CHUNK {
            true => self.zero_sum,
            false => crc32c::crc32c(&self.chunk[..length]),
        };
        Ok((sum, written))
    }
}

/// A memory file that has the right length and id.
pub(super) struct Reader<'a> {
    file: &'a File,
    path: &'a Path,
    known: &'a MemoryFile,
    chunk: Vec<u8>,
    zero_sum: u32,
}

/// Whether the file is long enough and belongs to the manifest.
pub(super) fn check(file: &File, path: &Path, known: &MemoryFile) -> Result<(), SnapshotError> {
    let failed = |error| SnapshotError::file("read", path)(error);
    let length = file.metadata().map_err(failed)?.len();
    let expected = known.bytes.saturating_add(PAGE_SIZE);
    if length != expected {
        return Err(SnapshotError::damaged(
            path,
            format!("it has {length} bytes instead of {expected}"),
        ));
    }
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, known.bytes).map_err(failed)?;
    if page[..MAGIC.len()] != MAGIC {
        return Err(SnapshotError::damaged(
            path,
            "its last page is not as it was written",
        ));
    }
    if page != last_page(&known.id.0) {
        return Err(SnapshotError::damaged(
            path,
            "it belongs to another snapshot than the manifest beside it",
        ));
    }
    Ok(())
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a File, path: &'a Path, known: &'a MemoryFile) -> Self {
        let chunk = vec![0; known.chunk_bytes as usize];
        Self {
            file,
            path,
            known,
            zero_sum: crc32c::crc32c(&chunk),
            chunk,
        }
    }

    /// The bytes of each chunk.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let (bytes, step) = (self.known.bytes, u64::from(self.known.chunk_bytes));
        (0..bytes.div_ceil(step))
            .map(move |index| (index, index * step..bytes.min((index + 1) * step)))
    }

    /// Reads a chunk, checks it, and copies it to `ram` if there is one. Zero pages are left out: the memory is fresh.
    /// Returns how many bytes were read.
    pub(super) fn read(
        &mut self,
        index: u64,
        bytes: Range<u64>,
        ram: Option<&GuestRam>,
    ) -> Result<u64, SnapshotError> {
        let failed = |error| SnapshotError::file("read", self.path)(error);
        let hole = self.is_hole(&bytes).map_err(failed)?;
        let chunk = &mut self.chunk[..(bytes.end - bytes.start) as usize];
        let sum = if hole && chunk.len() == self.known.chunk_bytes as usize {
            self.zero_sum
        } else {
            self.file
                .read_exact_at(chunk, bytes.start)
                .map_err(failed)?;
            crc32c::crc32c(chunk)
        };
        if Some(sum) != self.known.sum(index) {
            return Err(SnapshotError::damaged(
                self.path,
                format!(
                    "bytes {:#x} to {:#x} do not have their checksum",
                    bytes.start, bytes.end
                ),
            ));
        }
        if hole {
            return Ok(0);
        }
        for part in ram.into_iter().flat_map(|ram| parts(ram, bytes.clone())) {
            let data = &chunk[part.at..part.at + (part.pages * PAGE_SIZE) as usize];
            let mut page = part.first_page;
            for run in data
                .as_chunks::<PAGE>()
                .0
                .chunk_by(|a, b| is_zero(a) == is_zero(b))
            {
                if !is_zero(&run[0]) {
                    part.view(page, run.len() as u64)?
                        .write_from(run.as_flattened());
                }
                page += run.len() as u64;
            }
        }
        Ok(chunk.len() as u64)
    }

    /// Whether the file has nothing there. A file system that cannot say it has something.
    fn is_hole(&self, bytes: &Range<u64>) -> std::io::Result<bool> {
        match rustix::fs::seek(self.file, SeekFrom::Data(bytes.start)) {
            Ok(data) => Ok(data >= bytes.end),
            Err(rustix::io::Errno::NXIO) => Ok(true),
            Err(rustix::io::Errno::INVAL) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

fn is_zero(page: &[u8; PAGE]) -> bool {
    page.as_chunks::<16>()
        .0
        .iter()
        .all(|part| u128::from_ne_bytes(*part) == 0)
}

/// Makes the file the memory, without reading it.
pub(super) fn map(ram: &GuestRam, file: &File, path: &Path) -> Result<(), SnapshotError> {
    let mut offset = 0;
    for (index, region) in ram.regions().iter().enumerate() {
        let file = file
            .try_clone()
            .map_err(SnapshotError::file("open", path))?;
        ram.map_file(index, file, offset)?;
        offset += region.len();
    }
    Ok(())
}
