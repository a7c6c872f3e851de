//! A split virtqueue as a device uses it (Virtual I/O Device specification 1.3, section 2.7), on the `virtio-queue` crate's rings.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use memory::{GuestMemoryMmap, PAGE_SIZE};
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::ring::Rings;
use super::{Chain, Segments};

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// Writes that may wait to be marked dirty.
const MOST_UNMARKED: usize = 1024;

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
    /// The rings are not in RAM.
    #[error("the driver's ring is not in RAM, or across a hole in it")]
    NoRings,
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

/// A queue that the driver has set up, with all that a device needs to serve it.
///
/// ```text
///   pop ─► Chain ─► write, or the system writes and written says so ─► complete ─► publish ─► the driver sees it
///                                                                         └─► signal: publish, interrupt, mark dirty
/// ```
///
/// Pages are marked dirty for many requests at a time, because it takes as long as all else together: a mark waits until the stores before
/// it are seen by the driver. It may come late but not early: a page that is sent to another host between the write and the mark is sent
/// again. It is made at the latest when the queue is given back, so before the memory of a machine that stands still is read.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    /// None if they cannot be where the driver says: the queue cannot be served.
    rings: Option<Rings>,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// Position in the used ring up to which the driver can see it.
    published: u16,
    /// Position in the used ring up to which it is marked dirty.
    marked: u16,
    /// Position in the used ring up to which the driver has been told, or did not want to be.
    told: u16,
    /// Guest-physical addresses and lengths that are not marked dirty yet.
    unmarked: Vec<(u64, u32)>,
    memory: GuestMemoryMmap,
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
        let next_used = queue.next_used();
        let rings = Rings::new(&queue, &memory)
            .inspect_err(|error| tracing::error!(index, %error, "a queue cannot be served"))
            .ok();
        Self {
            index,
            queue,
            rings,
            kick,
            interrupt,
            published: next_used,
            marked: next_used,
            told: next_used,
            unmarked: Vec::new(),
            memory,
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
        self.queue.set_next_avail(position);
        self.queue.set_next_used(position);
        // Shown to the driver, and logged as written, by who served it.
        (self.published, self.marked) = (position, position);
    }

    /// Marks the used ring dirty, which somebody else may have written.
    pub(crate) fn mark_used_ring(&self) {
        let [_, _, (gpa, len)] = self.rings();
        fence(Ordering::SeqCst);
        mark(&self.memory, gpa, len as u32);
    }

    /// The rings with their positions, for the transport to keep.
    pub fn into_queue(mut self) -> Queue {
        self.settle();
        // The destructor, which keeps fields from being moved out, has nothing more to do.
        self.rings = None;
        std::mem::take(&mut self.queue)
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    fn in_place(&self) -> Result<&Rings, QueueError> {
        self.rings.as_ref().ok_or(QueueError::NoRings)
    }

    /// The next request, if the driver has made one available.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let rings = self.in_place()?;
        let next = self.queue.next_avail();
        let waiting = rings.available_index().wrapping_sub(next);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.queue.size() {
            return Err(virtio_queue::Error::InvalidAvailRingIndex.into());
        }
        let head = rings.head(next);
        let chain = rings.chain(head);
        self.queue.set_next_avail(next.wrapping_add(1));
        let (readable, writable) = chain?;
        Ok(Some(Chain {
            head,
            readable,
            writable,
        }))
    }

    /// Whether the driver has made a request available that was not popped yet; a cheap look.
    pub fn has_more(&self) -> Result<bool, QueueError> {
        Ok(self.in_place()?.available_index() != self.queue.next_avail())
    }

    /// Puts the request that was popped last back; the next [`Virtqueue::pop`] returns it again.
    pub fn unpop(&mut self) {
        let next = self.queue.next_avail();
        self.queue.set_next_avail(next.wrapping_sub(1));
    }

    /// Copies bytes into buffers of a request from `offset` on; returns how many there was room for.
    pub fn write(
        &mut self,
        segments: &Segments,
        offset: u64,
        from: &[u8],
    ) -> Result<usize, QueueError> {
        let mut done = 0;
        for (gpa, part) in segments.pieces(offset, from.len() as u64) {
            let end = done + part as usize;
            for slice in self.memory.get_slices(GuestAddress(gpa), part as usize) {
                let slice = slice?;
                // Not by the slice's own copy, which marks it dirty.
                let bytes = &from[done..done + slice.len()];
                // SAFETY: the slice lies in guest memory, into which there are no references, and is as long as `bytes`.
                unsafe {
                    let into = slice.ptr_guard_mut();
                    into.as_ptr()
                        .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                }
                done += slice.len();
            }
            debug_assert_eq!(done, end);
            self.note_write(gpa, part);
        }
        Ok(done)
    }

    /// The system has written the first `len` bytes of these buffers.
    pub fn written(&mut self, segments: &Segments, len: u64) {
        for (gpa, part) in segments.pieces(0, len) {
            self.note_write(gpa, part);
        }
    }

    fn note_write(&mut self, gpa: u64, len: u32) {
        self.unmarked.push((gpa, len));
        if self.unmarked.len() >= MOST_UNMARKED {
            self.mark();
        }
    }

    /// Marks all that was written.
    fn mark(&mut self) {
        if self.unmarked.is_empty() && self.marked == self.published {
            return;
        }
        // A page that is marked already is left alone, which saves most of the time. Who takes the marks away after this look sees what was
        // written before it; who took them before left none.
        fence(Ordering::SeqCst);
        let used = self
            .rings
            .as_ref()
            .map(|rings| rings.used_between(self.marked, self.published));
        self.marked = self.published;
        for (gpa, len) in self.unmarked.drain(..).chain(used.into_iter().flatten()) {
            mark(&self.memory, gpa, len);
        }
    }

    /// Gives a request back, with `written` bytes written to its writable buffers. The driver sees it after the next
    /// [`Virtqueue::publish`], and hears of it at the next [`Virtqueue::signal`].
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        if head >= self.queue.size() {
            return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
        }
        let rings = self.rings.as_mut().ok_or(QueueError::NoRings)?;
        let next = self.queue.next_used();
        rings.put_used(next, head, written);
        self.queue.set_next_used(next.wrapping_add(1));
        Ok(())
    }

    /// Lets a driver that looks see what was completed: all of it at once, as a packet that fills several buffers needs (section 5.1.6.4).
    pub fn publish(&mut self) {
        let now = self.queue.next_used();
        if let Some(rings) = &mut self.rings
            && now != self.published
        {
            rings.publish(now);
            self.published = now;
        }
    }

    /// Publishes what was completed, and interrupts the driver if it wants to hear of it.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        self.publish();
        if self.told != self.published && self.driver_wants_to_hear()? {
            self.interrupt.used(self.index);
        }
        self.mark();
        Ok(())
    }

    /// Section 2.7.7.2.
    fn driver_wants_to_hear(&mut self) -> Result<bool, QueueError> {
        let now = self.published;
        let told = std::mem::replace(&mut self.told, now);
        // The used ring's index must be seen before the driver's wish is read.
        fence(Ordering::SeqCst);
        let rings = self.in_place()?;
        if !self.queue.event_idx_enabled() {
            return Ok(rings.flags() & NO_INTERRUPT == 0);
        }
        let event = rings.used_event();
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

    fn settle(&mut self) {
        self.publish();
        self.mark();
    }
}

