//! The rings of a split virtqueue, read and written in place.
//!
//! Their host addresses are looked up once, when a queue starts, and not for each of the accesses that a request takes. Nothing here marks
//! a page dirty: [`super::Virtqueue`] does that, for many writes at a time.

use std::sync::atomic::{AtomicU16, Ordering};

use memory::GuestMemoryMmap;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::{QueueError, Segments};

/// VIRTQ_DESC_F_NEXT, WRITE and INDIRECT (section 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Descriptors of a chain at most, where the queue is shorter. A driver must not make a chain longer than its queue (section 2.7.5.3.1), but
/// with indirect tables some do, and get along with devices that take this many.
const LONGEST: u16 = 8192;

/// Bytes of a descriptor, of an element of the used ring, and of the flags and index before the elements of either ring.
const DESCRIPTOR: usize = 16;
const USED_ELEMENT: usize = 8;
const RING_HEADER: usize = 4;

/// `struct virtq_desc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) gpa: u64,
    pub(super) len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn new(bytes: [u64; 2]) -> Self {
        let (gpa, rest) = (u64::from_le(bytes[0]), u64::from_le(bytes[1]));
        Self {
            gpa,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}

/// The three parts of a queue, all within RAM.
pub(super) struct Rings {
    /// `size` descriptors.
    descriptors: *const [u64; 2],
    /// Flags, index, `size` heads, used_event: 16 bits each.
    available: *const u16,
    /// Flags and index of 16 bits each, `size` elements of 64 bits.
    used: *mut u16,
    size: u16,
    used_gpa: u64,
    /// What the pointers point into.
    memory: GuestMemoryMmap,
}

// SAFETY: the pointers are into guest memory, which `memory` keeps mapped and any thread may use: all accesses are volatile or atomic.
unsafe impl Send for Rings {}

impl Rings {
    /// Finds the rings of a queue that is set up. Each must lie within one region of RAM.
    pub(super) fn new(queue: &Queue, memory: &GuestMemoryMmap) -> Result<Self, QueueError> {
        let size = queue.size();
        let entries = usize::from(size);
        let host = |gpa: u64, len: usize, alignment: u64| {
            let slice = GuestMemoryBackend::get_slice(memory, GuestAddress(gpa), len);
            match slice {
                Ok(slice) if gpa.is_multiple_of(alignment) => Ok(slice.ptr_guard_mut().as_ptr()),
                _ => Err(QueueError::NotRam {
                    gpa,
                    len: len as u32,
                }),
            }
        };
        // Guest pages and host pages are of one size, so what is aligned in the guest is so in the host.
        let descriptors = host(queue.desc_table(), entries * DESCRIPTOR, 16)?;
        let available = host(queue.avail_ring(), RING_HEADER + entries * 2 + 2, 2)?;
        let used = host(
            queue.used_ring(),
            RING_HEADER + entries * USED_ELEMENT + 2,
            4,
        )?;
        Ok(Self {
            descriptors: descriptors.cast(),
            available: available.cast(),
            used: used.cast(),
            size,
            used_gpa: queue.used_ring(),
            memory: memory.clone(),
        })
    }

    fn available(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < usize::from(self.size) + 3);
        // SAFETY: the ring has `size` + 3 values of 16 bits, aligned, as `new` has checked; the guest writes them at any time, as atomics
        // may be.
        unsafe { AtomicU16::from_ptr(self.available.add(index).cast_mut()) }
    }

    /// The driver's flags.
    pub(super) fn flags(&self) -> u16 {
        u16::from_le(self.available(0).load(Ordering::Relaxed))
    }

    /// Where the driver will make the next request available; what it made available before is seen after this.
    pub(super) fn available_index(&self) -> u16 {
        u16::from_le(self.available(1).load(Ordering::Acquire))
    }

    /// The head at a position of the available ring.
    pub(super) fn head(&self, position: u16) -> u16 {
        let slot = usize::from(position % self.size);
        u16::from_le(self.available(2 + slot).load(Ordering::Relaxed))
    }

    /// The position of the used ring after which the driver wants to hear (used_event).
    pub(super) fn used_event(&self) -> u16 {
        let at = 2 + usize::from(self.size);
        u16::from_le(self.available(at).load(Ordering::Relaxed))
    }

    /// Writes an element of the used ring. The driver sees it after [`Rings::publish`].
    pub(super) fn put_used(&mut self, position: u16, head: u16, written: u32) {
        let slot = usize::from(position % self.size);
        let element = u64::from(head) | u64::from(written) << 32;
        // SAFETY: slot < size, so the element lies in the ring, as `new` has checked; the ring is aligned to 4, hence the unaligned write
        // of 8. The driver does not read it before `publish`.
        unsafe {
            let at = self.used.byte_add(RING_HEADER + slot * USED_ELEMENT);
            at.cast::<u64>().write_unaligned(element.to_le());
        }
    }

    /// Lets the driver see the used ring up to a position.
    pub(super) fn publish(&mut self, position: u16) {
        // SAFETY: the index is the second value of the ring, aligned to 2; the guest reads it at any time, as an atomic may be.
        let index = unsafe { AtomicU16::from_ptr(self.used.add(1)) };
        index.store(position.to_le(), Ordering::Release);
    }

    /// What was written of the used ring from one position to another: guest-physical addresses and lengths.
    pub(super) fn used_between(&self, from: u16, to: u16) -> [(u64, u32); 3] {
        let count = to.wrapping_sub(from).min(self.size);
        let slot = from % self.size;
        let first = count.min(self.size - slot);
        let element =
            |slot: u16| self.used_gpa + RING_HEADER as u64 + u64::from(slot) * USED_ELEMENT as u64;
        let bytes = |count: u16| u32::from(count) * USED_ELEMENT as u32;
        [
            (self.used_gpa, RING_HEADER as u32 * u32::from(count > 0)),
            (element(slot), bytes(first)),
            (element(0), bytes(count - first)),
        ]
    }

    /// Reads the chain that begins at `head`: what the device reads, then what it writes (sections 2.7.5 and 2.7.5.3).
    pub(super) fn chain(&self, head: u16) -> Result<(Segments, Segments), QueueError> {
        let (mut readable, mut writable) = (Segments::default(), Segments::default());
        let broken = || QueueError::Chain(head);
        let mut table = Table {
            descriptors: self.descriptors,
            len: self.size,
        };
        let (mut index, mut left, mut indirect) = (head, self.size, false);
        loop {
            // A chain has no more descriptors than its table: a loop ends here.
            left = left.checked_sub(1).ok_or_else(broken)?;
            let descriptor = table.get(index).ok_or_else(broken)?;
            if descriptor.flags & INDIRECT != 0 {
                if indirect {
                    return Err(broken());
                }
                indirect = true;
                table = self.indirect(&descriptor).ok_or_else(broken)?;
                (index, left) = (0, table.len.min(self.size.max(LONGEST)));
                continue;
            }
            let into = if descriptor.flags & WRITE != 0 {
                &mut writable
            } else if writable.is_empty() {
                &mut readable
            } else {
                return Err(QueueError::Order(head));
            };
            into.push(&self.memory, descriptor.gpa, descriptor.len)?;
            if descriptor.flags & NEXT == 0 {
                break;
            }
            index = descriptor.next;
        }
        // Section 2.7.5.2: 2^32 bytes in all at most, of which a device counts with 32 bits.
        let all = readable.len() + writable.len();
        (all <= u64::from(u32::MAX))
            .then_some((readable, writable))
            .ok_or_else(broken)
    }

    /// The table that an indirect descriptor names, if it is in RAM.
    fn indirect(&self, descriptor: &Descriptor) -> Option<Table> {
        let len = descriptor.len as usize;
        let entries = u16::try_from(len / DESCRIPTOR).ok()?;
        let table: Result<_, GuestMemoryError> =
            GuestMemoryBackend::get_slice(&self.memory, GuestAddress(descriptor.gpa), len);
        let table = table.ok().filter(|_| len.is_multiple_of(DESCRIPTOR))?;
        Some(Table {
            descriptors: table.ptr_guard_mut().as_ptr().cast(),
            len: entries,
        })
    }
}

