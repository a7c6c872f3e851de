//! A ring, with notes of what has been begun in it (vhost-user specification, "Inflight I/O tracking", split virtqueues).

use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Memory;

/// Largest ring.
pub(crate) const MAX_SIZE: u16 = 1024;
/// Bytes of a ring's head in the notes: features, version, number of descriptors, last batch's head, used index.
const HEAD: usize = 16;
const DESCRIPTORS: usize = 10;
const LAST: usize = 12;
const USED: usize = 14;
/// Bytes of a descriptor's note: in flight, padding, next, counter.
const NOTE: usize = 16;
const COUNTER: usize = 8;

/// Bytes of a ring's notes.
pub(crate) fn notes_len(size: u16) -> usize {
    HEAD + NOTE * usize::from(size)
}

/// A request: its head, and what it consists of: address, length, whether it is written.
pub(crate) struct Request {
    pub(crate) head: u16,
    pub(crate) parts: Vec<(u64, u32, bool)>,
}

/// See the module's text.
pub(crate) struct Ring {
    pub(crate) queue: Queue,
    pub(crate) kick: Option<EventFd>,
    pub(crate) call: Option<EventFd>,
    pub(crate) enabled: bool,
    /// Guest-physical address at which the used ring is logged.
    pub(crate) log: Option<u64>,
    pub(crate) begun: Vec<Request>,
    counter: u64,
    running: bool,
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::other(error)
}

impl Ring {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            queue: Queue::new(MAX_SIZE).map_err(other)?,
            kick: None,
            call: None,
            enabled: false,
            log: None,
            begun: Vec::new(),
            counter: 0,
            running: false,
        })
    }

    pub(crate) fn is_served(&self) -> bool {
        self.running && self.enabled
    }

    pub(crate) fn kick_fd(&self) -> Option<i32> {
        self.kick
            .as_ref()
            .filter(|_| self.is_served())
            .map(AsRawFd::as_raw_fd)
    }

    /// Begins to serve it, with what its notes say was begun before.
    pub(crate) fn start(
        &mut self,
        memory: &Memory,
        notes: Option<VolatileSlice<'_>>,
    ) -> Result<()> {
        self.queue.set_ready(true);
        self.running = true;
        let used = self
            .queue
            .used_idx(&memory.guest, Ordering::Acquire)
            .map_err(other)?
            .0;
        self.queue.set_next_used(used);
        let Some(notes) = notes else { return Ok(()) };
        let size = self.queue.size();
        notes.write_obj(size, DESCRIPTORS).map_err(other)?;
        if notes.read_obj::<u16>(USED).map_err(other)? != used {
            // It ended between the answer and its note.
            let last: u16 = notes.read_obj(LAST).map_err(other)?;
            notes
                .write_obj(0u8, HEAD + NOTE * usize::from(last % size))
                .map_err(other)?;
            notes.write_obj(used, USED).map_err(other)?;
        }
        let mut again = Vec::new();
        for head in 0..size {
            let note = HEAD + NOTE * usize::from(head);
            if notes.read_obj::<u8>(note).map_err(other)? != 0 {
                let counter: u64 = notes.read_obj(note + COUNTER).map_err(other)?;
                again.push((counter, head));
            }
        }
        again.sort_unstable();
        self.counter = again.last().map_or(0, |(counter, _)| counter + 1);
        self.queue
            .set_next_avail(used.wrapping_add(again.len() as u16));
        if !again.is_empty() {
            eprintln!("vhost-back-end: {} requests are begun again", again.len());
        }
        for (_, head) in again {
            let request = self.request(memory, head)?;
            self.begun.push(request);
        }
        Ok(())
    }

    /// Takes all that is offered, and notes it.
    pub(crate) fn take(
        &mut self,
        memory: &Memory,
        notes: Option<&VolatileSlice<'_>>,
    ) -> Result<()> {
        if let Some(kick) = &self.kick {
            // The count says nothing.
            let _ = kick.read();
        }
        loop {
            self.queue
                .disable_notification(&memory.guest)
                .map_err(other)?;
            while let Some(chain) = self.queue.pop_descriptor_chain(&memory.guest) {
                let head = chain.head_index();
                let parts = chain.map(|part| (part.addr().0, part.len(), part.is_write_only()));
                let request = Request {
                    head,
                    parts: parts.collect(),
                };
                if let Some(notes) = notes {
                    let note = HEAD + NOTE * usize::from(head);
                    notes
                        .write_obj(self.counter, note + COUNTER)
                        .map_err(other)?;
                    notes.write_obj(1u8, note).map_err(other)?;
                    self.counter += 1;
                }
                self.begun.push(request);
            }
            if !self
                .queue
                .enable_notification(&memory.guest)
                .map_err(other)?
            {
                return Ok(());
            }
        }
    }

    fn request(&self, memory: &Memory, head: u16) -> Result<Request> {
        // As if the driver had just offered it, on a ring of its own.
        let mut parts = Vec::new();
        let mut next = Some(head);
        while let Some(index) = next.filter(|_| parts.len() <= usize::from(self.queue.size())) {
            let mut descriptor = [0; 16];
            memory.read(
                self.queue.desc_table() + u64::from(index) * 16,
                &mut descriptor,
            )?;
            let [a, b, c, d, e, f, g, h, l0, l1, l2, l3, f0, f1, n0, n1] = descriptor;
            let flags = u16::from_le_bytes([f0, f1]);
            let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            parts.push((
                address,
                u32::from_le_bytes([l0, l1, l2, l3]),
                flags & 2 != 0,
            ));
            next = (flags & 1 != 0).then(|| u16::from_le_bytes([n0, n1]));
        }
        Ok(Request { head, parts })
    }

    /// A request is done.
    pub(crate) fn finish(
        &mut self,
        memory: &Memory,
        notes: Option<&VolatileSlice<'_>>,
        head: u16,
        written: u32,
    ) -> Result<()> {
        if let Some(notes) = notes {
            notes.write_obj(head, LAST).map_err(other)?;
        }
        self.queue
            .add_used(&memory.guest, head, written)
            .map_err(other)?;
        if let Some(notes) = notes {
            notes
                .write_obj(0u8, HEAD + NOTE * usize::from(head))
                .map_err(other)?;
            notes
                .write_obj(self.queue.next_used(), USED)
                .map_err(other)?;
        }
        if let Some(log) = self.log {
            memory.mark(log, 6 + 8 * u64::from(self.queue.size()))?;
        }
        if self
            .queue
            .needs_notification(&memory.guest)
            .map_err(other)?
            && let Some(call) = &self.call
        {
            call.write(1)?;
        }
        Ok(())
    }

    pub(crate) fn stop(&mut self) {
        self.running = false;
        self.kick = None;
        self.call = None;
        self.queue.set_ready(false);
    }
}

/// A ring's part of all notes.
pub(crate) fn notes_of(
    all: Option<&MmapRegion>,
    ring: usize,
    size: u16,
) -> Option<VolatileSlice<'_>> {
    let len = notes_len(size);
    all?.get_slice(ring * len, len).ok()
}
