//! What guest memory is made of, and the mapping of one RAM range.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};

use crate::{Error, PAGE_SIZE, RamRange};

/// Size of the huge pages that transparent huge pages are made of.
const THP_SIZE: u64 = 2 << 20;

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backing {
    /// Private anonymous memory: the fastest to fill, and the default choice.
    Anonymous {
        /// Advise transparent huge pages; otherwise they are advised against.
        thp: bool,
    },
    /// A memfd, which other processes can be given.
    Memfd {
        /// Advise transparent huge pages; the host's `shmem_enabled` has the last word.
        thp: bool,
    },
    /// A memfd of preallocated huge pages. The pages are set aside when the memory is made.
    Hugetlbfs {
        /// 2 MiB or 1 GiB, in bytes.
        page_size: u64,
    },
}

impl Backing {
    /// The unit in which the host hands out this memory, in bytes.
    pub fn page_size(&self) -> u64 {
        match self {
            Self::Anonymous { .. } | Self::Memfd { .. } => PAGE_SIZE,
            Self::Hugetlbfs { page_size } => *page_size,
        }
    }

    /// The alignment, relative to the guest-physical address, that lets host and guest use huge mappings.
    fn alignment(&self) -> u64 {
        self.page_size().max(THP_SIZE)
    }
}

/// The memory of one RAM range. Unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    backing: Backing,
    file: Option<OwnedFd>,
    origin: OnceLock<Origin>,
}

/// The file that private memory began as: pages that nobody has written yet are still only there.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) file: File,
    /// Where in it the mapping begins.
    pub(crate) offset: u64,
    /// How many parts of it have been replaced by fresh memory.
    replaced: AtomicU32,
}

/// Most parts of a mapped file that are replaced by fresh memory: each splits a mapping, and a process has only some 65000
/// (vm.max_map_count), which its threads need too.
const MAX_REPLACED: u32 = 16_000;

