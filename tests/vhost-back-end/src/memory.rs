//! Guest memory as the front end describes it, and the log of what is written to it.

use std::fs::File;
use std::io::Result;
use std::sync::atomic::{AtomicU8, Ordering};

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};

/// Size of a page of the log.
const PAGE: u64 = 4096;

/// See the module's text.
#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) guest: GuestMemoryMmap,
    /// Address in the front end, guest-physical address, length.
    regions: Vec<(u64, u64, u64)>,
    log: Option<MmapRegion>,
    /// VHOST_F_LOG_ALL is on.
    pub(crate) logging: bool,
}

impl Memory {
    pub(crate) fn set(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<()> {
        let ranges = regions.iter().zip(files).map(|(region, file)| {
            let offset = FileOffset::new(file, region.mmap_offset);
            let gpa = GuestAddress(region.guest_phys_addr);
            (gpa, region.memory_size as usize, Some(offset))
        });
        self.guest =
            GuestMemoryMmap::from_ranges_with_files(ranges).map_err(std::io::Error::other)?;
        self.regions = regions
            .iter()
            .map(|region| (region.user_addr, region.guest_phys_addr, region.memory_size))
            .collect();
        Ok(())
    }

    /// Where the front end's address is in the guest.
    pub(crate) fn gpa(&self, address: u64) -> Result<u64> {
        let mut found = self.regions.iter().filter_map(|&(user, gpa, len)| {
            let within = address.checked_sub(user).filter(|within| *within < len)?;
            Some(gpa + within)
        });
        found
            .next()
            .ok_or_else(|| std::io::Error::other("an address outside of memory"))
    }

    pub(crate) fn set_log(&mut self, file: File, offset: u64, len: u64) -> Result<()> {
        let region = MmapRegion::from_file(FileOffset::new(file, offset), len as usize);
        self.log = Some(region.map_err(std::io::Error::other)?);
        Ok(())
    }

    /// Writes to the guest, and logs it.
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        self.guest
            .write_slice(bytes, GuestAddress(gpa))
            .map_err(std::io::Error::other)?;
        self.mark(gpa, bytes.len() as u64)
    }

    pub(crate) fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<()> {
        self.guest
            .read_slice(bytes, GuestAddress(gpa))
            .map_err(std::io::Error::other)
    }

    /// Logs a write.
    pub(crate) fn mark(&self, gpa: u64, len: u64) -> Result<()> {
        let (Some(log), true, true) = (&self.log, self.logging, len > 0) else {
            return Ok(());
        };
        for page in gpa / PAGE..=(gpa + len - 1) / PAGE {
            let log = log.as_volatile_slice();
            let byte = log
                .get_atomic_ref::<AtomicU8>((page / 8) as usize)
                .map_err(std::io::Error::other)?;
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
        Ok(())
    }
}
