//! The dirty log.
//!
//! ```text
//!   start ──► fetch ──► clear (re-arm) ──► read the pages ──► fetch ──► … ──► stop
//!             (marks      (a write after this is seen by
//!              stay)       the next fetch)
//! ```
//!
//! With manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) a fetch only looks; the marks go, page by page, with a clear. A
//! page written between the two keeps its mark or is marked again, so clear-then-read loses nothing. Without it KVM clears
//! and re-arms everything in the fetch itself.

use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;

use super::vm::{KvmVm, pages};
use super::{call, ioctl};
use crate::guest_memory::{add_marks, clear_marks};
use crate::{Error, MemorySlot, Result};

/// Most pages one KVM_CLEAR_DIRTY_LOG can name: a `u32`, rounded down to whole words.
const CLEAR_MAX: u64 = (u32::MAX - 63) as u64;

impl KvmVm {
    /// See [`crate::Vm::fetch_dirty_log`].
    pub(super) fn fetch_dirty(&self, slot: MemorySlot, words: &mut [u64]) -> Result<()> {
        let slot = self.mapped(slot)?;
        let pages = pages(slot);
        let len = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        let given = words.len();
        let words = words.get_mut(..len).ok_or_else(|| {
            Error::Invalid(format!(
                "{given} words cannot hold the dirty log of {pages} pages"
            ))
        })?;
        let fetch = |into: &mut [u64]| {
            ioctl::get_dirty_log(&self.shared.fd, slot.slot, pages, into)
                .map_err(call("KVM_GET_DIRTY_LOG"))
        };
        // KVM overwrites; with nothing to keep it may write straight into the caller's words.
        if words.iter().all(|&word| word == 0) {
            fetch(words)?;
        } else {
            let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
            if scratch.len() < len {
                scratch.resize(len, 0);
            }
            fetch(&mut scratch[..len])?;
            for (word, new) in words.iter_mut().zip(scratch.iter()) {
                *word |= new;
            }
        }
        // Without manual protection a fetch forgets.
        let forget = self.shared.host.dirty_protect == 0;
        self.with_marks(slot, |marks| add_marks(marks, words, forget));
        Ok(())
    }

    /// Hands out the marks of what was emulated here, which KVM does not see.
    fn with_marks(&self, slot: MemorySlot, then: impl FnOnce(&[AtomicU64])) {
        let slots = self.shared.memory.read();
        let known = slots.iter().find(|known| known.slot == slot);
        if let Some(marks) = known.and_then(|known| known.emulated.as_ref()) {
            then(marks);
        }
    }

    /// See [`crate::Vm::clear_dirty_log`].
    pub(super) fn clear_dirty(
        &self,
        slot: MemorySlot,
        first_page: u64,
        count: u64,
        words: &[u64],
    ) -> Result<()> {
        let slot = self.mapped(slot)?;
        let end = first_page
            .checked_add(count)
            .filter(|&end| end <= pages(slot));
        let aligned =
            first_page.is_multiple_of(64) && (count.is_multiple_of(64) || end == Some(pages(slot)));
        if end.is_none() || !aligned || (words.len() as u64) < count.div_ceil(64) {
            return Err(Error::Invalid(format!(
                "cannot clear the dirty log of {count} pages from page {first_page} on with {} words: slot {} has {} pages",
                words.len(),
                slot.slot,
                pages(slot)
            )));
        }
        if self.shared.host.dirty_protect == 0 {
            return Ok(());
        }
        self.with_marks(slot, |marks| {
            clear_marks(marks, (first_page / 64) as usize, words);
        });
        let mut done = 0;
        while done < count {
            let now = (count - done).min(CLEAR_MAX);
            // Both fit: `now` is below 2^32, and `done` counts words of a slice that is in memory.
            let (now32, word) = (now as u32, (done / 64) as usize);
            ioctl::clear_dirty_log(
                &self.shared.fd,
                slot.slot,
                first_page + done,
                now32,
                &words[word..],
            )
            .map_err(call("KVM_CLEAR_DIRTY_LOG"))?;
            done += now;
        }
        Ok(())
    }
}
