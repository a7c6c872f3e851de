//! i8042 keyboard controller: nothing but its reset line.
//!
//! The status register reads as "output buffer full, input buffer empty", for ever:
//!
//! - A driver that probes empties the output buffer first and gives up after some 16 bytes, which takes about a
//!   millisecond. With 0 it would go on to send commands and wait for answers (0.9 s in Linux).
//! - A kernel that resets waits for "input buffer empty" before it writes the reset command. With 0xff that wait would run
//!   into its timeout (65,536 reads in Linux).
//!
//! A machine with ACPI says in the FADT (IAPC_BOOT_ARCH, bit 1 clear) that there is no controller, and is not even probed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::{BusDevice, read_bytes, write_bytes};
use crate::power::{PowerRequest, PowerSink};
use crate::state::saved::I8042State;
use crate::state::{self, Persist, SavedState, StateError};

/// Number of ports from the data port on: data at 0, command and status at 4.
pub const I8042_PORTS: u64 = 5;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Status bit 0: output buffer full (IBM PC AT technical reference, 8042 status register).
const STATUS_OUTPUT_FULL: u8 = 1;
/// The next data byte is written to the output port.
const COMMAND_WRITE_OUTPUT_PORT: u8 = 0xd1;
/// Commands from here on pulse those of output lines 3..0 whose bit is 0.
const COMMAND_PULSE: u8 = 0xf0;
/// Output port bit 0: the CPU's reset line, active low.
const OUTPUT_RESET: u8 = 1;

/// The controller. It covers [`I8042_PORTS`] ports from the data port on.
pub struct I8042 {
    power: Arc<dyn PowerSink>,
    output_port_write: AtomicBool,
}

impl I8042 {
    /// A controller that asks `power` for resets.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        I8042 {
            power,
            output_port_write: AtomicBool::new(false),
        }
    }

    /// Back to the state after power on.
    pub fn reset(&self) {
        self.output_port_write.store(false, Ordering::Relaxed);
    }

    fn write_byte(&self, offset: u64, value: u8) {
        let resets = match offset {
            COMMAND => {
                self.output_port_write
                    .store(value == COMMAND_WRITE_OUTPUT_PORT, Ordering::Relaxed);
                value >= COMMAND_PULSE && value & OUTPUT_RESET == 0
            }
            DATA => {
                self.output_port_write.swap(false, Ordering::Relaxed) && value & OUTPUT_RESET == 0
            }
            _ => false,
        };
        if resets {
            self.power.request(PowerRequest::Reset);
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| match offset {
            COMMAND => STATUS_OUTPUT_FULL,
            _ => 0xff,
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| self.write_byte(offset, value));
    }
}

impl Persist for I8042 {
    fn kind(&self) -> &'static str {
        "i8042"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self) -> SavedState {
        state::encode(
            self,
            &I8042State {
                output_port_write: self.output_port_write.load(Ordering::Relaxed),
            },
        )
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let saved: I8042State = state::decode(self, state)?;
        self.output_port_write
            .store(saved.output_port_write, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::PowerLog;

    #[test]
    fn resets_by_pulse_and_by_output_port_only() {
        let power = Arc::new(PowerLog::default());
        let device = I8042::new(power.clone());
        for harmless in [0xd1, 0xff, 0xf1, 0x20, 0x60, 0xaa] {
            device.write(COMMAND, &[harmless]);
        }
        device.write(DATA, &[0xfe]);
        device.write(COMMAND, &[0xd1]);
        device.write(DATA, &[0x01]);
        assert_eq!(power.take(), []);
        device.write(COMMAND, &[0xfe]);
        assert_eq!(power.take(), [PowerRequest::Reset]);
        device.write(COMMAND, &[0xf0]);
        assert_eq!(power.take(), [PowerRequest::Reset]);
        device.write(COMMAND, &[0xd1]);
        device.write(DATA, &[0x02]);
        device.write(DATA, &[0x02]);
        assert_eq!(power.take(), [PowerRequest::Reset]);
    }

    #[test]
    fn probes_fail_fast_and_resets_do_not_wait() {
        let device = I8042::new(Arc::new(PowerLog::default()));
        // What a Linux probe does: empty the output buffer, at most 16 bytes.
        let drained = (0..17).take_while(|_| {
            let (mut status, mut byte) = ([0], [0]);
            device.read(COMMAND, &mut status);
            device.read(DATA, &mut byte);
            status[0] & 1 != 0
        });
        assert_eq!(drained.count(), 17);
        // What its reset waits for.
        let mut status = [0xff];
        device.read(COMMAND, &mut status);
        assert_eq!(status[0] & 2, 0);
    }

    #[test]
    fn a_half_given_command_is_saved() {
        let power = Arc::new(PowerLog::default());
        let (from, to) = (I8042::new(power.clone()), I8042::new(power.clone()));
        from.write(COMMAND, &[0xd1]);
        to.restore(&from.save()).expect("own state");
        to.write(DATA, &[0]);
        assert_eq!(power.take(), [PowerRequest::Reset]);
    }
}
