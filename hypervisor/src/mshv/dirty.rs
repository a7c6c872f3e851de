//! The dirty log, from the access states of guest pages.
//!
//! ```text
//!   start: property GPA_PAGE_ACCESS_TRACKING = 1 (once, whatever slot comes first); the slot's pages are marked clean
//!   fetch: MSHV_GET_GPAP_ACCESS_BITMAP(dirty, clear): look and re-arm in one step ──► words |= bitmap | emulated writes
//!   stop:  MSHV_GET_GPAP_ACCESS_BITMAP(dirty, set) for the slot; the property = 0 when no slot is tracked any more
//! ```
//!
//! The hypervisor has no way to look without re-arming: the driver turns "no operation" into "set" (Linux
//! `drivers/hv/mshv_root_main.c`), so [`crate::Capabilities::manual_dirty_protect`] is "no" here and every fetch clears. The pages are marked
//! dirty when tracking ends, as the hypervisor wants it: a page that is known to be clean costs it a fault when it is written.
//!
//! A fetch that fails half way has re-armed pages that nobody has been told of. What was seen is kept ([`Tracking::seen`]) and
//! belongs to the next fetch.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mshv_bindings::{
    MSHV_GPAP_ACCESS_OP_CLEAR, MSHV_GPAP_ACCESS_OP_SET, MSHV_GPAP_ACCESS_TYPE_DIRTY,
};
use mshv_ioctls::VmFd;

use super::call;
use crate::guest_memory::{Memory, PAGE, add_marks, marks};
use crate::{Error, MemorySlot, Result};

/// Pages of one call: the kernel makes a table of them.
const BATCH: u64 = 0x10000;

/// Which slots are tracked.
#[derive(Default)]
pub(crate) struct Tracking {
    slots: Mutex<HashMap<u32, Vec<u64>>>,
}

impl Tracking {
    /// Dirty pages of each tracked slot that were seen and re-armed but not handed out.
    fn seen(&self) -> MutexGuard<'_, HashMap<u32, Vec<u64>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`crate::Vm::start_dirty_log`].
    pub(crate) fn start(&self, fd: &VmFd, memory: &Memory, slot: MemorySlot) -> Result<()> {
        let mut seen = self.seen();
        if seen.contains_key(&slot.slot) {
            return Ok(());
        }
        memory
            .write()
            .iter_mut()
            .find(|mapped| mapped.slot == slot)
            .ok_or_else(|| missing(slot))?
            .emulated = Some(marks(slot));
        if seen.is_empty() {
            fd.enable_dirty_page_tracking()
                .map_err(call("HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING"))?;
        }
        let words = (slot.len / PAGE).div_ceil(64);
        let words = usize::try_from(words).unwrap_or(usize::MAX);
        seen.insert(slot.slot, vec![0; words]);
        // What was written before does not count.
        access_states(fd, slot, MSHV_GPAP_ACCESS_OP_CLEAR, |_, _| {}).map_err(|(_, error)| error)
    }

    /// See [`crate::Vm::stop_dirty_log`].
    pub(crate) fn stop(&self, fd: &VmFd, memory: &Memory, slot: MemorySlot) -> Result<()> {
        Self::end(&mut self.seen(), fd, memory, slot)
    }

    /// Ends tracking and takes the slot away by `unmap`, with nobody able to start it in between.
    pub(crate) fn unmap(
        &self,
        fd: &VmFd,
        memory: &Memory,
        slot: MemorySlot,
        unmap: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut seen = self.seen();
        // While it is mapped: its pages must not stay write-protected in the hypervisor.
        Self::end(&mut seen, fd, memory, slot)?;
        let mut slots = memory.write();
        unmap()?;
        slots.retain(|known| known.slot != slot);
        Ok(())
    }

    fn end(
        seen: &mut HashMap<u32, Vec<u64>>,
        fd: &VmFd,
        memory: &Memory,
        slot: MemorySlot,
    ) -> Result<()> {
        if seen.remove(&slot.slot).is_none() {
            return Ok(());
        }
        if let Some(mapped) = memory.write().iter_mut().find(|mapped| mapped.slot == slot) {
            mapped.emulated = None;
        }
        access_states(fd, slot, MSHV_GPAP_ACCESS_OP_SET, |_, _| {}).map_err(|(_, error)| error)?;
        if seen.is_empty() {
            fd.disable_dirty_page_tracking()
                .map_err(call("HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING"))?;
        }
        Ok(())
    }

    /// See [`crate::Vm::fetch_dirty_log`].
    pub(crate) fn fetch(
        &self,
        fd: &VmFd,
        memory: &Memory,
        slot: MemorySlot,
        words: &mut [u64],
    ) -> Result<()> {
        let mut seen = self.seen();
        let memory = memory.read();
        let mapped = memory
            .iter()
            .find(|mapped| mapped.slot == slot)
            .ok_or_else(|| missing(slot))?;
        let seen = seen.get_mut(&slot.slot).ok_or_else(|| {
            Error::Invalid(format!(
                "the dirty log of memory slot {} is not on",
                slot.slot
            ))
        })?;
        let given = words.len();
        let words = words.get_mut(..seen.len()).ok_or_else(|| {
            Error::Invalid(format!(
                "{given} words cannot hold the dirty log of {} pages",
                slot.len / PAGE
            ))
        })?;
        let fetched = access_states(fd, slot, MSHV_GPAP_ACCESS_OP_CLEAR, |first, part| {
            let first = (first / 64) as usize;
            for (word, new) in seen.iter_mut().skip(first).zip(part) {
                *word |= new;
            }
        });
        if let Err((first, error)) = fetched {
            // The driver may have re-armed any part of this batch without saying what it saw.
            let first = (first / 64) as usize;
            let batch = seen.iter_mut().skip(first).take((BATCH / 64) as usize);
            batch.for_each(|word| *word = u64::MAX);
            return Err(error);
        }
        if let Some(marks) = &mapped.emulated {
            add_marks(marks, seen, true);
        }
        for (word, seen) in words.iter_mut().zip(seen) {
            *word |= std::mem::take(seen);
        }
        Ok(())
    }
}

/// Reads the access states of a slot's pages, does `operation` to them, and hands each batch to `sink` with the index of its first page.
/// A failure says at which page the batch begins that failed.
fn access_states(
    fd: &VmFd,
    slot: MemorySlot,
    operation: u32,
    mut sink: impl FnMut(u64, &[u64]),
) -> std::result::Result<(), (u64, Error)> {
    let pages = slot.len / PAGE;
    let mut first = 0;
    while first < pages {
        let count = (pages - first).min(BATCH);
        let part = fd
            .get_gpap_access_bitmap(
                slot.gpa / PAGE + first,
                count,
                MSHV_GPAP_ACCESS_TYPE_DIRTY as u8,
                operation as u8,
            )
            .map_err(|error| (first, call("MSHV_GET_GPAP_ACCESS_BITMAP")(error)))?;
        sink(first, &part);
        first += count;
    }
    Ok(())
}

fn missing(slot: MemorySlot) -> Error {
    Error::Invalid(format!(
        "memory slot {} is not mapped as it is said to be",
        slot.slot
    ))
}
