//! What serves the console's queues.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::port::Port;
use crate::endpoint::OUTPUT_CAPACITY;
use crate::virtio::{QueueError, QueueHandler, Virtqueue};

/// How long output waits for room while none of it leaves. Linux sends with a spinning vCPU that has its interrupts off, so that a terminal
/// that nobody reads would stop the guest for good.
const PATIENCE: Duration = Duration::from_millis(250);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Receive,
    Transmit,
}

/// Whether a request was finished, or stays in the ring until something comes from the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    Done,
    Waits,
}

/// Serves one queue.
pub(super) struct Handler {
    port: Arc<Port>,
    direction: Direction,
    /// Until when the first request in the transmit queue waits for room.
    until: Option<Instant>,
    /// It has waited in vain, and there has been no room since.
    unread: bool,
}

impl Handler {
    pub(super) fn receive(port: Arc<Port>) -> Self {
        Self::new(port, Direction::Receive)
    }

    pub(super) fn transmit(port: Arc<Port>) -> Self {
        Self::new(port, Direction::Transmit)
    }

    fn new(port: Arc<Port>, direction: Direction) -> Self {
        Self {
            port,
            direction,
            until: None,
            unread: false,
        }
    }

    /// Whether a request has to wait for room.
    fn must_wait(&mut self, len: usize) -> bool {
        if self.port.has_room(len) {
            (self.until, self.unread) = (None, false);
            return false;
        }
        let now = Instant::now();
        self.unread |= now >= *self.until.get_or_insert(now + PATIENCE);
        if self.unread {
            self.until = None;
        }
        !self.unread
    }

    /// Serves the next request, if there is one.
    fn serve(&mut self, queue: &mut Virtqueue) -> Result<Option<Served>, QueueError> {
        let Some(chain) = queue.pop()? else {
            return Ok(None);
        };
        let written = match self.direction {
            Direction::Receive => {
                let bytes = self.port.take(chain.writable.len());
                if bytes.is_empty() && !chain.writable.is_empty() {
                    queue.unpop();
                    // Otherwise it came just now; the request is the next one again.
                    let waits = self.port.want();
                    return Ok(Some(if waits { Served::Waits } else { Served::Done }));
                }
                queue.write(&chain.writable, 0, &bytes)? as u32
            }
            Direction::Transmit => {
                let len = chain.readable.len().min(OUTPUT_CAPACITY as u64) as usize;
                if self.must_wait(len) {
                    queue.unpop();
                    return Ok(Some(Served::Waits));
                }
                let mut bytes = vec![0; len];
                chain.readable.read(queue.memory(), 0, &mut bytes)?;
                self.port.output.send(&bytes);
                self.port.output.lose(chain.readable.len() - len as u64);
                0
            }
        };
        queue.complete(chain.head, written)?;
        Ok(Some(Served::Done))
    }
}

impl QueueHandler for Handler {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        // Empty if it was something else that woke this thread.
        let _ = match self.direction {
            Direction::Receive => self.port.arrived.read(),
            Direction::Transmit => {
                let left = self.port.left.read();
                if left.is_ok() {
                    // Somebody reads.
                    self.until = None;
                }
                left
            }
        };
        // A driver that never stops must not keep the worker from stopping.
        for _ in 0..queue.size() {
            match self.serve(queue)? {
                Some(Served::Done) => {}
                Some(Served::Waits) => return queue.signal(),
                None => {
                    if self.direction == Direction::Receive {
                        self.port.want_none();
                    }
                    queue.signal()?;
                    if !queue.enable_notification()? {
                        return Ok(());
                    }
                }
            }
        }
        queue.signal()?;
        queue.kick().write(1)?;
        Ok(())
    }

    fn drain(&mut self, _queue: &mut Virtqueue) -> Result<(), QueueError> {
        if self.direction == Direction::Receive {
            self.port.want_none();
        }
        Ok(())
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        let event = match self.direction {
            Direction::Receive => &self.port.arrived,
            Direction::Transmit => &self.port.left,
        };
        // SAFETY: the event is open for as long as `self.port`, which `self` borrows.
        vec![unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }]
    }

    fn timeout(&self) -> Option<Duration> {
        self.until
            .map(|until| until.saturating_duration_since(Instant::now()))
    }
}
