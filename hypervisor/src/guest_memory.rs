//! Guest memory as the hypervisor knows it, and what our own writes to it have dirtied.
//!
//! ```text
//!   map / unmap ──► slots ──► the hypervisor's second-level address translation
//!                     │
//!                     └─ find(gpa) ──► host address, for the instruction emulator
//!                          write ──► emulated[page] = 1 ──► OR-ed into the next fetch of the dirty log
//! ```
//!
//! The hypervisor tracks what the *guest* writes. When an instruction is emulated here (MOVS from a device into RAM, say) its writes
//! go through this process's mapping, which the hypervisor does not see: they are noted here, or a move would lose them.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::{Error, MemorySlot, Result};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// A mapped slot.
pub(crate) struct Mapped {
    /// As it was mapped.
    pub slot: MemorySlot,
    /// Pages written by emulated instructions since the last fetch, while the slot is tracked.
    pub emulated: Option<Box<[AtomicU64]>>,
}

/// The slots of a machine.
#[derive(Default)]
pub(crate) struct Memory {
    slots: RwLock<Vec<Mapped>>,
}

/// What lies at a guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// RAM.
    Ram,
    /// Memory that the guest must not write.
    ReadOnly,
    /// No memory: a device, or nothing.
    Device,
}

impl Memory {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Vec<Mapped>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Vec<Mapped>> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot of this number.
    pub(crate) fn slot(&self, number: u32) -> Option<MemorySlot> {
        let slots = self.read();
        let mapped = slots.iter().find(|mapped| mapped.slot.slot == number)?;
        Some(mapped.slot)
    }

    /// Where `len` bytes at `gpa` lead. They must not cross a page.
    pub(crate) fn target(&self, gpa: u64, len: usize) -> Target {
        match find(&self.read(), gpa, len) {
            Some((mapped, _)) if mapped.slot.read_only => Target::ReadOnly,
            Some(_) => Target::Ram,
            None => Target::Device,
        }
    }

    /// Reads RAM. Answers whether there is any.
    pub(crate) fn load(&self, gpa: u64, data: &mut [u8]) -> bool {
        let slots = self.read();
        let Some((_, host)) = find(&slots, gpa, data.len()) else {
            return false;
        };
        copy_from_guest(host, data);
        true
    }

    /// Writes RAM and marks the page. Answers whether there is any that may be written.
    pub(crate) fn store(&self, gpa: u64, data: &[u8]) -> bool {
        let slots = self.read();
        let Some((mapped, host)) =
            find(&slots, gpa, data.len()).filter(|(mapped, _)| !mapped.slot.read_only)
        else {
            return false;
        };
        copy_to_guest(host, data);
        mapped.mark(gpa);
        true
    }

    /// Replaces `expected` by `new` in RAM if it is there, in one step that no other vCPU can come between. `None`: no such memory, or
    /// not of a size that the processor can exchange.
    pub(crate) fn compare_exchange(&self, gpa: u64, expected: &[u8], new: &[u8]) -> Option<bool> {
        let slots = self.read();
        let (mapped, host) =
            find(&slots, gpa, new.len()).filter(|(mapped, _)| !mapped.slot.read_only)?;
        let done = exchange(host, expected, new)?;
        mapped.mark(gpa);
        Some(done)
    }
}

