//! A bus: which device answers at which address.
//!
//! Lookups are concurrent (a shared lock and a binary search) and the device is called with no lock held, so devices may be
//! inserted and removed while vCPUs run.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

/// A device on a [`Bus`]. Several vCPU threads may call it at once.
pub trait BusDevice: Send + Sync {
    /// Fills all of `data` from `offset`, counted from the device's first address.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes a write of `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Which address space a bus is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusSpace {
    /// I/O ports, 0 to 0xffff.
    Pio,
    /// Guest-physical addresses that are not RAM.
    Mmio,
}

impl BusSpace {
    /// The highest address.
    fn last(self) -> u64 {
        match self {
            BusSpace::Pio => 0xffff,
            BusSpace::Mmio => u64::MAX,
        }
    }
}

impl fmt::Display for BusSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BusSpace::Pio => "port",
            BusSpace::Mmio => "MMIO",
        })
    }
}

/// Why a device cannot be put on a bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Another device has some of the addresses.
    #[error(
        "{space} range {base:#x}+{len:#x} overlaps the device at {taken_base:#x}+{taken_len:#x}; choose another"
    )]
    Overlap {
        /// The address space.
        space: BusSpace,
        /// First address asked for.
        base: u64,
        /// Number of addresses asked for.
        len: u64,
        /// First address of the device that is there.
        taken_base: u64,
        /// Its number of addresses.
        taken_len: u64,
    },
    /// The range is empty or does not fit into the address space.
    #[error("{space} range {base:#x}+{len:#x} is empty or does not fit into the address space")]
    Range {
        /// The address space.
        space: BusSpace,
        /// First address asked for.
        base: u64,
        /// Number of addresses asked for.
        len: u64,
    },
}

struct Entry {
    base: u64,
    /// Inclusive, so that a range may end at the top of the address space.
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// A map from address ranges to devices.
pub struct Bus {
    space: BusSpace,
    /// Sorted by `base`, without overlaps.
    entries: RwLock<Vec<Entry>>,
}

impl Bus {
    /// An empty bus.
    pub fn new(space: BusSpace) -> Self {
        Bus {
            space,
            entries: RwLock::new(Vec::new()),
        }
    }

    /// Puts `device` at `base .. base + len`. On failure the bus is unchanged.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let space = self.space;
        let last = len
            .checked_sub(1)
            .and_then(|last| base.checked_add(last))
            .filter(|last| *last <= space.last())
            .ok_or(BusError::Range { space, base, len })?;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let at = entries.partition_point(|entry| entry.last < base);
        if let Some(taken) = entries.get(at).filter(|entry| entry.base <= last) {
            return Err(BusError::Overlap {
                space,
                base,
                len,
                taken_base: taken.base,
                taken_len: (taken.last - taken.base).saturating_add(1),
            });
        }
        entries.insert(at, Entry { base, last, device });
        Ok(())
    }

    /// Takes away the device whose range begins at `base`. A call into it that is under way on another thread ends
    /// normally.
    pub fn remove(&self, base: u64) -> Option<Arc<dyn BusDevice>> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let at = entries
            .binary_search_by_key(&base, |entry| entry.base)
            .ok()?;
        Some(entries.remove(at).device)
    }

    /// Reads. What no device claims, wholly, reads as all ones; then the result is `false`.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.lookup(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes. The result is `false` when no device claims the whole of it; nothing has happened then.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.lookup(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The device that has all of `address .. address + len`, and the offset into it.
    fn lookup(&self, address: u64, len: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let end = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get(entries.partition_point(|entry| entry.last < address))?;
        (entry.base <= address && end <= entry.last)
            .then(|| (entry.device.clone(), address - entry.base))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let mut map = f.debug_map();
        for entry in entries.iter() {
            map.entry(
                &format_args!("{:#x}", entry.base),
                &format_args!("..={:#x}", entry.last),
            );
        }
        map.finish()
    }
}

/// Splits an access into the byte accesses that an 8-bit device on the ISA bus sees, and fills `data` with `read`'s bytes.
pub(crate) fn read_bytes(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
    for (byte, at) in data.iter_mut().zip(0..) {
        *byte = offset.checked_add(at).map_or(0xff, &mut read);
    }
}

/// The same for a write.
pub(crate) fn write_bytes(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8)) {
    for (byte, at) in data.iter().zip(0..) {
        if let Some(offset) = offset.checked_add(at) {
            write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers writes; reads return the offset of each byte.
    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            read_bytes(offset, data, |offset| offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0
                .lock()
                .expect("no panic")
                .push((offset, data.to_vec()));
        }
    }

    #[test]
    fn dispatches_to_the_right_device_with_offsets() {
        let bus = Bus::new(BusSpace::Pio);
        let (low, high) = (Arc::new(Probe::default()), Arc::new(Probe::default()));
        bus.insert(0x100, 8, high.clone()).expect("free");
        bus.insert(0xf8, 8, low.clone()).expect("free");
        assert!(bus.write(0xff, &[1]));
        assert!(bus.write(0x100, &[2, 3]));
        assert_eq!(*low.0.lock().expect("no panic"), [(7, vec![1])]);
        assert_eq!(*high.0.lock().expect("no panic"), [(0, vec![2, 3])]);
        let mut data = [0; 4];
        assert!(bus.read(0x102, &mut data));
        assert_eq!(data, [2, 3, 4, 5]);
    }

    #[test]
    fn unclaimed_and_straddling_accesses_read_ones_and_write_nothing() {
        let bus = Bus::new(BusSpace::Mmio);
        let device = Arc::new(Probe::default());
        bus.insert(0x1000, 0x10, device.clone()).expect("free");
        bus.insert(u64::MAX - 3, 4, device.clone()).expect("free");
        for (address, len) in [
            (0, 4),
            (0xffe, 4),
            (0x100e, 4),
            (0x1010, 1),
            (u64::MAX, 2),
            (0x1000, 0),
        ] {
            let mut data = vec![0x55; len];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert!(data.iter().all(|byte| *byte == 0xff), "{address:#x}");
            assert!(!bus.write(address, &data), "{address:#x}");
        }
        assert!(device.0.lock().expect("no panic").is_empty());
        assert!(bus.read(u64::MAX, &mut [0]));
    }

    #[test]
    fn refuses_overlaps_and_impossible_ranges() {
        let bus = Bus::new(BusSpace::Pio);
        let device: Arc<dyn BusDevice> = Arc::new(Probe::default());
        bus.insert(0x100, 0x10, device.clone()).expect("free");
        for (base, len) in [(0x100, 1), (0x10f, 1), (0xff, 2), (0xf0, 0x100), (0x108, 2)] {
            let error = bus.insert(base, len, device.clone()).expect_err("taken");
            assert!(
                matches!(
                    error,
                    BusError::Overlap {
                        taken_base: 0x100,
                        taken_len: 0x10,
                        ..
                    }
                ),
                "{error}"
            );
        }
        for (base, len) in [(0, 0), (0xffff, 2), (0x1_0000, 1), (u64::MAX, 2)] {
            assert!(
                matches!(
                    bus.insert(base, len, device.clone()),
                    Err(BusError::Range { .. })
                ),
                "{base:#x}"
            );
        }
        bus.insert(0xf0, 0x10, device.clone())
            .expect("adjacent below");
        bus.insert(0x110, 0x10, device.clone())
            .expect("adjacent above");
        assert!(bus.remove(0x101).is_none());
        assert!(bus.remove(0x100).is_some());
        bus.insert(0x100, 0x10, device).expect("free again");
    }
}