/// A table of descriptors in guest memory.
struct Table {
    descriptors: *const [u64; 2],
    len: u16,
}

impl Table {
    fn get(&self, index: u16) -> Option<Descriptor> {
        if index >= self.len {
            return None;
        }
        // SAFETY: who made the table has checked that `len` descriptors are in guest memory, which stays mapped. An indirect table need not
        // be aligned. A driver that writes it meanwhile gets a descriptor of old and new bytes, which is checked like any other.
        let bytes = unsafe {
            self.descriptors
                .add(usize::from(index))
                .cast::<Bytes>()
                .read_volatile()
        };
        Some(Descriptor::new(bytes.0))
    }
}

/// The bytes of a descriptor at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Bytes([u64; 2]);

#[cfg(test)]
mod tests {
    use super::super::testing::Driver;
    use super::*;
    use vm_memory::Bytes as _;

    fn rings(driver: &Driver) -> Rings {
        let queue = driver.queue().into_queue();
        Rings::new(&queue, driver.memory()).expect("rings in RAM")
    }

    #[test]
    fn what_was_written_of_the_used_ring() {
        let driver = Driver::new(0);
        let rings = rings(&driver);
        let base = rings.used_gpa;
        let size = Driver::SIZE;
        for (from, to, slots) in [
            (0, 1, [(0, 1), (0, 0)]),
            (size - 1, size + 2, [(size - 1, 1), (0, 2)]),
            (u16::MAX, 1, [(size - 1, 1), (0, 1)]),
            (3, 3 + size, [(3, size - 3), (0, 3)]),
            (5, 5, [(5, 0), (0, 0)]),
        ] {
            let expected = slots.map(|(slot, count): (u16, u16)| {
                (base + 4 + u64::from(slot) * 8, u32::from(count) * 8)
            });
            let [header, first, second] = rings.used_between(from, to);
            assert_eq!(header, (base, if from == to { 0 } else { 4 }));
            assert_eq!([first, second], expected, "{from} to {to}");
        }
    }

