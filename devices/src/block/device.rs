//! The device: what the transport and the machine see of a disk.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::config_space::{self, ConfigSpace};
use super::counters::Counters;
use super::disk::{Disk, DiskConfig, SECTOR};
use super::engine::{self, EngineKind, Place};
use super::error::DiskError;
use super::handler::{Handler, Shared};
use super::request::SERIAL_LEN;
use crate::rate_limiter::RateLimiter;
use crate::virtio::{DeviceType, VirtioDevice, VirtioInterrupt, Virtqueue, Worker, read_space};

/// Buffers that a request may have, whatever its queue's size: some drivers do not heed `seg_max`.
const MIN_PARTS: u16 = 1024;
/// Most queues of a disk.
const MAX_QUEUES: u16 = 64;

/// A virtio block device. See the module's text.
#[derive(Debug)]
pub struct Block {
    id: String,
    config: DiskConfig,
    shared: Arc<Shared>,
    workers: Mutex<Vec<Option<Worker<Handler>>>>,
    interrupt: OnceLock<Interrupt>,
}

struct Interrupt(Arc<dyn VirtioInterrupt>);

impl std::fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interrupt")
    }
}

impl Block {
    /// Opens and locks a disk; its threads are named after `id`.
    pub fn new(id: &str, config: DiskConfig) -> Result<Self, DiskError> {
        check(&config)?;
        let disk = Disk::open(&config)?;
        Self::with_disk(id, config, disk)
    }

    /// The same with a disk that is open already, by the same configuration; see [`Disk::open_unlocked`].
    pub fn with_disk(id: &str, config: DiskConfig, disk: Disk) -> Result<Self, DiskError> {
        check(&config)?;
        let mut serial = [0; SERIAL_LEN];
        let given = config.serial.as_deref().unwrap_or_default().as_bytes();
        serial[..given.len()].copy_from_slice(given);
        let engine = choose(&config, engine::probe_uring)?;
        let limiter = config
            .rate_limiter
            .map(|limits| Mutex::new(RateLimiter::new(&limits, Instant::now())));
        let capacity = disk.sectors()?;
        let parts = config.queue_size.max(MIN_PARTS).into();
        let workers = (0..config.num_queues).map(|_| None).collect();
        Ok(Self {
            id: id.to_owned(),
            config,
            shared: Arc::new(Shared {
                disk: Arc::new(disk),
                serial,
                parts,
                capacity: AtomicU64::new(capacity),
                write_through: AtomicBool::new(true),
                limiter,
                counters: Counters::default(),
                engine: AtomicU8::new(engine as u8),
            }),
            workers: Mutex::new(workers),
            interrupt: OnceLock::new(),
        })
    }

    /// What it was made of.
    pub fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// The file.
    pub fn disk(&self) -> &Disk {
        &self.shared.disk
    }

    /// The size that the guest sees, in bytes.
    pub fn capacity_bytes(&self) -> u64 {
        self.shared.capacity.load(Ordering::Acquire) * SECTOR
    }

    /// How the host is asked: `io_uring` or `sync`.
    pub fn engine_name(&self) -> &'static str {
        self.engine().name()
    }

    /// Counts of operations and bytes since it was made.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.all()
    }

    /// Takes over a size that has changed on the host or, with `bytes`, first grows the image to it. Tells the driver; returns the new size
    /// in bytes. On failure the guest sees the old size.
    pub fn resize(&self, bytes: Option<u64>) -> Result<u64, DiskError> {
        if let Some(bytes) = bytes {
            self.shared.disk.grow(bytes)?;
        }
        let sectors = self.shared.disk.sectors()?;
        let before = self.shared.capacity.swap(sectors, Ordering::AcqRel);
        if sectors < before {
            tracing::warn!(disk = %self.config.path.display(), before, sectors, "the disk has shrunk");
        }
        if sectors != before
            && let Some(interrupt) = self.interrupt.get()
        {
            interrupt.0.config_changed();
        }
        Ok(sectors * SECTOR)
    }

    fn engine(&self) -> EngineKind {
        if self.shared.engine.load(Ordering::Relaxed) == EngineKind::IoUring as u8 {
            EngineKind::IoUring
        } else {
            EngineKind::Sync
        }
    }

    fn open_engine(&self, queue: &Virtqueue) -> io::Result<Box<dyn engine::BlockEngine>> {
        let kind = self.engine();
        let place = || Place {
            disk: Arc::clone(&self.shared.disk),
            memory: queue.memory().clone(),
        };
        match engine::open(kind, place(), queue.size()) {
            Err(error) if kind != EngineKind::Sync && self.config.engine.is_none() => {
                tracing::warn!(disk = %self.config.path.display(), %error, "no io_uring for a queue; it is slower without");
                let kind = EngineKind::Sync;
                self.shared.engine.store(kind as u8, Ordering::Relaxed);
                engine::open(kind, place(), queue.size())
            }
            opened => opened,
        }
    }

    fn workers(&self) -> MutexGuard<'_, Vec<Option<Worker<Handler>>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(config: &DiskConfig) -> Result<(), DiskError> {
    let path = || config.path.clone();
    let size = config.queue_size;
    if !(1..=MAX_QUEUES).contains(&config.num_queues)
        || !size.is_power_of_two()
        || !(4..=32768).contains(&size)
    {
        return Err(DiskError::Queues {
            path: path(),
            count: config.num_queues,
            size,
        });
    }
    let len = config.serial.as_ref().map_or(0, String::len);
    if len > SERIAL_LEN {
        return Err(DiskError::Serial { path: path(), len });
    }
    Ok(())
}

