//! Guest memory: regions, how the guest's pages are reached from here, and which of them were written.
//!
//! A region is a KVM memory slot. With page access tracking on, every slot logs its writes; what KVM hands over is
//! collected in a bitmap of our own, because the driver's interface clears and sets single ranges.

use kvm_bindings::*;
use mshv_bindings::*;

use crate::kvm::Vm;
use crate::status::{self, Status};
use crate::sys::{Answer, note};

/// Bytes of a page, the unit of everything here.
pub(crate) const PAGE: u64 = 4096;

/// One mapping made by MSHV_SET_GUEST_MEMORY.
#[derive(Debug)]
pub(crate) struct Region {
    slot: u32,
    pub(crate) first_pfn: u64,
    pub(crate) pages: u64,
    address: u64,
    pub(crate) writable: bool,
    /// One bit a page; meaningful only while tracking.
    dirty: Vec<u64>,
}

impl Region {
    fn contains(&self, pfn: u64) -> bool {
        pfn >= self.first_pfn && pfn - self.first_pfn < self.pages
    }

    fn contains_address(&self, address: u64) -> bool {
        address >= self.address && address - self.address < self.pages * PAGE
    }

    fn slot(&self, tracking: bool) -> kvm_userspace_memory_region {
        let read_only = if self.writable { 0 } else { KVM_MEM_READONLY };
        // KVM has no use for a log of a slot that cannot be written.
        let log = if tracking && self.writable {
            KVM_MEM_LOG_DIRTY_PAGES
        } else {
            0
        };
        kvm_userspace_memory_region {
            slot: self.slot,
            flags: read_only | log,
            guest_phys_addr: self.first_pfn * PAGE,
            memory_size: self.pages * PAGE,
            userspace_addr: self.address,
        }
    }

    /// Moves what KVM logged since the last time into `dirty`.
    fn harvest(&mut self, vm: &Vm) -> Answer<()> {
        if !self.writable {
            return Ok(());
        }
        let mut fresh = vec![0u64; self.dirty.len()];
        let mut log = kvm_dirty_log {
            slot: self.slot,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = fresh.as_mut_ptr().cast();
        vm.get_dirty_log(&log)?;
        self.dirty
            .iter_mut()
            .zip(fresh)
            .for_each(|(kept, new)| *kept |= new);
        Ok(())
    }
}

/// All memory of a partition.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    regions: Vec<Region>,
    tracking: bool,
}

impl Memory {
    pub(crate) fn region(&self, pfn: u64) -> Option<&Region> {
        self.regions.iter().find(|region| region.contains(pfn))
    }

