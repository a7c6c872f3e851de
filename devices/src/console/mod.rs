//! virtio-console with one port (Virtual I/O Device specification 1.3, section 5.3).
//!
//! ```text
//!   driver ── transmitq ─► Transmit ── Output, 64 KiB ─► Pump ─► stdio, pty, socket     (or at once to a file, or nowhere)
//!               │ no room: the request stays in the ring until output has left ◄─┘
//!   driver ◄─ receiveq ◄── Receive ◄── Port, 4 KiB ◄──── Pump ◄─ stdio, pty, socket
//!               └─ a buffer is there and no input is: the pump may read
//! ```
//!
//! Promises:
//!
//! - No vCPU waits for the other end for long. Output waits in the ring, and the driver with it, as long as somebody reads; when none of it
//!   has left for a moment, the oldest is lost, since Linux waits for each request with a spinning vCPU. Lost is also what the other end will
//!   never take, and what a single request has beyond [`crate::endpoint::OUTPUT_CAPACITY`]. All that is counted ([`Console::lost_output`]).
//! - Input is read from the other end only while the guest has a buffer for it.
//! - A saved state has every byte exactly once that was taken from the other end and not given to the guest, or taken from the guest and
//!   not by the other end. The pump stands still from the moment of saving, or restoring, until a queue starts or the driver resets the
//!   device; a console that is dropped while it stands still leaves its output to the machine that has the state.

mod port;
mod serve;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use self::port::{INPUT_CAPACITY, Port};
use self::serve::Handler;
use crate::endpoint::{EndpointConfig, EndpointError, OUTPUT_CAPACITY, Opened, Pump};
use crate::virtio::{DeviceType, VirtioDevice, VirtioInterrupt, Virtqueue, Worker, read_space};

/// VIRTIO_CONSOLE_F_SIZE: the configuration has the size of the terminal.
const SIZE: u64 = 1 << 0;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 64;
/// Numbers of the queues.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// The saved state.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    /// Taken from the other end, not yet given to the guest.
    #[serde(with = "serde_bytes")]
    pending_input: Vec<u8>,
    /// Taken from the guest, not yet by the other end.
    #[serde(with = "serde_bytes")]
    unsent_output: Vec<u8>,
    /// Columns and rows of the terminal, zero if not known.
    columns: u16,
    rows: u16,
}

/// The device.
pub struct Console {
    port: Arc<Port>,
    pump: Option<Pump>,
    pty_path: Option<PathBuf>,
    has_size: bool,
    /// Columns, and rows shifted up by 16.
    size: AtomicU32,
    interrupt: OnceLock<Arc<dyn VirtioInterrupt>>,
    workers: Mutex<BTreeMap<u16, Worker<Handler>>>,
}

impl Console {
    /// A console with `config` at the other end. With a `size`, columns and rows, the driver is told of it and of later ones.
    pub fn new(config: EndpointConfig, size: Option<(u16, u16)>) -> Result<Self, EndpointError> {
        Self::on(Opened::new(config)?, size)
    }

    /// A console whose other end is in the caller's hand.
    #[cfg(feature = "fuzzing")]
    pub fn in_hand(
        size: Option<(u16, u16)>,
    ) -> Result<(Self, crate::endpoint::Hand), EndpointError> {
        let (opened, hand) = crate::endpoint::Hand::open()?;
        let console = Self::on(opened, size)?;
        let hand = hand(console.port.clone());
        Ok((console, hand))
    }

    fn on(opened: Opened, size: Option<(u16, u16)>) -> Result<Self, EndpointError> {
        let Opened {
            output,
            endpoint,
            pty_path,
        } = opened;
        let wake = endpoint.as_ref().map(|endpoint| endpoint.wake());
        let port = Arc::new(Port::new(output, wake).map_err(EndpointError::Worker)?);
        let pump = match endpoint {
            Some(endpoint) => Some(endpoint.start("console", port.clone())?),
            None => None,
        };
        Ok(Self {
            port,
            pump,
            pty_path,
            has_size: size.is_some(),
            size: AtomicU32::new(packed(size.unwrap_or_default())),
            interrupt: OnceLock::new(),
            workers: Mutex::default(),
        })
    }

