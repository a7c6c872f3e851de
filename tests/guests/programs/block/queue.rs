//! A split virtqueue of requests for blocks (Virtual I/O Device 1.3, section 2.7), polled.
//!
//! ```text
//!   slot ─► descriptors 3s: header (read), 3s+1: block (write, or read if the disk is written), 3s+2: status (write); laid out once
//!   start(slot, block, …) … publish() ─► one notification if the device wants it        next_done() ─► slot
//! ```

use core::sync::atomic::{AtomicU16, Ordering, fence};

use super::checksum::BLOCK;
use super::pci;
use super::rt::machine::{Machine, PAGE};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;
/// Descriptors of a request.
const CHAIN: u16 = 3;
/// Sectors of a block.
const SECTORS: u64 = (BLOCK / 512) as u64;
/// A status that no device writes.
const NO_STATUS: u8 = 0xff;

#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// VIRTIO_BLK_T_OUT.
const OUT: u32 = 1;

/// `struct virtio_blk_req` without its data, and what the driver remembers of a request.
#[repr(C, align(64))]
struct Request {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
    block: u64,
    started: u64,
}

/// A request that is done.
pub struct Done {
    /// Where it may be started again.
    pub slot: u16,
    /// The block that was read.
    pub block: u64,
    /// What was given as the moment of its start.
    pub started: u64,
    /// The device says that it went well, and wrote as much as it must.
    pub ok: bool,
}

/// A queue.
pub struct Queue {
    index: u16,
    size: u16,
    depth: u16,
    event_idx: bool,
    /// Its notification address.
    notify: u64,
    /// Descriptor table, available ring, used ring, requests, data.
    rings: [u64; 3],
    requests: *mut Request,
    data: u64,
    next_available: u16,
    published: u16,
    next_used: u16,
    under_way: u16,
}

impl Queue {
    /// Lays out rings of `size` descriptors; none if they do not hold `depth` requests.
    pub fn lay_out(
        machine: &Machine,
        index: u16,
        size: u16,
        depth: u16,
        notify: u64,
        event_idx: bool,
    ) -> Option<Queue> {
        if !size.is_power_of_two() || depth == 0 || u32::from(depth) * u32::from(CHAIN) > size.into()
        {
            return None;
        }
        let zeroed = |bytes: u64| {
            let at = machine.allocate(bytes, PAGE);
            // SAFETY: fresh memory of our own.
            unsafe { (at as *mut u8).write_bytes(0, bytes as usize) };
            at
        };
        let (wide, deep) = (u64::from(size), u64::from(depth));
        let rings = [
            zeroed(wide * 16),
            zeroed(6 + wide * 2),
            zeroed(6 + wide * 8),
        ];
        let requests = zeroed(deep * size_of::<Request>() as u64) as *mut Request;
        let data = zeroed(deep * BLOCK as u64);
        for slot in 0..depth {
            // SAFETY: within what was just allocated, which nobody else knows yet.
            unsafe {
                let request = requests.add(slot.into());
                let chain = (rings[0] as *mut Descriptor).add(usize::from(slot * CHAIN));
                let descriptor = |address: u64, len: usize, flags: u16, part: u16| Descriptor {
                    address,
                    len: len as u32,
                    flags,
                    next: slot * CHAIN + part + 1,
                };
                let block = data + u64::from(slot) * BLOCK as u64;
                chain.write(descriptor(request as u64, 16, NEXT, 0));
                chain.add(1).write(descriptor(block, BLOCK, NEXT | WRITE, 1));
                chain
                    .add(2)
                    .write(descriptor((&raw mut (*request).status) as u64, 1, WRITE, 2));
            }
        }
        let queue = Queue {
            index,
            size,
            depth,
            event_idx,
            notify,
            rings,
            requests,
            data,
            next_available: 0,
            published: 0,
            next_used: 0,
            under_way: 0,
        };
        if !event_idx {
            queue.half_word(queue.available(), 0).store(NO_INTERRUPT, Ordering::Relaxed);
        }
        Some(queue)
    }

    /// Address of the descriptor table.
    pub fn descriptors(&self) -> u64 {
        self.rings[0]
    }

    /// Address of the available ring.
    pub fn available(&self) -> u64 {
        self.rings[1]
    }

    /// Address of the used ring.
    pub fn used(&self) -> u64 {
        self.rings[2]
    }

    /// Requests that may be under way; slots are numbered from 0.
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// Requests that are under way.
    pub fn under_way(&self) -> u16 {
        self.under_way
    }

