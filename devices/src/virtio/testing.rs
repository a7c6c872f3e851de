//! A driver of a queue in memory of its own, for tests of devices.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use memory::{Backing, GuestMemoryMmap, GuestRam, RamRange};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{VirtioInterrupt, Virtqueue};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x5000;
const USED: u64 = 0x6000;
const BUFFERS: u64 = 0x10_0000;
const RAM: u64 = 64 << 20;

/// Counts what a device says.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    pub(crate) used: AtomicUsize,
    pub(crate) config: AtomicUsize,
    pub(crate) reset: AtomicUsize,
    queues: AtomicU64,
}

impl VirtioInterrupt for Counted {
    fn used(&self, queue: u16) {
        self.queues.fetch_or(1 << queue, Ordering::SeqCst);
        self.used.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_reset(&self) {
        self.reset.fetch_add(1, Ordering::SeqCst);
    }
}

/// The driver's side of one queue of 64 descriptors.
pub(crate) struct Driver {
    /// Shared, for devices that are handed all of RAM.
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) interrupt: Arc<Counted>,
    pub(crate) kick: Arc<EventFd>,
    index: u16,
    /// Whether it notifies by event indices: only of what the device has asked to hear of.
    pub(crate) event_idx: bool,
    available: u16,
    used: u16,
    next_descriptor: u16,
    next_buffer: u64,
    writable: BTreeMap<u16, Vec<(u64, u32)>>,
}

impl Driver {
    pub(crate) const SIZE: u16 = 64;

    pub(crate) fn new(index: u16) -> Self {
        Self::backed(index, Backing::Anonymous { thp: false })
    }

    /// In memory that another process can be given.
    pub(crate) fn shared(index: u16) -> Self {
        Self::backed(index, Backing::Memfd { thp: false })
    }

    fn backed(index: u16, backing: Backing) -> Self {
        let ranges = [RamRange { gpa: 0, len: RAM }];
        Self {
            ram: Arc::new(GuestRam::new(&ranges, backing).expect("memory")),
            interrupt: Arc::default(),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")),
            index,
            event_idx: false,
            available: 0,
            used: 0,
            next_descriptor: 0,
            next_buffer: BUFFERS,
            writable: BTreeMap::new(),
        }
    }

    /// Empties the rings, as a driver does after it has reset the queue.
    pub(crate) fn restart(&mut self) {
        let zeros = [0; 0x1000];
        for at in [AVAILABLE, USED] {
            self.memory()
                .write_slice(&zeros, GuestAddress(at))
                .expect("RAM");
        }
        (self.available, self.used, self.next_descriptor) = (0, 0, 0);
    }

    pub(crate) fn memory(&self) -> &GuestMemoryMmap {
        self.ram.guest_memory()
    }

    /// The device's side.
    pub(crate) fn queue(&self) -> Virtqueue {
        let mut queue = Queue::new(Self::SIZE).expect("a queue");
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(self.memory()));
        Virtqueue::new(
            self.index,
            queue,
            self.memory().clone(),
            self.kick.clone(),
            self.interrupt.clone(),
        )
    }

    /// Makes a request available and notifies; returns its head.
    pub(crate) fn offer(&mut self, readable: &[&[u8]], writable: &[u32]) -> u16 {
        let mut parts = Vec::new();
        for bytes in readable {
            let at = self.buffer(bytes.len() as u32);
            self.memory()
                .write_slice(bytes, GuestAddress(at))
                .expect("RAM");
            parts.push((at, bytes.len() as u32, false));
        }
        for &len in writable {
            parts.push((self.buffer(len), len, true));
        }
        self.offer_parts(&parts)
    }

    /// The same with addresses, lengths and whether the device writes, as they are.
    pub(crate) fn offer_parts(&mut self, parts: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (number, &(gpa, len, writable)) in parts.iter().enumerate() {
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % Self::SIZE;
            let more = number + 1 < parts.len();
            let flags = u16::from(more) | u16::from(writable) << 1;
            self.descriptor(at, gpa, len, flags, self.next_descriptor);
        }
        let wanted = parts
            .iter()
            .filter(|part| part.2)
            .map(|part| (part.0, part.1));
        self.writable.insert(head, wanted.collect());
        self.make_available(head);
        head
    }

    pub(crate) fn descriptor(&self, at: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let place = GuestAddress(DESCRIPTORS + u64::from(at) * 16);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory().write_slice(&bytes, place).expect("RAM");
    }

    pub(crate) fn make_available(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + u64::from(self.available % Self::SIZE) * 2;
        self.memory()
            .write_obj(head, GuestAddress(slot))
            .expect("RAM");
        self.available = self.available.wrapping_add(1);
        self.memory()
            .store(
                self.available,
                GuestAddress(AVAILABLE + 2),
                // Before the look at what the device asks for.
                Ordering::SeqCst,
            )
            .expect("RAM");
        let asked: u16 = self
            .memory()
            .load(
                GuestAddress(USED + 4 + u64::from(Self::SIZE) * 8),
                Ordering::SeqCst,
            )
            .expect("RAM");
        if !self.event_idx || asked == self.available.wrapping_sub(1) {
            self.kick.write(1).expect("an eventfd");
        }
    }

    /// The next request that came back: its head and what the device says to have written.
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        let now: u16 = self
            .memory()
            .load(GuestAddress(USED + 2), Ordering::Acquire)
            .expect("RAM");
        if now == self.used {
            return None;
        }
        let slot = USED + 4 + u64::from(self.used % Self::SIZE) * 8;
        self.used = self.used.wrapping_add(1);
        let id: u32 = self.memory().read_obj(GuestAddress(slot)).expect("RAM");
        let len: u32 = self.memory().read_obj(GuestAddress(slot + 4)).expect("RAM");
        Some((id as u16, len))
    }

    /// Waits for the next request that comes back, ten seconds at most.
    pub(crate) fn wait_used(&mut self) -> (u16, u32) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.used() {
                return used;
            }
            assert!(Instant::now() < until, "no request came back");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// What is in the writable buffers of a request.
    pub(crate) fn written(&self, head: u16) -> Vec<u8> {
        let mut all = Vec::new();
        for &(gpa, len) in &self.writable[&head] {
            let mut part = vec![0; len as usize];
            self.memory()
                .read_slice(&mut part, GuestAddress(gpa))
                .expect("RAM");
            all.extend(part);
        }
        all
    }

    /// Room for a buffer; buffers do not touch.
    pub(crate) fn buffer(&mut self, len: u32) -> u64 {
        let at = self.next_buffer;
        self.next_buffer = (at + u64::from(len) + 64).next_multiple_of(64);
        assert!(self.next_buffer < RAM, "the test's buffers are used up");
        at
    }
}
