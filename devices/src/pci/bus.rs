//! The bus: its slots, the ECAM window, and where BARs are.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{BarRange, BarWindow, ConfigSpace, Identity, PciDevice};
use crate::{Bus, BusDevice};

/// Slots of a bus. The host bridge has the first.
pub const SLOTS: u8 = 32;
/// Bytes of configuration space of a function in the window.
const FUNCTION_LEN: u64 = 4096;
/// Offset of BAR 0 in configuration space.
const FIRST_BAR: u16 = 0x10;
/// Functions that a slot could have; ours have one.
const FUNCTIONS: u64 = 8;

/// Why a device cannot be put on the bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// All slots are taken.
    #[error("the PCI bus is full: it has {} slots", SLOTS - 1)]
    Full,
    /// Another device is there.
    #[error("PCI slot {0} is taken or does not exist")]
    Slot(u8),
    /// No addresses are left.
    #[error("no room for a BAR of {0:#x} bytes below {1:#x}")]
    Window(u64, u64),
}

struct Slot {
    device: Arc<dyn PciDevice>,
    /// What of it is on the MMIO bus.
    mapped: Vec<BarRange>,
    /// The addresses that were set aside for it.
    reserved: Vec<(u64, u64)>,
}

impl Slot {
    /// Addresses that nobody else should get: those that were set aside, and those that the guest, or another host's, has put there. The
    /// latter count while decoding is off, too; while a guest asks for a BAR's size, the former have to do.
    fn taken(&self) -> Vec<(u64, u64)> {
        let put = |(bar, len): (u8, u64)| {
            let mut word = [0; 4];
            self.device
                .read_config(FIRST_BAR + 4 * u16::from(bar), &mut word);
            (u64::from(u32::from_le_bytes(word)) & !(len - 1), len)
        };
        let put = self.device.bar_sizes().into_iter().map(put);
        self.reserved.iter().copied().chain(put).collect()
    }
}

/// A PCI bus with its host bridge.
pub struct PciBus {
    mmio: Weak<Bus>,
    /// First address for BARs, and the one after the last.
    window: (u64, u64),
    bridge: ConfigSpace,
    slots: Mutex<[Option<Slot>; SLOTS as usize]>,
}

impl PciBus {
    /// An empty bus whose devices' BARs lie in `window` (first address and length) of `mmio`. It keeps no reference to `mmio`, on which it
    /// sits itself.
    pub fn new(mmio: &Arc<Bus>, window: (u64, u64)) -> Self {
        Self {
            mmio: Arc::downgrade(mmio),
            window: (window.0, window.0 + window.1),
            bridge: ConfigSpace::new(HOST_BRIDGE, &[]),
            slots: Mutex::new([const { None }; SLOTS as usize]),
        }
    }

    /// Length of the ECAM window in bytes.
    pub fn ecam_len() -> u64 {
        u64::from(SLOTS) * FUNCTIONS * FUNCTION_LEN
    }

    /// Puts a device into a slot, or into the first free one, and gives its BARs addresses. Returns the slot.
    pub fn insert(&self, device: Arc<dyn PciDevice>, slot: Option<u8>) -> Result<u8, PciError> {
        let mut slots = self.lock();
        let number = match slot {
            Some(slot) => slot,
            None => (1..SLOTS)
                .find(|number| slots[usize::from(*number)].is_none())
                .ok_or(PciError::Full)?,
        };
        if number == 0 || slots.get(usize::from(number)).is_none_or(Option::is_some) {
            return Err(PciError::Slot(number));
        }
        let mut reserved = Vec::new();
        for (bar, len) in device.bar_sizes() {
            let taken = slots.iter().flatten().flat_map(Slot::taken);
            let gpa = self.free(taken.chain(reserved.iter().copied()), len)?;
            reserved.push((gpa, len));
            device.set_bar(bar, gpa);
        }
        slots[usize::from(number)] = Some(Slot {
            device,
            mapped: Vec::new(),
            reserved,
        });
        Ok(number)
    }

    /// Takes the device out of a slot.
    pub fn remove(&self, number: u8) -> Option<Arc<dyn PciDevice>> {
        let mut slot = self.lock().get_mut(usize::from(number))?.take()?;
        self.place(&mut slot, &[]);
        Some(slot.device)
    }

    /// Puts every device's BARs where its configuration space says; after a restore or a reset of it.
    pub fn place_all(&self) {
        for slot in self.lock().iter_mut().flatten() {
            let wanted = slot.device.bars();
            self.place(slot, &wanted);
        }
    }

    /// The lowest addresses that are free, a multiple of the length.
    fn free(&self, taken: impl Iterator<Item = (u64, u64)>, len: u64) -> Result<u64, PciError> {
        let mut taken: Vec<(u64, u64)> = taken.collect();
        taken.sort_unstable();
        let mut at = self.window.0.next_multiple_of(len);
        for (first, taken_len) in taken {
            if at + len > first && first + taken_len > at {
                at = (first + taken_len).next_multiple_of(len);
            }
        }
        match at + len <= self.window.1 {
            true => Ok(at),
            false => Err(PciError::Window(len, self.window.1)),
        }
    }

    /// Moves a device's BARs on the MMIO bus.
    fn place(&self, slot: &mut Slot, wanted: &[BarRange]) {
        if slot.mapped == wanted {
            return;
        }
        let Some(mmio) = self.mmio.upgrade() else {
            return;
        };
        let old = std::mem::take(&mut slot.mapped);
        for gone in old.iter().filter(|range| !wanted.contains(range)) {
            mmio.remove(gone.gpa);
        }
        for &range in wanted {
            let window = || BarWindow {
                device: Arc::clone(&slot.device),
                bar: range.bar,
            };
            let there = old.contains(&range)
                || mmio
                    .insert(range.gpa, range.len, Arc::new(window()))
                    .inspect_err(|error| {
                        tracing::debug!(%error, "a BAR answers nothing where the guest has put it");
                    })
                    .is_ok();
            if there {
                slot.mapped.push(range);
            }
        }
        slot.device.bars_moved(&slot.mapped);
    }

    fn lock(&self) -> MutexGuard<'_, [Option<Slot>; SLOTS as usize]> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A bridge that needs no driver: Red Hat's IDs of a PCI Express host bridge.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: [6, 0, 0],
    subsystem_vendor: 0,
    subsystem: 0,
};

/// The function and the offset in its configuration space of an access; none if it goes beyond an aligned word.
fn decode(offset: u64, len: usize) -> Option<(u8, u16)> {
    let within = offset % FUNCTION_LEN;
    let fits = matches!(len, 1 | 2 | 4) && within % 4 + len as u64 <= 4;
    let function = offset / FUNCTION_LEN;
    let slot = u8::try_from(function / FUNCTIONS).ok()?;
    (fits && function.is_multiple_of(FUNCTIONS)).then_some((slot, within as u16))
}

impl BusDevice for PciBus {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some((number, at)) = decode(offset, data.len()) else {
            return;
        };
        if number == 0 {
            self.bridge.read(at, data);
            return;
        }
        let slots = self.lock();
        let device = slots
            .get(usize::from(number))
            .and_then(Option::as_ref)
            .map(|slot| Arc::clone(&slot.device));
        drop(slots);
        if let Some(device) = device {
            device.read_config(at, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some((number, at)) = decode(offset, data.len()) else {
            return;
        };
        let mut slots = self.lock();
        if let Some(Some(slot)) = slots.get_mut(usize::from(number)) {
            slot.device.write_config(at, data);
            let wanted = slot.device.bars();
            self.place(slot, &wanted);
        }
    }
}
