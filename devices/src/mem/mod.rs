//! virtio-mem: memory that comes and goes in blocks (Virtual I/O Device specification 1.3, section 5.15).
//!
//! ```text
//!   set_requested_bytes ─► requested_size, config interrupt ─► driver ── PLUG, UNPLUG ─► Region ─► GuestRam: present, zero | given back
//!   plugged_bytes ◄─────── plugged_size ◄──────────────────────────────────────────────────┘
//!   hold(true) ─► every change is answered BUSY ─► hold(false) or nudge ─► config interrupt ─► the driver tries again
//! ```
//!
//! Promises:
//!
//! - A block that is plugged reads as zeros; one that is unplugged has given its memory back to the host before the driver hears of it, as
//!   far as [`GuestRam::discard`] can. Nothing is looked for in blocks that are not plugged ([`GuestRam::set_present`]), so a move and a
//!   snapshot send and store none of them.
//! - The driver never gets more than was requested. What it unplugs is its own matter: it may not be able to give back all.
//! - While a move copies memory, [`VirtioMem::hold`] keeps the blocks as they are. So no copy that was sent before can come back at the
//!   destination as the contents of a block that was unplugged and plugged meanwhile. Linux tries again after some minutes, or when the
//!   configuration changes: it is told so when the move has ended, at either end.
//! - A reset of the device unplugs nothing; the driver unplugs all when it begins. A reset of the machine makes a new device, with nothing
//!   plugged and as much requested as before.
//! - Unplugged memory must not be used, which `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` says, but it stays mapped. Who uses it all the same, or has
//!   a device use it, takes the host's memory for it (up to the region's size), is not promised that anything is kept, and harms nobody
//!   else: it is zeroed before it is plugged.

mod blocks;
mod request;
mod serve;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use memory::{BLOCK_SIZE, GuestRam};
use serde::{Deserialize, Serialize};

use self::blocks::Blocks;
use self::request::Region;
use self::serve::{Handler, Place};
use crate::virtio::{DeviceType, VirtioDevice, VirtioInterrupt, Virtqueue, Worker, read_space};

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// How often requests were answered.
#[derive(Debug, Default)]
struct Answered {
    served: AtomicU64,
    refused: AtomicU64,
    busy: AtomicU64,
}

/// What the device and its queue share.
struct Shared {
    place: Place,
    /// First guest-physical address of the region, and its length in bytes.
    gpa: u64,
    len: u64,
    region: Mutex<Region>,
    /// Held for reading while a request is served: blocks must not change while it is true.
    held: RwLock<bool>,
    /// A request was answered BUSY, and the driver has not been told since that it may try again.
    owes_word: AtomicBool,
    requested: AtomicU64,
    /// As the region says; apart, so that no vCPU that looks at it waits for memory to be given back.
    plugged: AtomicU64,
    counters: Answered,
}

impl Shared {
    fn region(&self) -> MutexGuard<'_, Region> {
        self.region.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The saved state.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    /// First guest-physical address of the region.
    gpa: u64,
    /// Its length in bytes.
    len: u64,
    /// Bytes of a block.
    block_size: u64,
    /// How much the driver should have plugged, in bytes.
    requested_bytes: u64,
    /// Which blocks are: bit `n % 8` of byte `n / 8` is block `n`.
    #[serde(with = "serde_bytes")]
    plugged: Vec<u8>,
}

/// The device.
pub struct VirtioMem {
    shared: Arc<Shared>,
    interrupt: OnceLock<Arc<dyn VirtioInterrupt>>,
    worker: Mutex<Option<Worker<Handler>>>,
}

