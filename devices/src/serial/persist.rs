//! The serial port's saved state.

use std::sync::atomic::Ordering;

use vm_superio::serial::{NoEvents, SerialState as UartState};

use super::{FIFO_SIZE, OUTPUT_CAPACITY, Serial, Uart};
use crate::state::saved::SerialState;
use crate::state::{self, Persist, SavedState, StateError};

/// IER: the four interrupts of a 16550.
const INTERRUPT_ENABLE_MASK: u8 = 0x0f;
/// IIR: no interrupt.
const NO_INTERRUPT: u8 = 0x01;
/// IIR: transmitter empty, received data, or (as `vm-superio` has it) both.
const INTERRUPTS: [u8; 3] = [0x02, 0x04, 0x06];
/// LSR: transmitter empty and idle, as ever; and data ready.
const LINE_STATUS_IDLE: u8 = 0x60;
const LINE_STATUS_DATA_READY: u8 = 0x01;

impl Persist for Serial {
    fn kind(&self) -> &'static str {
        "serial-16550"
    }

    fn version(&self) -> u16 {
        1
    }

    /// Only between [`Serial::pause`] and [`Serial::resume`] does this have every byte exactly once.
    fn save(&self) -> SavedState {
        let pending = self.port.pending();
        let uart = self.port.uart();
        let registers = uart.state();
        let saved = SerialState {
            divisor_low: registers.baud_divisor_low,
            divisor_high: registers.baud_divisor_high,
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            receive_fifo: registers.in_buffer,
            pending_input: pending.clone(),
            unsent_output: self.output.unsent(),
        };
        state::encode(self, &saved)
    }

    /// An interrupt that is pending in the UART is raised again: the guest reads "no interrupt" at worst.
    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let kind = self.kind();
        let refuse = |field, reason| StateError::OutOfRange {
            kind,
            field,
            reason,
        };
        let saved: SerialState = state::decode(self, state)?;
        if saved.interrupt_enable & !INTERRUPT_ENABLE_MASK != 0 {
            return Err(refuse(
                "interrupt_enable",
                format!("{:#x} has more than 4 bits", saved.interrupt_enable),
            ));
        }
        let interrupt = saved.interrupt_identification;
        if interrupt != NO_INTERRUPT && !INTERRUPTS.contains(&interrupt) {
            return Err(refuse(
                "interrupt_identification",
                format!("{interrupt:#x} is none that a 16550 reports"),
            ));
        }
        for (field, bytes, limit) in [
            ("receive_fifo", &saved.receive_fifo, FIFO_SIZE),
            ("pending_input", &saved.pending_input, FIFO_SIZE),
            ("unsent_output", &saved.unsent_output, OUTPUT_CAPACITY),
        ] {
            if bytes.len() > limit {
                return Err(refuse(
                    field,
                    format!("{} bytes, at most {limit} fit", bytes.len()),
                ));
            }
        }

        let ready = if saved.receive_fifo.is_empty() {
            0
        } else {
            LINE_STATUS_DATA_READY
        };
        let registers = UartState {
            baud_divisor_low: saved.divisor_low,
            baud_divisor_high: saved.divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: interrupt,
            line_control: saved.line_control,
            line_status: LINE_STATUS_IDLE | ready,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.receive_fifo,
        };
        let restored =
            Uart::from_state(&registers, self.line.clone(), NoEvents, self.output.clone())
                .map_err(|error| refuse("receive_fifo", error.to_string()))?;

        let mut pending = self.port.pending();
        let mut uart = self.port.uart();
        *uart = restored;
        *pending = saved.pending_input;
        self.port
            .starved
            .store(!pending.is_empty(), Ordering::SeqCst);
        self.output.restore(&saved.unsent_output);
        drop(uart);
        drop(pending);
        if let Some(pump) = &self.pump {
            pump.wake();
        }
        Ok(())
    }
}
