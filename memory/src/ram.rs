//! The guest's RAM as a whole.

use std::fs::File;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::backing::Mapping;
use crate::layout::check_ranges;
use crate::present::Presence;
use crate::{
    Backing, Error, GuestMemoryMmap, GuestPages, PAGE_SIZE, PageBitmap, RamRange, populated,
};

/// Zeroing fewer bytes than this is done by writing zeros: giving a page back would split its huge page.
const DISCARD_AT_LEAST: u64 = 2 << 20;

/// One RAM range and the memory behind it.
#[derive(Debug)]
pub struct RamRegion {
    range: RamRange,
    // An Option only so that drop can take it.
    mapping: Option<Mapping>,
    view: Option<Arc<GuestRegionMmap<AtomicBitmap>>>,
    presence: Presence,
}

impl RamRegion {
    /// The guest-physical addresses.
    pub fn range(&self) -> RamRange {
        self.range
    }

    /// First guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.range.gpa
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> u64 {
        self.range.len
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.range.len / PAGE_SIZE
    }

    /// Host virtual address of the first byte.
    pub fn hva(&self) -> u64 {
        self.mapping().base().as_ptr().addr() as u64
    }

    /// The file behind the memory, if it is shared memory.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.mapping().file()
    }

    fn mapping(&self) -> &Mapping {
        self.mapping.as_ref().expect("taken only by drop")
    }
}

/// The guest's RAM. The memory is given back to the host on drop.
///
/// A clone of [`GuestRam::guest_memory`] that is still alive then keeps its addresses reserved, and reads zeros.
#[derive(Debug)]
pub struct GuestRam {
    // Dropped before the regions; see `Drop`.
    guest_memory: GuestMemoryMmap,
    regions: Vec<RamRegion>,
    backing: Backing,
    total: u64,
    /// Opened once, early: a sandbox may come later.
    pagemap: Option<File>,
    /// Its pages must stay where they are.
    pinned: AtomicBool,
}

impl GuestRam {
    /// Maps fresh memory, all zero and not resident, for `ranges` (see [`crate::layout::ram_ranges`]).
    ///
    /// Refuses more than the host has at all; what is free at the moment is not looked at, since guests seldom use
    /// all they have.
    pub fn new(ranges: &[RamRange], backing: Backing) -> Result<Self, Error> {
        let total = check_ranges(ranges)?;
        check_host(total, backing)?;
        let mut regions = Vec::with_capacity(ranges.len());
        for &range in ranges {
            regions.push(map_region(range, backing)?);
        }
        let views = regions
            .iter()
            .filter_map(|region| region.view.clone())
            .collect();
        let guest_memory = GuestMemoryMmap::from_arc_regions(views).map_err(|error| {
            Error::system("arranging guest memory", std::io::Error::other(error))
        })?;
        Ok(Self {
            guest_memory,
            regions,
            backing,
            total,
            pagemap: File::open("/proc/self/pagemap").ok(),
            pinned: AtomicBool::new(false),
        })
    }

