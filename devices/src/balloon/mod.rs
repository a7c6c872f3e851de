//! virtio-balloon: the guest gives memory back (Virtual I/O Device specification 1.3, section 5.5).
//!
//! ```text
//!   set_target_bytes ─► num_pages, config interrupt ─► driver ── inflateq ─► page numbers ─► sorted runs ─┐
//!   actual_bytes ◄───── actual ◄───────────────────────── driver ── deflateq ─► (nothing to do)           ├─► GuestRam::discard
//!                                                         driver ── reporting ─► free ranges ─────────────┘
//!   request_statistics ─► the held buffer goes back ─► driver ── statsq ─► its buffer, filled ─► statistics, held
//! ```
//!
//! Promises:
//!
//! - Pages that the guest puts into the balloon or reports as free are given back to the host, as far as they fill pages of the backing;
//!   they read as zeros afterwards. A page that is not RAM is left alone and counted.
//! - What these pages hold is nobody's, by contract: the driver does not read them before it has written them. So they are not marked
//!   dirty; a copy that a move has sent before is as good as the zeros. Once the guest writes such a page, the hypervisor's dirty log sees
//!   it like any other write.
//! - While memory must not be taken out of its place (a move that pages in by faults), [`Balloon::set_discarding`] holds it back: the
//!   guest's requests are served as ever, the memory stays.
//! - Nothing of a queue is held when it is stopped: the driver's one statistics buffer is put back into the ring, and read again at the next
//!   start. So the saved state has the sizes only.
//!
//! Where the queue for reports is depends on who counts: the specification gives it the number 4, with 3 for free page hints, whether these
//! are offered or not; Linux has long counted only the queues that exist, which makes it 3, or 2 if the driver does not take statistics
//! either. All three numbers work here.

mod give_back;
mod serve;
mod statistics;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use memory::{GuestRam, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::serve::{Handler, Role};
use crate::virtio::{DeviceType, VirtioDevice, VirtioInterrupt, Virtqueue, Worker, read_space};

/// VIRTIO_BALLOON_F_STATS_VQ.
const STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_REPORTING.
const REPORTING: u64 = 1 << 5;
/// Where `actual` is in the configuration space; `num_pages` is at 0.
const ACTUAL_AT: u64 = 4;

/// What the balloon has done, in pages of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonCounters {
    /// Put into the balloon.
    pub inflated_pages: u64,
    /// Taken out of it.
    pub deflated_pages: u64,
    /// Reported as free.
    pub reported_pages: u64,
    /// Given back to the host.
    pub discarded_pages: u64,
    /// Named by the driver although they are not RAM.
    pub ignored_pages: u64,
    /// That the host did not take.
    pub failed_pages: u64,
}

/// What the device and its queues share.
struct Shared {
    ram: Arc<GuestRam>,
    /// Held for reading while pages are given back.
    discarding: RwLock<bool>,
    target: AtomicU32,
    actual: AtomicU32,
    accepted: AtomicU64,
    counters: Mutex<BalloonCounters>,
    statistics: Mutex<BTreeMap<&'static str, u64>>,
    want_statistics: EventFd,
}

impl Shared {
    fn count(&self, count: impl FnOnce(&mut BalloonCounters)) {
        count(&mut self.counters.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn statistics(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The saved state.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    /// What the balloon should hold, in pages of 4 KiB.
    target_pages: u32,
    /// What the driver says that it holds.
    actual_pages: u32,
}

/// What a balloon offers its driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonOptions {
    /// The driver may take pages back when it has no other memory.
    pub deflate_on_oom: bool,
    /// The driver tells of memory that it has freed, which is given back at once.
    pub free_page_reporting: bool,
}

/// The device.
pub struct Balloon {
    options: BalloonOptions,
    shared: Arc<Shared>,
    interrupt: OnceLock<Arc<dyn VirtioInterrupt>>,
    workers: Mutex<BTreeMap<u16, Worker<Handler>>>,
}

impl Balloon {
    /// A balloon for `ram` that should hold `target_bytes`.
    pub fn new(ram: Arc<GuestRam>, target_bytes: u64, options: BalloonOptions) -> io::Result<Self> {
        let balloon = Self {
            options,
            shared: Arc::new(Shared {
                ram,
                discarding: RwLock::new(true),
                target: AtomicU32::new(0),
                actual: AtomicU32::new(0),
                accepted: AtomicU64::new(0),
                counters: Mutex::default(),
                statistics: Mutex::default(),
                want_statistics: EventFd::new(EFD_NONBLOCK)?,
            }),
            interrupt: OnceLock::new(),
            workers: Mutex::default(),
        };
        balloon.set_target_bytes(target_bytes);
        Ok(balloon)
    }

    /// Tells the driver how much the balloon should hold: whole pages, and at most all of RAM. It takes its time, and may not get there.
    pub fn set_target_bytes(&self, bytes: u64) {
        let pages = (bytes / PAGE_SIZE).min(self.most_pages()) as u32;
        let before = self.shared.target.swap(pages, Ordering::SeqCst);
        if before != pages
            && let Some(interrupt) = self.interrupt.get()
        {
            interrupt.config_changed();
        }
    }

    /// How much the balloon should hold.
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.shared.target.load(Ordering::SeqCst)) * PAGE_SIZE
    }

