//! A split virtqueue as a device uses it (Virtual I/O Device specification 1.3, section 2.7), on the `virtio-queue` crate's rings.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use memory::GuestMemoryMmap;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;

/// How a device reaches its driver. Calls may come from any thread.
pub trait VirtioInterrupt: Send + Sync {
    /// Buffers of this queue have been used.
    fn used(&self, queue: u16);
    /// The device's configuration has changed.
    fn config_changed(&self);
    /// The device cannot go on until the driver resets it.
    fn needs_reset(&self);
}

/// Why a queue cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings are not what they must be.
    #[error("the driver's ring is broken: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain has no descriptor, no end, or one that is not there.
    #[error("the descriptor chain at {0} is broken")]
    Chain(u16),
    /// A device-readable buffer follows a device-writable one.
    #[error("the descriptor chain at {0} has buffers to read after those to write")]
    Order(u16),
    /// A buffer is not in RAM.
    #[error("the driver offers a buffer of {len:#x} bytes at {gpa:#x}, which is not in RAM")]
    NotRam {
        /// Its guest-physical address.
        gpa: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// Guest memory is not there.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The request is not one of this device.
    #[error("the driver's request makes no sense: {0}")]
    Request(&'static str),
    /// The host side is gone.
    #[error("the device's back end: {0}")]
    BackEnd(#[from] io::Error),
}

/// Buffers of a chain in a row: guest-physical addresses and lengths, all in RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    parts: Vec<(u64, u32)>,
    len: u64,
}

impl Segments {
    /// All bytes together.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Guest-physical addresses and lengths in bytes.
    pub fn parts(&self) -> &[(u64, u32)] {
        &self.parts
    }

    /// The part of these buffers from byte `offset` on, at most `len` bytes.
    pub fn slice(&self, offset: u64, len: u64) -> Segments {
        let mut slice = Segments {
            parts: Vec::with_capacity(self.parts.len()),
            len: 0,
        };
        for (gpa, part) in self.pieces(offset, len) {
            slice.parts.push((gpa, part));
            slice.len += u64::from(part);
        }
        slice
    }

    /// The parts of [`Segments::slice`].
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, u32)> {
        let (mut skip, mut left) = (offset, len);
        self.parts.iter().filter_map(move |&(gpa, part)| {
            let part = u64::from(part);
            if skip >= part {
                skip -= part;
                return None;
            }
            let take = (part - skip).min(left);
            let piece = (take > 0).then_some((gpa + skip, take as u32));
            left -= take;
            skip = 0;
            piece
        })
    }

    /// Copies bytes from `offset` on out of guest memory; returns how many there were.
    pub fn read(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        into: &mut [u8],
    ) -> Result<usize, QueueError> {
        let mut done = 0;
        for (gpa, part) in self.pieces(offset, into.len() as u64) {
            let end = done + part as usize;
            memory.read_slice(&mut into[done..end], GuestAddress(gpa))?;
            done = end;
        }
        Ok(done)
    }

    /// Copies bytes into guest memory from `offset` on; returns how many there was room for.
    pub fn write(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        from: &[u8],
    ) -> Result<usize, QueueError> {
        let mut done = 0;
        for (gpa, part) in self.pieces(offset, from.len() as u64) {
            let end = done + part as usize;
            memory.write_slice(&from[done..end], GuestAddress(gpa))?;
            done = end;
        }
        Ok(done)
    }

    /// Host addresses for a system call that reads or writes these buffers. They are good for as long as `memory` is; who lets the system
    /// write through them calls [`Segments::mark_dirty`] afterwards.
    pub fn iovecs(&self, memory: &GuestMemoryMmap) -> Result<Vec<libc::iovec>, QueueError> {
        let mut all = Vec::with_capacity(self.parts.len());
        for &(gpa, len) in &self.parts {
            for slice in memory.get_slices(GuestAddress(gpa), len as usize) {
                let slice = slice?;
                all.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(all)
    }

    /// Marks the first `len` bytes as written by the device.
    pub fn mark_dirty(&self, memory: &GuestMemoryMmap, len: u64) -> Result<(), QueueError> {
        for (gpa, part) in self.pieces(0, len) {
            for slice in memory.get_slices(GuestAddress(gpa), part as usize) {
                let slice = slice?;
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
        Ok(())
    }

    fn push(&mut self, memory: &GuestMemoryMmap, gpa: u64, len: u32) -> Result<(), QueueError> {
        if len == 0 {
            return Ok(());
        }
        if !GuestMemoryBackend::check_range(memory, GuestAddress(gpa), len as usize) {
            return Err(QueueError::NotRam { gpa, len });
        }
        self.parts.push((gpa, len));
        self.len += u64::from(len);
        Ok(())
    }
}

/// A request: buffers that the device reads, then buffers that it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// What [`Virtqueue::complete`] names it by.
    pub head: u16,
    /// Device-readable.
    pub readable: Segments,
    /// Device-writable.
    pub writable: Segments,
}

/// A queue that the driver has set up, with all that a device needs to serve it.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    memory: GuestMemoryMmap,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// Something was completed that the driver may have to hear of.
    unsignalled: bool,
    /// Position in the used ring up to which the driver has been told, or did not want to be.
    told: u16,
}

impl Virtqueue {
    /// A queue whose rings lie in `memory`. `kick` is written when the driver notifies.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: GuestMemoryMmap,
        kick: Arc<EventFd>,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Self {
        let told = queue.next_used();
        Self {
            index,
            queue,
            memory,
            kick,
            interrupt,
            unsignalled: false,
            told,
        }
    }

    /// Which queue of its device it is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Where the guest's buffers are.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Readable when the driver has notified.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Readable when the driver has notified, for somebody else to hold.
    pub(crate) fn shared_kick(&self) -> Arc<EventFd> {
        Arc::clone(&self.kick)
    }

    /// Guest-physical addresses of descriptor table, available ring and used ring, and their lengths in bytes, event indices included.
    pub(crate) fn rings(&self) -> [(u64, usize); 3] {
        let size = usize::from(self.queue.size());
        [
            (self.queue.desc_table(), size * 16),
            (self.queue.avail_ring(), size * 2 + 6),
            (self.queue.used_ring(), size * 8 + 6),
        ]
    }

    /// Next entry of the available ring that the device takes.
    pub(crate) fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Where driver and device are in memory: the indices of the available and of the used ring.
    pub(crate) fn indices(&self) -> Result<(u16, u16), QueueError> {
        let available = self.queue.avail_idx(&self.memory, Ordering::Acquire)?;
        let used = self.queue.used_idx(&self.memory, Ordering::Acquire)?;
        Ok((available.0, used.0))
    }

    /// Somebody else has served the queue and has come to this position of both rings. The driver hears of it at the next
    /// [`Virtqueue::signal`].
    pub(crate) fn served_until(&mut self, position: u16) {
        self.unsignalled |= self.queue.next_used() != position;
        self.queue.set_next_avail(position);
        self.queue.set_next_used(position);
    }

    /// The rings with their positions, for the transport to keep.
    pub fn into_queue(self) -> Queue {
        self.queue
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The next request, if the driver has made one available.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let next = self.queue.next_avail();
        let chain = self.queue.iter(&self.memory)?.next();
        let Some(mut chain) = chain else {
            let available = self.queue.avail_idx(&self.memory, Ordering::Acquire)?;
            if available.0 != next {
                // It became available just now.
                self.kick.write(1)?;
            }
            return Ok(None);
        };
        let head = chain.head_index();
        let (mut readable, mut writable) = (Segments::default(), Segments::default());
        let mut open = true;
        for descriptor in chain.by_ref() {
            let into = if descriptor.is_write_only() {
                &mut writable
            } else if writable.is_empty() {
                &mut readable
            } else {
                return Err(QueueError::Order(head));
            };
            into.push(&self.memory, descriptor.addr().0, descriptor.len())?;
            open = descriptor.has_next();
        }
        if open {
            return Err(QueueError::Chain(head));
        }
        Ok(Some(Chain {
            head,
            readable,
            writable,
        }))
    }

    /// Whether the driver has made a request available that was not popped yet; a cheap look.
    pub fn has_more(&self) -> Result<bool, QueueError> {
        let available = self.queue.avail_idx(&self.memory, Ordering::Acquire)?;
        Ok(available.0 != self.queue.next_avail())
    }

    /// Puts the request that was popped last back; the next [`Virtqueue::pop`] returns it again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back, with `written` bytes written to its writable buffers. The driver hears of it at the next
    /// [`Virtqueue::signal`].
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(&self.memory, head, written)?;
        self.unsignalled = true;
        Ok(())
    }

    /// Gives several requests back at once: the driver sees all of them or none. A packet that fills several buffers must not be seen in
    /// part (section 5.1.6.4).
    pub fn complete_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((&(head, written), before)) = used.split_last() else {
            return Ok(());
        };
        let mut next = self.queue.next_used();
        for &(head, written) in before {
            let slot = u64::from(next % self.queue.size());
            let mut element = [0; 8];
            element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
            element[4..].copy_from_slice(&written.to_le_bytes());
            let place = GuestAddress(self.queue.used_ring() + 4 + slot * 8);
            self.memory.write_slice(&element, place)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        // This one moves the ring's index, past all of them.
        self.complete(head, written)
    }

    /// Interrupts the driver if something was completed and it wants to hear of it.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        if std::mem::take(&mut self.unsignalled) && self.driver_wants_to_hear()? {
            self.interrupt.used(self.index);
        }
        Ok(())
    }

    /// Section 2.7.7.2. Not the ring's own answer, which does not count what [`Virtqueue::complete_together`] has written.
    fn driver_wants_to_hear(&mut self) -> Result<bool, QueueError> {
        let now = self.queue.next_used();
        let told = std::mem::replace(&mut self.told, now);
        // The used ring's index must be seen before the driver's wish is read.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            let flags: u16 = self
                .memory
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)?;
            return Ok(u16::from_le(flags) & NO_INTERRUPT == 0);
        }
        let place = self.queue.avail_ring() + 4 + u64::from(self.queue.size()) * 2;
        let event: u16 = self.memory.load(GuestAddress(place), Ordering::Relaxed)?;
        let event = u16::from_le(event);
        Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(told))
    }

    /// Asks the driver not to notify: the device looks by itself.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(&self.memory)?)
    }

    /// Asks the driver to notify; true if a request came in before it could know, which it may not notify of.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(&self.memory)?)
    }

    /// The device cannot go on until the driver resets it.
    pub fn needs_reset(&self) {
        self.interrupt.needs_reset();
    }
}