    /// The regions, lowest address first.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// What the memory is made of.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Size of all regions together, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total
    }

    /// The view for loaders and devices. What is written through it shows in [`GuestRam::take_device_dirty`].
    pub fn guest_memory(&self) -> &GuestMemoryMmap {
        &self.guest_memory
    }

    /// Adds to `into` the pages written through [`GuestRam::guest_memory`] since the last call, and forgets them.
    ///
    /// Each page is marked after it is written, so a page read after this call is either new or marked again.
    /// An index past the last region does nothing.
    pub fn take_device_dirty(&self, region: usize, into: &mut PageBitmap) {
        let Some(view) = self
            .regions
            .get(region)
            .and_then(|region| region.view.as_ref())
        else {
            return;
        };
        into.or_words(&view.bitmap().get_and_reset());
    }

    /// Puts the contents of a file, from `offset` on, in place of a region's memory, whatever it holds: for memory that nothing
    /// has used yet. Returns at once, however large the region is: pages are read from the file when they are first used.
    ///
    /// The mapping is private. What is written stays here, the file is never changed, and any number of machines may begin as
    /// the same file. It must not be changed while the memory lives (its name may go): pages not used yet would change too, and
    /// using one beyond the end of a file that was cut ends the process with SIGBUS.
    ///
    /// Only for [`Backing::Anonymous`], once a region, and for a regular file that is long enough; anything else is refused
    /// and the memory stays as it is.
    pub fn map_file(&self, region: usize, file: File, offset: u64) -> Result<(), Error> {
        if self.is_pinned() {
            return Err(Error::MapFile {
                reason: "the hypervisor has pinned the guest's memory",
            });
        }
        self.region(region, 0, 0)?.mapping().map_file(file, offset)
    }

    /// Says that pages of a region come or go, in blocks of [`crate::BLOCK_SIZE`] from its start on: a block that lies in `pages` whole
    /// goes, one that `pages` touches comes. In a fresh region all are there. What an absent block holds is nobody's: it is not
    /// [populated](GuestRam::populated). It stays mapped, and keeps what it holds.
    pub fn set_present(&self, region: usize, pages: Range<u64>, present: bool) {
        if let Some(region) = self.regions.get(region) {
            region.presence.set(region.pages(), pages, present);
        }
    }

    /// Finds out whether a hypervisor's driver has pinned the memory, which it does when memory is mapped into the guest or never: to be called
    /// then, before anything has used the memory. Where the host does not tell, it is taken to be pinned.
    pub fn find_pinning(&self) {
        let mut found = PageBitmap::new(1);
        let last = self.regions.len().saturating_sub(1);
        if self.populated_in(last, 0..1, &mut found).is_ok() {
            self.pinned.store(found.get(0), Ordering::Relaxed);
        }
    }

    /// Whether it was found to be pinned: then nothing is given back to the host, and no file can be mapped in its place.
    pub fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed)
    }

    /// The pages of a region that may hold something else than zeros, found without touching any. Where the host
    /// does not tell, every page. Those of absent blocks are left out.
    pub fn populated(&self, region: usize) -> Result<PageBitmap, Error> {
        let pages = self.region(region, 0, 0)?.pages();
        let mut found = PageBitmap::new(pages);
        self.populated_in(region, 0..pages, &mut found)?;
        Ok(found)
    }

    /// As [`GuestRam::populated`], but looks only at `pages` and adds what it finds to `into`.
    pub fn populated_in(
        &self,
        region: usize,
        pages: Range<u64>,
        into: &mut PageBitmap,
    ) -> Result<(), Error> {
        let count = pages.end.saturating_sub(pages.start);
        let region = self.region(region, pages.start, count)?;
        if count == 0 {
            return Ok(());
        }
        for part in region.presence.parts(pages) {
            let pagemap = self.pagemap.as_ref();
            if populated::find(region.mapping(), pagemap, part.clone(), into).is_err() {
                into.set_range(part);
            }
        }
        Ok(())
    }

    /// A view of `pages` pages of a region, from its page `first_page` on.
    pub fn pages(
        &self,
        region: usize,
        first_page: u64,
        pages: u64,
    ) -> Result<GuestPages<'_>, Error> {
        let region = self.region(region, first_page, pages)?;
        // SAFETY: the pages lie in the region, which stays mapped while `self` is borrowed.
        Ok(unsafe {
            let base = region
                .mapping()
                .base()
                .add((first_page * PAGE_SIZE) as usize);
            GuestPages::new(base, pages)
        })
    }

    /// Makes pages read as zeros: large runs are given back to the host, small ones overwritten. No dirty bit is
    /// set.
    pub fn zero(&self, region: usize, first_page: u64, pages: u64) -> Result<(), Error> {
        if pages * PAGE_SIZE >= DISCARD_AT_LEAST {
            self.discard(region, first_page, pages)
        } else {
            self.pages(region, first_page, pages)?.fill_zero();
            Ok(())
        }
    }

    /// Gives pages back to the host, as far as they fill pages of the backing, and zeroes the rest: all read as
    /// zeros afterwards. No dirty bit is set.
    pub fn discard(&self, region: usize, first_page: u64, pages: u64) -> Result<(), Error> {
        let whole = self.pages(region, first_page, pages)?;
        if self.is_pinned() {
            whole.fill_zero();
            return Ok(());
        }
        let mapping = self.region(region, first_page, pages)?.mapping();
        let unit = self.backing.page_size() / PAGE_SIZE;
        let end = first_page + pages;
        let inner = first_page.next_multiple_of(unit)..end / unit * unit;
        if inner.start >= inner.end {
            whole.fill_zero();
            return Ok(());
        }
        whole.part(0, inner.start - first_page).fill_zero();
        whole
            .part(inner.end - first_page, end - inner.end)
            .fill_zero();
        mapping.discard(
            (inner.start * PAGE_SIZE) as usize,
            ((inner.end - inner.start) * PAGE_SIZE) as usize,
        )
    }

    /// The region, after checking that the pages lie in it.
    fn region(&self, region: usize, first_page: u64, pages: u64) -> Result<&RamRegion, Error> {
        let found = self.regions.get(region);
        let region_pages = found.map_or(0, RamRegion::pages);
        match (found, first_page.checked_add(pages)) {
            (Some(found), Some(end)) if end <= region_pages => Ok(found),
            _ => Err(Error::OutOfRange {
                region,
                first_page,
                pages,
                region_pages,
            }),
        }
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        self.guest_memory = GuestMemoryMmap::default();
        for region in &mut self.regions {
            let (Some(view), Some(mapping)) = (region.view.take(), region.mapping.take()) else {
                continue;
            };
            // A clone of the view, made by a loader or a device, may live on. Its addresses must then stay mapped.
            let last = Arc::into_inner(view).is_some_and(|view| {
                let mut inner = view.get_mmap();
                drop(view);
                Arc::get_mut(&mut inner).is_some()
            });
            if last {
                drop(mapping);
            } else {
                mapping.leak_addresses();
            }
        }
    }
}

