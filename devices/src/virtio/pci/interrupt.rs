//! How a device behind this transport reaches its driver.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::pci::Msix;
use crate::virtio::VirtioInterrupt;

/// VIRTIO_MSI_NO_VECTOR.
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR status: a queue.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration.
const ISR_CONFIG: u8 = 2;

/// Vectors and what the driver reads of interrupts. Nothing here waits for the transport's lock, so that a device's thread never waits for a
/// vCPU that waits for the thread.
pub(super) struct PciInterrupt {
    pub(super) msix: Msix,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    pub(super) isr: AtomicU8,
    /// Counts changes of the configuration space.
    pub(super) generation: AtomicU8,
    /// Status bit DEVICE_NEEDS_RESET.
    pub(super) broken: AtomicBool,
    /// Whether the driver has finished its setup: before it, nothing is told.
    pub(super) driver_ok: AtomicBool,
}

impl PciInterrupt {
    pub(super) fn new(msix: Msix, queues: usize) -> Arc<Self> {
        Arc::new(Self {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            broken: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
        })
    }

    /// As after power-on, but for MSI-X, which a reset of the device leaves alone.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.isr.store(0, Ordering::SeqCst);
        self.broken.store(false, Ordering::SeqCst);
        self.driver_ok.store(false, Ordering::SeqCst);
    }

    fn tell_config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.driver_ok.load(Ordering::SeqCst) {
            self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
            self.msix.trigger(self.config_vector.load(Ordering::SeqCst));
        }
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn used(&self, queue: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.msix.trigger(vector.load(Ordering::SeqCst));
        }
    }

    fn config_changed(&self) {
        self.tell_config();
    }

    fn needs_reset(&self) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            self.tell_config();
        }
    }
}
