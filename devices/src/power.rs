//! Power management of a hardware-reduced ACPI machine: sleep, reset and power button registers.
//!
//! ```text
//!   OUT sleep control: SLP_EN with the S5 type ──► PowerSink: Shutdown
//!   OUT reset register: the reset value        ──► PowerSink: Reset
//!   press_power_button ──► event flag 0 ─┐
//!   PCI slots          ──► event flag 1 ─┼─► GED interrupt ──► the guest's AML reads (and so clears) the flags ──► Notify
//!   vCPUs              ──► event flag 2 ─┘
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::{BusDevice, read_bytes, write_bytes};
use crate::interrupt::InterruptLine;
use crate::state::saved::PowerState;
use crate::state::{self, Persist, SavedState, StateError};

/// What a guest asks of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PowerRequest {
    /// Power off.
    Shutdown,
    /// Reset.
    Reset,
}

/// Takes the guest's requests. Called on a vCPU thread, which goes on running the guest until the machine stops it.
pub trait PowerSink: Send + Sync {
    /// The guest asks for `request`. May come more than once.
    fn request(&self, request: PowerRequest);
}

/// Where the registers are, as offsets from the device's first port, and their values. It must agree with the FADT and the
/// DSDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiPowerConfig {
    /// Offset of SLEEP_CONTROL_REG (ACPI 6.5, 4.8.3.7), 8 bit.
    pub sleep_control: u64,
    /// Offset of SLEEP_STATUS_REG (ACPI 6.5, 4.8.3.7), 8 bit.
    pub sleep_status: u64,
    /// Offset of RESET_REG (ACPI 6.5, 4.8.3.6), 8 bit.
    pub reset: u64,
    /// Offset of the event flags, 8 bit.
    pub event: u64,
    /// RESET_VALUE in the FADT.
    pub reset_value: u8,
    /// The SLP_TYP value in the DSDT's `_S5`.
    pub s5_sleep_type: u8,
}

/// Event flag of the power button.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;

/// Event flag of PCI slots: devices have come, or are to go.
pub const EVENT_PCI: u8 = 1 << 1;

/// Event flag of vCPUs: some have come, or are to go.
pub const EVENT_CPU: u8 = 1 << 2;

/// All event flags there are.
const EVENTS: u8 = EVENT_POWER_BUTTON | EVENT_PCI | EVENT_CPU;
/// Sleep control: SLP_EN.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Sleep control: where SLP_TYP is.
const SLEEP_TYPE_SHIFT: u8 = 2;
/// SLP_TYP has three bits.
const SLEEP_TYPE_MASK: u8 = 0b111;

/// The registers.
pub struct AcpiPower {
    config: AcpiPowerConfig,
    power: Arc<dyn PowerSink>,
    event_line: Arc<dyn InterruptLine>,
    events: AtomicU8,
}

impl AcpiPower {
    /// Registers as `config` says; requests go to `power`, events pulse `event_line` (the generic event device's).
    pub fn new(
        config: AcpiPowerConfig,
        power: Arc<dyn PowerSink>,
        event_line: Arc<dyn InterruptLine>,
    ) -> Self {
        AcpiPower {
            config,
            power,
            event_line,
            events: AtomicU8::new(0),
        }
    }

    /// Presses the power button: the guest is told, and may shut down, or not.
    pub fn press_power_button(&self) {
        self.raise(EVENT_POWER_BUTTON);
    }

    /// Sets an event flag and tells the guest.
    pub(crate) fn raise(&self, event: u8) {
        self.events.fetch_or(event, Ordering::SeqCst);
        self.event_line.trigger();
    }

    /// Back to the state after power on.
    pub fn reset(&self) {
        self.events.store(0, Ordering::SeqCst);
    }

    fn read_byte(&self, offset: u64) -> u8 {
        if offset == self.config.event {
            self.events.swap(0, Ordering::SeqCst)
        } else if offset == self.config.sleep_control
            || offset == self.config.sleep_status
            || offset == self.config.reset
        {
            // SLP_EN is write-only, and a machine that never sleeps never sets WAK_STS.
            0
        } else {
            0xff
        }
    }

    fn write_byte(&self, offset: u64, value: u8) {
        if offset == self.config.sleep_control {
            let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
            if value & SLEEP_ENABLE != 0 && sleep_type == self.config.s5_sleep_type {
                self.power.request(PowerRequest::Shutdown);
            }
        } else if offset == self.config.reset && value == self.config.reset_value {
            self.power.request(PowerRequest::Reset);
        }
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| self.read_byte(offset));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| self.write_byte(offset, value));
    }
}

impl Persist for AcpiPower {
    fn kind(&self) -> &'static str {
        "acpi-power"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self) -> SavedState {
        state::encode(
            self,
            &PowerState {
                events: self.events.load(Ordering::SeqCst),
            },
        )
    }

    /// The interrupt of a pending event is part of the local APICs' state, and is not raised again.
    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let saved: PowerState = state::decode(self, state)?;
        if saved.events & !EVENTS != 0 {
            return Err(StateError::OutOfRange {
                kind: self.kind(),
                field: "events",
                reason: format!(
                    "{:#x} has flags that this build does not know",
                    saved.events
                ),
            });
        }
        self.events.store(saved.events, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{LineLog, POWER_CONFIG, PowerLog};

    fn device() -> (AcpiPower, Arc<PowerLog>, Arc<LineLog>) {
        let (power, line) = (Arc::new(PowerLog::default()), Arc::new(LineLog::default()));
        (
            AcpiPower::new(POWER_CONFIG, power.clone(), line.clone()),
            power,
            line,
        )
    }

    fn read(device: &AcpiPower, offset: u64) -> u8 {
        let mut data = [0x55];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn only_s5_with_enable_shuts_down() {
        let (device, power, _) = device();
        for value in 0..=u8::MAX {
            device.write(0, &[value]);
            let s5 = value & 0x20 != 0 && (value >> 2) & 7 == 5;
            assert_eq!(power.take().len(), usize::from(s5), "{value:#x}");
        }
        device.write(0, &[0x34]);
        assert_eq!(power.take(), [PowerRequest::Shutdown]);
    }

    #[test]
    fn only_the_reset_value_resets() {
        let (device, power, _) = device();
        device.write(2, &[0]);
        device.write(1, &[1]);
        device.write(2, &[2]);
        assert_eq!(power.take(), []);
        device.write(2, &[1]);
        assert_eq!(power.take(), [PowerRequest::Reset]);
    }

    #[test]
    fn the_button_sets_a_flag_that_reading_clears() {
        let (device, power, line) = device();
        assert_eq!(read(&device, 4), 0);
        device.press_power_button();
        assert_eq!(line.pulses(), 1);
        assert_eq!(read(&device, 4), 1);
        assert_eq!(read(&device, 4), 0);
        assert_eq!(power.take(), []);
    }

    #[test]
    fn an_unread_event_survives_a_move() {
        let (from, ..) = device();
        let (to, _, line) = device();
        from.press_power_button();
        to.restore(&from.save()).expect("own state");
        assert_eq!(line.pulses(), 0);
        assert_eq!(read(&to, 4), 1);
        let bad = state::encode(&to, &PowerState { events: 0x80 });
        assert!(matches!(
            to.restore(&bad),
            Err(StateError::OutOfRange {
                field: "events",
                ..
            })
        ));
    }
}
