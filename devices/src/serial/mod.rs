//! Serial port: a 16550 (`vm-superio`) and what is on the other end of its cable.
//!
//! ```text
//!           vCPU threads                              pump's thread (only where there can be input)
//!   OUT ─► UART ─► queue, 64 KiB, oldest lost ──wake──► back end   (stdio, pty, socket)
//!             └──► file, written at once                            (file)
//!             └──► nowhere                                          (nothing)
//!   IN  ◄─ UART ◄─ receive FIFO, 64 bytes ◄─ pending, 64 bytes ◄─ back end
//!            └─► interrupt line
//! ```
//!
//! Promises:
//!
//! - A guest never waits for the other end. Output that nobody takes is kept up to [`OUTPUT_CAPACITY`] bytes, so that a reader who
//!   comes late sees the latest; beyond that the oldest is lost, and counted ([`Serial::lost_output`]). A file is written at
//!   once, on the vCPU's thread; what it refuses is lost and counted.
//! - Input is read no faster than the guest takes it; it waits at the other end.
//! - [`Serial::pause`] returns when the worker does nothing any more, and state saved until [`Serial::resume`] has every byte
//!   exactly once: taken from the other end and not read by the guest, or written by the guest and not taken by the other end.
//! - [`Serial::stop`], or dropping, joins the worker and leaves nothing behind: no thread, no socket file, no raw terminal.

mod persist;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

use crate::bus::{BusDevice, read_bytes, write_bytes};
pub use crate::endpoint::{
    EndpointConfig as SerialBackend, EndpointError as SerialError, OUTPUT_CAPACITY,
};
use crate::endpoint::{GuestPort, Opened, Output, Pump};
use crate::interrupt::InterruptLine;

/// Number of ports.
pub const SERIAL_PORTS: u64 = 8;

/// Size of the UART's receive FIFO, and of the input that waits for it.
const FIFO_SIZE: usize = 64;

/// The UART's interrupt.
#[derive(Clone)]
struct LineTrigger(Arc<dyn InterruptLine>);

impl Trigger for LineTrigger {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.trigger();
        Ok(())
    }
}

type Uart = vm_superio::Serial<LineTrigger, NoEvents, Output>;

/// What vCPU threads and the pump share. Locks are taken in the order of the fields.
struct Port {
    /// Input that the FIFO has had no room for; at most [`FIFO_SIZE`] bytes.
    pending: Mutex<Vec<u8>>,
    uart: Mutex<Uart>,
    /// `pending` is not empty. Set with both locks held, so that whoever makes room sees it.
    starved: AtomicBool,
}

impl Port {
    fn pending(&self) -> MutexGuard<'_, Vec<u8>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves pending input into the FIFO as far as there is room. `true` when none is left.
    fn feed(&self, pending: &mut Vec<u8>) -> bool {
        let mut uart = self.uart();
        // In loopback mode, or when full, the UART takes nothing.
        let taken = uart.enqueue_raw_bytes(pending).unwrap_or(0);
        pending.drain(..taken.min(pending.len()));
        self.starved.store(!pending.is_empty(), Ordering::SeqCst);
        pending.is_empty()
    }
}

impl GuestPort for Port {
    fn input_room(&self) -> usize {
        if self.pending().is_empty() {
            FIFO_SIZE
        } else {
            0
        }
    }

    fn input(&self, bytes: &[u8]) {
        let mut pending = self.pending();
        pending.extend_from_slice(bytes);
        self.feed(&mut pending);
    }
}

/// The serial port. It covers [`SERIAL_PORTS`] ports.
pub struct Serial {
    port: Arc<Port>,
    output: Output,
    line: LineTrigger,
    pump: Option<Pump>,
    pty_path: Option<PathBuf>,
}

impl Serial {
    /// A serial port after power on with `backend` at the other end, whose interrupt pulses `line`.
    pub fn new(backend: SerialBackend, line: Arc<dyn InterruptLine>) -> Result<Self, SerialError> {
        Self::on(Opened::new(backend)?, line)
    }

    /// A serial port whose other end is in the caller's hand.
    #[cfg(feature = "fuzzing")]
    pub fn in_hand(
        line: Arc<dyn InterruptLine>,
    ) -> Result<(Self, crate::endpoint::Hand), SerialError> {
        let (opened, hand) = crate::endpoint::Hand::open()?;
        let serial = Self::on(opened, line)?;
        let hand = hand(serial.port.clone());
        Ok((serial, hand))
    }

    fn on(opened: Opened, line: Arc<dyn InterruptLine>) -> Result<Self, SerialError> {
        let Opened {
            output,
            endpoint,
            pty_path,
        } = opened;
        let line = LineTrigger(line);
        let port = Arc::new(Port {
            pending: Mutex::new(Vec::new()),
            uart: Mutex::new(Uart::with_events(line.clone(), NoEvents, output.clone())),
            starved: AtomicBool::new(false),
        });
        let pump = match endpoint {
            Some(endpoint) => Some(endpoint.start("serial", port.clone())?),
            None => None,
        };
        Ok(Serial {
            port,
            output,
            line,
            pump,
            pty_path,
        })
    }

    /// The path of the terminal to open, with [`SerialBackend::Pty`].
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty_path.as_deref()
    }

    /// Bytes of output that were lost because nobody took them.
    pub fn lost_output(&self) -> u64 {
        self.output.lost()
    }

    /// Makes the pump stand still, and returns when it does. Harmless when it does already.
    pub fn pause(&self) {
        if let Some(pump) = &self.pump {
            pump.pause();
        }
    }

    /// Undoes [`Serial::pause`].
    pub fn resume(&self) {
        if let Some(pump) = &self.pump {
            pump.resume();
        }
    }

    /// Ends the pump and closes the back end; the guest's output is lost from then on. Output that waits gets a short
    /// time to leave, unless the device is paused: it is in the saved state then, and another machine sends it. Dropping
    /// does the same.
    pub fn stop(&self) {
        if let Some(pump) = &self.pump {
            pump.stop();
        }
    }

    /// Back to the state after power on. The other end, and what waits to be sent there, stay.
    pub fn reset(&self) {
        *self.port.uart() = Uart::with_events(self.line.clone(), NoEvents, self.output.clone());
        self.after_access();
    }

    /// Fills the room that the guest may have made.
    fn after_access(&self) {
        if self.port.starved.load(Ordering::SeqCst)
            && self.port.feed(&mut self.port.pending())
            && let Some(pump) = &self.pump
        {
            pump.wake();
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.port.uart();
        read_bytes(offset, data, |offset| match u8::try_from(offset) {
            Ok(offset) if u64::from(offset) < SERIAL_PORTS => uart.read(offset),
            _ => 0xff,
        });
        drop(uart);
        self.after_access();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.port.uart();
        write_bytes(offset, data, |offset, value| {
            if let Ok(offset) = u8::try_from(offset) {
                // Neither the line nor the output fails.
                let _ = uart.write(offset, value);
            }
        });
        drop(uart);
        self.after_access();
    }
}

#[cfg(test)]
mod tests;
