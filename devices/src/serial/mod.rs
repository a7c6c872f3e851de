//! Serial port: a 16550 (`vm-superio`) and what is on the other end of its cable.
//!
//! ```text
//!           vCPU threads                              worker thread (only where there can be input)
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

mod backend_file;
mod backend_pty;
mod backend_socket;
mod backend_stdio;
mod error;
mod output;
mod persist;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

pub use self::error::SerialError;
pub use self::output::OUTPUT_CAPACITY;
use self::output::{Output, OutputQueue};
use self::worker::{Endpoint, Worker};
use crate::bus::{BusDevice, read_bytes, write_bytes};
use crate::interrupt::InterruptLine;

/// Number of ports.
pub const SERIAL_PORTS: u64 = 8;

/// Size of the UART's receive FIFO, and of the input that waits for it.
const FIFO_SIZE: usize = 64;

/// What is on the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialBackend {
    /// Nothing: output is lost, no input comes.
    Null,
    /// This process's standard input and output. A terminal is in raw mode meanwhile, and gets its mode back when the
    /// device stops, when the process exits, and before a panic's message.
    Stdio,
    /// A file that takes the output.
    File {
        /// Its path.
        path: PathBuf,
        /// Keep what it has; otherwise it is emptied.
        append: bool,
    },
    /// A new pseudo-terminal: [`Serial::pty_path`].
    Pty,
    /// A new unix socket that serves one client at a time; others wait for their turn.
    Socket {
        /// Its path, where nothing may be yet.
        path: PathBuf,
    },
}

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

/// What vCPU threads and the worker share. Locks are taken in the order of the fields.
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

/// The serial port. It covers [`SERIAL_PORTS`] ports.
pub struct Serial {
    port: Arc<Port>,
    output: Output,
    line: LineTrigger,
    worker: Option<Worker>,
    pty_path: Option<PathBuf>,
}

impl Serial {
    /// A serial port after power on with `backend` at the other end, whose interrupt pulses `line`.
    pub fn new(backend: SerialBackend, line: Arc<dyn InterruptLine>) -> Result<Self, SerialError> {
        let (queue, wake) = OutputQueue::new()?;
        let mut pty_path = None;
        let (output, endpoint): (Output, Option<Box<dyn Endpoint>>) = match backend {
            SerialBackend::Null => (Output::nowhere(), None),
            SerialBackend::File { path, append } => {
                (Output::file(backend_file::open(&path, append)?), None)
            }
            SerialBackend::Stdio => (
                Output::queue(queue),
                Some(Box::new(backend_stdio::Stdio::new()?)),
            ),
            SerialBackend::Pty => {
                let pty = backend_pty::Pty::new()?;
                pty_path = Some(pty.path().to_owned());
                (Output::queue(queue), Some(Box::new(pty)))
            }
            SerialBackend::Socket { path } => (
                Output::queue(queue),
                Some(Box::new(backend_socket::Socket::new(&path)?)),
            ),
        };
        let line = LineTrigger(line);
        let port = Arc::new(Port {
            pending: Mutex::new(Vec::new()),
            uart: Mutex::new(Uart::with_events(line.clone(), NoEvents, output.clone())),
            starved: AtomicBool::new(false),
        });
        let worker = match (endpoint, output.as_queue()) {
            (Some(endpoint), Some(queue)) => {
                Some(Worker::start(endpoint, port.clone(), queue, wake)?)
            }
            _ => None,
        };
        Ok(Serial {
            port,
            output,
            line,
            worker,
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

    /// Makes the worker stand still, and returns when it does. Harmless when it does already.
    pub fn pause(&self) {
        if let Some(worker) = &self.worker {
            worker.pause();
        }
    }

    /// Undoes [`Serial::pause`].
    pub fn resume(&self) {
        if let Some(worker) = &self.worker {
            worker.resume();
        }
    }

    /// Ends the worker and closes the back end; the guest's output is lost from then on. Output that waits gets a short
    /// time to leave, unless the device is paused: it is in the saved state then, and another machine sends it. Dropping
    /// does the same.
    pub fn stop(&self) {
        if let Some(worker) = &self.worker {
            worker.stop();
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
            && let Some(worker) = &self.worker
        {
            worker.wake();
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