    /// The path of the terminal to open, with [`EndpointConfig::Pty`].
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty_path.as_deref()
    }

    /// Bytes of output that were lost because nobody will ever take them.
    pub fn lost_output(&self) -> u64 {
        self.port.output.lost()
    }

    /// The terminal has so many columns and rows now. The driver hears of it if the console was made with a size.
    pub fn set_size(&self, columns: u16, rows: u16) {
        let size = packed((columns, rows));
        if self.size.swap(size, Ordering::SeqCst) != size
            && self.has_size
            && let Some(interrupt) = self.interrupt.get()
        {
            interrupt.config_changed();
        }
    }

    fn size(&self) -> (u16, u16) {
        let size = self.size.load(Ordering::SeqCst);
        (size as u16, (size >> 16) as u16)
    }

    fn pause(&self) {
        if let Some(pump) = &self.pump {
            pump.pause();
        }
    }

    fn resume(&self) {
        if let Some(pump) = &self.pump {
            pump.resume();
        }
    }

    fn workers(&self) -> MutexGuard<'_, BTreeMap<u16, Worker<Handler>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn packed((columns, rows): (u16, u16)) -> u32 {
    u32::from(columns) | u32::from(rows) << 16
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            name: "virtio-console",
            id: 3,
            pci_class: [0x07, 0x80, 0x00],
        }
    }

    fn features(&self) -> u64 {
        if self.has_size { SIZE } else { 0 }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_console_config: le16 cols, le16 rows, le32 max_nr_ports, le32 emerg_wr. Only the first two are offered.
        let mut space = [0; 12];
        if self.has_size {
            let (columns, rows) = self.size();
            space[..2].copy_from_slice(&columns.to_le_bytes());
            space[2..4].copy_from_slice(&rows.to_le_bytes());
        }
        read_space(&space, offset, data);
    }

    fn connect(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        // A second connection would be the transport's mistake; the first stays.
        let _ = self.interrupt.set(interrupt);
    }

    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        let index = queue.index();
        let (name, handler) = match index {
            RECEIVE => ("console-rx", Handler::receive(self.port.clone())),
            TRANSMIT => ("console-tx", Handler::transmit(self.port.clone())),
            _ => return Err(io::Error::other("the console has two queues")),
        };
        let worker = Worker::start(name, handler, queue)?;
        self.workers().insert(index, worker);
        self.resume();
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<Virtqueue> {
        let worker = self.workers().remove(&index)?;
        Some(worker.stop()?.1)
    }

    /// What waits on either side stays: it belongs to whoever uses the console next.
    fn reset(&self) {
        self.resume();
    }

    fn save(&self) -> Vec<u8> {
        self.pause();
        let (columns, rows) = self.size();
        let state = State {
            pending_input: self.port.pending(),
            unsent_output: self.port.output.unsent(),
            columns,
            rows,
        };
        rmp_serde::to_vec_named(&state)
            .expect("a struct of numbers and bytes always encodes into memory")
    }

    fn restore(&self, saved: &[u8]) -> Result<(), String> {
        let state: State = rmp_serde::from_slice(saved).map_err(|error| error.to_string())?;
        for (what, bytes, limit) in [
            ("input", &state.pending_input, INPUT_CAPACITY),
            ("output", &state.unsent_output, OUTPUT_CAPACITY),
        ] {
            if bytes.len() > limit {
                return Err(format!(
                    "{} bytes of {what} wait, at most {limit} can",
                    bytes.len()
                ));
            }
        }
        self.pause();
        self.port.restore(state.pending_input);
        self.port.output.restore(&state.unsent_output);
        self.size
            .store(packed((state.columns, state.rows)), Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
