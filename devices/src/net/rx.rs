//! Packets from the host to the guest.
//!
//! ```text
//!   ┌─► take buffers ── none ────────────► sleep until the driver notifies; the interface is not polled
//!   │        ▼
//!   │     too fast? ── yes ──────────────► sleep until the rate limiter lets one pass; packets wait in the host
//!   │        ▼
//!   │     readv ─── nothing there ───────► sleep until the interface has a packet
//!   │        │  └── failed ──────────────► rest, so that a broken interface does not keep the thread busy
//!   │        ▼
//!   │     all in the buffers? ── no ─────► take more; keep the rest in the host until there are enough, for PATIENCE
//!   │        ▼
//!   └── num_buffers, complete, publish
//! ```

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::limits;
use super::port;
use super::ready::Ready;
use super::shared::Shared;
use super::{HEADER_LEN, MAX_PACKET};
use crate::virtio::{QueueError, QueueHandler, Virtqueue};

/// Packets in one go. The driver hears of them after it, and a stop is seen.
const BATCH: usize = 64;
/// How long a packet waits for buffers while a part of it is in some. A driver with a small queue may wait for packets itself before it
/// offers more.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long an interface is left alone that gives errors.
const REST: Duration = Duration::from_millis(100);
/// Ethernet header with a VLAN tag, twice.
const LINK_HEADERS: usize = 22;
const USUAL_MTU: u16 = 1500;

/// A packet that has not gone into the buffers that there were.
struct Partial {
    /// Of all of it.
    len: usize,
    /// Of what is in the buffers; the rest is in the spill.
    placed: usize,
    until: Instant,
}

enum Read {
    Packet,
    Nothing,
}

pub(super) struct Rx {
    shared: Arc<Shared>,
    pair: u16,
    mergeable: bool,
    /// Room that a packet needs as long as the driver takes no large ones, as far as is known.
    small: u64,
    ready: Ready,
    partial: Option<Partial>,
    /// Where the system puts what the buffers have no room for.
    spill: Vec<u8>,
    resting: bool,
    /// The rate limiter lets nothing pass before then.
    throttled: Option<Instant>,
    /// The driver may notify of new buffers.
    notified: bool,
}

impl Rx {
    pub(super) fn new(shared: Arc<Shared>, pair: u16, mergeable: bool, mtu: Option<u16>) -> Self {
        let small = HEADER_LEN + LINK_HEADERS + usize::from(mtu.unwrap_or(USUAL_MTU));
        Self {
            shared,
            pair,
            mergeable,
            small: small as u64,
            ready: Ready::default(),
            partial: None,
            spill: vec![0; MAX_PACKET],
            resting: false,
            throttled: None,
            notified: true,
        }
    }

    /// Room to have before a packet is read. One buffer will do if packets cannot be spread.
    fn wanted(&self) -> u64 {
        if !self.mergeable {
            1
        } else if self.shared.large_packets() {
            MAX_PACKET as u64
        } else {
            self.small
        }
    }

    /// Receives until there is nothing to do without waiting.
    fn receive(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        for _ in 0..BATCH {
            if !self.shared.is_active(self.pair) {
                return Ok(());
            }
            if self.partial.is_some() && !self.go_on(queue)? {
                return Ok(());
            }
            self.ready.fill(queue, self.wanted())?;
            if self.ready.is_empty() && !self.fill_or_be_told(queue, 1)? {
                return Ok(());
            }
            if std::mem::take(&mut self.notified) {
                queue.disable_notification()?;
            }
            if let Err(until) = self.shared.limits.rx.may_begin() {
                self.shared.counters.rx.throttled.add(1);
                self.throttled = Some(until);
                return Ok(());
            }
            match self.read(queue)? {
                Read::Packet => {}
                Read::Nothing => return Ok(()),
            }
        }
        // There may be more, also when the buffers that were taken are all used: come back after a look at whether to stop.
        queue.kick().write(1)?;
        Ok(())
    }