    /// How much it holds, by the driver's word.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.shared.actual.load(Ordering::SeqCst)) * PAGE_SIZE
    }

    /// The driver's latest statistics, in bytes or events: `free-memory`, `swap-in` and so on. Only those that it has given.
    pub fn statistics(&self) -> BTreeMap<&'static str, u64> {
        self.shared.statistics().clone()
    }

    /// Asks the driver for new statistics; they come when it has answered, if it does.
    pub fn request_statistics(&self) {
        // It fails only when nobody has looked for 2^64 requests.
        let _ = self.shared.want_statistics.write(1);
    }

    /// What it has done since it was made.
    pub fn counters(&self) -> BalloonCounters {
        *self
            .shared
            .counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether pages are given back to the host, which they are at first. After `set_discarding(false)` has returned, none is.
    pub fn set_discarding(&self, on: bool) {
        *self
            .shared
            .discarding
            .write()
            .unwrap_or_else(PoisonError::into_inner) = on;
    }

    /// All of RAM, or what 32 bits can say.
    fn most_pages(&self) -> u64 {
        (self.shared.ram.total_bytes() / PAGE_SIZE).min(u64::from(u32::MAX))
    }

    fn role(&self, queue: u16) -> Role {
        let accepted = self.shared.accepted.load(Ordering::SeqCst);
        match queue {
            0 => Role::Inflate,
            1 => Role::Deflate,
            2 if accepted & STATS_VQ != 0 => Role::Statistics,
            _ if accepted & REPORTING != 0 => Role::Report,
            _ => Role::Idle,
        }
    }

    fn workers(&self) -> MutexGuard<'_, BTreeMap<u16, Worker<Handler>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            name: "virtio-balloon",
            id: 5,
            pci_class: [0x00, 0xff, 0x00],
        }
    }

    fn features(&self) -> u64 {
        let offered = |wanted: bool, feature: u64| if wanted { feature } else { 0 };
        STATS_VQ
            | offered(self.options.deflate_on_oom, DEFLATE_ON_OOM)
            | offered(self.options.free_page_reporting, REPORTING)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128, 128, 16, 128, 128]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 8];
        space[..4].copy_from_slice(&self.shared.target.load(Ordering::SeqCst).to_le_bytes());
        space[4..].copy_from_slice(&self.shared.actual.load(Ordering::SeqCst).to_le_bytes());
        read_space(&space, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut actual = self.shared.actual.load(Ordering::SeqCst).to_le_bytes();
        for (byte, at) in data.iter().zip(0..) {
            let place = offset
                .checked_add(at)
                .and_then(|at| usize::try_from(at.checked_sub(ACTUAL_AT)?).ok());
            if let Some(place) = place.and_then(|place| actual.get_mut(place)) {
                *place = *byte;
            }
        }
        self.shared
            .actual
            .store(u32::from_le_bytes(actual), Ordering::SeqCst);
    }

    fn set_features(&self, accepted: u64) {
        self.shared.accepted.store(accepted, Ordering::SeqCst);
    }

    fn connect(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        // A second connection would be the transport's mistake; the first stays.
        let _ = self.interrupt.set(interrupt);
    }

    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        let index = queue.index();
        let handler = Handler::new(Arc::clone(&self.shared), self.role(index));
        let worker = Worker::start(&format!("balloon-{index}"), handler, queue)?;
        self.workers().insert(index, worker);
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<Virtqueue> {
        let worker = self.workers().remove(&index)?;
        Some(worker.stop()?.1)
    }

    /// The driver has all pages back.
    fn reset(&self) {
        self.shared.actual.store(0, Ordering::SeqCst);
        self.shared.statistics().clear();
    }

    fn save(&self) -> Vec<u8> {
        let state = State {
            target_pages: self.shared.target.load(Ordering::SeqCst),
            actual_pages: self.shared.actual.load(Ordering::SeqCst),
        };
        rmp_serde::to_vec_named(&state).expect("a struct of numbers always encodes into memory")
    }

    fn restore(&self, saved: &[u8]) -> Result<(), String> {
        let state: State = rmp_serde::from_slice(saved).map_err(|error| error.to_string())?;
        let most = self.most_pages();
        if u64::from(state.target_pages) > most {
            return Err(format!(
                "the balloon should hold {} pages, but there are only {most} of RAM",
                state.target_pages
            ));
        }
        self.shared
            .target
            .store(state.target_pages, Ordering::SeqCst);
        self.shared
            .actual
            .store(state.actual_pages, Ordering::SeqCst);
        self.shared.statistics().clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