impl fmt::Debug for Virtqueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Virtqueue")
            .field("index", &self.index)
            .field("size", &self.queue.size())
            .field("next_avail", &self.queue.next_avail())
            .field("next_used", &self.queue.next_used())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Driver;
    use super::*;

    #[test]
    fn requests_come_in_order_and_go_back() {
        let mut driver = Driver::new(0);
        let mut queue = driver.queue();
        assert!(queue.pop().expect("a ring").is_none());
        let first = driver.offer(&[b"abc", b"def"], &[4, 2]);
        let second = driver.offer(&[], &[8]);
        let chain = queue.pop().expect("a ring").expect("a request");
        assert_eq!(chain.head, first);
        let mut bytes = [0; 8];
        let memory = queue.memory().clone();
        assert_eq!(chain.readable.read(&memory, 1, &mut bytes).expect("RAM"), 5);
        assert_eq!(&bytes[..5], b"bcdef");
        assert_eq!(chain.writable.write(&memory, 2, b"xyzw").expect("RAM"), 4);
        queue.complete(chain.head, 6).expect("a ring");
        queue.signal().expect("a ring");
        assert_eq!(driver.used(), Some((first, 6)));
        assert_eq!(driver.written(first), b"\0\0xyzw");
        assert_eq!(driver.interrupt.used.load(Ordering::SeqCst), 1);
        let chain = queue.pop().expect("a ring").expect("a request");
        assert_eq!(chain.head, second);
        queue.unpop();
        assert_eq!(
            queue.pop().expect("a ring").map(|chain| chain.head),
            Some(second)
        );
    }

    #[test]
    fn several_go_back_at_once_and_the_driver_hears_when_it_wants() {
        let mut driver = Driver::new(0);
        let mut queue = driver.queue();
        queue.queue.set_event_idx(true);
        let wish = GuestAddress(queue.queue.avail_ring() + 4 + u64::from(Driver::SIZE) * 2);
        let mut told = 0;
        // After the first, the middle and the last of three, and one that has not come yet.
        for (round, (after, hears)) in [(0, true), (1, true), (2, true), (3, false)]
            .into_iter()
            .enumerate()
        {
            let start = round as u16 * 3;
            driver.memory().write_obj(start + after, wish).expect("RAM");
            let heads: Vec<_> = (0..3).map(|_| driver.offer(&[], &[16])).collect();
            let used: Vec<_> = heads.iter().map(|&head| (head, 7)).collect();
            for _ in &heads {
                queue.pop().expect("a ring").expect("a request");
            }
            queue.complete_together(&used).expect("a ring");
            queue.signal().expect("a ring");
            for expected in used {
                assert_eq!(driver.used(), Some(expected));
            }
            told += usize::from(hears);
            assert_eq!(driver.interrupt.used.load(Ordering::SeqCst), told);
        }
        queue.complete_together(&[]).expect("nothing to do");
        assert_eq!(driver.used(), None);
    }

    #[test]
    fn a_driver_without_event_indices_need_not_hear() {
        let mut driver = Driver::new(0);
        let mut queue = driver.queue();
        for (flags, hears) in [(NO_INTERRUPT, 0), (0, 1)] {
            let place = GuestAddress(queue.queue.avail_ring());
            driver.memory().write_obj(flags, place).expect("RAM");
            let head = driver.offer(&[], &[1]);
            assert!(queue.has_more().expect("a ring"));
            queue.pop().expect("a ring").expect("a request");
            assert!(!queue.has_more().expect("a ring"));
            queue.complete(head, 1).expect("a ring");
            queue.signal().expect("a ring");
            assert_eq!(driver.interrupt.used.load(Ordering::SeqCst), hears);
        }
    }

    #[test]
    fn pieces_of_buffers() {
        let segments = Segments {
            parts: vec![(100, 10), (200, 20), (300, 30)],
            len: 60,
        };
        for (offset, len, parts) in [
            (0, 60, vec![(100, 10), (200, 20), (300, 30)]),
            (5, 10, vec![(105, 5), (200, 5)]),
            (10, 20, vec![(200, 20)]),
            (59, 9, vec![(329, 1)]),
            (60, 1, vec![]),
            (0, 0, vec![]),
        ] {
            let len_of_all = parts
                .iter()
                .map(|part: &(u64, u32)| u64::from(part.1))
                .sum();
            let expected = Segments {
                parts,
                len: len_of_all,
            };
            assert_eq!(segments.slice(offset, len), expected, "{offset} {len}");
        }
    }

    #[test]
    fn nonsense_is_an_error() {
        let mut driver = Driver::new(0);
        let mut queue = driver.queue();
        // Outside RAM, partly outside, at the end of the address space.
        for (gpa, len) in [(1 << 40, 4), ((64 << 20) - 4, 8), (u64::MAX - 2, 8)] {
            driver.offer_parts(&[(gpa, len, true)]);
            assert!(
                matches!(queue.pop(), Err(QueueError::NotRam { .. })),
                "{gpa:#x}"
            );
        }
        driver.offer_parts(&[(0x20_0000, 4, true), (0x20_0000, 4, false)]);
        assert!(matches!(queue.pop(), Err(QueueError::Order(_))));
        // A loop, a link to nowhere, a head that is no descriptor.
        driver.descriptor(9, 0x20_0000, 4, 1, 9);
        driver.make_available(9);
        assert!(matches!(queue.pop(), Err(QueueError::Chain(9))));
        driver.descriptor(9, 0x20_0000, 4, 1, 900);
        driver.make_available(9);
        assert!(matches!(queue.pop(), Err(QueueError::Chain(9))));
        driver.make_available(700);
        assert!(matches!(queue.pop(), Err(QueueError::Chain(700))));
    }

    #[test]
    fn a_ring_that_is_ahead_by_more_than_its_size() {
        let mut driver = Driver::new(0);
        let mut queue = driver.queue();
        for _ in 0..=Driver::SIZE {
            driver.make_available(0);
        }
        assert!(matches!(queue.pop(), Err(QueueError::Ring(_))));
    }
}