impl VirtioMem {
    /// A device that plugs the region with this index of `ram`, whole blocks, of which `requested_bytes` are to be plugged. Nothing is
    /// yet; [`VirtioMem::begin`] or a restore says so to `ram`, which takes all of the region to be there until then.
    pub fn new(ram: Arc<GuestRam>, region: usize, requested_bytes: u64) -> io::Result<Self> {
        let Some(range) = ram.regions().get(region).map(|region| region.range()) else {
            let error = format!("there is no memory region {region}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        };
        if !(range.gpa | range.len).is_multiple_of(BLOCK_SIZE) {
            let error = "the region does not consist of whole blocks of 2 MiB";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let device = Self {
            shared: Arc::new(Shared {
                place: Place::new(ram, region),
                gpa: range.gpa,
                len: range.len,
                region: Mutex::new(Region {
                    gpa: range.gpa,
                    blocks: Blocks::none(range.len / BLOCK_SIZE),
                }),
                held: RwLock::new(false),
                owes_word: AtomicBool::new(false),
                requested: AtomicU64::new(0),
                plugged: AtomicU64::new(0),
                counters: Answered::default(),
            }),
            interrupt: OnceLock::new(),
            worker: Mutex::default(),
        };
        device.set_requested_bytes(requested_bytes);
        Ok(device)
    }

    /// The machine is new: nothing is plugged, and its memory knows. Not for a machine that arrives: what comes before the state does is
    /// contents of blocks that are plugged.
    pub fn begin(&self) {
        let region = self.shared.region();
        self.tell_memory(&region.blocks);
    }

    /// Tells the driver how much should be plugged: whole blocks, and at most all of the region. It takes its time, and may not get there.
    pub fn set_requested_bytes(&self, bytes: u64) {
        let bytes = bytes.min(self.shared.len) / BLOCK_SIZE * BLOCK_SIZE;
        if self.shared.requested.swap(bytes, Ordering::SeqCst) != bytes {
            self.config_changed();
        }
    }

    /// How much should be plugged.
    pub fn requested_bytes(&self) -> u64 {
        self.shared.requested.load(Ordering::SeqCst)
    }

    /// How much is.
    pub fn plugged_bytes(&self) -> u64 {
        self.shared.plugged.load(Ordering::SeqCst)
    }

    /// Whether the blocks stay as they are, which they do not at first. After `hold(true)` has returned, none changes, and requests that would
    /// change one are answered BUSY; `hold(false)` tells the driver to try again, if there was such a request.
    pub fn hold(&self, on: bool) {
        let held = &self.shared.held;
        *held.write().unwrap_or_else(PoisonError::into_inner) = on;
        if !on && self.shared.owes_word.swap(false, Ordering::SeqCst) {
            self.config_changed();
        }
    }

    /// The guest has come from another host, where it may have been told to try again: says that it can now, if it has not what it should.
    pub fn nudge(&self) {
        if self.requested_bytes() != self.plugged_bytes() {
            self.config_changed();
        }
    }

    /// Requests since the device was made.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.shared.counters;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("requested_bytes", self.requested_bytes()),
            ("plugged_bytes", self.plugged_bytes()),
            ("served_requests", count(&counters.served)),
            ("refused_requests", count(&counters.refused)),
            ("busy_requests", count(&counters.busy)),
        ]
    }

    fn config_changed(&self) {
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.config_changed();
        }
    }

    fn tell_memory(&self, blocks: &Blocks) {
        let place = &self.shared.place;
        place.set_present(0..blocks.count(), false);
        for run in blocks.runs() {
            place.set_present(run, true);
        }
    }

    fn worker(&self) -> MutexGuard<'_, Option<Worker<Handler>>> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for VirtioMem {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            name: "virtio-mem",
            id: 24,
            pci_class: [0x00, 0xff, 0x00],
        }
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // block_size, node_id and padding, addr, region_size, usable_region_size, plugged_size, requested_size. All of the region is
        // usable at any time: how much is plugged is bounded by what is requested.
        let fields = [
            BLOCK_SIZE,
            0,
            self.shared.gpa,
            self.shared.len,
            self.shared.len,
            self.plugged_bytes(),
            self.requested_bytes(),
        ];
        let space: Vec<u8> = fields.into_iter().flat_map(u64::to_le_bytes).collect();
        read_space(&space, offset, data);
    }

    fn connect(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        // A second connection would be the transport's mistake; the first stays.
        let _ = self.interrupt.set(interrupt);
    }

    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        let handler = Handler(Arc::clone(&self.shared));
        *self.worker() = Some(Worker::start("mem", handler, queue)?);
        Ok(())
    }

    fn stop_queue(&self, _index: u16) -> Option<Virtqueue> {
        let worker = self.worker().take()?;
        Some(worker.stop()?.1)
    }

    fn save(&self) -> Vec<u8> {
        let region = self.shared.region();
        let state = State {
            gpa: region.gpa,
            len: self.shared.len,
            block_size: BLOCK_SIZE,
            requested_bytes: self.requested_bytes(),
            plugged: region.blocks.to_bytes(),
        };
        rmp_serde::to_vec_named(&state)
            .expect("a struct of plain values always encodes into memory")
    }

    fn restore(&self, saved: &[u8]) -> Result<(), String> {
        let state: State = rmp_serde::from_slice(saved).map_err(|error| error.to_string())?;
        let mut region = self.shared.region();
        let here = (region.gpa, self.shared.len, BLOCK_SIZE);
        if (state.gpa, state.len, state.block_size) != here {
            return Err(format!(
                "it plugs blocks of {:#x} bytes into {:#x} at {:#x}; here it is {:#x} into {:#x} at {:#x}",
                state.block_size, state.len, state.gpa, here.2, here.1, here.0
            ));
        }
        if state.requested_bytes > state.len || !state.requested_bytes.is_multiple_of(BLOCK_SIZE) {
            return Err(format!(
                "{} bytes are requested, which are not whole blocks or more than there are",
                state.requested_bytes
            ));
        }
        let Some(blocks) = Blocks::from_bytes(&state.plugged, region.blocks.count()) else {
            return Err(format!(
                "{} bytes do not say which of {} blocks are plugged",
                state.plugged.len(),
                region.blocks.count()
            ));
        };
        self.tell_memory(&blocks);
        let shared = &self.shared;
        shared
            .requested
            .store(state.requested_bytes, Ordering::SeqCst);
        let plugged = blocks.plugged() * BLOCK_SIZE;
        shared.plugged.store(plugged, Ordering::SeqCst);
        region.blocks = blocks;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