impl Mapped {
    fn mark(&self, gpa: u64) {
        let page = (gpa - self.slot.gpa) / PAGE;
        if let Some(word) = self
            .emulated
            .as_ref()
            .and_then(|words| words.get((page / 64) as usize))
        {
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }
}

/// ORs marks into the words of a dirty log, and takes them back if `forget`.
pub(crate) fn add_marks(marks: &[AtomicU64], words: &mut [u64], forget: bool) {
    for (mark, word) in marks.iter().zip(words) {
        *word |= if forget {
            mark.swap(0, Ordering::Relaxed)
        } else {
            mark.load(Ordering::Relaxed)
        };
    }
}

/// Takes those marks back whose bit is set in `words`, from word `first` on.
pub(crate) fn clear_marks(marks: &[AtomicU64], first: usize, words: &[u64]) {
    for (mark, word) in marks.iter().skip(first).zip(words) {
        mark.fetch_and(!word, Ordering::Relaxed);
    }
}

/// Zeroed marks for the pages of a slot.
pub(crate) fn marks(slot: MemorySlot) -> Box<[AtomicU64]> {
    (0..(slot.len / PAGE).div_ceil(64))
        .map(|_| AtomicU64::new(0))
        .collect()
}

/// The slot that holds `gpa .. +len`, and the host address.
fn find(slots: &[Mapped], gpa: u64, len: usize) -> Option<(&Mapped, u64)> {
    let mapped = slots
        .iter()
        .find(|mapped| gpa >= mapped.slot.gpa && gpa - mapped.slot.gpa < mapped.slot.len)?;
    let offset = gpa - mapped.slot.gpa;
    (mapped.slot.len - offset >= len as u64).then_some((mapped, mapped.slot.hva + offset))
}

/// Copies out of guest memory, which vCPUs may write at the same time.
fn copy_from_guest(host: u64, data: &mut [u8]) {
    // One access of the whole width where it is aligned: a guest that polls a flag must not see half of it.
    macro_rules! whole {
        ($atomic:ty) => {{
            // SAFETY: `find` has checked that the range lies in a slot, whose mapping `Vm::map_memory`'s caller vouches for; aligned.
            let value = unsafe { &*(host as *const $atomic) }.load(Ordering::Relaxed);
            data.copy_from_slice(&value.to_le_bytes());
        }};
    }
    match data.len() {
        1 => whole!(AtomicU8),
        2 if host.is_multiple_of(2) => whole!(AtomicU16),
        4 if host.is_multiple_of(4) => whole!(AtomicU32),
        8 if host.is_multiple_of(8) => whole!(AtomicU64),
        _ => {
            for (at, byte) in (host..).zip(data.iter_mut()) {
                // SAFETY: as above.
                *byte = unsafe { &*(at as *const AtomicU8) }.load(Ordering::Relaxed);
            }
        }
    }
}

/// Copies into guest memory.
fn copy_to_guest(host: u64, data: &[u8]) {
    macro_rules! whole {
        ($atomic:ty, $int:ty) => {{
            let mut bytes = [0; size_of::<$int>()];
            bytes.copy_from_slice(data);
            // SAFETY: as in `copy_from_guest`.
            unsafe { &*(host as *const $atomic) }
                .store(<$int>::from_le_bytes(bytes), Ordering::Relaxed);
        }};
    }
    match data.len() {
        2 if host.is_multiple_of(2) => whole!(AtomicU16, u16),
        4 if host.is_multiple_of(4) => whole!(AtomicU32, u32),
        8 if host.is_multiple_of(8) => whole!(AtomicU64, u64),
        _ => {
            for (at, &byte) in (host..).zip(data) {
                // SAFETY: as in `copy_from_guest`.
                unsafe { &*(at as *const AtomicU8) }.store(byte, Ordering::Relaxed);
            }
        }
    }
}

/// Compare-exchange of 1, 2, 4, 8 (aligned) or 16 bytes. Unaligned ones, and 16 bytes on a processor without CMPXCHG16B, are not done.
fn exchange(host: u64, expected: &[u8], new: &[u8]) -> Option<bool> {
    macro_rules! whole {
        ($atomic:ty, $int:ty) => {{
            let expected = <$int>::from_le_bytes(expected.try_into().ok()?);
            let new = <$int>::from_le_bytes(new.try_into().ok()?);
            // SAFETY: as in `copy_from_guest`.
            let cell = unsafe { &*(host as *const $atomic) };
            Some(
                cell.compare_exchange(expected, new, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok(),
            )
        }};
    }
    if !host.is_multiple_of(new.len().max(1) as u64) {
        return None;
    }
    match new.len() {
        1 => whole!(AtomicU8, u8),
        2 => whole!(AtomicU16, u16),
        4 => whole!(AtomicU32, u32),
        8 => whole!(AtomicU64, u64),
        16 if std::is_x86_feature_detected!("cmpxchg16b") => {
            let expected = u128::from_le_bytes(expected.try_into().ok()?);
            let new = u128::from_le_bytes(new.try_into().ok()?);
            // SAFETY: as in `copy_from_guest`, aligned to 16, and the processor has the instruction.
            let seen = unsafe { exchange_16(host as *mut u128, expected, new) };
            Some(seen == expected)
        }
        _ => None,
    }
}

/// LOCK CMPXCHG16B; answers what was there. In assembly, because the compiler's intrinsic becomes a call of a library that is not linked.
///
/// # Safety
///
/// The processor has the instruction, and `cell` points to 16 bytes, aligned, that may be written.
unsafe fn exchange_16(cell: *mut u128, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: as the caller vouches for. RBX, which the compiler keeps for itself, is put back.
    unsafe {
        std::arch::asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, {new_low}",
            // Named, so that it cannot be RBX.
            in("rdi") cell,
            new_low = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(low) | u128::from(high) << 64
}

/// A slot that can be mapped.
pub(crate) fn check(slot: MemorySlot) -> Result<()> {
    if slot.len == 0
        || !(slot.len | slot.gpa | slot.hva).is_multiple_of(PAGE)
        || slot.gpa.checked_add(slot.len).is_none()
    {
        return Err(Error::Invalid(format!(
            "memory slot {} ({:#x} bytes at {:#x}) is empty, not page aligned, or beyond all addresses",
            slot.slot, slot.len, slot.gpa
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(bytes: &mut Vec<u64>, read_only: bool) -> Memory {
        let slot = MemorySlot {
            slot: 0,
            gpa: 0x10_0000,
            len: 2 * PAGE,
            hva: bytes.as_mut_ptr() as u64,
            read_only,
        };
        let memory = Memory::default();
        memory.write().push(Mapped {
            slot,
            emulated: Some(marks(slot)),
        });
        memory
    }

    #[test]
    fn loads_and_stores_stay_inside_and_mark_their_page() {
        let mut bytes = vec![0u64; 1024];
        let memory = memory(&mut bytes, false);
        for (offset, len) in [(0u64, 8), (3, 4), (4096, 2), (8191, 1), (4090, 6)] {
            let data: Vec<u8> = (1..=len).collect();
            assert!(memory.store(0x10_0000 + offset, &data));
            let mut back = vec![0; data.len()];
            assert!(memory.load(0x10_0000 + offset, &mut back));
            assert_eq!(back, data);
        }
        assert!(!memory.store(0x10_0000 + 8191, &[0, 0]));
        assert!(!memory.load(0xf_ffff, &mut [0]));
        assert_eq!(memory.target(0x10_2000, 1), Target::Device);
        let slots = memory.read();
        let marks = slots[0].emulated.as_ref().expect("tracked");
        assert_eq!(marks[0].load(Ordering::Relaxed), 0b11);
    }

    #[test]
    fn an_exchange_happens_only_if_the_old_value_is_there() {
        let mut bytes = vec![7u64; 1024];
        let memory = memory(&mut bytes, false);
        let old = 7u64.to_le_bytes();
        let new = 9u64.to_le_bytes();
        assert_eq!(memory.compare_exchange(0x10_0008, &new, &old), Some(false));
        assert_eq!(memory.compare_exchange(0x10_0008, &old, &new), Some(true));
        assert_eq!(memory.compare_exchange(0x10_0008, &old, &new), Some(false));
        assert_eq!(memory.compare_exchange(0x10_000c, &old, &new), None);
        let (wide_old, wide_new) = (
            [7u64.to_le_bytes(); 2].concat(),
            [1u64.to_le_bytes(); 2].concat(),
        );
        if std::is_x86_feature_detected!("cmpxchg16b") && (bytes.as_ptr() as u64).is_multiple_of(16)
        {
            assert_eq!(
                memory.compare_exchange(0x10_0010, &wide_old, &wide_new),
                Some(true)
            );
        }
    }

    #[test]
    fn read_only_memory_is_read_only() {
        let mut bytes = vec![7u64; 1024];
        let memory = memory(&mut bytes, true);
        assert_eq!(memory.target(0x10_0000, 8), Target::ReadOnly);
        assert!(memory.load(0x10_0000, &mut [0; 8]));
        assert!(!memory.store(0x10_0000, &[0; 8]));
        assert_eq!(memory.compare_exchange(0x10_0000, &[7], &[1]), None);
    }
}
