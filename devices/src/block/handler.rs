//! Serves one queue of a disk.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::counters::{Counters, add};
use super::disk::Disk;
use super::engine::{BlockEngine, Completion, Operation};
use super::polling::Polling;
use super::request::{IOERR, Kind, Limits, OK, Request, SERIAL_LEN, UNSUPP};
use super::slab::Slab;
use crate::rate_limiter::RateLimiter;
use crate::virtio::{Chain, QueueError, QueueHandler, Virtqueue};

/// Of a host's errors, the first is logged and then each of so many.
const LOG_EACH: u64 = 1000;

/// Of many requests, so many are given to the host at once: while they are served, the driver deals with those before.
const BATCH: usize = 8;

/// What all queues of a disk have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) disk: Arc<Disk>,
    pub(super) serial: [u8; SERIAL_LEN],
    /// Most buffers of a request.
    pub(super) parts: usize,
    /// In sectors, as the guest was told.
    pub(super) capacity: AtomicU64,
    /// A write is durable before it is answered: the driver cannot flush.
    pub(super) write_through: AtomicBool,
    pub(super) limiter: Option<Mutex<RateLimiter>>,
    pub(super) counters: Counters,
    /// The [`super::EngineKind`] in use.
    pub(super) engine: AtomicU8,
}

/// A request that the engine has.
struct Pending {
    chain: Chain,
    kind: Kind,
    sector: u64,
    bytes: u64,
}

/// Why no more requests are taken.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    /// There are no more.
    All,
    /// The engine has as many as it may.
    Full,
    /// The rate limiter says so.
    Throttled,
    /// There may be more, but a stop must be seen.
    Enough,
}

/// Serves one queue.
pub(super) struct Handler {
    shared: Arc<Shared>,
    engine: Box<dyn BlockEngine>,
    pending: Slab<Pending>,
    /// Before then the rate limiter lets nothing pass.
    resume: Option<Instant>,
    polling: Polling,
    /// Reused.
    done: Vec<Completion>,
}

impl Handler {
    pub(super) fn new(shared: Arc<Shared>, engine: Box<dyn BlockEngine>) -> Self {
        Self {
            shared,
            engine,
            pending: Slab::default(),
            resume: None,
            polling: Polling::new(),
            done: Vec::new(),
        }
    }

    /// Gives requests to the engine, as many as `budget` says, which it counts down.
    fn take(&mut self, queue: &mut Virtqueue, budget: &mut u32) -> Result<Taken, QueueError> {
        if self.resume.is_some_and(|resume| Instant::now() < resume) {
            return Ok(Taken::Throttled);
        }
        self.resume = None;
        let mut batch = 0;
        loop {
            if batch == BATCH {
                batch = 0;
                self.engine.kick()?;
                self.answer_finished(queue)?;
            }
            if self.pending.len() >= usize::from(queue.size()) {
                return Ok(Taken::Full);
            }
            if *budget == 0 {
                return Ok(Taken::Enough);
            }
            *budget -= 1;
            let Some(chain) = queue.pop()? else {
                return Ok(Taken::All);
            };
            let limits = Limits {
                capacity: self.shared.capacity.load(Ordering::Acquire),
                read_only: self.shared.disk.read_only(),
                discard: self.shared.disk.discard().is_some(),
                parts: self.shared.parts,
            };
            match Request::parse(&chain, queue.memory(), limits)? {
                Request::Answer { status } => answer(queue, &chain, status, 0)?,
                Request::Identify { len } => {
                    queue.write(&chain.writable, 0, &self.shared.serial[..len])?;
                    answer(queue, &chain, OK, len as u32)?;
                }
                Request::Do {
                    kind,
                    operation,
                    sector,
                    bytes,
                } => {
                    if self.must_wait(bytes) {
                        queue.unpop();
                        return Ok(Taken::Throttled);
                    }
                    let pending = Pending {
                        chain,
                        kind,
                        sector,
                        bytes,
                    };
                    self.submit(queue, pending, operation)?;
                    batch += 1;
                }
            }
        }
    }

    fn submit(
        &mut self,
        queue: &mut Virtqueue,
        pending: Pending,
        operation: Operation,
    ) -> Result<(), QueueError> {
        let durable = self.shared.write_through.load(Ordering::Relaxed);
        let token = self.pending.insert(pending);
        self.engine.submit(token, operation, durable)?;
        if self.engine.source().is_none() {
            // It is done already; the guest need not wait for those behind it.
            self.reap(queue)?;
        }
        Ok(())
    }

    fn must_wait(&mut self, bytes: u64) -> bool {
        let Some(limiter) = &self.shared.limiter else {
            return false;
        };
        let now = Instant::now();
        let taken = limiter
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .try_take(bytes, now);
        if let Err(wait) = taken {
            add(&self.shared.counters.throttled, 1);
            // A clock that cannot hold it: look again in a while.
            self.resume = Some(
                now.checked_add(wait)
                    .unwrap_or(now + Duration::from_secs(60)),
            );
        }
        taken.is_err()
    }

