//! Packets from the guest to the host.
//!
//! An interface that is full is tried again every [`RETRY`], up to [`TRIES`] times, and only then is the packet dropped: TCP takes a loss
//! for congestion, and a moment's wait for nothing. A TAP interface is hardly ever full, since the host's stack takes or drops a packet
//! at once; while one is, each packet is tried once and dropped, so that the guest's transmit queue never stands still for long.
//!
//! A rate limiter lets packets wait in the ring, however long.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::limits;
use super::port;
use super::shared::Shared;
use super::{HEADER_LEN, MAX_IOVECS, MAX_PACKET};
use crate::virtio::{Chain, QueueError, QueueHandler, Virtqueue};

/// Packets in one go. The driver hears of them after it, and a stop is seen.
const BATCH: usize = 256;
const RETRY: Duration = Duration::from_millis(1);
const TRIES: u32 = 100;

enum Sent {
    /// Or dropped.
    Gone,
    Full,
    /// The rate limiter lets nothing pass before then.
    Throttled(Instant),
}

pub(super) struct Tx {
    shared: Arc<Shared>,
    pair: u16,
    /// How often the interface was full in a row; not above [`TRIES`].
    full: u32,
    waiting: bool,
    /// The next packet has been taken from the rate limiter, and is tried again.
    paid: bool,
    throttled: Option<Instant>,
}

impl Tx {
    pub(super) fn new(shared: Arc<Shared>, pair: u16) -> Self {
        Self {
            shared,
            pair,
            full: 0,
            waiting: false,
            paid: false,
            throttled: None,
        }
    }

    fn transmit(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        queue.disable_notification()?;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop()? else {
                if queue.enable_notification()? {
                    queue.disable_notification()?;
                    continue;
                }
                return Ok(());
            };
            match self.send(queue, &chain)? {
                Sent::Gone => queue.complete(chain.head, 0)?,
                Sent::Full => {
                    queue.unpop();
                    self.waiting = true;
                    return Ok(());
                }
                Sent::Throttled(until) => {
                    queue.unpop();
                    self.shared.counters.tx.throttled.add(1);
                    self.throttled = Some(until);
                    return Ok(());
                }
            }
        }
        // There may be more: come back after a look at whether to stop.
        queue.kick().write(1)?;
        Ok(())
    }

    fn send(&mut self, queue: &Virtqueue, chain: &Chain) -> Result<Sent, QueueError> {
        let tx = &self.shared.counters.tx;
        let len = chain.readable.len();
        if len < HEADER_LEN as u64 {
            return Err(QueueError::Request(
                "a packet to send is shorter than its header",
            ));
        }
        if len > MAX_PACKET as u64 {
            tx.errors.add(1);
            return Ok(Sent::Gone);
        }
        let mut buffers = Vec::with_capacity(chain.readable.parts().len());
        chain.readable.iovecs(queue.memory(), &mut buffers)?;
        if buffers.len() > MAX_IOVECS {
            tx.errors.add(1);
            return Ok(Sent::Gone);
        }
        if !self.paid
            && let Err(until) = self.shared.limits.tx.take(len - HEADER_LEN as u64)
        {
            return Ok(Sent::Throttled(until));
        }
        self.paid = true;
        // SAFETY: the buffers are in the queue's guest memory.
        let result = unsafe { port::write_packet(self.shared.port(self.pair).fd(), &buffers) };
        match result {
            Ok(_) => tx.passed(len as usize),
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOBUFS) if self.full < TRIES => {
                    self.full += 1;
                    return Ok(Sent::Full);
                }
                Some(libc::EINTR) => return Ok(Sent::Full),
                // Full for too long; EIO: the interface is down. A cable that is pulled out.
                Some(libc::EAGAIN | libc::ENOBUFS | libc::EIO) => {
                    tx.dropped.add(1);
                    return Ok(Sent::Gone);
                }
                _ => {
                    self.refused(&error);
                }
            },
        }
        self.full = 0;
        self.paid = false;
        Ok(Sent::Gone)
    }

    /// A header that makes no sense (EINVAL), an interface that is gone, or no memory.
    fn refused(&self, error: &io::Error) {
        tracing::debug!(pair = self.pair, %error, "a network interface does not take a packet");
        self.shared.counters.tx.errors.add(1);
    }
}

impl QueueHandler for Tx {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        if self.throttled.is_some_and(|until| Instant::now() < until) {
            return Ok(());
        }
        self.throttled = None;
        self.waiting = false;
        self.transmit(queue)?;
        queue.signal()
    }

    fn drain(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        queue.signal()
    }

    fn timeout(&self) -> Option<Duration> {
        match self.throttled {
            Some(until) => Some(limits::left(until)),
            None => self.waiting.then_some(RETRY),
        }
    }
}