    #[test]
    fn indirect_tables() {
        let mut driver = Driver::new(0);
        let rings = rings(&driver);
        // A table that is not aligned.
        let table = driver.buffer(64) + 1;
        let put = |driver: &Driver, at: u64, gpa: u64, len: u32, flags: u16, next: u16| {
            let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
            let place = GuestAddress(table + at * 16);
            let bytes = [gpa.to_le_bytes(), rest.to_le_bytes()].concat();
            driver.memory().write_slice(&bytes, place).expect("RAM");
        };
        put(&driver, 0, 0x20_0000, 16, NEXT, 2);
        put(&driver, 2, 0x30_0000, 512, WRITE, 0);
        // A descriptor of the ring's own before the one that names the table.
        driver.descriptor(3, 0x10_0000, 8, NEXT, 4);
        driver.descriptor(4, table, 48, INDIRECT, 0);
        let (readable, writable) = rings.chain(3).expect("a chain");
        assert_eq!(readable.parts(), [(0x10_0000, 8), (0x20_0000, 16)]);
        assert_eq!(writable.parts(), [(0x30_0000, 512)]);
        // A table within a table, a link out of it, a loop, no descriptor, half a descriptor, not in RAM.
        put(&driver, 2, table, 16, INDIRECT, 0);
        assert!(matches!(rings.chain(4), Err(QueueError::Chain(4))));
        put(&driver, 2, 0x30_0000, 512, NEXT | WRITE, 3);
        assert!(matches!(rings.chain(4), Err(QueueError::Chain(4))));
        put(&driver, 2, 0x30_0000, 512, NEXT | WRITE, 2);
        assert!(matches!(rings.chain(4), Err(QueueError::Chain(4))));
        for (gpa, len) in [
            (table, 0),
            (table, 40),
            (1 << 50, 48),
            (u64::MAX, 16),
            (0, u32::MAX),
        ] {
            driver.descriptor(4, gpa, len, INDIRECT, 0);
            assert!(
                matches!(rings.chain(4), Err(QueueError::Chain(4))),
                "{gpa:#x} {len:#x}"
            );
        }
    }

    #[test]
    fn a_table_is_read_only_as_far_as_a_chain_may_be_long() {
        let mut driver = Driver::new(0);
        let rings = rings(&driver);
        let table = driver.buffer(16 * (u32::from(LONGEST) + 8));
        let parts = |count: u16| {
            for at in 0..count {
                let flags = u64::from(if at + 1 < count { NEXT } else { 0 });
                let rest = 8 | flags << 32 | u64::from(at + 1) << 48;
                let bytes = [0x20_0000_u64.to_le_bytes(), rest.to_le_bytes()].concat();
                let place = GuestAddress(table + u64::from(at) * 16);
                driver.memory().write_slice(&bytes, place).expect("RAM");
            }
            driver.descriptor(0, table, u32::from(count) * 16, INDIRECT, 0);
            rings.chain(0).map(|(readable, _)| readable.parts().len())
        };
        assert_eq!(parts(LONGEST).ok(), Some(usize::from(LONGEST)));
        assert!(matches!(parts(LONGEST + 1), Err(QueueError::Chain(0))));
    }

    #[test]
    fn no_chain_is_longer_than_a_device_can_count() {
        let driver = Driver::new(0);
        let rings = rings(&driver);
        let all = 64 << 20;
        for at in 0..Driver::SIZE {
            driver.descriptor(at, 0, all, NEXT | WRITE, at + 1);
        }
        driver.descriptor(Driver::SIZE - 1, 0, all, WRITE, 0);
        // 64 times 64 MiB.
        assert!(matches!(rings.chain(0), Err(QueueError::Chain(0))));
        assert_eq!(
            rings.chain(1).expect("a chain").1.len(),
            63 * u64::from(all)
        );
    }

    #[test]
    fn rings_outside_of_ram() {
        let driver = Driver::new(0);
        let mut queue = driver.queue().into_queue();
        queue.set_used_ring_address(Some((64 << 20) - 256), Some(0));
        assert!(matches!(
            Rings::new(&queue, driver.memory()),
            Err(QueueError::NotRam { .. })
        ));
    }
}