    /// Where a slot that is not under way has its data.
    pub fn data_mut(&mut self, slot: u16) -> &mut [u8] {
        let at = self.data + u64::from(slot % self.depth) * BLOCK as u64;
        // SAFETY: a buffer of this queue, which the device has given back, and which is borrowed like the queue.
        unsafe { core::slice::from_raw_parts_mut(at as *mut u8, BLOCK) }
    }

    /// Makes a write of a slot's data to `block` available, as [`Queue::start`] does with a read.
    pub fn start_write(&mut self, slot: u16, block: u64) {
        self.direct(slot, OUT);
        self.begin(slot, block, 0);
    }

    /// Which way a slot's data go.
    fn direct(&mut self, slot: u16, kind: u32) {
        let slot = slot % self.depth;
        // SAFETY: the slot is within the queue and the device does not have it.
        unsafe {
            (&raw mut (*self.requests.add(slot.into())).kind).write_volatile(kind);
            let data = (self.rings[0] as *mut Descriptor).add(usize::from(slot * CHAIN + 1));
            let flags = if kind == OUT { NEXT } else { NEXT | WRITE };
            (&raw mut (*data).flags).write_volatile(flags);
        }
    }

    /// What was read last into a slot that is not under way.
    pub fn data(&self, slot: u16) -> &[u8] {
        let at = self.data + u64::from(slot % self.depth) * BLOCK as u64;
        // SAFETY: a buffer of this queue, which the device has given back.
        unsafe { core::slice::from_raw_parts(at as *const u8, BLOCK) }
    }

    /// A field of a ring that the device reads or writes too.
    fn half_word(&self, ring: u64, offset: u64) -> &AtomicU16 {
        // SAFETY: the callers stay within their ring; it lives as long as the program.
        unsafe { &*((ring + offset) as *const AtomicU16) }
    }

    /// Makes a read of `block` available in a free slot; the device hears of it by [`Queue::publish`].
    pub fn start(&mut self, slot: u16, block: u64, now: u64) {
        self.direct(slot, 0);
        self.begin(slot, block, now);
    }

    fn begin(&mut self, slot: u16, block: u64, now: u64) {
        // SAFETY: the slot is within the queue and the device does not have it.
        unsafe {
            let request = self.requests.add(usize::from(slot % self.depth));
            (&raw mut (*request).sector).write_volatile(block * SECTORS);
            (&raw mut (*request).status).write_volatile(NO_STATUS);
            (*request).block = block;
            (*request).started = now;
        }
        let place = u64::from(self.next_available & (self.size - 1));
        self.half_word(self.available(), 4 + place * 2)
            .store(slot * CHAIN, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        self.under_way += 1;
    }

    /// Shows the device what was started, and notifies it if it wants that; returns whether it did.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return false;
        }
        if self.event_idx {
            // The position just passed: an interrupt would be due after 65,535 more.
            let wish = 4 + u64::from(self.size) * 2;
            self.half_word(self.available(), wish)
                .store(self.next_used.wrapping_sub(1), Ordering::Relaxed);
        }
        self.half_word(self.available(), 2).store(new, Ordering::Release);
        self.published = new;
        // The index must be seen before the device's wish is read (section 2.7.13.4.1).
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let wish = self
                .half_word(self.used(), 4 + u64::from(self.size) * 8)
                .load(Ordering::Relaxed);
            new.wrapping_sub(wish).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.half_word(self.used(), 0).load(Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if wanted {
            // SAFETY: the notification address of this queue.
            unsafe { pci::write(self.notify, self.index) };
        }
        wanted
    }

    /// The next request that is done, if there is one.
    pub fn next_done(&mut self) -> Option<Done> {
        if self.half_word(self.used(), 2).load(Ordering::Acquire) == self.next_used {
            return None;
        }
        let place = u64::from(self.next_used & (self.size - 1));
        // SAFETY: an element of the used ring, which the device has written.
        let (id, written) = unsafe {
            let element = (self.used() + 4 + place * 8) as *const u32;
            (element.read_volatile(), element.add(1).read_volatile())
        };
        self.next_used = self.next_used.wrapping_add(1);
        self.under_way -= 1;
        let slot = (id / u32::from(CHAIN)) as u16 % self.depth;
        // SAFETY: the slot is within the queue.
        let (status, block, started, kind) = unsafe {
            let request = self.requests.add(slot.into());
            let status = (&raw const (*request).status).read_volatile();
            (status, (*request).block, (*request).started, (*request).kind)
        };
        let expected = if kind == OUT { 1 } else { BLOCK as u32 + 1 };
        Some(Done {
            slot,
            block,
            started,
            ok: id == u32::from(slot * CHAIN) && status == 0 && written == expected,
        })
    }
}
