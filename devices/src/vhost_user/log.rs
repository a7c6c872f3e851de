//! Pages that a back end has written: a bitmap in memory that both sides map (vhost-user specification, "Migration").

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use memory::{GuestMemoryMmap, PAGE_SIZE};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Bit `n % 8` of byte `n / 8` is the page at guest-physical address `n * 4096`.
#[derive(Debug)]
pub(super) struct DirtyLog {
    file: OwnedFd,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread and is reached by atomic accesses only.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// An empty one for all of `memory`.
    pub(super) fn new(memory: &GuestMemoryMmap) -> io::Result<Self> {
        let pages = memory.last_addr().0 / PAGE_SIZE + 1;
        let len = pages.div_ceil(8).next_multiple_of(PAGE_SIZE);
        let file = rustix::fs::memfd_create(
            c"vhost-log",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        rustix::fs::ftruncate(&file, len)?;
        // A back end that cuts it would end this process at the next look.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, base, len })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// In bytes.
    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, a multiple of pages long, lives as long as `self`, and is shared memory that is reached by
        // atomic accesses alone on this side.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / 8) }
    }

    /// Marks in `memory`'s own bitmap what has been written, and forgets it. Marks outside of RAM count for nothing.
    pub(super) fn collect(&self, memory: &GuestMemoryMmap) {
        for (word, number) in self.words().iter().zip(0u64..) {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = u64::from_le(word.swap(0, Ordering::SeqCst));
            while bits != 0 {
                let page = number * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                let address = GuestAddress(page * PAGE_SIZE);
                if let Some((region, within)) = memory.to_region_addr(address) {
                    let len = PAGE_SIZE.min(region.len() - within.0);
                    region.bitmap().mark_dirty(within.0 as usize, len as usize);
                }
            }
        }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no reference into it outlives a call.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use memory::{Backing, GuestRam, PageBitmap, RamRange};

    use super::*;

    #[test]
    fn marks_become_dirty_pages_once() {
        let ranges = [
            RamRange {
                gpa: 0,
                len: 1 << 20,
            },
            RamRange {
                gpa: 1 << 32,
                len: 1 << 20,
            },
        ];
        let ram = GuestRam::new(&ranges, Backing::Memfd { thp: false }).expect("memory");
        let log = DirtyLog::new(ram.guest_memory()).expect("a log");
        assert_eq!(
            log.len(),
            ((1u64 << 32) + (1 << 20)) / 4096 / 8 / 4096 * 4096 + 4096
        );
        let set = |page: usize| {
            log.words()[page / 64].fetch_or((1u64 << (page % 64)).to_le(), Ordering::SeqCst);
        };
        // In both regions, and where there is none.
        for page in [3, 255, 256, 5000, (1 << 20) + 7] {
            set(page);
        }
        log.collect(ram.guest_memory());
        let dirty = |region| {
            let mut pages = PageBitmap::new(256);
            ram.take_device_dirty(region, &mut pages);
            pages.runs().collect::<Vec<_>>()
        };
        assert_eq!(dirty(0), [(3, 1), (255, 1)]);
        assert_eq!(dirty(1), [(7, 1)]);
        log.collect(ram.guest_memory());
        assert_eq!(dirty(0), []);
    }
}