    /// Copies from guest memory; false if a page is not mapped. Never crosses out of a region silently.
    pub(crate) fn read(&self, gpa: u64, buffer: &mut [u8]) -> bool {
        let mut done = 0;
        while done < buffer.len() {
            let at = gpa.wrapping_add(done as u64);
            let Some(region) = self.region(at / PAGE) else {
                return false;
            };
            let length = (buffer.len() - done).min((PAGE - at % PAGE) as usize);
            let source = region.address + (at - region.first_pfn * PAGE);
            // SAFETY: the client mapped the region's pages at this address and keeps them for as long as it is mapped,
            // as the driver's interface demands; the guest may write at the same time, and any bytes will do.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    source as *const u8,
                    buffer[done..].as_mut_ptr(),
                    length,
                );
            }
            done += length;
        }
        true
    }

    /// MSHV_SET_GUEST_MEMORY, with the checks of `mshv_partition_ioctl_set_memory`.
    pub(crate) fn set(&mut self, vm: &Vm, asked: &mshv_user_mem_region) -> Answer<()> {
        let flags = u32::from(asked.flags);
        if asked.size == 0
            || !asked.size.is_multiple_of(PAGE)
            || !asked.userspace_addr.is_multiple_of(PAGE)
            || flags >> MSHV_SET_MEM_BIT_COUNT != 0
            || asked.rsvd != [0; 7]
        {
            note!(
                "SET_GUEST_MEMORY: size, alignment, flags or reserved bytes are wrong: {asked:x?}"
            );
            return Err(libc::EINVAL);
        }
        if flags >> MSHV_SET_MEM_BIT_UNMAP & 1 != 0 {
            self.unmap(vm, asked)
        } else {
            self.map(vm, asked)
        }
    }

    fn map(&mut self, vm: &Vm, asked: &mshv_user_mem_region) -> Answer<()> {
        let pages = asked.size / PAGE;
        let Some(last) = asked
            .guest_pfn
            .checked_add(pages - 1)
            .filter(|last| *last < 1 << 40)
        else {
            return Err(libc::EINVAL);
        };
        let last_address = asked
            .userspace_addr
            .checked_add(asked.size - 1)
            .ok_or(libc::EINVAL)?;
        let overlaps = self.regions.iter().any(|region| {
            (asked.guest_pfn < region.first_pfn + region.pages && region.first_pfn <= last)
                || region.contains_address(asked.userspace_addr)
                || region.contains_address(last_address)
        });
        if overlaps {
            note!("SET_GUEST_MEMORY: overlaps a mapping, in guest or in user space: {asked:x?}");
            return Err(libc::EEXIST);
        }
        let slot = (0..)
            .find(|slot| self.regions.iter().all(|region| region.slot != *slot))
            .unwrap_or(0);
        let writable = asked.flags & 1 << MSHV_SET_MEM_BIT_WRITABLE != 0;
        // A page that was never looked at counts as dirty, as in a second-level page table whose dirty bits nobody
        // cleared yet.
        let dirty = vec![u64::MAX; pages.div_ceil(64) as usize];
        let region = Region {
            slot,
            first_pfn: asked.guest_pfn,
            pages,
            address: asked.userspace_addr,
            writable,
            dirty,
        };
        vm.set_memory(&region.slot(self.tracking))?;
        self.regions.push(region);
        Ok(())
    }

    fn unmap(&mut self, vm: &Vm, asked: &mshv_user_mem_region) -> Answer<()> {
        let found = self.regions.iter().position(|region| {
            region.first_pfn == asked.guest_pfn
                && region.address == asked.userspace_addr
                && region.pages == asked.size / PAGE
        });
        let Some(index) = found else {
            note!("SET_GUEST_MEMORY: unmaps what is not mapped exactly so: {asked:x?}");
            return Err(libc::EINVAL);
        };
        let region = self.regions.swap_remove(index);
        let nothing = kvm_userspace_memory_region {
            memory_size: 0,
            flags: 0,
            ..region.slot(false)
        };
        // The driver goes on when unmapping fails; so does the double.
        let _ = vm.set_memory(&nothing);
        Ok(())
    }

    pub(crate) fn tracking(&self) -> bool {
        self.tracking
    }

    /// HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING. All pages count as dirty when it is switched on; it can be
    /// switched off only when all are dirty again (see `disable_dirty_page_tracking` in mshv-ioctls).
    pub(crate) fn track(&mut self, vm: &Vm, on: bool) -> Result<(), Status> {
        if self.tracking == on {
            return Ok(());
        }
        for region in &mut self.regions {
            if on {
                region.dirty.fill(u64::MAX);
            } else {
                region.harvest(vm).map_err(|_| status::OperationFailed)?;
                if (0..region.pages)
                    .any(|page| region.dirty[(page / 64) as usize] >> (page % 64) & 1 == 0)
                {
                    note!("page access tracking switched off while dirty bits are clear");
                    return Err(status::OperationDenied);
                }
            }
        }
        for region in &self.regions {
            vm.set_memory(&region.slot(on))
                .map_err(|_| status::OperationFailed)?;
        }
        self.tracking = on;
        Ok(())
    }

    /// The dirty bits of `count` pages from `base`, one byte a page, and what `change` makes of them afterwards.
    /// Fails at the first page that is not mapped, as the hypercall does.
    pub(crate) fn dirty(
        &mut self,
        vm: &Vm,
        base: u64,
        count: u64,
        change: Option<bool>,
        mut report: impl FnMut(u64, bool),
    ) -> Result<(), Status> {
        if !self.tracking {
            note!("page access states asked for without tracking");
            return Err(status::OperationDenied);
        }
        let mut done = 0;
        while done < count {
            let pfn = base.checked_add(done).ok_or(status::InvalidParameter)?;
            let Some(region) = self.regions.iter_mut().find(|region| region.contains(pfn)) else {
                note!("page access states: guest page {pfn:#x} is not mapped");
                return Err(status::InvalidParameter);
            };
            region.harvest(vm).map_err(|_| status::OperationFailed)?;
            let first = pfn - region.first_pfn;
            let last = (first + (count - done)).min(region.pages);
            for page in first..last {
                let word = &mut region.dirty[(page / 64) as usize];
                let bit = 1 << (page % 64);
                report(done + (page - first), *word & bit != 0);
                match change {
                    Some(true) => *word |= bit,
                    Some(false) => *word &= !bit,
                    None => {}
                }
            }
            done += last - first;
        }
        Ok(())
    }
}