/// The engine that was asked for, or the best that the host has.
fn choose(
    config: &DiskConfig,
    probe: impl FnOnce() -> io::Result<()>,
) -> Result<EngineKind, DiskError> {
    if config.engine == Some(EngineKind::Sync) {
        return Ok(EngineKind::Sync);
    }
    match probe() {
        Ok(()) => Ok(EngineKind::IoUring),
        Err(source) if config.engine.is_some() => Err(DiskError::Engine {
            path: config.path.clone(),
            source,
        }),
        Err(error) => {
            tracing::info!(disk = %config.path.display(), %error, "no io_uring on this host; the disk is slower without");
            Ok(EngineKind::Sync)
        }
    }
}

/// The saved state.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    /// What the guest knows of the disk's size; zero is nothing.
    capacity_sectors: u64,
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            name: "virtio-blk",
            id: 2,
            // Mass storage, other.
            pci_class: [0x01, 0x80, 0x00],
        }
    }

    fn features(&self) -> u64 {
        config_space::features(&self.shared.disk, &self.config)
    }

    fn feature_name(&self, bit: u32) -> Option<&'static str> {
        config_space::feature_name(bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.config.queue_size; self.config.num_queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let capacity = self.shared.capacity.load(Ordering::Acquire);
        let space = ConfigSpace::new(&self.shared.disk, &self.config, capacity);
        read_space(space.as_bytes(), offset, data);
    }

    fn set_features(&self, accepted: u64) {
        // Section 5.2.6.2: who cannot flush relies on a write that is answered.
        let write_through = accepted & config_space::FLUSH == 0;
        self.shared
            .write_through
            .store(write_through, Ordering::Relaxed);
    }

    fn save(&self) -> Vec<u8> {
        let state = State {
            capacity_sectors: self.shared.capacity.load(Ordering::Acquire),
        };
        rmp_serde::to_vec_named(&state).unwrap_or_default()
    }

    /// The guest knows how large its disk is: an image that is smaller is another one, or has lost data.
    fn restore(&self, saved: &[u8]) -> Result<(), String> {
        // Earlier builds kept nothing.
        if saved.is_empty() {
            return Ok(());
        }
        let state: State = rmp_serde::from_slice(saved).map_err(|error| error.to_string())?;
        let here = self
            .shared
            .disk
            .sectors()
            .map_err(|error| error.to_string())?;
        if state.capacity_sectors > here {
            return Err(format!(
                "{} has {here} sectors of 512 bytes, the guest's disk has {}: is it the right image?",
                self.config.path.display(),
                state.capacity_sectors
            ));
        }
        // What is larger the guest hears of when somebody resizes the disk.
        if state.capacity_sectors > 0 {
            self.shared
                .capacity
                .store(state.capacity_sectors, Ordering::Release);
        }
        Ok(())
    }

    fn connect(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        // Called once; a second is no other.
        let _ = self.interrupt.set(Interrupt(interrupt));
    }

    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        let index = queue.index();
        let mut workers = self.workers();
        let Some(place) = workers.get_mut(usize::from(index)) else {
            return Err(io::Error::other(format!("a disk has no queue {index}")));
        };
        if place.is_some() {
            return Err(io::Error::other(format!("queue {index} runs already")));
        }
        // It may have been opened without, or have let go for a move that did not happen.
        self.shared.disk.lock().map_err(io::Error::other)?;
        let handler = Handler::new(Arc::clone(&self.shared), self.open_engine(&queue)?);
        let name = format!("{}-q{index}", self.id);
        *place = Some(Worker::start(&name, handler, queue)?);
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<Virtqueue> {
        let worker = self.workers().get_mut(usize::from(index))?.take()?;
        Some(worker.stop()?.1)
    }

    fn reset(&self) {
        self.shared.write_through.store(true, Ordering::Relaxed);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        for worker in self.workers().drain(..).flatten() {
            worker.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_engine_that_the_host_has() {
        let refused = || Err(io::Error::from_raw_os_error(libc::EPERM));
        let mut config = DiskConfig::new("disk.raw");
        assert_eq!(choose(&config, || Ok(())).ok(), Some(EngineKind::IoUring));
        assert_eq!(choose(&config, refused).ok(), Some(EngineKind::Sync));
        config.engine = Some(EngineKind::IoUring);
        assert!(matches!(
            choose(&config, refused),
            Err(DiskError::Engine { .. })
        ));
        config.engine = Some(EngineKind::Sync);
        assert_eq!(choose(&config, || Ok(())).ok(), Some(EngineKind::Sync));
    }
}
