//! Telling a guest of devices that come, and hearing from it of those that may go: the registers that the DSDT's methods use.
//!
//! ```text
//!   device put into a slot ──► inserted: bit ──┐                              ┌─► Notify(slot, device check)  ─► the guest looks at the slot
//!   device is to go        ──► leaving: bit  ──┴─► AcpiPower event ─► AML ────┴─► Notify(slot, eject request) ─► driver lets go ─► _EJ0
//!                                                                                                                                  │
//!   EjectSink::ejected(slot) ◄──────────────────────────── OUT eject ◄─────────────────────────────────────────────────────────────┘
//! ```
//!
//! Registers, 32 bits each, a bit for each slot: 0 inserted (reading clears), 4 leaving (reading clears), 8 eject (write).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::BusDevice;
use crate::power::{AcpiPower, EVENT_PCI};
use crate::state::saved::PciHotplugState;
use crate::state::{self, Persist, SavedState, StateError};

/// Number of ports.
pub const HOTPLUG_PORTS: u64 = 12;

/// Takes a device out that the guest has let go. Called on a vCPU thread; when it returns, the device is gone.
pub trait EjectSink: Send + Sync {
    /// The guest has ejected a slot, which may be empty.
    fn ejected(&self, slot: u8);
}

/// The registers.
pub struct PciHotplug {
    power: Arc<AcpiPower>,
    sink: Arc<dyn EjectSink>,
    inserted: AtomicU32,
    leaving: AtomicU32,
}

impl PciHotplug {
    /// Events go through `power`, ejections to `sink`.
    pub fn new(power: Arc<AcpiPower>, sink: Arc<dyn EjectSink>) -> Self {
        Self {
            power,
            sink,
            inserted: AtomicU32::new(0),
            leaving: AtomicU32::new(0),
        }
    }

    /// Tells the guest of a device that is there now.
    pub fn tell_inserted(&self, slot: u8) {
        // What was asked of a device that was there before is not asked of this one.
        let bit = 1u32.checked_shl(u32::from(slot)).unwrap_or(0);
        self.leaving.fetch_and(!bit, Ordering::SeqCst);
        self.tell(&self.inserted, slot);
    }

    /// Asks the guest to let a device go.
    pub fn ask_to_eject(&self, slot: u8) {
        self.tell(&self.leaving, slot);
    }

    fn tell(&self, register: &AtomicU32, slot: u8) {
        register.fetch_or(
            1u32.checked_shl(u32::from(slot)).unwrap_or(0),
            Ordering::SeqCst,
        );
        self.power.raise(EVENT_PCI);
    }
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset {
            0 => self.inserted.swap(0, Ordering::SeqCst),
            4 => self.leaving.swap(0, Ordering::SeqCst),
            _ => 0,
        };
        let len = data.len().min(4);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        if offset == 8 {
            let slots = u32::from_le_bytes(bytes);
            for slot in (0..32).filter(|slot| slots >> slot & 1 != 0) {
                self.sink.ejected(slot);
            }
        }
    }
}

impl Persist for PciHotplug {
    fn kind(&self) -> &'static str {
        "pci-hotplug"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self) -> SavedState {
        state::encode(
            self,
            &PciHotplugState {
                inserted: self.inserted.load(Ordering::SeqCst),
                leaving: self.leaving.load(Ordering::SeqCst),
            },
        )
    }

    /// The interrupt of what is pending is part of the local APICs' state, and is not raised again.
    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let saved: PciHotplugState = state::decode(self, state)?;
        self.inserted.store(saved.inserted, Ordering::SeqCst);
        self.leaving.store(saved.leaving, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::testing::{LineLog, POWER_CONFIG, PowerLog};

    #[derive(Default)]
    struct Ejected(Mutex<Vec<u8>>);

    impl EjectSink for Ejected {
        fn ejected(&self, slot: u8) {
            self.0.lock().expect("no panic").push(slot);
        }
    }

    fn read(device: &PciHotplug, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn events_are_read_once_and_travel() {
        let ejected = Arc::new(Ejected::default());
        let make = || {
            let (power, line) = (Arc::new(PowerLog::default()), Arc::new(LineLog::default()));
            let power = Arc::new(AcpiPower::new(POWER_CONFIG, power, line));
            (PciHotplug::new(power.clone(), ejected.clone()), power)
        };
        let (device, power) = make();
        device.tell_inserted(3);
        device.tell_inserted(31);
        device.ask_to_eject(4);
        let mut events = [0];
        power.read(POWER_CONFIG.event, &mut events);
        assert_eq!(events, [EVENT_PCI]);
        let (other, _) = make();
        other.restore(&device.save()).expect("ours");
        for device in [device, other] {
            assert_eq!(read(&device, 0), 1 << 31 | 1 << 3);
            assert_eq!(read(&device, 0), 0);
            assert_eq!(read(&device, 4), 1 << 4);
            assert_eq!(read(&device, 4), 0);
            device.write(8, &(1u32 << 4 | 1 << 9).to_le_bytes());
            device.write(8, &[0xff]);
            device.write(0, &[0xff; 4]);
            // What was asked of the device before it does not hold for a new one.
            device.ask_to_eject(6);
            device.tell_inserted(6);
            assert_eq!((read(&device, 0), read(&device, 4)), (1 << 6, 0));
        }
        assert_eq!(*ejected.0.lock().expect("no panic"), [4, 9, 4, 9]);
    }
}