// SAFETY: the mapping belongs to no thread, and is reached only by raw pointers, system calls and volatile reads.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a reference into the mapping.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps fresh memory for `range`, at an address congruent to its guest-physical address modulo the huge page size.
    pub(crate) fn new(range: RamRange, backing: Backing) -> Result<Self, Error> {
        let len = usize::try_from(range.len).map_err(|_| Error::Size {
            size: range.len,
            reason: "it does not fit the address space",
        })?;
        let file = match backing {
            Backing::Anonymous { .. } => None,
            Backing::Memfd { .. } => Some(memfd(range.len, MemfdFlags::CLOEXEC)?),
            Backing::Hugetlbfs { page_size } => {
                let size = match page_size {
                    0x20_0000 => MemfdFlags::HUGE_2MB,
                    0x4000_0000 => MemfdFlags::HUGE_1GB,
                    _ => {
                        return Err(Error::HugePage {
                            page_size,
                            reason: "choose 2 MiB or 1 GiB",
                        });
                    }
                };
                if !range.len.is_multiple_of(page_size) || !range.gpa.is_multiple_of(page_size) {
                    return Err(Error::HugePage {
                        page_size,
                        reason: "the RAM ranges must be multiples of the page size",
                    });
                }
                Some(memfd(
                    range.len,
                    MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | size,
                )?)
            }
        };
        let base = reserve(len, range.gpa, backing.alignment() as usize)?;
        // From here on a drop unmaps the range.
        let mapping = Self {
            base,
            len,
            backing,
            file,
            origin: OnceLock::new(),
        };
        mapping.fill_reservation()?;
        mapping.advise(0, len)?;
        Ok(mapping)
    }

    /// Puts the real memory over the reserved addresses.
    fn fill_reservation(&self) -> Result<(), Error> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let address = self.base.as_ptr().cast::<c_void>();
        let mapped = match &self.file {
            // SAFETY: the addresses are this mapping's own reservation, which nothing uses yet.
            None => unsafe {
                rustix::mm::mmap_anonymous(
                    address,
                    self.len,
                    protection,
                    MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
                )
            },
            Some(file) => {
                // Huge pages are set aside now: running out later would kill the process at a guest's write.
                let flags = match self.backing {
                    Backing::Hugetlbfs { .. } => MapFlags::SHARED | MapFlags::FIXED,
                    _ => MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                };
                // SAFETY: the addresses are this mapping's own reservation, which nothing uses yet.
                unsafe { rustix::mm::mmap(address, self.len, protection, flags, file, 0) }
            }
        };
        mapped
            .map(drop)
            .map_err(|error| Error::system("mapping guest memory", error))
    }

    /// Puts `file` from `offset` on in place of the memory, copy on write: it is read when a page is first used, and never
    /// written.
    pub(crate) fn map_file(&self, file: File, offset: u64) -> Result<(), Error> {
        let refused = |reason| Error::MapFile { reason };
        if !matches!(self.backing, Backing::Anonymous { .. }) {
            return Err(refused("only private anonymous memory can begin as a file"));
        }
        if !offset.is_multiple_of(PAGE_SIZE) {
            return Err(refused("it must begin at a page of the file"));
        }
        let metadata = file
            .metadata()
            .map_err(|error| Error::system("looking at the file for guest memory", error))?;
        let end = offset.checked_add(self.len as u64);
        if !metadata.is_file() || end.is_none_or(|end| end > metadata.len()) {
            return Err(refused("the file is too short, or no regular file"));
        }
        let origin = Origin {
            file,
            offset,
            replaced: AtomicU32::new(0),
        };
        self.origin
            .set(origin)
            .map_err(|_| refused("the memory has begun as a file already"))?;
        let Some(Origin { file, offset, .. }) = self.origin.get() else {
            return Err(refused("the file was lost"));
        };
        // SAFETY: the addresses are this mapping's own. Other contents, which is what is asked for, harm nobody: there are
        // no references into it.
        unsafe {
            rustix::mm::mmap(
                self.base.as_ptr().cast(),
                self.len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
                file,
                *offset,
            )
        }
        .map_err(|error| {
            // The addresses must stay mapped. If this fails too, it is for the same lack, and the machine is given up.
            let _ = self.fill_reservation();
            Error::system("mapping the file for guest memory", error)
        })?;
        self.advise(0, self.len)
    }

    pub(crate) fn origin(&self) -> Option<&Origin> {
        self.origin.get()
    }

    /// Tells the kernel how a part of the mapping is to be treated.
    fn advise(&self, offset: usize, len: usize) -> Result<(), Error> {
        self.madvise(offset, len, Advice::LinuxDontDump)
            .map_err(|error| Error::system("keeping guest memory out of core dumps", error))?;
        let thp = match self.backing {
            Backing::Anonymous { thp: true } | Backing::Memfd { thp: true } => {
                Advice::LinuxHugepage
            }
            Backing::Anonymous { thp: false } | Backing::Memfd { thp: false } => {
                Advice::LinuxNoHugepage
            }
            Backing::Hugetlbfs { .. } => return Ok(()),
        };
        match self.madvise(offset, len, thp) {
            // A kernel without transparent huge pages is as good a host, only slower.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
            Err(error) => Err(Error::system("advising huge pages for guest memory", error)),
        }
    }

    fn madvise(&self, offset: usize, len: usize, advice: Advice) -> rustix::io::Result<()> {
        debug_assert!(offset + len <= self.len);
        // SAFETY: the range is a part of this mapping; none of the advices used here changes its contents.
        unsafe { rustix::mm::madvise(self.base.as_ptr().add(offset).cast(), len, advice) }
    }

    /// Zeroes a part that began as a file, by fresh memory: giving its pages back would bring the file's contents back.
    fn replace(&self, origin: &Origin, offset: usize, len: usize) -> rustix::io::Result<()> {
        let enough = origin.replaced.fetch_add(1, Ordering::Relaxed) >= MAX_REPLACED;
        if enough {
            origin.replaced.store(MAX_REPLACED, Ordering::Relaxed);
            // SAFETY: the range lies in this mapping, which is writable.
            unsafe { ptr::write_bytes(self.base.as_ptr().add(offset), 0, len) };
            return Ok(());
        }
        // SAFETY: the range lies in this mapping. Its contents become zeros, which is what is asked for; nobody holds a
        // reference into it.
        unsafe {
            rustix::mm::mmap_anonymous(
                self.base.as_ptr().add(offset).cast(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            )
        }?;
        // Only advice, and the zeros are there.
        let _ = self.advise(offset, len);
        Ok(())
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn backing(&self) -> Backing {
        self.backing
    }

    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Gives `len` bytes from `offset` on back to the host; they read as zeros then. Offset and length must be
    /// multiples of the backing's page size and within the mapping.
    pub(crate) fn discard(&self, offset: usize, len: usize) -> Result<(), Error> {
        debug_assert!(offset + len <= self.len);
        if let Some(file) = &self.file {
            rustix::fs::fallocate(
                file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                offset as u64,
                len as u64,
            )
        } else if let Some(origin) = self.origin.get() {
            self.replace(origin, offset, len)
        } else {
            // SAFETY: the range lies in this mapping. Its contents become zeros, which is what is asked for;
            // nobody holds a reference into it.
            unsafe {
                rustix::mm::madvise(
                    self.base.as_ptr().add(offset).cast(),
                    len,
                    Advice::LinuxDontNeed,
                )
            }
        }
        .map_err(|error| Error::system("giving guest memory back", error))
    }

    /// Gives the memory back but keeps the addresses mapped for good: for views that outlive their owner.
    pub(crate) fn leak_addresses(self) {
        // A failure leaves memory in use, which is all that can be done about it here.
        let _ = self.discard(0, self.len);
        std::mem::forget(self);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and views of it borrow or are counted by `GuestRam`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

fn memfd(len: u64, flags: MemfdFlags) -> Result<OwnedFd, Error> {
    let file = rustix::fs::memfd_create(c"guest-ram", flags | MemfdFlags::ALLOW_SEALING)
        .map_err(|error| Error::system("making a memfd for guest memory", error))?;
    rustix::fs::ftruncate(&file, len)
        .map_err(|error| Error::system("sizing the memfd for guest memory", error))?;
    // Whoever is given it could cut it otherwise, and end this process at the next access.
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)
        .map_err(|error| Error::system("sealing the memfd for guest memory", error))?;
    Ok(file)
}

/// Reserves `len` bytes of address space, congruent to `gpa` modulo `alignment`.
fn reserve(len: usize, gpa: u64, alignment: usize) -> Result<NonNull<u8>, Error> {
    let failed =
        |error: rustix::io::Errno| Error::system("reserving addresses for guest memory", error);
    let total = len
        .checked_add(alignment)
        .ok_or_else(|| failed(rustix::io::Errno::NOMEM))?;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            total,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .map_err(failed)?;
    let start = start.cast::<u8>();
    let skip = (gpa as usize).wrapping_sub(start.addr()) & (alignment - 1);
    let head = skip & !(PAGE_SIZE as usize - 1);
    let tail = total - head - len;
    // SAFETY: head and tail are parts of the reservation just made, outside of what is returned.
    unsafe {
        if head > 0 {
            rustix::mm::munmap(start.cast(), head).map_err(failed)?;
        }
        if tail > 0 {
            rustix::mm::munmap(start.add(head + len).cast(), tail).map_err(failed)?;
        }
        Ok(NonNull::new_unchecked(start.add(head)))
    }
}