impl Drop for Virtqueue {
    fn drop(&mut self) {
        self.settle();
    }
}

/// Marks pages dirty that are not.
fn mark(memory: &GuestMemoryMmap, gpa: u64, len: u32) {
    let mut at = gpa;
    let end = gpa + u64::from(len);
    while at < end {
        let next = (at / PAGE_SIZE + 1) * PAGE_SIZE;
        if let Some((region, offset)) = memory.to_region_addr(GuestAddress(at)) {
            let (bitmap, offset) = (region.bitmap(), offset.0 as usize);
            if !bitmap.dirty_at(offset) {
                bitmap.mark_dirty(offset, 1);
            }
        }
        at = next;
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
    use memory::PageBitmap;
    use vm_memory::{Bytes, GuestMemoryRegion};

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
        assert_eq!(queue.write(&chain.writable, 2, b"xyzwv").expect("RAM"), 4);
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
            for &(head, written) in &used {
                queue.complete(head, written).expect("a ring");
                assert_eq!(driver.used(), None, "not before all are there");
            }
            queue.signal().expect("a ring");
            for expected in used {
                assert_eq!(driver.used(), Some(expected));
            }
            told += usize::from(hears);
            assert_eq!(driver.interrupt.used.load(Ordering::SeqCst), told);
        }
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

    #[test]
    fn pages_are_marked_when_they_have_been_written() {
        let mut driver = Driver::new(0);
        let pages = driver
            .memory()
            .iter()
            .map(|region| region.len())
            .sum::<u64>()
            / PAGE_SIZE;
        let ram = Arc::clone(&driver.ram);
        let taken = || {
            let mut dirty = PageBitmap::new(pages);
            ram.take_device_dirty(0, &mut dirty);
            dirty.runs().collect::<Vec<_>>()
        };
        let mut queue = driver.queue();
        let used = queue.queue.used_ring() / PAGE_SIZE;
        let buffer = driver
            .buffer(3 * PAGE_SIZE as u32)
            .next_multiple_of(PAGE_SIZE)
            - 1;
        driver.offer_parts(&[(buffer, 2, true), (buffer + 1 + PAGE_SIZE, 8, true)]);
        taken();
        let chain = queue.pop().expect("a ring").expect("a request");
        assert_eq!(taken(), [], "nothing is written yet");
        assert_eq!(queue.write(&chain.writable, 1, b"x").expect("RAM"), 1);
        queue.written(&chain.writable, 1);
        queue.complete(chain.head, 2).expect("a ring");
        queue.signal().expect("a ring");
        let page = buffer / PAGE_SIZE;
        assert_eq!(taken(), [(used, 1), (page, 2)]);
        // What was taken away is marked again when it is written again, also by a queue that goes without a signal.
        driver.offer_parts(&[(buffer + 1 + PAGE_SIZE, 8, true)]);
        taken();
        let chain = queue.pop().expect("a ring").expect("a request");
        queue.written(&chain.writable, 8);
        queue.complete(chain.head, 8).expect("a ring");
        assert_eq!(taken(), []);
        drop(queue);
        assert_eq!(taken(), [(used, 1), (page + 2, 1)]);
        assert!(driver.used().is_some() && driver.used().is_some());
        // More than may wait.
        driver.restart();
        let mut queue = driver.queue();
        driver.offer_parts(&[(buffer, 1, true)]);
        let chain = queue.pop().expect("a ring").expect("a request");
        taken();
        for _ in 0..MOST_UNMARKED {
            queue.written(&chain.writable, 1);
        }
        assert_eq!(taken(), [(page, 1)]);
    }

    #[test]
    fn a_queue_without_rings_is_an_error() {
        let driver = Driver::new(0);
        let mut inner = driver.queue().into_queue();
        inner.set_used_ring_address(Some(0), Some(1 << 10));
        let memory = driver.memory().clone();
        let (kick, interrupt) = (driver.kick.clone(), driver.interrupt.clone());
        let mut queue = Virtqueue::new(0, inner, memory, kick, interrupt);
        assert!(matches!(queue.pop(), Err(QueueError::NoRings)));
        assert!(matches!(queue.has_more(), Err(QueueError::NoRings)));
        assert!(matches!(queue.complete(0, 0), Err(QueueError::NoRings)));
        queue.signal().expect("nothing to say");
    }
}