    /// Takes buffers; if there are not enough, the driver will notify when it offers more.
    fn fill_or_be_told(&mut self, queue: &mut Virtqueue, wanted: u64) -> Result<bool, QueueError> {
        loop {
            self.ready.fill(queue, wanted)?;
            if self.ready.bytes() >= wanted {
                return Ok(true);
            }
            self.notified = true;
            if !queue.enable_notification()? {
                return Ok(false);
            }
        }
    }

    /// Reads a packet into the buffers, and completes it if it fits.
    fn read(&mut self, queue: &mut Virtqueue) -> Result<Read, QueueError> {
        let chains = if self.mergeable { usize::MAX } else { 1 };
        let mut list = Vec::with_capacity(64);
        let room = self.ready.list(chains, &mut list);
        list.push(libc::iovec {
            iov_base: self.spill.as_mut_ptr().cast(),
            iov_len: self.spill.len(),
        });
        // SAFETY: the buffers are in the queue's guest memory, into which there are no references, and in the spill, which lives on.
        let result = unsafe { port::read_packet(self.shared.port(self.pair).fd(), &list) };
        let len = match result {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Read::Nothing),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Read::Packet),
            Err(error) => {
                // A pair that was just detached gives an error as well.
                if self.shared.is_active(self.pair) {
                    tracing::debug!(pair = self.pair, %error, "a network interface cannot be read");
                    self.shared.counters.rx.errors.add(1);
                    self.resting = true;
                }
                return Ok(Read::Nothing);
            }
        };
        let placed = len.min(room);
        self.ready.written(queue, placed as u64);
        if len < HEADER_LEN || len >= room + self.spill.len() {
            // Nothing at all is an end of file: it would be there again at once.
            self.resting = len == 0;
            self.shared.counters.rx.errors.add(1);
            return Ok(if self.resting {
                Read::Nothing
            } else {
                Read::Packet
            });
        }
        self.shared.limits.rx.charge((len - HEADER_LEN) as u64);
        if len <= room {
            self.complete(queue, len)?;
        } else if self.mergeable {
            self.partial = Some(Partial {
                len,
                placed,
                until: Instant::now() + PATIENCE,
            });
        } else {
            self.shared.counters.rx.dropped.add(1);
        }
        Ok(Read::Packet)
    }

    /// Completes the packet that waits for buffers, or drops it when it has waited long enough; false if it waits on.
    fn go_on(&mut self, queue: &mut Virtqueue) -> Result<bool, QueueError> {
        let Some(partial) = self.partial.take() else {
            return Ok(true);
        };
        if self.fill_or_be_told(queue, partial.len as u64)? {
            let rest = &self.spill[..partial.len - partial.placed];
            self.ready.write(queue, partial.placed as u64, rest)?;
            self.complete(queue, partial.len)?;
        } else if Instant::now() >= partial.until {
            self.shared.counters.rx.dropped.add(1);
        } else {
            self.partial = Some(partial);
            return Ok(false);
        }
        Ok(true)
    }

    fn complete(&mut self, queue: &mut Virtqueue, len: usize) -> Result<(), QueueError> {
        self.ready.complete(queue, len as u64)?;
        self.shared.counters.rx.passed(len);
        Ok(())
    }
}

impl QueueHandler for Rx {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        self.shared.woken(self.pair);
        self.resting = false;
        if self.throttled.is_some_and(|until| Instant::now() < until) {
            return Ok(());
        }
        self.throttled = None;
        self.receive(queue)?;
        queue.signal()
    }

    fn drain(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        if self.partial.take().is_some() {
            self.shared.counters.rx.dropped.add(1);
        }
        self.ready.give_back(queue);
        queue.signal()
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        let mut sources = vec![self.shared.wake(self.pair)];
        if self.shared.is_active(self.pair)
            && !self.resting
            && self.throttled.is_none()
            && self.partial.is_none()
            && !self.ready.is_empty()
        {
            sources.push(self.shared.port(self.pair).fd());
        }
        sources
    }

    fn timeout(&self) -> Option<Duration> {
        if let Some(partial) = &self.partial {
            return Some(limits::left(partial.until));
        }
        if let Some(until) = self.throttled {
            return Some(limits::left(until));
        }
        self.resting.then_some(REST)
    }
}