fn map_region(range: RamRange, backing: Backing) -> Result<RamRegion, Error> {
    let mapping = Mapping::new(range, backing)?;
    let bitmap = AtomicBitmap::with_len(mapping.len());
    let flags = match backing {
        Backing::Anonymous { .. } => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        Backing::Memfd { .. } | Backing::Hugetlbfs { .. } => libc::MAP_SHARED,
    };
    let builder = MmapRegionBuilder::new_with_bitmap(mapping.len(), bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    // SAFETY: the mapping is there, is this long, and `GuestRam` unmaps it only when no view is left.
    let region = unsafe { builder.with_raw_mmap_pointer(mapping.base().as_ptr()) }
        .build()
        .map_err(|error| Error::system("arranging guest memory", std::io::Error::other(error)))?;
    let view = GuestRegionMmap::new(region, GuestAddress(range.gpa)).ok_or(Error::Range {
        gpa: range.gpa,
        len: range.len,
        reason: "it ends beyond 64 bits",
    })?;
    Ok(RamRegion {
        range,
        mapping: Some(mapping),
        view: Some(Arc::new(view)),
        presence: Presence::default(),
    })
}

/// Refuses what the host cannot ever provide.
fn check_host(wanted: u64, backing: Backing) -> Result<(), Error> {
    let (available, what, advice) = match backing {
        Backing::Anonymous { .. } | Backing::Memfd { .. } => (meminfo_total(), "the host has", ""),
        Backing::Hugetlbfs { page_size } => (
            huge_page_pool(page_size)?,
            "the host's pool of free huge pages of this size has",
            ", or add huge pages in /sys/kernel/mm/hugepages",
        ),
    };
    match available {
        Some(available) if wanted > available => Err(Error::TooLarge {
            wanted,
            available,
            what,
            advice,
        }),
        _ => Ok(()),
    }
}

/// The host's memory in bytes, from /proc/meminfo, if that can be read.
fn meminfo_total() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Bytes that the pool of huge pages can still give, if that can be read.
fn huge_page_pool(page_size: u64) -> Result<Option<u64>, Error> {
    let folder = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_size / 1024);
    if !std::path::Path::new(&folder).exists() {
        return match std::path::Path::new("/sys/kernel/mm").exists() {
            true => Err(Error::HugePage {
                page_size,
                reason: "the host has no pool of them",
            }),
            false => Ok(None),
        };
    }
    let number = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("{folder}/{name}"))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let free = || {
        let free = number("free_hugepages")?.saturating_sub(number("resv_hugepages")?);
        let surplus =
            number("nr_overcommit_hugepages")?.saturating_sub(number("surplus_hugepages")?);
        (free + surplus).checked_mul(page_size)
    };
    Ok(free())
}

#[cfg(test)]
#[path = "ram_tests.rs"]
mod tests;
