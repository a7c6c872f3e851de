//! The queues as a driver sets them up, and where they are: here, or with the device.

use std::sync::Arc;

use memory::GuestMemoryMmap;
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::{VirtioInterrupt, Virtqueue};

/// The saved type of a queue; see [`crate::state::saved`] for its rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueState {
    /// Number of descriptors.
    pub size: u16,
    /// The driver has enabled it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
    /// MSI-X vector.
    pub vector: u16,
    /// Next entry of the available ring that the device takes.
    pub next_available: u16,
    /// Next entry of the used ring that the device writes.
    pub next_used: u16,
}

/// A queue of the transport.
#[derive(Debug)]
pub(super) struct QueueSlot {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    next_available: u16,
    next_used: u16,
    pub(super) kick: Arc<EventFd>,
    /// The device has it.
    pub(super) running: bool,
}

impl QueueSlot {
    pub(super) fn new(max_size: u16, kick: Arc<EventFd>) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
            kick,
            running: false,
        }
    }

    /// As after power-on.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max_size, Arc::clone(&self.kick));
        // What the driver notified before counts no more.
        let _ = self.kick.read();
    }

    /// The queue for the device; none if its rings cannot be where the driver says.
    pub(super) fn make(
        &self,
        index: u16,
        memory: &GuestMemoryMmap,
        event_idx: bool,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Option<Virtqueue> {
        let low = |address: u64| Some(address as u32);
        let high = |address: u64| Some((address >> 32) as u32);
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.set_size(self.size);
        queue.set_desc_table_address(low(self.descriptors), high(self.descriptors));
        queue.set_avail_ring_address(low(self.available), high(self.available));
        queue.set_used_ring_address(low(self.used), high(self.used));
        queue.set_next_avail(self.next_available);
        queue.set_next_used(self.next_used);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // The setters pass over an address that is not aligned, without a word.
        let taken = (
            queue.size(),
            queue.desc_table(),
            queue.avail_ring(),
            queue.used_ring(),
        );
        let asked = (self.size, self.descriptors, self.available, self.used);
        if taken != asked || !queue.is_valid(memory) {
            return None;
        }
        let kick = Arc::clone(&self.kick);
        Some(Virtqueue::new(
            index,
            queue,
            memory.clone(),
            kick,
            interrupt,
        ))
    }

    /// The device has given the queue back.
    pub(super) fn take_back(&mut self, queue: Virtqueue) {
        let queue = queue.into_queue();
        self.next_available = queue.next_avail();
        self.next_used = queue.next_used();
    }

    pub(super) fn save(&self, vector: u16) -> QueueState {
        QueueState {
            size: self.size,
            enabled: self.enabled,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            vector,
            next_available: self.next_available,
            next_used: self.next_used,
        }
    }

    pub(super) fn restore(&mut self, state: &QueueState) {
        self.size = state.size;
        self.enabled = state.enabled;
        self.descriptors = state.descriptors;
        self.available = state.available;
        self.used = state.used;
        self.next_available = state.next_available;
        self.next_used = state.next_used;
    }
}
