//! pvpanic: one port by which a guest says that its kernel has panicked (QEMU, `docs/specs/pvpanic`).
//!
//! ```text
//!   guest ── IN  ─► 3: it may report both events
//!         ── OUT ─► bit 0: panicked         ─► PanicSink::guest_panicked(false)
//!                   bit 1: panicked, and a crash kernel takes over ─► guest_panicked(true)
//! ```
//!
//! A guest finds it by ACPI: a device with `_HID` `QEMU0001` and the port as its resource. It keeps nothing, so there is no state to save.

use std::sync::Arc;

use crate::bus::{BusDevice, read_bytes, write_bytes};

/// Where guests that do not look into ACPI expect it.
pub const PVPANIC_PORT: u64 = 0x505;
/// Number of ports.
pub const PVPANIC_PORTS: u64 = 1;

/// The guest's kernel has panicked, and stops or restarts by itself.
const PANICKED: u8 = 1;
/// It has panicked, and a crash kernel was loaded that runs now.
const CRASH_LOADED: u8 = 2;

/// Who hears of it. It is called on a vCPU's thread and must not wait for that vCPU.
pub trait PanicSink: Send + Sync {
    /// The guest's kernel has panicked. With `crash_loaded` a crash kernel runs now, which should not be disturbed.
    fn guest_panicked(&self, crash_loaded: bool);
}

/// The device. It covers [`PVPANIC_PORTS`] ports.
pub struct PvPanic {
    sink: Arc<dyn PanicSink>,
}

impl PvPanic {
    /// A device that tells `sink`.
    pub fn new(sink: Arc<dyn PanicSink>) -> Self {
        Self { sink }
    }
}

impl BusDevice for PvPanic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| match offset {
            0 => PANICKED | CRASH_LOADED,
            _ => 0xff,
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            if offset != 0 {
                return;
            }
            if value & PANICKED != 0 {
                self.sink.guest_panicked(false);
            } else if value & CRASH_LOADED != 0 {
                self.sink.guest_panicked(true);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<bool>>);

    impl PanicSink for Log {
        fn guest_panicked(&self, crash_loaded: bool) {
            self.0.lock().expect("no panic").push(crash_loaded);
        }
    }

    #[test]
    fn events_reach_the_machine_and_nothing_else_does() {
        let log = Arc::new(Log::default());
        let device = PvPanic::new(log.clone());
        // No event, events of other versions, other ports, no byte at all.
        for (offset, data) in [
            (0, &[0u8][..]),
            (0, &[0xfc]),
            (1, &[3]),
            (u64::MAX, &[3, 3]),
            (0, &[]),
        ] {
            device.write(offset, data);
        }
        assert!(log.0.lock().expect("no panic").is_empty());
        device.write(0, &[1]);
        device.write(0, &[2]);
        // A wide write reaches the one port with its first byte; panicked goes before crash loaded.
        device.write(0, &[3, 3, 3, 3]);
        assert_eq!(*log.0.lock().expect("no panic"), [false, true, false]);
    }

    #[test]
    fn it_says_which_events_it_takes() {
        let device = PvPanic::new(Arc::new(Log::default()));
        let mut data = [0; 4];
        device.read(0, &mut data);
        assert_eq!(data, [3, 0xff, 0xff, 0xff]);
        device.read(u64::MAX, &mut data);
    }
}
