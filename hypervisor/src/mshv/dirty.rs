//! The dirty log, from the access states of guest pages.
//!
//! ```text
//!   start: property GPA_PAGE_ACCESS_TRACKING = 1 (once, whatever slot comes first)
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
        let mut mapped = memory.write();
        let mapped = mapped
            .iter_mut()
            .find(|mapped| mapped.slot == slot)
            .ok_or_else(|| missing(slot))?;
        if seen.contains_key(&slot.slot) {
            return Ok(());
        }
        if seen.is_empty() {
            fd.enable_dirty_page_tracking()
                .map_err(call("HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING"))?;
        }
        let words = (slot.len / PAGE).div_ceil(64);
        seen.insert(
            slot.slot,
            vec![0; usize::try_from(words).unwrap_or(usize::MAX)],
        );
        mapped.emulated = Some(marks(slot));
        Ok(())
    }

    /// See [`crate::Vm::stop_dirty_log`].
    pub(crate) fn stop(&self, fd: &VmFd, memory: &Memory, slot: MemorySlot) -> Result<()> {
        let mut seen = self.seen();
        if seen.remove(&slot.slot).is_none() {
            return Ok(());
        }
        if let Some(mapped) = memory.write().iter_mut().find(|mapped| mapped.slot == slot) {
            mapped.emulated = None;
            access_states(fd, slot, MSHV_GPAP_ACCESS_OP_SET, |_, _| {})?;
        }
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
        access_states(fd, slot, MSHV_GPAP_ACCESS_OP_CLEAR, |first, part| {
            let first = (first / 64) as usize;
            for (word, new) in seen.iter_mut().skip(first).zip(part) {
                *word |= new;
            }
        })?;
        if let Some(marks) = &mapped.emulated {
            add_marks(marks, seen, true);
        }
        for (word, seen) in words.iter_mut().zip(seen) {
            *word |= std::mem::take(seen);
        }
        Ok(())
    }

    /// The slot goes.
    pub(crate) fn forget(&self, fd: &VmFd, slot: MemorySlot) -> Result<()> {
        let mut seen = self.seen();
        if seen.remove(&slot.slot).is_some() && seen.is_empty() {
            fd.disable_dirty_page_tracking()
                .map_err(call("HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING"))?;
        }
        Ok(())
    }
}

/// Reads the access states of a slot's pages, does `operation` to them, and hands each batch to `sink` with the index of its first page.
fn access_states(
    fd: &VmFd,
    slot: MemorySlot,
    operation: u32,
    mut sink: impl FnMut(u64, &[u64]),
) -> Result<()> {
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
            .map_err(call("MSHV_GET_GPAP_ACCESS_BITMAP"))?;
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