    /// Answers what the engine has finished, and lets the driver hear of it.
    fn reap(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        self.answer_finished(queue)?;
        queue.signal()
    }

    /// Answers what the engine has finished: a driver that looks sees it.
    fn answer_finished(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        let mut done = std::mem::take(&mut self.done);
        let mut result = self.engine.completions(&mut done).map_err(QueueError::from);
        for Completion { token, result: end } in done.drain(..) {
            // All are taken off, even when the ring is broken.
            if let Some(pending) = self.pending.remove(token) {
                let answered = self.finish(queue, &pending, end);
                result = result.and(answered);
            }
        }
        self.done = done;
        queue.publish();
        result
    }

    /// Waits a moment for more to do, without sleeping.
    fn look(&mut self, queue: &Virtqueue) -> Result<bool, QueueError> {
        let engine = &mut self.engine;
        let under_way = !self.pending.is_empty();
        self.polling
            .look(|| Ok(under_way && engine.has_finished() || queue.has_more()?))
    }

    fn finish(
        &self,
        queue: &mut Virtqueue,
        pending: &Pending,
        result: io::Result<()>,
    ) -> Result<(), QueueError> {
        let read = pending.kind == Kind::Read;
        if read {
            // Also after a failure: a part may have been written.
            queue.written(&pending.chain.writable, pending.bytes);
        }
        let written = if read && result.is_ok() {
            pending.bytes as u32
        } else {
            0
        };
        answer(
            queue,
            &pending.chain,
            self.account(pending, result),
            written,
        )
    }

    /// Counts an operation that has ended; returns its status.
    fn account(&self, pending: &Pending, result: io::Result<()>) -> u8 {
        let counters = &self.shared.counters;
        if let Err(error) = result {
            let before = add(&counters.errors, 1);
            if before.is_multiple_of(LOG_EACH) {
                tracing::error!(
                    disk = %self.shared.disk.path().display(),
                    operation = ?pending.kind,
                    sector = pending.sector,
                    bytes = pending.bytes,
                    failed_before = before,
                    %error,
                    "the host's disk failed; the guest sees an I/O error"
                );
            }
            let refused = error.raw_os_error() == Some(libc::EOPNOTSUPP);
            return if refused { UNSUPP } else { IOERR };
        }
        match pending.kind {
            Kind::Read => {
                add(&counters.reads, 1);
                add(&counters.read_bytes, pending.bytes);
            }
            Kind::Write => {
                add(&counters.writes, 1);
                add(&counters.write_bytes, pending.bytes);
            }
            Kind::Flush => {
                add(&counters.flushes, 1);
            }
            Kind::Discard => {
                add(&counters.discards, 1);
            }
            Kind::WriteZeroes => {
                add(&counters.write_zeroes, 1);
            }
        }
        OK
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handler")
            .field("pending", &self.pending.len())
            .field("resume", &self.resume)
            .finish_non_exhaustive()
    }
}

/// Writes the status, which is the last byte, and gives the chain back.
fn answer(
    queue: &mut Virtqueue,
    chain: &Chain,
    status: u8,
    written: u32,
) -> Result<(), QueueError> {
    let at = chain.writable.len() - 1;
    queue.write(&chain.writable, at, &[status])?;
    queue.complete(chain.head, written + 1)
}

impl Handler {
    /// Serves the queue until there is nothing to do, or other things must be looked at.
    fn serve(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        let mut budget = u32::from(queue.size());
        self.reap(queue)?;
        queue.disable_notification()?;
        loop {
            let taken = self.take(queue, &mut budget);
            self.engine.kick()?;
            self.reap(queue)?;
            match taken? {
                // The driver need not notify: a completion or the time wakes this thread.
                Taken::Throttled => return Ok(()),
                Taken::Full if self.pending.len() >= usize::from(queue.size()) => return Ok(()),
                Taken::Full => {}
                Taken::All => {
                    if budget > 0 && self.look(queue)? {
                        continue;
                    }
                    if !queue.enable_notification()? {
                        return Ok(());
                    }
                    queue.disable_notification()?;
                }
                Taken::Enough => {
                    queue.kick().write(1)?;
                    return Ok(());
                }
            }
        }
    }
}

impl QueueHandler for Handler {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        self.polling.woken();
        let served = self.serve(queue);
        self.polling.sleeps();
        served
    }

    fn drain(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        let mut result = Ok(());
        while !self.pending.is_empty() {
            // An engine that cannot even wait keeps the memory when it is dropped.
            self.engine.wait()?;
            let before = self.pending.len();
            result = result.and(self.reap(queue));
            if self.pending.len() == before {
                return Err(io::Error::other("the engine has lost an operation").into());
            }
        }
        result.and(queue.signal())
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.engine.source().into_iter().collect()
    }

    fn timeout(&self) -> Option<Duration> {
        self.resume
            .map(|resume| resume.saturating_duration_since(Instant::now()))
    }
}
