//! A driver's side of the queues of a function, at places that do not overlap.

use vm_memory::{Bytes, GuestAddress};

use crate::input::Part;
use crate::machine::World;
use crate::ram;

/// Bytes that a queue's rings have: descriptors, available, used.
const AREA: u64 = 0x3000;
/// Where the first queue is, and the buffers of all.
const QUEUES: u64 = 0x1000;
const BUFFERS: u64 = 0x6_0000;
/// Queues that a function may have.
const MOST_QUEUES: u64 = 5;
/// No queue is larger.
const MOST_SIZE: u16 = 64;
/// VIRTQ_DESC_F_NEXT, WRITE and INDIRECT.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One queue.
pub struct Ring {
    /// Descriptors.
    pub size: u16,
    base: u64,
    available: u16,
    used: u16,
    next: u16,
}

/// The queues of one function.
pub struct Side {
    function: usize,
    rings: Vec<Ring>,
    buffer: u64,
}

impl Side {
    /// Of the function with this number, whose queues may be so large.
    pub fn new(function: usize, sizes: &[u16]) -> Self {
        let first = QUEUES + function as u64 * MOST_QUEUES * AREA;
        let rings = (first..).step_by(AREA as usize).zip(sizes);
        let rings: Vec<_> = rings
            .map(|(base, size)| Ring {
                size: MOST_SIZE.min(*size),
                base,
                available: 0,
                used: 0,
                next: 0,
            })
            .collect();
        assert!(rings.len() <= MOST_QUEUES as usize);
        assert!(first + MOST_QUEUES * AREA <= BUFFERS);
        Self {
            function,
            rings,
            buffer: BUFFERS,
        }
    }

    /// Its PCI slot.
    pub fn slot(&self) -> u8 {
        self.function as u8 + 1
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.rings.len()
    }

    /// One of them, whatever the number.
    pub fn queue(&mut self, number: u8) -> &mut Ring {
        let count = self.rings.len();
        &mut self.rings[usize::from(number) % count]
    }

    /// Requests that the devices say to have finished.
    pub fn finished(&self, world: &World) -> u64 {
        self.rings
            .iter()
            .map(|ring| u64::from(ring.used_index(world)))
            .sum()
    }

    /// Makes a chain available; its head, and where its writable buffers are.
    pub fn offer(
        &mut self,
        world: &World,
        queue: u8,
        parts: &[Part],
        indirect: bool,
    ) -> (u16, Vec<(u64, u32)>) {
        let mut buffers = Vec::new();
        for part in parts {
            let (len, flags) = match part {
                Part::Readable(bytes) => (bytes.len() as u32, 0),
                Part::Writable(len) => (*len, WRITE),
            };
            let gpa = self.buffer(len);
            if let Part::Readable(bytes) = part {
                let _ = world
                    .ram
                    .guest_memory()
                    .write_slice(bytes, GuestAddress(gpa));
            }
            buffers.push((gpa, len, flags));
        }
        let writable = buffers.iter().filter(|buffer| buffer.2 != 0);
        let writable = writable.map(|buffer| (buffer.0, buffer.1)).collect();
        let table = self.buffer(buffers.len() as u32 * 16);
        let ring = self.queue(queue);
        let head = ring.next;
        if indirect {
            for (index, &(gpa, len, flags)) in (0..).zip(&buffers) {
                let more = if usize::from(index) + 1 < buffers.len() {
                    NEXT
                } else {
                    0
                };
                let bytes = descriptor((gpa, len, flags | more, index + 1));
                let at = GuestAddress(table + u64::from(index) * 16);
                let _ = world.ram.guest_memory().write_slice(&bytes, at);
            }
            let len = buffers.len() as u32 * 16;
            ring.descriptor(world, head, (table, len, INDIRECT, 0));
            ring.next = (head + 1) % ring.size;
        } else {
            for (number, &(gpa, len, flags)) in buffers.iter().enumerate() {
                let more = if number + 1 < buffers.len() { NEXT } else { 0 };
                let (at, next) = (ring.next, (ring.next + 1) % ring.size);
                ring.descriptor(world, at, (gpa, len, flags | more, next));
                ring.next = next;
            }
        }
        ring.make_available(world, head);
        (head, writable)
    }

    /// Room for a buffer. Those of long ago are overwritten.
    fn buffer(&mut self, len: u32) -> u64 {
        let len = u64::from(len);
        if self.buffer + len > ram::LOW {
            self.buffer = BUFFERS;
        }
        let at = self.buffer;
        self.buffer = (at + len).next_multiple_of(16);
        at
    }
}

fn descriptor((gpa, len, flags, next): (u64, u32, u16, u16)) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&gpa.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

impl Ring {
    /// Descriptors, available ring, used ring.
    pub fn places(&self) -> [u64; 3] {
        [self.base, self.base + 0x1000, self.base + 0x2000]
    }

    /// As a driver leaves it that has reset the queue.
    pub fn empty(&mut self, world: &World) {
        for at in self.places() {
            let memory = world.ram.guest_memory();
            memory
                .write_slice(&[0; 0x1000], GuestAddress(at))
                .expect("RAM");
        }
        (self.available, self.used, self.next) = (0, 0, 0);
    }

    /// Writes a descriptor: address, length, flags, next.
    pub fn descriptor(&self, world: &World, index: u16, fields: (u64, u32, u16, u16)) {
        let at = self.base + u64::from(index % self.size) * 16;
        let memory = world.ram.guest_memory();
        memory
            .write_slice(&descriptor(fields), GuestAddress(at))
            .expect("RAM");
    }

    /// Makes a head available.
    pub fn make_available(&mut self, world: &World, head: u16) {
        let ring = self.places()[1];
        let slot = ring + 4 + u64::from(self.available % self.size) * 2;
        self.available = self.available.wrapping_add(1);
        let memory = world.ram.guest_memory();
        memory.write_obj(head, GuestAddress(slot)).expect("RAM");
        memory
            .write_obj(self.available, GuestAddress(ring + 2))
            .expect("RAM");
    }

    fn used_index(&self, world: &World) -> u16 {
        let at = GuestAddress(self.places()[2] + 2);
        world.ram.guest_memory().read_obj(at).expect("RAM")
    }

    /// The next request that came back: head and length.
    pub fn used(&mut self, world: &World) -> Option<(u16, u32)> {
        if self.used_index(world) == self.used {
            return None;
        }
        let at = self.places()[2] + 4 + u64::from(self.used % self.size) * 8;
        self.used = self.used.wrapping_add(1);
        let memory = world.ram.guest_memory();
        let head: u32 = memory.read_obj(GuestAddress(at)).expect("RAM");
        let len = memory.read_obj(GuestAddress(at + 4)).expect("RAM");
        Some((head as u16, len))
    }
}
